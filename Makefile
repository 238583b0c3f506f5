# The targets use .venv where there is one, else a running python3 that has torch, else they make .venv with this torch
# in it. For a small torch without CUDA: make TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# The oldest torch that auxfast supports, to test with. Its small build: make test-torch-2.11 \
#   OLDEST_TORCH="torch==2.11.0 --index-url https://download.pytorch.org/whl/cpu"
OLDEST_TORCH ?= torch==2.11.0
# Small networks need one thread: on a busy machine several spend their time waiting for each other.
export OMP_NUM_THREADS ?= 1

has_torch = -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
use_venv := $(or $(wildcard .venv),$(shell python3 $(has_torch) || echo yes))
PYTHON := $(if $(use_venv),.venv/bin/python,python3)
PIP = $(PYTHON) -m pip install --quiet

# What was installed is remembered for each Python environment.
environment := $(if $(use_venv),venv,$(shell python3 -c 'import sys, zlib; print(zlib.crc32(sys.prefix.encode()))'))
installed = build/installed-$(environment)
build_requires = $(shell sed -n '/^requires = /s/.*\[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
# Without make's flags: ninja would look for the job server of `make -j`, which is closed to it.
setup_py = MAKEFLAGS= PYTHONPATH=$(1)tools/build $(PYTHON) setup.py --quiet
with_oldest = PYTHONPATH=build/torch-2.11 $(PYTHON) -m pytest -m 'not slow'
has_gpu = -c 'import auxfast, sys; info = auxfast.build_info(); info["cuda_available"] and info["cuda_kernels"] or \
  sys.exit("make test-gpu needs a GPU that torch sees ({cuda_available}) and a build with nvcc ({cuda_toolkit})" \
  .format(**info))'
sanitizer = $(firstword $(shell command -v compute-sanitizer) \
  $(wildcard $(addsuffix /bin/compute-sanitizer,$(CUDA_HOME) /usr/local/cuda)))
BENCHMARK ?= --benchmark-enable
LEARNING ?=
GPU_CHECK ?=
native_sources = $(filter %.h %.hpp %.cpp %.cu %.cuh,$(wildcard csrc/* csrc/*/* tests/cuda_on_cpu/* tests/cuda_on_cpu/*/*))
clang_format = $(PYTHON) -c 'import clang_format; clang_format.clang_format()'

.PHONY: help install native demo test test-slow test-all test-torch-2.11 test-cuda-sanitizers test-cuda-compile test-gpu \
  gpu-check gpu-static bench learning docs picture lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z0-9.-]*\):.*## /make \1	/p' Makefile | expand -t 28

install: native $(installed)-core  ## build and install the package, editable

demo: native $(installed)-demo  ## learn loss weights on real data, about a minute; writes auxfast-demo/
	$(PYTHON) -m auxfast demo

test: native $(installed)-test  ## run the tests, but for the slow ones
	$(PYTHON) -m pytest -m 'not slow'

test-slow: native $(installed)-test  ## run the slow tests
	$(PYTHON) -m pytest -m slow

test-all: native $(installed)-test  ## run all tests
	$(PYTHON) -m pytest

# First the module that was built with the newest torch, as a wheel has it; then the one that a user of the oldest builds.
test-torch-2.11: native $(installed)-test build/torch-2.11/installed  ## compile against the oldest torch, and run tests under it
	$(with_oldest) tests/test_native.py tests/ops
	$(call setup_py,build/torch-2.11:) build_ext --inplace
	$(with_oldest) tests/test_native.py tests/implicit $(wildcard tests/autograd)

test-cuda-sanitizers: native $(installed)-test  ## run the CUDA kernels on the CPU, under ASan, UBSan and TSan too
	PYTHONPATH=tools/build:tests $(PYTHON) -m cuda_on_cpu.sanitizers

test-cuda-compile: $(installed)-build  ## check registers, spills and warnings on each GPU generation
	AUXFAST_BUILD=cuda $(setup_py) check_cuda --inplace

test-gpu: native $(installed)-test  ## run the tests that need a GPU, then each kernel under compute-sanitizer
	@$(PYTHON) $(has_gpu)
	AUXFAST_TEST_DEVICE=cuda $(PYTHON) -m pytest -m cuda
	@test -n '$(sanitizer)' || { echo 'make test-gpu: no compute-sanitizer, so only the tests were run; it is part of' \
	    'the CUDA toolkit: put it on the PATH or set CUDA_HOME' >&2; false; }
	for tool in memcheck racecheck initcheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(sanitizer) --tool $$tool --report-api-errors no --error-exitcode 1 \
	    --kernel-name kernel_substring=auxfast \
	    $(PYTHON) -m pytest tests/cuda_on_gpu/test_every_kernel.py || exit 1; done

gpu-check:  ## check and measure on a GPU, within ten minutes; a built module is all it needs, and no network
	$(PYTHON) -m benchmarks.gpu.check $(GPU_CHECK)

gpu-static: native  ## count kernels that calls launch on a GPU, without one; writes the tables of docs/gpu.md
	$(PYTHON) -m benchmarks.gpu.static --docs

bench: native $(installed)-test  ## run the benchmarks, on one thread
	$(PYTHON) -m pytest benchmarks $(BENCHMARK)

learning: native $(installed)-demo  ## learn on eight tasks with the defaults: half an hour, resumable
	$(PYTHON) -m benchmarks.learning $(LEARNING)

docs: $(installed)-docs  ## build the documentation site, build/site
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

picture: native $(installed)-demo  ## draw the pictures of learned weights and of learned labels again
	$(PYTHON) tools/docs/draw_weights.py
	$(PYTHON) tools/docs/draw_labels.py

lint: $(installed)-lint  ## check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(clang_format) --dry-run -Werror $(native_sources)

format: $(installed)-lint  ## lay out the code as lint wants it
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(clang_format) -i $(native_sources)

clean:  ## remove what was built (.venv stays)
	rm -rf build dist *.egg-info auxfast/*.so auxfast/_C.py .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find auxfast benchmarks tests tools -name __pycache__ -prune -exec rm -r {} +

# The native module, in place. Compiled here and not by pip: incrementally, and with the messages visible.
native: $(installed)-build
	$(setup_py) build_ext --inplace

$(installed)-build: pyproject.toml $(if $(use_venv),.venv/pyvenv.cfg)
	$(PIP) $(build_requires)
	@$(PYTHON) $(has_torch) || $(PYTHON) -m pip install $(TORCH)
	@mkdir -p build && touch $@

$(installed)-core: $(installed)-build | native
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(installed)-%: $(installed)-build | native
	$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

build/torch-2.11/installed: | $(installed)-build
	rm -rf $(@D) && $(PIP) --target $(@D) $(OLDEST_TORCH)
	@touch $@

.venv/pyvenv.cfg:
	python3 -m venv .venv || (rm -rf .venv; false)
