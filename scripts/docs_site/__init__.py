"""The documentation as a site of static HTML: pages, API entries, templates. `scripts/build_docs.py` builds it."""
