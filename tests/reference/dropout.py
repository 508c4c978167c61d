"""Stand-ins for dropout that draw nothing: a product and its reference that apply them at the same sites agree.

Each depends on the rate, on the values and on their last index, so that no other site or rate gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Drop = Callable[[Tensor, float], Tensor]


def drop_numbers(x: Tensor, p: float) -> Tensor:
    """For dropout of single numbers; zero stays zero."""
    index = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    return x * (1 + p * torch.cos(index + 3 * x))


def drop_words(x_RTD: Tensor, p: float) -> Tensor:
    """For dropout of whole words: one factor for each."""
    return x_RTD * (1 + p * torch.cos(1 + x_RTD.sum(-1, keepdim=True)))


def drop_sentences(x_RTD: Tensor, p: float) -> Tensor:
    """For dropout of whole sentences: one factor for each, which follows from its first word."""
    return x_RTD * (1 + p * torch.cos(2 + x_RTD[..., :1, :].sum(-1, keepdim=True)))


class Sites(NamedTuple):
    numbers: Drop
    words: Drop
    sentences: Drop


ON = Sites(drop_numbers, drop_words, drop_sentences)
OFF = Sites(*[lambda x, p: x] * 3)
