# Everything a contributor types. Each target sets up .venv when it is missing or out of date, and starts at once when not.
#   make demo    the miniature world: train, measure, plot
#   make test    the whole test suite, with coverage
#   make check   lint, types, tests
#   make lint    lint and types alone
#   make docs    the pages in docs/, to outputs/docs; fails on a warning
#   make bench   benchmarks/ through its resumable grid runner
PYTHON ?= python3
# Test processes side by side, each with one thread.
JOBS ?= 2
# `make test` fails below this coverage of the package, in percent; a part of the tests, chosen by ARGS, covers less.
COVERAGE ?= $(if $(ARGS),0,90)
BENCH ?= --budget-minutes 60

VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
# By content and place, not by time: a checkout touches files, and a .venv may come from another folder.
STATE := $(shell { pwd; cat setup.cfg constraints.txt $(PLUGINS:%=%/pyproject.toml); } | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(STATE)

.PHONY: install demo test check lint docs bench
install: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-e '.[demo,quantization,lora,test,dev,docs]' $(PLUGINS:%=-e ./%)
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP)
	$(BIN)/python -m salad_lightning demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 15 \
		--cov --cov-report term:skip-covered --cov-fail-under $(COVERAGE) $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

check: lint test

# The variable silences a notice about the generator's successor.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(BENCH)
