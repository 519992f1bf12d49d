"""Loads this repo without importing diffusers_far first:

DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
"""

try:
    from diffusers_far import FARPipeline  # noqa: F401
except ImportError as error:
    raise ImportError("This model is made with diffusers-far; install it: pip install diffusers-far") from error
