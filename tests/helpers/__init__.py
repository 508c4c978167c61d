"""Shared by the tests: small configs, models, corpora and runs, and the program itself."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
