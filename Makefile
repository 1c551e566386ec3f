# make demo   train, measure, index and serve on the bundled model      make test   the tests, but for long ones
# make check  lint, format, types, import layers                        make help   the other targets
#
# Everything is installed into .venv at the versions of constraints.txt; nothing else on the machine is changed, except
# that `make test` installs Debian's chromium where there is no browser for the tests of the page.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Modules are compiled when they are first imported, which is a third of them; files are run in conftest.py's order.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE # else each process would compile all that it imports
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
ARGS ?=

.PHONY: help demo replication test test-all test-types check format clean
help:
	@sed -n '1,2s/^# //p' Makefile
	@echo "make test-all   all tests that need no GPU or network"
	@echo "make test-types  the fast tests without a browser, with every annotation executed"
	@echo "make replication  measure the post's claims on the bundled model, and write docs/replication.md"
	@echo "make format     apply the formatter"
	@echo "make clean      remove .venv, caches and runs"

demo: .venv/installed
	$(BIN)/headscope demo $(ARGS)

replication: .venv/installed
	$(BIN)/headscope report runs/replication $(ARGS)
	cp runs/replication/report.md docs/replication.md

test: .venv/installed-dev
	@sh scripts/ensure_chromium.sh
	$(PYTEST) -m "not (slow or judge or gpu or network) and (smoke or not browser)" --hypothesis-profile=quick $(ARGS)

test-all: .venv/installed-dev
	@sh scripts/ensure_chromium.sh
	$(PYTEST) -m "not gpu and not network" $(ARGS)

test-types: .venv/installed-dev
	$(PYTEST) -m "not (slow or judge or gpu or network or browser)" --hypothesis-profile=quick \
		--jaxtyping-packages=headscope,beartype.beartype $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff format .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable ".[dev]"
	touch .venv/installed $@

clean:
	rm -rf .venv runs build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
