"""diffusers-far: long-context autoregressive video and world models for diffusers.

Each name is imported when it is first asked for. So a script can read its arguments, and a process can prepare data,
without the seconds that torch and diffusers take.
"""

from typing import TYPE_CHECKING

from . import on_demand


if TYPE_CHECKING:
    from .baselines import TokenARConfig as TokenARConfig
    from .baselines import TokenARForVideo as TokenARForVideo
    from .baselines import VideoDiTPipeline as VideoDiTPipeline
    from .hooks import FlexRoPEConfig as FlexRoPEConfig
    from .hooks import apply_flex_rope as apply_flex_rope
    from .hooks import remove_flex_rope as remove_flex_rope
    from .loaders import convert_original_far_autoencoder as convert_original_far_autoencoder
    from .loaders import convert_original_far_transformer as convert_original_far_transformer
    from .loaders import convert_original_scd_transformer as convert_original_scd_transformer
    from .models import PRESETS as PRESETS
    from .models import ContextPlan as ContextPlan
    from .models import FARKVCache as FARKVCache
    from .models import FARTransformer3DModel as FARTransformer3DModel
    from .models import FARTransformerOutput as FARTransformerOutput
    from .models import SCDTransformer3DModel as SCDTransformer3DModel
    from .models import preset_config as preset_config
    from .pipelines import FARPipeline as FARPipeline
    from .pipelines import FARPipelineOutput as FARPipelineOutput
    from .pipelines import FARSession as FARSession
    from .pipelines import SessionPool as SessionPool


__version__ = "0.1.0.dev0"

# The same names, for when the package is used; a test compares.
__getattr__, __dir__, __all__ = on_demand.import_on_demand(
    __name__,
    {
        "baselines": ("TokenARConfig", "TokenARForVideo", "VideoDiTPipeline"),
        "hooks": ("FlexRoPEConfig", "apply_flex_rope", "remove_flex_rope"),
        "loaders": (
            "convert_original_far_autoencoder",
            "convert_original_far_transformer",
            "convert_original_scd_transformer",
        ),
        "models": (
            "PRESETS",
            "ContextPlan",
            "FARKVCache",
            "FARTransformer3DModel",
            "FARTransformerOutput",
            "SCDTransformer3DModel",
            "preset_config",
        ),
        "pipelines": ("FARPipeline", "FARPipelineOutput", "FARSession", "SessionPool"),
    },
)

# diffusers looks the classes that a saved pipeline names up in itself and imports no other library. That it finds ours
# there is what lets `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` load them, from the Hub too.
on_demand.register_in_diffusers(
    __getattr__, ("FARTransformer3DModel", "SCDTransformer3DModel", "FARPipeline", "VideoDiTPipeline")
)
