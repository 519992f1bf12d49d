from .conversion import (
    convert_original_far_autoencoder,
    convert_original_far_transformer,
    convert_original_scd_transformer,
)
from .lora import FARLoraLoaderMixin
