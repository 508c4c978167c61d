"""Laws of optimizers, learning rates, averages, and of the copy that computes in another precision."""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from seq2seq.config.schema import OptimizerConfig, ParamGroupConfig, ParamGroupsConfig
from seq2seq.data.tokenizer import Vocabulary
from seq2seq.model.factory import build_model
from seq2seq.training.averaging import CheckpointAverage, ExponentialMovingAverage, ScheduleFreeAverage, build_average
from seq2seq.training.loss import loss_sum
from seq2seq.training.mixed_precision import WorkingCopy
from seq2seq.training.optimizers import (
    ScheduleFree,
    build_optimizer,
    clip_gradients,
    optimizer_table,
    parameters_by_kind,
)
from seq2seq.training.schedule import lr_at, peak_rate, settle_rate
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import tiny_batch
from tests.helpers.models import tiny_model
from tests.helpers.trainers import base_config, make_trainer, rank_batches_of, varied, weights
from tests.reference.optimizers import Adafactor, AdamW, Muon, ScheduleFreeAdamW, clipped, running_mean
from tests.reference.schedules import lr_at as reference_lr_at

LRS = [0.01, 0.02, 0.03, 0.02, 0.005]  # up and down again
KINDS = ParamGroupsConfig(ParamGroupConfig(0.5, 0.3), ParamGroupConfig(2.0, 0.2), ParamGroupConfig(3.0, 0.1))
MULTIPLES = {"embeddings": 0.5, "matrices": 2.0, "vectors": 3.0}
DECAYS = {"embeddings": 0.3, "matrices": 0.2, "vectors": 0.1}


class Parts(nn.Module):
    """A parameter of every kind, with a table that two parts share and a weight that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.output = self.table
        self.linear = nn.Linear(4, 6)
        self.convolution = nn.Conv1d(3, 2, 5)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def parts(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    return Parts().double()


def settings_of(name: Any, **changes: Any) -> OptimizerConfig:
    config = replace(base_config("transformer").optimizer, name=name, betas=[0.7, 0.9], eps=1e-3, param_groups=KINDS)
    return replace(config, **changes)


def by_kind(model: Parts) -> dict[str, list[Any]]:
    vectors = [model.linear.bias, model.convolution.bias, model.norm.weight, model.norm.bias]
    return {
        "embeddings": [model.table.weight],
        "matrices": [model.linear.weight, model.convolution.weight],
        "vectors": [p for p in vectors if p is not None],
    }


def reference_for(name: str, kind: str, start: list[Tensor]) -> list[tuple[Any, list[int]]]:
    """The optimizers of a kind's parameters, and which of these each one moves."""
    decay, every = DECAYS[kind], list(range(len(start)))
    if name == "muon" and kind == "matrices":  # a stack of matrices has no direction to make orthogonal
        return [(Muon(start[:1], decay), [0]), (AdamW(start[1:], (0.7, 0.9), 1e-3, decay), [1])]
    if name == "adafactor":
        return [(Adafactor(start, decay), every)]
    maker = ScheduleFreeAdamW if name == "schedule_free" else AdamW
    return [(maker(start, (0.7, 0.9), 1e-3, decay), every)]


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            # One of them far below epsilon, where it is epsilon that decides.
            scale = 10.0 ** -(seed % 4)
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


NAMES = ["adamw", "muon", "schedule_free", "adafactor"]


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_is_its_papers_with_the_settings_of_the_config(name: str, restored: bool) -> None:
    """Every kind has its own lr and decay, at each step of a run, also when its state was stored and read again."""
    model = parts()
    optimizer, members = build_optimizer(model, settings_of(name)), by_kind(model)
    references = {kind: reference_for(name, kind, [p.detach() for p in ps]) for kind, ps in members.items()}
    for n, lr in enumerate(LRS):
        set_gradients(model, n)
        for kind, ps in members.items():
            gradients = [p.grad for p in ps if p.grad is not None]
            for reference, chosen in references[kind]:
                reference.step([gradients[i] for i in chosen], lr * MULTIPLES[kind])
        if restored and n in (1, 3):
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(model, settings_of(name))
            optimizer.load_state_dict(state)
        optimizer.step(lr)
        for kind, ps in members.items():
            for reference, chosen in references[kind]:
                for i, index in enumerate(chosen):
                    where = reference.y if name == "schedule_free" else reference.x
                    message = f"{name}: {kind}[{index}] after step {n + 1}"
                    torch.testing.assert_close(
                        ps[index].detach(), where[i], rtol=1e-9, atol=1e-10, msg=partial("{}: {}".format, message)
                    )
    assert torch.equal(model.frozen, torch.ones(3, 3).double()), "what is not trained stays"


def test_schedule_free_translates_with_x() -> None:
    """x of algorithm 1, from the start on, weighing its steps by their squared lr (Defazio et al. 2024)."""
    model = parts()
    optimizer, members = build_optimizer(model, settings_of("schedule_free")), by_kind(model)
    average = ScheduleFreeAverage(model, optimizer.optimizers[0])  # type: ignore[arg-type]
    references = {
        kind: ScheduleFreeAdamW([p.detach() for p in ps], (0.7, 0.9), 1e-3, DECAYS[kind])
        for kind, ps in members.items()
    }
    names = {id(p): name for name, p in model.named_parameters()}
    start = weights(model)
    assert all(torch.equal(weight, start[name]) for name, weight in average.weights().items()), "before any step"
    for n, lr in enumerate(LRS):
        set_gradients(model, n)
        for kind, ps in members.items():
            references[kind].step([p.grad for p in ps if p.grad is not None], lr * MULTIPLES[kind])
        optimizer.step(lr)
        found = average.weights()
        for kind, ps in members.items():
            for p, x in zip(ps, references[kind].x, strict=True):
                torch.testing.assert_close(found[names[id(p)]], x, rtol=1e-9, atol=1e-10)
    assert torch.equal(average.weights()["frozen"], model.frozen)


def test_schedule_free_at_a_rate_of_zero_changes_nothing() -> None:
    model = parts()
    optimizer, start = build_optimizer(model, settings_of("schedule_free")), weights(model)
    set_gradients(model, 0)
    optimizer.step(0.0)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_has_its_stored_moments_and_the_current_settings(name: str) -> None:
    """Stored settings give way to those that are configured when a run continues."""
    changed = ParamGroupsConfig(ParamGroupConfig(1.5, 0.01), ParamGroupConfig(0.25, 0.4), ParamGroupConfig(0.75, 0.6))
    later = settings_of(name, param_groups=changed, betas=[0.8, 0.95], eps=1e-2)
    model = parts()
    first = build_optimizer(model, settings_of(name))
    set_gradients(model, 0)
    first.step(0.01)
    stored = copy.deepcopy(first.state_dict())
    # The same moments under the new settings, set by hand.
    for group in first.groups:
        chosen = getattr(changed, group["kind"])
        group |= {"multiple": chosen.lr_scale, "weight_decay": chosen.weight_decay}
        if "betas" in group:
            group |= {"betas": (0.8, 0.95), "eps": 1e-2}
    twin = copy.deepcopy(model)
    second = build_optimizer(twin, later)
    second.load_state_dict(stored)
    for one, optimizer in ((model, first), (twin, second)):
        set_gradients(one, 1)
        optimizer.step(0.02)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_cleared_optimizer_is_a_new_one(name: str) -> None:
    model = parts()
    optimizer = build_optimizer(model, settings_of(name))
    set_gradients(model, 0)
    optimizer.step(0.01)
    optimizer.clear()
    twin = copy.deepcopy(model)
    fresh = build_optimizer(twin, settings_of(name))
    for one, each in ((model, optimizer), (twin, fresh)):
        set_gradients(one, 1)
        each.step(0.02)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("tie", ["none", "output", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_are_tables_matrices_and_vectors(family: str, tie: str) -> None:
    """Every trained parameter is in one kind: those of embeddings, and the rest by their dimensions."""
    config = varied(family, model__tie_embeddings=tie, model__position="learned")
    model = build_model(config.model, Vocabulary(40, 40, joint=True))
    model.source_embedding.weight.requires_grad_(tie != "output")
    kinds = parameters_by_kind(model)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = {kind: {trained[id(p)] for p in ps} for kind, ps in kinds.items()}
    assert sum(map(len, kinds.values())) == len(trained), "each parameter once"
    tables = {name for name in trained.values() if re.search("embedding|^output|positions?", name)}
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    assert found["embeddings"] == tables
    assert found["matrices"] == {n for n in trained.values() if n not in tables and shapes[n] >= 2}
    assert found["vectors"] == {n for n in trained.values() if n not in tables and shapes[n] < 2}


def test_the_table_of_optimizers_shows_what_each_kind_gets() -> None:
    """The count, the lr at its height, and the decay of each group, beside the name of its optimizer."""
    config = settings_of("muon", lr=0.25)
    rows = optimizer_table(build_optimizer(parts(), config), config)
    found = {(kind.strip(), text.split()[1].strip(",")): text for kind, text in rows}
    expected = {
        ("matrices", "Muon"): (24, 0.5, 0.2),
        ("embeddings", "AdamW"): (20, 0.125, 0.3),
        ("vectors", "AdamW"): (16, 0.75, 0.1),
        ("matrices", "AdamW"): (30, 0.5, 0.2),
    }
    assert found.keys() == expected.keys()
    for key, (count, lr, decay) in expected.items():
        words = found[key].replace(",", "").split()
        assert int(words[0]) == count
        assert float(words[words.index("lr") + 1]) == pytest.approx(lr, rel=0.05)
        assert float(words[words.index("decay") + 1]) == decay


def test_only_muon_and_adamw_divide_the_parameters_between_them() -> None:
    """One optimizer steps as one; two step once each."""
    expected = {"adamw": ["AdamW"], "muon": ["Muon", "AdamW"], "schedule_free": ["ScheduleFree"]}
    for name, classes in {**expected, "adafactor": ["Adafactor"]}.items():
        optimizer = build_optimizer(parts(), settings_of(name))
        assert [type(part).__name__ for part in optimizer.optimizers] == classes
    no_stacks = nn.Linear(3, 2)
    kinds = [group["kind"] for group in build_optimizer(no_stacks, settings_of("muon")).groups]
    assert kinds == ["matrices", "vectors"]


# ------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("schedule", ["constant", "plateau", "inverse_sqrt", "linear", "cosine", "stable"])
@settings(max_examples=25, deadline=None, derandomize=True)
@over(data=st.data())
def test_every_schedule_is_its_formula_at_every_update(schedule: str, data: st.DataObject) -> None:
    """From the first update to two beyond the last, with any warm-up, cooldown and number of halvings."""
    updates = data.draw(st.integers(1, 40), label="updates")
    warmup = data.draw(st.sampled_from([0, 1, 2, 7, updates - 1, updates, updates + 3]), label="warmup")
    cooldown = data.draw(st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.999]), label="cooldown")
    halved = data.draw(st.integers(0, 4), label="halved")
    config = settings_of("adamw", schedule=schedule, lr=0.3, warmup=warmup, cooldown=cooldown)
    found = [lr_at(n, config, updates, halved) for n in range(1, updates + 3)]
    expected = [reference_lr_at(schedule, n, 0.3, warmup, updates, cooldown, halved) for n in range(1, updates + 3)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_schedules_meet_their_first_and_last_values() -> None:
    """The peak at the last update of the warm-up, one step down after it, and zero at the end of the run."""
    for schedule, after in {"linear": 1 - 1 / 16, "cosine": (1 + math.cos(math.pi / 16)) / 2, "stable": 1.0}.items():
        one = settings_of("adamw", schedule=schedule, lr=1.0, warmup=4, cooldown=0.25)
        assert [lr_at(n, one, 20) for n in (1, 4, 5)] == pytest.approx([0.25, 1.0, after])
        assert lr_at(19, one, 20) > lr_at(20, one, 20) == 0.0
    stable = settings_of("adamw", schedule="stable", lr=1.0, warmup=4, cooldown=0.25)
    assert [lr_at(n, stable, 20) for n in (15, 16, 20)] == pytest.approx([1.0, 0.8, 0.0])


def test_a_rate_follows_from_optimizer_and_width_unless_it_is_given() -> None:
    """Twice the width, half the rate; Adafactor's is relative to the tensors, whatever their size."""
    for name, at_256 in (("adamw", 1.5e-3), ("muon", 3e-3), ("schedule_free", 2.5e-3), ("adafactor", 5e-2)):
        rates = [peak_rate(name, width) for width in (128, 256, 512, 1024)]
        halvings = [1.0] * 4 if name == "adafactor" else [2, 1, 0.5, 0.25]
        assert rates == pytest.approx([at_256 * part for part in halvings], rel=0.05)
        assert all(rate == float(f"{rate:.1e}") for rate in rates), "in round numbers"
    for family in FAMILIES:
        config = varied(base_config(family), optimizer__lr="auto")
        for name in ("adamw", "muon"):
            chosen = settle_rate(varied(config, optimizer__name=name))
            assert chosen == varied(config, optimizer__name=name, optimizer__lr=peak_rate(name, config.model.width))
        given = varied(config, optimizer__lr=0.123)
        assert settle_rate(given) == given


# ------------------------------------------------------------------------------------------- averages


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))


def moved(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.5, 0.998])
def test_a_running_mean_forgets_its_first_updates_faster(decay: float) -> None:
    """m ← d m + (1 − d) w with d = min(decay, n / (n + 9)), also when it was stored and read in between."""
    torch.manual_seed(0)
    model, generator = Weights().double(), torch.Generator().manual_seed(1)
    average: Any = ExponentialMovingAverage(model, decay)  # type: ignore[arg-type]
    start = weights(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in start}
    for n in range(1, 14):
        moved(model, generator)
        if n in (4, 9):
            stored = {name: mean.clone() for name, mean in average.weights().items()}
            average = ExponentialMovingAverage(model, decay)  # type: ignore[arg-type]
            average.load(stored)
        average.update(n)
        for name, weight in weights(model).items():
            seen[name].append(weight)
            expected = running_mean(seen[name], start[name], decay)
            torch.testing.assert_close(average.weights()[name], expected, rtol=1e-12, atol=1e-12)


def test_a_loaded_mean_is_a_copy_and_never_the_live_weights() -> None:
    torch.manual_seed(0)
    model, generator = Weights(), torch.Generator().manual_seed(1)
    average, live = ExponentialMovingAverage(model, 0.5), weights(model)  # type: ignore[arg-type]
    average.load(live)
    before = {name: mean.clone() for name, mean in average.weights().items()}
    moved(model, generator)
    live["first"].zero_()
    assert all(torch.equal(mean, before[name]) for name, mean in average.weights().items())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_mean_of_checkpoints_gives_each_the_same_weight(count: int, tmp_path: Path) -> None:
    """The live weights and every file, each once, and the live weights stay as they are (Vaswani et al. 2017, §6.1)."""
    torch.manual_seed(0)
    model, generator = Weights(), torch.Generator().manual_seed(1)
    files = [tmp_path / f"{i}.safetensors" for i in range(count)]
    seen = []
    for file in files:
        save_file(weights(model), file)
        seen.append(weights(model))
        moved(model, generator)
    live = weights(model)
    average = CheckpointAverage(model, lambda: files)  # type: ignore[arg-type]
    average.update(1)
    for _ in range(2):
        for name, mean in average.weights().items():
            expected = torch.stack([each[name].double() for each in [*seen, live]]).mean(0)
            torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())


def test_the_average_is_the_configured_one() -> None:
    """An optimizer that averages needs no other average; decay and files come from the config and the run."""
    model = tiny_model("transformer")
    files = [Path("a"), Path("b")]
    found = {}
    for kind in ("none", "ema", "last"):
        config = varied("transformer", training__average=kind, training__ema_decay=0.25)
        found[kind] = build_average(config, model, build_optimizer(model, config.optimizer), lambda: files)
    assert found["none"] is None
    assert isinstance(found["ema"], ExponentialMovingAverage) and found["ema"].decay == 0.25
    assert isinstance(found["last"], CheckpointAverage) and found["last"].recent_weights() == files
    config = varied("transformer", optimizer__name="schedule_free")
    optimizer = build_optimizer(model, config.optimizer)
    average = build_average(config, model, optimizer, list)
    assert isinstance(average, ScheduleFreeAverage) and isinstance(optimizer.optimizers[0], ScheduleFree)


# -------------------------------------------------------------------------------------- working copy


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_several_batches_are_summed_in_float32(family: str) -> None:
    """Each batch's gradient is rounded to bfloat16 once, and their sum not at all."""
    master = tiny_model(family)
    working = WorkingCopy(master, torch.bfloat16)
    expected = {name: torch.zeros_like(p) for name, p in master.named_parameters()}
    for seed in range(3):
        alone = copy.deepcopy(working.model)
        loss_sum(alone, tiny_batch(seed=seed), 0.1).backward()
        for name, p in alone.named_parameters():
            assert p.grad is not None and p.grad.dtype == torch.bfloat16
            expected[name] += p.grad.float()
        loss_sum(working.model, tiny_batch(seed=seed), 0.1).backward()
        working.transfer_gradients()
        assert all(p.grad is None for p in working.model.parameters()), "each gradient is handed over once"
    for name, p in master.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_other_weights_are_held_only_temporarily(precision: torch.dtype, fails: bool) -> None:
    """The model computes with them, rounded to its precision, and has its own again afterwards, even after an error."""
    master = tiny_model("lstm", "model.tie_embeddings=all")
    working = WorkingCopy(master, precision)
    own, own_master = weights(working.model), weights(master)
    other = {name: p + 1 for name, p in own_master.items()}
    try:
        with working.with_weights(other) as model:
            assert model is working.model
            for name, p in model.named_parameters():
                assert torch.equal(p, other[name].to(precision)), name
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(p, own[name]) for name, p in working.model.named_parameters())
    assert all(torch.equal(p, own_master[name]) for name, p in master.named_parameters())
    with working.with_weights(None) as model:
        assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())


@settings(max_examples=40, deadline=None, derandomize=True)
@over(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 1e-3, 0.5, 30.0]),
    highest=st.sampled_from([0.0, 0.1, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_clipping_is_the_papers(sizes: list[int], scale: float, highest: float, seed: int) -> None:
    """Only a norm over the limit is scaled, to the limit, and the norm before is what is reported."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [scale * torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in sizes]
    expected, before = clipped(gradients, highest)
    given = [g.clone() for g in gradients]
    norm = clip_gradients(given, highest)
    assert float(norm) == pytest.approx(before, rel=1e-12)
    for ours, theirs, original in zip(given, expected, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
        if not highest or before < highest:
            assert torch.equal(ours, original), "what is within the limit is not touched"


# ----------------------------------------------------------------------------- updates of a whole run


def reference_update(model: nn.Module, batches: list[Any], tokens: int, smoothing: float) -> tuple[float, list[Tensor]]:
    """The loss per token of all batches together, and its gradient, in float64."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logits_MV = model.logits(model(batch))  # type: ignore[operator]
        targets_M = batch.target_out_BT[batch.target_mask_BT]
        loss = nn.functional.cross_entropy(logits_MV, targets_M, reduction="sum", label_smoothing=smoothing)
        loss.backward()
        total += float(loss)
    return total / tokens, [p.grad.double() / tokens for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("clip_at", "schedule"), [(0.0, "cosine"), (0.02, "inverse_sqrt")])
@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_those_of_a_plain_loop(family: str, schedule: str, clip_at: float, tmp_path: Path) -> None:
    """Sum the batches' losses, divide by all target tokens, clip, and step at this update's lr; then average.

    A large epsilon keeps AdamW from hiding the size of gradients.
    """
    config = varied(
        family,
        optimizer__clip_norm=clip_at,
        optimizer__eps=1.0,
        optimizer__schedule=schedule,
        optimizer__lr=0.5,
        optimizer__param_groups=KINDS,
        training__update_tokens=40,
        training__average="ema",
        training__ema_decay=0.3,
        training__updates=9,
        training__label_smoothing=0.2,
    )
    made = make_trainer(config, tmp_path)
    made.state.model.double()
    made.state.optimizer = build_optimizer(made.state.model, config.optimizer)
    made.state.average = build_average(config, made.state.model, made.state.optimizer, list)
    model = copy.deepcopy(made.state.model)
    kinds = {id(p): kind for kind, ps in parameters_by_kind(model).items() for p in ps}
    references = [
        AdamW([p], tuple(config.optimizer.betas), 1.0, DECAYS[kinds[id(p)]])  # type: ignore[arg-type]
        for p in model.parameters()
    ]
    start, tokens = weights(model), 0
    seen: dict[str, list[Tensor]] = {name: [] for name in start}
    for n, rank_batches in enumerate(itertools.islice(iter(made.state.batches), 5), 1):
        loss, gradients = reference_update(model, rank_batches.micro_batches, rank_batches.target_tokens, 0.2)
        cut, norm = clipped(gradients, clip_at)
        lr = reference_lr_at(schedule, n, 0.5, 3, 9)
        stats = made.update(rank_batches)
        assert stats.loss == pytest.approx(loss, rel=1e-5) and not stats.skipped
        assert stats.gradient_norm == pytest.approx(norm, rel=1e-4), "the norm before clipping"
        for p, reference, g in zip(model.parameters(), references, cut, strict=True):
            reference.step([g], lr * MULTIPLES[kinds[id(p)]])
            p.data.copy_(reference.x[0])
        tokens += rank_batches.target_tokens
        assert (made.state.progress.update, made.state.progress.target_tokens) == (n, tokens)
        assert made.lr() == pytest.approx(lr, rel=1e-12, abs=1e-15)
        assert made.state.average is not None
        for name, p in model.named_parameters():
            message = f"{name} after update {n}"
            ours = dict(made.state.model.named_parameters())[name]
            torch.testing.assert_close(ours, p, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, message))
            seen[name].append(p.detach().clone())
            expected = running_mean(seen[name], start[name], 0.3)
            torch.testing.assert_close(made.state.average.weights()[name], expected, rtol=1e-5, atol=1e-5)
    assert max(len(s.micro_batches) for s in itertools.islice(iter(made.state.batches), 3)) > 1, (
        "updates of several batches"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_in_bfloat16_steps_the_master_and_rounds_it_once(family: str, tmp_path: Path) -> None:
    """The master moves by the float32 sum of its copy's gradients; the copy is the rounded master after each update."""
    config = varied(family, training__update_tokens=60, optimizer__eps=1.0, optimizer__clip_norm=0.0)
    made = make_trainer(config, tmp_path, precision=torch.bfloat16)
    for rank_batches in itertools.islice(iter(made.state.batches), 3):
        master, working = copy.deepcopy(made.state.model), copy.deepcopy(made.working.model).train()
        sums = [torch.zeros_like(p) for p in master.parameters()]
        loss = 0.0
        for batch in rank_batches.micro_batches:
            working.zero_grad()
            one = loss_sum(working, batch, config.training.label_smoothing)
            one.backward()
            loss += float(one)
            for total, p in zip(sums, working.parameters(), strict=True):
                assert p.grad is not None
                total += p.grad.float()
        stats = made.update(rank_batches)
        assert stats.loss == pytest.approx(loss / rank_batches.target_tokens, rel=1e-6)
        assert stats.gradient_norm == pytest.approx(clipped(sums, 0.0)[1] / rank_batches.target_tokens, rel=1e-5)
        for p, total in zip(made.state.model.parameters(), sums, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, total / rank_batches.target_tokens, rtol=1e-6, atol=1e-9)
        for p, q in zip(made.state.model.parameters(), made.working.model.parameters(), strict=True):
            assert torch.equal(p.bfloat16(), q)
        assert any(
            not torch.equal(p, q) for p, q in zip(made.state.model.parameters(), master.parameters(), strict=True)
        )


def test_the_divisor_is_the_target_tokens_of_all_processes(tmp_path: Path) -> None:
    """The number of tokens in the whole update is given; it may exceed that of the process's own batches."""
    batch = tiny_batch()
    norms = []
    for factor in (1, 4):
        made = make_trainer(varied("transformer", optimizer__clip_norm=0.0), tmp_path)
        stats = made.update(rank_batches_of(batch, target_tokens=factor * batch.target_tokens))
        norms.append((stats.loss, stats.gradient_norm))
        assert made.state.progress.target_tokens == factor * batch.target_tokens
    assert norms[0] == pytest.approx([4 * x for x in norms[1]], rel=1e-5)
