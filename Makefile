# Each target makes its own environment in .venv on the first call.
PYTHON ?= python3
VENV := .venv
WORKDIR ?= runs/quickstart

.PHONY: train test test-all lint docs clean

train: $(VENV)/installed
	$(VENV)/bin/python -m dat_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs site
