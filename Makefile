# PYTHON=… is the only interpreter to use; without it each stack uses the first suitable version in PATH or from pyenv.
PYTHON ?=
python = $(shell for version in $(1); do \
  for candidate in $(or $(PYTHON),"python$$version" python3 $(HOME)/.pyenv/versions/"$$version".*/bin/python); do \
    "$$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2> /dev/null && command -v "$$candidate" && exit; \
  done; \
done)
# 3.11 first: the machine may already have PyTorch for it.
NEWEST_PYTHON := $(call python,3.11 3.12 3.13)
# Axolotl 0.21 needs 3.12, and its pinned packages cannot be installed on 3.13.
AXOLOTL_PYTHON := $(call python,3.12)
# No newer Axolotl than 0.19.0 can be installed on 3.11.
OLDEST_PYTHON := $(call python,3.11)

LAB := .venv-lab
NEWEST := .venv-newest
AXOLOTL := .venv-axolotl
OLDEST := .venv-oldest
RELEASE := .venv-release
PAIRS ?= 8
SEEDS ?= 2
WORKERS ?= 2
OUTPUT ?= lab_results
# What to look at first where the tests take too long.
SLOWEST := --durations=40 --durations-min=2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: lab lab-full check test lint types stacks install docs docs-check docs-generated wheel test-newest test-axolotl test-oldest clean

## The main job on the embedded world, every method once: a table on the screen, results.json and results.png in $(OUTPUT).
lab: $(LAB)/.installed
	$(LAB)/bin/trl-safety lab -o $(OUTPUT) --quick --seeds 1 --workers $(WORKERS)

## What a claim needs: every method at every strength with every control, over $(PAIRS) pairs and $(SEEDS) seeds of both kinds of base. Hours.
lab-full: $(LAB)/.installed
	$(LAB)/bin/trl-safety lab -o $(OUTPUT) --both-bases --pairs $(PAIRS) --seeds $(SEEDS) --workers $(WORKERS)

## For the daily loop: lint, types, and the tests of the maths, the files and the options.
check: lint types
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) tests/methods tests/linalg tests/adapters tests/subspace tests/test_config.py tests/test_house.py

## Everything, on both stacks that users have.
test: stacks
	$(MAKE) --jobs $(WORKERS) install
	$(MAKE) lint types docs-check test-newest $(if $(AXOLOTL_PYTHON),test-axolotl)
	@$(MAKE) --no-print-directory stacks

## Which interpreter each stack runs on, and which stacks are left out for lack of one.
stacks:
	@echo "The newest stack: $(or $(NEWEST_PYTHON),LEFT OUT; it needs Python 3.11 or 3.12 or 3.13)"
	@echo "Axolotl 0.21: $(or $(AXOLOTL_PYTHON),LEFT OUT; it needs Python 3.12)"
	@test -n "$(NEWEST_PYTHON)"

install: $(NEWEST)/.installed $(if $(AXOLOTL_PYTHON),$(AXOLOTL)/.installed)

lint: $(NEWEST)/.installed
	$(NEWEST)/bin/ruff check .

types: $(NEWEST)/.installed
	$(NEWEST)/bin/mypy

## The documentation at http://127.0.0.1:8000, built anew at every change.
docs: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m mkdocs serve

## The documentation without a warning, in build/site, and its spelling.
docs-check: export NO_MKDOCS_2_WARNING := 1
docs-check: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m mkdocs build --quiet --strict
	$(NEWEST)/bin/codespell README.md docs .github benchmarks/RESULTS.md benchmarks/README.md

## Write the generated parts of README.md and docs anew.
docs-generated: $(NEWEST)/.installed
	$(NEWEST)/bin/python docs/tools/pages.py

## The wheel in dist, checked, and installed into an empty environment without extras: minutes, most of them for PyTorch.
wheel:
	test -x $(RELEASE)/bin/twine || { $(NEWEST_PYTHON) -m venv $(RELEASE) && $(RELEASE)/bin/pip install --quiet "build>=1.2" "twine>=6"; }
	$(RELEASE)/bin/python docs/tools/wheel.py --output dist --constraint constraints/newest.txt

# The lab trains on all cores: beside another worker its threads would wait for each other.
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not lab and not slow" $(SLOWEST)
	$(NEWEST)/bin/python -m pytest -m lab

# The lab's training, the benchmarks and the documentation do not depend on the stack; the lab's wiring is tested on both.
ON_AXOLOTL := -m pytest $(SLOWEST) -n $(WORKERS) --dist loadfile -m "not lab and not slow" --ignore tests/test_benchmarks.py --ignore tests/test_documentation.py

test-axolotl: $(AXOLOTL)/.installed
	$(AXOLOTL)/bin/python $(ON_AXOLOTL)

## The oldest supported stack: Python 3.11, TRL 1.9.0, Transformers 5.16.1, Axolotl 0.19.0. Not part of `make test`.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(ON_AXOLOTL)

# DeepSpeed's communication is compiled here. If its first processes compiled it, a killed one would leave a lock behind, and the next
# ones would wait for it for ever. Without a C++ compiler its tests are skipped.
DEEPSPEED := DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1

$(LAB)/.installed $(NEWEST)/.installed: INTERPRETER := $(NEWEST_PYTHON)
$(AXOLOTL)/.installed: INTERPRETER := $(AXOLOTL_PYTHON)
$(OLDEST)/.installed: INTERPRETER := $(OLDEST_PYTHON)
# inspect_ai cannot be installed beside Axolotl.
$(NEWEST)/.installed: EXTRAS := [qlora,test,eval,docs]
$(AXOLOTL)/.installed $(OLDEST)/.installed: EXTRAS := [qlora,test,axolotl]
$(LAB)/.installed $(NEWEST)/.installed: constraints/newest.txt
$(AXOLOTL)/.installed: constraints/axolotl.txt
$(OLDEST)/.installed: constraints/oldest.txt
$(NEWEST)/.installed $(AXOLOTL)/.installed $(OLDEST)/.installed: constraints/deepspeed.txt
# Without --no-compile pip compiles every file of every package, most of which are never imported.
# An environment of another version of Python is recreated.
PIP_INSTALL := bin/pip install --quiet --no-compile
%/.installed: pyproject.toml
	@test -n "$(INTERPRETER)" || { echo "$*: no suitable Python: see the top of the Makefile"; exit 1; }
	@echo "$*: $(INTERPRETER)"
	test "$$($*/bin/python --version 2> /dev/null)" = "$$($(INTERPRETER) --version)" || $(INTERPRETER) -m venv --clear $*
	$*/$(PIP_INSTALL) torch==2.13.0 -c $(firstword $(filter constraints/%,$^))
	$*/$(PIP_INSTALL) --editable ".$(EXTRAS)" -c $(firstword $(filter constraints/%,$^))
	$(if $(findstring deepspeed,$^),if command -v g++ > /dev/null; then $(DEEPSPEED) $*/$(PIP_INSTALL) --no-cache-dir --no-build-isolation --no-deps --upgrade --target $*/deepspeed -r constraints/deepspeed.txt; fi)
	touch $@

clean:
	rm -rf $(LAB) $(NEWEST) $(AXOLOTL) $(OLDEST) $(RELEASE) build dist lab_results
