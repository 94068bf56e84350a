# PYTHON is the interpreter that .venv is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

SMOKE := --out runs/demo-smoke --config.training.steps=12 --config.checkpoint.every_steps=6 --config.eval.tokens=8192

.PHONY: help env demo demo-smoke test test-quick test-process test-pages test-tpu test-cuda test-eval test-buckets test-hf test-slow lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

env: .venv/installed ## .venv, with what is pinned in requirements.txt

.venv/installed: setup.cfg requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "spannorm_jax needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test]'
	touch $@

demo: env ## nine runs, and a report on them; goes on where it was stopped
	$(BIN)/python -m spannorm_jax.sweep demo local --out runs/demo
	$(BIN)/python -m spannorm_jax.sweep demo report --out runs/demo

demo-smoke: env ## the demo with twelve steps a run
	rm -rf runs/demo-smoke
	$(BIN)/python -m spannorm_jax.sweep demo local $(SMOKE)
	$(BIN)/python -m spannorm_jax.sweep demo report $(SMOKE)

lint: env ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, and all tests within the tests' own process, and short commands
	$(BIN)/python -m pytest

test-quick: env ## the model, the train step, bad input
	$(BIN)/python -m pytest tests/model tests/training tests/test_bad_input.py

test-process: env .venv-hf/installed ## whole processes: killed, stopped, in pairs, in odd surroundings; and test-hf
	$(BIN)/python -m pytest -m "process and not slow"

# A file's tests on both workers, for each opens a browser of its own.
test-pages: demo-smoke ## pages in a browser (chromium): demo-smoke's, and of each sweep's archives
	$(BIN)/python -m pytest -m pages --dist load tests/report/test_pages.py

# libtpu stays out of .venv, where every start of JAX would look for a TPU.
.venv-tpu/installed: setup.cfg requirements.txt
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test,tpu-plan]'
	touch $@

test-tpu: .venv-tpu/installed ## our programs by the TPU's own compiler, which needs no TPU (Linux)
	.venv-tpu/bin/python -m pytest -m tpu --dist load tests/plan/test_tpu.py

# The CUDA plugin stays out of .venv likewise; its wheels are gigabytes.
.venv-cuda/installed: setup.cfg requirements.txt
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test,gpu]'
	touch $@

test-cuda: .venv-cuda/installed ## our programs by XLA for an H100, which needs none (Linux; not in .ci/run)
	.venv-cuda/bin/python -m pytest -m slow --dist load tests/plan/test_cuda.py

# lm-evaluation-harness brings pandas, scikit-learn and others, which nothing else here needs.
.venv-eval/installed: setup.cfg requirements.txt
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test,eval]'
	touch $@

test-eval: .venv-eval/installed ## tasks of lm-evaluation-harness on runs
	.venv-eval/bin/python -m pytest -m eval tests/inference/test_harness.py

# Clients of Google and Amazon bring sixty packages.
.venv-buckets/installed: setup.cfg requirements.txt tests/run/requirements-buckets.txt
	$(PYTHON) -m venv .venv-buckets
	.venv-buckets/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/run/requirements-buckets.txt -e '.[test,test-buckets,gcs,s3]'
	touch $@

test-buckets: .venv-buckets/installed ## runs in buckets, gs:// and s3://, whose servers fail now and then
	.venv-buckets/bin/python -m pytest -m buckets tests/run/test_bucket.py tests/run/test_bucket_runs.py

# torch and transformers alone: this package is not there, and its pins would not go with version 4.
.venv-hf/installed .venv-hf4/installed: .venv-%/installed: tests/hf/requirements-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

test-hf: env .venv-hf/installed ## exported runs in transformers 5 (test-slow: in 4.57 too)
	$(BIN)/python -m pytest -m process tests/hf

test-slow: env .venv-hf/installed .venv-hf4/installed ## test-process, all faults, and the commands of experiments/launch/README.md
	$(BIN)/python -m pytest -m "process or slow"
