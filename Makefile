# Needs Python 3.11 or later, pip, make and a C compiler. Every target first creates a virtual environment in .venv.
#   make quickstart    run the whole loop, in a few minutes on two cores
#   make test          run linters, type checker and all tests
#   make test-fast     run only the fast tests
#   make docs          build the documentation site into site/
# To use the commands hpo, scaling and proxies directly, activate the environment: `. .venv/bin/activate`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# With a GPU, pip may choose the newest torch and its CUDA packages. Without one, the constraint selects a version that has a
# CPU build. If pip does not find that build, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
CONSTRAINT := $(if $(GPU),,-c constraints/cpu.txt)

.PHONY: quickstart test test-fast lint docs install install-test install-docs install-dev clean-quickstart

# Exit code 3 of `scaling recommend` means a recommendation with named doubts. The target is trained anyway.
quickstart: install
	hpo launch studies/quickstart.toml
	scaling fit quickstart
	scaling recommend quickstart --target || [ $$? -eq 3 ]
	proxies launch studies/quickstart.toml
	scaling report quickstart

# Slow tests wait for other processes half of the time, so there are three for every two cores.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
SLOW_PROCESSES := $(shell echo $$(( ($(CORES) * 3 + 1) / 2 )))

# One BLAS thread per process, because there is at least one process per core. The slow tests of a file stay in one
# process, because they share expensive fixtures.
test: install-test lint test-fast
	OMP_NUM_THREADS=1 pytest -n $(SLOW_PROCESSES) --dist loadfile -m slow

test-fast: install-test
	OMP_NUM_THREADS=1 pytest -n auto -m "not slow"

lint: install-test
	ruff check .
	ruff format --check .
	mypy

# Warnings are errors, broken links and anchors included.
docs: install-docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test
install-docs: $(VENV)/.installed-docs

# What a contributor needs: tests, documentation and the commit hooks.
install-dev: install-test install-docs
	$(BIN)/pip install --quiet $(CONSTRAINT) -e ".[dev]"
	pre-commit install

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints/cpu.txt | $(BIN)/pip
	@echo "installing into $(VENV) ($(if $(GPU),GPU found,no GPU: CPU build of torch)); a few minutes the first time"
	$(BIN)/pip install --quiet $(CONSTRAINT) -e ".[dashboard]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet $(CONSTRAINT) -e ".[test]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet $(CONSTRAINT) -e ".[docs]"
	@touch $@

# Remove the quickstart study, so that it can be launched again from scratch.
clean-quickstart:
	$(BIN)/hpo forget quickstart --yes
