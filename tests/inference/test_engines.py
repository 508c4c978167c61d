"""Laws of the CTranslate2 engine: in float32 it is this project's search; its export is always the checkpoint's."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seq2seq.cli.commands.evaluate import evaluate
from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.data.encoding import Batch
from seq2seq.inference import engines
from seq2seq.inference.checkpoint import load_checkpoint, write_weights
from seq2seq.inference.ctranslate2 import is_installed, padded, save_ctranslate2
from seq2seq.inference.engines import open_engine
from seq2seq.inference.translator import EMPTY, Translation, Translator
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from tests.helpers.models import compiled
from tests.helpers.runs import saved_run

needed = pytest.mark.skipif(not is_installed(), reason="CTranslate2 is not installed (pip install ctranslate2)")
SENTENCES = ["Some dogs see cats.", "", "a cow", "Some cats", "a cow sees the birds, dogs and cats. Some", "dogs " * 40]
TRAINING = [
    "dogs",
    "a cow",
    "the birds",
    "Some cats",
    "cats, dogs",
    "Some a cow",
    "Some dogs see cats.",
    "a cow, the birds",
]
UPDATES = 60
SUPPORTED: list[dict[str, Any]] = [
    {"beam": 1},
    {"beam": 1, "tokens": 1},
    {"beam": 4},
    {"beam": 4, "length_penalty": 0.0},
    {"beam": 4, "n_best": 3, "length_normalization": "average", "length_penalty": 0.7},
    {"beam": 4, "length_factor": 0.5, "length_extra": 2},
    {"beam": 4, "select_by": "chrf"},
]


@pytest.fixture(autouse=True)
def _one_thread_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(engines, "QUANTIZATION", "float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that has learned to translate short sentences, and to end them."""
    run = saved_run(tmp_path_factory.mktemp("trained"), "transformer", "model.max_length=24", "data.max_length=23")
    _, tokenizer, model = load_checkpoint(run.checkpoint("best"))
    sources, targets = tokenizer.encode_source(TRAINING), tokenizer.encode_target([s.title() for s in TRAINING])
    batch = Batch.of(padded(sources), padded(targets), torch.arange(len(sources)))
    expected_M = torch.tensor([id_ for ids in targets for id_ in ids])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.logits(model(batch)), expected_M).backward()
        optimizer.step()
    write_weights(dict(model.named_parameters()), run.checkpoint("best") / "model.safetensors")
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(trained.folder, tmp_path / "outputs" / "any")))


def both(run: Run) -> tuple[Translator, Translator]:
    folder = run.checkpoint("best")
    return (
        Translator.from_checkpoint(folder, "cpu", "float32", "ctranslate2"),
        Translator.from_checkpoint(folder, "cpu", "float32"),
    )


def options(**changes: Any) -> SearchConfig:
    return dataclasses.replace(search_preset("beam"), **changes)


def assert_same(found: list[list[Translation]], expected: list[list[Translation]]) -> None:
    assert [[one.pieces for one in ranked] for ranked in found] == [[o.pieces for o in ranked] for ranked in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)
            assert (one.text, one.truncated, one.source_pieces) == (other.text, other.truncated, other.source_pieces)
            assert one.token_log_probabilities == pytest.approx(other.token_log_probabilities, abs=1e-4)


@needed
@pytest.mark.parametrize("changes", SUPPORTED, ids=str)
def test_in_float32_it_is_this_projects_search(changes: dict[str, Any], run: Run) -> None:
    """Order, empty, long and truncated sentences, prefixes, scores, and translations that the limit ends."""
    exported, ours = both(run)
    search = options(**changes)
    sources = exported.tokenizer.encode_source(["a cow", "Some cats"])
    assert exported.engine is not None
    own = exported.engine.search(sources, [[], []], [24, 24], options(beam=search.beam), True)
    assert all(own), "answered by CTranslate2 itself, not left to torch"
    assert exported.engine_for(search).startswith("ctranslate2") and ours.engine_for(search) == "torch"
    assert_same(exported.translate(SENTENCES, search), ours.translate(SENTENCES, search))
    if search.n_best == 1 and search.select_by == "score":
        prefixes = ["Dogs", "", "", "A Cow", "Some", ""]
        found = exported.translate(SENTENCES, search, prefixes=prefixes)
        assert_same(found, ours.translate(SENTENCES, search, prefixes=prefixes))
    assert exported.translate(["", SENTENCES[0]], search)[0] == [EMPTY]


@needed
def test_without_probabilities_the_translations_are_the_same(run: Run) -> None:
    exported, _ = both(run)
    full, short = (exported.translate(SENTENCES, options(beam=3), probabilities=given) for given in (True, False))
    assert [ranked[0].pieces for ranked in full] == [ranked[0].pieces for ranked in short]
    for one, other in ((a[0], b[0]) for a, b in zip(full, short, strict=True)):
        assert one.score == pytest.approx(other.score, abs=0.02), "but for the share of banned subwords"


@needed
def test_scores_attention_and_the_last_text_are_given_too(run: Run) -> None:
    exported, ours = both(run)
    reports: dict[int, str] = {}
    found = exported.translate(SENTENCES, attention=True, on_step=reports.__setitem__)
    assert all(reports.get(i, "") == ranked[0].text for i, ranked in enumerate(found))
    expected = ours.translate(SENTENCES, attention=True)
    for one, other in ((a[0], b[0]) for a, b in zip(found, expected, strict=True)):
        torch.testing.assert_close(one.weights_LNTS, other.weights_LNTS)
    assert exported.score(["a cow"], ["Dogs"]) == ours.score(["a cow"], ["Dogs"])


@needed
@pytest.mark.parametrize(
    "key,changes",
    [
        ("stop", {"stop": "certain"}),
        ("coverage_penalty", {"coverage_penalty": 0.2}),
        ("min_length_extra", {"min_length_extra": 3}),
        ("groups", {"groups": 5, "diversity": 0.5}),
        ("samples", {"samples": 2, "beam": 1}),
        ("forbid", {"forbid": ["Dogs"]}),
        ("no_repeat_ngram", {"no_repeat_ngram": 2}),
    ],
)
def test_what_it_does_not_support_is_refused_and_auto_takes_torch(key: str, changes: dict[str, Any], run: Run) -> None:
    exported, ours = both(run)
    with pytest.raises(UserError, match=rf"search\.{key}: .* use engine=torch"):
        exported.translate(SENTENCES, options(**changes))
    auto = Translator.from_checkpoint(run.checkpoint("best"), "cpu", "float32", "auto")
    assert auto.engine_for(options(**changes)) == "torch" != auto.engine_for(options())
    assert auto.translate(SENTENCES, options(**changes)) == ours.translate(SENTENCES, options(**changes))


@needed
def test_prefixes_of_n_best_lists_and_ensembles_are_refused(run: Run) -> None:
    exported, _ = both(run)
    with pytest.raises(UserError, match="prefixes: "):
        exported.translate(SENTENCES[:1], options(n_best=2), prefixes=["Dogs"])
    with pytest.raises(UserError, match="engine: ctranslate2 translates with one run"):
        Translator.ensemble([exported, exported], ["any", "any"])


def test_a_model_that_it_does_not_support_is_named(tmp_path: Path) -> None:
    """And auto takes torch."""
    folder = saved_run(tmp_path, "lstm").checkpoint("best")
    with pytest.raises(UserError, match=r"model\.family: CTranslate2 does not support lstm.*engine=torch"):
        Translator.from_checkpoint(folder, "cpu", "float32", "ctranslate2")
    assert Translator.from_checkpoint(folder, "cpu", "float32", "auto").engine is None


def test_without_ctranslate2_one_line_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match=r"engine=ctranslate2 needs .* pip install 'seq2seq\[export\]'"):
        Translator.from_checkpoint(run.checkpoint("best"), "cpu", "float32", "ctranslate2")


def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that exports are written to from now on."""
    made: list[Path] = []
    write = engines.write_export

    def counting(folder: Path, *given: Any) -> None:
        made.append(folder)
        write(folder, *given)

    monkeypatch.setattr(engines, "write_export", counting)
    return made


@needed
def test_an_export_is_made_once_and_again_when_stale_or_damaged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file of it is damaged or missing; and when the checkpoint's weights have changed."""
    made, folder = exports(monkeypatch), run.checkpoint("best")
    both(run), both(run)
    assert len(made) == 1
    exported, weights = folder / "ctranslate2-float32", folder / "model.safetensors"
    for damage in (
        lambda: (exported / "model.bin").write_bytes((exported / "model.bin").read_bytes()[:-1]),
        lambda: (exported / "config.json").unlink(),
        lambda: (exported / engines.RECORD).write_text("{", encoding="utf-8"),
        lambda: save_file({name: -x for name, x in load_file(weights).items()}, weights),
    ):
        damage()
        count = len(made)
        exports_now, ours = both(run)
        assert len(made) == count + 1
        assert_same(exports_now.translate(SENTENCES), ours.translate(SENTENCES))


@needed
def test_several_that_export_at_once_do_not_clash(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = exports(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        translators = [pair[0] for pair in pool.map(both, [run] * 3)]
    assert len(made) == 1
    assert len({str(t.translate(SENTENCES)) for t in translators}) == 1


@needed
def test_an_export_leaves_the_model_as_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in int8, whose rounding works in place: the translator that exports scores as every other one."""
    monkeypatch.setattr(engines, "QUANTIZATION", "int8")
    texts = SENTENCES[:1], ["Some Dogs See Cats."]
    first, later, plain = (
        Translator.from_checkpoint(run.checkpoint("best"), "cpu", "float32", engine)
        for engine in ("ctranslate2", "ctranslate2", "torch")
    )
    assert first.score(*texts)[0] == later.score(*texts)[0] == plain.score(*texts)[0]


@needed
def test_a_folder_that_cannot_be_written_keeps_no_export(run: Run) -> None:
    """The engine works from a temporary one."""
    folder = run.checkpoint("best")
    (folder / "ctranslate2-float32.lock").mkdir()
    exported, ours = both(run)
    assert_same(exported.translate(SENTENCES), ours.translate(SENTENCES))
    assert not (folder / "ctranslate2-float32").exists()


@needed
def test_an_export_that_computes_otherwise_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save = save_ctranslate2

    def save_another(model: Any, *given: Any) -> None:
        with torch.no_grad():
            model.output.weight.neg_()
            save(model, *given)
            model.output.weight.neg_()

    monkeypatch.setattr(engines, "save_ctranslate2", save_another)
    with pytest.raises(UserError, match="CTranslate2 and seq2seq disagree"):
        both(run)
    assert not (run.checkpoint("best") / "ctranslate2-float32").exists()


@needed
def test_evaluate_names_the_engine_in_what_it_prints_and_stores(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Beside the scores of torch, which stay."""
    for side in ("en", "de"):
        (tmp_path / f"t.{side}").write_text("a cow\nSome cats\n", encoding="utf-8")
    given = [f"run={run.folder}", f"source={tmp_path / 't.en'}", f"reference={tmp_path / 't.de'}", "resamples=0"]
    (plain,) = evaluate(load_config("evaluate", *given, "device=cpu"))
    assert "engine     " not in capsys.readouterr().out and plain.engine == "torch"
    (one,) = evaluate(load_config("evaluate", *given, "device=cpu", "engine=ctranslate2"))
    assert f"engine     {one.engine}\n" in capsys.readouterr().out
    assert one.engine.split()[0] == "ctranslate2" and one.engine.split()[2] == "float32"
    stored = [path.read_text(encoding="utf-8") for path in run.evaluation.glob("*.json")]
    assert len(stored) == 2 and sum(f'"engine": "{one.engine}"' in text for text in stored) == 1


def test_torch_opens_nothing() -> None:
    assert open_engine("torch", *[None] * 5) is None  # type: ignore[arg-type]


@needed
def test_auto_is_the_compiled_search_in_int8(run: Run) -> None:
    compiled()
    folder = run.checkpoint("best")
    auto, asked = (Translator.from_checkpoint(folder, "cpu", "int8", engine) for engine in ("auto", "ctranslate2"))
    assert auto.engine_for(options()) == "torch" != asked.engine_for(options())
