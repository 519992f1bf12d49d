from typing import TYPE_CHECKING

from ..on_demand import import_on_demand


if TYPE_CHECKING:
    from .cache_options import CacheOptions as CacheOptions
    from .context_plan import ContextPlan as ContextPlan
    from .kv_cache import FARKVCache as FARKVCache
    from .presets import PRESETS as PRESETS
    from .presets import preset_config as preset_config
    from .token_ar import TokenARConfig as TokenARConfig
    from .token_ar import TokenARForVideo as TokenARForVideo
    from .transformer_far import FARTransformer3DModel as FARTransformer3DModel
    from .transformer_far import FARTransformerOutput as FARTransformerOutput


__getattr__, __dir__, __all__ = import_on_demand(
    __name__,
    {
        "cache_options": ("CacheOptions",),
        "context_plan": ("ContextPlan",),
        "kv_cache": ("FARKVCache",),
        "presets": ("PRESETS", "preset_config"),
        "token_ar": ("TokenARConfig", "TokenARForVideo"),
        "transformer_far": ("FARTransformer3DModel", "FARTransformerOutput"),
    },
)
