# `make demo` and `make test` need Python 3.11 or newer and nothing else: they make .venv, install
# what they use into it, and install again only when pyproject.toml changes.

PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell command -v $(name))))
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test
demo: $(VENV)/installed-examples
	$(BIN)/python examples/digits.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
