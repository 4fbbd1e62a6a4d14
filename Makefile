# Everything runs in .venv, which `make env` makes once; touch pyproject.toml to have it made anew.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: env demo docs test lint benchmark-step clean

env: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m replfx demo $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark-step: $(STAMP)
	$(BIN)/python -m benchmarks step $(ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info replfx-demo replfx-benchmarks
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
