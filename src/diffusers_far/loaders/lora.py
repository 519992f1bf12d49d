from diffusers.loaders.lora_base import LoraBaseMixin


class FARLoraLoaderMixin(LoraBaseMixin):
    pass
