# `make` alone lists what there is. PYTHON chooses the interpreter that .venv is made with, VENV where it goes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

DEMO := --model emoji64 --from-file configs/emoji/prompts.txt --ddim_steps 50 --scale 3 --seed 1 --outdir outputs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo train-demo test smoke lint format data

help: ## list these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.installed-test ## make .venv with everything that running and testing needs

demo: $(VENV)/.installed ## draw pictures from text with the bundled model
	@$(BIN)/python scripts/txt2img.py $(DEMO)

train-demo: $(VENV)/.installed ## train a small model from nothing on the CPU, then draw with it
	@$(BIN)/python scripts/train_demo.py

test: lint ## style, then every test
	$(BIN)/python -m pytest -q

smoke: $(VENV)/.installed-test ## the tests that take seconds
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(VENV)/.installed-test ## check style
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(VENV)/.installed-test ## mend style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

data: $(VENV)/.installed-data ## draw the emoji training data again
	$(BIN)/python scripts/build_emoji_data.py

# A stamp says what is installed, so that the second run starts at once.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) -e ".[$*]"
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON) here;" \
		"name a Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); name a Python 3.10 or newer:" \
		"make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
