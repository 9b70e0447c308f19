# Two commands for a newcomer:
#
#   make demo    render images, train on them without labels, show the results
#   make test    run the tests
#
# Both build .venv first, once, from Python >= 3.10, pip and the network; the second run of
# either installs nothing. Each target installs only what it needs: the demo no test tools.
# Others: make check (linters, types), docs (the site, into site/), format, venv (all that is
# needed for check and test), matrix (oldest and newest Python and torch), clean.
#
#   PYTHON=python3.12 make test           another Python
#   TORCH_BUILD=cuda make demo            torch with CUDA, or cpu; default: by nvidia-smi
#   PYTEST_ARGS="-k memory" make test     anything pytest takes
#   TEST_PROCESSES=8 make test            on more cores; 0: in one process, for a debugger

PYTHON ?= python3
TORCH_BUILD ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
PYTEST_ARGS ?=
# Tests in two processes, each on one thread. A file's tests stay in one: they share what is
# made once for all of them. The files with whole runs begin (conftest.py); short ones fill up.
TEST_PROCESSES ?= 2
IN_PARALLEL = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Not taken from the environment: `make venv` and `make clean` empty this folder.
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install

# One stamp per group of packages, and one kind of environment at a time: asking for another
# Python or torch empties it. A change of the lists in requirements/ installs what is new.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
DEMO := $(VENV)/installed-python$(PYTHON_VERSION)-$(TORCH_BUILD)
TEST := $(VENV)/installed-test
DEV := $(VENV)/installed-dev
DOCS := $(VENV)/installed-docs

.PHONY: demo test check docs format venv matrix clean

demo: $(DEMO)
	$(BIN)/selcon demo

test: $(TEST)
	$(BIN)/python -m pytest $(IN_PARALLEL) --durations=20 $(PYTEST_ARGS)

check: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/python tools/check_language.py
	$(BIN)/mypy

# Strict: a link or a reference that leads nowhere fails, and so does a table that is not up to date.
docs: $(DOCS)
	$(BIN)/python tools/config_tables.py --check
	$(BIN)/python tools/result_tables.py --check
	$(BIN)/python -m sphinx -b html -j auto -W --keep-going --quiet docs site

# In environments of its own, in MATRIX: nothing else is needed or changed.
MATRIX ?= build/matrix
matrix:
	$(PYTHON) tools/matrix.py --folder $(MATRIX)

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(DEV)

# On PyPI, torch for Linux brings gigabytes of CUDA libraries. For a machine without a GPU
# the index of CPU builds is offered in addition to PyPI, if it answers: pip itself would wait long
# for one that does not.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX = $$(test "$(TORCH_BUILD)-$$(uname -s)" = cpu-Linux \
    && $(PYTHON) -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=5)' \
        >/dev/null 2>&1 \
    && echo --extra-index-url $(CPU_INDEX))

WITH_DEPS = $(INSTALL) -c requirements/constraints.txt
NO_DEPS = $(INSTALL) --no-deps --no-build-isolation --use-pep517 $(TORCH_INDEX)

$(DEMO): setup.py requirements/constraints.txt $(wildcard requirements/demo*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python >= 3.10 is needed, and $(PYTHON) is $(PYTHON_VERSION)." \
	        "To name another: PYTHON=python3.11 make $(MAKECMDGOALS)"; exit 1; }
# An environment of this kind is brought up to date. Some systems package Python without
# ensurepip: there the system's pip fills a new one.
	test -e $@ || $(PYTHON) -m venv --clear $(VENV) || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(WITH_DEPS) $(TORCH_INDEX) torch
	$(WITH_DEPS) -r requirements/demo.txt
	$(NO_DEPS) -r requirements/demo-no-deps.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
# FastReID would do this in the middle of its first evaluation. It can do without.
	@echo "Compiling FastReID's ranking"
	@cd $(VENV)/lib/python$(PYTHON_VERSION)/site-packages/fastreid/evaluation/rank_cylib \
	    && $(abspath $(BIN))/python setup.py build_ext --inplace >build.log 2>&1 \
	    || echo "It cannot be compiled here (selcon doctor reports why): ranking stays in Python"
	@touch $@

$(TEST): $(DEMO) $(wildcard requirements/test*.txt)
	$(WITH_DEPS) -r requirements/test.txt
	$(NO_DEPS) -r requirements/test-no-deps.txt
	@touch $@

$(DEV): $(TEST) requirements/dev.txt
	$(WITH_DEPS) -r requirements/dev.txt
	@touch $@

# The site documents both hosts' adapters, which it imports.
$(DOCS): $(TEST) requirements/docs.txt
	$(WITH_DEPS) -r requirements/docs.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
