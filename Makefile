# Everything the project does, from a fresh clone: `make book` and `make test` need no step before.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BENCH := .venv/.installed-bench
ENV ?= colab
# The tests run in this many processes. Those of one file share its fixtures, and so a process.
JOBS ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --durations=10

# A virtual environment of one's own choosing must not decide what is installed or imported here.
unexport PYTHONPATH PYTHONHOME
# The matrices here are small: a second thread gains nothing, and waits busily where cores are shared.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help book html notebooks quick test lint types check wheel colab bench address clean

help: ## list these targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

book: $(STAMP) ## execute every chapter that changed, render the book to _build/html
	@$(BIN)/python tools/book.py build

html: $(STAMP) ## render the outputs stored in book/, execute nothing
	@$(BIN)/python tools/book.py render

notebooks: $(STAMP) ## execute every chapter that changed, store the cleaned outputs in book/
	@$(BIN)/python tools/book.py store

quick: $(STAMP) ## lint, types and the tests that are neither slow nor in a browser
	@$(MAKE) --no-print-directory lint types
	$(PYTEST) -m "not slow and not browser"

test: $(STAMP) ## prove everything: lint, types, tests with coverage, the site in a browser, nbval
	@$(MAKE) --no-print-directory lint types
	@$(BIN)/python tools/book.py render
	SAM_LAB_BROWSER=required $(PYTEST) --cov --cov-report=term
	@$(BIN)/python tools/book.py check
	@echo "make test: everything passed"

lint: $(STAMP) ## ruff: lint and format; actionlint: the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/actionlint

types: $(STAMP) ## mypy on the library, the tools and the benchmarks
	$(BIN)/mypy

check: $(STAMP) ## run every chapter again, compare with its stored outputs
	@$(BIN)/python tools/book.py check

# A build folder left over would put modules that are gone into the wheel.
wheel: $(STAMP) ## build the library's wheel into dist/
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

colab: $(STAMP) ## run every chapter as on Colab; ENV=lower: oldest versions, ENV=newest: newest torch
	@$(BIN)/python tools/colab.py $(ENV)

bench: $(BENCH) ## measure the curvature tools, SAM and attacks against peers, in about 20 minutes
	@$(BIN)/python -m benchmarks

address: $(STAMP) ## write the address of the repository everywhere: URL=…, else that of origin
	@$(BIN)/python tools/address.py $(if $(filter command,$(origin URL)),'$(URL)')

clean: ## remove what was built; .venv stays
	rm -rf _build build dist .venv-* .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find sam_lab tests tools book benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Where Debian has taken ensurepip out of python3 (its package python3-venv brings it back), the pip
# outside installs the pip inside. torchattacks, which the tests compare with, comes without what it
# needs: it asks for requests~=2.25.1, of 2021, next to which nothing else could be installed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("SAM Lab needs Python 3.11 or later; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install --quiet pip; } || { \
	  echo "Cannot make a virtual environment with $(PYTHON); on Debian and Ubuntu: apt-get install python3-venv python3-pip" >&2; exit 1; }
	$(BIN)/pip install --quiet -c constraints.txt -e '.[book,test]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps torchattacks
	@touch $@

$(BENCH): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[book,bench]'
	@touch $@
