# make serve: environment + server.   make test: environment + every test.   make check: what a commit must pass.
# make test-gpu, make bench: on a machine with a GPU without the environment, its own $(PYTHON), which has torch.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  ?=
ARGS   ?=
OUT    ?= bench-results
GPU    := $(shell command -v nvidia-smi)
PY      = $(if $(wildcard $(VENV)/.dev),$(BIN)/python,$(PYTHON))

.PHONY: serve test test-gpu check bench clean

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

test-gpu: $(if $(GPU),,$(VENV)/.dev)
	$(PY) -m pytest -m gpu -rs baleen/kernels baleen/attention baleen/runner

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(if $(GPU),,$(VENV)/.dev)
ifeq ($(GPU),)
	$(PY) benchmarks/cpu.py
else
	$(PY) benchmarks/gpu_targets.py --out $(OUT)
	for file in baleen/kernels/*/bench_*.py; do PYTHONPATH=. $(PY) -P $$file $(OUT) || exit; done
endif

clean:
	rm -rf $(VENV)
