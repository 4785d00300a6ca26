# Every target works on a fresh checkout: it sets up .venv first. Override the interpreter with PYTHON=python3.12.
PYTHON ?= $(shell command -v python3.11 || echo python3)
EXTRAS ?= hf,langchain,eval,dev
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# SGLang pins its own torch, so it has an environment of its own.
SGLANG_VENV ?= $(CURDIR)/.venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
NOW := $(shell date -u +%Y%m%dT%H%M%SZ)
DEMO_OUT ?= runs/demo-$(NOW)
SAMPLE := examples/data/tau_bench_airline_sample.jsonl
# One hundred trajectories, where they lie beside the checkout; the sample holds six of them.
MORE ?= $(wildcard ../shared/data/tau_bench/airline_trajectories.jsonl)
REPLAY = $(BIN)/kv-retract replay $(1) --policy tool_error --policy superseded \
	--arm none --arm mask --arm shift --arm kveraser --arm recompute --out $(2)

# What the reference model answers on traces like those it was trained on, and with names and wordings it never saw.
TRACES ?= 6
MANY_TRACES ?= 16
DOCUMENTS ?= 20
CASCADES ?= 30
LENGTHS := --length 256 --length 1024 --length 2048 --length 4096
# The default eraser between full recomputation and the best that one could do which keeps positions.
DEFAULTS := --arm recompute --arm in_place --arm kveraser
# Threads of so many windows, and ways to hold them.
LONG ?= --times 2 --times 8 --times 32 --n 2 --task facts --task relations --task updates --task preferences --retract --bench
# Benchmarks of the kernels, the cache and a step. With DEVICE=cuda, on a machine that has one, the shape is Qwen3-8B's.
DEVICE ?= cpu
ifeq ($(DEVICE),cpu)
BENCH_MODEL ?= reference
DTYPE ?= float32
CONTEXTS ?= 1024 2048 4096 8192 16384
SPANS ?= 128
BENCH_REPEATS ?= 5
STEPS ?=
KERNELS ?= --layers 6 --kv-heads 2 --head-dim 64 --tokens 8192 --tokens 32768
BENCH ?= evals/results/bench
else
BENCH_MODEL ?= random-8b
DTYPE ?= bfloat16
CONTEXTS ?= 1024 2048 4096 8192 16384 32768
SPANS ?= 16 128 1024
BENCH_REPEATS ?= 20
STEPS ?= --context 1024 --context 8192 --context 32256
KERNELS ?= --tokens 1024 --tokens 8192 --tokens 32768
BENCH ?= evals/results/bench-$(DEVICE)
endif
ON := --device $(DEVICE) --dtype $(DTYPE)
LATENCY = LD_PRELOAD=$(TCMALLOC) $(BIN)/kv-retract bench latency --model $(BENCH_MODEL) $(ON) --span $(1) \
	$(CONTEXTS:%=--context %) --repeats $(BENCH_REPEATS) --out runs/bench/latency$(2).json --plot runs/bench/latency$(2).svg
# Where it is installed (Debian: libtcmalloc-minimal4). glibc gives a prefill's memory back while the edit is timed.
TCMALLOC ?= $(firstword $(wildcard /usr/lib/*/libtcmalloc_minimal.so.4))
EVAL = $(BIN)/kv-retract eval $(1) $(2) --workers $(WORKERS) --out runs/results/$(3) && \
	mkdir -p evals/results/$(3) && cp runs/results/$(3)/metrics.json evals/results/$(3)/
IN_DOMAIN := --task errors --task facts --task injections --task needles --task preferences --task relations --task updates

# Models are never fetched: a test or a command that tried would fail at once.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
# Two worker processes share the cores; more threads in each only get in the way.
test: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test sglang-env test-sglang coverage format lint type results tables bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with $(PYTHON) (a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)  ## tell one agent run under three erasers, then replay real traces and write a report
	@$(BIN)/kv-retract demo
	@$(call REPLAY,$(SAMPLE),$(DEMO_OUT))
	@$(if $(MORE),$(call REPLAY,$(MORE) --limit 4,$(DEMO_OUT)-more))

test: $(STAMP)  ## run the tests and measure coverage; those with a real SGLang server are in test-sglang
	@$(BIN)/python -m pytest -q -n $(WORKERS) -m 'not sglang' --cov --cov-report=

$(SGLANG_STAMP): pyproject.toml
	@echo "Setting up $(SGLANG_VENV) with SGLang (10 GB, a few minutes)"
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_VENV)/bin/python -m pip install --quiet uv
	@$(SGLANG_VENV)/bin/uv pip install --quiet --python $(SGLANG_VENV)/bin/python sglang==0.5.23 sglang-router==0.3.2 -e . || \
		$(SGLANG_VENV)/bin/python -m pip install --quiet sglang==0.5.23 sglang-router==0.3.2 -e .
	@touch $@

sglang-env: $(SGLANG_STAMP)  ## build the environment of the tests with real SGLang servers

test-sglang: $(STAMP) $(SGLANG_STAMP)  ## start real SGLang servers on loopback and run the tests that need one
	@SGLANG_VENV=$(SGLANG_VENV) $(BIN)/python -m pytest -q -m sglang tests/sglang

coverage: test  ## run the tests, list what they miss, fail under 90 %
	@$(BIN)/python -m coverage report --fail-under=90

format: $(STAMP)  ## format the code
	@$(BIN)/ruff check --quiet --fix-only . && $(BIN)/ruff format .

lint: $(STAMP)  ## check style and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: $(STAMP)  ## check types
	@$(BIN)/mypy

results: $(STAMP) $(SGLANG_STAMP)  ## measure anew what the README's tables show; MORE names the trajectories, LABELLED labelled threads
	@test -n '$(MORE)' || { echo "name the file of 100 tau-bench trajectories: make results MORE=FILE"; exit 2; }
	@test -n '$(LABELLED)' || { echo "name the files of evals/agentdojo_traces.py: make results LABELLED='FILE FILE'"; exit 2; }
	@rm -rf runs/results && $(MAKE) --no-print-directory bench
	@$(call REPLAY,$(MORE),runs/results/replay)
	@cp runs/results/replay/metrics.json evals/results/replay-tau-bench/
	@$(call EVAL,reference,--split train --n $(TRACES) $(LENGTHS),reference)
	@$(call EVAL,reference,--split test --n 3 --length 256 --length 1024,reference-test)
	@$(call EVAL,erasers,--split train $(IN_DOMAIN) --n $(TRACES) $(LENGTHS),erasers)
	@$(call EVAL,erasers,--split train $(IN_DOMAIN) $(DEFAULTS) --n $(MANY_TRACES) $(LENGTHS) --length 3072,erasers-default)
	@$(call EVAL,erasers,--task documents --n $(DOCUMENTS) --length 512 --length 1024,erasers-documents)
	@$(call EVAL,repeated,--n 4,repeated) && cp runs/results/repeated/repeated.svg evals/results/repeated/
	@$(BIN)/kv-retract eval policies $(foreach file,$(LABELLED),--labelled $(file)) --out runs/results/policies
	@cp runs/results/policies/metrics.json evals/results/policies/
	@$(call EVAL,cascade,--n $(CASCADES),cascade)
	@$(call EVAL,acre,--split train $(LONG),acre)
	@$(BIN)/kv-retract bench heal --out runs/results/heal.json && cp runs/results/heal.json evals/results/
	@$(BIN)/kv-retract bench shared --out runs/results/shared.json
	@$(BIN)/kv-retract bench sglang --venv $(SGLANG_VENV) --repeats 5 --out runs/results/sglang.json
	@cp runs/results/shared.json runs/results/sglang.json evals/results/
	@$(MAKE) --no-print-directory tables

tables: $(STAMP)  ## write the tables of the pages from evals/results
	@$(BIN)/python -m kv_retract.evals.readme README.md evals/results/README.md

bench: $(STAMP)  ## check the kernels, then time kernels, edits, a step and the cache; DEVICE=cuda on a GPU
	@rm -rf runs/bench && mkdir -p runs/bench $(BENCH)
	@$(BIN)/python -m pytest -q tests/kernels
	@$(BIN)/kv-retract bench kernels $(ON) $(KERNELS) --out runs/bench/kernels.json
	@$(BIN)/kv-retract bench memory --out runs/bench/memory.json
	@$(BIN)/kv-retract bench radix $(addprefix --venv ,$(wildcard $(SGLANG_VENV))) --out runs/bench/radix.json
	@$(BIN)/kv-retract bench step --model $(BENCH_MODEL) $(ON) $(STEPS) --out runs/bench/step.json
	@$(BIN)/kv-retract bench edit $(ON) --repeats 9 --out runs/bench/edit.json
	@$(foreach span,$(SPANS),$(call LATENCY,$(span),$(if $(filter-out $(firstword $(SPANS)),$(span)),-$(span))) &&) true
	@cp runs/bench/* $(BENCH)/

clean:  ## remove what the other targets made, .venv included
	@rm -rf $(VENV) .venv-sglang build dist *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
