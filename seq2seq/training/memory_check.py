"""Check before the first update that the largest batches fit into memory, and find a budget that fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from seq2seq.config.schema import settled
from seq2seq.data.batching import largest_batch
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import Batch
from seq2seq.inference.translator import Translator, token_budget
from seq2seq.training.loss import training_loss
from seq2seq.training.trainer import Trainer, advise_budget
from seq2seq.training.validation import training_search
from seq2seq.utils.device import out_of_memory
from seq2seq.utils.errors import UserError

MIN_TOKENS = 64  # tokens; the smallest useful budget
MAX_USEFUL_TOKENS = {"cpu": 2**12}  # larger batches are no faster on a CPU
MAX_USEFUL_TOKENS_ON_GPU = 2**17


@dataclass(frozen=True)
class MemoryCheck:
    """The token budget to train with, and a summary for the log."""

    tokens: int
    summary: str


def check_memory(trainer: Trainer, corpus: Corpus) -> MemoryCheck:
    """Try the worst batch and the widest beam; find the budget for `tokens=auto`."""
    state, tokens = trainer.state, trainer.state.config.training.tokens
    summary = "the longest batch fits"
    if state.process_group.shards_weights:
        try_sharded(trainer)
    elif tokens == "auto" or not all(state.process_group.all_gather(fits_in_memory(trainer, tokens))):
        limit = tokens if tokens != "auto" else MAX_USEFUL_TOKENS.get(trainer.device.type, MAX_USEFUL_TOKENS_ON_GPU) + 1
        fitting = min(state.process_group.all_gather(largest_budget(trainer, limit)))
        if not fitting:
            raise UserError(f"out of memory: not even a batch of {MIN_TOKENS} tokens fits; choose a smaller model")
        if tokens != "auto":
            raise UserError(
                f"training.tokens: the longest batch of {tokens:,} does not fit into memory, but {fitting:,} does; "
                f"{advise_budget(state, fitting)}"
            )
        reason = "larger batches do not fit" if fitting < limit - 1 else "larger batches are no faster"
        tokens, summary = fitting, f"training.tokens={fitting:,} (auto: {reason}); {summary}"
    try:
        try_search(trainer, corpus)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        search, budget = state.config.search, token_budget(state.config.search, trainer.device)
        raise UserError(
            f"search.tokens: {budget:,} tokens with a beam of {search.beam} do not fit into memory; "
            f"try search.tokens={budget // 2}"
        ) from None
    return MemoryCheck(settled(tokens), summary)


def try_sharded(trainer: Trainer) -> None:
    """Try the worst batch once: a process that runs out of memory leaves the others waiting for its weights."""
    tokens = trainer.state.config.training.budget
    if not fits_in_memory(trainer, tokens):
        raise UserError(
            f"training.tokens: the longest batch of {tokens:,} does not fit into memory; "
            f"{advise_budget(trainer.state, max(1, tokens // 2))}"
        )


def largest_budget(trainer: Trainer, below: int) -> int:
    """Return the largest power of two below `below` whose worst batch fits, trying ever smaller ones; 0: none."""
    tokens = 2 ** ((below - 1).bit_length() - 1)
    while tokens >= MIN_TOKENS and not fits_in_memory(trainer, tokens):
        tokens //= 2
    return tokens if tokens >= MIN_TOKENS else 0


def fits_in_memory(trainer: Trainer, tokens: int) -> bool:
    batches = trainer.state.batches
    try:
        try_batch(trainer, largest_batch(batches.encoded, tokens, batches.world_size if batches.divide else 1))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def try_batch(trainer: Trainer, batch: Batch) -> None:
    """Run a batch through update, forward and backward, without side effects."""
    state, model = trainer.state, trainer.working.model.train()
    with _restored_afterwards(trainer):
        for p in state.process_group.own_parameters(state.model):
            p.grad = torch.zeros_like(p)
        if state.progress.update == 0:
            state.optimizer.step(0.0)  # later updates also hold the moments in memory
        if not state.config.training.update_tokens:
            state.model.zero_grad()  # gradients stay only where batches are accumulated
        training_loss(trainer.forward_model, batch.to(trainer.device), state.config.training)[0].backward()
        trainer.working.transfer_gradients()
    model.eval()


def try_search(trainer: Trainer, corpus: Corpus) -> None:
    """Translate a full search batch of copies of the longest validation sentence."""
    if trainer.device.type == "cpu":
        return  # a search on a CPU takes seconds, and far less memory than the batch that just fitted
    state, config = trainer.state, trainer.state.config
    longest = max(corpus.source, key=len)
    width = len(state.tokenizer.encode_source([longest])[0])
    copies = max(1, token_budget(config.search, trainer.device) // (width * config.search.beam))
    with trainer.working.with_weights(None) as model:
        translator = Translator(model.eval(), state.tokenizer, trainer.device, config.model.max_length)
        translator.translate([longest] * copies, training_search(config.search))


@contextmanager
def _restored_afterwards(trainer: Trainer) -> Iterator[None]:
    """Restore random generators, gradients and moments afterwards."""
    state, rng_states = trainer.state, trainer.state.rng_states()
    try:
        yield
    finally:
        state.model.zero_grad()
        trainer.working.model.zero_grad()
        if state.progress.update == 0:
            state.optimizer.clear()
        state.set_rng_states(rng_states)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
