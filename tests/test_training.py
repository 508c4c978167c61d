"""Laws of the loss, the updates, and of a run that stops and goes on."""

from __future__ import annotations

import dataclasses
import itertools
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, random_corpus, tiny_batch, tiny_config, tiny_model
from torch.nn import functional as F

from seq2seq.cli import load_config
from seq2seq.config import OptimizerConfig, TrainConfig
from seq2seq.errors import UserError
from seq2seq.model.seq2seq import build_model
from seq2seq.run import Run
from seq2seq.text.batches import Batches
from seq2seq.text.corpus import Corpus
from seq2seq.text.tokenizer import Tokenizer, Vocabulary, train_tokenizer
from seq2seq.training import checkpoint as checkpoint_module
from seq2seq.training import loss as loss_module
from seq2seq.training.checkpoint import Checkpoints, Progress, RunState, load_checkpoint
from seq2seq.training.logbook import Logbook
from seq2seq.training.loss import loss_sum
from seq2seq.training.optimizer import WorkingCopy, build_optimizer, clip
from seq2seq.training.schedule import rate_at
from seq2seq.training.trainer import Trainer, Validation

LENGTHS = [3, 5, 2, 7, 4, 6, 1, 8]


def small_tokenizer() -> Tokenizer:
    words = Corpus(["the old dog sees a red bird"] * 4, ["der alte Hund sieht einen roten Vogel"] * 4)
    return train_tokenizer(words, load_config("train", "tokenizer=bpe", "tokenizer.vocabulary=40").tokenizer)[0]


TOKENIZER = small_tokenizer()


def run_state(config: TrainConfig) -> RunState:
    torch.manual_seed(config.seed)
    model = build_model(config.model, TOKENIZER.vocabulary)
    batches = Batches(random_corpus(LENGTHS * 5), config.training.tokens, config.seed)
    return RunState(config, TOKENIZER, model, build_optimizer(model, config.optimizer), batches, Progress())


def trainer(
    config: TrainConfig, folder: Path, scores: list[float] | None = None, precision: Any = torch.float32
) -> Trainer:
    given = iter(scores or [])

    def validate(model: torch.nn.Module) -> Validation:
        return Validation({"loss": 1.0, "bleu": next(given, 0.0), "chrf": 0.0}, [])

    run = Run(folder)
    return Trainer(run_state(config), precision, validate, Checkpoints(run), Logbook())


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
    logits = model.logits(model(batch)).transpose(1, 2)
    plain = F.cross_entropy(logits, batch.target_out_BT, ignore_index=0, reduction="sum", label_smoothing=smoothing)
    (3 * plain).backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(our_gradients, gradients(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_one_batch_of_eight_is_four_batches_of_two(family: str, precision: torch.dtype, tmp_path: Path) -> None:
    """The same gradient, and so the same weights, however an update is cut into batches."""
    corpus = random_corpus(LENGTHS)
    after = []
    for size in (8, 2, 1):
        made = trainer(tiny_config(family, "optimizer.warmup=0"), tmp_path / str(size), precision=precision)
        rows = torch.arange(8).split(size)
        stats = made.update(iter([corpus.batch(r.numpy()) for r in rows]))
        after.append([stats.loss, stats.gradient_norm])
        if precision == torch.float32:  # in bfloat16 the first step of Adam turns on the sign of rounding errors
            after[-1] += weights(made.state).values()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if precision == torch.float32 else {"rtol": 0.01, "atol": 0.0}
    torch.testing.assert_close(after[0], after[1], **tolerance)
    torch.testing.assert_close(after[0], after[2], **tolerance)


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


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "linear", "constant"])
def test_the_rate_rises_to_its_height_and_never_above(schedule: str) -> None:
    config = OptimizerConfig(1e-3, schedule, 10, [0.9, 0.98], 1e-9, 0.0, 1.0)  # type: ignore[arg-type]
    rates = [rate_at(update, config, 100) for update in range(1, 101)]
    assert rates[9] == max(rates) == 1e-3
    assert rates[:10] == pytest.approx([1e-4 * n for n in range(1, 11)])
    assert all(a >= b >= 0 for a, b in itertools.pairwise(rates[9:]))
    assert rate_at(1, dataclasses.replace(config, warmup=0), 100) > 0


def test_inverse_square_root_is_the_papers() -> None:
    """d^-0.5 · min(step^-0.5, step · warmup^-1.5), up to its constant (Vaswani et al. 2017, §5.3)."""
    config = OptimizerConfig(2e-3, "inverse_sqrt", 40, [0.9, 0.98], 1e-9, 0.0, 1.0)
    for step in (1, 7, 40, 41, 400):
        paper = min(step**-0.5, step * 40**-1.5) / 40**-0.5
        assert rate_at(step, config, 400) == pytest.approx(2e-3 * paper)


def test_clipping_bounds_the_norm_and_keeps_the_direction() -> None:
    torch.manual_seed(0)
    given = [torch.randn(5, 3), torch.randn(7)]
    clipped = [g.clone() for g in given]
    norm = clip(clipped, 1.0)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in given)), rel=1e-5)
    torch.testing.assert_close(clipped, [g / norm for g in given])
    assert clip(clipped, 0.0) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("score", ["scaled_dot", "cosine", "additive", "general"])
def test_decay_pulls_on_matrices_only(score: str) -> None:
    model = tiny_model("transformer", f"model.attention.score={score}")
    groups = build_optimizer(model, tiny_config("transformer").optimizer).param_groups
    assert min(p.dim() for p in groups[0]["params"]) >= 2 and groups[0]["weight_decay"] > 0
    assert {p.dim() for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_working_copy_follows_its_master(family: str) -> None:
    master = tiny_model(family)
    working = WorkingCopy(master, torch.bfloat16)
    loss_sum(working.model, tiny_batch(), 0.1).backward()
    working.hand_over_gradients()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in master.parameters())
    with torch.no_grad():
        for p in master.parameters():
            p.add_(p.grad, alpha=-0.1)
    working.take_weights()
    for p, q in zip(master.parameters(), working.model.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p.bfloat16(), q)
    assert WorkingCopy(master, torch.float32).model is master


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
        losses.append([made.update(islice(batches, 1)).loss for _ in range(20)])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0][-1] < losses[0][0]


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path: Path) -> None:
    made = trainer(tiny_config("transformer"), tmp_path)
    with torch.no_grad():
        next(made.state.model.parameters())[5] = math.nan
    before = weights(made.state)
    with pytest.raises(UserError, match="update 1: loss nan"):
        made.update(islice(made.state.batches, 1))
    for name, tensor in weights(made.state).items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True, rtol=0, atol=0)


# -------------------------------------------------------------------------------------- continuation


def noisy(family: str, *overrides: str) -> TrainConfig:
    """With dropout, so that the random generators matter."""
    settings = ["training.tokens=40", "training.validate_every=4", "training.updates=10", "optimizer.warmup=3"]
    settings.append("optimizer.schedule=inverse_sqrt")  # independent of where a run ends
    return tiny_config(family, "model.dropout=0.2", "model.attention.dropout=0.1", *settings, *overrides)


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
    return Trainer(read.state, precision, read.validate_model, read.checkpoints, read.logbook)


def test_a_new_rate_and_decay_hold_after_continuing(tmp_path: Path) -> None:
    first = trainer(noisy("transformer"), tmp_path)
    first.update(islice(first.state.batches, 1))
    first.checkpoints.save(first.state, best=True)
    second = trainer(noisy("transformer", "optimizer.rate=0.5", "optimizer.decay=0.25", "optimizer.warmup=0"), tmp_path)
    second.state.read(second.checkpoints.run.checkpoint("last"))
    second.update(islice(second.state.batches, 1))
    groups = second.state.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert groups[0]["lr"] == second.rate() == pytest.approx(0.5 / math.sqrt(2))


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


def test_patience_ends_a_run_and_the_best_checkpoint_stays(tmp_path: Path) -> None:
    config = noisy("transformer", "training.updates=100", "training.validate_every=2", "training.patience=2")
    made = trainer(config, tmp_path, [5, 7, 6, 7, 9])
    assert made.fit().update == 8
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

    for function in ("save_file", "_to_disk"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, function, full)
            with pytest.raises(OSError):
                made.checkpoints.save(made.state, best=True)
        assert made.checkpoints.run.index() == {"last": "update-0000000", "best": "update-0000000"}
        _, _, model = load_checkpoint(made.checkpoints.run.checkpoint("last"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    made.checkpoints.save(made.state, best=False)
    assert made.checkpoints.run.checkpoint("last").name == "update-0000004"


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
    config = noisy("lstm", "model.convolutions=1", "model.start=pooled", "model.attention.score=general")
    made = trainer(config, tmp_path)
    made.checkpoints.save(made.state, best=True)
    assert load_checkpoint(made.checkpoints.run.checkpoint("last"))[0].model == config.model
    assert Vocabulary(len(TOKENIZER.source), len(TOKENIZER.target), True) == TOKENIZER.vocabulary
