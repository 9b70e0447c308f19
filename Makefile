# Two commands for a newcomer:
#
#   make demo    render images, train on them without labels, show the results
#   make test    run the tests
#
# Both build .venv first, once, from Python >= 3.10, pip and the network; the second run of
# either installs nothing. Others: make check (linters, types), docs (the site, into site/),
# format, venv, clean.
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

# One stamp per kind of environment: asking for another Python or torch rebuilds it.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
STAMP := $(VENV)/installed-python$(PYTHON_VERSION)-$(TORCH_BUILD)

.PHONY: demo test check docs format venv clean

demo: $(STAMP)
	$(BIN)/selcon demo

test: $(STAMP)
	$(BIN)/python -m pytest $(IN_PARALLEL) --durations=20 $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/python tools/check_language.py
	$(BIN)/mypy

# Strict: a link or a reference that leads nowhere fails, and so does a table that is not up to date.
docs: $(STAMP) $(VENV)/installed-docs
	$(BIN)/python tools/config_tables.py --check
	$(BIN)/python tools/result_tables.py --check
	$(BIN)/python -m sphinx -b html -j auto -W --keep-going --quiet docs site

$(VENV)/installed-docs: $(STAMP) requirements/docs.txt
	$(INSTALL) -c requirements/constraints.txt -r requirements/docs.txt
	@touch $@

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(STAMP)

# On PyPI, torch for Linux brings gigabytes of CUDA libraries. For a machine without a GPU
# the index of CPU builds is offered in addition to PyPI, if it answers: pip itself would wait long
# for one that does not.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX = $$(test "$(TORCH_BUILD)-$$(uname -s)" = cpu-Linux \
    && $(PYTHON) -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=5)' \
        >/dev/null 2>&1 \
    && echo --extra-index-url $(CPU_INDEX))

$(STAMP): setup.py $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python >= 3.10 is needed, and $(PYTHON) is $(PYTHON_VERSION)." \
	        "To name another: PYTHON=python3.11 make $(MAKECMDGOALS)"; exit 1; }
# Some systems package Python without ensurepip: there the system's pip fills the venv.
	$(PYTHON) -m venv --clear $(VENV) || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(INSTALL) $(TORCH_INDEX) -c requirements/constraints.txt torch
	$(INSTALL) -c requirements/constraints.txt \
	    -r requirements/runtime.txt -r requirements/dev.txt
	$(INSTALL) --no-deps --no-build-isolation --use-pep517 $(TORCH_INDEX) \
	    -r requirements/hosts.txt -r requirements/dev-no-deps.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
# FastReID would do this in the middle of its first evaluation. It can do without.
	@echo "Compiling FastReID's ranking"
	@cd $(VENV)/lib/python$(PYTHON_VERSION)/site-packages/fastreid/evaluation/rank_cylib \
	    && $(abspath $(BIN))/python setup.py build_ext --inplace >build.log 2>&1 \
	    || echo "It cannot be compiled here (selcon doctor reports why): ranking stays in Python"
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
