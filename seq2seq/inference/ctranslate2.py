"""Export of a trained Transformer to CTranslate2, and the verification that both compute the same.

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
from seq2seq.data.encoding import shifted_right
from seq2seq.data.shortlist import Shortlist
from seq2seq.data.tokenizer import BEGIN, END, FILES, PAD, UNKNOWN, Tokenizer
from seq2seq.decoding.beam import beam_search
from seq2seq.decoding.scoring import DecodingTask, Specials
from seq2seq.model import transformer
from seq2seq.model.attention import Attention, Position
from seq2seq.model.interface import Seq2Seq
from seq2seq.model.layers import FeedForward, Residual, SwiGLU
from seq2seq.utils.errors import UserError

SPECIAL_PIECES = {PAD: "<pad>", UNKNOWN: "<unk>", BEGIN: "<s>", END: "</s>"}
VOCABULARY_MAP, MAPPED = "vmap.txt", 100  # the file, and target pieces of each source piece in it
MIN_POSITIONS = 1024  # source subwords that CTranslate2 reads by default
TOLERANCE = 1e-4  # between two float32 log probabilities of a subword: the order of summation differs
MIN_EQUAL_FRACTION = 0.99  # fraction of equal translations: rounding may choose either of two equally probable subwords
BATCH_SIZE = 32
SCORES = ("scaled_dot", "dot", "general")  # of those in the config, what CTranslate2 supports
POSITIONS = ("none", "sinusoidal", "learned", "rotary")


def is_installed() -> bool:
    return importlib.util.find_spec("ctranslate2") is not None


def import_ctranslate2(purpose: str = "export") -> Any:
    try:
        import ctranslate2
        import ctranslate2.specs
    except ImportError:
        raise UserError(f"{purpose} needs CTranslate2, which is not installed: pip install 'seq2seq[export]'") from None
    return ctranslate2


def unsupported(config: ModelConfig) -> list[str]:
    """List the config values that CTranslate2 does not support, each with the possible ones."""
    if not isinstance(config, TransformerConfig):
        return [f"model.family: CTranslate2 does not support {config.family}; export a transformer"]
    problems = []
    if (score := config.attention.score) not in SCORES:
        possible = ", ".join(SCORES)
        problems.append(f"model.attention.score: CTranslate2 does not support {score}; possible: {possible}")
    if (position := config.position) not in POSITIONS:
        possible = ", ".join(POSITIONS)
        problems.append(f"model.position: CTranslate2 does not support {position} in the encoder; possible: {possible}")
    return problems


def save_ctranslate2(
    model: Seq2Seq, config: TransformerConfig, tokenizer: Tokenizer, folder: Path, quantization: str
) -> None:
    """Save the model and its tokenizer as a folder that CTranslate2 and sentencepiece read."""
    source, target = (vocabulary_pieces(model) for model in (tokenizer.source, tokenizer.target))
    save_weights(model, config, source, target, folder, quantization)
    for side in FILES:
        (folder / f"{side}.model").write_bytes(tokenizer.models[side])


def save_weights(
    model: Seq2Seq, config: TransformerConfig, source: list[str], target: list[str], folder: Path, quantization: str
) -> None:
    """Save the model alone, with the names of its source and target ids."""
    spec = specification(model, config)
    spec.register_source_vocabulary(source)
    spec.register_target_vocabulary(target)
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = 1e-5
    spec.validate()
    spec.optimize(quantization=None if quantization == "float32" else quantization)
    spec.save(str(folder))


def save_vocabulary_map(shortlist: Shortlist, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the shortlists as CTranslate2 reads them for `use_vmap`: a source piece, a tab, its target pieces."""
    source, target = (vocabulary_pieces(model) for model in (tokenizer.source, tokenizer.target))
    likeliest = [[i for i in ids if i != PAD] for ids in shortlist.likeliest_SK[:, :MAPPED].tolist()]
    always = sorted(
        {*shortlist.always_T.nonzero()[0].tolist(), *likeliest[END]} - {PAD}
    )  # CTranslate2 adds END after it reads the map
    lines = [("", always), *((source[s], ids) for s, ids in enumerate(likeliest) if ids and s > END)]
    text = "".join(f"{piece}\t{' '.join(target[i] for i in ids)}\n" for piece, ids in lines)
    (folder / VOCABULARY_MAP).write_text(text, encoding="utf-8")


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
    spec.embeddings[0].weight = numpy_array(model.source_embedding.weight)
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
    spec.embeddings.weight = numpy_array(model.target_embedding.weight)
    spec.projection.weight = numpy_array(model.output.weight)
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
    length = max(config.max_length, MIN_POSITIONS) + 1
    spec.position_encodings.encodings = numpy_array(position(torch.zeros(1, length, config.width))[0])


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
        spec.queries_scale = numpy_array(torch.tensor(1.0))


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
    if isinstance(layer.activation, SwiGLU):
        (hidden, gate), (hidden_bias, gate_bias) = layer.inner.weight.chunk(2), layer.inner.bias.chunk(2)
        fill_linear(spec.linear_0, gate, gate_bias)
        fill_linear(spec.linear_0_noact, hidden, hidden_bias)
    else:
        fill_linear(spec.linear_0, layer.inner.weight, layer.inner.bias)
    fill_linear(spec.linear_1, layer.outer.weight, layer.outer.bias)
    fill_norm(spec.layer_norm, residual.norm)


def fill_linear(spec: Any, weight: Tensor, bias: Tensor) -> None:
    spec.weight, spec.bias = numpy_array(weight), numpy_array(bias)


def fill_norm(spec: Any, norm: nn.Module) -> None:
    spec.gamma = numpy_array(norm.weight)  # type: ignore[arg-type]
    if isinstance(norm, nn.LayerNorm):
        spec.beta = numpy_array(norm.bias)


def numpy_array(tensor: Tensor) -> Any:
    return tensor.detach().float().numpy().copy()  # CTranslate2 quantizes its arrays in place


# ------------------------------------------------------------------------------------- verification


@dataclass(frozen=True)
class Comparison:
    """Comparison of one search in both engines, with the same float32 weights and settings."""

    beam: int
    sentences: int
    equal: int  # translations with the same subwords
    difference: float  # largest difference per subword between the two log probabilities of one translation
    worst: str  # the sentence with that difference

    def problem(self) -> str:
        """Explain how the engines disagree; empty if they agree."""
        if not self.difference <= TOLERANCE:
            return f"log probabilities per subword of {self.worst!r} differ by {self.difference:.1e}, beam {self.beam}"
        if self.equal < MIN_EQUAL_FRACTION * self.sentences:
            return f"only {self.equal} of {self.sentences} translations are equal, beam {self.beam}"
        return ""


class TorchEngine:
    """This project's model and search, in float32, without banned tokens."""

    def __init__(self, model: Seq2Seq, search: SearchConfig, max_length: int) -> None:
        # Without a length penalty CTranslate2 searches until no live hypothesis can win.
        self.search = replace(search, length_penalty=0.0, n_best=1, stop="certain")
        self.model, self.max_length = model, max_length

    @torch.inference_mode()
    def translate(self, sources: Sequence[list[int]], beam: int) -> list[list[int]]:
        translations: list[list[int]] = []
        for batch in batches(sources):
            source_BS = padded(batch)
            max_length_B, none_B = (
                torch.full((len(batch),), self.max_length),
                torch.zeros(len(batch), dtype=torch.int64),
            )
            task = DecodingTask(max_length_B, none_B, (source_BS != PAD).sum(1), [0] * len(batch))
            state, search = self.model.start(source_BS, source_BS != PAD), replace(self.search, beam=beam)
            ranked = beam_search(self.model.step, [(state, task)], search, Specials(BEGIN, END, ()))
            translations += [hypotheses[0].ids for hypotheses in ranked]
        return translations

    @torch.inference_mode()
    def score(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> list[float]:
        """Log probabilities of targets, END included."""
        scores: list[float] = []
        for source, target in zip(batches(sources), batches(targets), strict=True):
            source_BS, out_BT = padded(source), padded([[*ids, END] for ids in target])
            in_BT = shifted_right(out_BT)
            logits_BTV, _ = self.model.step(in_BT, self.model.start(source_BS, source_BS != PAD))
            log_BT = logits_BTV.log_softmax(-1).gather(2, out_BT[:, :, None])[:, :, 0]
            # A target may hold PAD itself, so its length decides.
            scores += [float(row[: len(ids) + 1].sum()) for row, ids in zip(log_BT, target, strict=True)]
        return scores


class CTranslate2Engine:
    """The exported folder in CTranslate2, under the same settings."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
        ctranslate2 = import_ctranslate2()
        ctranslate2.set_log_level(logging.ERROR)  # `compute_type` reports a substituted compute type
        self.translator = ctranslate2.Translator(str(folder), intra_threads=torch.get_num_threads())
        self.max_length = max_length
        self.source, self.target = (vocabulary_pieces(model) for model in (tokenizer.source, tokenizer.target))
        self.ids = {piece: i for i, piece in enumerate(self.target)}

    @property
    def compute_type(self) -> str:
        """The numeric type in which CTranslate2 computes on this machine."""
        return str(self.translator.compute_type)

    def translate(self, sources: Sequence[list[int]], beam: int, length_penalty: float = 0.0) -> list[list[int]]:
        translations = self.translator.translate_batch(
            self._source(sources),
            beam_size=beam,
            length_penalty=length_penalty,
            min_decoding_length=0,
            max_decoding_length=self.max_length,
            max_batch_size=BATCH_SIZE,
        )
        return [[self.ids[piece] for piece in result.hypotheses[0]] for result in translations]

    def score(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> list[float]:
        target_pieces = [[self.target[i] for i in ids] for ids in targets]
        return [sum(result.log_probs) for result in self.translator.score_batch(self._source(sources), target_pieces)]

    def _source(self, sources: Sequence[list[int]]) -> list[list[str]]:
        """Convert ids to pieces, without the END that CTranslate2 adds itself."""
        return [[self.source[i] for i in ids[:-1]] for ids in sources]


def compare_engines(
    torch_engine: TorchEngine,
    exported: CTranslate2Engine,
    sentences: Sequence[str],
    sources: Sequence[list[int]],
    beam: int,
) -> Comparison:
    """Translate with both engines; then score both translations of every sentence with both."""
    ours, theirs = torch_engine.translate(sources, beam), exported.translate(sources, beam)
    # At the length limit this search appends END and CTranslate2 does not.
    ended = [max(len(a), len(b)) < torch_engine.max_length - 1 for a, b in zip(ours, theirs, strict=True)]
    equal = sum(a == b or not end for a, b, end in zip(ours, theirs, ended, strict=True))
    difference, worst = 0.0, ""
    for translations in (ours, theirs):
        scored = zip(
            torch_engine.score(sources, translations),
            exported.score(sources, translations),
            translations,
            sentences,
            strict=True,
        )
        differences = ((abs(a - b) / (len(ids) + 1), sentence) for a, b, ids, sentence in scored)
        difference, worst = max((difference, worst), *differences)
    return Comparison(beam, len(sentences), equal, difference, worst)


def batches(rows: Sequence[list[int]]) -> list[Sequence[list[int]]]:
    return [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]


def padded(rows: Sequence[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*ids, *[PAD] * (width - len(ids))] for ids in rows])


def vocabulary_pieces(model: Any) -> list[str]:
    """Return every subword of a vocabulary, the special ones under the names that CTranslate2 expects."""
    return [SPECIAL_PIECES.get(i, str(model.id_to_piece(i))) for i in range(len(model))]
