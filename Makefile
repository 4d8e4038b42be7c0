# `make demo` and `make test` need nothing but Python 3.11+; each makes its own virtual environment.
PYTHON ?= python3
DEMO_OUT ?= demo-out
DEMO := .venv-demo
DEV := .venv
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint docs claims benchmarks clean

demo: $(DEMO)/installed  ## the main job on the bundled model: convert, evaluate, report
	$(DEMO)/bin/burnish demo --out $(DEMO_OUT) --overwrite

test: $(DEV)/installed  ## the default test suite
	OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest -n auto --maxprocesses 4

test-all: $(DEV)/installed  ## slow tests too: real models and engines, some of which are fetched
	HF_HUB_OFFLINE=1 $(DEV)/bin/python -m pytest -m "not gpu"

lint: $(DEV)/installed  ## style, types and the arrows between rooms
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

docs: $(DEV)/installed  ## the documentation site, into site/
	$(DEV)/bin/pip install -q -c constraints.txt -e ".[docs]"
	$(DEV)/bin/mkdocs build --strict

claims: $(DEV)/installed  ## measure every claim that fits this machine, and show the board
	$(DEV)/bin/burnish claims run --budget cpu-minutes
	$(DEV)/bin/burnish claims

benchmarks: $(DEV)/installed  ## see benchmarks/README.md
	$(DEV)/bin/python benchmarks/true_shape.py

clean:
	rm -rf $(DEV) $(DEMO) $(DEMO_OUT) site build dist

$(DEMO)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install -q -c constraints.txt -e .
	touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
