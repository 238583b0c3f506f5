# The targets use .venv where there is one, else a running python3 that has torch, else they make .venv with this torch
# in it. For a small torch without CUDA: make TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

has_torch = -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
use_venv := $(or $(wildcard .venv),$(shell python3 $(has_torch) || echo yes))
PYTHON := $(if $(use_venv),.venv/bin/python,python3)
PIP = $(PYTHON) -m pip install --quiet

# What was installed is remembered for each Python environment.
environment := $(if $(use_venv),venv,$(shell python3 -c 'import sys, zlib; print(zlib.crc32(sys.prefix.encode()))'))
installed = build/installed-$(environment)
build_requires = $(shell sed -n '/^requires = /s/.*\[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
BENCHMARK ?= --benchmark-enable
native_sources = $(filter %.h %.cpp %.cu %.cuh,$(wildcard csrc/* csrc/*/*))
clang_format = $(PYTHON) -c 'import clang_format; clang_format.clang_format()'

.PHONY: help install native demo test bench lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile | expand -t 14

install: native $(installed)-core  ## build and install the package, editable

demo: native $(installed)-demo  ## learn loss weights on real data, about a minute; writes auxfast-demo/
	$(PYTHON) -m auxfast demo

test: native $(installed)-test  ## run the tests
	$(PYTHON) -m pytest

bench: native $(installed)-test  ## run the benchmarks, on one thread
	$(PYTHON) -m pytest benchmarks $(BENCHMARK)

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
	rm -rf build dist *.egg-info auxfast/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find auxfast benchmarks csrc tests -name __pycache__ -prune -exec rm -r {} +

# The native module, in place. Compiled here and not by pip: incrementally, and with the messages visible.
native: $(installed)-build
	$(PYTHON) setup.py --quiet build_ext --inplace

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

.venv/pyvenv.cfg:
	python3 -m venv .venv || (rm -rf .venv; false)
