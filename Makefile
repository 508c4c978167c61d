# What the README promises, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check clean

demo: $(VENV)/installed   ## train on the embedded corpus: a BLEU score, translations, and the line that opens the prompt
	$(BIN)/seq2seq train name=demo

test: $(VENV)/installed-dev   ## the tests
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev   ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:   ## the virtual environment
	rm -rf $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@
