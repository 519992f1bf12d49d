import sys
from pathlib import Path


# What builds the pages lies beside its script; the modules that these tests share lie here.
sys.path[:0] = [str(Path(__file__).parents[2] / "scripts"), str(Path(__file__).parent)]
