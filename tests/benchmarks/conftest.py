import sys
from pathlib import Path


# The benchmarks are run from the root of the repository; what these tests share lies here.
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
