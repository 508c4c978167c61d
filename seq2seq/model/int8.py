"""Inference in int8 on a CPU: linear maps, and the Transformer's decoder with a whole step in one call.

Weights have a scale for each output, and inputs one for each row, so a row's result depends on no other row.

Shapes: B sentences, K hypotheses of each, R = B × K rows, T target positions, P positions before a step, S source
positions, D width, N heads, L layers, I inputs, O outputs, U words of a shortlist.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2seq.model import native, transformer
from seq2seq.model.attention import Attention, alibi
from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Decoded, Memory, OutputTable, Seq2Seq
from seq2seq.model.layers import ACTIVATIONS, FeedForward, Residual
from seq2seq.model.layout import PADDED, Layout

BLOCK = 64  # outputs that a product computes together
GROUP = 4  # inputs that an instruction multiplies together
SMALLEST = 1e-30  # a scale to divide by where everything is zero
SOURCE_ROWS = 1024  # source positions whose keys and values are computed together, in float32
PARALLEL_ROWS = 16  # fewest rows worth a second thread
NOTHING, NO_ANCESTORS = torch.empty(0), torch.empty(0, 0, dtype=torch.int32)
LINEAR_SCORES = ("dot", "scaled_dot", "general")  # those that a linear map of the query turns into a dot product


def quantize(model: Seq2Seq, library: ctypes.CDLL | None) -> None:
    """Replace the linear maps of a float32 model, and both sides of a Transformer whose score allows it as a whole."""
    encoder, decoder = model.encoder, model.decoder
    if library and isinstance(encoder, transformer.Encoder) and supports(encoder):
        model.encoder = Int8Encoder(library, encoder)
    if library and isinstance(decoder, transformer.Decoder) and supports(decoder):
        model.decoder = Int8Decoder(library, decoder)
    for module in [*model.modules()]:
        if isinstance(module, FeedForward) and isinstance(module.activation, nn.ReLU):
            module.add_module("inner", Int8Linear(library, module.inner.weight, module.inner.bias, relu=True))
            module.activation = nn.Identity()
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                module.add_module(name, Int8Linear(library, child.weight, child.bias))
            elif isinstance(child, OutputTable):
                module.add_module(name, Int8Output(library, child.weight, None))


def supports(side: nn.Module) -> bool:
    return all(part.score in LINEAR_SCORES for part in side.modules() if isinstance(part, Attention))


class Int8Linear(nn.Module):
    """A linear map with int8 weights, and inputs quantised row by row; without the library, in plain torch."""

    def __init__(
        self, library: ctypes.CDLL | None, weight_OI: Tensor, bias_O: Tensor | None, relu: bool = False
    ) -> None:
        super().__init__()
        self.library, self.relu, (self.outputs, self.inputs) = library, relu, weight_OI.shape
        self.scale_O = weight_OI.detach().abs().amax(1) / 127
        self.integer_OI = (weight_OI.detach() / self.scale_O.clamp(min=SMALLEST)[:, None]).round()
        self.bias_O = torch.zeros(self.outputs) if bias_O is None else bias_O.detach()
        if library:
            self._pack()

    def _pack(self) -> None:
        """Lay the weights out as the library reads them: blocks of outputs, and in these groups of inputs."""
        padding = -self.outputs % BLOCK
        bytes_OI = F.pad(self.integer_OI.to(torch.int8), (0, -self.inputs % GROUP, 0, padding))
        del self.integer_OI
        self.weight = bytes_OI.unflatten(1, (-1, GROUP)).unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()
        self.offset_O = 128 * bytes_OI.sum(1, dtype=torch.int32)
        self.scale_O, self.bias_O = F.pad(self.scale_O, (0, padding)), F.pad(self.bias_O, (0, padding))
        tensors = (self.weight, self.scale_O, self.offset_O, self.bias_O)
        self.map = native.Linear(*(x.data_ptr() for x in tensors), self.inputs, self.outputs, self.relu)

    def forward(self, x: Tensor) -> Tensor:
        if self.library is None:
            return self._in_torch(x)
        x = x.contiguous()
        y, rows = x.new_empty(*x.shape[:-1], self.outputs), x.numel() // self.inputs
        self.library.seq2seq_linear(self.map, x.data_ptr(), rows, y.data_ptr(), threads_for(rows))
        return y

    def _in_torch(self, x: Tensor) -> Tensor:
        """Do the same with integers in floats, which represent their sums exactly up to about a thousand inputs."""
        scale = x.abs().amax(-1, keepdim=True) / 127
        integers = (x / scale.clamp(min=SMALLEST) + 128.5).floor() - 128
        y = F.linear(integers, self.integer_OI) * (self.scale_O * scale) + self.bias_O
        return y.relu() if self.relu else y


class Int8Output(Int8Linear):
    """The output table: for a shortlist, its weights lie in rows as well."""

    @cached_property
    def rows_OI(self) -> Tensor:
        """The integers of the packed weights in rows, without padding: made by the first search with a shortlist."""
        bytes_OI = self.weight.transpose(1, 2).flatten(0, 1).flatten(1)
        return bytes_OI[: self.outputs, : self.inputs].contiguous()

    def shortlisted(self, features_RTD: Tensor, shortlist_BU: Tensor) -> Tensor:
        if self.library is None:
            logits_RTV, rows = self._in_torch(features_RTD), len(features_RTD) // len(shortlist_BU)
            ids_R1U = shortlist_BU.repeat_interleave(rows, 0)[:, None]
            return logits_RTV.take_along_dim(ids_R1U.clamp(min=0), -1).masked_fill_(ids_R1U < 0, -math.inf)
        (R, T, _), (B, U) = features_RTD.shape, shortlist_BU.shape
        x, ids_BU, y_RTU = features_RTD.contiguous(), shortlist_BU.contiguous(), features_RTD.new_empty(R, T, U)
        given = (self.map, self.rows_OI.data_ptr(), x.data_ptr(), ids_BU.data_ptr())
        self.library.seq2seq_shortlisted(*given, B, R * T // B, U, y_RTU.data_ptr(), threads_for(R * T))
        return y_RTU


@dataclass(frozen=True)
class Int8State(State):
    """Keys and values stay where they are written; a row knows which sentence and which slots are its own.

    A slot holds the keys and values of all layers at one position: L × 2 × D.
    """

    length: int = field(default=0, kw_only=True)
    memory_MX: Tensor  # slots of all sources, one after the other, without padding
    first_B: Tensor  # where each source begins
    length_B: Tensor  # and how many slots it has
    sentence_R: Tensor
    source: int  # positions of the longest source
    levels: tuple[Tensor, ...] = ()  # of each target position: slots of all rows that were alive
    addresses: tuple[int, ...] = ()  # of the levels
    ancestor_RP: Tensor = NO_ANCESTORS  # each row's slot in each level

    def select(self, rows_R: Tensor, beam: int) -> Int8State:
        return replace(self.reorder(rows_R), sentence_R=self.sentence_R[rows_R], beam=beam)

    def reorder(self, rows_R: Tensor) -> Int8State:
        return replace(self, ancestor_RP=self.ancestor_RP.index_select(0, rows_R)) if self.levels else self

    def extended(self, level: Tensor, addresses: tuple[int, ...]) -> Int8State:
        """Return the state after one more position, whose slots are each row's own."""
        own_R1 = torch.arange(len(level), dtype=torch.int32)[:, None]
        ancestor_RP = torch.cat((self.ancestor_RP, own_R1), 1) if self.levels else own_R1
        levels, length = (*self.levels, level), self.length + 1
        return replace(self, levels=levels, addresses=addresses, ancestor_RP=ancestor_RP, length=length)

    def join(self, other: Int8State) -> Int8State:
        a, b = self.compact(), other.compact()
        levels = tuple(torch.cat(pair) for pair in zip(a.levels, b.levels, strict=True))
        return replace(
            a,
            memory_MX=torch.cat((a.memory_MX, b.memory_MX)),
            first_B=torch.cat((a.first_B, b.first_B + len(a.memory_MX))),
            length_B=torch.cat((a.length_B, b.length_B)),
            sentence_R=torch.cat((a.sentence_R, b.sentence_R + len(a.length_B))),
            source=max(a.source, b.source),
            levels=levels,
            addresses=tuple(level.data_ptr() for level in levels),
            ancestor_RP=torch.cat((a.ancestor_RP, b.ancestor_RP + len(a.sentence_R))) if levels else NO_ANCESTORS,
        )

    def compact(self) -> Int8State:
        """Drop what belongs to no row."""
        kept_B, R, sources = self.sentence_R[:: self.beam], len(self.sentence_R), self.length_B.tolist()
        length_B, slots = self.length_B[kept_B], self.memory_MX.split(sources)
        slot_PR = zip(self.levels, self.ancestor_RP.unbind(1), strict=True) if self.levels else ()
        levels = tuple(level[slot_R] for level, slot_R in slot_PR)
        return replace(
            self,
            memory_MX=torch.cat([slots[b] for b in kept_B.tolist()]),
            first_B=starts(length_B),
            length_B=length_B,
            sentence_R=torch.arange(len(kept_B)).repeat_interleave(self.beam),
            levels=levels,
            addresses=tuple(level.data_ptr() for level in levels),
            ancestor_RP=torch.arange(R, dtype=torch.int32)[:, None].repeat(1, len(levels)),
        )


def starts(length_B: Tensor) -> Tensor:
    """Return where each of several parts begins that lie one after the other."""
    return length_B.cumsum(0) - length_B


class Int8Stack(nn.Module):
    """The layers of an encoder or a decoder, all in one call of the library."""

    def __init__(self, library: ctypes.CDLL, side: transformer.Encoder | transformer.Decoder) -> None:
        super().__init__()
        self.library, self.input, self.norm = library, side.input, side.norm
        layers = [Int8Layer(library, layer) for layer in side.layers]
        first = cast("transformer.EncoderLayer | transformer.DecoderLayer", side.layers[0])
        attention, feed_forward = own_attention(first), first.feed_forward
        self.count, self.heads, self.width = len(layers), attention.heads, attention.query.in_features
        distance_one = alibi(self.heads, 1, 1, 1, attention.query.weight.detach())
        self.slope_N = -distance_one.flatten().contiguous() if attention.position_kind == "alibi" else None
        self.layers, self.structs = (
            nn.ModuleList(layers),
            (native.Layer * len(layers))(*(layer.struct for layer in layers)),
        )
        pre = first.feed_forward_residual.pre
        self.struct = native.Stack(
            self.structs,
            0 if self.slope_N is None else self.slope_N.data_ptr(),
            *(self.count, self.width, self.heads, feed_forward.outer.in_features),
            *(pre, [*ACTIVATIONS].index(activation_name(feed_forward)), attention.position_kind == "rotary"),
            norm_struct(self.norm) if pre else native.Norm(),
        )


class Int8Encoder(Int8Stack):
    """A Transformer's encoder in int8, which computes nothing for padding."""

    def forward(self, source_BSD: Tensor, mask_BS: Tensor, layout: Layout = PADDED) -> Memory:
        input_MD, length_B = self.input(source_BSD)[mask_BS], mask_BS.sum(1)
        states_MD, states_BSD = torch.empty_like(input_MD), torch.zeros_like(source_BSD)
        source = native.Source(
            input_MD.data_ptr(), length_B.data_ptr(), states_MD.data_ptr(), len(length_B), threads_for(len(input_MD))
        )
        self.library.seq2seq_encode(self.struct, source)
        states_BSD[mask_BS] = states_MD
        return Memory(states_BSD, mask_BS)


class Int8Decoder(Int8Stack):
    """A Transformer's decoder in int8; each step of all layers is one call."""

    def __init__(self, library: ctypes.CDLL, decoder: transformer.Decoder) -> None:
        super().__init__(library, decoder)
        cross = [cast(transformer.DecoderLayer, layer).cross_attention for layer in decoder.layers]
        weights, biases = zip(*(key_value(attention) for attention in cross), strict=True)
        self.memory = Int8Linear(library, torch.cat(weights), torch.cat(biases))  # keys and values of all layers
        self.positions_TD = torch.empty(0, self.width)  # what the input adds at each position; grows as needed

    def start(self, memory: Memory) -> Int8State:
        states_MD, (B, S) = memory.states_BSD[memory.mask_BS], memory.mask_BS.shape
        memory_MX = torch.empty(len(states_MD), self.memory.outputs, dtype=torch.bfloat16)
        for out_MX, part_MD in zip(memory_MX.split(SOURCE_ROWS), states_MD.split(SOURCE_ROWS), strict=True):
            out_MX.copy_(self.memory(part_MD))
        length_B = memory.mask_BS.sum(1)
        return Int8State(memory_MX, starts(length_B), length_B, torch.arange(B), S)

    def forward(self, target_RTD: Tensor, state: Int8State, weights: bool = False, layout: Layout = PADDED) -> Decoded:
        features, attention_weights = [], []
        for target_RD in target_RTD.unbind(1):
            features_RD, weights_RLNS, state = self.step(target_RD, state, weights)
            features.append(features_RD)
            attention_weights.append(weights_RLNS)
        by_layer = torch.stack(attention_weights, 3).unbind(1) if weights else ()
        return Decoded(torch.stack(features, 1), state, by_layer)

    def step(self, target_RD: Tensor, state: Int8State, weights: bool) -> tuple[Tensor, Tensor, Int8State]:
        input_RD = torch.add(self.position(state.length), target_RD, alpha=self.input.scale).contiguous()
        (R, P), S = (len(input_RD), len(state.levels)), state.source
        level = torch.empty(R, self.count * 2 * self.width, dtype=torch.bfloat16)
        addresses = (*state.addresses, level.data_ptr())
        pointers = (ctypes.c_void_p * (P + 1))(*addresses)
        weights_RLNS = input_RD.new_zeros(R, self.count, self.heads, S) if weights else NOTHING
        features_RD = torch.empty_like(input_RD)
        step = native.Step(
            input_RD.data_ptr(),
            ctypes.addressof(pointers),
            state.ancestor_RP.data_ptr(),
            *(x.data_ptr() for x in (state.memory_MX, state.sentence_R, state.first_B, state.length_B)),
            *(features_RD.data_ptr(), weights_RLNS.data_ptr() if weights else 0),
            *(R, P, S, threads_for(R)),
        )
        self.library.seq2seq_decoder_step(self.struct, step)
        return features_RD, weights_RLNS, state.extended(level, addresses)

    def position(self, start: int) -> Tensor:
        """Return what the input adds at a position: the same for all rows."""
        return self.first_positions(start + 1)[start]

    def first_positions(self, count: int) -> Tensor:
        """Return the position embeddings of at least `count` positions."""
        table_TD = self.positions_TD
        while count > len(table_TD):
            more_TD = self.input.position(torch.zeros(1, 64, self.width), len(table_TD))[0]
            table_TD = torch.cat((table_TD, more_TD))
        self.positions_TD = table_TD
        return table_TD


class Int8Layer(nn.Module):
    """The linear maps and norms of a layer; an encoder's has no cross-attention."""

    def __init__(self, library: ctypes.CDLL, layer: nn.Module) -> None:
        super().__init__()
        own, feed_forward = own_attention(layer), cast(FeedForward, layer.feed_forward)
        weight, bias = key_value(own)
        query = query_weight(own)
        relu = isinstance(feed_forward.activation, nn.ReLU)
        maps = {
            "self_in": Int8Linear(library, torch.cat((query, weight)), torch.cat((torch.zeros(len(query)), bias))),
            "self_out": output(library, own),
            "inner": Int8Linear(library, feed_forward.inner.weight, feed_forward.inner.bias, relu),
            "outer": Int8Linear(library, feed_forward.outer.weight, feed_forward.outer.bias),
        }
        if isinstance(layer, transformer.DecoderLayer):
            maps["cross_in"] = Int8Linear(library, query_weight(layer.cross_attention), None)
            maps["cross_out"] = output(library, layer.cross_attention)
        self.maps = nn.ModuleDict(maps)
        residuals = {name: part for name, part in layer.named_children() if isinstance(part, Residual)}
        # An encoder's one attention is that of its own positions.
        names = {f"{name.removesuffix('_residual').replace('attention', 'self')}_norm": name for name in residuals}
        self.norms = nn.ModuleDict({new: residuals[name].norm for new, name in names.items()})
        norms = {name: norm_struct(norm) for name, norm in self.norms.items()}
        self.struct = native.Layer(**{name: part.map for name, part in maps.items()}, **norms)


def own_attention(layer: nn.Module) -> Attention:
    """Return the attention of a layer to its own positions."""
    return cast(Attention, layer.self_attention if isinstance(layer, transformer.DecoderLayer) else layer.attention)


def query_weight(attention: Attention) -> Tensor:
    """Return the query's projection together with all that its score does to it."""
    weight_INH = attention.query.weight.detach().T.unflatten(1, (attention.heads, -1))
    return attention.scored_query(weight_INH.transpose(0, 1)[None])[0].transpose(0, 1).flatten(1).T


def key_value(attention: Attention) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the projection to keys and values together."""
    assert attention.value is not None
    no_bias = torch.zeros(attention.key.out_features)
    return torch.cat((attention.key.weight, attention.value.weight)), torch.cat((no_bias, attention.value.bias))


def output(library: ctypes.CDLL, attention: Attention) -> Int8Linear:
    assert attention.output is not None
    return Int8Linear(library, attention.output.weight, attention.output.bias)


def norm_struct(norm: nn.Module) -> native.Norm:
    bias = getattr(norm, "bias", None)
    return native.Norm(cast(Tensor, norm.weight).data_ptr(), 0 if bias is None else bias.data_ptr())


def activation_name(feed_forward: FeedForward) -> str:
    return next(name for name, kind in ACTIVATIONS.items() if isinstance(feed_forward.activation, kind))


def threads_for(rows: int, fewest: int = PARALLEL_ROWS) -> int:
    """Return how many threads share these rows: one if they are fewer than pay for the start of a second."""
    return torch.get_num_threads() if rows >= fewest else 1
