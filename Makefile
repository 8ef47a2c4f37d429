# The verbs of the project. Each installs what it needs into .venv; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# Two workers: the tests are written for two cores, and most of their time is spent waiting.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup

.PHONY: help demo test test-fast test-openstack check format bench simulate nightly clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

demo: $(VENV)/.demo ## Run a real analysis on a grid of three sites on this machine.
	@exec $(BIN)/python examples/foam/demo.py $(DEMO)

test: $(VENV)/.dev ## Run all tests; as root, install the system packages they need first.
	tests/testbeds/install
	PYTHONPATH=tests $(BIN)/python -m testbeds.build
	$(PYTEST)

test-openstack: $(VENV)/.dev ## Run the tests against a real OpenStack, which needs root and some minutes.
	tests/testbeds/install openstack
	$(BIN)/pytest -n 0 -m openstack

test-fast: $(VENV)/.dev ## Run the tests that need no other program: the inner loop.
	$(PYTEST) tests/unit tests/contract

check: $(VENV)/.dev ## Format, lint, types, import directions, module sizes, docs examples.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py
	$(BIN)/pytest -q -n 0 tests/docs

format: $(VENV)/.dev ## Put every file into the house format.
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.bench ## Measure speed side by side with the alternatives; prints ratios.
	tests/testbeds/install
	$(BIN)/python bench/first_light.py
	$(BIN)/python bench/matching.py
	$(BIN)/python bench/leases.py
	$(BIN)/python bench/thousand.py
	$(BIN)/python bench/mesh.py
	$(BIN)/python bench/containers.py
	$(BIN)/python bench/machines.py

simulate: $(VENV)/.dev ## Simulate grids of 10 to 5000 sites; SEEDS=N, SITES=10,100; KIND=… SEED=N is one run again.
	@PYTHONPATH=tests PYTHONHASHSEED=0 $(BIN)/python -m simulation $(if $(KIND),--kind $(KIND)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SITES),--sites $(SITES)) \
	  $(if $(OUT),--out $(OUT))

nightly: $(VENV)/.dev ## Hurt every cloud by faults and kills, RUNS=500 times each; SEED=N is one run again.
	tests/testbeds/install
	PYTHONPATH=tests $(BIN)/python -m testbeds.build
	RUNS=$(or $(RUNS),500) SEED=$(SEED) $(PYTEST) -k faults --timeout 14400
	tests/testbeds/install openstack
	RUNS=$(or $(RUNS),500) SEED=$(SEED) $(BIN)/pytest -n 0 -m openstack -k faults --timeout 43200

clean: ## Remove what these verbs made.
	rm -rf $(VENV) build dist demo-results .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	tools/make_venv $(VENV) $(PYTHON)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	tools/install $(VENV) -e '.[lend,examples]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	tools/install $(VENV) -e '.[lend,examples]' --group check --group test
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	tools/install $(VENV) -e '.[lend,examples]' --group bench
	@touch $@
