"""Encoder and decoder protocols, and the model around them.

Shapes: B sentences, R rows (B × beam), S source and T target positions, V vocabulary, D width, U words of a shortlist,
X rows and positions of a sentence.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2seq.config.schema import ModelConfig
from seq2seq.data.encoding import Batch
from seq2seq.data.tokenizer import Vocabulary
from seq2seq.model.decoder_state import State
from seq2seq.model.layers import drop_rows, embedding, value_or
from seq2seq.model.layout import PADDED, Layout, Packed
from seq2seq.model.packed_attention import use_packed_kernel

GATHERED = 16  # sentences whose shortlisted weights are gathered together


class Memory(NamedTuple):
    """The output of an encoder."""

    states_BSD: Tensor
    mask_BS: Tensor
    layout: Layout = PADDED  # of the states

    def padded(self) -> Memory:
        return Memory(self.layout.unpack(self.states_BSD), self.mask_BS)


class Decoded(NamedTuple):
    features_RTD: Tensor
    state: State
    weights: tuple[Tensor, ...]  # cross-attention, RNTS per layer, on request


class Encoder(Protocol):
    def __call__(self, source_BSD: Tensor, mask_BS: Tensor, layout: Layout = PADDED) -> Memory: ...


class Decoder(Protocol):
    """One call serves training (all positions together) and search (one position).

    Packed targets yield packed features, as M rows.
    """

    def start(self, memory: Memory) -> State: ...

    def __call__(self, target_RTD: Tensor, state: State, weights: bool = False, layout: Layout = PADDED) -> Decoded: ...


class OutputTable(nn.Embedding):
    """Target embeddings that score features: a logit for each word; its weights may be those of another table."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)  # draws no other weights
        self.weight = table.weight

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)

    def shortlisted(self, features_RTD: Tensor, shortlist_BU: Tensor) -> Tensor:
        return shortlisted(self.weight, features_RTD, shortlist_BU)


def shortlisted(weight_VD: Tensor, features_RTD: Tensor, shortlist_BU: Tensor) -> Tensor:
    """Return the logits of each sentence's own words: −∞ where an id is below 0.

    A few sentences at a time, whose weights stay in the cache.
    """
    (B, U), (_, T, D) = shortlist_BU.shape, features_RTD.shape
    features_BXD = features_RTD.reshape(B, -1, D)
    parts = [
        x_bXD @ weight_VD.index_select(0, ids_bU.clamp(min=0).flatten()).view(-1, U, D).transpose(1, 2)
        for x_bXD, ids_bU in zip(features_BXD.split(GATHERED), shortlist_BU.split(GATHERED), strict=True)
    ]
    return torch.cat(parts).masked_fill_(shortlist_BU[:, None] < 0, -math.inf).view(-1, T, U)


class Seq2Seq(nn.Module):
    """Embeddings, encoder, decoder and output table."""

    def __init__(
        self, encoder: Encoder, decoder: Decoder, vocabulary: Vocabulary, width: int, config: ModelConfig
    ) -> None:
        super().__init__()
        tie, self.word_dropout = config.tie_embeddings, config.word_dropout
        self.source_embedding = embedding(vocabulary.source, width)
        self.encoder = encoder
        self.target_embedding = self.source_embedding if tie == "all" else embedding(vocabulary.target, width)
        self.decoder = decoder
        self.output = OutputTable(self.target_embedding if tie != "none" else embedding(vocabulary.target, width))
        self.size = sum(p.numel() for p in self.parameters())  # counted before they are prepared for inference

    def start(self, source_BS: Tensor, mask_BS: Tensor) -> State:
        """Encode the sources and return the initial decoder state."""
        return self.decoder.start(self.encoder(self.source_embedding(source_BS), mask_BS))

    def decode(self, target_RT: Tensor, state: State, weights: bool = False) -> Decoded:
        return self.decoder(self.target_embedding(target_RT), state, weights)

    def logits(self, features: Tensor, shortlist_BU: Tensor | None = None) -> Tensor:
        """Return the logits of all words, or of those of each sentence's shortlist, padded with ids below 0."""
        return self.output(features) if shortlist_BU is None else self.output.shortlisted(features, shortlist_BU)

    def step(self, target_RT: Tensor, state: State, shortlist_BU: Tensor | None = None) -> tuple[Tensor, State]:
        """Decode more target tokens; return the logits after each, and the new state."""
        features_RTD, state, _ = self.decode(target_RT, state)
        return self.logits(features_RTD, shortlist_BU), state

    def forward(self, batch: Batch, word_dropout: float | None = None, packing: bool = False) -> Tensor:
        """Return features_MD at every real target token of a batch, for `logits` or the loss.

        With `packing`, only attention computes padding, and where it stays packed nothing does.
        """
        p = value_or(word_dropout, self.word_dropout)
        source, target = Packed.source(batch), Packed.target(batch)
        if packing and use_packed_kernel(batch.source_BS):
            source, target = source.with_bounds(), target.with_bounds()
        source_BSD = drop_rows(self.source_embedding(batch.source_BS), p, self.training, words=True)
        memory = self.encoder(source_BSD, batch.source_mask_BS, source if packing else PADDED)
        target_BTD = drop_rows(self.target_embedding(batch.target_in_BT), p, self.training, words=True)
        layout = target if packing else PADDED
        features = self.decoder(target_BTD, self.decoder.start(memory), layout=layout).features_RTD
        return features if packing else target.pack(features)
