# make demo   train a SiT on real handwritten digits, on the CPU, in about three minutes
# make test   install the test tools and run the tests
# make lint   formatting, lint and types

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits

# The compiled operators; without a compiler everything runs all the same, in PyTorch.
OPERATORS := sitfast/_operators.json

.PHONY: demo test lint clean
.NOTPARALLEL:

demo: $(VENV)/.demo $(OPERATORS)
	$(BIN)/python -m sitfast.train --config configs/digits.yaml output_dir=$(RUN)
	$(BIN)/python -m sitfast.evaluate --ckpt $(RUN)

test: $(VENV)/.test $(OPERATORS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# One stamp an extra, so that each is installed once and again when the requirements change.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

$(OPERATORS): $(wildcard csrc/*) sitfast/builder.py | $(BIN)/python
	$(BIN)/python -m sitfast.build || echo "PyTorch runs instead of the compiled operators"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "sitfast needs Python 3.10 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info sitfast/_operators*
