PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-photos newcomer proof test test-all draws storm lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade -c constraints.txt --target $(VENV)/torchao torchao
	touch $(STAMP)

setup: $(STAMP) ## make the virtual environment

demo: $(STAMP) ## what the prior does, in one image: a toy world, a few minutes on two CPU cores
	$(BIN)/python -m benchmarks.phantom_limb.demo $(DEMO)

demo-photos: $(STAMP) ## photos and masks to a trained LoRA on a tiny random model
	$(BIN)/python demo/demo.py $(DEMO)-photos

newcomer: $(STAMP) ## a newcomer's first commands with a mistake and a stop, and all that they say; FRESH=yes in a clone
	$(BIN)/python demo/newcomer.py $(if $(FRESH),--fresh)

proof: $(STAMP) ## the comparison behind the claims, all variants and seeds; PROOF=full for more
	$(BIN)/python -m benchmarks.phantom_limb.proof $(if $(filter full,$(PROOF)),--full)

test: $(STAMP) ## what to run at each change, under 3 minutes: on the CPU, offline
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

test-all: $(STAMP) ## every test: all variants, browser, damaged files, kills, processes of their own
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu' $(PYTEST)

draws: $(STAMP) ## many more drawn inputs than the other tests take
	$(BIN)/python -m pytest -n 2 --dist worksteal -m draws $(PYTEST)

storm: $(STAMP) ## kill runs a hundred times at random moments and compare how they end; a quarter of an hour
	$(BIN)/python -m benchmarks.storm

lint: $(STAMP) ## ruff, and types of the core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and outputs
	rm -rf $(VENV) outputs
