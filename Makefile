# make demo: install into .venv and pretrain a small model on real text.   make test: install and run every check.
# Both may be repeated: what is done already is not done again.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip installs the first torch that the declared range admits; on Linux that is a CUDA build unless TORCH names another.
TORCH ?= torch>=2.11,<2.14
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types unit clean

demo: $(VENV)/.installed
	@echo "==> data: tokenizer and token shards from the Python standard library (data/demo)"
	@$(BIN)/trine data prepare stdlib --output data/demo --train-tokenizer 2048
	@echo "==> training: configs/demo.yaml on 2 ranks as 2 pipeline stages (runs/demo)"
	@$(BIN)/trine pretrain configs/demo.yaml

test: lint types unit

lint: $(VENV)/.installed-dev
	@echo "==> lint: ruff"
	@$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	@echo "==> types: mypy --strict on the package"
	@MYPYPATH=$(VENV)/typing $(BIN)/python -m mypy --strict -p trine

unit: $(VENV)/.installed-dev
	@echo "==> tests: pytest"
	@$(BIN)/python -m pytest

$(VENV)/bin/python:
	@echo "==> environment: $(VENV)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("trine needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py __init__.py | $(VENV)/bin/python
	@echo "==> install: trine and what it runs on (the first time takes minutes)"
	@$(PIP) 'setuptools>=77' wheel
	@$(PIP) '$(TORCH)'
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "==> install: development tools"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/trine
	@touch $@

clean:
	rm -rf $(VENV) data/demo runs/demo trine.egg-info build
