"""Typed configuration: names, types and checks. configs/ holds the values and explains them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar


@dataclass(frozen=True)
class Range:
    """The numbers a field accepts."""

    low: float
    high: float = float("inf")
    open: bool = False  # True: `low` itself is excluded

    def __contains__(self, value: float) -> bool:
        finite = abs(value) <= sys.float_info.max  # math.isfinite fails for whole numbers beyond it
        return finite and self.low <= value <= self.high and not (self.open and value == self.low)

    def __str__(self) -> str:
        if self.high < float("inf"):
            return f"between {self.low:g} and {self.high:g}"
        return f"greater than {self.low:g}" if self.open else f"at least {self.low:g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, 0.999)]
Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]

AttentionScore = Literal["additive", "dot", "scaled_dot", "general", "cosine"]
PositionKind = Literal["none", "sinusoidal", "learned", "rotary", "alibi"]
Stop = Literal["filled", "likely", "certain", "longest"]
Tie = Literal["none", "output", "all"]
Precision = Literal["auto", "float32", "tf32", "bfloat16"]
Engine = Literal["torch", "ctranslate2", "auto"]
InferencePrecision = Literal["auto", "float32", "tf32", "bfloat16", "float16", "int8"]
Split = Literal["train", "validation", "test"]
MetricName = Literal["bleu", "bleu_lc", "chrf", "chrf_lc", "chrf++", "ter", "comet"]
Tokenize = Literal["13a", "none", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200"]
Problems = Iterator[tuple[str, str]]  # (key below this object, the contradiction)


Number = TypeVar("Number", int, float)


def settled(value: Number | Literal["auto"]) -> Number:
    """Return a number that was "auto" only until training began."""
    assert value != "auto"
    return value


_EVEN = "sinusoidal positions alternate sine and cosine; make it even"


@dataclass(frozen=True)
class AttentionConfig:
    score: AttentionScore
    heads: Count
    dropout: Fraction


@dataclass(frozen=True)
class TransformerConfig:
    family: Literal["transformer"]
    name: str
    width: Count
    feed_forward: Count
    encoder_layers: Count
    decoder_layers: Count
    attention: AttentionConfig
    position: PositionKind
    max_length: Count
    norm: Literal["layer", "rms"]
    norm_position: Literal["pre", "post"]
    activation: Literal["relu", "gelu", "swiglu"]
    dropout: Fraction
    embedding_dropout: Fraction | None
    activation_dropout: Fraction | None
    word_dropout: Fraction
    layer_dropout: Fraction
    tie_embeddings: Tie

    def problems(self) -> Problems:
        yield from _head_problems(self.width, self.attention.heads, self.position)
        if self.position == "sinusoidal" and self.width % 2:
            yield "width", f"{self.width} is odd, but {_EVEN}"


@dataclass(frozen=True)
class LSTMConfig:
    family: Literal["lstm"]
    name: str
    embedding: Count
    width: Count
    encoder_layers: Count
    decoder_layers: Count
    attention: AttentionConfig
    position: PositionKind
    max_length: Count
    convolutions: Natural
    kernel_size: Count
    decoder_init: Literal["backward", "pooled"]
    dropout: Fraction
    embedding_dropout: Fraction | None
    word_dropout: Fraction
    layer_dropout: Fraction
    tie_embeddings: Tie

    def problems(self) -> Problems:
        yield from _head_problems(self.width, self.attention.heads, self.position)
        if self.position == "sinusoidal" and self.embedding % 2:
            yield "embedding", f"{self.embedding} is odd, but {_EVEN}"
        if self.kernel_size % 2 == 0:
            yield "kernel_size", f"{self.kernel_size} is even, but the kernel must be centred; make it odd"


ModelConfig = TransformerConfig | LSTMConfig


@dataclass(frozen=True)
class FilterConfig:
    empty: bool
    identical: bool
    duplicate: bool
    max_ratio: NonNegative
    max_characters: Natural


@dataclass(frozen=True)
class ExtraCorpusConfig:
    """An additional training corpus; an entry of a list, so its defaults are here."""

    train: str | list[str]
    path: str | None = None
    subset: str | None = None
    weight: Positive = 1.0

    def within(self, config: DataConfig) -> DataConfig:
        """Return the data config with this corpus instead of the first."""
        return dataclasses.replace(config, path=self.path, subset=self.subset, train=self.train, revision=None)


@dataclass(frozen=True)
class DataConfig:
    name: str
    path: str | None
    subset: str | None
    revision: str | None
    source: str | None
    target: str | None
    train: str | list[str] | None
    validation: str | list[str] | None
    test: str | list[str] | None
    tokenize: Tokenize | None
    held_out: Count
    max_length: Count
    filters: FilterConfig
    extra: list[ExtraCorpusConfig]
    temperature: Positive
    cache: str

    def problems(self) -> Problems:
        for side in ("source", "target"):
            if (given := getattr(self, side)) is not None and not given.strip():
                yield side, "the value is empty; name a column, or a language of the `translation` column"
        if self.source is not None and self.source == self.target:
            yield "target", f"{self.target} is also the source; name two different columns"
        for split in ("train", "validation", "test"):
            given = getattr(self, split)
            if isinstance(given, list) and len(given) != 2:
                advice = "give two, [file.source,file.target], or a table without brackets"
                yield split, f"{given} must name two files; {advice}"

    @property
    def languages(self) -> tuple[str, str]:
        """The languages, to be shown; where one is unknown, its side."""
        return self.source or "source", self.target or "target"


@dataclass(frozen=True)
class TokenizerConfig:
    type: Literal["unigram", "bpe", "char", "word"]
    vocabulary: Annotated[int, Range(8)]
    joint: bool
    character_coverage: Annotated[float, Range(0.98, 1)]  # what sentencepiece accepts
    byte_fallback: bool
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"]
    user_symbols: list[str]
    max_sentences: Count
    sampling: Fraction
    model: str | list[str] | None

    def problems(self) -> Problems:
        if self.sampling and self.type in ("char", "word"):
            yield (
                "sampling",
                f"{self.sampling} requires alternative segmentations, but type={self.type} has only one; set it to 0",
            )
        if isinstance(self.model, list) and len(self.model) != 2:
            yield (
                "model",
                f"{self.model} names {len(self.model)} files; give one for both languages, or [source,target]",
            )


@dataclass(frozen=True)
class ParamGroupConfig:
    """Optimizer settings of one kind of parameter."""

    lr_scale: NonNegative
    weight_decay: NonNegative


@dataclass(frozen=True)
class ParamGroupsConfig:
    embeddings: ParamGroupConfig
    matrices: ParamGroupConfig
    vectors: ParamGroupConfig


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon", "schedule_free", "adafactor"]
    lr: Positive | Literal["auto"]
    schedule: Literal["inverse_sqrt", "cosine", "linear", "stable", "constant", "plateau"]
    warmup: Natural | Literal["auto"]
    cooldown: Fraction
    plateau_patience: Count
    betas: list[float]
    eps: Positive
    param_groups: ParamGroupsConfig
    clip_norm: NonNegative

    def problems(self) -> Problems:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", f"{self.betas} must be two numbers from 0 to below 1, such as [0.9,0.98]"
        if self.name == "schedule_free":
            if self.schedule != "constant":
                yield "schedule", f"{self.schedule} is incompatible with name=schedule_free; set it to constant"
            if self.betas[:1] == [0]:
                yield "betas", "schedule_free averages with the first beta; it must be greater than 0, such as 0.9"


@dataclass(frozen=True)
class TrainingConfig:
    updates: Count | Literal["auto"]
    max_minutes: NonNegative
    patience: Natural | Literal["auto"]
    tokens: Count | Literal["auto"]
    update_tokens: Natural
    parallel: Literal["ddp", "fsdp"]
    packing: bool
    recompute: bool
    label_smoothing: Fraction
    r_drop: NonNegative
    simcut: NonNegative
    simcut_cutoff: Fraction
    average: Literal["none", "ema", "last"]
    ema_decay: Fraction
    average_checkpoints: Count
    log_every: Count
    validate_every: Count | Literal["auto"]
    monitor: Literal["bleu", "chrf", "loss"]
    examples: Natural

    def problems(self) -> Problems:
        if self.r_drop and self.simcut:
            yield "simcut", "simcut and r_drop are mutually exclusive; set one of them to 0"

    @property
    def recent(self) -> int:
        """The number of earlier checkpoints that an average needs."""
        return self.average_checkpoints - 1 if self.average == "last" else 0

    @property
    def budget(self) -> int:
        """The token budget of a batch, once "auto" is resolved."""
        return settled(self.tokens)


@dataclass(frozen=True)
class SearchConfig:
    beam: Count
    n_best: Count
    length_normalization: Literal["gnmt", "average"]
    length_penalty: NonNegative
    coverage_penalty: NonNegative
    stop: Stop
    length_factor: NonNegative
    length_extra: Count
    min_length_factor: NonNegative
    min_length_extra: Natural
    groups: Count
    diversity: NonNegative
    require: list[str]
    forbid: list[str]
    no_repeat_ngram: Natural
    samples: Natural
    temperature: Positive
    top_k: Natural
    top_p: Annotated[float, Range(0, 1, open=True)]
    min_p: Annotated[float, Range(0, 1)]
    epsilon_cutoff: Annotated[float, Range(0, 1)]
    seed: Annotated[int, Range(0, 2**63 - 1)]
    select_by: Literal["score", "chrf", "bleu"]
    shortlist: Annotated[int, Range(0, 200)]
    tokens: Count | Literal["auto"]
    graphs: bool

    @property
    def rows(self) -> int:
        """The number of hypotheses decoded in parallel for each sentence."""
        return self.samples or self.beam

    def problems(self) -> Problems:
        if self.n_best > self.rows:
            key, remedy = ("samples", "draw more samples") if self.samples else ("beam", "widen the beam")
            yield "n_best", f"{self.n_best} exceeds {key}={self.rows}; {remedy}"
        if self.min_length_factor > self.length_factor or (
            self.min_length_factor + self.min_length_extra > self.length_factor + self.length_extra
        ):
            yield (
                "min_length_factor",
                "the minimum length exceeds the maximum (length_factor, length_extra); lower it",
            )
        yield from self._beam_problems()
        yield from self._sample_problems()
        for key in ("require", "forbid"):
            if any(not text.strip() for text in getattr(self, key)):
                yield key, "an entry is empty; give a word or a phrase"
        if both := set(self.require) & set(self.forbid):
            yield "forbid", f"{sorted(both)[0]} is also required; remove it from one of them"

    def _beam_problems(self) -> Problems:
        if self.beam % self.groups:
            yield "groups", f"{self.groups} does not divide the beam of {self.beam}; choose a divisor"
        if self.diversity and self.groups == 1:
            yield "diversity", f"{self.diversity:g} has no effect with one group; set groups above 1, or diversity to 0"
        if self.require and self.groups > 1:
            yield (
                "require",
                f"require and groups={self.groups} are mutually exclusive, as both partition the beam; use one of them",
            )
        if self.select_by != "score" and self.rows == 1:
            yield (
                "select_by",
                f"{self.select_by} compares candidates, but there is only one; set a beam or samples above 1",
            )

    def _sample_problems(self) -> Problems:
        used = {"beam": self.beam > 1, "require": bool(self.require), "coverage_penalty": self.coverage_penalty > 0}
        if self.samples:
            for key in (key for key, value in used.items() if value):
                yield (
                    key,
                    f"this key applies to beam search, not to samples={self.samples}; start from search=sample",
                )
            return
        cuts = {
            "top_k": self.top_k > 0,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
            "epsilon_cutoff": self.epsilon_cutoff > 0,
        }
        for key in (key for key, value in {"temperature": self.temperature != 1, **cuts}.items() if value):
            yield key, "this key applies to sampling only; set samples, or search=sample"


@dataclass(frozen=True)
class TrainConfig:
    name: str
    outputs: str
    overwrite: bool
    device: str
    precision: Precision
    compile: bool
    deterministic: bool
    processes: Count | Literal["auto"]
    seed: Annotated[int, Range(0, 2**63 - 1)]
    init_from: str | None
    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    search: SearchConfig

    def problems(self) -> Problems:
        yield from _needs_training_pairs(self.data)
        if self.search.shortlist:
            yield "search.shortlist", "seq2seq shortlist makes it after training; set it to 0 here"
        if self.optimizer.name == "schedule_free" and self.training.average != "none":
            yield (
                "training.average",
                f"{self.training.average}: schedule_free already averages the weights; set it to none",
            )
        if self.training.packing and isinstance(self.model, TransformerConfig) and self.model.layer_dropout:
            yield (
                "training.packing",
                "packing and model.layer_dropout are mutually exclusive; set one of them to its default",
            )
        if self.training.parallel == "fsdp":
            yield from _problems_of_sharding(self)
        if self.training.recompute and not isinstance(self.model, TransformerConfig):
            yield (
                "training.recompute",
                f"only Transformer layers can be recomputed, and {self.model.name} has none; set it to false",
            )
        if not Path(self.name.strip()).parts or Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            yield "name", f"{self.name!r} does not name a folder inside {self.outputs}; use letters, digits, - and _"
        if self.model.tie_embeddings == "all" and not self.tokenizer.joint:
            yield (
                "model.tie_embeddings",
                "'all' shares one embedding table across both languages, which needs a joint vocabulary; "
                "set tokenizer.joint=true or model.tie_embeddings=output",
            )
        if self.model.position == "learned" and self.model.max_length <= self.data.max_length:
            yield (
                "model.max_length",
                (
                    f"{self.model.max_length} learned positions are too few for a sentence of data.max_length="
                    f"{self.data.max_length} and its end token; set it to at least {self.data.max_length + 1}"
                ),
            )


@dataclass(frozen=True)
class TestConfig:
    """The test sets that runs are measured on, and the search that translates them."""

    checkpoint: str
    outputs: str
    device: str
    precision: InferencePrecision
    processes: Count | Literal["auto"]
    split: Split | list[Split]
    source: str | list[str] | None
    reference: str | list[str | list[str]] | None
    public: str | list[str] | None
    data: DataConfig | None
    data_path: str | None
    tokenize: Tokenize | None
    search: SearchConfig

    def problems(self) -> Problems:
        if (self.source is None) != (self.reference is None):
            missing = "source" if self.source is None else "reference"
            yield missing, "a value is missing; source and reference must be given together, as files of equal length"
        elif isinstance(self.source, list) and (
            not isinstance(self.reference, list) or len(self.reference) != len(self.source)
        ):
            yield (
                "reference",
                f"{self.reference} must be a list like source, with one file or list of files for each source",
            )
        elif isinstance(self.source, str) and (
            self.reference == [] or any(isinstance(file, list) for file in self.reference or "")
        ):
            yield "reference", f"{self.reference} must be a file, or a list of files, for the one source"
        if self.source is not None and self.public is not None:
            yield "public", "a public test set and source files are mutually exclusive; name one of them"


@dataclass(frozen=True)
class EvaluateConfig(TestConfig):
    run: str | list[str] | None
    engine: Engine
    metrics: list[MetricName]
    resamples: Natural
    comet: str
    detail: bool

    def problems(self) -> Problems:
        yield from super().problems()
        yield from _needs_metrics(self.metrics)
        if self.resamples == 1:
            yield "resamples", "one resample yields no interval; use 0 (no interval) or about 1000"


@dataclass(frozen=True)
class CompareConfig(TestConfig):
    run: list[str] | None
    metrics: list[MetricName]
    sentences: Natural

    def problems(self) -> Problems:
        yield from super().problems()
        if self.run is not None and len(set(self.run)) < max(2, len(self.run)):
            yield "run", f"{self.run} must name two different runs or more: seq2seq compare A B"
        yield from _needs_metrics(self.metrics)
        if "comet" in self.metrics:
            yield "metrics", "sacreBLEU has no paired test for comet; remove it"


@dataclass(frozen=True)
class ReportConfig(TestConfig):
    run: str | None
    output: str | None
    tokenize: Tokenize | None
    show: list[Count]
    sentences: Count


@dataclass(frozen=True)
class ReproduceConfig:
    run: str | None
    name: str | None
    outputs: str
    device: str | None
    data_path: str | None


def _needs_metrics(metrics: list[MetricName]) -> Problems:
    if not metrics:
        yield "metrics", "the list is empty; name metrics, such as [bleu,chrf]"


def _problems_of_sharding(config: TrainConfig) -> Problems:
    name = config.optimizer.name
    reasons = {
        f"optimizer={name} needs whole matrices; set optimizer=adamw": name in ("muon", "adafactor"),
        "compile=true needs whole weights; set compile=false": config.compile,
        "tokens=auto tries other batches in each process; set training.tokens=8192": config.training.tokens == "auto",
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        yield "training.parallel", f"fsdp: {reason}, or training.parallel=ddp"


def _needs_training_pairs(data: DataConfig) -> Problems:
    if data.train is None:
        yield "data.train", "no training data; give two files, data.train=[file.source,file.target], or a table"


@dataclass(frozen=True)
class DoctorConfig:
    data: DataConfig
    tokenizer: TokenizerConfig
    tokens: Count
    seed: Annotated[int, Range(0, 2**63 - 1)]
    json: bool

    def problems(self) -> Problems:
        yield from _needs_training_pairs(self.data)


@dataclass(frozen=True)
class ScoreConfig:
    run: str | list[str] | None
    checkpoint: str
    outputs: str
    device: str
    precision: InferencePrecision
    processes: Count | Literal["auto"]
    source: str | None
    target: str | None
    output: str | None
    summary: bool

    def problems(self) -> Problems:
        if (self.source is None) != (self.target is None):
            missing = "source" if self.source is None else "target"
            yield missing, "a value is missing; source and target must be given together, as files of equal length"


@dataclass(frozen=True)
class TranslateConfig:
    run: str | list[str] | None
    checkpoint: str
    outputs: str
    device: str
    precision: InferencePrecision
    engine: Engine
    processes: Count | Literal["auto"]
    input: str | None
    output: str | None
    split_lines: bool
    progress: bool | None
    search: SearchConfig

    def problems(self) -> Problems:
        if self.split_lines and self.search.n_best > 1:
            yield (
                "split_lines",
                "split_lines joins the best translations of a line's sentences; set search.n_best=1",
            )


@dataclass(frozen=True)
class ServeConfig:
    run: str | list[str] | None
    ensemble: bool
    checkpoint: str
    outputs: str
    device: str
    precision: InferencePrecision
    engine: Engine
    processes: Count | Literal["auto"]
    host: str
    port: Annotated[int, Range(0, 65535)]
    api_key: str | None
    cors: list[str]
    batch_tokens: Count | Literal["auto"]
    batch_wait_ms: NonNegative
    timeout_s: Positive
    max_characters: Count
    max_sentences: Count
    max_body_bytes: Count
    max_queue_characters: Count
    reload_s: NonNegative
    shutdown_s: NonNegative
    log_texts: bool
    search: SearchConfig

    def problems(self) -> Problems:
        if self.ensemble and not (isinstance(self.run, list) and len(self.run) > 1):
            yield "ensemble", "an ensemble needs several runs; set run=[a,b]"
        if self.max_characters > self.max_queue_characters:
            yield (
                "max_characters",
                f"{self.max_characters} characters never fit into the queue; "
                f"lower it to max_queue_characters={self.max_queue_characters} or less",
            )


@dataclass(frozen=True)
class ExportConfig:
    run: str | None
    checkpoint: str
    outputs: str
    quantization: Literal["float32", "float16", "int8", "int8_float16"]
    output: str | None
    overwrite: bool
    sentences: Count
    data_path: str | None


@dataclass(frozen=True)
class ShortlistConfig:
    run: str | None
    checkpoint: str
    outputs: str
    data_path: str | None


def _head_problems(width: int, heads: int, position: str) -> Problems:
    if width % heads:
        fitting = [n for n in range(1, width + 1) if width % n == 0 and n <= 64]
        yield "attention.heads", f"{heads} does not divide the width {width}; possible: {comma_separated(fitting)}"
    elif position == "rotary" and (width // heads) % 2:
        yield (
            "attention.heads",
            (
                f"{heads} heads of a width {width} are {width // heads} wide each, but rotary positions rotate pairs; "
                "choose an even head width"
            ),
        )


def comma_separated(choices: Any) -> str:
    return ", ".join(str(choice) for choice in choices)
