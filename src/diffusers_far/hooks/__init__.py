from .flex_rope import FlexRoPEConfig, apply_flex_rope, remove_flex_rope
