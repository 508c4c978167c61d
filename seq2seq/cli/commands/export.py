"""seq2seq export: a CTranslate2 model of a run, with the proof that it translates alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sacrebleu

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import ExportConfig, TrainConfig, TransformerConfig
from seq2seq.data.corpus import Corpus, load_split
from seq2seq.data.tokenizer import END, Tokenizer
from seq2seq.evaluation.testsets import moved
from seq2seq.inference.checkpoint import CONFIG, load_checkpoint, read_config
from seq2seq.inference.ctranslate2 import Here, There, import_ctranslate2, prove, save_ctranslate2, unsupported
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run

BEAMS = (1, 5)
README = """\
# {name}

A seq2seq model, {source} → {target}, written for CTranslate2 {version} with weights in {quantization}.
`pip install ctranslate2 sentencepiece`, then:

```python
import ctranslate2, sentencepiece

folder = "{folder}"
translator = ctranslate2.Translator(folder)
source, target = (sentencepiece.SentencePieceProcessor(f"{{folder}}/{{side}}.model") for side in ("source", "target"))
print(target.decode(translator.translate_batch([source.encode("…", out_type=str)], disable_unk=True)[0].hypotheses[0]))
```

For many sentences try a core for each batch: `ctranslate2.Translator(folder, inter_threads=CORES, intra_threads=1)`.

{proof}
"""


def export(config: ExportConfig) -> None:
    """Convert the model and prove it equal; the folder appears only after the proof."""
    run = Run.find(config.run, config.outputs)
    print(f"run        {run.folder}")
    folder = run.checkpoint(config.checkpoint)
    stored = read_config(folder / CONFIG)
    if problems := unsupported(stored.model):
        raise UserError(*problems)
    version = import_ctranslate2().__version__
    output = Path(config.output) if config.output else run.folder / f"ctranslate2-{config.quantization}"
    if output.exists() and not config.overwrite:
        raise UserError(f"output: {output} is there already; set overwrite=true, or name another folder")
    corpus = validation(config, stored)
    with aside(output) as place:
        told = convert(config, folder, place, corpus)
        names = {"name": run.folder.name, "source": stored.data.source, "target": stored.data.target}
        facts = {"version": version, "quantization": config.quantization, "folder": output.as_posix()}
        readme = README.format(**names, **facts, proof="\n".join(f"- {line}" for line in told))
        (place / "README.md").write_text(readme, encoding="utf-8")
    print(f"written    {output}; its README.md shows how to use it")


def validation(config: ExportConfig, stored: TrainConfig) -> Corpus:
    data = moved(stored.data, config.data_path) if config.data_path else stored.data
    corpus = load_split(data, "validation", stored.seed)
    if corpus is None:
        raise UserError(f"{data.name} has no validation set to prove the export on; name its place: data_path=FOLDER")
    return corpus


def convert(config: ExportConfig, checkpoint: Path, place: Path, corpus: Corpus) -> list[str]:
    """Save the converted model, and return what was proven about it."""
    stored, tokenizer, model = load_checkpoint(checkpoint)
    assert isinstance(stored.model, TransformerConfig)
    rows = [i for i in range(len(corpus)) if corpus.source[i].strip()][: config.sentences]
    most = stored.model.max_length
    sources = [ids if len(ids) <= most else [*ids[: most - 1], END] for ids in encoded(tokenizer, corpus, rows)]
    sentences, references = [corpus.source[i] for i in rows], [corpus.target[i] for i in rows]
    # Twice the longest sentence: a model that finds no end need not run on for hundreds of subwords.
    longest = min(most, 2 * len(sources[-1]) + 10)
    save_ctranslate2(model.eval(), stored.model, tokenizer, place, "float32")
    here, there = Here(model, search_preset("beam"), longest), There(place, tokenizer, longest)
    told = []
    for beam in BEAMS:
        proof = prove(here, there, sentences, sources, beam)
        if problem := proof.problem():
            raise UserError(f"export refused, nothing is written: CTranslate2 and seq2seq disagree; {problem}")
        equal = f"{proof.equal:,} of {proof.sentences:,} translations equal those of seq2seq"
        told.append(
            f"float32, beam {beam}: {equal}; log probabilities a subword differ by up to {proof.difference:.0e}"
        )
        print(f"proof      {told[-1]}")
    if config.quantization != "float32":
        full = there.translate(sources, BEAMS[-1], length_penalty=1.0)
        for file in place.iterdir():
            file.unlink()
        save_ctranslate2(model, stored.model, tokenizer, place, config.quantization)
        rounded = There(place, tokenizer, longest)
        small = rounded.translate(sources, BEAMS[-1], length_penalty=1.0)
        how = f"{config.quantization}, computed in {rounded.computed}, beam {BEAMS[-1]}"
        told.append(f"{how}: {agreement(tokenizer, full, small, references)}")
        print(f"agreement  {told[-1]}")
    return told


def encoded(tokenizer: Tokenizer, corpus: Corpus, rows: list[int]) -> list[list[int]]:
    """Encode the sources of these rows, and sort `rows` in place by length."""
    found = dict(zip(rows, tokenizer.encode_source([corpus.source[i] for i in rows]), strict=True))
    rows.sort(key=lambda i: len(found[i]))
    return [found[i] for i in rows]


def agreement(tokenizer: Tokenizer, full: list[list[int]], small: list[list[int]], references: list[str]) -> str:
    """Report how much of the float32 output remains after quantization."""
    equal = sum(a == b for a, b in zip(full, small, strict=True))
    scores = [
        sacrebleu.corpus_bleu([tokenizer.decode(ids) for ids in said], [references], force=True).score
        for said in (full, small)
    ]
    return f"{equal / len(full):.1%} of translations as in float32, BLEU {scores[1]:.2f} after {scores[0]:.2f}"


@contextmanager
def aside(output: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed when complete and removed after an error."""
    place = output.with_name(f".{output.name}")
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir(parents=True)
        yield place
        shutil.rmtree(output, ignore_errors=True)
        place.rename(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
