# Every target sets up what it needs by itself, below .venv and .cache. `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
# Further arguments for pytest: make test PYTEST_ARGS="-k redis"
PYTEST_ARGS ?=

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: chart help demo test test-unit test-faults check lint types contracts format setup setup-tools setup-demo clean

help: ## What there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: setup-demo ## A real vLLM that starts warm from memory, Redis and disk
	@$(BIN)/kvstrata demo --cache-dir .cache --report demo-report.json

test: setup check ## Everything: lint, types, import contracts, and all tests
	$(BIN)/python -m pytest -m "not slow and not extra" $(PYTEST_ARGS)

test-unit: setup-tools ## The tests that need no vLLM
	$(BIN)/python -m pytest -m "not slow and not vllm and not extra and not deploy" $(PYTEST_ARGS)

test-extras: setup ## The tests of client libraries that are too large for the others (NIXL, InfiniStore)
	$(BIN)/python -m pip install --no-deps nixl-cu12==1.5.1 infinistore==0.2.35
	$(BIN)/python -m pip install --no-deps --target .cache/uvloop-0.21 uvloop==0.21.0
	INFINISTORE_PYTHONPATH=$(CURDIR)/.cache/uvloop-0.21 $(BIN)/python -m pytest -m extra tests/tiers $(PYTEST_ARGS)

test-faults: setup-tools ## Every backend under every fault; prints the table and writes fault-report.json
	INFINISTORE_PYTHONPATH=$(CURDIR)/.cache/uvloop-0.21 FAULT_REPORT=$(CURDIR)/fault-report.json \
	    $(BIN)/python -m pytest -m fault_suite tests/fault $(PYTEST_ARGS)

check: lint types contracts ## What needs no test run

lint: setup-tools ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-tools ## mypy
	$(BIN)/mypy

contracts: setup-tools ## import-linter: which layer may import which
	$(BIN)/lint-imports

chart: setup-tools ## Copy Prometheus' rules, Grafana's dashboard and the settings' schema into the Helm chart
	cp deploy/prometheus/*.yaml deploy/helm/kvstrata/files/prometheus/
	cp deploy/grafana/*.json deploy/helm/kvstrata/files/grafana/
	$(BIN)/python scripts/chart_schema.py

format: setup-tools ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: python ## Install all that `make test` needs
	@$(PYTHON) scripts/set_up.py all

setup-tools: python
	@$(PYTHON) scripts/set_up.py tools

setup-demo: python
	@$(PYTHON) scripts/set_up.py demo

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "set-up: '$(PYTHON)' is no Python 3.11 or newer; say which one: make PYTHON=python3.12 ..." >&2; exit 1; }

clean: ## Remove the environment, the model and every cache
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis demo-report.json fault-report.json
