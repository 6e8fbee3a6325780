# The commands that people and CI run. `make help` lists them. Each target sets up what it needs in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPAT := .venv-compat
WORKERS ?= 2
# The folder of the repository may have any name. Tools that need a folder named like the package find it here.
PACKAGE := $(VENV)/package

.DEFAULT_GOAL := help
.PHONY: help install demo test suite lint types contracts docs compat clean package

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: $(STAMP) ## set up .venv with all that development needs

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $(STAMP)

demo: $(STAMP) ## train a small model on the sample data set, and link with it
	$(BIN)/python -m mimic_el.scripts.demo

test: lint types contracts ## linter, types, import contracts, and all tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS)

suite: $(STAMP) ## transformers' own tests on MIMIC, and on CLIP beside it (minutes; downloads their source through pip)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,suite]"
	$(BIN)/python tests/suite/run.py --workers $(WORKERS)

lint: $(STAMP) ## format and lint, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: package ## check the types
	cd $(PACKAGE) && $(abspath $(BIN))/mypy --config-file mimic_el/pyproject.toml -p mimic_el

contracts: package ## check which file may import which (the contracts are in pyproject.toml)
	cd $(PACKAGE) && PYTHONPATH=. $(abspath $(BIN))/lint-imports mimic_el/pyproject.toml

docs: package ## build the pages and the API reference into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

package: $(STAMP)
	mkdir -p $(PACKAGE)
	ln -sfn ../.. $(PACKAGE)/mimic_el

compat: $(COMPAT)/.installed $(STAMP) ## all tests with the oldest versions that pyproject.toml allows, and those of images with the newest Pillow
	$(COMPAT)/bin/python -m pytest --numprocesses $(WORKERS)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(COMPAT)/newest pillow
	PYTHONPATH=$(abspath $(COMPAT)/newest) $(BIN)/python -m pytest tests/test_images_mimic.py tests/test_image_sources_mimic.py \
		tests/test_processing_mimic.py tests/test_archives.py

$(COMPAT)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

clean: ## delete what was built, and runs/ with the results of the demo
	rm -rf build dist *.egg-info runs
