"""Laws of what a run reports: its lines, metrics.jsonl, train.log, and TensorBoard, also after resuming."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seq2seq.config.schema import TrainConfig
from seq2seq.data.batching import RankBatches
from seq2seq.model.factory import build_model
from seq2seq.training import meter as meter_module
from seq2seq.training.logger import RunLogger
from seq2seq.training.meter import RECENT_UPDATES, Meter, UpdateStats, format_duration, multiply_adds
from seq2seq.training.trainer import Trainer
from seq2seq.utils.run import Run
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import random_corpus
from tests.helpers.trainers import Clock, make_trainer, rank_batches_of, small_tokenizer, varied

pytestmark = pytest.mark.usefixtures("fast")


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def board(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Every curve of TensorBoard, as it shows it."""
    events = EventAccumulator(str(run.tensorboard), {"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def session(config: TrainConfig, folder: Path, scores: Sequence[float], stop: int = 0, killed: int = 0) -> Trainer:
    """A run from its start or its last checkpoint, as the program does it: stopped, or killed without notice."""
    run = Run(folder)
    resume = run.exists
    with RunLogger() as logger:
        made = make_trainer(config, folder, scores, resume=resume, logger=logger)
        logger.info(f"session from {made.state.progress.update}")
        run.folder.mkdir(parents=True, exist_ok=True)
        run.drop_metrics_after(made.state.progress.update)
        logger.open(run, made.state.progress.update)
        update = made.update

        def counted(rank_batches: RankBatches) -> UpdateStats:
            if killed and made.state.progress.update == killed:
                raise KeyboardInterrupt
            stats = update(rank_batches)
            if made.state.progress.update == stop:
                made.stop("enough")
            return stats

        made.update = counted  # type: ignore[method-assign]
        try:
            made.fit()
        except KeyboardInterrupt:
            assert killed
    return made


# Of the machine, and of what was done since the last line of the same session.
CHANGING = {"tokens_per_second", "waiting", "utilisation", "memory_gb", "seconds", "padding"}
WHOLE = {"training__updates": 9, "training__log_every": 2, "training__validate_every": 4, "training__patience": 0}


def config_of(**changes: Any) -> TrainConfig:
    return varied("lstm", **{**WHOLE, "model__dropout": 0.2, **changes})


_whole: list[Run] = []


def uninterrupted(folders: pytest.TempPathFactory) -> Run:
    """A run of one session, made once."""
    if not _whole:
        _whole.append(session(config_of(), folders.mktemp("whole"), [1.0, 3.0, 2.0]).checkpoints.run)
    return _whole[0]


SESSIONS: dict[str, list[dict[str, Any]]] = {
    "stopped between lines": [{"scores": [1.0], "stop": 5}, {"scores": [3.0, 2.0]}],
    "stopped twice": [{"scores": [], "stop": 1}, {"scores": [1.0], "stop": 7}, {"scores": [3.0, 2.0]}],
    "killed before a validation": [{"scores": [1.0], "killed": 7}, {"scores": [3.0, 2.0]}],
    "killed after a validation": [{"scores": [1.0, 3.0], "killed": 8}, {"scores": [2.0]}],
    "killed after stopping": [{"scores": [1.0], "stop": 5}, {"scores": [], "killed": 6}, {"scores": [3.0, 2.0]}],
}


@pytest.mark.parametrize("sessions", SESSIONS.values(), ids=SESSIONS)
def test_a_run_in_sessions_reports_what_an_uninterrupted_one_does(
    sessions: list[dict[str, Any]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each line of the metrics and each point of a curve once, with the same numbers, whatever happened in between."""
    whole = uninterrupted(tmp_path_factory)
    for one in sessions:
        made = session(config_of(), tmp_path / "cut", **one)
    runs = [whole, made.checkpoints.run]
    expected, found = map(metrics, runs)
    steps = [("train", n) for n in (2, 4, 6, 8, 9)] + [("validation", n) for n in (4, 8, 9)]
    assert sorted((line["kind"], line["update"]) for line in found) == sorted(steps)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if k not in CHANGING} == {
            k: v for k, v in other.items() if k not in CHANGING
        }
    curves = [board(run) for run in runs]
    assert curves[0].keys() == curves[1].keys()
    for tag, points in curves[0].items():
        assert [step for step, _ in curves[1][tag]] == [step for step, _ in points], tag
        if tag.split("/")[1] not in CHANGING:
            assert curves[1][tag] == points, tag
    for line in found:
        for name in line.keys() - {"kind", "update"}:
            [value] = [v for step, v in curves[1][f"{line['kind']}/{name}"] if step == line["update"]]
            assert value == pytest.approx(line[name], rel=6e-6), "the board and the metrics have the same numbers"
    starts = [line for line in runs[1].log.read_text().splitlines() if line.startswith("session from")]
    assert len(starts) == len(sessions) and starts[0] == "session from 0"


def test_metrics_of_lost_updates_and_half_a_line_are_dropped(tmp_path: Path) -> None:
    """Those of the checkpoint's own update stay, and so does every earlier line, to the letter."""
    run = Run(tmp_path)
    run.drop_metrics_after(3)
    assert not run.metrics.exists()
    kept = ['{"kind": "train", "update": 2, "loss": 1.0}\n', '{"kind": "validation", "update": 3}\n']
    lost = ['{"kind": "train", "update": 4}\n', '{"kind": "train", "upd']
    run.metrics.write_text("".join([*kept, *lost]))
    run.drop_metrics_after(3)
    assert run.metrics.read_text() == "".join(kept)
    run.drop_metrics_after(2)
    assert run.metrics.read_text() == kept[0]


# ------------------------------------------------------------------------------------------- logger


def test_what_was_reported_before_the_folder_was_open_begins_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line once, in order, on the terminal and in train.log; a second session is appended."""
    for n in range(2):
        with RunLogger() as logger:
            logger.info(f"first {n}")
            logger.field("device", "cpu")
            logger.open(Run(tmp_path), n)
            logger.info("ä third")
            assert "ä third" in Run(tmp_path).log.read_text(encoding="utf-8"), "at once, not only at the end"
    expected = [line for n in range(2) for line in (f"first {n}", "device     cpu", "ä third")]
    assert Run(tmp_path).log.read_text(encoding="utf-8").splitlines() == expected
    assert capsys.readouterr().out.splitlines() == expected


def test_of_several_processes_the_silent_ones_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with RunLogger(silent=True) as logger:
        logger.open(Run(tmp_path), 0)
        logger.info("a")
        logger.status("b")
        logger.scalars("train", 1, {"loss": 1.0})
        logger.text("c", 1, "d")
        logger.validation(1, {"loss": 1.0, "bleu": 2.0, "chrf": 3.0}, [("a", "b", "c")], {"p": np.zeros((1, 1, 3))}, "")
        logger.result({"a": 1}, {"b": 2.0})
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_a_status_line_is_replaced_and_cut_to_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal only; a line that stays clears it first."""
    logger = RunLogger()
    logger.status("hidden")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: type("Size", (), {"columns": 8})())
    logger.status("0123456789")
    assert capsys.readouterr().out == "\r\033[K0123456"
    logger.info("stays")
    assert capsys.readouterr().out == "\r\033[Kstays\n"
    logger.close()
    assert capsys.readouterr().out == "\r\033[K"


@settings(max_examples=25, deadline=None, derandomize=True)
@over(value=st.floats(-1e12, 1e12, allow_nan=False, allow_subnormal=False))
def test_metrics_have_six_digits(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rounded and not cut, as numbers."""
    run = Run(tmp_path_factory.mktemp("run"))
    logger = RunLogger()
    with run.metrics.open("w") as stream:
        logger._files = (type("Board", (), {"add_scalar": lambda *_: None})(), stream, stream)
        logger.scalars("train", 3, {"loss": value})
        [line] = metrics(run)
    assert line["kind"] == "train" and line["update"] == 3
    assert line["loss"] == pytest.approx(value, rel=5.1e-6)
    assert len(f"{abs(line['loss']):.12e}".split("e")[0].replace(".", "").rstrip("0")) <= 6


def test_a_validation_is_written_to_the_log_the_metrics_and_the_board(tmp_path: Path) -> None:
    """Its scores, its examples as lines and as a table, and its pictures as they are."""
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    scores = {"loss": 1.23456, "bleu": 12.345678, "chrf": 45.6789, "seconds": 2.0}
    with RunLogger() as logger:
        logger.open(Run(tmp_path), 0)
        examples = [("a | b", "c", "d"), ("e", "f", "g|h")]
        logger.validation(1250, scores, examples, {"attention/1": picture}, "best so far")
        logger.text("config", 1250, "yaml")
        logger.result({"a": 1, "b": [1, 2], "c": None, "d": True, "e": "x"}, {"test_bleu": 7.5})
    lines = Run(tmp_path).log.read_text().splitlines()
    assert lines[0] == "validation after update 1,250: loss 1.235  BLEU 12.35  chrF 45.68  (best so far)"
    assert [line.split(maxsplit=1) for line in lines[1:]] == [
        ["source", "a | b"], ["reference", "c"], ["output", "d"], ["source", "e"], ["reference", "f"], ["output", "g|h"]
    ]  # fmt: skip
    [line] = metrics(Run(tmp_path))
    assert line == {
        "kind": "validation",
        "update": 1250,
        "loss": 1.23456,
        "bleu": 12.3457,
        "chrf": 45.6789,
        "seconds": 2,
    }
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    [(step, bleu)] = board(Run(tmp_path))["validation/bleu"]
    assert step == 1250 and bleu == pytest.approx(12.345678)
    assert board(Run(tmp_path))["test_bleu"] == [(0, 7.5)]
    texts = {tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
             for tag in events.Tags()["tensors"]}  # fmt: skip
    assert texts["config/text_summary"] == [(1250, "yaml")]
    [(step, table)] = texts["examples/text_summary"]
    assert step == 1250 and table.splitlines() == [
        "|source|reference|output|", "|---|---|---|", "|a \\| b|c|d|", "|e|f|g\\|h|"
    ]  # fmt: skip
    [image] = events.Images("attention/1")
    assert (image.step, image.width, image.height) == (1250, 3, 2)


# --------------------------------------------------------------------------------------------- meter


class Metered:
    """A meter beside a clock that stands still, and the same sums by hand."""

    def __init__(self, made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.clock = made, Clock()
        monkeypatch.setattr("time.perf_counter", self.clock)
        monkeypatch.setattr("seq2seq.training.distributed.peak_memory", lambda _: 3_500_000_000)
        made.state.progress.seconds = 20.0  # of a session before this one
        self.rates = iter([2e6, 5e6, 1e6, 1e6, 1e6])
        monkeypatch.setattr(meter_module, "matmul_flops", lambda *_: next(self.rates))
        self.meter = Meter(made.state, torch.float32)

    def update(
        self, rank_batches: RankBatches, loss: float, seconds: float, waited: float, skipped: bool = False
    ) -> None:
        with self.meter.waiting():
            self.clock.sleep(waited)
        self.clock.sleep(seconds)
        self.made.state.progress.update += 1
        self.meter.count(UpdateStats(loss, loss / 2, skipped), rank_batches)


def updates_given() -> list[RankBatches]:
    """Two updates of one process among several: the whole update has more target tokens than its batches."""
    corpus = random_corpus([3, 5, 2, 7, 4, 6, 1, 8])
    parts = [[[0, 1], [2]], [[3, 4, 5]], [[6], [7]]]
    return [
        rank_batches_of(*(corpus.batch(np.array(rows)) for rows in part), target_tokens=100 + 10 * i)
        for i, part in enumerate(parts)
    ]


def test_a_line_has_the_means_since_the_line_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss per token, speeds of the whole run, padding and work of this process's batches, and the rest."""
    metered = Metered(make_trainer("transformer", tmp_path), monkeypatch)
    meter, progress, given = metered.meter, metered.made.state.progress, updates_given()
    encoder, decoder = multiply_adds(metered.made.state.model)
    progress.skipped, progress.target_tokens = 4, 777

    def expected(
        parts: list[RankBatches], losses: list[float], seconds: float, waited: float, rate: float
    ) -> dict[str, Any]:
        batches = [batch for rank_batches in parts for batch in rank_batches.micro_batches]
        sources = sum(int((batch.source_BS != 0).sum()) for batch in batches)
        targets = sum(int((batch.target_out_BT != 0).sum()) for batch in batches)
        size = sum(batch.source_BS.numel() + batch.target_out_BT.numel() for batch in batches)
        tokens = sum(rank_batches.target_tokens for rank_batches in parts)
        return {
            "loss": sum(x * s.target_tokens for x, s in zip(losses, parts, strict=True)) / tokens,
            "tokens_per_second": tokens / seconds,
            "epoch": metered.made.state.batches.epochs_done(metered.made.state.batches.batches_per_epoch()),
            "padding": (size - sources - targets) / size,
            "waiting": waited / seconds,
            "gradient_norm": losses[-1] / 2,
            "rate": 0.125,
            "memory_gb": 3.5,
            "utilisation": 6 * (encoder * sources + decoder * targets) / seconds / rate,
            "skipped": 4,
            "target_tokens": 777,
        }

    metered.update(given[0], 5.0, seconds=3, waited=1)
    metered.update(given[1], 2.0, seconds=4, waited=0.5)
    assert meter.scalars(0.125) == pytest.approx(expected(given[:2], [5.0, 2.0], 8.5, 1.5, 2e6))
    assert expected(given[:2], [5.0, 2.0], 8.5, 1.5, 2e6)["padding"] > 0
    assert progress.seconds == pytest.approx(20 + 8.5)
    metered.clock.sleep(100)  # a line is written
    meter.reset_line()
    metered.update(given[2], 3.0, seconds=2, waited=0)
    assert meter.scalars(0.125) == pytest.approx(expected(given[2:], [3.0], 2, 0, 2e6))
    # After a validation: speeds are reset, the best measured rate of the machine counts, the mean loss is not reset.
    metered.clock.sleep(100)
    meter.calibrate()
    metered.update(given[1], 1.0, seconds=5, waited=1)
    after = expected([given[1]], [1.0], 6, 1, 5e6)
    after["loss"] = (3.0 * 120 + 1.0 * 110) / 230
    assert meter.scalars(0.125) == pytest.approx(after)
    assert progress.seconds == pytest.approx(20 + 8.5 + 2 + 6), "neither lines nor validations are training"
    meter.calibrate()
    metered.update(given[1], 1.0, seconds=5, waited=1)
    assert meter.scalars(0.0)["utilisation"] == pytest.approx(after["utilisation"]), "not a rate that was lower"
    assert progress.line_loss == pytest.approx(3.0 * 120 + 2 * 110) and progress.line_tokens == 340


def test_skipped_updates_have_no_loss_but_take_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out of the mean; a line without any other has no mean."""
    metered = Metered(make_trainer("lstm", tmp_path), monkeypatch)
    given = updates_given()
    metered.update(given[0], math.nan, seconds=1, waited=0, skipped=True)
    values = metered.meter.scalars(0.1)
    assert math.isnan(values["loss"]) and math.isnan(values["gradient_norm"])
    metered.update(given[1], 2.0, seconds=1, waited=0)
    values = metered.meter.scalars(0.1)
    assert values["loss"] == 2.0 and values["tokens_per_second"] == pytest.approx(210 / 2)


def test_the_remaining_time_follows_the_last_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run may have other settings than before, and other programs begin and end beside a long one."""
    config = varied("lstm", training__updates=1000, training__validate_every=500)
    metered, given = Metered(make_trainer(config, tmp_path), monkeypatch), updates_given()[0]
    progress = metered.made.state.progress
    progress.update = 100
    for seconds in (2.0, 3.0):
        for _ in range(RECENT_UPDATES + 1):
            metered.update(given, 1.0, seconds, waited=0)
        line = metered.meter.line(metered.meter.scalars(0.1))
        assert f"{format_duration((1000 - progress.update) * seconds)} left" in line


@pytest.mark.parametrize(("update", "every"), [(7, 10), (10, 10), (25, 10), (30, 7), (29, 10)])
@pytest.mark.parametrize("bar", [False, True])
def test_a_line_says_how_long_it_will_take(
    update: int, every: int, bar: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the mean time of an update: to the end, and to the next validation, the last one at the end."""
    config = varied("lstm", training__updates=30, training__validate_every=every)
    metered = Metered(make_trainer(config, tmp_path), monkeypatch)
    progress = metered.made.state.progress
    progress.update, progress.seconds, progress.skipped = update, 250.0 * update, update % 2
    values = {"epoch": 1.26, "loss": 2.3456, "tokens_per_second": 12345.6, "utilisation": 0.256, "padding": 0.1,
              "waiting": 0.994, "gradient_norm": 1.239, "rate": 0.00123, "memory_gb": 2.345}  # fmt: skip
    words = metered.meter.line(values, bar=bar).split()
    left = 30 - update
    coming = min(n for n in [*range(0, 30, every), 30] if n > update) - update if left else 0
    wanted = [f"update {update:2}/30", "epoch 1.3", "loss 2.346", "12,346 tokens/s", "mfu 26%", "padding 10%",
              "waiting 99%", "gradient 1.24", "lr 1.2e-03", "2.3 GB", f"{format_duration(250 * left)} left",
              f"validation in {format_duration(250 * coming)}", *(["skipped 1"] if update % 2 else [])]  # fmt: skip
    if bar:
        done = round(16 * update / 30)
        wanted.insert(0, "━" * done + "─" * (16 - done))
        wanted = [*wanted[:5], *wanted[11:13], *wanted[5:11], *wanted[13:]]  # a narrow terminal shows the times
    assert words == " ".join(wanted).split()
    assert "gradient 1.2e+03" in metered.meter.line({**values, "gradient_norm": 1239.0})
    assert "gradient 999.00" in metered.meter.line({**values, "gradient_norm": 999.0})
    assert "gradient 1.0e+03" in metered.meter.line({**values, "gradient_norm": 1000.0})


def test_a_line_before_the_first_update_divides_by_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metered = Metered(make_trainer("lstm", tmp_path), monkeypatch)
    metered.clock.sleep(2)
    values = metered.meter.scalars(0.1)
    assert values["tokens_per_second"] == 0 and values["padding"] in (0, 1) and math.isnan(values["loss"])
    assert "  0:00 left" not in metered.meter.line(values), "the pace of a session before"
    metered.made.state.progress.seconds = 0.0
    assert "  0:00 left" in metered.meter.line(values)


@settings(max_examples=40, deadline=None, derandomize=True)
@over(seconds=st.one_of(st.floats(0, 1e6), st.sampled_from([59.4, 59.6, 3599.4, 3599.6, 3600, 86400])))
def test_a_clock_shows_hours_only_where_there_are_any(seconds: float) -> None:
    shown = [int(part) for part in format_duration(seconds).split(":")]
    total = 0
    for part in shown:
        total = 60 * total + part
    assert abs(total - seconds) <= 0.5 and all(part < 60 for part in shown[1:])
    assert len(shown) == (3 if total >= 3600 else 2)
    assert re.fullmatch(r"(\d+:\d\d|\d+):\d\d", format_duration(seconds))


@pytest.mark.parametrize("tie", ["none", "output", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_work_of_a_token_is_the_weights_it_meets(family: str, tie: str) -> None:
    """Each multiply-add once: no table that is only read from, no gains or biases; the output table by the decoder."""
    config = varied(family, model__tie_embeddings=tie, model__encoder_layers=2, model__decoder_layers=3)
    model = build_model(config.model, small_tokenizer().vocabulary)
    width, words = 8, small_tokenizer().vocabulary.target
    if family == "transformer":
        encoder = 2 * (4 * width**2 + 2 * width * 16)
        decoder = 3 * (8 * width**2 + 2 * width * 16) + words * width
    else:
        shapes = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        encoder = sum(p.numel() for name, p in shapes.items() if name.startswith("encoder."))
        decoder = sum(p.numel() for name, p in shapes.items() if name.startswith("decoder.")) + words * 6
        gates = 4 * width * (6 + width)
        assert encoder == 2 * gates + 2 * 4 * width * (2 * width + width)
    assert multiply_adds(model) == (encoder, decoder)
