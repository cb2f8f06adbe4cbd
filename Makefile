# `make demo` and `make test` each set up .venv with pip alone and run; nothing else is needed but Python 3.11+ and make.
PYTHON ?= python3
PY := .venv/bin/python
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
	$(PY) -m pytest -q

test-fast: .venv/ready  ## seconds: random weights only
	$(PY) -m pytest -q -m "not real and not slow"

test-system:  ## what needs Debian's packages (Redis, Chromium): nothing yet
	@echo "test-system: no test needs system packages yet"

check: .venv/ready  ## style and types
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/pyright

clean:
	rm -rf .venv
