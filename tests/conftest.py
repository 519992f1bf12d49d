import sys
from pathlib import Path

import pytest


# Tests are imported by path and are no package; their shared modules are found here.
sys.path.insert(0, str(Path(__file__).parent))

from local_hub import LocalHub  # noqa: E402


@pytest.fixture
def hub():
    """A Hub of the test's own; mark such tests `full`, since what talks to it runs in other processes."""
    with LocalHub() as local_hub:
        yield local_hub
    assert not local_hub.unknown_requests, "the Hub has these, `LocalHub` does not"
