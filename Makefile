# Two commands on a fresh machine with Python 3.11, pip, make and a C compiler:
#   make quickstart    the main job, end to end, in a few minutes on two cores
#   make test          the tests
# Both make a virtual environment first. Later, `. .venv/bin/activate` and use hpo, scaling and proxies directly.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# On a machine with a GPU pip may choose the newest torch with its CUDA packages. Without one the constraint asks for a version
# of which a CPU build exists; where pip does not see that build by itself, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL.
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
CONSTRAINT := $(if $(GPU),,-c constraints/cpu.txt)

.PHONY: quickstart test install install-test lint clean-quickstart

# Exit code 3 is an answer with doubts, which it has named: the target is trained all the same.
quickstart: install
	hpo launch studies/quickstart.toml
	scaling fit quickstart
	scaling recommend quickstart --target || [ $$? -eq 3 ]
	proxies launch studies/quickstart.toml
	scaling report quickstart

# One thread each, since there is a process for every core. The slow tests of a file stay together: they share what took long to make.
test: install-test lint
	OMP_NUM_THREADS=1 pytest -n auto -m "not slow"
	OMP_NUM_THREADS=1 pytest -n auto --dist loadfile -m slow

lint: install-test
	ruff check .
	ruff format --check .
	mypy

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints/cpu.txt | $(BIN)/pip
	@echo "installing into $(VENV) ($(if $(GPU),GPU found,no GPU: CPU build of torch)); a few minutes the first time"
	$(BIN)/pip install --quiet $(CONSTRAINT) -e ".[dashboard]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet $(CONSTRAINT) -e ".[test]"
	@touch $@

# Forget the quickstart study, so that it can be launched again from nothing.
clean-quickstart:
	$(BIN)/hpo forget quickstart --yes
