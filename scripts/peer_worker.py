"""What the benchmarks run in the peers' environment, without this project: Hugging Face and CTranslate2.

`benchmark_gpu.py` decodes random ids, each batch to one length; the other benchmarks translate text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

PAD, UNKNOWN, BEGIN, END = range(4)
BATCH = 64  # sentences; larger batches are no faster for either on a CPU
Translate = Callable[[Sequence[str]], list[str]]


def build(norm_position: str, **settings: Any) -> Any:
    """A model whose parts are this project's: Marian's layers are post-norm; Pegasus's are the same, pre-norm."""
    import transformers

    family = {"post": "Marian", "pre": "Pegasus"}[norm_position]
    config = getattr(transformers, f"{family}Config")(
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        forced_eos_token_id=None,
        decoder_start_token_id=BEGIN,
        scale_embedding=True,
        max_position_embeddings=512,
        **settings,
    )
    model = {"post": "MarianMTModel", "pre": "PegasusForConditionalGeneration"}[norm_position]
    return getattr(transformers, model)(config)


def sizes(
    width: int, feed_forward: int, layers: tuple[int, int], heads: int, activation: str = "relu"
) -> dict[str, Any]:
    """Settings of a model under the names that Hugging Face gives them."""
    sides = {"encoder": layers[0], "decoder": layers[1]}
    named = {
        f"{side}_{name}": n for side in sides for name, n in (("attention_heads", heads), ("ffn_dim", feed_forward))
    }
    return {
        "d_model": width,
        "activation_function": activation,
        **named,
        **{f"{s}_layers": n for s, n in sides.items()},
    }


# ----------------------------------------------------------------------------------------- training


def described(folder: Path) -> Any:
    """The model that the benchmark described."""
    description = json.loads((folder / "model.json").read_text())
    return build(description["norm_position"], **description["settings"])


def train(folder: Path, precision: str, device: str, every: int = 5) -> None:
    """A plain loop over stored batches: fused AdamW, clipped gradients, label smoothing; a line every few updates."""
    arrays = np.load(folder / "batches.npz")
    model = described(folder).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, began = 0, time.perf_counter()
    for i in range(len(arrays.files) // 2):
        source, target = (torch.from_numpy(arrays[f"{i}.{side}"]).to(device) for side in ("source", "target"))
        begin = target.new_full((len(target), 1), BEGIN)
        target_in = torch.cat((begin, target[:, :-1]), 1)
        with torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext():
            logits = model(input_ids=source, attention_mask=source != PAD, decoder_input_ids=target_in).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), target.flatten(), ignore_index=PAD, label_smoothing=0.1
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((arrays[f"{i}.target"] != PAD).sum())
        if (i + 1) % every == 0:
            loss.item()  # waits for the device
            print(f"update {i + 1}: {tokens / (time.perf_counter() - began):,.0f} tokens/s", flush=True)
            tokens, began = 0, time.perf_counter()


# ----------------------------------------------------------------------------------------- decoding


def with_weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    model = described(folder).eval()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    tied = ("embed_tokens.weight", "lm_head.weight", "final_logits_bias")
    assert not unexpected and all(name.endswith(tied) for name in missing), (missing, unexpected)
    model.tie_weights()
    return model


def hugging_face(folder: Path, beam: int) -> Translate:
    """`generate` on sentences of like length together."""
    import sentencepiece

    model = with_weights(folder)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "source.model"))
    words = sentencepiece.SentencePieceProcessor(str(folder / "target.model"))

    @torch.inference_mode()
    def translate(sentences: Sequence[str]) -> list[str]:
        encoded = [[*ids, END] for ids in pieces.encode(list(sentences))]
        order, translated = sorted(range(len(encoded)), key=lambda i: len(encoded[i])), [""] * len(encoded)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            longest = len(encoded[rows[-1]])
            ids = torch.tensor([encoded[i] + [PAD] * (longest - len(encoded[i])) for i in rows])
            found = model.generate(
                input_ids=ids,
                attention_mask=ids != PAD,
                num_beams=beam,
                do_sample=False,
                max_new_tokens=2 * longest + 10,
                length_penalty=1.0,
                suppress_tokens=[PAD, UNKNOWN, BEGIN],
            )
            for i, row in zip(rows, found.tolist(), strict=True):
                translated[i] = words.decode([token for token in row if token > END])
        return translated

    return translate


def ctranslate2(folder: Path, beam: int, workers: int = 1) -> Translate:
    """All threads on one batch, or so many batches side by side."""
    import ctranslate2 as library
    import sentencepiece

    threads = torch.get_num_threads() // workers
    translator = library.Translator(str(folder), inter_threads=workers, intra_threads=threads, compute_type="default")
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "source.model"))
    words = sentencepiece.SentencePieceProcessor(str(folder / "target.model"))

    def translate(sentences: Sequence[str]) -> list[str]:
        encoded = pieces.encode(list(sentences), out_type=str)
        found = translator.translate_batch(
            encoded,
            beam_size=beam,
            max_batch_size=BATCH,
            length_penalty=1.0,
            disable_unk=True,
            max_decoding_length=2 * max(map(len, encoded)) + 10,
        )
        return words.decode([result.hypotheses[0] for result in found])

    return translate


def hugging_face_ids(folder: Path, beam: int, precision: str, device: str) -> Callable[[Any], Any]:
    """`generate` on a padded batch of ids, to the length of the longest."""
    model = with_weights(folder).to(device, getattr(torch, precision))

    @torch.inference_mode()
    def decode(source_BS: Any) -> Any:
        ids, length = torch.from_numpy(source_BS).to(device), source_BS.shape[1]
        return model.generate(
            input_ids=ids,
            attention_mask=ids != PAD,
            num_beams=beam,
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
            length_penalty=1.0,
            suppress_tokens=[PAD, UNKNOWN, BEGIN],
        ).cpu()[:, 1:]

    return decode


def ctranslate2_ids(folder: Path, beam: int, precision: str, device: str) -> Callable[[Any], Any]:
    """The same in CTranslate2, whose export names every id by its digits."""
    import ctranslate2 as library

    translator = library.Translator(str(folder), device=device, compute_type=precision)

    def decode(source_BS: Any) -> Any:
        found = translator.translate_batch(
            [[str(i) for i in row if i not in (PAD, END)] for row in source_BS],
            beam_size=beam,
            length_penalty=1.0,
            min_decoding_length=source_BS.shape[1],
            max_decoding_length=source_BS.shape[1],
            suppress_sequences=[["<unk>"], ["<s>"], ["<pad>"]],
        )
        return np.array([[int(piece) for piece in result.hypotheses[0]] for result in found])

    return decode


def measure_ids(decode: Callable[[Any], Any], arrays: Any, seconds: float) -> dict[str, Any]:
    """Tokens a second over stored batches, each sentence counted as long as its source."""
    decode(arrays["0"])
    tokens, began = 0, time.perf_counter()
    for name in arrays.files:
        decode(arrays[name])
        tokens += int((arrays[name] != PAD).sum())
        if time.perf_counter() > began + seconds:
            break
    return {"tokens_per_second": tokens / (time.perf_counter() - began)}


def measure(translate: Translate, sentences: list[str], alone: int) -> dict[str, Any]:
    """Text to text: all sentences at once, after a round that warms up, then the first few one by one."""
    translate(sentences)  # all: few would not start the worker processes
    began = time.perf_counter()
    outputs = translate(sentences)
    seconds, latencies = time.perf_counter() - began, []
    for sentence in sentences[:alone]:
        began = time.perf_counter()
        translate([sentence])
        latencies.append(time.perf_counter() - began)
    return {"seconds": seconds, "latencies": latencies, "outputs": outputs}


def main(what: str, *arguments: str) -> None:
    if what == "train":
        folder, precision, device = arguments
        train(Path(folder), precision, device)
        return
    if what.endswith("-ids"):
        folder, beam, precision, device, seconds = arguments
        load = {"transformers-ids": hugging_face_ids, "ctranslate2-ids": ctranslate2_ids}[what]
        arrays = np.load(Path(folder) / f"decoding-{beam}.npz")
        print(json.dumps(measure_ids(load(Path(folder), int(beam), precision, device), arrays, float(seconds))))
        return
    folder, file, beam, alone = arguments
    if what == "huggingface":
        translate = hugging_face(Path(folder), int(beam))
    else:
        workers = torch.get_num_threads() if what == "ctranslate2-workers" else 1
        translate = ctranslate2(Path(folder), int(beam), workers)
    sentences = Path(file).read_text(encoding="utf-8").split("\n")
    print(json.dumps(measure(translate, sentences, int(alone))))


if __name__ == "__main__":
    main(*sys.argv[1:])
