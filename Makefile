# The doors of this repository. Every one works in a fresh clone and needs no root: the first sets up .venv by itself.
#
#   make setup    .venv with motte and everything its tests need, at the versions of constraints.txt
#   make demo     a real model in 12 sealed parts, from plan to answers; a small ResNet trained split, beside the plain
#                 run; and a page of what each way of running the model costs: demo/report.html
#   make test     every test that this machine can run      (PYTEST_ARGS="-k measure -x" narrows it)
#   make lint     ruff check, ruff format --check, mypy --strict
#   make fmt      let ruff fix and format
#   make bench    every benchmarks/bench_*.py, one after the other, in its standard form; their page: out/benchmarks.md
#   make clean    remove .venv and caches
#
# PYTHON=python3.12        the interpreter that .venv is made from (3.11 or newer)
# VENV=/some/where         the environment's place
# TEST_PROCESSES=1         how many test files run at a time; one for each core, at most 8
# TORCH_INDEX_URL=https:// a package index with the torch build you want (CPU only, another CUDA), see CONTRIBUTING.md

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= logical
BIN := $(VENV)/bin
STAMP := $(VENV)/.motte-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_PINS := $(shell grep -E '^(torch|torchvision)==' constraints.txt)

# Idle OpenMP threads that spin would steal the cores of the trusted worker next to them.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint fmt bench clean

help:
	@sed -n 's/^#   make /make /p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: $(PYTHON) is missing or older than 3.11'; echo 'hint: make PYTHON=/path/to/python3.11'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo 'error: $(PYTHON) -m venv failed'; echo 'hint: on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	$(PIP) install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) --constraint constraints.txt $(TORCH_PINS)
	$(PIP) install --constraint constraints.txt --editable '.[text,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python scripts/demo.py
	$(BIN)/python scripts/demo_training.py
	$(BIN)/python scripts/demo_report.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python scripts/run_benchmarks.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/motte.egg-info
