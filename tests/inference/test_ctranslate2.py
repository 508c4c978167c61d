"""Laws of the export: CTranslate2 translates as this project does, for every part it has; others are refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seq2seq.cli.commands.export import export
from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.config.schema import TransformerConfig
from seq2seq.data.shortlist import Shortlist
from seq2seq.inference import ctranslate2 as exporting
from seq2seq.inference.checkpoint import load_checkpoint
from seq2seq.inference.ctranslate2 import CTranslate2Engine, TorchEngine, compare_engines, save_ctranslate2, unsupported
from seq2seq.model.interface import Seq2Seq
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from tests.helpers.runs import saved_run

needed = pytest.mark.skipif(
    not exporting.is_installed(), reason="CTranslate2 is not installed (pip install ctranslate2)"
)

# Every value that CTranslate2 has a part for is in one of them.
PARTS = [
    ["model.position=sinusoidal"],
    ["model.position=learned", "model.norm_position=post", "model.activation=gelu", "model.tie_embeddings=none"],
    ["model.position=rotary", "model.norm=rms", "model.activation=swiglu", "model.tie_embeddings=output"],
    ["model.position=none", "model.attention.score=general", "tokenizer.joint=false", "model.tie_embeddings=none"],
    ["model.position=rotary", "model.attention.score=general", "model.norm=rms", "model.norm_position=post"],
    ["model.attention.score=dot", "model.activation=swiglu", "model.encoder_layers=1"],
]
LONGEST = 24
SHORT = [f"model.max_length={LONGEST}", f"data.max_length={LONGEST - 1}"]
SENTENCES = ["Some dogs see cats.", "a cow", "Some", "Some a cow see the birds, dogs and cats. Some", "dogs dogs dogs"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors this small are no work for two."""
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    for side in ("en", "de"):
        (tmp_path / f"v.{side}").write_text("".join(f"{line}\n" for line in SENTENCES), encoding="utf-8")
    return saved_run(tmp_path / "outputs" / "any", "transformer", "data.validation=[v.en,v.de]", *SHORT)


@pytest.mark.slow
@needed
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_every_supported_part_is_the_same_in_both(parts: list[str], tmp_path: Path) -> None:
    """And a small change of any parameter is noticed."""
    config, tokenizer, model = load_checkpoint(saved_run(tmp_path, "transformer", *SHORT, *parts).checkpoint("best"))
    assert isinstance(config.model, TransformerConfig) and not unsupported(config.model)
    (tmp_path / "exported").mkdir()
    save_ctranslate2(model.eval(), config.model, tokenizer, tmp_path / "exported", "float32")
    ours, exported = (
        TorchEngine(model, search_preset("beam"), LONGEST),
        CTranslate2Engine(tmp_path / "exported", tokenizer, LONGEST),
    )
    sources = tokenizer.encode_source(SENTENCES)
    for beam in (1, 4):
        proof = compare_engines(ours, exported, SENTENCES, sources, beam)
        assert not proof.problem() and proof.equal == len(SENTENCES), proof
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.01 * torch.randn_like(parameter))
            assert compare_engines(ours, exported, SENTENCES, sources, 1).problem(), f"{name} makes no difference"
            parameter.copy_(kept)


@pytest.mark.parametrize(
    ("family", "parts", "messages"),
    [
        ("lstm", [], ["model.family: CTranslate2 does not support lstm"]),
        (
            "transformer",
            ["model.attention.score=additive"],
            ["model.attention.score: CTranslate2 does not support additive"],
        ),
        (
            "transformer",
            ["model.attention.score=cosine", "model.position=alibi"],
            [
                "model.attention.score: CTranslate2 does not support cosine",
                "model.position: CTranslate2 does not support alibi in the encoder",
            ],
        ),
    ],
)
def test_what_prevents_an_export_is_named(family: str, parts: list[str], messages: list[str], tmp_path: Path) -> None:
    run = saved_run(tmp_path / "any", family, *parts)
    with pytest.raises(UserError) as error:
        export(load_config("export", f"run={run.folder}"))
    assert all(problem.startswith(line) for problem, line in zip(error.value.problems, messages, strict=True))
    assert {path.name for path in run.folder.iterdir()} == {"checkpoints"}


def test_a_score_or_position_that_is_new_is_not_exported_until_it_is_listed() -> None:
    """The lists name what is possible, so nothing new counts as exportable by default."""
    config = load_config("train", "model=transformer").model
    problems = unsupported(replace(config, position="new", attention=replace(config.attention, score="newer")))
    assert [problem.partition(";")[0] for problem in problems] == [
        "model.attention.score: CTranslate2 does not support newer",
        "model.position: CTranslate2 does not support new in the encoder",
    ]


def test_without_ctranslate2_one_line_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match=r"pip install 'seq2seq\[export\]'"):
        export(load_config("export", f"run={run.folder}"))


@needed
def test_the_readme_beside_an_export_runs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines translate as the exported model does, and it carries the proof."""
    export(load_config("export", "run=any", "quantization=int8"))
    printed = capsys.readouterr().out
    folder = run.folder / "ctranslate2-int8"
    text = (folder / "README.md").read_text(encoding="utf-8")
    proofs = [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith(("verified", "agreement"))]
    assert len(proofs) == 3 and all(proof in text for proof in proofs) and "BLEU" in proofs[2]
    code = text.split("```python\n")[1].split("```")[0]
    exec(code.replace("…", SENTENCES[0]), {})
    _, tokenizer, _ = load_checkpoint(run.checkpoint("best"))
    engine = CTranslate2Engine(folder, tokenizer, 256).translator
    pieces = tokenizer.source.encode(SENTENCES[0], out_type=str)
    translated = engine.translate_batch([pieces], disable_unk=True)[0].hypotheses[0]
    assert capsys.readouterr().out == tokenizer.target.decode(translated) + "\n"
    with pytest.raises(UserError, match="already exists"):
        export(load_config("export", "run=any", "quantization=int8"))
    export(load_config("export", "run=any", "quantization=int8", "overwrite=true"))


@needed
def test_an_export_has_the_shortlists_of_its_checkpoint(run: Run) -> None:
    """With `use_vmap` CTranslate2 generates nothing else."""
    _, tokenizer, _ = load_checkpoint(run.checkpoint("best"))
    vocabulary, random = tokenizer.vocabulary, np.random.default_rng(0)
    always_T = np.arange(vocabulary.target) < 4
    learned = Shortlist(random.integers(4, vocabulary.target, (vocabulary.source, 2), np.int32), always_T)
    learned.save(run.checkpoint("best"))
    export(load_config("export", "run=any"))
    engine = CTranslate2Engine(run.folder / "ctranslate2-float32", tokenizer, 256)
    readme = (run.folder / "ctranslate2-float32" / "README.md").read_text(encoding="utf-8")
    assert "use_vmap=True" in readme
    others: set[int] = set()
    for sentence in SENTENCES:
        source = tokenizer.source.encode(sentence, out_type=str)
        ids = learned.of(tokenizer.encode_source([sentence])[0], 2).tolist()
        found, free = (
            engine.translator.translate_batch(
                [source], use_vmap=use, max_decoding_length=9, beam_size=3, num_hypotheses=3
            )
            for use in (True, False)
        )
        used = {engine.ids[piece] for pieces in found[0].hypotheses for piece in pieces}
        assert used <= set(ids) and len(ids) < vocabulary.target
        others |= {engine.ids[piece] for pieces in free[0].hypotheses for piece in pieces} - set(ids)
    assert others, "without it, CTranslate2 generates other words too"


@needed
def test_an_export_that_translates_differently_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of it, and an earlier export stays."""

    def save_another(model: Seq2Seq, *given: Any) -> None:
        torch.nn.init.normal_(model.output.weight)
        save_ctranslate2(copy.deepcopy(model), *given)
        torch.nn.init.normal_(model.output.weight)

    monkeypatch.setattr("seq2seq.cli.commands.export.save_ctranslate2", save_another)
    (run.folder / "old").mkdir()
    with pytest.raises(UserError, match="export refused and nothing written"):
        export(load_config("export", "run=any", f"output={run.folder / 'old'}", "overwrite=true"))
    assert {path.name for path in run.folder.iterdir()} == {"checkpoints", "old"}


@pytest.mark.slow
@needed
def test_an_export_that_is_ended_leaves_nothing(run: Run) -> None:
    """SIGTERM while the proof runs: the folder that was to be renamed is gone."""
    command = [sys.executable, "-m", "seq2seq", "export", f"run={run.folder}", "sentences=100000"]
    (run.folder.parent.parent / "v.en").write_text("Some dogs see cats.\n" * 20_000, encoding="utf-8")
    (run.folder.parent.parent / "v.de").write_text("Some dogs see cats.\n" * 20_000, encoding="utf-8")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list(run.folder.glob(".*/model.bin")):
            time.sleep(0.05)
        process.terminate()
        process.communicate(timeout=120)
    assert process.returncode == 143
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]
