# make demo builds a light .venv: the core and Ray, no torch. make setup adds the rest; other targets depend on it.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
LIGHT := .venv/.light
STAMP := .venv/.installed
PEERS := .venv/peers
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: setup demo test test-slow test-all check bench docs format lock

setup: $(STAMP)

# Built anew when what is installed, or how, has changed. Its versions are those of requirements.txt. Most of its modules
# the demo never imports: each is compiled when it is.
$(LIGHT): requirements-demo.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "scalenet_ray needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1):" \
			"install one and name it, as in make setup PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "Building .venv: the core and Ray, a minute or two, about 1 GB."
	$(PYTHON) -m venv .venv
	$(PIP) --no-compile --require-hashes -r requirements-demo.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(STAMP): $(LIGHT) requirements.txt
	@echo "Adding torch, training and development tools to .venv: some minutes, about 7 GB in all."
	$(PIP) --require-hashes -r requirements.txt
	@touch $@

# The whole path on the embedded sample, from images to AP and a report: small scenes on Ray, then large ones in one
# process. One thread: on two cores shared with others, two took twice as long.
demo: $(LIGHT)
	$(BIN)/python jobs/eval_coco.py --policies whole grid-2 regions scalenet oracle
	OMP_NUM_THREADS=1 $(BIN)/python jobs/eval_coco.py --split large2017 --limit 4 --engine local --smallest-object 12 \
		--policies whole slices@192 regions regions-oracle

# Two processes of one thread each; the files whose tests share one Ray go to one of them, and start first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# In under 8 minutes on two cores.
test: setup
	$(PYTEST) -m "not slow"

# The rest: clusters, killed drivers and nodes, failing S3 requests, notebooks, the documentation's commands, a browser.
test-slow: setup
	$(PYTEST) -m slow

test-all: test test-slow

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
lock: LOCK = pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
lock:
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch"; \
	"$$scratch/bin/python" -m pip install --quiet uv; \
	"$$scratch/bin/uv" $(LOCK) --extra dev pyproject.toml --output-file requirements.txt; \
	echo "setuptools>=80" | "$$scratch/bin/uv" $(LOCK) --extra ray --constraint requirements.txt \
		- pyproject.toml --output-file requirements-demo.txt; \
	"$$scratch/bin/uv" $(LOCK) --no-deps bench/requirements.in --output-file bench/requirements.txt
