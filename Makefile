# make venv        .venv with torch, the build tools and edl (editable)
# make lint        formats, types, spelling and workflows: what .pre-commit-config.yaml names, on all files
# make test        everything: pytest, with the C++ cases (Catch2) as items
# make coverage    the same, and how much of the package it runs, which takes a third longer
# make docs        the documentation as a site, which needs no compiled edl: build/site/index.html
# make docs-serve  the same on http://127.0.0.1:8000, built anew whenever a page changes
# make demo        pre-trains a small language model on real text; DATA=folder takes the sub-folders of your own text
# make dist        source archive and wheel, for the torch that TORCH names, in dist
# make check-dist  both installed into environments of their own, beside that torch, and run
# make bench       measures this machine, peers included, in about twenty minutes: benchmarks/results/MACHINE.md
# make check-cuda  compiles every CUDA source with nvcc; needs no GPU
# make gpu         on a CUDA machine: builds, checks and measures with PYTHON and its torch, without network, in stages;
#                  STAGES=build,correctness chooses, BUDGET=400 seconds limits, OUT=folder takes the results
# make clean       back to a fresh clone
#
# PYTHON makes .venv; TORCH is what pip installs there, options included; MAX_JOBS compilers run at once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
DATA ?=
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS
export PRE_COMMIT_HOME := $(CURDIR)/.venv/pre-commit

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install
STAMPS := $(VENV)/stamps

.PHONY: venv lint test coverage docs docs-serve demo dist check-dist bench check-cuda gpu clean preconditions always

venv: $(STAMPS)/edl

lint: $(STAMPS)/lint
	$(VENV_PYTHON) -m pre_commit run --all-files

# Threads that wait leave their processor to the other processes.
PYTEST := OMP_WAIT_POLICY=passive $(VENV_PYTHON) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder

test: $(STAMPS)/test
	$(PYTEST) --durations=20

coverage: $(STAMPS)/test
	$(PYTEST) --cov=edl --cov-report=term --cov-fail-under=90

MKDOCS := NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs

docs: $(STAMPS)/docs
	$(MKDOCS) build --strict --quiet

docs-serve: $(STAMPS)/docs
	$(MKDOCS) serve

demo: $(STAMPS)/demo
	$(VENV_PYTHON) examples/pretrain/train.py $(if $(DATA),--data "$(DATA)")

dist: $(STAMPS)/torch
	$(PIP_INSTALL) build
	rm -rf dist
	$(VENV_PYTHON) -m build --no-isolation

check-dist: dist
	for archive in dist/*.whl dist/*.tar.gz; do \
	  rm -rf build/check-dist && $(PYTHON) -m venv build/check-dist && \
	  build/check-dist/bin/pip install $(TORCH) && \
	  build/check-dist/bin/pip install numpy 'setuptools>=77' wheel ninja && \
	  build/check-dist/bin/pip install --no-build-isolation "$$archive" && \
	  (cd build/check-dist && bin/edl info && bin/python ../../examples/moe_layer.py) || exit 1; \
	done

bench: $(STAMPS)/bench
	$(VENV_PYTHON) benchmarks/all.py

check-cuda: $(STAMPS)/torch
	$(VENV_PYTHON) tools/check_cuda.py

# PYTHON's own environment, which has the CUDA torch: no .venv.
gpu:
	$(PYTHON) tools/gpu.py $(if $(STAGES),--stages $(STAGES)) $(if $(BUDGET),--budget $(BUDGET))

clean:
	rm -rf $(VENV) build dist demo demo-text edl/include edl/lib edl/_build*.so *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

preconditions:
	@PYTHON="$(PYTHON)" sh .ci/preconditions

$(VENV_PYTHON): | preconditions
	$(PYTHON) -m venv $(VENV)

# Holds the wanted torch; changes, and with it everything below, only when TORCH does.
$(STAMPS)/torch-wanted: always | $(VENV_PYTHON)
	@mkdir -p $(STAMPS)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

$(STAMPS)/torch: $(STAMPS)/torch-wanted
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) numpy 'setuptools>=77' wheel ninja
	@touch $@

$(STAMPS)/edl: setup.py pyproject.toml $(shell find csrc edl/share -type f) $(STAMPS)/torch
	@echo "edl: compiling takes two to six minutes on two cores, in which pip shows nothing"
	$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/docs: docs/requirements.txt | $(VENV_PYTHON)
	@mkdir -p $(STAMPS)
	$(PIP_INSTALL) --requirement docs/requirements.txt
	@touch $@

$(STAMPS)/test: tests/requirements.txt tests/requirements-torchtitan.txt docs/requirements.txt \
  examples/pretrain/requirements.txt $(STAMPS)/edl
	$(PIP_INSTALL) --requirement tests/requirements.txt
	$(PIP_INSTALL) --no-deps --requirement tests/requirements-torchtitan.txt
	@touch $@

$(STAMPS)/lint: .pre-commit-config.yaml $(STAMPS)/torch
	$(PIP_INSTALL) pre-commit==4.7.0
	$(VENV_PYTHON) -m pre_commit install-hooks
	@touch $@

$(STAMPS)/bench: benchmarks/requirements.txt $(STAMPS)/edl
	$(PIP_INSTALL) --requirement benchmarks/requirements.txt
	@touch $@

$(STAMPS)/demo: examples/pretrain/requirements.txt $(STAMPS)/edl
	$(PIP_INSTALL) --requirement examples/pretrain/requirements.txt
	@touch $@
