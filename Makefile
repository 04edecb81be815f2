PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test lint lab clean

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: $(INSTALLED)  ## make .venv with the tested versions

demo: $(INSTALLED)  ## the whole pipeline on 1,797 digits; QUICK=1 for 90 seconds, ARGS for more options
	$(BIN)/cmlib demo $(if $(QUICK),--quick) $(ARGS)

test: lint  ## linters, types, unit tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(INSTALLED)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

clean:  ## remove what runs made (not the environment)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
