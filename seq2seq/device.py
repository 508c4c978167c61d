"""Where the model runs and in what precision: chosen once, said aloud, never silently different."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from seq2seq.errors import UserError


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device a config names, and why; a device that is not there is an error."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = torch.backends.mps.is_available()
    present = ["cpu", *(f"cuda:{i}" for i in range(gpus)), *(["mps"] if apple else [])]
    if name == "auto":
        if gpus:
            return torch.device("cuda"), f"auto: {torch.cuda.get_device_name()}"
        if apple:
            return torch.device("mps"), "auto: the GPU of this Apple computer"
        return torch.device("cpu"), "auto: no GPU found"
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise UserError(f"device: {name} is not there; this machine has {', '.join(present)}", code=2)
    return torch.device(name), "as configured"


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of the numbers that weights and activations have inside the model, and why."""
    if name != "auto":
        return getattr(torch, name), "as configured"
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return (torch.bfloat16, "auto: native here") if fast else (torch.float32, "auto: bfloat16 is slow here")
    if device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16, "auto: this CPU multiplies it natively"
    return torch.float32, "auto: bfloat16 is slow here"


def tune_cpu() -> None:
    """Let the allocator keep freed memory: giving it back costs a page fault for every large tensor."""
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            return  # another C library, such as musl
        trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1
        mallopt(trim_threshold, never)
        mallopt(mmap_threshold, never)


def keep_few_kernels() -> None:
    """Bound oneDNN's caches of kernels, one for each shape: on text of any length they grow to gigabytes."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")  # read when the first kernel is made


def _cpu_multiplies_bfloat16() -> bool:
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
