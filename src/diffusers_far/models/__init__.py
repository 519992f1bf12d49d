from typing import TYPE_CHECKING

from ..on_demand import import_on_demand


if TYPE_CHECKING:
    from .context_plan import ContextPlan as ContextPlan
    from .frame_transformer import FARTransformerOutput as FARTransformerOutput
    from .kv_cache import CacheOptions as CacheOptions
    from .kv_cache import FARKVCache as FARKVCache
    from .presets import PRESETS as PRESETS
    from .presets import preset_config as preset_config
    from .transformer_far import FARTransformer3DModel as FARTransformer3DModel
    from .transformer_scd import SCDTransformer3DModel as SCDTransformer3DModel


__getattr__, __dir__, __all__ = import_on_demand(
    __name__,
    {
        "context_plan": ("ContextPlan",),
        "frame_transformer": ("FARTransformerOutput",),
        "kv_cache": ("CacheOptions", "FARKVCache"),
        "presets": ("PRESETS", "preset_config"),
        "transformer_far": ("FARTransformer3DModel",),
        "transformer_scd": ("SCDTransformer3DModel",),
    },
)
