"""The commands: each is a config class, and a function of its name in the module of its name."""

from __future__ import annotations

from seq2seq.config import schema

COMMANDS: dict[str, type] = {
    "train": schema.TrainConfig,
    "doctor": schema.DoctorConfig,
    "evaluate": schema.EvaluateConfig,
    "compare": schema.CompareConfig,
    "report": schema.ReportConfig,
    "reproduce": schema.ReproduceConfig,
    "translate": schema.TranslateConfig,
    "serve": schema.ServeConfig,
    "export": schema.ExportConfig,
    "shortlist": schema.ShortlistConfig,
    "score": schema.ScoreConfig,
}
