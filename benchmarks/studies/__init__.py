"""Studies: the claims about FAR, measured at a size that a desk can afford. `python -m benchmarks.studies --help`."""
