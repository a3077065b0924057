PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench docs prior
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/ctrl demo --out runs/demo --overwrite

test: setup
	$(BIN)/pytest -n 2 --dist worksteal  # tests are of very unequal length

lint: setup
	$(BIN)/ruff check src tests bench examples
	$(BIN)/ruff format --check src tests bench examples

bench: setup
	$(BIN)/python bench/prior.py
	$(BIN)/python bench/demo.py ink
	$(BIN)/python bench/demo.py digit
	$(BIN)/python bench/demo.py ink,slant
	$(BIN)/python bench/add.py
	$(BIN)/python bench/scale.py
	$(BIN)/python bench/own.py
	$(BIN)/python bench/text.py
	$(BIN)/python bench/classifiers.py
	$(BIN)/python bench/exact.py
	$(BIN)/python bench/bias.py
	$(BIN)/python bench/results.py
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/soak.py
	$(BIN)/python bench/estimate.py

docs: setup
	$(BIN)/typer ctrl_diffusion.commands.app utils docs --name ctrl --output docs/commands.md

prior: setup
	$(BIN)/python bench/build_digits.py
