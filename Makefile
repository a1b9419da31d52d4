# Set up, try, test and check openlance, with nothing but Python 3.11+, make and a package index.

# Which torch: one version that the tests ran with. Linux wheels of torch on PyPI are the CUDA build, which also
# runs on CPU but is large. For the CPU build add its index:
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# and for another version (2.8 up to, not including, 2.14):
#   make demo TORCH="torch>=2.8,<2.14"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread a process: on tensors as small as nano's, threads that wait for each other cost more than they do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format nano nano-score clean

help:
	@echo "make demo       set up, run every task with the bundled model, write demo_output/"
	@echo "make test       set up, run the tests that are not slow"
	@echo "make test-slow  the slow ones"
	@echo "make check      lint, format and types"
	@echo "make format     format the code"
	@echo "make nano       train the bundled model anew, in runs/; stop it and go on as you like"
	@echo "make nano-score measure the bundled model, as in the README"
	@echo "make setup      only set up, in $(VENV)"
	@echo "make clean      remove $(VENV), caches and demo_output"

setup: $(READY)

# Done once: again only when pyproject.toml changes, or after `make clean`.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "openlance needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/openlance demo --out demo_output

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two processes of one thread each: on two cores faster than one process of two threads.
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m openlance train --resume --replicas 2

nano: $(READY)
	$(TRAIN) --preset nano-pt
	$(TRAIN) --preset nano-ct --init runs/nano-pt/model
	$(TRAIN) --preset nano-sft --init runs/nano-ct/model

nano-score: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/openlance eval nano-bench --out scores

clean:
	rm -rf $(VENV) demo_output .pytest_cache .ruff_cache .mypy_cache
