# make run   - set up, fetch the default model, answer a prompt
# make test  - set up and run the tests
# make soak  - two minutes of mixed load, twenty kills of the engine, twice: what is too long for every run
# make cluster-test - two hosts in network namespaces, and a link that is cut: needs root and ip
# make check - format, lint, strict types, tests and two minutes of mixed load: what CI runs
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= Explain in three sentences why the sky is blue.

.PHONY: run test soak soak-short cluster-test check lint types setup setup-dev clean

run: setup
	@$(BIN)/foretell run "$(PROMPT)"

test: setup-dev
	@$(BIN)/python -m pytest

soak: setup-dev
	@$(BIN)/python -m pytest -m slow tests/server/test_campaigns.py

soak-short: setup-dev
	@$(BIN)/python -m pytest -m slow tests/server/test_campaigns.py -k two_minutes

cluster-test: setup-dev
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[cluster]"
	@$(BIN)/python -m pytest -m cluster -s tests/cluster

check: lint types test soak-short

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup-dev
	@$(BIN)/mypy

setup: $(VENV)/.setup-done
setup-dev: $(VENV)/.setup-dev-done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("foretell needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup-done: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.setup-dev-done: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.setup-done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
