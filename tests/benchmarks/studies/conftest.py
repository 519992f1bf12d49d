import sys
from pathlib import Path


# The benchmarks are a package of the repository's root.
sys.path.insert(0, str(Path(__file__).parents[3]))
