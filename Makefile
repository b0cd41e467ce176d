# make demo: install into .venv and pretrain a small model on real text.   make test: install and run every check.
# Both may be repeated: what is done already is not done again.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip installs the first torch that the declared range admits; on Linux that is a CUDA build unless TORCH names another.
TORCH ?= torch>=2.11,<2.14
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types unit test-slurm slurm-packages test-chaos clean

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

# A real Slurm cluster on this machine. Its nodes have networks of their own, which takes root.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2

test-slurm: slurm-packages $(VENV)/.installed-dev
	@echo "==> tests: pytest on a Slurm cluster"
	@$(BIN)/python -m pytest -m slurm tests/slurm

slurm-packages:
	@[ "$$(id -u)" = 0 ] || { echo "make test-slurm needs root, to install Slurm and to give its nodes networks" >&2; exit 1; }
	@type -P slurmctld slurmd sbatch munged ip >/dev/null || { \
	  type -P apt-get >/dev/null || { echo "make test-slurm needs Slurm and munge: install them, there is no apt-get here" >&2; exit 1; }; \
	  echo "==> install: $(SLURM_PACKAGES)"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES) >/dev/null; }

# Training among faults: a disk of its own that becomes full, and lives with a wrong clock.
CHAOS_PACKAGES := datefudge

test-chaos: $(VENV)/.installed-dev
	@[ "$$(id -u)" = 0 ] || { echo "make test-chaos needs root: it mounts a small disk, and installs $(CHAOS_PACKAGES)" >&2; exit 1; }
	@type -P datefudge >/dev/null || { \
	  type -P apt-get >/dev/null || { echo "make test-chaos needs $(CHAOS_PACKAGES), and apt-get to install it" >&2; exit 1; }; \
	  echo "==> install: $(CHAOS_PACKAGES)"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CHAOS_PACKAGES) >/dev/null; }
	@echo "==> tests: pytest among faults"
	@$(BIN)/python -m pytest -m chaos -s tests/chaos

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
