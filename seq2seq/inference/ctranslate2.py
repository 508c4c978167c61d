"""Export of a trained Transformer to CTranslate2, and the proof that both compute the same.

Shapes: D width, N heads, H head width, V vocabulary, P positions.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seq2seq.config.schema import ModelConfig, SearchConfig, TransformerConfig
from seq2seq.data.tokenizer import BEGIN, END, FILES, PAD, UNKNOWN, Tokenizer
from seq2seq.decoding.beam import beam_search
from seq2seq.decoding.scoring import Specials, Task
from seq2seq.model import transformer
from seq2seq.model.attention import Attention, Position
from seq2seq.model.interface import Seq2Seq
from seq2seq.model.layers import FeedForward, Residual
from seq2seq.utils.errors import UserError

NAMES = {PAD: "<pad>", UNKNOWN: "<unk>", BEGIN: "<s>", END: "</s>"}
INPUT = 1024  # source subwords that CTranslate2 reads by default
TOLERANCE = 1e-4  # between two float32 log probabilities of a subword: the order of summation differs
EQUAL = 0.99  # fraction of equal translations: rounding may choose either of two equally probable subwords
BATCH = 32


def is_installed() -> bool:
    return importlib.util.find_spec("ctranslate2") is not None


def import_ctranslate2() -> Any:
    try:
        import ctranslate2
        import ctranslate2.specs
    except ImportError:
        raise UserError("export needs CTranslate2, which is not installed: pip install 'seq2seq[export]'") from None
    return ctranslate2


def unsupported(config: ModelConfig) -> list[str]:
    """List the config values that CTranslate2 does not support, each with the possible ones."""
    if not isinstance(config, TransformerConfig):
        return [f"model.family: CTranslate2 runs no {config.family}; export a transformer"]
    problems = []
    if config.attention.score in ("additive", "cosine"):
        possible = "scaled_dot, dot, general"
        problems.append(f"model.attention.score: CTranslate2 has no {config.attention.score}; possible: {possible}")
    if config.position == "alibi":
        possible = "none, sinusoidal, learned, rotary"
        problems.append(f"model.position: CTranslate2 has alibi in no encoder; possible: {possible}")
    return problems


def save_ctranslate2(
    model: Seq2Seq, config: TransformerConfig, tokenizer: Tokenizer, folder: Path, quantization: str
) -> None:
    """Save the model and its tokenizer as a folder that CTranslate2 and sentencepiece read."""
    spec = specification(model, config)
    spec.register_source_vocabulary(pieces_of(tokenizer.source))
    spec.register_target_vocabulary(pieces_of(tokenizer.target))
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = 1e-5
    spec.validate()
    spec.optimize(quantization=None if quantization == "float32" else quantization)
    spec.save(str(folder))
    for side in FILES:
        (folder / f"{side}.model").write_bytes(tokenizer.models[side])


# ---------------------------------------------------------------------------------------- the weights


def specification(model: Seq2Seq, config: TransformerConfig) -> Any:
    """Return CTranslate2's specification of the model, filled with its weights."""
    specs = import_ctranslate2().specs
    activations = {"relu": "RELU", "gelu": "GELU", "swiglu": "SWISH"}
    parts = {
        "num_heads": config.attention.heads,
        "pre_norm": config.norm_position == "pre",
        "activation": specs.Activation[activations[config.activation]],
        "ffn_glu": config.activation == "swiglu",
        "rms_norm": config.norm == "rms",
        "rotary_dim": config.width // config.attention.heads if config.position == "rotary" else None,
    }
    encoder = specs.transformer_spec.TransformerEncoderSpec(config.encoder_layers, **parts)
    decoder = specs.transformer_spec.TransformerDecoderSpec(config.decoder_layers, **parts)
    with torch.no_grad():
        fill_encoder(encoder, model, config)
        fill_decoder(decoder, model, config)
    return specs.TransformerSpec(encoder, decoder)


def fill_encoder(spec: Any, model: Seq2Seq, config: TransformerConfig) -> None:
    encoder = model.encoder
    assert isinstance(encoder, transformer.Encoder)
    spec.embeddings[0].weight = array(model.source_embedding.weight)
    fill_positions(spec, encoder.input.position, config)
    if config.norm_position == "pre":
        fill_norm(spec.layer_norm, encoder.norm)
    for part, layer in zip(spec.layer, encoder.layers, strict=True):
        assert isinstance(layer, transformer.EncoderLayer)
        fill_self_attention(part.self_attention, layer.attention, layer.attention_residual)
        fill_feed_forward(part.ffn, layer.feed_forward, layer.feed_forward_residual)


def fill_decoder(spec: Any, model: Seq2Seq, config: TransformerConfig) -> None:
    decoder = model.decoder
    assert isinstance(decoder, transformer.Decoder)
    spec.embeddings.weight = array(model.target_embedding.weight)
    spec.projection.weight = array(model.output.weight)
    fill_positions(spec, decoder.input.position, config)
    if config.norm_position == "pre":
        fill_norm(spec.layer_norm, decoder.norm)
    for part, layer in zip(spec.layer, decoder.layers, strict=True):
        assert isinstance(layer, transformer.DecoderLayer)
        fill_self_attention(part.self_attention, layer.self_attention, layer.self_residual)
        fill_cross_attention(part.attention, layer.cross_attention, layer.cross_residual)
        fill_feed_forward(part.ffn, layer.feed_forward, layer.feed_forward_residual)


def fill_positions(spec: Any, position: Position, config: TransformerConfig) -> None:
    """Store the position embeddings as a table; rotary positions act in the attention."""
    if config.position == "rotary":
        spec.__dict__.pop("position_encodings", None)
        return
    places = max(config.max_length, INPUT) + 1
    spec.position_encodings.encodings = array(position(torch.zeros(1, places, config.width))[0])


def fill_self_attention(spec: Any, attention: Attention, residual: Residual) -> None:
    query, key, value = projections(attention)
    fill_linear(spec.linear[0], torch.cat((query[0], key[0], value[0])), torch.cat((query[1], key[1], value[1])))
    fill_attention(spec, attention, residual)


def fill_cross_attention(spec: Any, attention: Attention, residual: Residual) -> None:
    query, key, value = projections(attention)
    fill_linear(spec.linear[0], *query)
    fill_linear(spec.linear[1], torch.cat((key[0], value[0])), torch.cat((key[1], value[1])))
    fill_attention(spec, attention, residual)


def fill_attention(spec: Any, attention: Attention, residual: Residual) -> None:
    assert attention.output is not None
    fill_linear(spec.linear[-1], attention.output.weight, attention.output.bias)
    fill_norm(spec.layer_norm, residual.norm)
    if attention.score != "scaled_dot":
        spec.queries_scale = array(torch.tensor(1.0))


def projections(attention: Attention) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of queries, keys and values; the general score's matrix is folded into the queries'."""
    assert attention.value is not None
    query_DD = attention.query.weight
    if attention.score == "general":
        query_NHD = query_DD.unflatten(0, (attention.heads, -1))
        query_DD = (attention.general_NHH.transpose(1, 2) @ query_NHD).flatten(0, 1)
    none_D = torch.zeros(len(query_DD))
    return [(query_DD, none_D), (attention.key.weight, none_D), (attention.value.weight, attention.value.bias)]


def fill_feed_forward(spec: Any, layer: FeedForward, residual: Residual) -> None:
    if layer.activation == "swiglu":
        (hidden, gate), (hidden_bias, gate_bias) = layer.inner.weight.chunk(2), layer.inner.bias.chunk(2)
        fill_linear(spec.linear_0, gate, gate_bias)
        fill_linear(spec.linear_0_noact, hidden, hidden_bias)
    else:
        fill_linear(spec.linear_0, layer.inner.weight, layer.inner.bias)
    fill_linear(spec.linear_1, layer.outer.weight, layer.outer.bias)
    fill_norm(spec.layer_norm, residual.norm)


def fill_linear(spec: Any, weight: Tensor, bias: Tensor) -> None:
    spec.weight, spec.bias = array(weight), array(bias)


def fill_norm(spec: Any, norm: nn.Module) -> None:
    spec.gamma = array(norm.weight)  # type: ignore[arg-type]
    if isinstance(norm, nn.LayerNorm):
        spec.beta = array(norm.bias)


def array(tensor: Tensor) -> Any:
    return tensor.detach().float().contiguous().numpy()


# ------------------------------------------------------------------------------------------ the proof


@dataclass(frozen=True)
class Proof:
    """Comparison of one search in both engines, with the same float32 weights and settings."""

    beam: int
    sentences: int
    equal: int  # translations with the same subwords
    difference: float  # largest difference per subword between the two log probabilities of one translation
    worst: str  # the sentence with that difference

    def problem(self) -> str:
        """Explain how the engines disagree; empty if they agree."""
        if not self.difference <= TOLERANCE:
            return f"{self.worst!r} differs by {self.difference:.1e} in log probability a subword, beam {self.beam}"
        if self.equal < EQUAL * self.sentences:
            return f"only {self.equal} of {self.sentences} translations are equal, beam {self.beam}"
        return ""


class Here:
    """This project's model and search, in float32, without banned tokens."""

    def __init__(self, model: Seq2Seq, search: SearchConfig, longest: int) -> None:
        # Without a length penalty CTranslate2 searches until no live hypothesis can win.
        self.search = replace(search, length_penalty=0.0, n_best=1, stop="certain")
        self.model, self.longest = model, longest

    @torch.inference_mode()
    def translate(self, sources: Sequence[list[int]], beam: int) -> list[list[int]]:
        found: list[list[int]] = []
        for batch in batches(sources):
            source_BS = padded(batch)
            longest_B, none_B = torch.full((len(batch),), self.longest), torch.zeros(len(batch), dtype=torch.int64)
            task = Task(longest_B, none_B, (source_BS != PAD).sum(1), [0] * len(batch))
            state, search = self.model.start(source_BS, source_BS != PAD), replace(self.search, beam=beam)
            ranked = beam_search(self.model.step, [(state, task)], search, Specials(BEGIN, END, ()))
            found += [hypotheses[0].ids for hypotheses in ranked]
        return found

    @torch.inference_mode()
    def score(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> list[float]:
        """Log probabilities of targets, END included."""
        scores: list[float] = []
        for source, target in zip(batches(sources), batches(targets), strict=True):
            source_BS, out_BT = padded(source), padded([[*ids, END] for ids in target])
            in_BT = torch.cat((torch.full_like(out_BT[:, :1], BEGIN), out_BT[:, :-1]), 1)
            logits_BTV, _ = self.model.step(in_BT, self.model.start(source_BS, source_BS != PAD))
            log_BT = logits_BTV.log_softmax(-1).gather(2, out_BT[:, :, None])[:, :, 0]
            # A target may hold PAD itself, so its length decides.
            scores += [float(row[: len(ids) + 1].sum()) for row, ids in zip(log_BT, target, strict=True)]
        return scores


class There:
    """The exported folder in CTranslate2, under the same settings."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, longest: int) -> None:
        ctranslate2 = import_ctranslate2()
        ctranslate2.set_log_level(logging.ERROR)  # `computed` reports a substituted compute type
        self.translator = ctranslate2.Translator(str(folder), intra_threads=torch.get_num_threads())
        self.longest = longest
        self.source, self.target = (pieces_of(model) for model in (tokenizer.source, tokenizer.target))
        self.ids = {piece: i for i, piece in enumerate(self.target)}

    @property
    def computed(self) -> str:
        """The numeric type in which CTranslate2 computes on this machine."""
        return str(self.translator.compute_type)

    def translate(self, sources: Sequence[list[int]], beam: int, length_penalty: float = 0.0) -> list[list[int]]:
        found = self.translator.translate_batch(
            self._source(sources),
            beam_size=beam,
            length_penalty=length_penalty,
            min_decoding_length=0,
            max_decoding_length=self.longest,
            max_batch_size=BATCH,
        )
        return [[self.ids[piece] for piece in result.hypotheses[0]] for result in found]

    def score(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> list[float]:
        told = [[self.target[i] for i in ids] for ids in targets]
        return [sum(result.log_probs) for result in self.translator.score_batch(self._source(sources), told)]

    def _source(self, sources: Sequence[list[int]]) -> list[list[str]]:
        """Convert ids to pieces, without the END that CTranslate2 adds itself."""
        return [[self.source[i] for i in ids[:-1]] for ids in sources]


def prove(here: Here, there: There, sentences: Sequence[str], sources: Sequence[list[int]], beam: int) -> Proof:
    """Translate with both engines; then score both translations of every sentence with both."""
    ours, theirs = here.translate(sources, beam), there.translate(sources, beam)
    # At the length limit this search appends END and CTranslate2 does not.
    ended = [max(len(a), len(b)) < here.longest - 1 for a, b in zip(ours, theirs, strict=True)]
    equal = sum(a == b or not end for a, b, end in zip(ours, theirs, ended, strict=True))
    difference, worst = 0.0, ""
    for said in (ours, theirs):
        scored = zip(here.score(sources, said), there.score(sources, said), said, sentences, strict=True)
        apart = ((abs(a - b) / (len(ids) + 1), sentence) for a, b, ids, sentence in scored)
        difference, worst = max((difference, worst), *apart)
    return Proof(beam, len(sentences), equal, difference, worst)


def batches(rows: Sequence[list[int]]) -> list[Sequence[list[int]]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def padded(rows: Sequence[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*ids, *[PAD] * (width - len(ids))] for ids in rows])


def pieces_of(model: Any) -> list[str]:
    """Return every subword of a vocabulary, the special ones under the names that CTranslate2 expects."""
    return [NAMES.get(i, str(model.id_to_piece(i))) for i in range(len(model))]
