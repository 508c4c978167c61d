"""Text in, text out: the only path from raw sentences to raw translations.

Shapes: B sentences, R rows, S source and T target positions, V vocabulary, L layers, N heads,
U words of a shortlist.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.data.batching import split_by_token_budget
from seq2seq.data.encoding import shifted_right
from seq2seq.data.shortlist import Shortlist
from seq2seq.data.store import Ragged
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN, Tokenizer
from seq2seq.decoding.beam import Step, beam_search
from seq2seq.decoding.constraints import Rules
from seq2seq.decoding.mbr import expected_similarity
from seq2seq.decoding.progress import Progress
from seq2seq.decoding.sampling import sample
from seq2seq.decoding.scoring import (
    CHUNK_WIDTH,
    NO_ID,
    DecodingTask,
    Hypothesis,
    Specials,
    length_penalty,
    special_keys,
)
from seq2seq.inference.checkpoint import load_checkpoint
from seq2seq.inference.engines import CTranslate2Search, open_engine
from seq2seq.inference.ensemble import Ensemble
from seq2seq.inference.step_graphs import StepGraphs
from seq2seq.inference.workers import Workers, choose_processes
from seq2seq.model import native
from seq2seq.model.cpu_inference import optimize_for_cpu
from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Seq2Seq
from seq2seq.utils.device import choose_device, choose_precision, one_thread, to_device
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run

SPECIALS = Specials(BEGIN, END, banned=(PAD, UNKNOWN, BEGIN))
ENCODER_TOKENS = 2048  # source subwords that a CPU encodes together
SCORING_TOKENS = 2048  # target subwords that a CPU scores together: their float32 logits are as wide as the vocabulary
# Hypotheses that justify two parts of the work, and those of each part where there are more: smaller ones spend their
# time on building kernels for new shapes.
ROWS_OF_TWO_PARTS, ROWS_PER_PART, MOST_PARTS = 256, 384, 64

T = TypeVar("T")


@dataclass(frozen=True)
class Translation:
    text: str
    pieces: tuple[str, ...]  # the subwords of the text
    score: float  # ranks the translations of a sentence
    log_probability: float  # of all pieces and the end
    truncated: bool  # the source exceeded the model's limit and was truncated
    source_pieces: tuple[str, ...]  # as the model read them, with the end mark
    token_log_probabilities: tuple[float, ...]  # of each piece, then of the end
    # Attention weights, on request: from each piece and the end to each source piece.
    weights_LNTS: Tensor | None = field(repr=False, compare=False)

    def attention(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """Return each piece's and the end's attention to each source piece, averaged over layers or heads not named."""
        if self.weights_LNTS is None:
            raise ValueError("no attention weights; request them with attention=True")
        weights_NTS = self.weights_LNTS.mean(0) if layer is None else self.weights_LNTS[layer]
        return weights_NTS.mean(0) if head is None else weights_NTS[head]


FEW_PRODUCTS = 50_000_000  # of a step, parameters × rows, for which one thread is as fast as two

EMPTY = Translation("", (), 0.0, 0.0, False, (), (), None)  # of an empty sentence, which runs no model


class EncodedSource(NamedTuple):
    """A sentence as each model of the ensemble reads it."""

    ids: tuple[list[int], ...]
    truncated: bool
    pieces: tuple[str, ...]  # of the first model


class TeacherForced(NamedTuple):
    """A target's log probabilities under teacher forcing, and its attention weights."""

    log_probabilities: tuple[float, ...]  # of each id, then of END
    weights_LNTS: NDArray[np.float32] | None  # an array passes through a pipe, a tensor takes a file of shared memory


OnStep = Callable[[int, str], None]  # the index of a sentence, and its translation so far
OnDone = Callable[[int], None]  # the number of sentences translated so far


class GrowingTexts:
    """The text of each sentence's best hypothesis so far; a change is passed on, and nothing else."""

    def __init__(self, on_step: OnStep, tokenizer: Tokenizer, prefixes: Sequence[list[int]]) -> None:
        self.on_step, self.tokenizer, self.prefixes = on_step, tokenizer, prefixes
        self.texts = [""] * len(prefixes)

    def grow(self, i: int, ids: list[int]) -> None:
        """Show a hypothesis; its prefix appears at once, and a character when its last byte is there."""
        shown = ids if len(ids) > len(self.prefixes[i]) else self.prefixes[i]
        self.show(i, self.tokenizer.decode(shown).rstrip("\ufffd"))

    def show(self, i: int, text: str) -> None:
        if text != self.texts[i]:
            self.texts[i] = text
            self.on_step(i, text)


class Translator:
    """A model with its tokenizer, or an ensemble, ready to translate raw sentences.

    It does not change after loading, so several threads may share one.

    Examples:
        >>> translator = Translator.load("mine")
        >>> first, second = translator.translate(["one two", "three"])  # each a list, best first
        >>> type(first[0].text), first[0].log_probability < 0
        (<class 'str'>, True)
        >>> (scored,) = translator.score(["one two"], ["eins zwei"], attention=True)
        >>> scored.text, tuple(scored.attention().shape) == (len(scored.pieces) + 1, len(scored.source_pieces))
        ('eins zwei', True)
        >>> len(translator.alternatives("one two", prefix="eins", count=3))
        3
    """

    def __init__(self, model: Seq2Seq, tokenizer: Tokenizer, device: torch.device, max_length: int) -> None:
        self.models, self.tokenizers = Ensemble([model]), [tokenizer]
        self.tokenizer, self.device, self.max_length = tokenizer, device, max_length
        self.workers: Workers | None = None
        self.engine: CTranslate2Search | None = None  # searches in place of this project's search
        self.read_shortlist: Callable[[], Shortlist | None] = lambda: None
        self.library: CDLL | None = None  # compiled code for the search, if the model uses it too

    @classmethod
    def load(
        cls,
        run: str | Sequence[str] | None = None,
        checkpoint: str = "best",
        *,
        outputs: str = "outputs",
        device: str = "auto",
        precision: str = "auto",
        engine: str = "torch",
        processes: int | str = 1,
    ) -> Translator:
        """Load a run's checkpoint: the newest run's without a name, an ensemble for several names.

        `engine` is "torch", "ctranslate2" (int8) or "auto"; scores, attention and alternatives are torch's.
        """
        names = [run] if run is None or isinstance(run, str) else list(run)
        folders = [Run.find(name, outputs).checkpoint(checkpoint) for name in names]
        translators = [cls.from_checkpoint(folder, device, precision, engine) for folder in folders]
        return cls.ensemble(translators, names).use_processes(processes)

    @classmethod
    def from_checkpoint(
        cls, folder: Path, device: str = "auto", precision: str = "auto", engine: str = "torch"
    ) -> Translator:
        target_device, _ = choose_device(device)
        dtype, _ = choose_precision(precision, target_device)
        config, tokenizer, model = load_checkpoint(folder)
        library, problem = native.load() if precision == "int8" else (None, "")
        given = (folder, config.model, tokenizer, model, target_device)
        opened = open_engine(engine, *given, fast=library is not None and native.level() != "any")
        model = optimize_for_cpu(model.to(target_device, dtype).eval(), int8=precision == "int8")
        translator = cls(model, tokenizer, target_device, config.model.max_length)
        translator.engine = opened
        translator.read_shortlist = partial(Shortlist.load, folder, tokenizer.vocabulary)
        translator.library = library
        if problem:
            print(f"precision=int8 is slow here, in plain torch: {problem}", file=sys.stderr)
        return translator

    @classmethod
    def ensemble(cls, translators: Sequence[Translator], names: Sequence[str | None]) -> Translator:
        """Average the probabilities of models of either family; each may read the source in its own subwords."""
        if not translators:
            raise UserError("run: an ensemble needs at least one run", code=2)
        first = translators[0]
        if len(translators) == 1:
            return first
        if any(translator.engine and translator.engine.required for translator in translators):
            raise UserError(
                "engine: ctranslate2 translates with one run, not with an ensemble; use engine=torch", code=2
            )
        for other, name in zip(translators[1:], names[1:], strict=True):
            if other.tokenizer.target_pieces != first.tokenizer.target_pieces:
                raise UserError(
                    f"run: {names[0]} and {name} use different target subwords and cannot form an ensemble; "
                    "train them with one tokenizer"
                )
        ensemble = cls(first.models.models[0], first.tokenizer, first.device, min(t.max_length for t in translators))
        ensemble.library, ensemble.read_shortlist = first.library, lambda: first.shortlist
        ensemble.models = Ensemble([model for translator in translators for model in translator.models.models])
        ensemble.tokenizers = [tokenizer for translator in translators for tokenizer in translator.tokenizers]
        return ensemble

    def use_processes(self, processes: int | str) -> Translator:
        """Divide large inputs among this many processes; "auto" means one per usable core of a CPU.

        Any number gives the same digits. CTranslate2 divides what it searches among its own threads.
        """
        count = choose_processes(processes, self.device)
        self.workers = Workers(self._call, count)
        return self

    @cached_property
    def shortlist(self) -> Shortlist | None:
        """The shortlists of the checkpoint, or of an ensemble's first one; read when a search first needs them."""
        return self.read_shortlist()

    def require_shortlist(self) -> Shortlist:
        """Return the shortlists, which a search with search.shortlist needs."""
        if self.shortlist is None:
            raise UserError(
                "search.shortlist: this checkpoint has no shortlist; make one with seq2seq shortlist run=NAME, "
                "or set search.shortlist=0"
            )
        return self.shortlist

    @cached_property
    def graphs(self) -> StepGraphs:
        return StepGraphs(self.models.step, self.device)

    def engine_for(self, search: SearchConfig) -> str:
        """Name the engine of a search, with its version and quantization."""
        return self.engine.description if self.engine and self.engine.supports(search) else "torch"

    # ------------------------------------------------------------------------------------- translate

    def translate(
        self,
        sentences: Sequence[str],
        search: SearchConfig | None = None,
        *,
        prefixes: Sequence[str] | None = None,
        attention: bool = False,
        on_step: OnStep | None = None,
        on_done: OnDone | None = None,
        probabilities: bool = True,
    ) -> list[list[Translation]]:
        """Return each sentence's translations, best first; an empty sentence has one empty translation.

        A translation begins with its sentence's prefix. Attention weights cost another pass over the translations.
        `on_step` receives a sentence's index and the text of its best hypothesis whenever a step of the search changes
        it, and last the translation; samples have no steps. An exception that it raises ends the search.
        `on_done` receives the number of sentences translated so far whenever a part of a large input is done.
        `probabilities=False` permits an engine to omit the log probability of each subword, which costs it a pass.
        """
        if isinstance(sentences, str):
            raise TypeError("translate takes a list of sentences, not one string")
        if wrong := [i for i, text in enumerate(sentences) if not isinstance(text, str)]:
            raise TypeError(f"sentences[{wrong[0]}] is {sentences[wrong[0]]!r}, not a string")
        if prefixes is not None and len(prefixes) != len(sentences):
            raise ValueError(f"{len(sentences)} sentences and {len(prefixes)} prefixes differ in number")
        search, prefixes = search or search_preset("beam"), prefixes or [""] * len(sentences)
        parts = self._parts(sentences, prefixes, search)
        steps = [renumbered(on_step, part) if on_step else None for part in parts]
        calls = [
            (Translator._translate, *of_part(part, sentences, prefixes), search, attention, step, probabilities)
            for part, step in zip(parts, steps, strict=True)
        ]
        if search.shortlist and self.engine_for(search) == "torch":
            self.require_shortlist()  # before worker processes share it
        shared = self.workers if self.workers and not attention and not on_step else Workers(self._call, 1)
        found = shared.map(calls, counted(on_done, parts) if on_done else lambda _: None)
        return reordered(chain(*parts), chain(*found))

    def _parts(self, sentences: Sequence[str], prefixes: Sequence[str], search: SearchConfig) -> list[list[int]]:
        """Cut sentences into parts of equal cost and similar length.

        The cut does not depend on the number of processes: the last bits of a sum depend on the shape of its batch.
        """
        count = parts_of(len(sentences) * search.rows)
        divisible = self.workers and self.device.type == "cpu" and count > 1
        if not divisible or (self.engine and self.engine.supports(search, any(self._target_ids(prefixes)))):
            return [list(range(len(sentences)))]
        order = np.argsort([len(text) for text in sentences], kind="stable")
        cost = np.cumsum([(1 + len(sentences[i])) ** 1.1 for i in order])
        cuts = np.searchsorted(cost, cost[-1] * np.arange(1, count) / count)
        # The longest sentences, whose cost is the least certain, come first.
        return [np.sort(part).tolist() for part in reversed(np.split(order, cuts)) if len(part)]

    def _call(self, method: Callable[..., Any], *given: Any) -> Any:
        """Do one part of the work, as a worker process is asked to."""
        return method(self, *given)

    def _translate(
        self,
        sentences: Sequence[str],
        prefixes: Sequence[str],
        search: SearchConfig,
        attention: bool = False,
        on_step: OnStep | None = None,
        probabilities: bool = True,
    ) -> list[list[Translation]]:
        sources, prefix_ids = self._encode_sources(sentences), self._target_ids(prefixes)
        texts = GrowingTexts(on_step, self.tokenizer, prefix_ids) if on_step else None
        n_best: list[list[Hypothesis]] = [[] for _ in sentences]
        # Batching sentences of similar length pads little, and every batch ends early.
        filled = [i for i, source in enumerate(sources) if len(source.ids[0]) > 1]
        order = sorted(filled, key=lambda i: max(map(len, sources[i].ids)))
        found = self._search(order, sources, prefix_ids, search, texts, probabilities)
        for i, hypotheses in zip(order, found, strict=True):
            n_best[i] = self._select(hypotheses, search)
            if texts:
                texts.show(i, self.tokenizer.decode(n_best[i][0].ids))
        weights = self._attention(sources, n_best, search) if attention else {}
        return [
            [self._translation(source, hypothesis, weights.get(id(hypothesis))) for hypothesis in ranked] or [EMPTY]
            for source, ranked in zip(sources, n_best, strict=True)
        ]

    def _search(
        self,
        order: list[int],
        sources: list[EncodedSource],
        prefix_ids: list[list[int]],
        search: SearchConfig,
        texts: GrowingTexts | None,
        probabilities: bool,
    ) -> list[list[Hypothesis]]:
        """Search with the engine, and here what it leaves; return each sentence's hypotheses in this order."""
        if not (self.engine and self.engine.supports(search, any(prefix_ids))):
            return self._search_batches(order, sources, prefix_ids, search, texts)
        ids, prefixes = [sources[i].ids[0] for i in order], [prefix_ids[i] for i in order]
        length_B, required_B = (torch.tensor([len(row) for row in rows], dtype=torch.long) for rows in (ids, prefixes))
        max_lengths = self._max_length(length_B, required_B, search).tolist()
        found = dict(zip(order, self.engine.search(ids, prefixes, max_lengths, search, probabilities), strict=True))
        left = [i for i in order if found[i] is None]
        found |= zip(left, self._search_batches(left, sources, prefix_ids, search, texts), strict=True)
        return [found[i] or [] for i in order]

    def _search_batches(
        self,
        order: list[int],
        sources: list[EncodedSource],
        prefix_ids: list[list[int]],
        search: SearchConfig,
        texts: GrowingTexts | None,
    ) -> list[list[Hypothesis]]:
        """Search batch by batch; return each sentence's hypotheses in this order."""
        rules = self._rules(search)
        # All batches have prefixes, or none: sentences may move between them.
        prefixes = prefix_ids if any(prefix_ids) else None
        widths = np.array([max(map(len, sources[i].ids)) for i in order], np.int64)
        parts = (order[cut] for cut in split_by_token_budget(widths * search.rows, token_budget(search, self.device)))
        batches = (
            self._batch([sources[i] for i in part], prefixes and [prefixes[i] for i in part], search, rules)
            for part in parts
        )
        work = len(order) * search.rows * sum(model.size for model in self.models.models)
        few = work <= FEW_PRODUCTS and not self.library  # whose threads do not wait for one another
        with torch.inference_mode(), one_thread(few), self._step_for(search) as step:
            if search.samples:
                drawn = (sample(step, *batch, search, SPECIALS) for batch in batches)
                return [hypotheses for batch_hypotheses in drawn for hypotheses in batch_hypotheses]
            progress = Progress(search, lambda i, ids: texts.grow(order[i], ids)) if texts else None
            plain = self.library and not (prefixes or texts or special_keys(search))
            if plain and self.models.has_plain_search:
                found = (self.models.plain_search(*batch, search, SPECIALS) for batch in batches)
                return [*chain(*found)]
            return beam_search(step, batches, search, SPECIALS, progress, self.library)

    @contextmanager
    def _step_for(self, search: SearchConfig) -> Iterator[Step]:
        """Yield the step of a search; graphs serve one at a time, without shortlists and attention weights."""
        if search.coverage_penalty:
            yield self._step_with_attention
            return
        graphs = self.graphs if search.graphs and not search.shortlist else None
        if graphs and graphs.lock.acquire(blocking=False):
            try:
                yield graphs.step
            finally:
                graphs.lock.release()
        else:
            yield self.models.step

    def _batch(
        self, sources: list[EncodedSource], prefixes: list[list[int]] | None, search: SearchConfig, rules: Rules | None
    ) -> tuple[State, DecodingTask]:
        """Return the state before the first token, and the search task."""
        length_B = to_device(torch.tensor([len(source.ids[0]) for source in sources]), self.device)
        min_length_B, prefix_BP = None, None
        required_B = torch.full_like(length_B, rules.required_length if rules else 0)
        if prefixes is not None:
            prefix_BP = self._padded(prefixes, NO_ID)
            required_B += (prefix_BP != NO_ID).sum(1)
        max_length_B = self._max_length(length_B, required_B, search)
        if search.min_length_factor or search.min_length_extra:
            min_length_B = (length_B * search.min_length_factor).long() + search.min_length_extra
            min_length_B = min_length_B.minimum(max_length_B)
        seeds = [seed(source.ids[0]) for source in sources]
        shortlist_BU = self._shortlists(sources, prefixes, search, rules) if search.shortlist else None
        task = DecodingTask(max_length_B, min_length_B, length_B, seeds, rules, prefix_BP, shortlist_BU)
        return self._start(sources), task

    def _shortlists(
        self, sources: list[EncodedSource], prefixes: list[list[int]] | None, search: SearchConfig, rules: Rules | None
    ) -> Tensor:
        """Return the ids that each translation may use: what its source translates to, and what it must contain."""
        shortlist = self.require_shortlist()
        required = [*chain(*rules.required_ids)] if rules else []
        pairs = zip(sources, prefixes or [[]] * len(sources), strict=True)
        lists = [
            torch.from_numpy(shortlist.of(source.ids[0], search.shortlist, [*required, *prefix]))
            for source, prefix in pairs
        ]
        shortlist_BU = pad_sequence(lists, batch_first=True, padding_value=NO_ID)
        # Whole chunks: the sum over a sentence's own words is then the same to the last bit with any padding.
        return to_device(pad(shortlist_BU, (0, -shortlist_BU.shape[1] % CHUNK_WIDTH), value=NO_ID), self.device)

    def _max_length(self, length_B: Tensor, required_B: Tensor, search: SearchConfig) -> Tensor:
        """Return the longest translation of each source, END included, which has room for what it must contain."""
        max_length_B = (length_B * search.length_factor).long() + search.length_extra
        max_length_B = max_length_B.clamp(1, self.max_length)
        return max_length_B.maximum(required_B + 1)

    def _step_with_attention(
        self, target_RT: Tensor, state: State, shortlist_BU: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """Like `step`, and return attention weights averaged over layers and heads."""
        logits_RTV, state, weights_RLNTS = self.models.step_with_attention(target_RT, state, shortlist_BU)
        return logits_RTV, state, weights_RLNTS[:, :, :, -1].float().mean((1, 2))

    def _select(self, hypotheses: list[Hypothesis], search: SearchConfig) -> list[Hypothesis]:
        """Return the best hypotheses, by score or by expected similarity to all."""
        if search.select_by != "score":
            texts = [self.tokenizer.decode(hypothesis.ids) for hypothesis in hypotheses]
            similarity = dict(zip(texts, expected_similarity(texts, search.select_by), strict=True))
            by_text = {text: hypothesis for text, hypothesis in reversed(list(zip(texts, hypotheses, strict=True)))}
            ranked = sorted(by_text, key=lambda text: (-similarity[text], texts.index(text)))
            hypotheses = [replace(by_text[text], score=similarity[text]) for text in ranked]
        return hypotheses[: search.n_best]

    def _rules(self, search: SearchConfig) -> Rules | None:
        """Return the constraints of the search, or None."""
        if not (search.require or search.forbid or search.no_repeat_ngram):
            return None
        required = list(zip(search.require, self._target_ids(search.require), strict=True))
        for text, ids in required:
            if not ids or UNKNOWN in ids:  # none: normalisation removes all of its characters
                raise UserError(f"search.require: {text!r} cannot be written in this model's subwords", code=2)
        return Rules(self.tokenizer.target_pieces, END, required, search.forbid, search.no_repeat_ngram, self.device)

    def _translation(self, source: EncodedSource, hypothesis: Hypothesis, weights_LNTS: Tensor | None) -> Translation:
        return Translation(
            self.tokenizer.decode(hypothesis.ids),
            tuple(self.tokenizer.pieces(hypothesis.ids)),
            hypothesis.score,
            hypothesis.log_probability,
            source.truncated,
            source.pieces,
            hypothesis.token_log_probabilities,
            weights_LNTS,
        )

    def _attention(
        self, sources: list[EncodedSource], n_best: list[list[Hypothesis]], search: SearchConfig
    ) -> dict[int, Tensor | None]:
        """Return the attention weights of every hypothesis, from a pass under teacher forcing."""
        pairs = [(source, hypothesis) for source, ranked in zip(sources, n_best, strict=True) for hypothesis in ranked]
        ids = [hypothesis.ids for _, hypothesis in pairs]
        forced = self._teacher_force([source for source, _ in pairs], ids, search, attention=True)
        weights = map(attention_tensor, forced)
        return {id(hypothesis): weights_LNTS for (_, hypothesis), weights_LNTS in zip(pairs, weights, strict=True)}

    # ----------------------------------------------------------------------------------------- score

    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        search: SearchConfig | None = None,
        *,
        attention: bool = False,
    ) -> list[Translation]:
        """Score each target as a translation of its source, subword by subword.

        `search` sets the length penalty.
        """
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} sources and {len(targets)} targets differ in number")
        search = search or search_preset("beam")
        encoded, ids = self._encode_sources(sources), self._target_ids(targets)
        scored = []
        forced = self._teacher_force(encoded, ids, search, attention)
        for source, target, result in zip(encoded, ids, forced, strict=True):
            log_probability = sum(result.log_probabilities)
            score = log_probability / length_penalty(len(target) + 1, search)
            hypothesis = Hypothesis(target, log_probability, score, result.log_probabilities)
            scored.append(self._translation(source, hypothesis, attention_tensor(result)))
        return scored

    def alternatives(self, source: str, prefix: str, count: int) -> list[tuple[str, float]]:
        """Return the likeliest next subwords after a forced prefix, with their probabilities."""
        prefix_1T = torch.tensor([[BEGIN, *self._target_ids([prefix])[0]]], device=self.device)
        with torch.inference_mode():
            logits_1TV, _ = self.models.step(prefix_1T, self._start(self._encode_sources([source])))
            top = logits_1TV[0, -1].float().softmax(-1).topk(min(count, logits_1TV.shape[-1]))
        return list(zip(self.tokenizer.pieces(top.indices.tolist()), top.values.tolist(), strict=True))

    def _teacher_force(
        self, sources: list[EncodedSource], targets: list[list[int]], search: SearchConfig, attention: bool
    ) -> list[TeacherForced]:
        """Run the model on targets (without END) under teacher forcing; a CPU is faster in small batches."""
        tokens = SCORING_TOKENS if self.device.type == "cpu" else token_budget(search, self.device)
        order = sorted(range(len(targets)), key=lambda i: (len(targets[i]), len(sources[i].ids[0])))
        parts = split_by_token_budget(np.array([len(targets[i]) + 1 for i in order], np.int64), tokens)
        calls = [([sources[i] for i in order[part]], [targets[i] for i in order[part]], attention) for part in parts]
        if self.workers:
            found = self.workers.map([(Translator._teacher_force_batch, *call) for call in calls])
        else:
            found = [self._teacher_force_batch(*call) for call in calls]
        return reordered(order, chain(*found))

    @torch.inference_mode()
    def _teacher_force_batch(
        self, sources: list[EncodedSource], targets: list[list[int]], attention: bool
    ) -> list[TeacherForced]:
        out_BT = self._padded([[*target, END] for target in targets])
        in_BT = shifted_right(out_BT)
        state, weights_BLNTS = self._start(sources), None
        if attention:
            logits_BTV, _, weights_BLNTS = self.models.step_with_attention(in_BT, state)
            weights_BLNTS = weights_BLNTS.float().cpu()
        else:
            logits_BTV, _ = self.models.step(in_BT, state)
        log_BT = logits_BTV.float().log_softmax(-1).gather(2, out_BT[:, :, None])[:, :, 0]
        forced = []
        for b, (log_T, source, target) in enumerate(zip(log_BT.tolist(), sources, targets, strict=True)):
            T, S = len(target) + 1, len(source.ids[0])
            weights_LNTS = None if weights_BLNTS is None else weights_BLNTS[b, :, :, :T, :S].numpy().copy()
            forced.append(TeacherForced(tuple(log_T[:T]), weights_LNTS))
        return forced

    # ---------------------------------------------------------------------------------------- encoding

    def _encode_sources(self, sentences: Sequence[str]) -> list[EncodedSource]:
        """Encode each sentence for every model of the ensemble."""
        texts = [text if text.strip() else "" for text in sentences]
        by_model = [tokenizer.encode_source(texts) for tokenizer in self.tokenizers]
        return [self._source(ids) for ids in zip(*by_model, strict=True)]

    def _source(self, ids: tuple[list[int], ...]) -> EncodedSource:
        kept = tuple(one if len(one) <= self.max_length else [*one[: self.max_length - 1], END] for one in ids)
        return EncodedSource(kept, kept != ids, tuple(self.tokenizer.source_pieces(kept[0])))

    def _target_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[:-1] for ids in self.tokenizer.encode_target(texts)]

    def _start(self, sources: list[EncodedSource]) -> State:
        """Return the state before the first token; a CPU encodes small batches of similar length, to fit its cache."""
        if self.device.type != "cpu" or self.library:  # compiled code divides them itself
            return self._start_batch(sources)
        widths = np.array([max(map(len, source.ids)) for source in sources], np.int64)
        states = (self._start_batch(sources[part]) for part in split_by_token_budget(widths, ENCODER_TOKENS))
        return reduce(lambda a, b: a.join(b), states)

    def _start_batch(self, sources: list[EncodedSource]) -> State:
        padded = [self._padded(list(ids)) for ids in zip(*(source.ids for source in sources), strict=True)]
        return self.models.start([(source_BS, source_BS != PAD) for source_BS in padded])

    def _padded(self, rows: list[list[int]], padding: int = PAD) -> Tensor:
        return to_device(torch.from_numpy(Ragged.of(rows).padded(np.arange(len(rows)), padding)), self.device)


def parts_of(rows: int) -> int:
    """Return the number of parts of a search: a power of two, which most numbers of cores divide."""
    if rows < 2 * ROWS_PER_PART:
        return 2 if rows >= ROWS_OF_TWO_PARTS else 1
    return min(MOST_PARTS, 1 << (rows // ROWS_PER_PART).bit_length() - 1)


def of_part(part: Sequence[int], *lists: Sequence[str]) -> list[list[str]]:
    """Return the items of each list that a part consists of."""
    return [[items[i] for i in part] for items in lists]


def renumbered(on_step: OnStep, part: Sequence[int]) -> OnStep:
    """Return `on_step` for the sentences of a part, which the search numbers from 0."""
    return lambda i, text: on_step(part[i], text)


def counted(on_done: OnDone, parts: Sequence[Sequence[int]]) -> Callable[[int], None]:
    """Return a function that takes the index of a part that is done, and passes on how many sentences are."""
    sizes = [0]

    def add(i: int) -> None:
        sizes.append(len(parts[i]))
        on_done(sum(sizes))

    return add


def reordered(indices: Iterable[int], items: Iterable[T]) -> list[T]:
    """Return the items in the order of their indices, which are all from 0 on."""
    return [item for _, item in sorted(zip(indices, items, strict=True), key=lambda pair: pair[0])]


def attention_tensor(forced: TeacherForced) -> Tensor | None:
    return None if forced.weights_LNTS is None else torch.from_numpy(forced.weights_LNTS)


def token_budget(search: SearchConfig, device: torch.device) -> int:
    """Return the source subwords × hypotheses of a batch: on a GPU many, as a step costs the same for few rows."""
    return search.tokens if search.tokens != "auto" else 2**14 if device.type == "cpu" else 2**17


def seed(ids: list[int]) -> int:
    """Return a random seed that depends on the sentence alone, not on its batch."""
    return int.from_bytes(hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=8).digest(), "little")
