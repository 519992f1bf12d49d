"""Walks through a world that a FAR model makes up, for several visitors at once; no user interface in here but `ui.py`."""

from ...on_demand import import_on_demand


__getattr__, __dir__, __all__ = import_on_demand(
    __name__,
    {
        "settings": ("Settings", "WorldError", "WorldLimits", "checked_hosts"),
        "starts": ("RecordedWalks", "Start", "uploaded_start"),
        "visitors": ("Visitor", "VisitorStore"),
        "world": ("World", "WorldModel"),
    },
)
