# make demo   search, sample and compare on the shipped MNIST model; results in out/
# make test   the tests; test-slow: those marked slow; test-fast: those marked fast, two thirds of them in half a minute
# make lint   style and types
# make docs   the site of docs/ in out/site; every link checked
# make venv   only .venv, with the package and what the demo and the tutorial import
# make bench  the benchmarks' tables, a few minutes; CONTRIBUTING.md has the options
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# A thread that waits sleeps instead of spinning: on two shared cores spinning made the demo ten times slower.
export OMP_WAIT_POLICY ?= passive
# Where there is a compiler, code that does not compile stops make here: the tests would pass on the reference alone.
export DSS_FAST_REQUIRE_EXTENSION ?= $(shell command -v c++ 2>/dev/null)

.PHONY: demo test test-slow test-huge test-fast bench lint docs venv clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.mnist.demo --out out

# A process a core; each runs on one thread, which tests/conftest.py sets.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test: $(VENV)/.test
	$(PYTEST)

test-slow: $(VENV)/.test
	$(PYTEST) -m "slow and not huge"

test-huge: $(VENV)/.test
	$(PYTEST) -m huge -n 0

test-fast: $(VENV)/.test
	$(PYTEST) -m "fast and not slow"

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude "*.md" .
	$(BIN)/mypy

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is in out/site: open out/site/index.html"

venv: $(VENV)/.demo

NEWER = import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
  "dss_fast needs Python 3.11 or newer, and this is %d.%d: $(1)" % (v[0], v[1]))

$(VENV)/bin/python:
	@$(PYTHON) -c '$(call NEWER,name another one as in make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12)'
	$(PYTHON) -m venv $(VENV)

# The extension is built against the torch just installed, hence no build isolation.
$(VENV)/.demo: requirements.txt pyproject.toml setup.py $(wildcard csrc/*) | $(VENV)/bin/python
	@$(BIN)/python -c '$(call NEWER,remove $(VENV) and name another one by PYTHON=)'
	$(PIP) -r requirements.txt
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.test: requirements-test.txt $(VENV)/.demo
	$(PIP) -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info dss_fast/*.so
