# make demo: set up, then a prompt and an image become videos.
# make test: set up, then what a change usually breaks.   make test-slow: the tests that take long.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/text_to_video.py
	$(BIN)/python examples/image_to_video.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest --numprocesses auto -m slow
