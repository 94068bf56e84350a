# make demo | demo-smoke | test | test-quick | test-process | test-pages | test-slow | lint | env.
# PYTHON is the interpreter that .venv is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

SMOKE := --out runs/demo-smoke --config.training.steps=12 --config.checkpoint.every_steps=6 --config.eval.tokens=8192

.PHONY: env demo demo-smoke test test-quick test-process test-pages test-slow lint

env: .venv/installed

.venv/installed: setup.cfg requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spannorm_jax needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test]'
	touch $@

demo: env
	$(BIN)/python -m spannorm_jax.sweep demo local --out runs/demo
	$(BIN)/python -m spannorm_jax.sweep demo report --out runs/demo

demo-smoke: env
	rm -rf runs/demo-smoke
	$(BIN)/python -m spannorm_jax.sweep demo local $(SMOKE)
	$(BIN)/python -m spannorm_jax.sweep demo report $(SMOKE)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What each tier holds:
#   test-quick    the model, the train step, bad input
#   test          everything within the tests' own process, and short commands
#   test-process  runs of whole processes: killed, stopped, in pairs, with damaged files, in odd surroundings
#   test-pages    report pages in a browser (chromium): that of demo-smoke, which it does first, and of each sweep's archive
#   test-slow     test-process, the whole fault campaign, and the commands of experiments/launch/README.md
test: lint
	$(BIN)/python -m pytest

test-quick: env
	$(BIN)/python -m pytest tests/model tests/training tests/test_bad_input.py

test-process: env
	$(BIN)/python -m pytest -m "process and not slow"

# A file's tests on both workers, for each opens a browser of its own.
test-pages: demo-smoke
	$(BIN)/python -m pytest -m pages --dist load tests/report/test_pages.py

test-slow: env
	$(BIN)/python -m pytest -m "process or slow"
