PYTHON ?= python3
BIN := .venv/bin
COLAB_TORCH ?= torch==2.11.0 --index-url https://download.pytorch.org/whl/cpu
INSTALLED := .venv/.installed

.PHONY: setup demo test test-t4 test-browser test-colab notebooks release badges lint lab clean

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: $(INSTALLED)  ## make .venv with the tested versions

demo: $(INSTALLED)  ## the whole pipeline on 1,797 digits; QUICK=1 for 90 seconds, ARGS for more options
	$(BIN)/cmlib demo $(if $(QUICK),--quick) $(ARGS)

test: lint  ## linters, types, unit tests, and every notebook at profile ci
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-t4: $(INSTALLED)  ## the notebooks at profile t4, on a machine with a GPU; prints the time against the budget
	CMLIB_PROFILE=t4 $(BIN)/python -m pytest --nbval-cell-timeout 3600 $(ARGS) notebooks

test-browser: $(INSTALLED)  ## the explorers in JupyterLab, in Debian's Chromium; screenshots in runs/browser
	$(BIN)/python -m pytest -rs $(ARGS) tests/browser

test-colab:  ## the notebooks under Colab's versions, in an environment of its own; COLAB_TORCH=torch==2.13.0 for another torch
	$(PYTHON) -m venv runs/colab
	runs/colab/bin/pip install -q --disable-pip-version-check $(COLAB_TORCH)
	grep -v ^torch constraints-colab.txt > runs/colab/constraints.txt
	runs/colab/bin/pip install -q --disable-pip-version-check -c runs/colab/constraints.txt -r requirements.txt pytest pytest-xdist psutil
	PYTHONPATH=. OMP_NUM_THREADS=1 runs/colab/bin/python -m pytest -n 2 --dist loadfile $(ARGS) notebooks tests/test_widgets.py

notebooks: $(INSTALLED)  ## regenerate and execute all of them, or NB=01
	$(BIN)/python notebooks/build.py $(NB)

release: $(INSTALLED)  ## the student versions of the personas' exercises, from their sources
	$(BIN)/python notebooks/build.py --release

badges: $(INSTALLED)  ## write the public address, REPO=owner/name, into pyproject.toml, the badges and the setup cells
	$(BIN)/python notebooks/build.py --badges $(REPO)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(INSTALLED)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab $(ARGS) notebooks

clean:  ## remove what runs made (not the environment)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
