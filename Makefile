# `make demo` sets everything up and runs the main job on the bundled checkpoint; `make test` runs
# the tests. Both reuse .venv: the install is repeated only when pyproject.toml or constraints.txt
# changed. torch is installed first and by itself, so that its pin decides which build is fetched.
# Of the 24,000 files installed a sixth is ever imported: Python compiles those at their first import,
# once, whatever the environment says of writing bytecode.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := dev,readers,bnb,compressed,eval,plots,kv,serve
STAMP := $(VENV)/.installed
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-matrix fuzz lint format types check clean

help:
	@echo "make demo    set up .venv, then quantize, verify, load and measure the demo checkpoint"
	@echo "make test    run the tests"
	@echo "make test-matrix  the tests under each combination of Python, torch and transformers"
	@echo "make fuzz    spoiled input for every parser, half a minute each"
	@echo "make lint    ruff: rules and formatting"
	@echo "make types   mypy, strict, for qquant/"
	@echo "make check   lint, types, test and demo: what CI runs"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove the demo's output and the caches (not .venv)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qquant needs Python 3.10 or newer: make PYTHON=python3.11 demo")'
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -e '.[$(EXTRAS)]' -c constraints.txt
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

# As many processes as there are cores, each with one thread, files in conftest's order; then what
# measures times, by itself.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not alone' --numprocesses auto --dist loadfile \
	  --no-loadscope-reorder
	$(BIN)/python -m pytest -m alone

# ROWS=3.12 runs the rows whose name contains it; `scripts/version_matrix.py --help` has the rest.
test-matrix:
	$(PYTHON) scripts/version_matrix.py $(if $(ROWS),--only $(ROWS))

fuzz: setup
	$(BIN)/python scripts/fuzz.py all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/mypy

check: lint types test demo

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache qquant.egg-info
