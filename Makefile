# `make` alone lists the verbs. PYTHON chooses the interpreter for .venv, VENV another folder than .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

DEMO := --model emoji64 --from-file configs/emoji/prompts.txt --ddim_steps 50 --scale 3 --seed 1 --outdir outputs/demo

# Two processes with one thread each are faster than one with two threads. More processes need 2 GB each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo train-demo twins test smoke lint format docs notebooks data

help: ## list these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed-test ## make .venv with everything that running and testing needs

demo: $(VENV)/.installed ## generate images from text with the bundled model
	@$(BIN)/python scripts/txt2img.py $(DEMO)

train-demo: $(VENV)/.installed ## train a small model from scratch on the CPU, then sample from it
	@$(BIN)/python scripts/train_demo.py

twins: $(VENV)/.installed ## train and measure a small model of each task, for hours
	@$(BIN)/python scripts/train_twins.py

test: lint ## check style and types, then run every test
	$(PYTEST)

smoke: $(VENV)/.installed-test ## run the tests that take seconds
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-test ## check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-test ## correct the style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(VENV)/.installed-docs ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebooks: $(VENV)/.installed-test ## run the notebooks of docs/notebooks, and check their figures
	$(BIN)/python -m pytest -q -m notebook

data: $(VENV)/.installed-data ## build the emoji training data again
	$(BIN)/python scripts/build_emoji_data.py

# A stamp states what is installed, so that later runs start at once.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) -e ".[$*]"
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON) here;" \
		"name a Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); name a Python 3.11 or newer:" \
		"make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
