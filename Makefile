# make demo: install the package, then a prompt and an image become videos.
# make test: install what developers need, then what a change usually breaks.
# make test-slow: the tests that take long.   make docs: the reference of all public names, in build/docs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: setup demo test test-slow docs

setup: $(VENV)/.package

# Python compiles what is imported, when it is: a fifth of what is installed.
$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) . --no-compile
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(INSTALL) '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/text_to_video.py
	$(BIN)/python examples/image_to_video.py

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto -m slow

docs: $(VENV)/.dev
	$(BIN)/python -m tests.reference build/docs
