# make demo: install, then compare the three methods on the embedded digits data, server and clients as processes.
# make test: install, then lint, types and tests, but for those that take minutes: make test-all runs these too. make docs: install, then the site, docs/_build/html/index.html.
# make proto: halfpass_pb2.py from halfpass.proto.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable
# What is imported is compiled once, and not anew in each of the processes that tests start; nothing else is compiled.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all docs proto dist dist-check lower-bounds version

demo: .venv/installed
	$(BIN)/halfpass compare --config examples/demo.yaml

test: .venv/engines
	$(BIN)/ruff check
	@# types beside the tests, which wait for each other's processes half of the time
	$(BIN)/mypy & types=$$!; $(BIN)/pytest -n 3 --dist worksteal $(TESTS); tests=$$?; wait $$types && exit $$tests

test-all:
	$(MAKE) test TESTS='-m ""'

docs: .venv/documenting
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d docs/_build/.doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

proto: .venv/installed
	cd halfpass/wire && ../../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. halfpass.proto

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[test]'
	touch $@

.venv/documenting: .venv/installed
	$(INSTALL) '.[docs]'
	touch $@

# docs/how-to/ship.md
dist: .venv/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# The wheel with all that it needs in an environment of its own, 1.2 GB; then the lowest versions that it allows.
dist-check: .venv/installed
	HALFPASS_CLEAN_INSTALL=1 $(BIN)/pytest tests/test_packaging.py

lower-bounds:
	PYTHON=$(PYTHON) release/lower_bounds.sh

version: .venv/installed
	$(BIN)/python release/version.py $(V)

# Flower and NVFlare, 400 MB, which the tests of them need, and what makes the documentation.
.venv/engines: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[docs,flower,nvflare,test]'
	$(BIN)/pip check
	touch .venv/installed .venv/documenting $@
