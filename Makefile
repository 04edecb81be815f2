PYTHON ?= python3
BIN := .venv/bin
COLAB_TORCH ?= torch==2.11.0 --index-url https://download.pytorch.org/whl/cpu
INSTALLED := .venv/.installed
ORT_WEB := runs/onnxruntime-web/dist
RECIPE ?= runs/recipe
PROFILE ?= t4

.PHONY: setup demo recipe test test-t4 test-browser test-colab site assets notebooks release badges lint lab clean

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: $(INSTALLED)  ## make .venv with the tested versions

demo: $(INSTALLED)  ## the whole pipeline on 1,797 digits; QUICK=1 for 90 seconds, ARGS for more options
	$(BIN)/cmlib demo $(if $(QUICK),--quick) $(ARGS)

recipe: export CMLIB_PROFILE := $(PROFILE)
recipe: $(INSTALLED)  ## the brief's recipe on CIFAR-10: teacher, 200,000 pairs, both students, FID; stopped, it goes on. PROFILE=ci DATA="--dataset digits" to rehearse
	test -d $(RECIPE)/teacher || $(BIN)/cmlib cache build --source data --solver posterior_mean --schedule cosine-linear $(DATA) --out $(RECIPE)/cache
	$(BIN)/cmlib teacher finetune --schedule cosine-linear --patience 5 --refresh $(RECIPE)/cache --resume $(DATA) --out $(RECIPE)/teacher
	$(BIN)/cmlib distill --objective pair-regression --cache $(RECIPE)/cache --teacher $(RECIPE)/teacher/pipeline --resume $(DATA) --out $(RECIPE)/regression
	$(BIN)/cmlib distill --teacher $(RECIPE)/teacher/pipeline --resume $(DATA) --out $(RECIPE)/student
	$(BIN)/cmlib evaluate --teacher $(RECIPE)/teacher/pipeline --checkpoint $(RECIPE)/student/student.pt $(FID) $(DATA) --out $(RECIPE)/evaluation

test: lint  ## linters, types, unit tests, and every notebook at profile ci
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-t4: $(INSTALLED)  ## the notebooks at profile t4, on a machine with a GPU; prints the time against the budget
	CMLIB_PROFILE=t4 $(BIN)/python -m pytest --nbval-cell-timeout 3600 $(ARGS) notebooks

test-browser: $(INSTALLED)  ## the explorers in JupyterLab and, after `make assets`, the page, in Debian's Chromium; screenshots in runs/browser
	$(BIN)/python -m pytest -rs $(ARGS) tests/browser

site: $(INSTALLED)  ## the page as static files in runs/site; for use offline, `make assets site ARGS="--assets $(ORT_WEB)"`
	$(BIN)/cmlib site --checkpoint data/digits_student.safetensors --out runs/site $(ARGS)

assets: $(ORT_WEB)  ## onnxruntime-web from npm, for pages that need no CDN

$(ORT_WEB):
	mkdir -p runs
	cd runs && npm pack --silent onnxruntime-web@1.30.0
	cd runs && tar -xzf onnxruntime-web-1.30.0.tgz package/dist && rm onnxruntime-web-1.30.0.tgz
	rm -rf runs/onnxruntime-web && mv runs/package runs/onnxruntime-web

test-colab:  ## the notebooks under Colab's versions, in an environment of its own; COLAB_TORCH=torch==2.13.0 for another torch
	$(PYTHON) -m venv runs/colab
	runs/colab/bin/pip install -q --disable-pip-version-check $(COLAB_TORCH)
	grep -v ^torch constraints-colab.txt > runs/colab/constraints.txt
	runs/colab/bin/pip install -q --disable-pip-version-check -c runs/colab/constraints.txt -r requirements.txt pytest pytest-xdist psutil onnx onnxruntime onnxscript
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
