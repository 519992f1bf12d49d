"""diffusers-far: long-context autoregressive video and world models for diffusers."""

import diffusers

from .hooks import FlexRoPEConfig, apply_flex_rope, remove_flex_rope
from .loaders import convert_original_far_autoencoder, convert_original_far_transformer
from .models import (
    PRESETS,
    ContextPlan,
    FARKVCache,
    FARTransformer3DModel,
    FARTransformerOutput,
    TokenARConfig,
    TokenARForVideo,
    preset_config,
)
from .pipelines import FARPipeline, FARPipelineOutput, FARSession, VideoDiTPipeline


__version__ = "0.1.0.dev0"

# diffusers looks the classes that a saved pipeline names up in itself and imports no other library, so this is what
# lets `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` find ours, on the Hub too.
for _class in (FARTransformer3DModel, FARPipeline, VideoDiTPipeline):
    setattr(diffusers, _class.__name__, _class)
