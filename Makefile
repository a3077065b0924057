PYTHON ?= python3
BIN := .venv/bin
FIGURES := demo digit ink,slant add scale unseen apart own text programs exact bias

.PHONY: setup demo test lint types release bench docs prior letters ink
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
	$(BIN)/ruff check src tests bench examples docs/lessons docs/tools
	$(BIN)/ruff format --check src tests bench examples docs/lessons docs/tools

types: setup
	$(BIN)/mypy  # about a minute and a half of one core; what did not change is quick the next time

release: setup
	.ci/release

bench: setup
	$(BIN)/python bench/prior.py
	for name in $(FIGURES); do $(BIN)/python bench/figures.py $$name || exit 1; done
	for name in classifiers floors population results speed soak estimate fuzz neighbour two_digits play certify startup labels; do $(BIN)/python bench/$$name.py || exit 1; done
	$(BIN)/python bench/certify.py alignprop

docs: .venv/docs
	$(BIN)/typer ctrl_diffusion.commands.app utils docs --name ctrl --output docs/reference/commands.md
	$(BIN)/python docs/tools/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/ready
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

prior: setup
	$(BIN)/python bench/build_digits.py

letters: setup
	$(BIN)/python bench/build_letters.py

ink: setup
	$(BIN)/python bench/build_ink.py
