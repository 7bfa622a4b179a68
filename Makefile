# The commands of a checkout; `make` alone lists them. Each sets up what it needs first.

# The interpreter that makes the environment, e.g. `make test PYTHON=python3.12`. An environment
# that exists is kept unless PYTHON is given and is another version.
PYTHON ?= python3
# Where the environment lies: VENV=.venv312 keeps a second one beside the first.
VENV ?= .venv
# Arguments for pytest, e.g. `make check TESTS=tests/ops` or `TESTS="-k gae"`.
TESTS ?=
# Arguments for `make parity`, e.g. PARITY="--draws=5 --seed=7 --write".
PARITY ?=
# Test processes; 0: the tests run in the one that collects them.
WORKERS ?= 2

BIN := $(VENV)/bin
# --no-compile: Python writes bytecode for what is really imported when it is first imported, which
# is quicker than doing it for every file of every package.
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check \
  --prefer-binary --no-compile --constraint constraints.txt
export PIP_ROOT_USER_ACTION := ignore

.DELETE_ON_ERROR:
.PHONY: help setup quickstart test check parity format lint types clean environment dependencies

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo 'Variables: PYTHON=python3.12 (interpreter), VENV=.venv, TESTS="arguments for pytest", WORKERS=4'

setup: environment ## Make .venv with everything for development
	@$(MAKE) --silent $(VENV)/.dev

quickstart: dependencies ## Compare SFT, PPO, DPO and CPL on the embedded task: runs/quickstart/report.html
	$(BIN)/python -m experiments.compare --config=configs/quickstart.py --workdir=runs/quickstart

test: lint types ## Check format, lint and types, and run the whole suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 $(TESTS)

check: lint ## Quick subset for while you work: format, lint, and the tests not marked slow
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow' $(TESTS)

parity: environment ## Compare every model family with torch and transformers, on fresh random models
	@$(MAKE) --silent $(VENV)/.parity
	$(BIN)/python -m tests.golden.hf.parity $(PARITY)
	$(BIN)/python -m tests.golden.hf.parity_trial

format: setup ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lint: setup ## Check format and lint
	$(BIN)/ruff format --check --output-format concise .
	$(BIN)/ruff check --output-format concise .

types: setup ## Check types
	$(BIN)/mypy

clean: ## Remove caches and build leftovers (not runs/, not the environment)
	rm -rf .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# The environment is made when there is none, or when PYTHON is given and is another version.
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
PYTHON_GIVEN := $(filter-out file,$(origin PYTHON))

environment:
	@if [ -x $(BIN)/pip ] && { [ -z '$(PYTHON_GIVEN)' ] || \
	    [ "$$($(PYTHON) $(VERSION) 2>&1)" = "$$($(BIN)/python $(VERSION))" ]; }; then exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'PYTHON=$(PYTHON) is not a working Python 3.11 or newer.' >&2; \
	  echo 'Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12' >&2; exit 1; }; \
	echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear $(VENV)

dependencies: environment
	@$(MAKE) --silent $(VENV)/.base

# Stamp files: the packages are installed again only when what they are made from has changed.
$(VENV)/.base: pyproject.toml constraints.txt
	@echo 'Installing the dependencies into $(VENV): a minute or two.'
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@echo 'Installing the dependencies and the development tools into $(VENV): a minute or two.'
	@$(PIP) --editable '.[dev]'
	@touch $(VENV)/.base $@

$(VENV)/.parity: pyproject.toml constraints.txt
	@echo 'Installing the dependencies and torch into $(VENV): a minute or two.'
	@$(PIP) --editable '.[parity]'
	@touch $(VENV)/.base $@
