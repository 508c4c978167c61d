"""A pretend GPU: tensors that say cuda:0 and lie in CPU memory, so that CUDA paths run where there is no GPU.

    with pretend_gpu() as gpu:
        with gpu.counting() as count:
            ...

What a GPU refuses is refused. Kernel launches, host synchronisations, copies from unpinned memory and attention calls
are counted with the line of the package that caused them. Kernels, rounding, memory and streams are not simulated.

A CUDA graph is: its capture runs nothing and refuses what the driver refuses; a replay repeats the recorded kernels on
the same memory, and makes the intermediate results of all other graphs, whose memory it shares, NaN.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import seq2seq

PACKAGE = str(Path(seq2seq.__file__).parent)
CUDA = torch.device("cuda", 0)
# PyTorch's C++ code believes these tensors to be meta tensors: it computes nothing itself, and needs no CUDA.
INSIDE = torch.device("meta")
# Operations that only describe memory; views are recognised by their schema.
WITHOUT_KERNEL = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "detach", "scalar_tensor", "set_", "resize_")
# Operations whose result has a size, or is a value, that the host must wait for.
WAITING = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount")
NONDETERMINISTIC = ("cumsum", "kthvalue", "median", "histc")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# What functions of `torch.cuda` return on a machine with one GPU.
MEMORY = 80 * 10**9
ANSWERS = {
    **{"is_available": True, "is_initialized": True, "_lazy_init": None, "_is_in_bad_fork": False},
    **{"device_count": 1, "current_device": 0, "get_device_name": "pretend GPU", "get_device_capability": (9, 0)},
    "get_device_properties": SimpleNamespace(name="pretend GPU", major=9, minor=0, total_memory=MEMORY),
    **{"mem_get_info": (MEMORY, MEMORY), "memory_allocated": MEMORY // 2, "max_memory_allocated": MEMORY // 2},
    **{"reset_peak_memory_stats": None, "empty_cache": None, "is_bf16_supported": True},
    **{"stream": nullcontext(), "device": nullcontext(), "is_current_stream_capturing": False},
    **{"Stream": MagicMock(), "Event": MagicMock(), "current_stream": MagicMock()},
}
MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"

Line = str  # file:number, within the package


@dataclass(frozen=True)
class AttentionCall:
    """One call of `F.scaled_dot_product_attention`, or of the kernel of packed sentences."""

    line: Line
    strides: tuple[tuple[int, ...], ...]  # of query, key and value
    mask_stride: tuple[int, ...] | None  # None: no mask
    causal: bool


@dataclass
class Count:
    """The work of the GPU, and what the host waited for."""

    launches: Counter[Line] = field(default_factory=Counter)
    syncs: Counter[tuple[Line, str]] = field(default_factory=Counter)  # with the reason
    unpinned: Counter[Line] = field(default_factory=Counter)
    attention: list[AttentionCall] = field(default_factory=list)


class PretendTensor(Tensor):
    """A tensor of the pretend GPU; `held` has its numbers."""

    held: Tensor
    is_number = False  # made from a Python number: a GPU gets it with the launch

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=INSIDE
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert _gpu is not None, "the pretend GPU is gone"
        return _gpu.run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> PretendTensor:
        return PretendTensor(inner["held"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().clone().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held!r})"

    def __array__(self, *_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    numpy = __array__  # type: ignore[assignment]
    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = is_meta = property(lambda _: False)

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(lists_as_tensors(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(lists_as_tensors(key), value)

    def record_stream(self, stream: Any) -> None: ...


class PretendGraph:
    """A CUDA graph: the kernels of a capture, to be repeated on the memory that they read and wrote."""

    def __init__(self) -> None:
        self.kernels: list[Callable[[], Any]] = []
        self.results: list[Tensor] = []  # memory that the kernels wrote first

    def add(self, compute: Callable[[], Any]) -> None:
        """Record a kernel that changes its inputs."""
        self.kernels.append(compute)

    def add_result(self, compute: Callable[[], Any], inputs: Sequence[Any]) -> Any:
        """Record a kernel with results; return their memory, in which no number is valid before a replay."""
        own = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
        out = compute()
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]
        made = [x for x in made if x.untyped_storage().data_ptr() not in own]
        self.results += made

        def repeat() -> None:
            again = compute()
            for x, y in zip(made, again if isinstance(again, (tuple, list)) else [again], strict=False):
                x.copy_(y)

        if made:
            self.kernels.append(repeat)
        spoil(made)
        return out

    def replay(self) -> None:
        assert _gpu is not None
        _gpu.count.launches["replay"] += 1
        for other in _gpu.graphs:
            if other is not self:
                spoil(other.results)
        with _disable_current_modes():
            for kernel in self.kernels:
                kernel()

    def pool(self) -> object:
        return self


def spoil(memory: Sequence[Tensor]) -> None:
    for x in memory:
        if x.is_floating_point():
            x.fill_(torch.nan)


class PretendGPU(TorchDispatchMode):
    """Runs every operation on its tensors, and counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.rng_state = Count(), torch.Generator().manual_seed(0).get_state()
        self.pinned: dict[int, Tensor] = {}  # by the address of their memory, which they keep
        self.capturing: PretendGraph | None = None
        self.graphs: WeakSet[PretendGraph] = WeakSet()

    @contextmanager
    def counting(self) -> Iterator[Count]:
        """Count what happens inside, alone."""
        before, self.count = self.count, Count()
        try:
            yield self.count
        finally:
            self.count = before

    @contextmanager
    def capture(self, graph: PretendGraph, *_: Any, **__: Any) -> Iterator[None]:
        """Stand in for `torch.cuda.graph`."""
        assert self.capturing is None
        self.wait("capture")
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
        self.graphs.add(graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = [
            x for part in (*args, *kwargs.values()) for x in (part if isinstance(part, (list, tuple)) else [part])
        ]
        ours = [x for x in leaves if isinstance(x, PretendTensor)]
        devices = [x for x in leaves if isinstance(x, torch.device)]
        on_gpu = any(map(is_gpu, devices))
        if not ours and not on_gpu:
            return func(*args, **kwargs)
        if func._can_decompose():  # under inference_mode
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name == "copy_":
            return self.copy(*args, **kwargs)
        if name == "_to_copy" and not (ours and on_gpu):
            if not ours:
                return self.upload(args[0], kwargs.get("non_blocking", False), kwargs.get("dtype"))
            if devices:
                self.wait("copy to the host")
                return func(args[0].held, **{k: v for k, v in kwargs.items() if k in ("dtype", "memory_format")})
        self.refuse_mixed(name, leaves, args)
        if name in NONDETERMINISTIC and ours[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name}_cuda does not have a deterministic implementation")
        self.note_waiting(name, args, kwargs, ours)
        if not func.is_view and not name.startswith(WITHOUT_KERNEL) and name != "_local_scalar_dense":
            self.count.launches[current_line()] += 1
        compute = partial(func, *bare(args), **{key: bare(x) for key, x in kwargs.items()})
        if self.capturing and not func.is_view and not name.startswith(WITHOUT_KERNEL):
            if any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments):
                self.capturing.add(compute)
                return args[0]
            out = self.capturing.add_result(compute, [x.held for x in ours])
        else:
            out = self.drawing(compute) if torch.Tag.nondeterministic_seeded in func.tags else compute()
        if name.startswith(("empty", "new_empty")):
            spoil([out])
        return self.wrap(out, ours, func.is_view, is_number=name == "scalar_tensor")

    def wrap(self, out: Any, ours: Sequence[PretendTensor], is_view: bool, is_number: bool) -> Any:
        known = {id(x.held): x for x in ours}
        # A view of a parameter is no inference tensor, wherever it is taken.
        plain = torch.is_inference_mode_enabled() and is_view and not ours[0].is_inference()

        def wrap(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)([wrap(part) for part in x])
            if not isinstance(x, Tensor) or id(x) in known:
                return known.get(id(x), x)
            with torch.inference_mode(False) if plain else nullcontext():
                made = PretendTensor(x)
            made.is_number = is_number
            return made

        return wrap(out)

    def drawing(self, compute: Callable[[], Any]) -> Any:
        """Compute with the random numbers of this GPU."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.rng_state)
        try:
            return compute()
        finally:
            self.rng_state = torch.get_rng_state()
            torch.set_rng_state(before)

    # ------------------------------------------------------------------------------------ copies and waits

    def upload(self, x: Tensor, non_blocking: bool, dtype: torch.dtype | None = None) -> PretendTensor:
        self._note_upload(x, non_blocking)
        return PretendTensor(x.detach().to(dtype or x.dtype, copy=True))

    def copy(self, to: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
        """`to.copy_(x)` between or on the devices."""
        if not isinstance(x, PretendTensor):
            self._note_upload(x, non_blocking)
        elif isinstance(to, PretendTensor):
            self.count.launches[current_line()] += 1
        else:
            self.wait("copy to the host")
        if self.capturing:
            self.capturing.add(partial(bare(to).copy_, bare(x)))
        else:
            bare(to).copy_(bare(x))
        return to

    def _note_upload(self, x: Tensor, non_blocking: bool) -> None:
        if self.capturing:  # a replay would copy from where the host may have something else by then
            raise RuntimeError("a graph that copies from the host is being captured")
        pinned = self.is_pinned(x)
        if not pinned:
            self.count.unpinned[current_line()] += 1
        if not (pinned and non_blocking):
            self.wait("copy from the host")

    def pin(self, x: Tensor) -> Tensor:
        pinned = x.clone()
        self.pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.pinned

    def wait(self, reason: str) -> None:
        if self.capturing:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({reason})")
        self.count.syncs[current_line(), reason] += 1

    def note_waiting(self, name: str, args: Any, kwargs: Any, ours: Sequence[PretendTensor]) -> None:
        if name == "_local_scalar_dense":
            self.wait(f"value of {ours[0].dtype}")
        elif name in WAITING:
            self.wait(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave with counts")
        elif name in INDEXING and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]):
            is_fill = name != "index" and getattr(args[2], "is_number", False)  # `x[mask] = number`
            if not is_fill:
                self.wait("indexing with a boolean mask")

    def refuse_mixed(self, name: str, leaves: Sequence[Any], args: Any) -> None:
        """Refuse tensors of a CPU, except numbers, and indices, which are copied."""
        foreign = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, PretendTensor)]
        for x in foreign:
            assert not x.is_meta, "a tensor of this GPU was made without it"
            if name in INDEXING and any(x is index for index in args[1]):
                self._note_upload(x, non_blocking=False)
            elif x.dim() or name in ("cat", "stack"):
                raise RuntimeError(f"{MIXED} ({name}, {tuple(x.shape)} on the CPU)")


_gpu: PretendGPU | None = None


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in (CUDA.type, INSIDE.type)


def bare(x: Any) -> Any:
    """The numbers of pretend tensors, also of nested ones, and the device where they lie."""
    if isinstance(x, PretendTensor):
        return x.held
    if isinstance(x, (list, tuple)):
        return type(x)([bare(part) for part in x])
    return torch.device("cpu") if isinstance(x, torch.device) and is_gpu(x) else x


def lists_as_tensors(key: Any) -> Any:
    """An index with its lists as tensors on the CPU: PyTorch would make meta tensors of them."""
    if isinstance(key, tuple):
        return tuple(map(lists_as_tensors, key))
    return torch.tensor(key, dtype=None if key else torch.int64) if isinstance(key, list) else key


def current_line() -> Line:
    """The innermost line of the package that is being executed."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}" if frame else "outside the package"


class Kernel(torch.autograd.Function):
    """A function that is one kernel on a GPU: computed, with its gradient, on the numbers."""

    @staticmethod
    def forward(ctx: Any, gpu: PretendGPU, function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[2:]
        with torch.set_grad_enabled(any(needed)):
            ctx.inputs = [
                x.held.detach().requires_grad_(need) if isinstance(x, PretendTensor) else x
                for x, need in zip(tensors, needed, strict=True)
            ]
            compute = partial(function, *ctx.inputs)
            out = gpu.capturing.add_result(compute, ctx.inputs) if gpu.capturing else gpu.drawing(compute)
        gpu.count.launches[current_line()] += 1
        ctx.gpu, ctx.outputs = gpu, out if isinstance(out, tuple) else (out,)
        made = tuple(PretendTensor(x.detach()) for x in ctx.outputs)
        return made if isinstance(out, tuple) else made[0]

    @staticmethod
    def backward(ctx: Any, *gradients: PretendTensor) -> Any:
        ctx.gpu.count.launches[current_line()] += 1
        needed = [x for x in ctx.inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(ctx.outputs, needed, [bare(x) for x in gradients], allow_unused=True))
        results = [next(found) if x is not None and x.requires_grad else None for x in ctx.inputs]
        return None, None, *(None if x is None else PretendTensor(x) for x in results)


launch: Any = Kernel.apply


def replaced_functions(gpu: PretendGPU) -> Iterator[tuple[Any, str, Any]]:
    """Functions that a torch without CUDA cannot run, and their stand-ins."""
    real_to: Any = Tensor.to
    real_tensor, real_attention = torch.tensor, F.scaled_dot_product_attention
    real_lstm: Any = torch._VF.lstm

    def to(self: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "cuda":
            return real_to(self, *args, copy=copy, **kwargs)
        if not isinstance(self, PretendTensor):
            return gpu.upload(self, non_blocking, dtype)
        return real_to(self, dtype or self.dtype, copy=copy)

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None or not is_gpu(device):
            return real_tensor(data, device=device, **options)
        return gpu.upload(real_tensor(data, **options), non_blocking=False)

    def attention(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, p: float = 0.0, causal: bool = False,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        if not isinstance(query, PretendTensor):
            return real_attention(query, key, value, mask, p, causal, **options)
        inputs = (query, key, value)
        if not all(isinstance(x, PretendTensor) for x in (*inputs, *([] if mask is None else [mask]))):
            raise RuntimeError(f"{MIXED} (scaled_dot_product_attention)")
        strides, mask_stride = tuple(x.stride() for x in inputs), None if mask is None else mask.stride()
        gpu.count.attention.append(AttentionCall(current_line(), strides, mask_stride, causal))
        kernel = partial(real_attention, dropout_p=p, is_causal=causal, **options)
        return launch(gpu, kernel, *inputs, mask)

    def packed_attention(
        query: Tensor, key: Tensor, value: Tensor, bias: None, bounds_q: Any, bounds_k: Any,
        longest_q: int, longest_k: int, p: float, mask_type: int, for_backward: bool, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Torch's kernel for sentences of different lengths, one after the other: [1, tokens, heads, head width]."""
        inputs, bounds = (query, key, value), (bounds_q, bounds_k)
        if not all(isinstance(x, PretendTensor) for x in (*inputs, *bounds)):
            raise RuntimeError(f"{MIXED} (_efficient_attention_forward)")
        parts = [bare(x).diff().tolist() for x in bounds]
        assert all(x.dtype == torch.int32 for x in bounds) and for_backward and bias is None
        assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in inputs), "the kernel reads 16 bytes at once"
        assert [max(lengths) for lengths in parts] <= [longest_q, longest_k]
        strides = tuple(x.stride() for x in inputs)
        gpu.count.attention.append(AttentionCall(current_line(), strides, None, mask_type == 1))

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q_parts, k_parts, v_parts = (
                x.transpose(1, 2).split(lengths, 2) for x, lengths in zip((q, k, v), (*parts, parts[1]), strict=True)
            )
            each = [
                real_attention(q, k, v, None, p, mask_type == 1, scale=scale)
                for q, k, v in zip(q_parts, k_parts, v_parts, strict=True)
            ]
            return torch.cat(each, 2).transpose(1, 2).contiguous()

        return (launch(gpu, kernel, *inputs),)

    def lstm(x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], *options: Any) -> Any:
        if not isinstance(x, PretendTensor):
            return real_lstm(x, state, weights, *options)
        return launch(gpu, lambda x, h, c, *w: real_lstm(x, (h, c), w, *options), x, *state, *weights)

    yield Tensor, "to", to
    yield torch, "tensor", tensor
    yield Tensor, "pin_memory", lambda self, *_: gpu.pin(self)
    yield Tensor, "is_pinned", lambda self, *_: gpu.is_pinned(self)
    yield F, "scaled_dot_product_attention", attention
    yield torch.ops.aten, "_efficient_attention_forward", packed_attention
    yield torch._VF, "lstm", lstm
    yield torch.backends.cudnn, "is_acceptable", lambda _: False
    yield from ((torch.cuda, name, MagicMock(return_value=answer)) for name, answer in ANSWERS.items())
    # A build of torch for CUDA asks its driver, which this machine may lack.
    yield torch.accelerator, "current_accelerator", MagicMock(return_value=None)
    yield from ((torch.cuda, name, function) for name, function in cuda_functions(gpu).items())
    yield torch.cuda, "CUDAGraph", PretendGraph
    yield torch.cuda, "graph", gpu.capture


def cuda_functions(gpu: PretendGPU) -> dict[str, Any]:
    """Functions of `torch.cuda` that count, or check what they are given."""

    def get_rng_state(device: Any = "cuda") -> Tensor:
        if torch.device(device).index not in (None, 0):
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device})")
        return gpu.rng_state

    def set_rng_state(state: Tensor, device: Any = "cuda") -> None:
        get_rng_state(device)
        if isinstance(state, PretendTensor) or state.dtype != torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        gpu.rng_state = state

    def manual_seed(seed: int) -> None:
        gpu.rng_state = torch.Generator().manual_seed(seed).get_state()

    def set_device(device: Any) -> None:
        if not isinstance(device, int) and torch.device(device).index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got: {device}")

    def synchronize(device: Any = None) -> None:
        gpu.wait("torch.cuda.synchronize")

    checked = (get_rng_state, set_rng_state, manual_seed, set_device, synchronize)
    return {**{function.__name__: function for function in checked}, "manual_seed_all": manual_seed}


@contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """Give this process a GPU for a while."""
    global _gpu
    with pytest.MonkeyPatch.context() as patch:
        _gpu = gpu = PretendGPU()
        for owner, name, function in replaced_functions(gpu):
            patch.setattr(owner, name, function, raising=False)
        try:
            with gpu:
                yield gpu
        finally:
            _gpu = None
