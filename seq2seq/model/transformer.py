"""The Transformer encoder and decoder (Vaswani et al. 2017).

Shapes: B sentences, R rows (B × beam), S source and T target positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from seq2seq.config.schema import TransformerConfig
from seq2seq.model.attention import Attention, KeyValue, Position, Start, as_stored
from seq2seq.model.decoder_state import State, on_device
from seq2seq.model.interface import Decoded, Memory
from seq2seq.model.kv_cache import CacheUpdate, FixedCache, KVCache
from seq2seq.model.layers import FeedForward, Residual, build_norm, dropout, value_or
from seq2seq.model.layout import PADDED, Layout


@dataclass(frozen=True)
class TransformerState(State):
    memory: tuple[KeyValue, ...]  # of each layer, per sentence
    cache: KVCache | FixedCache  # per hypothesis

    def select(self, rows_R: Tensor, beam: int) -> TransformerState:
        sentences_B = self.sentences(rows_R, beam)
        memory = tuple(kv.select(sentences_B) for kv in self.memory)
        return replace(self, memory=memory, cache=self.growing.select(sentences_B, rows_R, beam), beam=beam)

    def reorder(self, rows_R: Tensor) -> TransformerState:
        return replace(self, cache=self.cache.reorder(rows_R))

    def fixed(self, sentences: int, steps: int) -> TransformerState:
        memory = tuple(kv.fixed(sentences) for kv in self.memory)
        cache = self.growing.fixed(sentences, steps, self.beam, self.memory)
        return replace(self, memory=memory, cache=cache, length=on_device(self.length, memory[0].key_RNSH))

    def plain(self, length: int) -> TransformerState:
        assert isinstance(self.cache, FixedCache)
        return replace(self, cache=self.cache.plain(length, self.beam), length=length)

    def join(self, other: TransformerState) -> TransformerState:
        memory = tuple(a.join(b) for a, b in zip(self.memory, other.memory, strict=True))
        return replace(self, memory=memory, cache=self.growing.join(other.growing))

    @property
    def growing(self) -> KVCache:
        """The cache of a state that no step changes."""
        assert isinstance(self.cache, KVCache), "a fixed state changes with each step; take its plain state first"
        return self.cache


class Input(nn.Module):
    """Scale embedded tokens, then add positions and dropout (§3.4, §3.5)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = config.width**0.5
        self.position = Position(config.position, config.width, config.max_length)
        self.p = value_or(config.embedding_dropout, config.dropout)

    def forward(self, x_RTD: Tensor, start: Start = 0) -> Tensor:
        return dropout(self.position(x_RTD * self.scale, start), self.p, self.training)


class EncoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = _attention(config, config.position)
        self.feed_forward = _feed_forward(config)
        self.attention_residual, self.feed_forward_residual = _residual(config), _residual(config)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, layout: Layout) -> Tensor:
        first, second = self.attention_residual, self.feed_forward_residual
        y_BSD = first.prepare_input(x_BSD)
        kv = self.attention.project(y_BSD, mask_BS, layout=layout)
        x_BSD = first.add_output(x_BSD, self.attention(y_BSD, kv, layout=layout).context_RTD)
        return second.add_output(x_BSD, self.feed_forward(second.prepare_input(x_BSD)))


class Encoder(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input = Input(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = _final_norm(config)

    def forward(self, source_BSD: Tensor, mask_BS: Tensor, layout: Layout = PADDED) -> Memory:
        x_BSD = layout.pack(self.input(source_BSD))
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask_BS, layout)
        return Memory(self.norm(x_BSD), mask_BS, layout)


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = _attention(config, config.position)
        # Rotary and ALiBi relate positions of one sentence, so cross-attention uses neither.
        self.cross_attention = _attention(config, "none")
        self.feed_forward = _feed_forward(config)
        self.self_residual, self.cross_residual = _residual(config), _residual(config)
        self.feed_forward_residual = _residual(config)

    def forward(
        self, x_RTD: Tensor, memory: KeyValue, cache: CacheUpdate, layout: Layout, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        first, second, third = self.self_residual, self.cross_residual, self.feed_forward_residual
        y_RTD = first.prepare_input(x_RTD)
        start, causal = cache.start, cache.single_hypothesis
        kv = cache.add(self.self_attention.project(y_RTD, start=start, layout=layout))
        attended = self.self_attention(
            y_RTD, kv, start=start, causal=causal, position_S=cache.position_P, layout=layout
        )
        x_RTD = first.add_output(x_RTD, attended.context_RTD)
        attended = self.cross_attention(second.prepare_input(x_RTD), memory, weights=weights, layout=layout)
        x_RTD = second.add_output(x_RTD, attended.context_RTD)
        x_RTD = third.add_output(x_RTD, self.feed_forward(third.prepare_input(x_RTD)))
        return x_RTD, attended.weights_RNTS


class Decoder(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input = Input(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = _final_norm(config)

    def start(self, memory: Memory) -> TransformerState:
        """Return each layer's keys and values of the source, and an empty cache."""
        attentions = [cast(DecoderLayer, layer).cross_attention for layer in self.layers]
        if not attentions[0].stays_packed(memory.layout):
            memory = memory.padded()
        projected = (attention.project(*memory) for attention in attentions)
        return TransformerState(tuple(kv if kv.packed else _stored(kv) for kv in projected), KVCache())

    def forward(
        self, target_RTD: Tensor, state: TransformerState, weights: bool = False, layout: Layout = PADDED
    ) -> Decoded:
        x_RTD = layout.pack(self.input(target_RTD, state.length))
        cache, attention_weights = state.cache.update(state.length, state.beam, target_RTD), []
        for layer, memory in zip(self.layers, state.memory, strict=True):
            x_RTD, weights_RNTS = layer(x_RTD, memory, cache, layout, weights)
            attention_weights.append(weights_RNTS)
        state = replace(state, cache=cache.finish(), length=state.length + target_RTD.shape[1])
        return Decoded(self.norm(x_RTD), state, tuple(attention_weights) if weights else ())


def _stored(kv: KeyValue) -> KeyValue:
    """Store a memory as every step multiplies it; otherwise each step would copy it first."""
    return kv._replace(key_RNSH=as_stored(as_stored(kv.key_RNSH).contiguous()), value_RNSH=kv.value_RNSH.contiguous())


def _attention(config: TransformerConfig, position_kind: str) -> Attention:
    a = config.attention
    return Attention(config.width, config.width, config.width, a.heads, a.score, position_kind, a.dropout)


def _feed_forward(config: TransformerConfig) -> FeedForward:
    return FeedForward(
        config.width, config.feed_forward, config.activation, value_or(config.activation_dropout, config.dropout)
    )


def _residual(config: TransformerConfig) -> Residual:
    return Residual(config.width, config.norm, config.norm_position, config.dropout, config.layer_dropout)


def _final_norm(config: TransformerConfig) -> nn.Module:
    return build_norm(config.norm, config.width) if config.norm_position == "pre" else nn.Identity()
