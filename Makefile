# The two commands of the README, and the checks that every commit passes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo preview kernels test lint docs environment environments clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,demo,docs]'
	touch .venv/ready

demo: setup
	$(BIN)/morphseek demo --output demo-output

# the panel without Slicer: a window, or without a screen pictures in preview/
preview: setup
	$(BIN)/python Testing/preview.py

# once for all processes of the tests; each would compile them again while none is done
kernels: setup
	$(BIN)/python -m MorphSeekLib.registration.compile_kernels

test: kernels
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python Testing/structure.py --check

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file Resources/Docs/mkdocs.yml

# what the panel does in Slicer, done with exactly the packages that Slicer ships and the panel installs
environment: use-5.12.3

environments: use-5.12.3 use-5.10.0

use-%: build/environments/%/ready
	build/environments/$*/bin/python Testing/environments/use_environment.py

.PRECIOUS: build/environments/%/ready
build/environments/%/ready: Testing/environments/slicer-python-%.txt MorphSeek/Resources/requirements.txt constraints.txt
	$(PYTHON) Testing/environments/make_environment.py $< $(@D)
	touch $@

clean:
	rm -rf .venv build demo-output preview runs *.egg-info
