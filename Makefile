# `make demo` and `make test` set up .venv themselves; nothing else need be installed but Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test test-full lint bench clean

demo: $(READY)
	$(VENV)/bin/python examples/demo.py --output_dir outputs/demo

test: $(READY)
	$(VENV)/bin/python -m pytest -m "not full" -q

# The slow tier: what launches processes, serves a Hub or trains. `make test test-full` runs everything.
test-full: $(READY)
	$(VENV)/bin/python -m pytest -m full -q

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)
	$(VENV)/bin/python -m benchmarks

clean:
	rm -rf $(VENV) outputs build .pytest_cache .ruff_cache .hypothesis

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@
