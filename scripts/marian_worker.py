"""MarianMTModel of Hugging Face, for the benchmarks, in an environment of its own, without this project."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import MarianConfig, MarianMTModel

PAD, BEGIN, END = 0, 2, 3


def build(vocabulary: int = 8000, **settings: Any) -> MarianMTModel:
    """The benchmark's architecture: 3 + 3 layers, width 256, feed-forward 1024, 4 heads."""
    sides = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 3), ("attention_heads", 4))
    }
    feed_forward = {"encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=256,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        forced_eos_token_id=None,
        decoder_start_token_id=BEGIN,
        scale_embedding=True,
        activation_function="relu",
        share_encoder_decoder_embeddings=True,
        max_position_embeddings=512,
        **{**sides, **feed_forward, **settings},
    )
    return MarianMTModel(config)


def train(path: str, precision: str, every: int = 5) -> None:
    """A plain loop over stored batches: fused AdamW, clipped gradients, label smoothing; a line every few updates."""
    arrays = np.load(path)
    model = build(dropout=0.2, attention_dropout=0.2, activation_dropout=0.2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, began = 0, time.perf_counter()
    for i in range(len(arrays.files) // 2):
        source, target = torch.from_numpy(arrays[f"{i}.source"]), torch.from_numpy(arrays[f"{i}.target"])
        begin = torch.full((len(target), 1), BEGIN)
        target_in = torch.cat((begin, target[:, :-1]), 1)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
            logits = model(input_ids=source, attention_mask=source != PAD, decoder_input_ids=target_in).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), target.flatten(), ignore_index=PAD, label_smoothing=0.1
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((target != PAD).sum())
        if (i + 1) % every == 0:
            print(f"update {i + 1}: {tokens / (time.perf_counter() - began):,.0f} tokens/s", flush=True)
            tokens, began = 0, time.perf_counter()


if __name__ == "__main__":
    train(*sys.argv[2:])
