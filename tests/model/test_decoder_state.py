"""A decoder state is a value: whatever is selected, reordered, joined or continued twice equals a new reading."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from seq2seq.inference.ensemble import Ensemble
from seq2seq.inference.step_graphs import assign, tensors
from seq2seq.model.attention import KeyValue
from seq2seq.model.decoder_state import State, bucket
from seq2seq.model.int8 import quantize
from seq2seq.model.interface import Seq2Seq
from seq2seq.model.lstm import LSTMState
from seq2seq.model.transformer import TransformerState
from tests.helpers.corpora import random_sentences
from tests.helpers.models import compiled
from tests.helpers.small_models import FAMILIES, POSITIONS, SCORES, matrix, small_model, variant

SENTENCES = random_sentences([3, 0, 6, 1, 4], seed=7, vocabulary=17)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# A kind of state for each kind of decoder: what the past holds depends on the positions and on the number of layers.
KINDS = [
    *(("transformer", "sinusoidal"), ("transformer", "rotary"), ("transformer", "alibi"), ("lstm", "rotary")),
    *(("int8", "sinusoidal"), ("int8", "rotary"), ("int8", "alibi")),
]
WALKS = [
    *((family, position, seed) for family, position in KINDS for seed in range(2)),
    *((family, position, 0) for family in FAMILIES for position in POSITIONS if (family, position) not in KINDS),
]
every_kind = pytest.mark.parametrize("family,position", KINDS)


@dataclass(frozen=True)
class Tracked:
    """A state beside the source and the tokens of each of its rows."""

    model: Seq2Seq | Ensemble
    state: State
    sources: tuple[int, ...]  # the sentence of each row
    histories: tuple[tuple[int, ...], ...]  # what each row has read
    beam: int = 1
    path: tuple[tuple[int, int], ...] = ()  # (beam, tokens) of each step: states that took the same may be joined

    @classmethod
    def begin(cls, model: Seq2Seq | Ensemble, sentences: Sequence[int]) -> Tracked:
        return cls(model, start(model, sentences), tuple(sentences), ((),) * len(sentences))

    def step(self, tokens_RT: Sequence[Sequence[int]], check: bool = True) -> Tracked:
        """More tokens for each row; their logits are those of a state that reads every row from its beginning."""
        logits_RTV, state = self.model.step(torch.tensor(tokens_RT), self.state)
        histories = tuple((*h, *t) for h, t in zip(self.histories, tokens_RT, strict=True))
        T = len(tokens_RT[0])
        if check:
            anew_RTV, _ = self.model.step(torch.tensor(histories), start(self.model, self.sources))
            torch.testing.assert_close(logits_RTV, anew_RTV[:, -T:], **CLOSE)
        assert (state.length, state.beam) == (len(histories[0]), self.beam)
        return Tracked(self.model, state, self.sources, histories, self.beam, (*self.path, (self.beam, T)))

    def random_step(self, draw: random.Random, T: int = 1) -> Tracked:
        return self.step([[draw.randrange(3, 17) for _ in range(T)] for _ in self.sources])

    def _take(self, state: State, rows: Sequence[int], beam: int) -> Tracked:
        assert (state.length, state.beam) == (self.state.length, beam)
        # A beam of one that has always been one remembers no other hypotheses.
        mark = () if beam == self.beam == 1 else ((beam, 0),)
        sources, histories = tuple(self.sources[r] for r in rows), tuple(self.histories[r] for r in rows)
        return Tracked(self.model, state, sources, histories, beam, (*self.path, *mark))

    def select(self, rows: Sequence[int], beam: int) -> Tracked:
        return self._take(self.state.select(torch.tensor(rows), beam), rows, beam)

    def reorder(self, rows: Sequence[int]) -> Tracked:
        taken = self._take(self.state.reorder(torch.tensor(rows)), rows, self.beam)
        return Tracked(self.model, taken.state, taken.sources, taken.histories, self.beam, self.path)

    def join(self, other: Tracked) -> Tracked:
        state = self.state.join(other.state)
        assert (state.length, state.beam) == (self.state.length, self.beam)
        sources, histories = self.sources + other.sources, self.histories + other.histories
        return Tracked(self.model, state, sources, histories, self.beam, self.path)


def start(model: Seq2Seq | Ensemble, sentences: Sequence[int]) -> State:
    source_BS = matrix([SENTENCES[i] for i in sentences])
    if isinstance(model, Ensemble):
        # Each model reads the sentence in its own subwords: the second one's are other ids, and fewer.
        other_BS = matrix([SENTENCES[i][-3:] for i in sentences])
        sources = [(source_BS, source_BS.ne(0)), (other_BS, other_BS.ne(0))]
        return model.start(sources[: len(model.models)])
    return model.start(source_BS, source_BS.ne(0))


def small(family: str, position: str, **options: Any) -> Seq2Seq:
    if family == "int8":
        model = small_model(variant("transformer", position=position, decoder_layers=2, **options)).float()
        quantize(model, compiled())
        return model
    return small_model(variant(family, position=position, decoder_layers=2, **options))


def inside(draw: random.Random, sentences: int, beam: int) -> list[int]:
    """New ranks for every hypothesis; some occur twice, and some not at all."""
    return [i * beam + draw.randrange(beam) for i in range(sentences) for _ in range(beam)]


@pytest.mark.parametrize("family,position,seed", WALKS)
@torch.inference_mode()
def test_any_walk_through_states_equals_reading_again(family: str, position: str, seed: int) -> None:
    """Steps, selections, new ranks and joins in any order; every earlier state stays usable."""
    draw = random.Random(f"{family} {position} {seed}")
    model = small(family, position)
    pool = [Tracked.begin(model, draw.sample(range(5), 2)) for _ in range(2)]
    for _ in range(12 if family == "lstm" else 20):
        now = draw.choice(pool)
        sentences = len(now.sources) // now.beam
        kind = draw.choice(["step"] * 4 + ["select", "reorder", "join"])
        if kind == "step":
            new = now.random_step(draw, draw.choice((1, 1, 1, 2, 3)))
        elif kind == "reorder":
            new = now.reorder(inside(draw, sentences, now.beam)).random_step(draw)
        elif kind == "select":
            beam, kept = draw.randint(1, 3), draw.sample(range(sentences), draw.randint(1, sentences))
            new = now.select([i * now.beam + draw.randrange(now.beam) for i in kept for _ in range(beam)], beam)
            new = new.random_step(draw)
        else:
            new = now.join(draw.choice([other for other in pool if other.path == now.path]))
            new = new.select(range(min(len(new.sources), 4 * now.beam)), now.beam).random_step(draw)
        pool.append(new)
        if len(pool) > 6:
            pool.pop(draw.randrange(5))


@every_kind
@pytest.mark.parametrize("beam", [1, 3])
@torch.inference_mode()
def test_forty_steps_of_a_search_equal_reading_again(family: str, position: str, beam: int) -> None:
    """New ranks after every step, as in a search; far beyond the room that a past first gets."""
    draw, now = random.Random(0), Tracked.begin(small(family, position), [2, 1])
    now = now.select([i for i in (0, 1) for _ in range(beam)], beam) if beam > 1 else now
    for t in range(40):
        tokens = [[draw.randrange(3, 17)] for _ in now.sources]
        now = now.step(tokens, check=t < 3 or t % 5 == 0)
        now = now.reorder(inside(draw, 2, beam)) if beam > 1 else now


@every_kind
@pytest.mark.parametrize("beam", [1, 2])
@torch.inference_mode()
def test_two_continuations_of_one_state_go_on_independently(family: str, position: str, beam: int) -> None:
    """Both continue twice in turns, from states of every age, and so does the state that they came from."""
    draw, root = random.Random(1), Tracked.begin(small(family, position), [0, 3])
    root = root.select([0] * beam + [1] * beam, beam) if beam > 1 else root
    for depth in range(4):
        a, b = root.random_step(draw), root.random_step(draw)
        a, b = a.random_step(draw), b.random_step(draw)
        a.random_step(draw)
        b.random_step(draw, 2)
        root = root.random_step(draw, 1 + depth % 2 * 6)


@every_kind
@torch.inference_mode()
def test_a_selection_shares_nothing_that_its_origin_changes(family: str, position: str) -> None:
    """A state and its selections write in turns."""
    draw, now = random.Random(2), Tracked.begin(small(family, position), [0, 2, 4]).random_step(random.Random(3), 2)
    for kept in ([0, 1, 2], [2, 0], [1, 1, 2]):
        taken = now.select(kept, 1)
        now, taken = now.random_step(draw), taken.random_step(draw)
        now, taken = now.random_step(draw), taken.random_step(draw)
        now.random_step(draw)


@every_kind
@torch.inference_mode()
def test_a_beam_may_grow_and_shrink_at_any_time(family: str, position: str) -> None:
    """One hypothesis becomes three, two, one and four, with steps of one and two tokens between."""
    draw, now = random.Random(4), Tracked.begin(small(family, position), [4, 1])
    for beam in (1, 3, 2, 1, 4, 1):
        sentences = len(now.sources) // now.beam
        rows = [i * now.beam + draw.randrange(now.beam) for i in reversed(range(sentences)) for _ in range(beam)]
        now = now.select(rows, beam).random_step(draw, 2).random_step(draw)


@every_kind
@pytest.mark.parametrize("beam", [1, 2, 4])
@torch.inference_mode()
def test_several_tokens_at_once_in_a_beam_are_read_in_order(family: str, position: str, beam: int) -> None:
    """From the first step on and after others: no token sees a later one, nor one of another hypothesis."""
    draw = random.Random(5)
    first = Tracked.begin(small(family, position), [2, 0]).select([0] * beam + [1] * beam, beam)
    for sizes in ((3, 2), (1, 3, 1), (2, 2, 2)):
        now = first
        for T in sizes:
            now = now.random_step(draw, T).reorder(inside(draw, 2, beam))


@every_kind
@pytest.mark.parametrize("beam", [1, 3])
@torch.inference_mode()
def test_joined_states_are_those_of_each(family: str, position: str, beam: int) -> None:
    """Sources of other lengths, before and after several steps; both parts and the whole go on."""
    draw, model = random.Random(6), small(family, position)
    for depth in (0, 1, 3):
        parts = []
        for sentences in ([1, 3], [2]):
            part = Tracked.begin(model, sentences)
            part = part.select([i for i in range(len(sentences)) for _ in range(beam)], beam)
            for _ in range(depth):
                part = part.random_step(draw).reorder(inside(draw, len(sentences), beam))
            parts.append(part)
        for a, b in (parts, parts[::-1]) if depth else (parts,):
            whole = a.join(b).random_step(draw)
            whole = whole.reorder(inside(draw, 3, beam)).random_step(draw, 2)
            whole.select(range(beam, 3 * beam), beam).random_step(draw)
            a.random_step(draw)


@pytest.mark.parametrize("position", POSITIONS)
@torch.inference_mode()
def test_hypotheses_of_one_parent_in_the_beam_of_a_single_sentence_stay_separate(position: str) -> None:
    """Rows with the same parent share its past and nothing else."""
    model = small("transformer", position)
    now = Tracked.begin(model, [2]).select([0, 0, 0], 3).step([[5], [6], [7]])
    now = now.reorder([1, 1, 0]).step([[8], [9], [10]]).reorder([2, 0, 0]).step([[11], [12], [13]])
    assert now.histories == ((5, 10, 11), (6, 8, 12), (6, 8, 13))
    now.step([[4], [4], [4]]).reorder([0, 1, 2]).step([[5], [6], [7]])


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_selecting_repeats_what_belongs_to_a_sentence_once_for_each(family: str) -> None:
    """However many hypotheses there are, its memory has a row for each sentence."""
    now = Tracked.begin(small(family, "none"), [0, 1, 2])
    state = now.select([2, 2, 0, 0, 2, 2], 2).state
    keys, before = (memory_of(one).key_RNSH for one in (state, now.state))
    torch.testing.assert_close(keys, before[[2, 0, 2]], rtol=0, atol=0)


def memory_of(state: State) -> KeyValue:
    """Of the last layer."""
    assert isinstance(state, (TransformerState, LSTMState))
    return state.memory if isinstance(state, LSTMState) else state.memory[-1]


# -------------------------------------------------------------------------------------------- ensembles


def ensemble(*families: str) -> Ensemble:
    options = ({"position": "alibi"}, {"position": "sinusoidal"}, {"position": "rotary"})
    models = []
    for seed, (family, option) in enumerate(zip(families, options, strict=False)):
        models.append(small_model(variant(family, tie_embeddings="output", **option), seed=seed))
    return Ensemble(models)


@pytest.mark.parametrize("families", [("transformer", "lstm"), ("lstm", "transformer"), ("transformer", "transformer")])
@torch.inference_mode()
def test_an_ensemble_is_the_mean_of_probabilities_at_every_step(families: tuple[str, str]) -> None:
    """Not of logits; each model reads its own source."""
    both, draw = ensemble(*families), random.Random(0)
    state = start(both, [0, 2])
    own = [model.start(x, x.ne(0)) for model, x in zip(both.models, sources([0, 2]), strict=True)]
    for T in (1, 2, 1):
        target_RT = torch.tensor([[draw.randrange(3, 17) for _ in range(T)] for _ in range(2)])
        attention_logits, attention_state, weights_RLNTS = both.step_with_attention(target_RT, state)
        logits_RTV, state = both.step(target_RT, state)
        torch.testing.assert_close(attention_logits, logits_RTV, **CLOSE)
        stepped = [model.decode(target_RT, s, weights=True) for model, s in zip(both.models, own, strict=True)]
        own = [decoded.state for decoded in stepped]
        probabilities = [
            (d.features_RTD @ m.output.weight.T).softmax(-1) for m, d in zip(both.models, stepped, strict=True)
        ]
        torch.testing.assert_close(logits_RTV.softmax(-1).double(), sum(probabilities) / 2, **CLOSE)
        # The same constant for every row: where probabilities are added up, rows are compared.
        torch.testing.assert_close(logits_RTV.exp().sum(-1).double(), torch.full((2, T), 2.0).double(), **CLOSE)
        torch.testing.assert_close(weights_RLNTS, torch.stack(stepped[0].weights, 1), **CLOSE)
        assert weights_RLNTS.shape[-1] == sources([0, 2])[0].shape[1]
        assert state.length == attention_state.length == own[0].length
        state = attention_state if T == 2 else state


def sources(sentences: Sequence[int]) -> list[Tensor]:
    return [matrix([SENTENCES[i] for i in sentences]), matrix([SENTENCES[i][-3:] for i in sentences])]


@pytest.mark.parametrize("families", [("transformer", "lstm"), ("lstm", "lstm"), ("transformer", "transformer")])
@torch.inference_mode()
def test_the_state_of_an_ensemble_is_selected_reordered_and_joined_as_a_whole(families: tuple[str, str]) -> None:
    """The past of every model moves with its hypothesis, and its memory with its sentence."""
    draw, both = random.Random(1), ensemble(*families)
    parts = []
    for sentences in ([0, 2], [3]):
        part = Tracked.begin(both, sentences).select([i for i in range(len(sentences)) for _ in range(2)], 2)
        for _ in range(2):
            part = part.random_step(draw).reorder(inside(draw, len(sentences), 2))
        parts.append(part)
    whole = parts[0].join(parts[1]).random_step(draw)
    whole = whole.reorder(inside(draw, 3, 2)).random_step(draw, 2)
    whole.select([4, 4, 4, 1, 0, 1], 3).random_step(draw)
    for part in parts:
        part.random_step(draw)
        assert part.state.beam == 2


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_an_ensemble_of_one_is_its_model(family: str) -> None:
    """The same logits, not log probabilities, and the same state."""
    one = ensemble(family)
    (model,) = one.models
    state, target_RT = start(one, [0, 2]), torch.tensor([[5, 6], [7, 8]])
    decoded = model.decode(target_RT, start(model, [0, 2]), weights=True)
    expected_RTV = model.logits(decoded.features_RTD)
    stepped_RTV, after = one.step(target_RT, state)
    attention_RTV, attention_after, weights_RLNTS = one.step_with_attention(target_RT, state)
    for found_RTV in (stepped_RTV, attention_RTV):
        torch.testing.assert_close(found_RTV, expected_RTV, **CLOSE)
    torch.testing.assert_close(weights_RLNTS, torch.stack(decoded.weights, 1), **CLOSE)
    for each in (after, attention_after):
        next_RTV, _ = one.step(torch.tensor([[3], [4]]), each)
        torch.testing.assert_close(next_RTV, model.step(torch.tensor([[3], [4]]), decoded.state)[0], **CLOSE)


@torch.inference_mode()
def test_probabilities_are_averaged_in_float32_whatever_the_models_compute_in() -> None:
    """Log probabilities in bfloat16 would keep two digits."""
    both = Ensemble([model.bfloat16() for model in ensemble("transformer", "lstm").models])
    target_RT = torch.tensor([[5, 6], [7, 8]])
    each = [model.step(target_RT, start(model, [0, 2]))[0] for model in both.models]
    source_BS = sources([0, 2])[0]
    logits_RTV, _ = both.step(target_RT, both.start([(source_BS, source_BS.ne(0))] * 2))
    assert {logits.dtype for logits in each} == {torch.bfloat16} and logits_RTV.dtype == torch.float32
    expected_RTV = sum(logits.double().softmax(-1) for logits in each) / 2
    torch.testing.assert_close(logits_RTV.softmax(-1).double(), expected_RTV, **CLOSE)


@torch.inference_mode()
def test_three_models_have_equal_weight() -> None:
    """The ensemble is the mean of their probabilities, in any order."""
    three = ensemble("transformer", "lstm", "transformer")
    source_BS, target_RT = matrix([SENTENCES[0]]), torch.tensor([[5, 6]])
    probabilities = torch.stack(
        [model.step(target_RT, model.start(source_BS, source_BS.ne(0)))[0].softmax(-1) for model in three.models]
    )
    for models in (three.models, three.models[::-1]):
        turned = Ensemble(models)
        logits_RTV, _ = turned.step(target_RT, turned.start([(source_BS, source_BS.ne(0))] * 3))
        torch.testing.assert_close(logits_RTV.softmax(-1).double(), probabilities.mean(0), **CLOSE)


# ------------------------------------------------------------------------------------------------ fixed states

FIXABLE = [
    *((family, {"position": position}) for family in FAMILIES for position in POSITIONS),
    *((family, {"position": "none", "score": score}) for family in FAMILIES for score in SCORES),
    ("ensemble", {"position": "rotary"}),
]
each_fixable = pytest.mark.parametrize(("family", "options"), FIXABLE)


def fixable(family: str, options: dict[str, Any]) -> Seq2Seq | Ensemble:
    if family == "ensemble":
        return Ensemble([small(each, **options, tie_embeddings="all") for each in FAMILIES])
    return small(family, **options)


def random_tokens(draw: random.Random, rows: int) -> Tensor:
    return torch.tensor([[draw.randrange(3, 17)] for _ in range(rows)])


@torch.inference_mode()
@each_fixable
@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("before", [0, 2])  # steps
def test_a_step_on_a_fixed_state_is_a_plain_step(family: str, options: dict[str, Any], beam: int, before: int) -> None:
    """With room for more sentences and steps; rows are reordered after each step, and selected last."""
    model, draw = fixable(family, options), random.Random(before)
    state: State = start(model, [0, 2, 3])
    state = state.select(torch.arange(3).repeat_interleave(beam), beam)
    for _ in range(before):
        _, state = model.step(random_tokens(draw, 3 * beam), state)
    fixed = state.fixed(5, before + 7)
    addresses = [x.data_ptr() for x in tensors(fixed)]
    for _ in range(4):
        target_R1, rest_X1 = random_tokens(draw, 3 * beam), random_tokens(draw, 2 * beam)
        expected, state = model.step(target_R1, state)
        logits, after = model.step(torch.cat((target_R1, rest_X1)), fixed)
        assign(fixed, after)
        torch.testing.assert_close(logits[: 3 * beam], expected, **CLOSE)
        assert logits.isfinite().all() and [x.data_ptr() for x in tensors(fixed)] == addresses
        rows = inside(draw, 3, beam)
        state = state.reorder(torch.tensor(rows))
        assign(fixed, fixed.reorder(torch.tensor([*rows, *range(3 * beam, 5 * beam)])))
    kept_R = torch.tensor([r for b in (2, 0) for r in range(b * beam, (b + 1) * beam)])
    target_R1 = random_tokens(draw, 2 * beam)
    logits, after = model.step(target_R1, fixed.plain(before + 4).select(kept_R, beam))
    expected, state = model.step(target_R1, state.select(kept_R, beam))
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (after.length, after.beam) == (state.length, beam)


@torch.inference_mode()
def test_only_a_plain_cache_is_a_value() -> None:
    """Each step changes a fixed one, so nothing is selected from or joined with it before it is plain."""
    model = small("transformer", position="rotary")
    _, state = model.step(torch.tensor([[5], [6], [7]]), start(model, [0, 2, 3]))
    fixed, rows_R = state.fixed(3, 4), torch.arange(3)
    uses: list[Callable[[State], State]] = [lambda x: x.select(rows_R, 1), lambda x: x.join(x), lambda x: state.join(x)]
    for use in uses:
        with pytest.raises(AssertionError, match="take its plain state first"):
            use(fixed)
        use(fixed.plain(1))


def test_a_bucket_is_the_next_of_a_few_sizes() -> None:
    sizes = [16, 32, 48, 64, 96, 128, 192, 256]
    for count in range(1, 257):
        assert bucket(count, 16) == next(size for size in sizes if size >= count)
