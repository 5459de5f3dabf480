# Needs Python 3.11 or newer, make and pip. Everything is installed into .venv/, but what benchmarks compare with into
# .venv-bench/, so that tests never see it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
BENCH := .venv-bench
# What is installed before the `bench` extra; a CPU build of PyTorch, where pip would fetch one for GPUs (several GB).
TORCH ?=

.PHONY: venv demo test test-all regression format clean

venv: $(DEV)

%/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $*

# The stamps are as old as the last installation, so that only a change of pyproject.toml installs again.
$(DEMO): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $(DEMO)

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(DEMO) $(DEV)

$(BENCH)/.installed: pyproject.toml | $(BENCH)/bin/python
	$(if $(TORCH),$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)")
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	touch $(BENCH)/.installed

demo: $(DEMO)
	$(BIN)/python examples/demo.py

test: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow"

test-all: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -rs

# A report: no time makes it fail.
regression: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/regression.py

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(BENCH) dist build demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
