# Every target makes its own environment first: nothing else needs to be typed. `make test`, `make quickstart`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

# one thread a process: pytest runs several
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help quickstart test test-slow test-gpu lint format types docs bench hosts schema pages clean

help:
	@echo "make quickstart  graft the bundled diffusion transformer, and write runs/quickstart/report.html"
	@echo "make test        the default tests, on the CPU"
	@echo "make test-slow   the tests that compile, or run whole recipes and the notebook"
	@echo "make test-gpu    the tests that need a CUDA device, most of them against the CPU"
	@echo "make lint        ruff: rules and formatting;  make format applies both"
	@echo "make types       mypy"
	@echo "make docs        the site, in build/site: strict, without network"
	@echo "make bench       what it costs on one CPU thread beside what one would use in its place: benchmarks/results/cpu.json"
	@echo "make hosts       trace, graft and train every transformer class of diffusers: results/hosts.json, docs/hosts.md"
	@echo "make schema      the JSON Schema of recipes, for editors: recipes/recipe.schema.json"
	@echo "make pages       the pages of docs/ that come from the code: operators, hosts"
	@echo "make clean       remove the environment, caches and build outputs; runs/ stays"

$(INSTALLED): pyproject.toml requirements/ci.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev,docs]' -c requirements/ci.txt
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/grafting quickstart

test: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS)

# torch.compile cannot trace functions that check their annotations, so those checks are off here
test-slow: $(INSTALLED)
	JAXTYPING_DISABLE=1 $(BIN)/python -m pytest -m slow -o addopts="--import-mode=importlib --strict-markers"

test-gpu: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -m gpu -n $(WORKERS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

bench: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cpu.py

hosts: $(INSTALLED)
	JAXTYPING_DISABLE=1 PYTHONPATH=tests $(BIN)/python -m hosts.trials

schema: $(INSTALLED)
	$(BIN)/grafting schema --out recipes/recipe.schema.json

pages: $(INSTALLED)
	$(BIN)/python tools/make_pages.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	find src tests recipes benchmarks -name __pycache__ -prune -exec rm -rf {} +
