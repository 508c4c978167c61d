"""The whole program, as its users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sacrebleu
import torch
from safetensors.torch import load_file

from seq2seq.inference.translator import Translator
from seq2seq.utils.run import Run
from tests.helpers import REPOSITORY
from tests.helpers.configs import FAMILIES, TINY
from tests.helpers.corpora import small_grammar
from tests.helpers.program import QUICK, Program, files, shards, train


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_from_files_to_translations(family: str, program: Program, tmp_path: Path) -> None:
    """Both families learn a word-for-word language from files, and every command works on the run."""
    learn = ["model.width=64", "optimizer.lr=5e-3", "optimizer.warmup=20", "training.validate_every=100"]
    learn += ["model.feed_forward=128"] if family == "transformer" else ["model.embedding=64"]
    out = train(program, tmp_path, family, "name=mine", "training.updates=300", "model.encoder_layers=1", *learn)
    lines, folder = out.splitlines(), tmp_path / "outputs" / "mine"
    assert lines[0] == lines[-1] == "run        outputs/mine", "the folder is printed first and last"
    assert "seq2seq translate run=mine" in lines[-2]
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  +[\d,]+ tokens/s", out)]
    assert len(losses) == 300 and losses[-1] < losses[0] / 2
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["test"]["bleu"] > 90, "it has learned the language"
    for name in ("config.yaml", "train.log", "metrics.jsonl", "checkpoints/index.json"):
        assert (folder / name).is_file()
    assert any((folder / "tensorboard").iterdir())

    evaluated = program("evaluate", "run=mine", "search.beam=2")
    assert evaluated.returncode == 0, evaluated.stderr
    (written,) = (folder / "evaluation").glob("files.test.*.best.beam2.penalty1.txt")
    hypotheses = written.read_text(encoding="utf-8").splitlines()
    references = (tmp_path / "test.de").read_text(encoding="utf-8").splitlines()
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], force=True)
    assert f"BLEU       {bleu.score:.2f} ± " in evaluated.stdout
    saved = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
    assert saved["scores"]["bleu"]["value"] == pytest.approx(bleu.score)

    other = program("evaluate", "run=mine", "search=greedy", "data=toy", "split=validation")
    assert other.returncode == 0 and "test set   toy.validation: 500 pairs" in other.stdout, other.stderr

    _translates_line_by_line(program, tmp_path)
    _translates_from_python(tmp_path)


def _translates_line_by_line(program: Program, folder: Path) -> None:
    """One line out for one line in, whatever comes in."""
    given = ["two red cat", "", "   ", "now", "cat " * 600, "\x07\u2028 \x0b", "日本語 🙂", "old dog\r"]
    piped = program("translate", "run=mine", input="".join(f"{line}\n" for line in given))
    assert piped.returncode == 0, piped.stderr
    out = piped.stdout.split("\n")
    assert len(out) == len(given) + 1 and out[-1] == ""
    assert (out[0], out[1], out[2], out[3], out[7]) == ("zwei rote Katze", "", "", "jetzt", "alte Hund")
    assert "line 5: source truncated to 512 subwords" in piped.stderr
    (folder / "in.en").write_text("two red cat\n\nnow", encoding="utf-8")
    filed = program("translate", "run=mine", "input=in.en", "output=out.de", "search=greedy")
    assert (filed.returncode, filed.stdout) == (0, ""), filed.stderr
    assert (folder / "out.de").read_text(encoding="utf-8") == "zwei rote Katze\n\njetzt\n"
    ranked = program("translate", "run=mine", "search.n_best=3", input="two cat\n\n")
    scored = [line.split("\t") for line in ranked.stdout.splitlines()]
    assert [line[0] for line in scored] == ["1", "1", "1", "2"] and scored[0][2] == "zwei Katze"
    scores = [float(score) for _, score, _ in scored[:3]]
    assert scores == sorted(scores, reverse=True)


def _translates_from_python(folder: Path) -> None:
    translator = Translator.load("mine", outputs=str(folder / "outputs"), device="cpu", precision="float32")
    sentences = (folder / "test.en").read_text(encoding="utf-8").splitlines()
    together = translator.translate([*sentences, ""])
    assert together[-1][0].text == ""
    for sentence, in_batch in zip(sentences[:10], together, strict=False):
        alone = translator.translate([sentence])[0][0]
        assert (alone.text, alone.pieces) == (in_batch[0].text, in_batch[0].pieces)
        assert alone.score == pytest.approx(in_batch[0].score, abs=1e-5)
    assert "".join(together[0][0].pieces).replace("▁", " ").strip() == together[0][0].text


def test_a_run_continues_under_its_own_config(program: Program, tmp_path: Path) -> None:
    """The stored config holds, what is typed wins, and the model stays what it is."""
    short = ["training.updates=2", "training.validate_every=2"]
    train(program, tmp_path, "lstm", "name=a", *short)
    longer = program("train", "name=a", "training.updates=4")
    assert longer.returncode == 0, longer.stderr
    assert "changed    training.updates: 2 → 4" in longer.stdout
    assert "resumed    after update 2" in longer.stdout and "update 4/4" in longer.stdout
    assert "model      lstm" in longer.stdout
    for change in ("model=transformer", "model.width=32", "tokenizer=bpe", "optimizer=muon", "seed=2"):
        refused = program("train", "name=a", change)
        assert (
            refused.returncode == 2
            and "a run's model, tokenizer, languages, optimizer and seed are fixed" in refused.stderr
        )
    finished = program("train", "name=a")
    assert "it is finished" in finished.stdout
    again = program("train", "name=a", *TINY["lstm"], "model=lstm", *files(tmp_path), *QUICK, *short, "overwrite=true")
    assert again.returncode == 0 and "resumed" not in again.stdout


def test_a_sweep_gives_each_job_a_folder(program: Program, tmp_path: Path) -> None:
    small = ["model.width=8", "model.feed_forward=8", "training.updates=1", "training.validate_every=1"]
    result = program("train", "-m", "seed=1,2", "model.position=none,rotary", *files(tmp_path), *QUICK, *small)
    assert result.returncode == 0, result.stderr
    runs = {path.parent.name for path in tmp_path.glob("outputs/*/config.yaml")}
    assert runs == {f"files-transformer-seed-{s}-position-{p}" for s in (1, 2) for p in ("none", "rotary")}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"outputs", "data"}, "nothing else is written"


def test_a_damaged_checkpoint_is_one_line(program: Program, tmp_path: Path) -> None:
    train(program, tmp_path, "lstm", "name=a", "training.updates=1")
    weights = tmp_path / "outputs/a/checkpoints/update-0000001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    result = program("translate", "run=a", input="cat\n")
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "model.safetensors: missing or damaged" in result.stderr


def test_a_hub_that_cannot_be_reached_is_one_line(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = program("train", "data=multi30k")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "bentrevett/multi30k cannot be loaded" in result.stderr and "data.path=FOLDER" in result.stderr


# -------------------------------------------------------------------------------------------- README


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits() -> None:
    """Signal 9 and SIGTERM at random moments, a full disk, two processes: shortened from the script's fifty times."""
    options = ["--kills", "1", "--terms", "1", "--full", "1", "--forks", "1", "--updates", "40"]
    script = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "kill_test.py", *options], capture_output=True, text=True
    )
    assert script.returncode == 0 and script.stdout.count("the same bits") == 5, script.stdout + script.stderr


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=[shards, pytest.mark.slow])])
def test_two_processes_learn_like_one_and_survive_a_death(parallel: str, program: Program, tmp_path: Path) -> None:
    """The same losses as one process; torchrun's restart after a kill ends with the same bits."""
    settings = [*QUICK, "model.width=16", "model.feed_forward=32", "model.encoder_layers=1", "model.decoder_layers=1"]
    settings += ["model.dropout=0", "model.attention.dropout=0", "precision=float32", "training.update_tokens=500"]
    settings += [
        "data.train=[toy.en,toy.de]",
        "tokenizer.vocabulary=120",
        "data.held_out=20",
        "training.updates=30",
        "training.validate_every=10",
        "search.length_extra=2",
    ]
    pairs = small_grammar()["train"]  # of like lengths, so that an update is two batches in one process and in two
    for side, lines in (("en", [pair.source for pair in pairs]), ("de", [pair.target for pair in pairs])):
        (tmp_path / f"toy.{side}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    together += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "seq2seq", "train", *settings]
    assert program("train", "name=one", *settings).returncode == 0
    together += [f"training.parallel={parallel}"]
    two = subprocess.run([*together, "name=two"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / "outputs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 33 and losses[0] == pytest.approx(losses[1], rel=1e-4)

    with subprocess.Popen([*together, "name=killed"], cwd=tmp_path, stdout=-1, stderr=-1, text=True) as killed:
        checkpoints = tmp_path / "outputs" / "killed" / "checkpoints"
        while killed.poll() is None and not list(checkpoints.glob("update-*")):
            time.sleep(0.02)
        workers = subprocess.run(["pgrep", "-P", str(killed.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, errors = killed.communicate(timeout=300)
    assert killed.returncode == 0, errors
    assert "lost the connection to another process" in errors and "the last checkpoint is intact" in errors
    runs = [Run(tmp_path / "outputs" / name) for name in ("two", "killed")]
    ends = [load_file(run.checkpoint("last") / "model.safetensors") for run in runs]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def test_the_project_has_its_few_top_level_folders() -> None:
    folders = {p.name for p in REPOSITORY.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders <= {"configs", "seq2seq", "scripts", "tests", "docs", "data", "outputs", "site"}
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
