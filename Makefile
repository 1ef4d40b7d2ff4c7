# make serve: environment + server.   make test: environment + every test.   make check: what a commit must pass.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  ?=
ARGS   ?=

.PHONY: serve test check bench clean

$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e . transformers apache-tvm-ffi -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps xgrammar -c constraints.txt  # with them: triton, 1 GB
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

serve: $(VENV)/.serve
	$(BIN)/baleen serve $(if $(MODEL),--model $(MODEL),) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV)
