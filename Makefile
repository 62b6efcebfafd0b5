# make setup | demo [MINUTES=8] | test | docs | soak | clean: each sets up .venv by itself.
# Another Python beside it: make test PYTHON=python3.12 VENV=.venv312
PYTHON  ?= python3
MINUTES ?= 8
VENV    ?= .venv
BIN     := $(VENV)/bin
# `onnxruntime` and `onnxruntime-gpu` exclude each other: [onnx-gpu] only where an NVIDIA driver answers.
EXTRA   := $(shell nvidia-smi -L >/dev/null 2>&1 && echo onnx-gpu || echo onnx)
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test lint docs soak clean
.SILENT:
setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	echo "environment: $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	echo "packages: ldmseg_fast[$(EXTRA),dev] with constraints.txt; the first time they are downloaded"
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[$(EXTRA),dev]'
	conflicts=$$($(BIN)/python -m pip check) || { echo "$$conflicts" >&2; exit 1; }
	touch $@
	echo "ready: $(BIN)/ldmseg"

demo: setup
	echo "demo: $(MINUTES) minutes, into demo/"
	$(BIN)/ldmseg demo --out demo --minutes $(MINUTES)

lint: setup
	echo "lint: ruff, mypy"
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary

test: lint
	echo "tests: on all cores"
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m 'not soak and not serial'
	echo "tests: one at a time, those that measure or start ranks"
	$(BIN)/python -m pytest -q -m 'serial and not soak'

docs: setup
	echo "docs: site/"
	test -x $(BIN)/mkdocs || $(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

soak: setup
	echo "soak: the long tests, one at a time"
	$(BIN)/python benchmarks/soak.py

clean:
	rm -rf build dist *.egg-info demo
