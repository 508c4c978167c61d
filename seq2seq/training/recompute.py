"""Less memory for more time: the backward pass recomputes each layer from its input (Chen et al. 2016)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from seq2seq.model.kv_cache import GrowingUpdate


def recompute_layers(model: nn.Module) -> None:
    """Let every layer keep only its input for the backward pass; the second forward pass repeats its dropout."""
    for layers in ("encoder.layers", "decoder.layers"):
        for layer in model.get_submodule(layers).children():
            layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*inputs: Any) -> Any:
        # Each pass extends a cache of its own: a shared one would hold the first pass's keys and values until the end.
        return forward(*(_unshared(x) if isinstance(x, GrowingUpdate) else x for x in inputs))

    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(compute, *inputs, use_reentrant=False)

    return run


def _unshared(cache: GrowingUpdate) -> GrowingUpdate:
    own = copy.copy(cache)
    own.layers = []
    return own
