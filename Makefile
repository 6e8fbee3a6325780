# Two commands: `make demo` and `make test`. Each sets up all it needs in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPAT := .venv-compat

.PHONY: demo test compat lint types install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m mimic_el.scripts.demo

test: lint types
	$(BIN)/python -m pytest --numprocesses 2

# The tests with the oldest versions that pyproject.toml allows.
compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -m pytest --numprocesses 2

$(COMPAT)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The root's folder may have any name; a link gives the checker the package's.
types: $(STAMP)
	mkdir -p $(VENV)/typecheck
	ln -sfn ../.. $(VENV)/typecheck/mimic_el
	cd $(VENV)/typecheck && ../bin/mypy --config-file mimic_el/pyproject.toml -p mimic_el

clean:
	rm -rf build dist *.egg-info runs
