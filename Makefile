# Everything starts from a bare machine: Python 3.10-3.12 with venv, gcc, g++, git and make.
# The targets do their own set-up, which takes no time when nothing has changed.

# Interpreter for the environments; empty: the first of python3.11, 3.12, 3.10 that is complete.
PYTHON ?=
# More arguments for pytest, as in: make test PYTEST_ARGS='-k swin -x'
PYTEST_ARGS ?=
# A process per core, at most four: each holds torch, mmdet and mmseg. A file's tests stay together,
# as they share fixtures. In their order, since the slowest files have few tests and would come last.
PYTEST_PROCESSES := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# More arguments for the benchmark, as in: make bench BENCH_ARGS='--out speed.json'
BENCH_ARGS ?=
# More arguments for the run on a GPU, as in: make gpu GPU_ARGS='--max-minutes 4'
GPU_ARGS ?=
# Interpreter of the run on a GPU, taken as it is; empty: that of .venv, which is set up first.
GPU_PYTHON ?=

# Some machines keep Python from storing what it has compiled: ten seconds for each start of a tool.
unexport PYTHONDONTWRITEBYTECODE
VENV_PYTHON := .venv/bin/python
# What the site is written with.
MKDOCS := mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings-python==2.0.11

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-onedl demo demo-segmentation demo-trees test test-onedl bench gpu lint \
	format docs doctor clean distclean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv with everything in it (first time: minutes; afterwards: nothing to do)
	@PYTHON='$(PYTHON)' bash tools/setup.sh openmmlab

setup-onedl: ## Make .venv-onedl with the forks onedl-* in place of the official packages
	@PYTHON='$(PYTHON)' bash tools/setup.sh onedl

demo: setup ## Train a dense detector, make it idle, test, time and draw both (6 minutes)
	@$(VENV_PYTHON) tools/demo.py detector

demo-segmentation: setup ## The same with a segmentor
	@$(VENV_PYTHON) tools/demo.py segmentor

demo-trees: demo ## The same with aerial photographs of trees (21 MB are downloaded)
	@$(VENV_PYTHON) -m pip download --quiet --no-deps --dest data deepforest==2.1.0
	@$(VENV_PYTHON) tools/demo.py trees --keep 0.7
	@$(VENV_PYTHON) tools/demo.py trees --keep 0.5

docs: setup ## Write the site to site/ (MkDocs comes into an environment of its own)
	@[ -x .venv-docs/bin/mkdocs ] || { $(VENV_PYTHON) -m venv .venv-docs && \
		.venv-docs/bin/pip install --quiet --disable-pip-version-check $(MKDOCS); }
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

test: lint ## Lint, type check and all tests
	@$(VENV_PYTHON) -m pytest $(PYTEST_PROCESSES) $(PYTEST_ARGS)

test-onedl: setup-onedl ## All tests with the forks onedl-*
	@.venv-onedl/bin/python -m pytest $(PYTEST_PROCESSES) $(PYTEST_ARGS)

bench: setup ## Time three backbones against mmdet's on the CPU, and measure its pace (a minute)
	@$(VENV_PYTHON) tools/analysis_tools/benchmark.py swin-t pvt-s pvtv2-b2 --device cpu \
		--shapes 224x224 --keep-ratios 1.0 0.5 --rounds 7 --warmup 1 --max-seconds 8 $(BENCH_ARGS)
	@$(VENV_PYTHON) tools/analysis_tools/pace.py --rounds 3

gpu: $(if $(GPU_PYTHON),,setup) ## Check, count and time the kernels on a GPU (8 minutes, can be resumed)
	@PYTHONPATH='$(CURDIR)' $(or $(GPU_PYTHON),$(VENV_PYTHON)) tools/analysis_tools/gpu.py $(GPU_ARGS)

lint: setup ## Lint, formatting and types only
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

format: setup ## Put the code into the project's format
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

doctor: setup ## Tell what is installed, what works and what is wrong
	@$(VENV_PYTHON) tools/doctor.py

clean: ## Remove build output and caches; keep the environments, data and runs
	@rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environments too; compiled wheels outside the checkout stay
	@rm -rf .venv .venv-onedl .venv-docs
