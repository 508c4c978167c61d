"""Choice of device and precision: made once, reported, never changed silently."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

import torch

from seq2seq.utils.errors import UserError


def choose_device(name: str) -> tuple[torch.device, str]:
    """Return the configured device and the reason; an unavailable device is an error."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rank = os.environ.get("LOCAL_RANK")
    apple = torch.backends.mps.is_available()
    present = ["cpu", *(f"cuda:{i}" for i in range(gpus)), *(["mps"] if apple else [])]
    if name == "auto":
        if gpus:
            device = torch.device("cuda", int(rank or 0) % gpus)
            return device, f"auto: {torch.cuda.get_device_name(device)}"
        if apple:
            return torch.device("mps"), "auto: Apple GPU"
        return torch.device("cpu"), "auto: no GPU found"
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise UserError(f"device: {name} is unavailable; this machine has {', '.join(present)}; auto chooses", code=2)
    if name == "cuda":  # each of several processes on a machine takes another GPU
        return torch.device("cuda", int(rank) % gpus if rank else torch.cuda.current_device()), "as configured"
    return torch.device(name), "as configured"


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype of the model's weights and activations, and the reason."""
    if device.type == "cuda":
        tune_cuda()
        # By default, cuDNN's LSTM computes float32 in tf32.
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name == "tf32":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(
                f"precision: tf32 requires an NVIDIA GPU (Ampere or newer), not {device}; use float32", code=2
            )
        return torch.float32, "as configured: tf32 products"
    if name == "float16" and device.type != "cuda":
        raise UserError(f"precision: float16 runs on a CUDA GPU only, not on {device}; use float32 or bfloat16", code=2)
    if name == "int8":
        if device.type != "cpu":
            raise UserError(f"precision: int8 runs on a CPU only, not on {device}; use device=cpu or auto", code=2)
        return torch.float32, "as configured: int8 products"
    if name != "auto":
        return getattr(torch, name), "as configured"
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return (
            (torch.bfloat16, "auto: this GPU has native bfloat16 support")
            if fast
            else (torch.float32, "auto: bfloat16 is slow on this device")
        )
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16, "auto: this CPU has native bfloat16 support"
    return torch.float32, "auto: bfloat16 is slow on this device"


def usable_cores() -> int:
    """Return the cores that this process may keep busy: torch's threads, within the quota of its container."""
    # torch counts the physical cores of the process's affinity, unless OMP_NUM_THREADS sets a number.
    return max(1, int(min(torch.get_num_threads(), cpu_quota(CONTROL_GROUPS))))


CONTROL_GROUPS = Path("/sys/fs/cgroup")


def cpu_quota(root: Path) -> float:
    """Return the cores' worth of time that control groups grant, by either of their versions."""
    with suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        files = (root / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota_us, period_us = (int(file.read_text(encoding="ascii")) for file in files)
        return quota_us / period_us if quota_us > 0 else float("inf")
    return float("inf")


OUTSIDE: list[int] = []  # of each open block of `one_thread` in this process, the number of threads outside of it
OUTSIDE_LOCK = Lock()


@contextmanager
def one_thread(only: bool) -> Iterator[None]:
    """Compute in one thread: for small products more add synchronisation cost, above all where a core is busy."""
    with OUTSIDE_LOCK:
        # torch has a number for each thread, and a new thread begins with the one set last, maybe by an open block.
        threads = OUTSIDE[0] if OUTSIDE else torch.get_num_threads()
        if only:
            OUTSIDE.append(threads)
        if OUTSIDE:
            torch.set_num_threads(1 if only else threads)
    try:
        yield
    finally:
        if only:
            with OUTSIDE_LOCK:
                OUTSIDE.pop()
                torch.set_num_threads(threads)


def _forget_blocks() -> None:
    OUTSIDE.clear()
    OUTSIDE_LOCK.release()


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads whose blocks are open
    os.register_at_fork(
        before=OUTSIDE_LOCK.acquire, after_in_parent=OUTSIDE_LOCK.release, after_in_child=_forget_blocks
    )


def tune_cpu() -> None:
    """Let the allocator keep freed memory: returning it costs page faults for every large tensor.

    Also bound oneDNN's caches of kernels, one per batch shape: they grow to gigabytes and save no time.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")  # read when the first kernel is created
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            return  # another C library, such as musl
        trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1
        mallopt(trim_threshold, never)
        mallopt(mmap_threshold, never)


def tune_cuda() -> None:
    """Leave attention to the memory-efficient kernel, measured as the fastest for sentences.

    cuDNN plans each new shape for half a second, and every decoding step has one; the backward pass of flash attention
    takes 2.7 times as long for the decoder's self-attention.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)


def deterministic() -> None:
    """Use only algorithms with bit-identical results; on a CPU all are."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def matmul_flops(device: torch.device, precision: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on this device: the reference for utilisation."""
    size = 8192 if device.type == "cuda" else 1024
    # A separate generator: measuring must not change a run's random numbers.
    a = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(precision)
    seconds = []
    for _ in range(6):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; from pinned memory, a GPU copies it while the host continues."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def float64_device(device: torch.device) -> torch.device:
    """Return where a device's numbers are computed in float64: on the CPU for an Apple GPU, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_of(processes: Iterable[int]) -> int:
    """Return the memory in bytes that processes hold together, shared pages counted once; 0 where Linux is absent."""
    total = 0
    for process in processes:
        with suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def reset_peak_memory(device: torch.device) -> None:
    """Measure peak memory from now on, on a GPU; a process's own cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate|not enough memory|could not create a|STATUS_ALLOC_FAILED"
    "|batch size exceeds"  # a limit of attention kernels, with the same way out
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; torch has a dedicated type on GPUs only, and not for its libraries."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))


def _cpu_multiplies_bfloat16() -> bool:
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
