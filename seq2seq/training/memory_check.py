"""Check before the first update that the largest batches fit into memory, and find a budget that fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from seq2seq.data.batching import worst_batch
from seq2seq.data.corpus import Corpus
from seq2seq.inference.translator import Translator
from seq2seq.training.loss import training_loss
from seq2seq.training.trainer import Trainer
from seq2seq.utils.device import out_of_memory
from seq2seq.utils.errors import UserError

SMALLEST = 64  # tokens; the smallest useful budget
WORTH_TRYING = {"cpu": 2**12}  # larger batches are no faster there
WORTH_TRYING_ON_GPU = 2**17


def rehearse_all(trainer: Trainer, corpus: Corpus) -> str:
    """Try the worst batch and the widest beam; find the budget for `tokens=auto` → the result in words."""
    state, tokens = trainer.state, trainer.state.config.training.tokens
    told = ""
    if tokens == "auto" or not survives(trainer, tokens):
        highest = tokens if tokens != "auto" else WORTH_TRYING.get(trainer.device.type, WORTH_TRYING_ON_GPU) + 1
        fitting = min(state.world.gather(largest_budget(trainer, highest)))
        if not fitting:
            raise UserError(f"out of memory: not even a batch of {SMALLEST} tokens fits; take a smaller model")
        if tokens != "auto":
            raise UserError(
                f"training.tokens: the longest batch of {tokens:,} does not fit into memory, but {fitting:,} does; "
                f"set training.tokens={fitting} training.update_tokens={tokens} for updates of about the same size"
            )
        training = replace(state.config.training, tokens=fitting)
        state.config, state.batches.tokens = replace(state.config, training=training), fitting
        limit = "more does not fit" if fitting < highest - 1 else "more brings no speed here"
        told = f"training.tokens={fitting:,} (auto: {limit}); "
    try:
        rehearse_search(trainer, corpus)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        search = state.config.search
        raise UserError(
            f"search.tokens: {search.tokens:,} tokens with a beam of {search.beam} do not fit into memory; "
            f"try search.tokens={search.tokens // 2}"
        ) from None
    return f"{told}the longest batch fits"


def largest_budget(trainer: Trainer, below: int) -> int:
    """Return the largest power of two below `below` whose worst batch fits, trying ever smaller ones; 0: none."""
    tokens = 2 ** ((below - 1).bit_length() - 1)
    while tokens >= SMALLEST and not survives(trainer, tokens):
        tokens //= 2
    return tokens if tokens >= SMALLEST else 0


def survives(trainer: Trainer, tokens: int) -> bool:
    try:
        rehearse(trainer, tokens)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def rehearse(trainer: Trainer, tokens: int) -> None:
    """Run the worst batch of a budget through forward, backward and update, without side effects."""
    state, model = trainer.state, trainer.working.model.train()
    with _undisturbed(trainer):
        batch = worst_batch(state.batches.encoded, tokens).to(trainer.device)
        training_loss(trainer.compute, batch, state.config.training)[0].backward()
        trainer.working.hand_over_gradients()
        for p in state.model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        if state.progress.update == 0:
            state.optimizer.step(0.0)
    model.eval()


def rehearse_search(trainer: Trainer, corpus: Corpus) -> None:
    """Translate a full search batch of copies of the longest validation sentence."""
    if trainer.device.type == "cpu":
        return  # there a search takes seconds, and far less memory than the batch that just fitted
    state, config = trainer.state, trainer.state.config
    longest = max(corpus.source, key=len)
    width = len(state.tokenizer.encode_source([longest])[0])
    copies = max(1, config.search.tokens // (width * config.search.beam))
    translator = Translator(trainer.working.model.eval(), state.tokenizer, trainer.device, config.model.max_length)
    translator.translate([longest] * copies, config.search)


@contextmanager
def _undisturbed(trainer: Trainer) -> Iterator[None]:
    """Restore random generators, gradients and moments afterwards."""
    state, random = trainer.state, trainer.state.random()
    try:
        yield
    finally:
        state.model.zero_grad()
        trainer.working.model.zero_grad()
        if state.progress.update == 0:
            state.optimizer.clear()
        state.set_random(random)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
