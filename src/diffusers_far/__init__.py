"""diffusers-far: long-context autoregressive video and world models for diffusers."""

__version__ = "0.1.0.dev0"
