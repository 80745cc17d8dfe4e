# make demo        set up, then the main job on real text: train, grow, train on
# make test        set up, then a test of every behaviour; PYTEST_ARGS=... goes to pytest
# make test-all    set up, then every test, those that repeat at scale and those on a real SLURM as well
# make test-fast   the same without the slow tests
# make test-timing those that compare speeds and want a quiet machine
# make test-long   training curves over 500 steps
# make gpu-check   on a machine with a GPU, without set-up: results, speeds and memory, in at most 8 minutes
# make lint        set up, then ruff and mypy
# make docs        set up, then the documentation in site/; a warning is an error
# make clean       remove what the set-up made, and the runs of the demo in runs/demo; never other runs, or data

VENV ?= .venv
PYTHON ?= python3
# What pip installs as torch, with pip's options if need be: TORCH="torch==2.13.0 --index-url URL" for a CPU build
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -q

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
CONSTRAINTS := $(VENV)/constraints.txt
STAMP := $(VENV)/.set-up
DOCS_STAMP := $(VENV)/.docs-set-up
MADE_HERE := $(VENV)/.made-by-set-up
CORES := $(shell getconf _NPROCESSORS_ONLN)
# Ranks share the cores of one machine; more than a few threads do not make a tiny model faster.
HALF_OF_CORES := $(shell n=$$(($(CORES) / 2)); echo $$((n < 1 ? 1 : n > 4 ? 4 : n)))

# Processes that run tests at the same time, each a file at a time; 0 runs them in pytest itself
WORKERS ?= $(shell n=$(CORES); echo $$((n > 8 ? 8 : n)))

.PHONY: demo test test-all test-fast test-timing test-long lint docs clean setup

demo: export OMP_NUM_THREADS ?= $(HALF_OF_CORES)
demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/run_demo.py

PYTEST = PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest

AT_THE_SAME_TIME = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) $(AT_THE_SAME_TIME) -m "not scale and not timing and not long" $(PYTEST_ARGS)

test-all: $(STAMP)
	$(PYTEST) $(AT_THE_SAME_TIME) $(PYTEST_ARGS)

test-fast: $(STAMP)
	$(PYTEST) $(AT_THE_SAME_TIME) -m "not slow and not timing and not long" $(PYTEST_ARGS)

test-timing: $(STAMP)
	$(PYTEST) -m timing -s $(PYTEST_ARGS)

test-long: $(STAMP)
	$(PYTEST) -m long $(PYTEST_ARGS)

gpu-check:
	$(PYTHON) tools/gpu_check.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only the first time does this need a network.
docs: $(DOCS_STAMP)
	$(BIN)/python -m mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet -c $(CONSTRAINTS) --no-build-isolation -e ".[docs]"
	touch $@

setup: $(STAMP)

# torch comes first and is then held fast: otherwise a dependency may replace it by another build of gigabytes.
# deepspeed's setup.py imports torch, which an isolated build does not have.
$(STAMP): setup.py pyproject.toml Makefile
	test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && touch $(MADE_HERE); }
	$(PIP) install --quiet $(TORCH)
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(CONSTRAINTS)
	$(PIP) install --quiet -c $(CONSTRAINTS) "setuptools>=77" wheel ninja numpy packaging
	$(PIP) install --quiet -c $(CONSTRAINTS) --no-build-isolation deepspeed==0.19.8
	$(PIP) install --quiet -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	touch $@

# An environment of another name that was there before the set-up is the user's.
clean:
	test $(VENV) != .venv -a ! -e $(MADE_HERE) || rm -rf $(VENV)
	rm -rf build site megatron_tf.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -rf $(addprefix runs/demo/,small control grown expanded loss.png)
	rmdir runs/demo runs 2>/dev/null || true
	find megatron_tf launch tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
