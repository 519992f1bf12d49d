# `make demo` and `make test` set up .venv themselves; nothing else need be installed but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# The documentation is built from source: its environment has no torch.
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
# Tests run in several processes, those of a file in one, each on a thread of its own: the models are so small that more threads
# would only wait for each other.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -q

.PHONY: demo test test-full lint bench app web docs space clean

demo: $(READY)
	$(VENV)/bin/python examples/demo.py --output_dir outputs/demo

test: $(READY)
	$(PYTEST) -m "not full"

# The slow tier: what launches processes, serves a Hub or trains. `make test test-full` runs everything.
test-full: $(READY)
	$(PYTEST) -m full

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)
	$(VENV)/bin/python -m benchmarks

# Play in the browser; nobody else on the network can.
app: $(READY)
	$(VENV)/bin/python examples/app.py

# Play in the browser with no server that computes: a static page, ready to be served or to be pushed to a static Space.
web: $(READY)
	$(VENV)/bin/python examples/export_web.py --output_dir outputs/web

# Static pages that load nothing from elsewhere: open outputs/docs/index.html.
docs: $(DOCS_READY)
	$(DOCS_VENV)/bin/python scripts/build_docs.py --output_dir outputs/docs

# All that a Hugging Face Space needs, ready to be pushed.
space:
	mkdir -p outputs
	rm -rf outputs/space
	cp -r examples/space outputs/space
	cp -r examples/crafter_walks checkpoints/far-crafter src/diffusers_far outputs/space
	find outputs/space -name __pycache__ -prune -exec rm -r {} +

clean:
	rm -rf $(VENV) $(DOCS_VENV) outputs build .pytest_cache .ruff_cache .hypothesis

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

$(DOCS_READY): docs/requirements.txt constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q -c constraints.txt -r docs/requirements.txt
	touch $@
