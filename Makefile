# One environment, .venv, built from pyproject.toml with the tested versions of constraints.txt.
# It is brought up to date when either file changes; every other target sees to it first.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo recipes test coverage bench gpu docs lock

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## build .venv with everything a contributor needs
	@:

# uv takes a fifth of pip's time, but does not read pip's configuration: behind a private index, pip does it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' \
	  || $(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## EMA against PreciseBN on real images: a table, a picture and a W&B run
	$(BIN)/python -m recipes.ema_vs_precise --preset demo

recipes: setup ## every recipe in full
	$(BIN)/python -m recipes.ema_vs_precise --preset full
	$(BIN)/python -m recipes.precise_batch_size --preset full
	$(BIN)/python -m recipes.batch_leakage --preset full
	$(BIN)/python -m recipes.roi_head_leakage --preset full
	$(BIN)/python -m recipes.shared_head --preset full

# A process that dies ends the run, with its test's name, instead of being replaced. One that pytest-timeout (300 s)
# cannot stop, because it no longer returns to Python, dies of faulthandler's.
NO_HANG := --max-worker-restart 0 -o faulthandler_timeout=360 -o faulthandler_exit_on_timeout=true

test: setup ## what CI runs: lint, types, docs, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/pytest -n auto --dist worksteal $(NO_HANG)

coverage: setup ## the tests and the lines that they run; takes about 1.5 times as long
	$(BIN)/pytest --cov -n auto --dist worksteal $(NO_HANG)

bench: setup ## measure the speed claims, write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

gpu: setup ## the tests and benchmarks that need a CUDA device, in less than 10 minutes; writes benchmarks/RESULTS.md
	$(BIN)/pytest -m gpu
	$(BIN)/python -m benchmarks --device cuda

docs: setup ## build the site into site/
	$(BIN)/mkdocs build --strict

lock: setup ## bring constraints.txt up to date with pyproject.toml, keeping the versions it has
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --all-extras --no-annotate \
	  --custom-compile-command 'make lock' --output-file constraints.txt pyproject.toml
