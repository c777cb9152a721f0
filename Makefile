# Everything on a fresh machine: python3 (3.11 or newer) and make. The environment is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := moa_lightning tasks data benchmarks tests

.PHONY: quickstart test lint types unit soak clean

quickstart: $(VENV)/.installed  ## train {GELU, LA, MoA} x {language, MAE, DINO}, end with a table and pictures
	$(BIN)/moa ablate configs/grids/quickstart.yaml

test: lint types unit  ## all checks

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed-dev
	$(BIN)/mypy

unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runs  # takes two processes itself
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/runs

soak: $(VENV)/.installed-dev  ## an hour and a half: 60 kills, 300 malformed inputs, half an hour with flat memory
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.kills
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.malformed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.endurance

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the environment; runs/ stays
	rm -rf $(VENV)
