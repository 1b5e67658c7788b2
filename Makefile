# Two commands on a fresh machine: `make demo` and `make test`. Needed: Python >= 3.11 with venv, pip, make.
# Each target sets up .venv first; a stamp per target says that this is done, until pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt --build-constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
# A file at a time: what a module prepares (a forkserver, an example that was run) is made once.
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: help demo test test-full lint bench examples docs clients
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make demo       the main job on real data: examples/digits_vae.py, results in results/"
	@echo "make test       the test suite, on all cores"
	@echo "make test-full  the slow checks; writes docs/results.md"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make bench      ratios to Pyro's own losses"
	@echo "make examples   every example, in full length"
	@echo "make docs       doctests of README.md and docs/*.md"
	@echo "make clients    loops of real packages that use Pyro's SVI"

# pip first: the pip that comes with Python 3.11 knows no dependency groups. Its line is in constraints.txt.
$(VENV)/.pip: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^pip==' constraints.txt)"
	@touch $@

# torch next and by its exact version: a range would let pip take the newest build, with gigabytes of GPU libraries.
$(VENV)/.torch: $(VENV)/.pip
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.lint: $(VENV)/.pip
	$(INSTALL) --group lint
	@touch $@

$(VENV)/.examples: $(VENV)/.torch
	$(INSTALL) --editable ".[examples]"
	@touch $@

$(VENV)/.test $(VENV)/.bench $(VENV)/.docs $(VENV)/.clients: $(VENV)/.%: $(VENV)/.torch
	$(INSTALL) --group $* --editable .
	@touch $@

demo: $(VENV)/.examples
	$(BIN)/python examples/digits_vae.py
	@echo "The results are in $(CURDIR)/results:"
	@find results -type f | sort

test: $(VENV)/.test
	$(PYTEST) $(PARALLEL)

test-full: $(VENV)/.test
	$(PYTEST) $(PARALLEL) -m slow --timeout 7200 --write-results

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

examples: $(VENV)/.examples
	set -e; for example in examples/*.py; do echo "== $$example"; $(BIN)/python "$$example"; done

# pytest's exit status 5 means that no doctest was found.
docs: $(VENV)/.docs
	$(PYTEST) --doctest-glob "*.md" README.md $(wildcard docs/*.md) || test $$? -eq 5

clients: $(VENV)/.clients
	@test -d tests/clients || { echo "There is no client suite yet (tests/clients)." >&2; exit 1; }
	$(PYTEST) tests/clients
