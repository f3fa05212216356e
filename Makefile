# Everything a person or a machine does with this repository. `make help` lists it.
#
# A target sets up what it needs, once: a stamp in .venv says what has been done, so that a second
# run needs no network.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c 'import venv' 2>/dev/null && echo python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .models/SmolLM2-135M-Instruct.Q4_1.gguf
export RAY_AUTH_MODE ?= disabled
# A cluster is a dozen processes with the same imports. An environment that forbids bytecode, as many
# images do, has each of them compile Ray anew: a third of the processor time of a start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ── set-up ───────────────────────────────────────────────────────────────────────────────────────

$(VENV)/.run: pyproject.toml constraints-cpu.txt deploy/setup.sh
	@PYTHON=$(PYTHON) deploy/setup.sh run
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@PYTHON=$(PYTHON) deploy/setup.sh dev
	@touch $@

$(MODEL): | $(VENV)/.run
	@deploy/setup.sh model

setup: $(VENV)/.run $(MODEL)  ## virtual environment, dependencies, the default model
setup-dev: $(VENV)/.dev $(MODEL)  ## the same, and what tests and lint need

# ── use ──────────────────────────────────────────────────────────────────────────────────────────

serve: setup  ## start a cluster on this machine, show one chat, serve until Ctrl-C
	@$(BIN)/pdserve serve $(MODEL_ARG)

demo: setup  ## what this is for, live, in about two minutes
	@$(BIN)/python -m pdserve.cluster.demo

# ── check ────────────────────────────────────────────────────────────────────────────────────────

# Clusters wait for processes to start and stop, half of the time for one core: what needs none of
# them runs beside, in the time they leave (which also keeps their measurements undisturbed).
PYTEST       := $(BIN)/python -m pytest -q
WITH_CLUSTER := tests/faults tests/hosts tests/integration

compile: setup  ## the router and the simulator to machine code; once per change, about a minute
	@$(BIN)/pdserve compile

test: setup-dev  ## the tests; at most 10 minutes on 2 cores
	@$(BIN)/pdserve compile || true  # without a compiler the tests of what it builds are skipped
	@said=$$(mktemp); trap 'kill $$beside 2>/dev/null; rm -f $$said' EXIT; \
	nice -n 19 $(PYTEST) -m "not slow" -p no:cacheprovider $(WITH_CLUSTER:%=--ignore=%) \
		>$$said 2>&1 & beside=$$!; \
	$(PYTEST) -m "not slow" $(WITH_CLUSTER); clusters=$$?; \
	wait $$beside; others=$$?; cat $$said; exit $$((clusters | others))

test-all: setup-dev  ## the tests, the long ones too
	@$(PYTEST)

check: setup-dev  ## format, lint, types, unit and architecture tests
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory lint
	@$(PYTEST) tests/unit tests/architecture

SCANS := secrets vulnerabilities  # the second asks the package index

lint: setup-dev  ## ruff (its security rules too), mypy --strict, secrets, known vulnerabilities
	@$(BIN)/ruff check .
	@ADVISORIES=ask $(PYTEST) -p no:cacheprovider $(SCANS:%=tests/architecture/test_%.py)
	@$(BIN)/mypy

faults: setup-dev  ## every fault under load, compared token by token; writes docs/faults.md
	@FAULTS_REPORT=docs/faults.md FAULTS_CHAOS_S=304 $(PYTEST) --timeout=900 tests/faults

FUZZ := tests/unit/wire/test_wire_fuzz.py $(addprefix tests/unit/kvstore/test_,server_fuzz.py ssd_log_fuzz.py)

campaign: setup-dev  ## kill the KV store for an hour, and fuzz it; SEED=7 repeats the strikes
	@$(BIN)/python -m tests.campaign $(if $(SEED),--seed $(SEED)) --seconds 3600 --kills 2000 \
		--gets 10000000 --damage 100000 --report
	@$(PYTEST) --hypothesis-profile=campaign --timeout=0 $(FUZZ)

hosts: setup-dev  ## three hosts made of namespaces, and bad networks between them; needs root
	@$(PYTEST) tests/hosts

simulate-faults: setup-dev  ## the whole cluster in virtual time, 10,000 seeds of faults; SEED=7 replays one
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--runs 10000)

kernels: setup-dev  ## compile every Triton kernel for sm_80, sm_90, sm_100; needs no GPU
	@env -u TRITON_INTERPRET $(BIN)/python -m pdserve.model.kernels.compile_all

clients: setup-dev  ## clients and load tools in their current releases against us; docs/clients.json
	@tests/clients/environments.sh
	@CLIENTS_REPORT=docs/clients.json $(PYTEST) -p handbook.client_record tests/clients \
		$(addprefix tests/integration/test_,cluster_clients.py grpc_others.py)

console: setup-dev  ## the console in a real Chromium, on a real cluster
	@deploy/setup.sh browser
	@$(PYTEST) tests/console tests/integration/test_console_live.py

docs: setup-dev  ## the documentation site, in build/site; fails where a link leads nowhere
	@$(BIN)/python -m handbook

golden: setup-dev  ## rewrite the golden traces; look at the diff
	@GOLDEN=rewrite $(PYTEST) tests/golden

proto: setup-dev  ## regenerate pdserve/proto from proto/
	@$(BIN)/python -m grpc_tools.protoc -Ipdserve/proto/v1=proto/pdserve/v1 \
		-Ipdserve/proto/kserve=proto/kserve -Ipdserve/proto/vllm=proto/vllm \
		--python_out=. --pyi_out=. --grpc_python_out=. proto/pdserve/v1/inference.proto \
		proto/kserve/inference.proto proto/vllm/engine.proto

bench: setup-dev  ## the benchmarks that this machine can run
	@$(BIN)/python -m bench.end_to_end

clean:  ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help setup setup-dev serve demo compile test test-all faults hosts campaign simulate-faults check lint kernels clients console docs golden proto bench clean
