"""Laws of what a run shows of itself: attention, alignment, sweeps, reproduction, and the page in a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page

from seq2seq.cli.commands.report import reproduction_commands
from seq2seq.cli.main import call, load_config
from seq2seq.config.schema import TrainConfig
from seq2seq.data import toy
from seq2seq.data.corpus import Corpus
from seq2seq.data.tokenizer import Tokenizer, train_tokenizer
from seq2seq.evaluation import alignment
from seq2seq.inference.checkpoint import write_config
from seq2seq.inference.translator import Translator
from seq2seq.reporting import report, sweep
from seq2seq.training import environment
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from seq2seq.utils.text import words_and_marks
from tests.helpers.browser import chromium
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import small_grammar
from tests.helpers.models import tiny_model
from tests.helpers.program import Program, run_program, train
from tests.helpers.runs import saved_run
from tests.helpers.trainers import varied

pytestmark = pytest.mark.usefixtures("small_toy")

SHORT = ["training.updates=2", "training.validate_every=1"]


@cache
def grammar_pairs() -> list[toy.Pair]:
    """Not at import: drawing them takes a while."""
    return small_grammar()["validation"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    corpus = Corpus([pair.source for pair in grammar_pairs()], [pair.target for pair in grammar_pairs()])
    return train_tokenizer(corpus, load_config("train", "tokenizer.vocabulary=200").tokenizer)[0]


def translator(family: str, tokenizer: Tokenizer) -> Translator:
    return Translator(tiny_model(family, vocabulary=tokenizer.vocabulary), tokenizer, torch.device("cpu"), 512)


# ------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_shows_the_weights_of_its_own_tokens(family: str, tokenizer: Tokenizer) -> None:
    """Rows sum to one, and there is a row and a column for each piece, and each end, in their order."""
    ours = translator(family, tokenizer)
    for source, pair in zip((p.source for p in grammar_pairs()[:6]), grammar_pairs(), strict=False):
        (best,) = ours.score([source], [pair.target], attention=True)
        shown = report.attention_plot(report.Example(0, source, [pair.target], best.text, 50.0), best)
        weights = np.frombuffer(base64.b64decode(shown.weights), "<u2").reshape(shown.shape) / 65535
        layers, heads, rows, columns = shown.shape
        assert (layers, heads) == ((2, 2) if family == "transformer" else (1, 2))
        assert (rows, columns) == (len(shown.target_pieces), len(shown.source_pieces))
        assert np.allclose(weights.sum(-1), 1, atol=columns / 65535)
        assert best.weights_LNTS is not None and np.allclose(weights, best.weights_LNTS, atol=1 / 65535)
        assert "".join(shown.target_pieces[:-1]).replace("▁", " ").strip() == pair.target
        assert "".join(shown.source_pieces[:-1]).replace("▁", " ").strip() == source
        assert shown.source_words == words_and_marks(source) and shown.target_words == words_and_marks(pair.target)


def test_attention_to_a_prefix_does_not_depend_on_what_follows(tokenizer: Tokenizer) -> None:
    """Each weight is in the row of its piece: those of a prefix do not depend on what follows."""
    ours = translator("transformer", tokenizer)
    source, target = grammar_pairs()[0].source, grammar_pairs()[0].target
    (whole,) = ours.score([source], [target], attention=True)
    (part,) = ours.score([source], [" ".join(target.split()[:2])], attention=True)
    same = next(i for i, (a, b) in enumerate(zip([*whole.pieces, ""], [*part.pieces, "-"], strict=False)) if a != b)
    assert same >= 2 and whole.weights_LNTS is not None and part.weights_LNTS is not None
    torch.testing.assert_close(whole.weights_LNTS[:, :, :same], part.weights_LNTS[:, :, :same])


def test_pieces_are_assigned_to_words_by_letters() -> None:
    pieces = ["▁Der", "▁schläf", "t", "▁", ".", "▁a,"]
    assert alignment.words_of_pieces(pieces) == ["Der", "schläft", ".", "a", ","]
    fractions = alignment.letter_fractions(pieces)
    assert fractions.argmax(1).tolist()[:3] == [0, 1, 1] and fractions[3].sum() == 0 and fractions[4, 2] == 1
    assert fractions[5].tolist() == [0, 0, 0, 0.5, 0.5], "a piece over two words belongs to both by its letters"


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_between_words_is_the_sum_over_sources_and_the_mean_over_targets(
    family: str, tokenizer: Tokenizer
) -> None:
    for scored in translator(family, tokenizer).score(
        *zip(*(p[:2] for p in grammar_pairs()[:4]), strict=True), attention=True
    ):
        words = alignment.word_attention(scored)
        weights, (last, end) = scored.weights_LNTS, (len(scored.pieces), len(scored.source_pieces) - 1)
        assert weights is not None
        sources, targets = (
            alignment.letter_fractions(side).numpy() for side in (scored.source_pieces[:-1], scored.pieces)
        )
        mean_of_each = targets / targets.sum(0)
        kept = weights.numpy()[:, :, :last, :end]
        by_hand = torch.from_numpy(np.einsum("tw,sx,lnts->lnwx", mean_of_each, sources, kept))
        torch.testing.assert_close(words, by_hand)
        assert (words.sum(-1) <= 1 + 1e-5).all(), "what is missing is on the end mark"


def test_the_alignment_error_rate_is_that_of_its_paper() -> None:
    generator = np.random.default_rng(0)
    drawn = [
        [frozenset(map(tuple, generator.integers(0, 4, (generator.integers(1, 6), 2)).tolist())) for _ in range(9)]
        for _ in range(2)
    ]
    found, sure = drawn
    # Och & Ney 2003, equation 34, over all links of the corpus; the grammar has no links that are only possible.
    pooled = [{(i, link) for i, links in enumerate(side) for link in links} for side in drawn]
    a, s = pooled
    assert alignment.error_rate(found, sure) == pytest.approx(1 - (len(a & s) + len(a & s)) / (len(a) + len(s)))
    assert alignment.error_rate(sure, sure) == 0
    assert alignment.error_rate([frozenset({(0, 0)})], [frozenset({(1, 1)})]) == 1


@pytest.mark.slow
def test_the_grammar_gives_the_links_of_its_pairs_in_both_directions() -> None:
    sources, targets = [p.source for p in grammar_pairs()], [p.target for p in grammar_pairs()]
    forth, back = alignment.known_links(sources, targets), alignment.known_links(targets, sources)
    assert forth == [frozenset(pair.links) for pair in grammar_pairs()]
    assert back == [frozenset((j, i) for i, j in pair.links) for pair in grammar_pairs()]
    assert alignment.known_links(["A dog."], ["Eine Katze."]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_on_the_true_links_has_no_errors(
    family: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted weights: one head attends to the true links, all others to the first word."""
    ours = translator(family, tokenizer)
    single = [
        p for p in grammar_pairs() if len(p.links) == len(words_and_marks(p.target)) == len({j for _, j in p.links})
    ]
    assert len(single) > 5
    score = Translator.score

    def planted(self: Translator, *arguments: Any, **options: Any) -> Any:
        for scored, pair in zip(score(self, *arguments, **options), single, strict=True):
            assert scored.weights_LNTS is not None
            weights = torch.zeros_like(scored.weights_LNTS)
            weights[..., 0] = 1
            sources, targets = (alignment.letter_fractions(side) for side in (scored.source_pieces[:-1], scored.pieces))
            weights[0, 1] = 0
            for i, j in pair.links:
                for t in targets[:, j].nonzero().flatten():
                    for s in sources[:, i].nonzero().flatten():
                        weights[0, 1, t, s] = 1 / len(sources[:, i].nonzero())
            object.__setattr__(scored, "weights_LNTS", weights)
            yield scored

    monkeypatch.setattr(Translator, "score", planted)
    sides = [p.source for p in single], [p.target for p in single]
    errors = alignment.alignment_errors(ours, *sides, [frozenset(p.links) for p in single])
    assert errors.best == (0.0, 0, 1) and errors.heads[0][0] > 0.5
    assert "0.000 (layer 1, head 2)" in str(errors)


# --------------------------------------------------------------------------------------- the page


def data_of(page: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_no_sentence_ends_the_script_that_holds_it() -> None:
    data = {"text": '</script><script>alert(1)</script> <!-- & \u2028 \\u003c " ü', "number": 1.5}
    page, empty = report.fill_template(json.dumps(data, ensure_ascii=False)), report.fill_template("{}")
    assert data_of(page) == data
    assert page.count("</script>") == empty.count("</script>"), "nothing of it is markup"
    assert not re.search(r"<link|<script[^>]* src=|https?://(?!www\.w3\.org/2000/svg)", page), "nothing is fetched"
    assert not re.search(r"^(import|export) ", page, re.MULTILINE), "its scripts are one"


def test_the_script_documents_the_fields_of_its_data() -> None:
    """The typedefs of report.js name the fields of the dataclasses in report.py, in their order."""
    script = (report.TEMPLATE / "report.js").read_text(encoding="utf-8")
    typedefs = dict(re.findall(r"@typedef {Object} (\w+)\n(.*?)\*/", script, re.DOTALL))
    documented = {name: re.findall(r"@property {.*} (\w+)\n", body) for name, body in typedefs.items()}
    for cls in nested_dataclasses(report.Report):
        assert documented[cls.__name__] == [field.name for field in fields(cls)], cls


def nested_dataclasses(cls: type) -> Iterator[type]:
    yield cls
    for hint in get_type_hints(cls).values():
        for part in (hint, *get_args(hint)):
            if is_dataclass(part) and isinstance(part, type):
                yield from nested_dataclasses(part)


def test_the_time_is_all_of_the_time() -> None:
    metrics = [
        {"kind": "train", "update": 1, "target_tokens": 100.0, "tokens_per_second": 50.0, "padding": 0.25},
        {"kind": "validation", "update": 1, "loss": 1.0, "seconds": 3.0},
        {
            "kind": "train",
            "update": 2,
            "target_tokens": 300.0,
            "tokens_per_second": 50.0,
            "padding": 0.25,
            "waiting": 0.5,
        },
    ]
    spent = report.time_spent(metrics)
    assert spent == {
        "real tokens": 0.75 * 2 + 0.5 * 0.75 * 4,
        "padding": 0.25 * 2 + 0.5 * 0.25 * 4,
        "waiting for batches": 0.5 * 4,
        "validation and checkpoints": 3.0,
    }
    assert sum(spent.values()) == 2 + 4 + 3
    assert report.curves(metrics)["padding"] == {"train": [(1, 0.25), (2, 0.25)]}
    assert report.curves([{"kind": "train", "update": 1, "loss": math.nan}]) == {}


# --------------------------------------------------------------------------------------------- sweeps


def sweep_jobs(folder: Path, *data: str) -> list[sweep.Job]:
    scores = {("lstm", "1"): 20.0, ("lstm", "2"): 22.0, ("transformer", "1"): 30.0, ("transformer", "2"): 27.0}
    jobs = []
    for (model, seed), bleu in scores.items():
        run = Run(folder / f"{model}-{seed}")
        run.folder.mkdir()
        run.write_result({"progress": {"best_score": bleu}, "test": {"bleu": bleu, "chrf": 50.0 - bleu}})
        write_config(load_config("train", f"seed={seed}", *data), run.config)
        jobs.append(sweep.Job(run, {"model": model, "seed": seed}))
    return jobs


def test_a_sweep_ends_with_means_and_deviations(tmp_path: Path) -> None:
    jobs = sweep_jobs(tmp_path)
    lines = sweep.write_summary(jobs, tmp_path / "table")
    assert lines[0].split() == ["model", "runs", "BLEU", "chrF"]
    assert f"21.00 ± {stdev([20, 22]):.2f}" in lines[1] and "29.00 ± 1.41 *" in lines[1], "the best chrF"
    assert f"28.50 ± {stdev([30, 27]):.2f} *" in lines[2], "the best BLEU"
    assert lines[3] == sweep.LEGEND and lines[4].startswith("written"), "the star is explained"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table" / "table.csv").read_text(encoding="utf-8"))))
    assert [float(row["bleu_mean"]) for row in rows] == [21.0, 28.5]
    runs = list(csv.DictReader(io.StringIO((tmp_path / "table" / "runs.csv").read_text(encoding="utf-8"))))
    assert mean(float(row["bleu"]) for row in runs if row["model"] == "lstm") == 21.0 and len(runs) == 4
    picture = ElementTree.parse(tmp_path / "table" / "table.svg").getroot()
    assert len(picture.findall(".//{*}circle")) == 4, "a dot for each run"
    assert {"model=lstm", "model=transformer"} <= {text.text for text in picture.findall(".//{*}text")}


def test_one_setting_is_not_the_best(tmp_path: Path) -> None:
    jobs = sweep_jobs(tmp_path)
    (lstm,) = sweep.settings_of(jobs[:2])
    assert len(sweep.table([lstm])) == 2 and "*" not in "".join(sweep.table([lstm])) + sweep.draw_chart([lstm], "bleu")
    for job in jobs[2:]:
        job.run.result.unlink()
    assert "*" not in "".join(sweep.table(sweep.settings_of(jobs))), "nor is the only one that finished"


@pytest.mark.parametrize(
    ("data", "different"),
    [
        (["data=files", "data.train=[a.en,a.de]"], True),
        (["data=files", "data.train=[a.en,a.de]", "data.test=[c.en,c.de]"], False),
        (["data=files", "data.train=[a.en,a.de]", "data.validation=[b.en,b.de]"], False),
        ([], False),
    ],
)
def test_a_sweep_warns_of_scores_of_different_test_sets(tmp_path: Path, data: list[str], different: bool) -> None:
    """The seed chooses the held-out pairs, if no set is given."""
    jobs = sweep_jobs(tmp_path, *data)
    assert (sweep.DIFFERENT_SETS in sweep.write_summary(jobs, tmp_path / "all")) == different
    same_seed = [job for job in jobs if job.swept["seed"] == "1"]
    assert sweep.DIFFERENT_SETS not in sweep.write_summary(same_seed, tmp_path / "one")


@pytest.mark.parametrize("points", [[0.09, 0.155, 0.168], [20.0, 24.0], [35.55, 35.55], [93.0, 0.0], [99.99]])
def test_an_axis_holds_its_points_on_round_numbers(points: list[float]) -> None:
    low, high, ticks = sweep.axis(points)
    assert low <= min(points) and max(points) <= high and [low, high] == [ticks[0], ticks[-1]]
    assert 2 <= len(ticks) <= 8 and len({f"{tick:g}" for tick in ticks}) == len(ticks)


def test_a_run_that_did_not_finish_is_no_number(tmp_path: Path) -> None:
    jobs = sweep_jobs(tmp_path)
    jobs[0].run.result.unlink()
    (lstm, _) = sweep.settings_of(jobs)
    assert lstm.scores["bleu"] == [22.0] and "±" not in sweep.table([lstm])[1]
    jobs[1].run.write_result({"progress": {"best_score": 3.0}})
    assert sweep.settings_of(jobs[1:2])[0].scores == {"validation": [3.0]}, "without a test set"


# ------------------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each family, and what the commands below leave in it."""
    folder = tmp_path_factory.mktemp("runs")

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_program(arguments, "", folder)

    for family in FAMILIES:
        train(program, folder, family, f"name={family}", *SHORT)
    return folder


def test_two_runs_are_evaluated_compared_and_shown(program: Program, runs: Path) -> None:
    table = program("evaluate", "transformer", "lstm", "split=[validation,test]", "search=greedy", cwd=runs)
    assert table.returncode == 0, table.stderr
    assert len(re.findall(r"^files.(?:test|validation), \d+ +transformer ", table.stdout, re.MULTILINE)) == 2
    written = [file for family in FAMILIES for file in (runs / "outputs" / family / "evaluation").glob("*.test.*")]
    before = [path.stat().st_mtime_ns for path in written]
    assert len(before) == 4, "the lines and what was measured, of each run"
    compared = program("compare", "transformer", "lstm", "search=greedy", "sentences=3", cwd=runs)
    assert compared.returncode == 0, compared.stderr
    assert "randomised" in compared.stdout and re.search(r"model.name +transformer +lstm", compared.stdout)
    assert "most improved" in compared.stdout
    assert [path.stat().st_mtime_ns for path in written] == before, "the same translations are not made again"
    same = program("compare", "lstm", "outputs/lstm", "search=greedy", cwd=runs)
    assert "BLEU       lstm and lstm are equal" in same.stdout and "config  identical" in same.stdout
    lost = program("report", "lstm", "show=[99]", cwd=runs)
    assert (lost.returncode, lost.stderr) == (2, "error: show: there is no sentence 99; files.test has 40\n")


def test_equally_named_test_sets_are_kept_separate(program: Program, runs: Path) -> None:
    """Neither ranked against one another, nor written over one another."""
    pairs: dict[str, list[str]] = {}
    for name, words in (("a", "one two three"), ("b", "three two")):
        (runs / name).mkdir()
        for side in ("source", "reference"):
            pairs.setdefault(side, []).append(f"{name}/test.txt")
        (runs / name / "test.txt").write_text(f"{words}\n", encoding="utf-8")
    given = [f"{side}=[{','.join(files)}]" for side, files in pairs.items()]
    found = program("evaluate", "lstm", *given, "search=greedy", "metrics=[bleu]", "resamples=0", cwd=runs)
    assert found.returncode == 0, found.stderr
    assert len(set(re.findall(r"written +(\S+\.txt)", found.stdout))) == 2
    assert len(re.findall(r"^test.txt, 1 +lstm +[\d.]+ *$", found.stdout, re.MULTILINE)) == 2, "none is starred"


def test_runs_of_other_languages_are_not_compared(program: Program, tmp_path: Path) -> None:
    saved_run(tmp_path / "outputs" / "forward", "lstm", "data.source=en", "data.target=de")
    saved_run(tmp_path / "outputs" / "backward", "lstm", "data.source=de", "data.target=en")
    result = program("compare", "forward", "backward")
    assert result.returncode == 2 and "forward translates en → de, backward de → en" in result.stderr


@pytest.mark.slow
def test_a_page_shows_the_commands_that_reproduce_it(runs: Path) -> None:
    """With the given search, test set, sentences and path of the run."""
    asked = load_config(
        "report", "split=validation", "show=[2,3]", "search=greedy", "tokenize=none", "outputs=elsewhere"
    )
    again, scores, page = reproduction_commands(Run(runs / "outputs" / "lstm"), asked)
    where = f"run={runs / 'outputs' / 'lstm'} outputs=elsewhere"
    for line, words in (
        (again, ""),
        (scores, "split=validation tokenize=none search=greedy"),
        (page, "split=validation tokenize=none 'show=[2,3]' search=greedy"),
    ):
        assert sorted(line.split()[2:]) == sorted([*where.split(), *words.split()]), line


def test_a_reproduced_run_has_the_same_metrics(program: Program, runs: Path) -> None:
    (entry,) = environment.read(Run(runs / "outputs" / "lstm"))
    assert entry["packages"]["torch"] == torch.__version__.partition("+")[0] or entry["packages"]["torch"]
    assert entry["seed"] == 1 and entry["tokenizer"] and all(entry["data"].values()) and entry["hardware"]["cores"]
    again = program("reproduce", "lstm", cwd=runs)
    assert again.returncode == 0, again.stderr
    assert "metrics    identical at every logged step" in again.stdout and "reproduced BLEU" in again.stdout
    assert "changed" not in again.stdout
    assert (runs / "outputs" / "lstm-again" / "checkpoints" / "index.json").is_file()
    twice = program("reproduce", "lstm", cwd=runs)
    assert "finished" in twice.stdout and "reproduced BLEU" in twice.stdout, "an existing run is judged as it is"
    environment_file = runs / "outputs" / "lstm-again" / "environment.json"
    text = environment_file.read_text(encoding="utf-8")
    environment_file.write_text(text.replace(entry["data"]["test"], "0" * 20), encoding="utf-8")
    different = program("reproduce", "lstm", cwd=runs)
    assert different.returncode == 1 and "not comparable: the two runs have different test sets" in different.stderr
    other = program("reproduce", "lstm", "name=transformer", cwd=runs)
    assert other.returncode == 2 and "transformer" in other.stderr
    shutil.rmtree(runs / "outputs" / "lstm-again")


def test_a_run_with_a_time_limit_in_any_folder_is_reproduced(program: Program, runs: Path, tmp_path: Path) -> None:
    """The time limit of the run does not apply to the repetition, which is written beside the run."""
    shutil.copytree(runs / "outputs" / "lstm", tmp_path / "kept" / "run")
    stored = tmp_path / "kept" / "run" / "config.yaml"
    stored.write_text(
        stored.read_text(encoding="utf-8").replace("max_minutes: 0.0", "max_minutes: 0.0001"), encoding="utf-8"
    )
    assert "max_minutes: 0.0001" in stored.read_text(encoding="utf-8")
    again = program("reproduce", str(tmp_path / "kept" / "run"), cwd=runs)
    assert again.returncode == 0 and "reproduced BLEU" in again.stdout, again.stderr
    assert (tmp_path / "kept" / "run-again" / "result.json").is_file()


def test_a_stopped_reproduction_names_every_key_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that continues it asks for the same run, with the same device, corpus and folder."""
    from seq2seq.cli.commands import reproduce as command

    def stopped(config: TrainConfig) -> None:
        raise UserError("stopped by a signal; continue with: …", code=130)

    old = Run(tmp_path / "runs" / "old")
    monkeypatch.setattr(command, "train", stopped)
    monkeypatch.setattr(command, "scores_with_interval", lambda *_: {"bleu": 1.0, "bleu_interval": 1.0})
    monkeypatch.setattr(Run, "find", lambda *_: old)
    monkeypatch.setattr(command, "config_of", lambda *_: varied("lstm", outputs=str(old.folder.parent), name="again"))
    given = ["name=again", f"outputs={old.folder.parent}", "device=cpu", f"data_path={tmp_path}"]
    with pytest.raises(UserError) as raised:
        call("reproduce", "run=old", *given)
    arguments = shlex.split(str(raised.value).partition("continue with: ")[2])
    assert sorted(arguments) == sorted(["seq2seq", "reproduce", f"run={old.folder}", *given])


def test_a_score_outside_the_interval_is_not_reproduced() -> None:
    from seq2seq.cli.commands.reproduce import check_reproduced

    check_reproduced({"bleu": 20.0, "bleu_interval": 1.0}, {"bleu": 20.9})
    problem = r"not reproduced: BLEU 21.10 \(originally 20.00\); the 95 % interval is 19.00 to 21.00"
    with pytest.raises(UserError, match=problem):
        check_reproduced({"bleu": 20.0, "bleu_interval": 1.0}, {"bleu": 21.1})


# -------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of the size of a desktop, without a network, in which no script may fail."""
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 900}, offline=True)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


@pytest.fixture(scope="module")
def reports(runs: Path) -> dict[str, Path]:
    """The written page of each family's run."""
    for family in FAMILIES:
        made = run_program(["report", family, "search=greedy", "show=[2]", "sentences=4"], "", runs)
        assert made.returncode == 0, made.stderr
    return {family: runs / "outputs" / family / "report.html" for family in FAMILIES}


PAINTED_WIDTH = "new Promise(done => requestAnimationFrame(() => done(document.documentElement.scrollWidth)))"
FILLS = "nodes => nodes.map(node => node.getAttribute('fill'))"


def cell_colours(page: Page) -> Any:
    return page.locator(".heat rect.cell").evaluate_all(FILLS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_opens_offline_and_answers_clicks(family: str, reports: dict[str, Path], page: Page) -> None:
    data = data_of(reports[family].read_text(encoding="utf-8"))
    assert data["attention"][0]["example"]["index"] == 1 and len(data["attention"]) > 8
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(reports[family].as_uri())
    page.locator(".heat rect.cell").first.wait_for()
    sections = page.locator("section").evaluate_all("nodes => nodes.map(node => node.id)")
    assert sections == ["scores", "curves", "attention", "sentences", "time", "run"]
    assert requests == [reports[family].as_uri()], "no request leaves the page"

    first, second = data["attention"][:2]
    shown = [label.removeprefix("·") for label in page.locator(".heat text").all_text_contents()]
    assert shown == [piece.removeprefix("▁") or "␣" for piece in (*first["target_pieces"], *first["source_pieces"])]
    layers, heads = first["shape"][:2]
    buttons = page.locator(".heads button").count()
    assert buttons == layers * (heads + 1) + (layers > 1), "every head, the means of layers, the mean of all"
    before = cell_colours(page)
    page.click('.heads [data-layer="0"][data-head="1"]')
    assert cell_colours(page) != before
    pressed = page.locator(".heads [aria-pressed=true]")
    assert pressed.count() == 1 and pressed.get_attribute("data-head") == "1"
    page.click('[aria-label="Next sentence"]')
    assert len(cell_colours(page)) == len(second["target_pieces"]) * len(second["source_pieces"])


@pytest.mark.slow
def test_the_page_has_two_themes_and_fits_a_phone(reports: dict[str, Path], page: Page) -> None:
    page.goto(reports["transformer"].as_uri())
    themes = set()
    for _ in range(3):
        page.click("#theme")
        themes.add(page.locator("html").get_attribute("data-theme"))
    assert themes == {"light", "dark"}, "of the system, and each by choice"
    page.click("[role=tab]:nth-child(2)")
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator(".heat rect.cell").first.wait_for()
    assert page.evaluate(PAINTED_WIDTH) <= 390, "nothing is wider than a phone"


@pytest.mark.slow
def test_no_sentence_is_markup(reports: dict[str, Path], page: Page, tmp_path: Path) -> None:
    markup = "<img src=x onerror=alert(1)> a&lt;b"
    data = data_of(reports["lstm"].read_text(encoding="utf-8"))
    for part in ("source", "output"):
        data["sentences"]["groups"][0]["examples"][0][part] = markup
        data["attention"][0]["example"][part] = markup
    data["attention"][0]["source_words"][0] = markup
    written = tmp_path / "report.html"
    written.write_text(report.fill_template(json.dumps(data)), encoding="utf-8")
    page.goto(written.as_uri())
    page.locator(".heat rect.cell").first.wait_for()
    assert page.locator("img").count() == 0
    assert markup in page.locator("#sentences").inner_text() and markup in page.locator("#attention").inner_text()
