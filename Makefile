# make setup | demo [MINUTES=8] | test | docs | soak | clean: each sets up .venv by itself. make browser: see there.
# Another Python beside it: make test PYTHON=python3.12 VENV=.venv312
PYTHON  ?= python3
MINUTES ?= 8
VENV    ?= .venv
BIN     := $(VENV)/bin
# `onnxruntime` and `onnxruntime-gpu` exclude each other: [onnx-gpu] only where an NVIDIA driver answers.
EXTRA   := $(shell nvidia-smi -L >/dev/null 2>&1 && echo onnx-gpu || echo onnx)
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test lint docs soak clean browser
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

# Debian's Chromium, which the tests of the app's page look for; without it `make test` skips them and says so.
browser:
	for name in chromium chromium-browser google-chrome; do found=$$(command -v $$name) && break; done; \
	if [ -n "$$found" ]; then \
		echo "browser: $$found"; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "browser: none found; as root under Debian this installs chromium, elsewhere install one by hand" >&2; \
	else \
		echo "browser: apt-get install chromium"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
			|| echo "browser: chromium could not be installed; the tests of the page will be skipped" >&2; \
	fi

docs: setup
	echo "docs: site/"
	test -x $(BIN)/mkdocs || $(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

soak: setup
	echo "soak: the long tests, one at a time"
	$(BIN)/python benchmarks/soak.py

clean:
	rm -rf build dist *.egg-info demo
