# One command for each thing one does here. Every target sets up its own environment; the second time that costs nothing.
SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# Two test processes with one thread each; nothing that a test needs comes from a model hub.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2

# vLLM pins a torch and a transformers of its own, so its tests have an environment of their own.
VLLM_PYTHON ?= python3.11
VLLM_VENV := .venv-vllm
VLLM := $(VLLM_VENV)/.installed

DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
BENCH := $(VENV)/.installed-bench
CHROMIUM := /usr/bin/chromium

.PHONY: help install demo test test-slow test-real test-browser test-vllm test-vllm-slow lint types imports format bench bench-training bench-gpu bench-planning bench-serving bench-serving-load docs clean

help: ## list these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(DEV): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(DOCS): $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

$(BENCH): $(DEV) benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements.txt
	@touch $@

$(VLLM): tests/vllm_plugin/requirements.txt pyproject.toml
	@test -x $(VLLM_VENV)/bin/python || $(VLLM_PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing into $(VLLM_VENV); the first time this takes a few minutes"
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm_plugin/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

install: $(DEV) ## set the environment up and do nothing else

demo: $(DEV) ## two small models that each fail a task solve it together (about six minutes on two cores)
	$(BIN)/calm demo

test: $(DEV) ## the tests, without the slow ones and those on real checkpoints or in a browser
	$(PYTEST) -m "not slow and not real and not browser" $(PYTEST_ARGS)

test-slow: $(DEV) ## the slow tests
	$(PYTEST) -m "slow and not real" --timeout 1800 $(PYTEST_ARGS)

test-real: $(DEV) ## the tests on real checkpoints
	$(TEST_ENV) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m real --timeout 1800 $(PYTEST_ARGS)

test-browser: $(DEV) $(CHROMIUM) ## the tests of `calm playground` in Chromium
	$(TEST_ENV) $(BIN)/python -m pytest -m browser tests/playground $(PYTEST_ARGS)

$(CHROMIUM):
	@test "$$(id -u)" = 0 || { echo "$@ is missing. Install it: sudo apt-get install chromium"; exit 1; }
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends chromium

test-vllm: $(VLLM) ## the tests of the vLLM plugin, in an environment of their own (Python 3.11, Linux)
	$(TEST_ENV) $(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin -m "not slow" $(PYTEST_ARGS)

test-vllm-slow: $(VLLM) ## the slow ones of them: a server under load, two processes, a real checkpoint, compilation
	$(TEST_ENV) $(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin -m slow --timeout 1800 $(PYTEST_ARGS)

lint: $(DEV) ## ruff: lint and format, checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV) ## ruff: lint and format, repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## mypy
	$(BIN)/mypy

imports: $(DEV) ## the import order of the rooms
	$(BIN)/lint-imports

bench: $(DEV) ## what composition costs, against its parts; writes benchmarks/results/
	$(BIN)/python benchmarks/overhead.py

bench-training: $(BENCH) ## what a training step costs, against its floor, LoRA, full fine-tuning and CALM-pytorch
	$(BIN)/python benchmarks/training.py

bench-gpu: $(DEV) ## what training and decoding reach of a GPU; needs one
	$(BIN)/python benchmarks/gpu.py

bench-planning: $(DEV) ## calm plan's predictions against measurements (on an idle machine); writes benchmarks/results/
	$(BIN)/python benchmarks/planning.py

bench-serving: $(VLLM) ## vLLM's throughput of a composition, against its anchor and against transformers
	$(VLLM_VENV)/bin/python benchmarks/serving.py

MODEL ?= runs/demo/composed
bench-serving-load: $(VLLM) ## a vLLM server of MODEL (the demo's composition) under load; writes benchmarks/results/
	$(VLLM_VENV)/bin/python benchmarks/serving_load.py $(MODEL)

docs: $(DOCS) ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment, caches and builds; runs/ and results/ stay
	rm -rf $(VENV) $(VLLM_VENV) site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
