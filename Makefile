# Every target works in a fresh clone: it first makes .venv where that is missing or older than pyproject.toml and constraints.txt.
PYTHON ?= python3
EXPERIMENT ?= quick
ARGS ?=
PIP_ARGS ?=
EXTRAS ?= dev,launchers,dashboard
BIN := .venv/bin
STAMP := .venv/.installed
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-slow data train eval-extrapolation reproduce study analyse figures claims report publish atlas bench status

help:  ## list all targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		awk -F '\t' '{printf "  make %-20s %s\n", $$1, $$2}'
	@echo
	@echo '  EXPERIMENT=quick      a file of configs/experiment'
	@echo '  ARGS="steps=100"      settings (Hydra overrides), passed on to the command'
	@echo '  PIP_ARGS=...          passed on to pip install (see README.md for a smaller, CPU-only torch)'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
		f"Python {v[0]}.{v[1]} found; alibi_lm needs 3.11, 3.12 or 3.13. Give one: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

setup: $(STAMP)  ## create .venv with the pinned versions; takes a second when nothing has changed

check: $(STAMP)  ## check formatting, lint and types; changes no file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## fix what the formatter and the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP)  ## run the CPU test suite (5 minutes at most on 2 cores)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow" $(ARGS)

# Only a slow test needs this package, which installs fifty others.
$(STAMP)-lm-eval: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[lm-eval]'
	@touch $@

test-slow: $(STAMP)-lm-eval  ## run the slow tests (25 minutes at most on 2 cores)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m slow $(ARGS)

data: $(STAMP)  ## prepare and verify the experiment's corpus
	$(BIN)/python scripts/prepare_data.py experiment=$(EXPERIMENT) $(ARGS)

train: $(STAMP)  ## train one run
	$(BIN)/python scripts/train.py experiment=$(EXPERIMENT) $(ARGS)

eval-extrapolation: $(STAMP)  ## evaluate every finished run of the experiment; draw figure and table
	$(BIN)/python scripts/evaluate.py experiment=$(EXPERIMENT) $(ARGS)

reproduce: $(STAMP)  ## train all runs of the experiment that are not finished, then evaluate and draw
	$(BIN)/python scripts/reproduce.py experiment=$(EXPERIMENT) $(ARGS)

study: $(STAMP)  ## reproduce, then make further measurements, claims, report and the folder in docs/results
	$(BIN)/python scripts/study.py experiment=$(EXPERIMENT) $(ARGS)

analyse: $(STAMP)  ## look inside a curve: loss by position, fixed targets, decomposition, ...
	$(BIN)/python scripts/analyse.py experiment=$(EXPERIMENT) $(ARGS)

figures: $(STAMP)  ## redraw figures and tables from the result files alone
	$(BIN)/python scripts/figures.py experiment=$(EXPERIMENT) $(ARGS)

claims: $(STAMP)  ## check the paper's claims against the experiment's results
	$(BIN)/python scripts/claims.py experiment=$(EXPERIMENT) $(ARGS)

report: $(STAMP)  ## write one HTML file of the experiment's results
	$(BIN)/python scripts/report.py experiment=$(EXPERIMENT) $(ARGS)

publish: $(STAMP)  ## copy the experiment's results to docs/results, without weights
	$(BIN)/python scripts/publish.py experiment=$(EXPERIMENT) $(ARGS)

atlas: $(STAMP)  ## study every position scheme with three seeds (an hour on 2 cores); write docs/atlas
	$(BIN)/python scripts/study.py experiment=atlas $(ARGS)
	$(BIN)/python scripts/atlas.py folder=docs/results/atlas

bench: $(STAMP)  ## measure speed and memory per scheme, backend and length
	$(BIN)/python scripts/bench.py $(ARGS)

status: $(STAMP)  ## list the experiment's runs: finished, running, failed, partial, missing
	$(BIN)/python scripts/sweep_status.py experiment=$(EXPERIMENT) $(ARGS)
