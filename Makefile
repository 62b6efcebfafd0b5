# make setup | demo | test | docs | soak | clean: each sets up .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# `onnxruntime` and `onnxruntime-gpu` exclude each other: the GPU extra only where an NVIDIA driver answers.
EXTRA  := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test lint docs soak clean
setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRA),demo,dev]'
	$(BIN)/python -m pip check
	touch $@

demo: setup
	$(BIN)/ldmseg demo --out demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m 'not soak'

docs: setup
	test -x $(BIN)/mkdocs || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

soak: setup
	$(BIN)/python benchmarks/soak.py

clean:
	rm -rf build dist *.egg-info demo
