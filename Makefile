# make setup builds .venv once; everything else depends on it.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PEERS := .venv/peers

.DELETE_ON_ERROR:
.PHONY: setup demo test check bench docs format lock

setup: $(STAMP)

# Built anew when what is installed, or how, has changed.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "scalenet_ray needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1):" \
			"install one and name it, as in make setup PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "Building .venv: some minutes, about 7 GB."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The whole path on the embedded sample, from pictures to AP and a report.
demo: setup
	$(BIN)/python jobs/eval_coco.py --policies whole grid-2 first-pass scalenet oracle

# One thread: on shared cores two are slower than one, and sums come out the same every time.
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/audit.py

# The peers lie beside the environment, not in it.
$(PEERS)/.installed: $(STAMP) bench/requirements.txt
	rm -rf $(PEERS)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --target $(PEERS) -r bench/requirements.txt
	@touch $@

# The real photographs and their detector: SCALENET_RAY_DATA; without it only what the embedded sample can measure.
bench: $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python -m bench

# The documentation's pages, into site/; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins everything that pyproject.toml asks for, with hashes, for every platform. Versions that still fit stay.
lock:
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch"; \
	"$$scratch/bin/python" -m pip install --quiet uv; \
	"$$scratch/bin/uv" pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes \
		--no-annotate --no-header pyproject.toml --output-file requirements.txt; \
	"$$scratch/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-deps --generate-hashes \
		--no-annotate --no-header bench/requirements.in --output-file bench/requirements.txt
