"""Optimise a trained model for translation on a CPU, from outside, as quantisation libraries do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seq2seq.model import native
from seq2seq.model.int8 import quantize
from seq2seq.model.interface import OutputTable, Seq2Seq, shortlisted
from seq2seq.model.layers import FeedForward


def optimize_for_cpu(model: Seq2Seq, int8: bool = False) -> Seq2Seq:
    """Prepare the products of a model for inference only; on another device the model stays unchanged."""
    if int8:
        quantize(model, native.load().library)
    elif PreparedLinear.is_supported(model.output.weight):
        prepare_products(model)
    return model


def prepare_products(model: nn.Module) -> None:
    """Replace each linear map in the model, together with a ReLU that follows it."""
    for module in [*model.modules()]:
        if isinstance(module, FeedForward) and isinstance(module.activation, nn.ReLU):
            # Same numbers, 3 % more sentences per second in greedy search.
            module.add_module("inner", PreparedLinear(module.inner.weight, module.inner.bias, "relu"))
            module.activation = nn.Identity()
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                module.add_module(name, PreparedLinear(child.weight, child.bias))
            elif isinstance(child, OutputTable):
                module.add_module(name, PreparedOutput(child.weight))


class PreparedLinear(nn.Module):
    """A linear map for CPU inference, with weights reordered once for oneDNN.

    `nn.Linear` reorders them at each product, or uses a slower library: float32 translates 1.4 times as fast, and a
    single sentence in bfloat16 takes a seventh less time.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 64)
        self.bias_O = None if bias_O is None else bias_O.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias_O, self.activation, [], "")
        return y

    @staticmethod
    def is_supported(weight: Tensor) -> bool:
        """Return whether oneDNN is available and supports this data type."""
        return (
            weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )


class PreparedOutput(PreparedLinear):
    """The output table, and its plain rows for shortlists: those of the target embeddings, if these are tied."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__(weight_VD, None)
        self.rows_VD = weight_VD.detach()

    def shortlisted(self, features_RTD: Tensor, shortlist_BU: Tensor) -> Tensor:
        return shortlisted(self.rows_VD, features_RTD, shortlist_BU)
