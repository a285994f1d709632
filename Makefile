VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: demo test test-lowest lint format bench

demo: $(VENV)/.demo  ## install, then the main job: a teacher and students on handwritten digits
	$(PYTHON) demo/digits.py

test: $(VENV)/.dev  ## the whole test suite, on two processes
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --durations 10

test-lowest: $(VENV)-lowest/.test  ## the same at the lower bound of every dependency
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2 --durations 10

lint: $(VENV)/.dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev  ## what a step of every method costs on this machine
	$(PYTHON) benchmarks/steps.py

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: setup.cfg pyproject.toml | $(VENV)
	$(PYTHON) -m pip install --editable '.[$*]'
	touch $@

$(VENV)-lowest/.test: setup.cfg pyproject.toml tests/lowest.txt | $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --editable '.[test]' --constraint tests/lowest.txt
	touch $@

$(VENV) $(VENV)-lowest:
	python3 -m venv $@
