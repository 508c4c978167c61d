"""Laws of CUDA paths, on a pretend GPU: the CPU's results, no mixed devices, and budgets of waits and copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import seq2seq
from seq2seq.config.loading import search_preset
from seq2seq.inference.translator import Translator
from seq2seq.model import interface
from seq2seq.model.interface import Seq2Seq
from seq2seq.training import meter
from seq2seq.training.trainer import Trainer
from seq2seq.utils.errors import UserError
from tests.helpers.configs import FAMILIES, STILL, TINY
from tests.helpers.gpu_searches import BEAM, LENGTHS, SEARCHES, SOURCES, same, searches, translate, translator
from tests.helpers.pretend_gpu import AttentionCall, Count, PretendGPU, pretend_gpu

pytestmark = pytest.mark.slow
families = pytest.mark.parametrize("family", FAMILIES)
OPTIMIZERS = [
    ("adamw", "float32"),
    ("adamw", "bfloat16"),
    ("muon", "bfloat16"),
    ("adafactor", "float32"),
    ("schedule_free", "bfloat16"),
]
optimizers = pytest.mark.parametrize(("optimizer", "precision"), OPTIMIZERS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    monkeypatch.setattr(meter, "matmul_flops", lambda *_: 1e9)
    with pretend_gpu() as made:
        yield made


# -------------------------------------------------------------------------------------- the pretend GPU itself


@pytest.mark.parametrize(
    "misuse",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, x),
        lambda x: torch.cat((x, torch.ones(3))),
        lambda x: F.scaled_dot_product_attention(x.view(1, 1, 3, 1), x.view(1, 1, 3, 1), torch.ones(1, 1, 3, 1)),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda _: torch.cuda.set_device(torch.device("cuda")),
        lambda x: torch.cuda.set_rng_state(x.byte()),
    ],
)
def test_what_a_gpu_refuses_is_refused(gpu: PretendGPU, misuse: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"device|RNG"):
        misuse(torch.ones(3, device="cuda"))


def test_every_wait_is_counted(gpu: PretendGPU) -> None:
    x = torch.arange(4, device="cuda")
    mask = x > 1
    waiting: list[Callable[[], Any]] = [
        x.sum().item,
        x.tolist,
        x.cpu,
        mask.nonzero,
        mask.any().__bool__,
        lambda: x[mask],
        lambda: int(x[0]),
    ]
    waiting += [
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: x[torch.tensor([0])],
        lambda: x[[0]],
        torch.cuda.synchronize,
    ]
    for wait in waiting:
        with gpu.counting() as count:
            wait()
        assert count.syncs.total() == 1
    with gpu.counting() as count:
        x[mask] = 0
        x.index_select(0, x).view(2, 2).t().clone()
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert not count.syncs and not count.unpinned and count.launches.total() == 3


def test_gradients_pass_through_its_kernels(gpu: PretendGPU) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    lstm = torch.nn.LSTM(4, 4, batch_first=True)

    def gradient(device: str) -> Tensor:
        mine = x.to(device).requires_grad_()
        y = lstm.to(device)(mine)[0][:, None]
        F.scaled_dot_product_attention(y, y, y).square().sum().backward()
        assert mine.grad is not None
        return mine.grad.cpu()

    torch.testing.assert_close(gradient("cpu"), gradient("cuda"))


# ----------------------------------------------------------------------------------------------------- training


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of one to four words, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for side, words in (("en", ["one", "two", "three"]), ("de", ["eins", "zwei", "drei"])):
        lines = [" ".join(each) for n in range(1, 5) for each in itertools.product(words, repeat=n)]
        Path(f"a.{side}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        Path(f"b.{side}").write_text("".join(f"{line}\n" for line in lines[::40]), encoding="utf-8")


def train(family: str, name: str, *overrides: str, device: str = "cuda") -> dict[str, Tensor]:
    """The last weights of a small run."""
    size = [
        *TINY[family],
        "model.attention.heads=2",
        "tokenizer.vocabulary=30",
        "search.length_extra=4",
        "search.tokens=200",
    ]
    data = ["data.train=[a.en,a.de]", "data.validation=[b.en,b.de]", "optimizer.schedule=constant"]
    settings = ["training.tokens=64", "training.updates=4", "training.validate_every=2"]
    settings += ["optimizer.warmup=2", "optimizer.lr=1.5e-3"]
    words = [f"model={family}", f"name={name}", f"device={device}", "precision=float32", *size, *data, *settings]
    # Later words win; Hydra takes each key once.
    run = seq2seq.train(*{word.partition("=")[0]: word for word in (*words, *overrides)}.values())
    return load_file(run.checkpoint("last") / "model.safetensors")


@families
@optimizers
def test_training_gives_the_weights_of_the_cpu(
    family: str, optimizer: str, precision: str, corpus: None, gpu: PretendGPU
) -> None:
    """With validation, checkpoints, and both checks of memory."""
    words = [f"optimizer={optimizer}", f"precision={precision}", *STILL, "training.validate_every=4"]
    cpu, cuda = train(family, "cpu", *words, device="cpu"), train(family, "cuda", *words)
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[precision]
    torch.testing.assert_close(cuda, cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi"])
def test_packed_training_gives_the_weights_of_the_cpu(
    position: str, precision: str, corpus: None, gpu: PretendGPU
) -> None:
    """Whose training pads."""
    words = [f"precision={precision}", f"model.position={position}", *STILL, "training.validate_every=4"]
    cpu = train("transformer", "cpu", *words, device="cpu")
    cuda = train("transformer", "cuda", *words, "training.packing=true")
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[precision]
    torch.testing.assert_close(cuda, cpu, rtol=tolerance, atol=tolerance)


@families
def test_a_resumed_run_is_bit_identical(family: str, corpus: None, gpu: PretendGPU) -> None:
    words = ["model.dropout=0.1", "precision=bfloat16", "training.average=ema"]
    whole = train(family, "whole", *words)
    train(family, "parts", *words, "training.updates=2")
    torch.cuda.manual_seed(99)
    parts = train(family, "parts", *words)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


class Memory:
    """A memory that holds batches up to a size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int, limit_in_training: int) -> None:
        self.limit = limit
        forward, fit = Seq2Seq.forward, Trainer.fit

        def limited_forward(model: Seq2Seq, batch: Any, *rest: Any, **options: Any) -> Tensor:
            if max(batch.source_BS.numel(), batch.target_in_BT.numel()) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 80 GiB.")
            return forward(model, batch, *rest, **options)

        def limited_fit(trainer: Trainer) -> None:
            self.limit = limit_in_training
            fit(trainer)

        monkeypatch.setattr(Seq2Seq, "forward", limited_forward)
        monkeypatch.setattr(Trainer, "fit", limited_fit)


@pytest.mark.parametrize(
    ("limit", "in_training", "tokens"),
    [(100, 100, "256"), (50, 50, "auto"), (1000, 10, "64")],
)
def test_out_of_memory_is_an_error_of_one_line(
    limit: int, in_training: int, tokens: str, corpus: None, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, limit, in_training)
    with pytest.raises(UserError, match=r"memory.*(set training\.|smaller model)") as error:
        train("transformer", "large", f"training.tokens={tokens}")
    assert "\n" not in str(error.value)


def test_automatic_tokens_train_like_the_budget_that_they_find(
    corpus: None, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, 150, 150)
    found = train("transformer", "auto", "training.tokens=auto")
    given = train("transformer", "given", "training.tokens=128")
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_a_deterministic_run_samples(corpus: None, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        train("transformer", "deterministic", "deterministic=true", "search=sample", "search.top_p=0.9")
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------- search and scores


@searches
def test_translations_are_those_of_the_cpu(kind: str, family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    cuda, cpu = (translate(translator(tmp_path, family, device), kind) for device in ("cuda", "cpu"))
    for some, others in zip(cuda, cpu, strict=True):
        same(some, others)


@families
def test_scores_and_attention_are_those_of_the_cpu(family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    cuda, cpu = (translator(tmp_path, family, device) for device in ("cuda", "cpu"))
    for attention in (False, True):
        same(*(made.score(SOURCES, SOURCES[::-1], attention=attention) for made in (cuda, cpu)))
    found = [made.translate(SOURCES, replace(BEAM, **LENGTHS), attention=True) for made in (cuda, cpu)]
    for some, others in zip(*found, strict=True):
        assert all(one.weights_LNTS is not None for one in some if one.pieces)
        same(some, others)
    assert cuda.alternatives(SOURCES[0], "Some", 3)[0][0] == cpu.alternatives(SOURCES[0], "Some", 3)[0][0]


@families
def test_a_trained_model_translates_in_float16_as_in_float32(family: str, corpus: None, gpu: PretendGPU) -> None:
    """With log probabilities in float32, near those of the CPU; scores too."""
    train(
        family,
        "trained",
        *STILL,
        "training.updates=150",
        "training.validate_every=150",
        "optimizer.lr=1e-2",
        device="cpu",
    )
    sources = ["one two", "three", "two two one"]
    cuda, cpu = (
        Translator.load("trained", device=device, precision=precision)
        for device, precision in (("cuda", "float16"), ("cpu", "float32"))
    )
    assert next(cuda.models.models[0].parameters()).dtype == torch.float16
    for search in (search_preset("greedy"), BEAM):
        found, expected = (made.translate(sources, search) for made in (cuda, cpu))
        for [a, *_], [b, *_] in zip(found, expected, strict=True):
            assert a.pieces == b.pieces and len(b.pieces) > 0
            np.testing.assert_allclose(a.token_log_probabilities, b.token_log_probabilities, atol=0.03)
    for a, b in zip(*(made.score(sources, sources) for made in (cuda, cpu)), strict=True):
        np.testing.assert_allclose(a.token_log_probabilities, b.token_log_probabilities, rtol=0.01, atol=0.03)


# ----------------------------------------------------------------------------------------------------- budgets


def each_update(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch, family: str, *overrides: str) -> list[Count]:
    """The work of the second and later updates, with their batches."""
    counts, update = [], Trainer.update

    def counted(trainer: Trainer, *batches: Any) -> Any:
        result = update(trainer, *batches)
        counts.append(gpu.count)
        gpu.count = Count()
        return result

    monkeypatch.setattr(Trainer, "update", counted)
    train(family, "counted", "training.updates=3", "training.validate_every=100", *overrides)
    return counts[1:]


@families
@pytest.mark.parametrize(("optimizer", "precision"), [x for x in OPTIMIZERS if x[0] != "adafactor"])
def test_the_host_waits_once_an_update(
    family: str, optimizer: str, precision: str, corpus: None, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's Adafactor is left out: it reads two norms of each parameter."""
    words = [f"optimizer={optimizer}", f"precision={precision}", "training.update_tokens=100"]
    words += ["training.average=ema"] if optimizer != "schedule_free" else []
    for syncs in (count.syncs for count in each_update(gpu, monkeypatch, family, *words)):
        assert syncs.total() == 1


@families
def test_packing_adds_no_wait_and_saves_launches(
    family: str, corpus: None, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed sentences attend as they are, where attention that pads copies them there and back."""
    words = ["precision=bfloat16", "model.attention.score=scaled_dot", "model.attention.dropout=0"]
    counts = []
    for packed in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(interface, "use_packed_kernel", lambda _, packed=packed: packed)
            counts.append(each_update(gpu, patch, family, *words, "training.packing=true", f"name=packed-{packed}"))
    for one, other in zip(*counts, strict=True):
        assert one.syncs.total() == 1 and not one.unpinned
        assert len(one.attention) == len(other.attention)
        if family == "transformer":  # 2 layers that attend once, and 2 that attend twice
            assert len(one.attention) == 6 and one.launches.total() <= other.launches.total() - 6 * 6


@families
def test_batches_are_copied_from_pinned_memory(
    family: str, corpus: None, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unpinned in (count.unpinned for count in each_update(gpu, monkeypatch, family)):
        assert not unpinned


def each_step(gpu: PretendGPU, made: Translator, kind: str, rows: int = 12) -> list[Count]:
    """The work of decoding steps in which no hypothesis may end."""
    counts: list[Count] = []
    decode = Seq2Seq.decode

    def counted(*arguments: Any, **options: Any) -> Any:
        counts.append(gpu.count)
        gpu.count = Count()
        return decode(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Seq2Seq, "decode", counted)
        translate(made, kind, [f"{text} {n}" for n in range(rows // 3) for text in SOURCES[:3]], min_length_extra=8)
    return counts[2:7]


@searches
def test_the_host_waits_twice_in_a_quiet_step(kind: str, family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    for syncs in (count.syncs for count in each_step(gpu, translator(tmp_path, family, "cuda"), kind)):
        assert syncs.total() <= 2


@searches
def test_no_step_copies_from_unpinned_memory(kind: str, family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    for unpinned in (count.unpinned for count in each_step(gpu, translator(tmp_path, family, "cuda"), kind)):
        assert not unpinned


@searches
def test_launches_of_a_step_are_independent_of_the_rows(
    kind: str, family: str, tmp_path: Path, gpu: PretendGPU
) -> None:
    made = translator(tmp_path, family, "cuda")
    few, many = ([count.launches for count in each_step(gpu, made, kind, rows)] for rows in (3, 30))
    for some, others in zip(few, many, strict=True):
        assert some == others


@families
def test_translating_and_scoring_copy_from_pinned_memory(family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    made = translator(tmp_path, family, "cuda")
    with gpu.counting() as count:
        translate(made, "greedy")
        made.score(SOURCES, SOURCES[::-1])
    unpinned = count.unpinned
    assert not unpinned


def attention_calls(
    gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch, folder: Path, family: str
) -> Iterator[AttentionCall]:
    """Those of training, of every search, and of scoring."""
    words = ["model.attention.score=scaled_dot"]
    for packing, dropout in (("false", 0.1), ("true", 0.1), ("true", 0)):
        options = [f"training.packing={packing}", f"model.attention.dropout={dropout}", f"name=run-{packing}-{dropout}"]
        with monkeypatch.context() as patch:
            counts = each_update(gpu, patch, family, *words, *options)
        for count in counts:
            yield from count.attention
    made = translator(folder, family, "cuda")
    with gpu.counting() as count:
        for kind in SEARCHES:
            translate(made, kind)
        made.score(SOURCES, SOURCES[::-1])
    yield from count.attention


@families
def test_all_attention_is_fast(
    family: str, corpus: None, tmp_path: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's fused kernels need the numbers of a head side by side, and those of a query's mask."""
    calls = [*attention_calls(gpu, monkeypatch, tmp_path, family)]
    slow = {call.line for call in calls if any(stride[-1] != 1 for stride in (*call.strides, call.mask_stride or (1,)))}
    assert calls and not slow
