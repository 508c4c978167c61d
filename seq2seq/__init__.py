"""Train a translator from scratch, measure it, and use it."""

__version__ = "0.1.0"
