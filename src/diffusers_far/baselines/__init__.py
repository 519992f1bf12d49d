from typing import TYPE_CHECKING

from ..on_demand import import_on_demand


if TYPE_CHECKING:
    from .pipeline_video_dit import VideoDiTPipeline as VideoDiTPipeline
    from .token_ar import TokenARConfig as TokenARConfig
    from .token_ar import TokenARForVideo as TokenARForVideo


__getattr__, __dir__, __all__ = import_on_demand(
    __name__,
    {
        "pipeline_video_dit": ("VideoDiTPipeline",),
        "token_ar": ("TokenARConfig", "TokenARForVideo"),
    },
)
