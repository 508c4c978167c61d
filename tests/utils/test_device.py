"""Laws of GPUs, on a CPU: which device, precision and generator a run uses, and what running out of memory means.

The functions of torch.cuda are replaced by notes of how they are called.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seq2seq.config.loading import search_preset
from seq2seq.data.corpus import Corpus
from seq2seq.decoding.sampling import build_warpers, draw, sampling_probabilities
from seq2seq.training import pipeline
from seq2seq.training.memory_check import MemoryCheck
from seq2seq.utils import device as device_module
from seq2seq.utils.device import choose_device, choose_precision, one_thread, out_of_memory, usable_cores
from seq2seq.utils.errors import UserError
from tests.helpers.program import forks
from tests.helpers.trainers import make_trainer, varied

SECOND = torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "local_rank", "index"),
    [
        ("cuda", None, 2),
        ("cuda", "0", 0),
        ("cuda", "3", 3),
        ("cuda", "5", 1),
        ("cuda:1", None, 1),
        ("cuda:1", "3", 1),
        ("auto", None, 0),
        ("auto", "3", 3),
    ],
)
def test_a_gpu_always_has_an_index(
    name: str, local_rank: str | None, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four, alone the current one, under torchrun each process's own; a configured index counts everywhere."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", str)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert choose_device(name)[0] == torch.device("cuda", index)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.usefixtures("tf32")
def test_only_tf32_computes_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In products and in cuDNN, whichever precision was chosen before; a CPU's settings stay."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    for name in ("float32", "tf32", "float32", "tf32", "bfloat16"):
        choose_precision(name, SECOND)
        assert torch.backends.cudnn.allow_tf32 == (name == "tf32")
        assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    choose_precision("tf32", SECOND)
    choose_precision("float32", torch.device("cpu"))
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("tf32")
def test_float16_is_for_gpus() -> None:
    assert choose_precision("float16", SECOND)[0] == torch.float16
    for device in ("cpu", "mps"):
        with pytest.raises(
            UserError, match=f"precision: float16 runs on a CUDA GPU only, not on {device}; use"
        ) as error:
            choose_precision("float16", torch.device(device))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("Efficient attention cannot produce valid offsets when the batch size exceeds (65535).", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_library_that_cannot_allocate_is_out_of_memory(text: str, memory: bool) -> None:
    assert out_of_memory(RuntimeError(text)) == memory


@pytest.mark.usefixtures("fast")
def test_the_generator_of_the_runs_own_gpu_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several, that of the model's; under the name of its kind, as in older checkpoints."""
    made, restored = make_trainer("lstm", tmp_path), []
    parameter = SimpleNamespace(device=SECOND)
    monkeypatch.setattr(made.state, "model", SimpleNamespace(parameters=lambda: iter([parameter])))
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device="cuda": torch.device(device).index)
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device="cuda": restored.append((state, device)))
    states = made.state.rng_states()
    assert states.keys() == {"cpu", "cuda"} and states["cuda"] == 1
    made.state.set_rng_states({"cuda": torch.ones(1)})
    assert restored == [(torch.ones(1), SECOND)]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("tokens", [48, "auto"])
def test_the_reported_peaks_are_of_the_check_and_then_of_training(
    tokens: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check's is logged, then reset; batches are counted with the budget that was found, and not before."""
    made = make_trainer(varied("lstm", training__tokens=tokens), tmp_path)
    made.device = SECOND
    seen: list[Any] = []

    def check(*_: Any) -> MemoryCheck:
        seen.append("check")
        return MemoryCheck(48, "fits")

    monkeypatch.setattr(pipeline, "check_memory", check)
    monkeypatch.setattr("seq2seq.training.distributed.peak_memory", lambda _: 7_000_000_000)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: seen.append(device))
    monkeypatch.setattr(made.logger, "field", lambda name, text: seen.append((name, text)))
    pipeline.settle_budget(made, Corpus(["a"], ["b"]))
    assert seen[:3] == ["check", ("memory", "fits; 7.0 GB peak"), SECOND]
    assert made.state.config.training.tokens == made.state.batches.tokens == 48
    count = len(list(made.state.batches.rows(0)))
    assert [text.split(" per epoch")[0] for _, text in seen[3:]] == ([f"about {count}"] if tokens == "auto" else [])


def test_products_on_a_gpu_are_timed_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: ended.append(str(device)))
    monkeypatch.setattr("torch.mps.synchronize", lambda: ended.append("mps"))
    for device in ("cpu", "cuda:1", "mps"):
        device_module._wait(torch.device(device))
    assert ended == ["cuda:1", "mps"]


class OnGPU(Tensor):
    """Refuses what CUDA refuses where results must be reproducible."""

    def cumsum(self, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_reproducible_samples_need_no_running_sum_on_a_gpu() -> None:
    logits_RV = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    uniform_R = torch.linspace(0, 0.9, 5, dtype=torch.float64)
    warpers = build_warpers(dataclasses.replace(search_preset("sample"), top_p=0.8))
    expected = draw(sampling_probabilities(logits_RV, warpers), uniform_R)
    torch.use_deterministic_algorithms(True)
    try:
        probability_RV = sampling_probabilities(logits_RV.as_subclass(OnGPU), warpers)
        found = draw(probability_RV.as_subclass(OnGPU), uniform_R)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({}, 4),
    ],
)
def test_usable_cores_are_torchs_threads_within_the_quota_of_the_container(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n", encoding="ascii")
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr(device_module, "CONTROL_GROUPS", tmp_path)
    assert usable_cores() == cores


@pytest.fixture
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("_four_threads")
@pytest.mark.parametrize("first_ends_first", [True, False])
def test_overlapping_blocks_of_one_thread_leave_no_thread_with_one(first_ends_first: bool) -> None:
    """Each has one thread as long as it is open, and then as many as before, in threads new to torch too."""
    blocks = one_thread(True), one_thread(True)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for pool, block in zip((first, second), blocks, strict=True):
            pool.submit(block.__enter__).result()
            assert pool.submit(torch.get_num_threads).result() == 1
        ends = list(zip((first, second), blocks, strict=True))
        for pool, block in ends if first_ends_first else ends[::-1]:
            assert pool.submit(torch.get_num_threads).result() == 1
            pool.submit(block.__exit__, None, None, None).result()
            assert pool.submit(torch.get_num_threads).result() == 4
    assert torch.get_num_threads() == threads_of_a_new_thread() == 4


@pytest.mark.usefixtures("_four_threads")
def test_large_work_has_all_threads_while_another_thread_has_one() -> None:
    def threads_of_large_work() -> int:
        with one_thread(False):
            return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool, one_thread(True):
        assert pool.submit(threads_of_large_work).result() == 4
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


@forks
@pytest.mark.usefixtures("_four_threads")
def test_a_fork_does_not_count_the_blocks_of_its_parent() -> None:
    """Its only thread is none of those that compute in one thread."""

    def child(pipe: Connection) -> None:
        torch.set_num_threads(1)
        with one_thread(True):
            pass
        pipe.send(torch.get_num_threads())

    context = multiprocessing.get_context("fork")
    parent_end, child_end = context.Pipe()
    with one_thread(True):
        process = context.Process(target=child, args=(child_end,))
        process.start()
    assert parent_end.poll(30) and parent_end.recv() == 1
    process.join()
