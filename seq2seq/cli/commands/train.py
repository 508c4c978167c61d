"""seq2seq train: train a run on a corpus, and score it on the test set."""

from seq2seq.training.pipeline import train

__all__ = ["train"]
