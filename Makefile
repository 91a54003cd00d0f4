# Two commands for a newcomer: `make quickstart` and `make test`. Each builds the environment that it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Nothing is fetched from a model or data hub at run time.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = true

# Two files of tests at a time; those that start several ranks first, because they take longest and mostly wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-unit test-distributed test-recovery test-benchmarks test-cluster test-gpu bench bench-gpu lint format docs constraints clean

quickstart: $(VENV)/.installed      ## real data, real result: a table, a plot and an exported model in about 10 minutes
	$(BIN)/python -m benchmarks.quickstart --out quickstart

test: $(VENV)/.installed            ## one machine without a GPU, ten minutes at most
	$(PYTEST) tests/distributed tests/gpu tests/unit

test-recovery: $(VENV)/.installed   ## runs that are killed, starved and damaged, and Ray on this machine
	$(PYTEST) tests/recovery

test-benchmarks: $(VENV)/.installed ## every benchmark, the paper's driver and the quickstart, at toy sizes
	$(PYTEST) tests/benchmark_runs

test-unit: $(VENV)/.installed
	$(PYTEST) tests/unit

test-distributed: $(VENV)/.installed
	$(PYTEST) tests/distributed

test-cluster: $(VENV)/.installed    ## as root: real Slurm and Ray clusters of several nodes, on this machine
	$(BIN)/python -m pytest tests/cluster

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest tests/gpu

bench: $(VENV)/.installed           ## the speed benchmarks on this CPU, one after the other
	for name in bottleneck padding loader startup zero_overhead; do \
	    OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-gpu: $(VENV)/.installed       ## tests/gpu and the GPU benchmarks, ten minutes at most
	PYTHON=$(BIN)/python benchmarks/gpu_all.sh

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# torch goes in first and by its exact version, so that a local CPU wheel (pip's find-links) can serve.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lbr_dist needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c constraints.txt
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[test,quickstart,dev]'
	touch $@

docs: $(VENV)/.installed            ## the pages that are made from the code
	$(BIN)/python -c 'from lbr_dist.recipes.settings import markdown; print(markdown(), end="")' > docs/settings.md

constraints: $(VENV)/.installed
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[paper]'
	(sed -n '/^#/p' constraints.txt; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | sed 's/+cpu//') > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) quickstart .pytest_cache .ruff_cache .mypy_cache
