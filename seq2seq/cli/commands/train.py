"""seq2seq train: from a corpus to a trained run and its test score."""

from seq2seq.training.pipeline import train

__all__ = ["train"]
