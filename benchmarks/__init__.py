"""Speed and memory of FAR beside the arithmetic limit and a naive implementation: `python -m benchmarks [case ...]`."""
