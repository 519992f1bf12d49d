from .cache_options import CacheOptions
from .context_plan import ContextPlan
from .kv_cache import FARKVCache
from .presets import PRESETS, preset_config
from .token_ar import TokenARConfig, TokenARForVideo
from .transformer_far import FARTransformer3DModel, FARTransformerOutput
