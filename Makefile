# Everything a fresh machine needs: Python 3.11 or newer, and make. `make` alone lists the targets.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # the targets of `test` and `book` follow one another; pytest does the parallel part
.PHONY: help book pdf test lab execute figure bench clean lint unit fuzz kills mutants corpus run-chapters check-chapters html check-site \
	check-browser

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

# The first interpreter that starts and is new enough; choose another with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# The models here are small: one thread per process is faster than two, and gives the same numbers every time.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

# A live run amplifies how sums are rounded, and processors differ in that: with wider vectors, in another order. What
# the chapters print is made, and compared, with the kernels of AVX2, of which MKL has a mode that promises equal sums.
run-chapters check-chapters execute: export ATEN_CPU_CAPABILITY := avx2
run-chapters check-chapters execute: export ONEDNN_MAX_CPU_ISA := AVX2
run-chapters check-chapters execute: export MKL_CBWR := AVX2

# One notebook is one unit of work (loadscope); a cell that hangs is an error.
NBVAL := $(BIN)/python -m pytest book -q -n $(JOBS) --dist loadscope --nbval-cell-timeout=120

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---------------------------------------------------------------------------------------------- set-up

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; try make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "==> Setting up $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

.venv: $(READY)  ## create or update the environment

# ------------------------------------------------------------------------------------------------ book

book: corpus run-chapters html  ## run every chapter on the CPU and build the book
	@echo "==> The book: $(CURDIR)/_build/html/index.html"

corpus: $(READY)
	@echo "==> Preparing the corpus"
	@$(BIN)/localgpt corpus > /dev/null

# The book shows the outputs that are committed with the chapters. So `make book` runs the chapters without
# writing them: a cell that raises fails the build, an output whose last digit depends on the processor does
# not. `make test` compares every output too, and `make execute` is the one target that rewrites notebooks.
run-chapters: $(READY)
	@echo "==> Running every chapter"
	@$(NBVAL) --nbval-lax

# From scratch each time: a page that is not read again does not repeat its warnings, and the API pages
# depend on docstrings that Sphinx does not watch.
html: $(READY)
	@echo "==> Building the book"
	@rm -rf _build/html _build/.doctrees
	@$(BIN)/jupyter-book build . -W -n --keep-going --all -q > /dev/null

pdf: html  ## print the built book as one PDF, with the Chromium of the system
	@echo "==> Printing the book"
	@$(BIN)/python tools/print_book.py

# ----------------------------------------------------------------------------------------------- tests

test: lint unit corpus check-chapters html check-site check-browser  ## lint, unit tests, every chapter's outputs, the book
	@echo "==> All checks passed"
	@$(BIN)/python tests/browser/driver.py  # says it where they have been left out

lint: $(READY)
	@echo "==> Lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

unit: $(READY)
	@echo "==> Unit tests"
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not book"

# The unit tests play a thousand of these cases.
fuzz: $(READY)  ## damaged files and odd commands, ten thousand cases
	@LOCALGPT_FUZZ=10 $(BIN)/python -m pytest -q -n $(JOBS) tests/fuzz

# The unit tests kill each victim once. Its bound on what may go on afterwards is for an idle machine.
kills: $(READY)  ## suites killed at random moments, fifty times each
	@LOCALGPT_KILLS=50 $(BIN)/python -m pytest -q -n $(JOBS) --timeout 3600 tests/kills tests/engines/test_ray.py -k kill

# Not part of `test`: it takes the better part of an hour. ARGS="--only layers" and more: see the script.
mutants: $(READY)  ## change the package in many places, one at a time, and list what no test notices
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[mutation]"
	@$(BIN)/python tests/mutants.py $(ARGS)

check-chapters: $(READY)
	@echo "==> Every chapter gives the outputs it was committed with"
	@$(NBVAL) --nbval

check-site: $(READY)
	@echo "==> The built pages"
	@LOCALGPT_SITE=_build/html $(BIN)/python -m pytest -q tests/book/test_site.py

# With the Chromium of the system, from PATH or LOCALGPT_CHROMIUM; skipped where there is none.
check-browser: $(READY)  ## the built pages in a browser: errors, accessibility, the lab, the explorer
	@echo "==> The built pages in a browser"
	@LOCALGPT_SITE=_build/html $(BIN)/python -m pytest -q -n $(JOBS) tests/browser

# ------------------------------------------------------------------------------------------------ work

# From the root, so that a link from one page to another leads somewhere; the settings show Markdown rendered.
lab: $(READY)  ## open the book in JupyterLab
	@$(BIN)/jupyter lab --LabApp.app_settings_dir=book/_lab --LabApp.default_url=/lab/tree/book/intro.ipynb

execute: corpus  ## re-run every notebook and write its outputs in place
	@$(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace \
		--ExecutePreprocessor.timeout=120 --ExecutePreprocessor.record_timing=False \
		$(wildcard book/*.ipynb book/chapters/*.ipynb)

figure: $(READY)  ## draw the README's figure from the records
	@$(BIN)/python tools/readme_figure.py book/_static/final-losses.png

bench: $(READY)  ## measure the cost of a training step under each rule
	@$(BIN)/localgpt bench

clean:  ## remove what was built (the environment stays)
	@rm -rf _build .pytest_cache .ruff_cache .hypothesis
