PYTHON ?= python3
PYTHON_ARVIZ1 ?= python3.13
WORKERS ?= 2
PYTEST_ARGS ?=
FLEET_ARGS ?=

BIN := .venv/bin
TORCH := "$$(grep '^torch==' constraints.txt)"
# One thread for each worker. The examples of one document share their names, so they stay together.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo test bench kills trust fleet fleet-references gpu check format test-arviz1 clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

venv: .venv/.installed ## .venv, with the versions of constraints.txt

# PyTorch goes first, on its own: then nothing else decides which build of it is taken.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: venv ## compare the strategies on the radon data
	$(BIN)/varmeta compare radon --overwrite \
		--strategies nested-laplace,joint,laplace-evidence,imaml,nuts,no-pooling,complete-pooling

test: venv ## the tests and every example in the documentation
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(PYTEST_ARGS)

bench: .venv/.bench ## seconds per meta-step against JAX, TorchOpt and others; Figure 2 of the paper
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.figure2

kills: venv ## runs of every strategy killed by SIGKILL, and a full disk: what is lost (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kills

trust: venv ## stale resumes, bad inputs, threads: what is refused, and the page of it (6 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.trust

fleet: venv ## every strategy on 27 real data sets, beside NUTS and maximum likelihood (hours)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fleet $(FLEET_ARGS)

fleet-references: venv ## what `make fleet` compares with, where it is missing: NumPyro, statsmodels
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,fleet-references]'
	XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
		$(BIN)/python -m benchmarks.fleet.references

gpu: .venv/.bench ## the tests and timings that need a CUDA device; says so where there is none
	$(BIN)/python -m pytest -rs tests/test_gpu.py $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.gpu

.venv/.bench: .venv/.installed pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,bench]'
	touch $@

check: venv ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy varmeta

format: venv ## sort imports and format
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .

test-arviz1: .venv-arviz1/.installed ## export and evidence with ArviZ 1.x (PYTHON_ARVIZ1=python3.12+)
	OMP_NUM_THREADS=1 .venv-arviz1/bin/python -m pytest tests/test_export*.py \
		tests/test_evidence.py tests/test_shrinkage_table.py $(PYTEST_ARGS)

.venv-arviz1/.installed: pyproject.toml constraints.txt
	@$(PYTHON_ARVIZ1) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo 'ArviZ 1.x needs Python 3.12+: make test-arviz1 PYTHON_ARVIZ1=/path/to/python'; exit 1; }
	$(PYTHON_ARVIZ1) -m venv .venv-arviz1
	.venv-arviz1/bin/python -m pip install $(TORCH)
	.venv-arviz1/bin/python -m pip install 'arviz>=1' -e '.[dev]'
	touch $@

clean: ## remove caches and builds; the environments and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find varmeta tests -name __pycache__ -type d -prune -exec rm -rf {} +
