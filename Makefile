PYTHON ?= python3.11
NEWEST := .venv-newest
AXOLOTL := .venv-axolotl
EVAL := .venv-eval
SEEDS ?= 3
WORKERS ?= 2
OUTPUT ?= lab_results
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: lab test lint types test-newest test-axolotl test-eval clean

## The main job on the embedded world: a table on the screen, results.json and results.png in $(OUTPUT).
lab: $(NEWEST)/.installed
	$(NEWEST)/bin/trl-safety lab -o $(OUTPUT) --seeds $(SEEDS)

## Everything, on both stacks that users have.
test:
	$(MAKE) --jobs $(WORKERS) $(NEWEST)/.installed $(AXOLOTL)/.installed $(EVAL)/.installed
	$(MAKE) lint types test-newest test-axolotl test-eval

lint: $(NEWEST)/.installed
	$(NEWEST)/bin/ruff check .

types: $(NEWEST)/.installed
	$(NEWEST)/bin/mypy

# The lab trains on all cores: beside another worker its threads would wait for each other.
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not lab"
	$(NEWEST)/bin/python -m pytest -m lab

# The lab's training and the benchmarks do not depend on the stack; the lab's wiring is tested on both.
test-axolotl: $(AXOLOTL)/.installed
	$(AXOLOTL)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not lab" --ignore tests/test_benchmarks.py

# inspect_ai cannot be installed beside Axolotl: its runner is tested in an environment of its own.
test-eval: $(EVAL)/.installed
	$(EVAL)/bin/python -m pytest tests/evaluation/test_inspecting.py

# DeepSpeed's communication is compiled here: compiled by its first processes, one that is killed leaves a lock behind, for which
# the next ones wait for ever. Without a C++ compiler its tests are skipped.
DEEPSPEED := DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1

$(EVAL)/.installed: EXTRAS := qlora,test,eval
$(EVAL)/.installed: constraints/eval.txt
$(NEWEST)/.installed: EXTRAS := qlora,test
$(NEWEST)/.installed: constraints/newest.txt
$(AXOLOTL)/.installed: EXTRAS := qlora,test,axolotl
$(AXOLOTL)/.installed: constraints/axolotl.txt
$(NEWEST)/.installed $(AXOLOTL)/.installed: constraints/deepspeed.txt
%/.installed: pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/pip install --quiet torch==2.13.0 -c $(firstword $(filter constraints/%,$^))
	$*/bin/pip install --quiet --editable ".[$(EXTRAS)]" -c $(firstword $(filter constraints/%,$^))
	$(if $(findstring deepspeed,$^),if command -v g++ > /dev/null; then $(DEEPSPEED) $*/bin/pip install --quiet --no-cache-dir --no-build-isolation --no-deps --target $*/deepspeed -r constraints/deepspeed.txt; fi)
	touch $@

clean:
	rm -rf $(NEWEST) $(AXOLOTL) $(EVAL) lab_results
