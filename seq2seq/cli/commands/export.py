"""seq2seq export: convert a run to CTranslate2, and verify that both translate alike."""

from __future__ import annotations

from pathlib import Path

import sacrebleu

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import ExportConfig, TrainConfig, TransformerConfig
from seq2seq.data.corpus import SIDES, Corpus, load_split
from seq2seq.data.shortlist import Shortlist
from seq2seq.data.tokenizer import END, Tokenizer
from seq2seq.evaluation.testsets import relocate
from seq2seq.inference.checkpoint import CONFIG, load_checkpoint, read_config
from seq2seq.inference.ctranslate2 import (
    VOCABULARY_MAP,
    CTranslate2Engine,
    TorchEngine,
    compare_engines,
    import_ctranslate2,
    save_ctranslate2,
    save_vocabulary_map,
    unsupported,
)
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import folder_written_atomically
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

For many sentences use one core per batch: `ctranslate2.Translator(folder, inter_threads=CORES, intra_threads=1)`.

{findings}
"""


def export(config: ExportConfig) -> None:
    """Convert the model and verify its output; the folder appears only if it agrees."""
    run = Run.find(config.run, config.outputs)
    print(f"run        {run.folder}")
    folder = run.checkpoint(config.checkpoint)
    stored = read_config(folder / CONFIG)
    if problems := unsupported(stored.model):
        raise UserError(*problems)
    version = import_ctranslate2().__version__
    output = Path(config.output) if config.output else run.folder / f"ctranslate2-{config.quantization}"
    if output.exists() and not config.overwrite:
        raise UserError(f"output: {output} already exists; set overwrite=true, or choose another folder")
    corpus = validation(config, stored)
    try:
        with folder_written_atomically(output) as tmp_dir:
            findings = convert(config, folder, tmp_dir, corpus)
            names = {"name": run.folder.name, **dict(zip(SIDES, stored.data.languages, strict=True))}
            details = {"version": version, "quantization": config.quantization, "folder": output.as_posix()}
            readme = README.format(**names, **details, findings="\n".join(f"- {line}" for line in findings))
            (tmp_dir / "README.md").write_text(readme, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None
    print(f"written    {output}; its README.md shows how to use it")


def validation(config: ExportConfig, stored: TrainConfig) -> Corpus:
    data = relocate(stored.data, config.data_path) if config.data_path else stored.data
    corpus = load_split(data, "validation", stored.seed)
    if corpus is None:
        raise UserError(f"{data.name} has no validation set to verify the export with; set data_path=FOLDER")
    return corpus


def convert(config: ExportConfig, checkpoint: Path, tmp_dir: Path, corpus: Corpus) -> list[str]:
    """Save the converted model, and return what was verified."""
    stored, tokenizer, model = load_checkpoint(checkpoint)
    shortlist = Shortlist.load(checkpoint, tokenizer.vocabulary)
    assert isinstance(stored.model, TransformerConfig)
    rows = [i for i in range(len(corpus)) if corpus.source[i].strip()][: config.sentences]
    most = stored.model.max_length
    sources = [ids if len(ids) <= most else [*ids[: most - 1], END] for ids in encoded(tokenizer, corpus, rows)]
    sentences, references = [corpus.source[i] for i in rows], [corpus.target[i] for i in rows]
    # Twice the longest sentence: a model that finds no end need not run on for hundreds of subwords.
    longest = min(most, 2 * len(sources[-1]) + 10)
    save_ctranslate2(model.eval(), stored.model, tokenizer, tmp_dir, "float32")
    torch_engine, ct2_engine = (
        TorchEngine(model, search_preset("beam"), longest),
        CTranslate2Engine(tmp_dir, tokenizer, longest),
    )
    print(f"verifying  {len(rows):,} validation sentences in both programs", flush=True)
    findings = [verify(torch_engine, ct2_engine, sentences, sources, beam) for beam in BEAMS]
    if config.quantization != "float32":
        full = ct2_engine.translate(sources, BEAMS[-1], length_penalty=1.0)
        for file in tmp_dir.iterdir():
            file.unlink()
        save_ctranslate2(model, stored.model, tokenizer, tmp_dir, config.quantization)
        rounded = CTranslate2Engine(tmp_dir, tokenizer, longest)
        small = rounded.translate(sources, BEAMS[-1], length_penalty=1.0)
        how = f"{config.quantization}, computed in {rounded.compute_type}, beam {BEAMS[-1]}"
        findings.append(f"{how}: {agreement(tokenizer, full, small, references)}")
        print(f"agreement  {findings[-1]}")
    if shortlist:
        save_vocabulary_map(shortlist, tokenizer, tmp_dir)
        findings.append(f"{VOCABULARY_MAP}: shortlists, used by `translate_batch(…, use_vmap=True)`")
    return findings


def verify(
    ours: TorchEngine, theirs: CTranslate2Engine, sentences: list[str], sources: list[list[int]], beam: int
) -> str:
    """Compare the translations and scores of both engines, and return a summary; a disagreement is an error."""
    comparison = compare_engines(ours, theirs, sentences, sources, beam)
    if problem := comparison.problem():
        raise UserError(f"export refused and nothing written, because CTranslate2 and seq2seq disagree: {problem}")
    equal = f"{comparison.equal:,} of {comparison.sentences:,} translations equal those of seq2seq"
    difference = f"log probabilities per subword differ by up to {comparison.difference:.0e}"
    print(f"verified   float32, beam {beam}: {equal}; {difference}")
    return f"float32, beam {beam}: {equal}; {difference}"


def encoded(tokenizer: Tokenizer, corpus: Corpus, rows: list[int]) -> list[list[int]]:
    """Encode the sources of these rows, and sort `rows` in place by length."""
    ids_by_row = dict(zip(rows, tokenizer.encode_source([corpus.source[i] for i in rows]), strict=True))
    rows.sort(key=lambda i: len(ids_by_row[i]))
    return [ids_by_row[i] for i in rows]


def agreement(tokenizer: Tokenizer, full: list[list[int]], small: list[list[int]], references: list[str]) -> str:
    """Report how much of the float32 output remains after quantization."""
    equal = sum(a == b for a, b in zip(full, small, strict=True))
    scores = [
        sacrebleu.corpus_bleu([tokenizer.decode(ids) for ids in translations], [references], force=True).score
        for translations in (full, small)
    ]
    return f"{equal / len(full):.1%} of translations as in float32, BLEU {scores[1]:.2f} after {scores[0]:.2f}"
