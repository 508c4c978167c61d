"""The small parts of both models: embedding, feed-forward, normalisation, residual, dropout, initialisation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero a share p of x and scale up the rest, so that the mean stays."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * _kept(x, p)


WINDOW = 2**22


def _kept(x: Tensor, p: float) -> Tensor:
    """What x is multiplied with: 0 or 1 / (1 − p).

    On a CPU drawing a number for each place is slow. Windows at random places of one table of such draws took 11 % off
    an update, beside a byte drawn for each place.
    """
    table = _draws(p, x.dtype)
    counts = [min(WINDOW, x.numel() - start) for start in range(0, max(1, x.numel()), WINDOW)]
    windows = [table.narrow(0, int(torch.randint(WINDOW, ())), count) for count in counts]
    return (windows[0] if len(windows) == 1 else torch.cat(windows)).view(x.shape)


@lru_cache(maxsize=8)
def _draws(p: float, dtype: torch.dtype) -> Tensor:
    """The same in every process, so that a run is a function of its seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        kept = torch.rand(2 * WINDOW, generator=generator) >= p
        return kept.to(dtype) / (1 - p)


def drop_rows(x_RTD: Tensor, p: float, training: bool, *, words: bool) -> Tensor:
    """Zero a share p of all words, or of all sentences, as a whole; the rest is scaled up, so that the mean stays."""
    if not training or p == 0:
        return x_RTD
    R, T, _ = x_RTD.shape
    kept = torch.rand(R, T if words else 1, 1, device=x_RTD.device) >= p
    return x_RTD * (kept.to(x_RTD.dtype) / (1 - p))


def either(p: float | None, otherwise: float) -> float:
    """A dropout rate of its own, or the one that it follows."""
    return otherwise if p is None else p


class Packing(NamedTuple):
    """Where the real tokens of padded rows stand: what sees one token at a time then computes no padding."""

    place_M: Tensor  # of each real token among all places, row by row
    rows: int
    width: int

    def pack(self, x_RTD: Tensor) -> Tensor:
        packed_MD: Tensor = _Pack.apply(x_RTD.flatten(0, 1), self.place_M)  # type: ignore[no-untyped-call]
        return packed_MD

    def unpack(self, x_MD: Tensor) -> Tensor:
        """Rows again, with zeros for padding."""
        places = x_MD.new_zeros(self.rows * self.width, x_MD.shape[1])
        return places.index_copy(0, self.place_M, x_MD).view(self.rows, self.width, -1)


class _Pack(torch.autograd.Function):
    """Rows picked out: none is picked twice, so the way back copies where torch's own adds one after the other."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.places = len(x_PD)
        return x_PD.index_select(0, place_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        (place_M,) = ctx.saved_tensors
        return grad_MD.new_zeros(ctx.places, grad_MD.shape[1]).index_copy_(0, place_M, grad_MD), None


class Residual(nn.Module):
    """Around every layer: x + dropout(layer(norm(x))) for pre-norm, norm(x + dropout(layer(x))) for post-norm."""

    def __init__(self, width: int, norm: str, place: str, p: float, skip: float = 0.0) -> None:
        super().__init__()
        self.norm = build_norm(norm, width)
        self.pre, self.p, self.skip = place == "pre", p, skip

    def enter(self, x: Tensor) -> Tensor:
        """What the layer sees."""
        return self.norm(x) if self.pre else x

    def leave(self, x: Tensor, change: Tensor) -> Tensor:
        """x with what the layer made of it."""
        x = x + drop_rows(dropout(change, self.p, self.training), self.skip, self.training, words=False)
        return x if self.pre else self.norm(x)


def build_norm(kind: str, width: int) -> nn.Module:
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-5)


class FeedForward(nn.Module):
    """Two linear maps around an activation (Vaswani §3.3); SwiGLU gates with a third (Shazeer 2020, §2)."""

    def __init__(self, width: int, hidden: int, activation: str, p: float) -> None:
        super().__init__()
        self.activation, self.p = activation, p
        self.inner = nn.Linear(width, 2 * hidden if activation == "swiglu" else hidden)
        self.outer = nn.Linear(hidden, width)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        if self.activation == "swiglu":
            hidden, gate = hidden.chunk(2, dim=-1)
            hidden = hidden * F.silu(gate)
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        elif self.activation == "relu":
            hidden = F.relu(hidden)
        return self.outer(dropout(hidden, self.p, self.training))

    def prepare(self) -> None:
        """Relu as part of the product before it: the same numbers, and greedily 3 % more sentences a second."""
        if self.activation == "relu":
            self.add_module("inner", PreparedLinear(self.inner.weight, self.inner.bias, "relu"))
            self.activation = "none"


class PreparedLinear(nn.Module):
    """A linear map for translating on a CPU, its weights laid out once as oneDNN multiplies them.

    `nn.Linear` does so at each product, or takes a slower library: float32 translates 1.4 times as fast, and a single
    sentence in bfloat16 comes a seventh earlier.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, then: str = "none") -> None:
        super().__init__()
        self.then = then
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 64)
        self.bias_O = None if bias_O is None else bias_O.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias_O, self.then, [], "")
        return y

    @staticmethod
    def possible(weight: Tensor) -> bool:
        """Whether this machine has the library, and it takes numbers of this type."""
        return (
            weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )


def embedding(vocabulary: int, width: int) -> nn.Embedding:
    """A table whose rows have length about one; multiply by √width for entries of size one."""
    table = nn.Embedding(vocabulary, width)
    nn.init.normal_(table.weight, std=width**-0.5)
    return table


def initialise(module: nn.Module) -> None:
    """Xavier (Glorot & Bengio 2010) for every matrix below, zeros for its biases; gains keep their ones."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, (nn.Linear, nn.Conv1d)) and name == "bias":
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
