# Every target works from a fresh clone: it first makes .venv, when that is missing or older than its recipe.
PYTHON ?= python3
EXPERIMENT ?= quick
ARGS ?=
PIP_ARGS ?=
EXTRAS ?= dev,launchers,dashboard
BIN := .venv/bin
STAMP := .venv/.installed
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-slow data train eval-extrapolation reproduce study analyse figures claims report publish bench status

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		awk -F '\t' '{printf "  make %-20s %s\n", $$1, $$2}'
	@echo
	@echo '  EXPERIMENT=quick      a file of configs/experiment'
	@echo '  ARGS="steps=100"      Hydra overrides, passed on'
	@echo '  PIP_ARGS=...          passed to pip install (see README: a smaller, CPU-only torch)'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
		f"Python {v[0]}.{v[1]} found; alibi_lm needs 3.11, 3.12 or 3.13. Give one: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

setup: $(STAMP)  ## .venv with the pinned versions; a moment when nothing changed

check: $(STAMP)  ## formatter, linter and type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## let the formatter and the linter mend what they can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP)  ## the CPU test suite, 5 minutes at most on 2 cores
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## the long tests, 25 minutes at most
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m slow $(ARGS)

data: $(STAMP)  ## prepare the experiment's corpus and verify it
	$(BIN)/python scripts/prepare_data.py experiment=$(EXPERIMENT) $(ARGS)

train: $(STAMP)  ## one training run
	$(BIN)/python scripts/train.py experiment=$(EXPERIMENT) $(ARGS)

eval-extrapolation: $(STAMP)  ## evaluate every finished run of the experiment, draw figure and table
	$(BIN)/python scripts/evaluate.py experiment=$(EXPERIMENT) $(ARGS)

reproduce: $(STAMP)  ## train every run of the experiment (finished ones are skipped), then evaluate and draw
	$(BIN)/python scripts/reproduce.py experiment=$(EXPERIMENT) $(ARGS)

study: $(STAMP)  ## reproduce, then the experiment's further measurements, claims, report, and docs/results
	$(BIN)/python scripts/study.py experiment=$(EXPERIMENT) $(ARGS)

analyse: $(STAMP)  ## where a curve comes from: loss by position, fixed targets, decomposition, ...
	$(BIN)/python scripts/analyse.py experiment=$(EXPERIMENT) $(ARGS)

figures: $(STAMP)  ## redraw figures and tables from result files alone
	$(BIN)/python scripts/figures.py experiment=$(EXPERIMENT) $(ARGS)

claims: $(STAMP)  ## the paper's claims against the experiment's results
	$(BIN)/python scripts/claims.py experiment=$(EXPERIMENT) $(ARGS)

report: $(STAMP)  ## one HTML file of the experiment's results
	$(BIN)/python scripts/report.py experiment=$(EXPERIMENT) $(ARGS)

publish: $(STAMP)  ## copy the experiment's results, small enough to commit, to docs/results
	$(BIN)/python scripts/publish.py experiment=$(EXPERIMENT) $(ARGS)

bench: $(STAMP)  ## speed and memory per scheme, backend and length
	$(BIN)/python scripts/bench.py $(ARGS)

status: $(STAMP)  ## the experiment's runs: finished, running, failed, missing
	$(BIN)/python scripts/sweep_status.py experiment=$(EXPERIMENT) $(ARGS)
