# What the README promises, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test quick check docs clean

demo: $(VENV)/installed   ## train on the built-in corpus: a BLEU score, translations, and the line that opens the prompt
	$(BIN)/seq2seq train name=demo
	@echo "first      source $(BIN)/activate"

test: $(VENV)/installed-dev   ## all tests, on every core, and the coverage of lines and branches by the quick ones
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" --cov --cov-report=term:skip-covered
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

quick: $(VENV)/installed-dev   ## the tests for the inner loop: none that runs the program or takes a second
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

check: $(VENV)/installed-dev   ## lint, format and types; of the web pages too, where biome has a wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if [ -x $(BIN)/biome ]; then $(BIN)/biome check --error-on-warnings; else echo "biome is unavailable: web pages unchecked"; fi

docs: $(VENV)/installed-docs   ## the documentation site in site/, without a request to any other host
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "to read it: python3 -m http.server --directory site"

clean:   ## the virtual environment
	rm -rf $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt
	$(INSTALL) -e '.[docs]'
	@touch $@
