# make demo | test | test-all | check | wheel | clean. Needs make, a C compiler and Python 3.11 or newer;
# everything else is installed into .venv, in the versions of constraints.txt.
PYTHON ?= python3
RECIPE ?= models/digits-resnet8.toml
OUT ?= runs/$(basename $(notdir $(RECIPE)))

BIN := .venv/bin
STAMP := .venv/.stamp-installed

# A JIT-compiled Brevitas rounds differently and cannot be exported.
unexport BREVITAS_JIT
unexport PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-all check format wheel clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/resq-deploy run $(RECIPE) --out $(OUT)

# One process a core, each with one thread; a file stays in one process and keeps its fixtures.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_docs.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/python -m pytest -q tests/test_wheel.py
	@ls -l dist

# A .venv that is already there is used as it is, unless its Python does not start.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed; {sys.executable} is {v[0]}.{v[1]} (set PYTHON=...)")'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv (minutes on the first run)"
	@$(BIN)/python -m pip install --quiet -e ".[train,report,attack,dask,dev]" -c constraints.txt
	@touch $@

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find resq_deploy tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
