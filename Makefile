# `make demo` and `make test` each set up .venv with pip alone and run; nothing else is needed but Python 3.11+ and make.
PYTHON ?= python3
PY := .venv/bin/python
NDIF := .venv-ndif/bin/python
# Processes that run tests side by side, a file each; each may hold a small real model (2 GB).
WORKERS ?= 2
# Threads that wait give way, and freed memory is kept for the next forward pass: about a tenth less time on two cores.
export OMP_WAIT_POLICY ?= passive
export MALLOC_MMAP_THRESHOLD_ ?= 8589934592
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592

.PHONY: demo test test-fast test-system check clean

.venv/ready: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch .venv/ready

demo: .venv/ready  ## steer a small real model into refusing; figures under runs/
	@model=$$($(PY) -m latentguard.weights qwen2_5_coder_0_5b qwen2_5_coder_0_5b_q4) && $(PY) -m latentguard.run exp=steer_harm data=builtin model=$$model

test: .venv/ready  ## all tests, the real model's too
	$(PY) -m pytest -q -n $(WORKERS) --dist loadfile -m "not docs and not browser"

test-fast: .venv/ready  ## seconds: random weights only
	$(PY) -m pytest -q -m "not real and not slow and not docs and not browser"

.venv-ndif/ready: tests/loopback/requirements.txt tests/loopback/constraints.txt
	test -x $(NDIF) || $(PYTHON) -m venv .venv-ndif
	$(NDIF) -m pip install --quiet --disable-pip-version-check -c tests/loopback/constraints.txt torch
	$(NDIF) -m pip install --quiet --disable-pip-version-check -c tests/loopback/constraints.txt -r tests/loopback/requirements.txt
	$(NDIF) -m pip install --quiet --disable-pip-version-check --ignore-requires-python --no-deps ndif==0.1.2
	touch .venv-ndif/ready

.PHONY: redis
redis:
	@command -v redis-server > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null; } || \
	  { echo "make test-system needs redis-server on PATH: install it with your package manager (Debian: sudo apt-get install redis-server)."; exit 1; }
	@command -v redis-server > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server; }

.PHONY: chromium
chromium:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null; } || \
	  { echo "make test-system needs chromium on PATH: install it with your package manager (Debian: sudo apt-get install chromium)."; exit 1; }
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

.venv/browser: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	touch .venv/browser

test-system: redis chromium .venv/docs .venv/browser .venv-ndif/ready  ## what needs more than .venv and pip: pages in a browser, the documentation site, the studies on NDIF's own server
	$(PY) -m pytest -q -m "browser or docs"
	LATENTGUARD_NDIF_PYTHON=$(CURDIR)/$(NDIF) $(PY) -m pytest -q -m ndif

.venv/docs: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch .venv/docs

.PHONY: docs
docs: .venv/docs  ## the documentation site, strictly: site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

check: .venv/ready  ## style and types
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/pyright

clean:
	rm -rf .venv .venv-ndif
