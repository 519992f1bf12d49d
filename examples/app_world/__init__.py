"""Walks through a world that a FAR model makes up, for several visitors at once; no user interface in here but `ui.py`."""

from .settings import Settings, WorldError, WorldLimits
from .starts import RecordedWalks, Start, uploaded_start
from .visitors import Visitor, VisitorStore
from .world import World, WorldModel
