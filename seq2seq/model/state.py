"""What a decoder remembers between two steps, as a value; select and reorder written once for every model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

Tree = Any  # a Tensor, None, or a (named) tuple of trees


def map_tree(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same tree with the function applied to each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    mapped = (map_tree(function, part) for part in tree)
    return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)


@dataclass(frozen=True)
class State:
    """B sentences with `beam` hypotheses each: `fixed` has B rows, `moving` B × beam, a sentence's rows together."""

    fixed: Tree  # belongs to the sentence: the projected memory
    moving: Tree  # belongs to the hypothesis: past keys and values, or recurrent states
    length: int = 0  # target positions seen so far
    beam: int = 1

    def select(self, rows_R: Tensor, beam: int) -> State:
        """Rows of this state as a new one with `beam` rows for each sentence that is kept."""
        sentences_B = rows_R[::beam] // self.beam
        fixed = map_tree(lambda x: x.index_select(0, sentences_B), self.fixed)
        return replace(self.reorder(rows_R), fixed=fixed, beam=beam)

    def reorder(self, rows_R: Tensor) -> State:
        """Hypotheses re-ranked inside their sentences: what belongs to the sentence stays where it is."""
        return replace(self, moving=map_tree(lambda x: x.index_select(0, rows_R), self.moving))

    def advance(self, moving: Tree, positions: int) -> State:
        """The state after `positions` more target tokens."""
        return replace(self, moving=moving, length=self.length + positions)
