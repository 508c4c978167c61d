"""Laws of the loss, the updates, and of a run that stops and continues."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from seq2seq.cli.main import load_config
from seq2seq.config.schema import OptimizerConfig, TrainConfig, settled
from seq2seq.data.batching import Batches, RankBatches, largest_batch
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import Batch
from seq2seq.data.tokenizer import Tokenizer, Vocabulary, train_tokenizer
from seq2seq.inference import checkpoint as checkpoint_module
from seq2seq.inference.checkpoint import load_checkpoint
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from seq2seq.model.layers import drop_rows
from seq2seq.training import checkpoint as saving_module
from seq2seq.training import loss as loss_module
from seq2seq.training import memory_check as memory_check_module
from seq2seq.training.averaging import build_average
from seq2seq.training.checkpoint import Checkpoints, Progress, RunState
from seq2seq.training.logger import RunLogger
from seq2seq.training.loss import SmoothedCrossEntropy, divergence, loss_sum, training_loss
from seq2seq.training.memory_check import check_memory, try_batch
from seq2seq.training.meter import UpdateStats
from seq2seq.training.mixed_precision import WorkingCopy
from seq2seq.training.optimizers import build_optimizer, clip_gradients
from seq2seq.training.schedule import lr_at
from seq2seq.training.trainer import Trainer
from seq2seq.training.validation import Validation
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from tests.helpers.configs import FAMILIES, tiny_config
from tests.helpers.corpora import random_corpus, tiny_batch
from tests.helpers.models import tiny_model

LENGTHS = [3, 5, 2, 7, 4, 6, 1, 8]


def small_tokenizer() -> Tokenizer:
    words = Corpus(["the old dog sees a red bird"] * 4, ["der alte Hund sieht einen roten Vogel"] * 4)
    return train_tokenizer(words, load_config("train", "tokenizer=bpe", "tokenizer.vocabulary=40").tokenizer)[0]


TOKENIZER = small_tokenizer()


def run_state(config: TrainConfig) -> RunState:
    torch.manual_seed(config.seed)
    model = build_model(config.model, TOKENIZER.vocabulary)
    training = config.training
    batches = Batches(random_corpus(LENGTHS * 5), training.budget, config.seed, update_tokens=training.update_tokens)
    return RunState(config, TOKENIZER, model, build_optimizer(model, config.optimizer), batches, Progress())


def trainer(
    config: TrainConfig, folder: Path, scores: list[float] | None = None, precision: Any = torch.float32
) -> Trainer:
    given = iter(scores or [])

    def validate(model: torch.nn.Module) -> Validation:
        return Validation({"loss": 1.0, "bleu": next(given, 0.0), "chrf": 0.0}, [])

    checkpoints = Checkpoints(Run(folder), config.training.recent)
    state = run_state(config)
    state.average = build_average(config, state.model, state.optimizer, checkpoints.recent_weights)
    return Trainer(state, precision, validate, checkpoints, RunLogger())


def one_update(made: Trainer) -> UpdateStats:
    return made.update(next(iter(made.state.batches)))


def rank_batches_of(*batches: Batch) -> RankBatches:
    return RankBatches(list(batches), sum(batch.target_tokens for batch in batches))


def weights(state: RunState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ---------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [40, 200, 10**6])
def test_loss_and_gradient_are_torchs_cross_entropy(
    family: str, smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", {"cpu": chunk})
    model, batch = tiny_model(family), tiny_batch()
    ours = loss_sum(model, batch, smoothing)
    (3 * ours).backward()
    our_gradients = gradients(model)
    model.zero_grad()
    logits, targets = model.logits(model(batch)), batch.target_out_BT[batch.target_mask_BT]
    plain = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (3 * plain).backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(our_gradients, gradients(model), rtol=1e-4, atol=1e-5)


def test_loss_in_bfloat16_is_the_loss_in_float32() -> None:
    """Rounded at each word, right in the mean; and where the right word is all but impossible, still a number."""
    torch.manual_seed(0)
    features, weight, targets = torch.randn(2000, 32), torch.randn(500, 32), torch.randint(500, (2000,))
    exact, rounded = (
        SmoothedCrossEntropy.apply(features.to(dtype), weight.to(dtype), targets, 0.1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=0.0)
    assert SmoothedCrossEntropy.apply(1000 * features, weight, targets, 0.1).isfinite()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_one_batch_of_eight_is_four_batches_of_two(family: str, precision: torch.dtype, tmp_path: Path) -> None:
    """The same gradient, and so the same weights, however an update is cut into batches."""
    corpus = random_corpus(LENGTHS)
    after: list[list[Any]] = []
    for size in (8, 2, 1):
        made = trainer(tiny_config(family, "optimizer.warmup=0"), tmp_path / str(size), precision=precision)
        rows = torch.arange(8).split(size)
        stats = made.update(rank_batches_of(*(corpus.batch(r.numpy()) for r in rows)))
        after.append([stats.loss, stats.gradient_norm])
        if precision == torch.float32:  # in bfloat16 the first step of Adam turns on the sign of rounding errors
            after[-1] += weights(made.state).values()
    rtol, atol = (1e-4, 1e-6) if precision == torch.float32 else (0.01, 0.0)
    torch.testing.assert_close(after[0], after[1], rtol=rtol, atol=atol)
    torch.testing.assert_close(after[0], after[2], rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_has_no_gradient(family: str) -> None:
    """A padded batch has the gradient of its sentences, each in a batch of its own."""
    corpus, seen = random_corpus([2, 7]), []
    for batches in ([[0, 1]], [[0], [1]]):
        model = tiny_model(family)
        for rows in batches:
            loss_sum(model, corpus.batch(torch.tensor(rows).numpy()), 0.1).backward()
        seen.append(gradients(model))
    assert not corpus.batch(torch.tensor([0, 1]).numpy()).source_mask_BS.all(), "there is padding"
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- updates


def scheduled(schedule: str, rate: float, warmup: int) -> OptimizerConfig:
    settings = [f"optimizer.schedule={schedule}", f"optimizer.lr={rate}", f"optimizer.warmup={warmup}"]
    return tiny_config("transformer", *settings).optimizer


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "linear", "stable", "constant", "plateau"])
def test_the_rate_rises_to_its_height_and_never_above(schedule: str) -> None:
    config = scheduled(schedule, 1e-3, 10)
    rates = [lr_at(update, config, 100) for update in range(1, 101)]
    assert rates[9] == max(rates) == 1e-3
    assert rates[:10] == pytest.approx([1e-4 * n for n in range(1, 11)])
    assert all(a >= b >= 0 for a, b in itertools.pairwise(rates[9:]))
    assert lr_at(1, dataclasses.replace(config, warmup=0), 100) > 0


def test_inverse_square_root_is_the_papers() -> None:
    """d^-0.5 · min(step^-0.5, step · warmup^-1.5), up to its constant (Vaswani et al. 2017, §5.3)."""
    config = scheduled("inverse_sqrt", 2e-3, 40)
    for step in (1, 7, 40, 41, 400):
        paper = min(step**-0.5, step * 40**-1.5) / 40**-0.5
        assert lr_at(step, config, 400) == pytest.approx(2e-3 * paper)


def test_clipping_bounds_the_norm_and_keeps_the_direction() -> None:
    torch.manual_seed(0)
    given = [torch.randn(5, 3), torch.randn(7)]
    clipped = [g.clone() for g in given]
    norm = clip_gradients(clipped, 1.0)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in given)), rel=1e-5)
    torch.testing.assert_close(clipped, [g / norm for g in given])
    assert clip_gradients(clipped, 0.0) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("score", ["scaled_dot", "cosine", "additive", "general"])
def test_weight_decay_applies_to_matrices_only(score: str) -> None:
    model = tiny_model("transformer", f"model.attention.score={score}")
    for name in ("adamw", "muon", "schedule_free", "adafactor"):
        groups = build_optimizer(model, tiny_config("transformer", f"optimizer={name}").optimizer).groups
        for group in groups:
            vectors = group["kind"] == "vectors"
            assert all((p.dim() == 1) == vectors for p in group["params"])
            assert (group["weight_decay"] == 0) == vectors
        members = [id(p) for group in groups for p in group["params"]]
        assert sorted(members) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_working_copy_follows_its_master(family: str) -> None:
    master = tiny_model(family)
    working = WorkingCopy(master, torch.bfloat16)
    loss_sum(working.model, tiny_batch(), 0.1).backward()
    working.transfer_gradients()
    with torch.no_grad():
        for p in master.parameters():
            assert p.grad is not None and p.grad.dtype == torch.float32
            p.add_(p.grad, alpha=-0.1)
    working.sync_weights()
    for p, q in zip(master.parameters(), working.model.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p.bfloat16(), q)
    assert WorkingCopy(master, torch.float32).model is master


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_float32(family: str, tmp_path: Path) -> None:
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        made = trainer(
            tiny_config(family, "optimizer.warmup=4", "training.tokens=60"),
            tmp_path / str(precision),
            precision=precision,
        )
        batches = iter(made.state.batches)
        losses.append([made.update(next(batches)).loss for _ in range(20)])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free", "adafactor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_optimizer_learns_and_continues_with_the_same_bits(name: str, family: str, tmp_path: Path) -> None:
    settings = [f"optimizer={name}", "optimizer.warmup=3", "optimizer.schedule=constant", "training.tokens=200"]
    settings += ["model.dropout=0.1", "training.validate_every=10"]
    whole = trainer(tiny_config(family, *settings, "training.updates=20"), tmp_path / "whole")
    batches = iter(whole.state.batches)
    losses = [whole.update(next(batches)).loss for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5])
    first = trainer(tiny_config(family, *settings, "training.updates=10"), tmp_path / "cut")
    first.fit()
    second = trainer(tiny_config(family, *settings, "training.updates=20"), tmp_path / "cut")
    second.state.read(second.checkpoints.run.checkpoint("last"))
    trainer_from(second, torch.float32).fit()
    for key, tensor in weights(whole.state).items():
        assert torch.equal(tensor, second.state.model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free", "adafactor"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_memory_check_leaves_no_trace(name: str, precision: torch.dtype, tmp_path: Path) -> None:
    after = []
    for tried in (False, True):
        made = trainer(
            tiny_config("lstm", f"optimizer={name}", "optimizer.schedule=constant", "model.dropout=0.3"), tmp_path
        )
        made = trainer_from(made, precision)
        if tried:
            try_batch(made, largest_batch(made.state.batches.encoded, 64))
        for _ in range(3):
            one_update(made)
        after.append(weights(made.state))
    assert all(torch.equal(tensor, after[1][key]) for key, tensor in after[0].items())


def test_a_budget_that_does_not_fit_is_named_with_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(["the old dog"], ["der alte Hund"])

    def crowded(made: Trainer, batch: Batch) -> None:
        if batch.target_out_BT.numel() > 700:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")

    monkeypatch.setattr(memory_check_module, "try_batch", crowded)
    with pytest.raises(UserError, match=r"2,048 does not fit into memory, but 512 does; set training\.tokens=512"):
        check_memory(trainer(tiny_config("transformer", "training.tokens=2048"), tmp_path), corpus)
    made = trainer(tiny_config("transformer", "training.tokens=512"), tmp_path)
    made.state.config = tiny_config("transformer", "training.tokens=auto")
    check = check_memory(made, corpus)
    assert check.tokens == 512 and "training.tokens=512" in check.summary


def test_non_finite_numbers_skip_the_update_and_then_end_the_run(tmp_path: Path) -> None:
    made = trainer(tiny_config("transformer"), tmp_path)
    healthy = weights(made.state)
    sick = made.state.model.get_parameter("decoder.layers.1.feed_forward.inner.weight")
    with torch.no_grad():
        sick[0, 0] = math.inf
    for count in range(1, 5):
        stats = one_update(made)
        assert stats.skipped and made.state.progress.skipped_in_a_row == count
    with torch.no_grad():
        sick[0, 0] = healthy["decoder.layers.1.feed_forward.inner.weight"][0, 0]
    assert all(torch.equal(tensor, healthy[name]) for name, tensor in weights(made.state).items())
    assert not one_update(made).skipped and made.state.progress.skipped_in_a_row == 0
    with torch.no_grad():
        sick[0, 0] = math.nan
    with pytest.raises(UserError) as error:
        for _ in range(5):
            one_update(made)
    text = "\n".join(error.value.problems)
    assert "decoder.layers.1.feed_forward.inner" in text
    found = re.search(r"pairs, numbers ([\d,]+).*\npair \1: (.*) → (.*)\n", text)
    assert found
    pair, corpus = int(found[1].rstrip(",").replace(",", "")) - 1, made.state.batches.encoded
    tokenizer = made.state.tokenizer
    assert found[2] == " ".join(tokenizer.decode_source(corpus.source[pair].tolist()).split())[:100]
    assert found[3] == " ".join(tokenizer.decode(corpus.target[pair].tolist()).split())[:100]
    assert made.state.progress.skipped == 9 and made.state.progress.update == 10


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_parts_of_processes_make_the_whole_update(world: int) -> None:
    """Every process knows the target tokens of all, and their batches together are those of one process alone."""
    parts = []
    for rank in range(world):
        batches = Batches(random_corpus(LENGTHS * 9), 40, 3, update_tokens=90, rank=rank, world_size=world)
        parts.append(list(islice(batches, 6)))
    alone = iter(Batches(random_corpus(LENGTHS * 9), 40, seed=3))
    for update in zip(*parts, strict=True):
        own = [batch for rank_batches in update for batch in rank_batches.micro_batches]
        assert {rank_batches.target_tokens for rank_batches in update} == {sum(batch.target_tokens for batch in own)}
        assert update[0].target_tokens >= 90
        expected = [batch for _ in own for batch in next(alone).micro_batches]
        assert sorted(tuple(b.index_B.tolist()) for b in own) == sorted(tuple(b.index_B.tolist()) for b in expected)


# -------------------------------------------------------------------------------------- regularisers


def losses_of(model: Seq2Seq, *overrides: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    settings = tiny_config("transformer", *overrides).training
    model.zero_grad()
    torch.manual_seed(5)
    objective, plain = training_loss(model.train(), tiny_batch(), settings)
    objective.backward()
    return objective.detach() - 0 * plain, gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [["training.r_drop=5"], ["training.simcut=3", "training.simcut_cutoff=0"]])
def test_two_equal_passes_cost_as_much_as_one(family: str, method: list[str]) -> None:
    """R-Drop without dropout, and SimCut that cuts nothing, are the plain loss."""
    model = tiny_model(family)
    torch.testing.assert_close(losses_of(model, *method), losses_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [40, 10**6])
def test_the_divergence_is_torchs_with_gradients_into_both_passes(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", {"cpu": chunk})
    torch.manual_seed(0)
    p, q, table = (torch.randn(n, 8, requires_grad=True) for n in (30, 30, 40))
    ours = divergence(p, q, table)
    theirs = F.kl_div((q @ table.T).log_softmax(-1), (p @ table.T).log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(ours, theirs)
    wanted = torch.autograd.grad(theirs, (p, q, table))
    torch.testing.assert_close(torch.autograd.grad(ours, (p, q, table)), wanted, rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["training.r_drop=5", "training.simcut=3"])
def test_two_different_passes_change_the_loss(family: str, method: str) -> None:
    model = tiny_model(family, "model.dropout=0.3", "model.word_dropout=0.1")
    plain, regularised = losses_of(model), losses_of(model, method, "training.simcut_cutoff=0.4")
    assert regularised[0] != plain[0] and regularised[0].isfinite()


def test_dropped_rows_are_whole_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    x = torch.rand(400, 50, 3) + 1
    for words in (True, False):
        dropped = drop_rows(x, 0.25, True, words=words)
        kept = (dropped != 0).all(-1)
        assert torch.equal(kept, (dropped != 0).any(-1)), "a word goes as a whole"
        if not words:
            assert torch.equal(kept.all(1), kept.any(1)), "a sentence goes as a whole"
        torch.testing.assert_close(dropped[kept], x[kept] / 0.75)
        assert kept.float().mean() == pytest.approx(0.75, abs=0.08)
    assert drop_rows(x, 0.25, False, words=True) is x


def test_a_running_mean_without_memory_is_the_live_model(tmp_path: Path) -> None:
    made = trainer(tiny_config("lstm", "training.average=ema", "training.ema_decay=0"), tmp_path)
    for _ in range(3):
        one_update(made)
    assert made.state.average is not None
    live = dict(made.state.model.named_parameters())
    for name, mean in made.state.average.weights().items():
        torch.testing.assert_close(mean, live[name].detach())


def test_a_running_mean_is_its_definition(tmp_path: Path) -> None:
    made = trainer(tiny_config("lstm", "training.average=ema", "training.ema_decay=0.5"), tmp_path)
    mean = weights(made.state)
    for update in range(1, 15):
        one_update(made)
        decay = min(0.5, update / (update + 9))
        mean = {name: decay * mean[name] + (1 - decay) * weight for name, weight in weights(made.state).items()}
    assert made.state.average is not None
    for name, ours in made.state.average.weights().items():
        torch.testing.assert_close(ours, mean[name])


@pytest.mark.slow
def test_the_mean_of_the_last_checkpoints(tmp_path: Path) -> None:
    config = noisy(
        "transformer", "training.average=last", "training.average_checkpoints=3", "training.validate_every=2"
    )
    made = trainer(config, tmp_path, [1, 2, 3, 4, 5])
    seen: list[dict[str, torch.Tensor]] = []
    validate = made.validate_model
    made.validate_model = lambda model: seen.append(weights(made.state)) or validate(model)  # type: ignore[func-returns-value]
    live: list[dict[str, torch.Tensor]] = []
    save = made.checkpoints.save

    def saving(*arguments: Any) -> None:
        live.append(weights(made.state))
        save(*arguments)

    made.checkpoints.save = saving  # type: ignore[method-assign, assignment]
    made.fit()
    _, _, translating = load_checkpoint(made.checkpoints.run.checkpoint("last"))
    expected = {name: torch.stack([w[name] for w in live[-3:]]).mean(0) for name in live[-1]}
    for name, tensor in translating.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
        torch.testing.assert_close(seen[-1][name], expected[name]), "what was evaluated is what was saved"
    made.state.read(made.checkpoints.run.checkpoint("last"))
    assert all(torch.equal(tensor, live[-1][name]) for name, tensor in weights(made.state).items()), (
        "the live ones go on"
    )


def test_equal_checkpoints_average_to_themselves(tmp_path: Path) -> None:
    made = trainer(tiny_config("lstm", "training.average=last", "training.average_checkpoints=3"), tmp_path)
    for update in (1, 2):
        made.state.progress.update = update
        made.save(validated=True)
    assert made.state.average is not None and len(made.checkpoints.recent_weights()) == 2
    for name, mean in made.state.average.weights().items():
        torch.testing.assert_close(mean, weights(made.state)[name])


@pytest.mark.slow
@pytest.mark.parametrize("average", ["ema", "last"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_stopped_run_keeps_its_averages(average: str, precision: torch.dtype, tmp_path: Path) -> None:
    settings = [f"training.average={average}", "training.average_checkpoints=2"]
    whole = trainer(noisy("lstm", *settings), tmp_path / "whole", [1, 3, 2], precision)
    whole.fit()
    trainer(noisy("lstm", "training.updates=8", *settings), tmp_path / "cut", [1, 3], precision).fit()
    second = trainer(noisy("lstm", *settings), tmp_path / "cut", [2], precision)
    second.state.read(second.checkpoints.run.checkpoint("last"))
    trainer_from(second, precision).fit()
    models = [load_checkpoint(t.checkpoints.run.checkpoint("last"))[2].state_dict() for t in (whole, second)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    live = weights(whole.state)
    assert any(not torch.equal(tensor, live[name]) for name, tensor in models[0].items())


@pytest.mark.slow
def test_the_plateau_halves_the_rate(tmp_path: Path) -> None:
    settings = [
        "optimizer.schedule=plateau",
        "optimizer.plateau_patience=2",
        "optimizer.warmup=0",
        "training.updates=14",
    ]
    made = trainer(noisy("lstm", *settings, "training.validate_every=2"), tmp_path, [5, 4, 4, 3, 3, 6, 1])
    made.fit()
    assert made.state.progress.halved == 2
    assert made.lr() == pytest.approx(settled(made.state.config.optimizer.lr) / 4)


# -------------------------------------------------------------------------------------- continuation


def noisy(family: str, *overrides: str) -> TrainConfig:
    """With dropout, so that the random generators matter."""
    settings = ["training.tokens=40", "training.validate_every=4", "training.updates=10", "optimizer.warmup=3"]
    settings.append("optimizer.schedule=inverse_sqrt")  # independent of where a run ends
    return tiny_config(family, "model.dropout=0.2", "model.attention.dropout=0.1", *settings, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_run_that_stopped_ends_with_the_same_bits(family: str, precision: torch.dtype, tmp_path: Path) -> None:
    whole = trainer(noisy(family), tmp_path / "whole", [1, 3, 2], precision)
    whole.fit()
    stopped = trainer(noisy(family, "training.updates=8"), tmp_path / "stopped", [1, 3], precision)
    stopped.fit()
    torch.manual_seed(99)
    continued = trainer(noisy(family), tmp_path / "stopped", [2], precision)
    continued.state.read(Run(tmp_path / "stopped").checkpoint("last"))
    resumed = trainer_from(continued, precision)
    resumed.fit()
    for name, tensor in weights(whole.state).items():
        assert torch.equal(tensor, resumed.state.model.state_dict()[name]), name
    ours, theirs = (dataclasses.asdict(t.state.progress) for t in (whole, resumed))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert whole.checkpoints.run.index() == resumed.checkpoints.run.index()


def trainer_from(read: Trainer, precision: torch.dtype) -> Trainer:
    """A trainer made after its state was read, as the program makes it."""
    return Trainer(read.state, precision, read.validate_model, read.checkpoints, read.logger)


def test_a_new_rate_and_decay_hold_after_continuing(tmp_path: Path) -> None:
    first = trainer(noisy("transformer"), tmp_path)
    one_update(first)
    first.checkpoints.save(first.state, best=True)
    second = trainer(
        noisy(
            "transformer", "optimizer.lr=0.5", "optimizer.param_groups.matrices.weight_decay=0.25", "optimizer.warmup=0"
        ),
        tmp_path,
    )
    second.state.read(second.checkpoints.run.checkpoint("last"))
    one_update(second)
    groups = second.state.optimizer.groups
    assert {group["kind"]: group["weight_decay"] for group in groups} == {
        "embeddings": 0.01,
        "matrices": 0.25,
        "vectors": 0,
    }
    assert groups[0]["lr"] == second.lr() == pytest.approx(0.5 / math.sqrt(2))


def test_packed_recurrent_weights_are_stored(tmp_path: Path) -> None:
    """On a GPU all weights of an LSTM are views of one buffer; they must be saved and read all the same."""
    made = trainer(noisy("lstm"), tmp_path)
    for module in made.state.model.modules():
        if isinstance(module, torch.nn.LSTM):
            buffer = torch.cat([p.detach().flatten() for p in module.parameters()])
            for p, part in zip(
                module.parameters(), buffer.split([p.numel() for p in module.parameters()]), strict=True
            ):
                p.data = part.view_as(p)
    before = weights(made.state)
    made.checkpoints.save(made.state, best=True)
    made.state.read(made.checkpoints.run.checkpoint("last"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made.state).items())


def test_a_lost_index_is_no_lost_run(tmp_path: Path) -> None:
    made = trainer(noisy("transformer"), tmp_path)
    made.checkpoints.save(made.state, best=True)
    (made.checkpoints.folder / "index.json").unlink()
    assert made.checkpoints.run.exists and made.checkpoints.run.checkpoint("best").name == "update-0000000"


def test_a_validation_is_logged_before_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed in between logs it again; saved first, it would never appear in the metrics."""
    made, order = trainer(noisy("lstm"), tmp_path, [1]), []
    monkeypatch.setattr(made.logger, "validation", lambda *_: order.append("logged"))
    monkeypatch.setattr(made.checkpoints, "save", lambda *_: order.append("saved"))
    made.validate()
    assert order == ["logged", "saved"]


@pytest.mark.slow
def test_patience_ends_a_run_and_the_best_checkpoint_stays(tmp_path: Path) -> None:
    config = noisy("transformer", "training.updates=100", "training.validate_every=2", "training.patience=2")
    made = trainer(config, tmp_path, [5, 7, 6, 7, 9])
    made.fit()
    assert made.state.progress.update == 8
    assert made.checkpoints.run.index() == {"last": "update-0000008", "best": "update-0000004"}
    kept = sorted(p.name for p in made.checkpoints.folder.iterdir())
    assert kept == ["index.json", "update-0000004", "update-0000008"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_complete(family: str, tmp_path: Path) -> None:
    made = trainer(noisy(family), tmp_path)
    made.checkpoints.save(made.state, best=True)
    config, tokenizer, model = load_checkpoint(made.checkpoints.run.checkpoint("best"))
    assert config == made.state.config and tokenizer.models == TOKENIZER.models
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, made.state.model.state_dict()[name])


def test_a_save_that_fails_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(noisy("transformer"), tmp_path)
    made.checkpoints.save(made.state, best=True)
    before = weights(made.state)
    made.state.progress.update = 4

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module, function in ((checkpoint_module, "save_file"), (saving_module, "fsync_file")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full)
            with pytest.raises(UserError, match=r"No space left.*update-0000000"):
                made.checkpoints.save(made.state, best=True)
        assert made.checkpoints.run.index() == {"last": "update-0000000", "best": "update-0000000"}
        _, _, model = load_checkpoint(made.checkpoints.run.checkpoint("last"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    made.checkpoints.save(made.state, best=False)
    assert made.checkpoints.run.checkpoint("last").name == "update-0000004"


def test_an_old_checkpoint_that_cannot_be_deleted_waits_for_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is complete, so that training goes on."""
    made = trainer(noisy("transformer"), tmp_path)
    made.checkpoints.save(made.state)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", refused)
        patch.setattr("os.rmdir", refused)
        made.state.progress.update = 2
        made.checkpoints.save(made.state)
    assert made.checkpoints.run.index() == {"last": "update-0000002"}
    assert (made.checkpoints.folder / "update-0000000").is_dir()
    made.state.progress.update = 4
    made.checkpoints.save(made.state)
    assert sorted(path.name for path in made.checkpoints.folder.iterdir()) == ["index.json", "update-0000004"]


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "config.yaml", "tokenizer.source.model"])
def test_a_checkpoint_cut_in_half_is_named(file: str, tmp_path: Path) -> None:
    made = trainer(noisy("transformer"), tmp_path)
    made.checkpoints.save(made.state, best=True)
    folder = made.checkpoints.run.checkpoint("best")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=str(folder)):
        made.state.read(folder)
        load_checkpoint(folder)


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    """A pickle that would call a function is refused, not run."""
    made = trainer(noisy("transformer"), tmp_path)
    made.checkpoints.save(made.state, best=True)
    folder, planted = made.checkpoints.run.checkpoint("best"), tmp_path / "planted"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (planted,))

    torch.save(Evil(), folder / "training.pt")
    with pytest.raises(UserError, match=r"training\.pt"):
        made.state.read(folder)
    assert not planted.exists()


def test_a_model_is_rebuilt_from_its_checkpoint_alone(tmp_path: Path) -> None:
    config = noisy("lstm", "model.convolutions=1", "model.decoder_init=pooled", "model.attention.score=general")
    made = trainer(config, tmp_path)
    made.checkpoints.save(made.state, best=True)
    assert load_checkpoint(made.checkpoints.run.checkpoint("last"))[0].model == config.model
    assert Vocabulary(len(TOKENIZER.source), len(TOKENIZER.target), True) == TOKENIZER.vocabulary
