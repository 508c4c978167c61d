"""The commands: each is a config class, a purpose, and a function of its name in the module of its name."""

from __future__ import annotations

from seq2seq.config import schema

COMMANDS: dict[str, tuple[type, str]] = {
    "train": (schema.TrainConfig, "train a model on a parallel corpus"),
    "doctor": (schema.DoctorConfig, "check a corpus for problems before training"),
    "evaluate": (schema.EvaluateConfig, "score trained runs on test sets, with confidence intervals"),
    "compare": (schema.CompareConfig, "test whether one run is significantly better than another"),
    "report": (schema.ReportConfig, "write an offline HTML report on a run: curves, scores, attention, examples"),
    "reproduce": (schema.ReproduceConfig, "retrain a run and compare the scores"),
    "translate": (schema.TranslateConfig, "translate interactively, or translate files and pipes"),
    "export": (schema.ExportConfig, "convert a run to CTranslate2 and verify its output"),
    "score": (schema.ScoreConfig, "compute the probability of given translations"),
}
