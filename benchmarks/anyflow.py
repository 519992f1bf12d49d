"""diffusers' own frame-autoregressive transformer, `AnyFlowFARTransformer3DModel`, at FAR's sizes."""

import warnings

import torch
from diffusers import AnyFlowFARTransformer3DModel

from diffusers_far import ContextPlan, FARTransformer3DModel

from .models import SEED, Clip


DIFFERENCES = (
    "Equal are layers, width, heads, MLP, tokens per frame, short window and the number of cached tokens.",
    "It attends to a text as well: here of one token, so that two products of all tokens per layer are added.",
    "Its modulation is one product for all layers, where FAR has two in each.",
    "It norms queries and keys over all heads at once, and its rotary axes have 24, 20 and 20 channels.",
    "It has no actions, and two timesteps.",
    "Its attention is flex attention, here not compiled; it pads the noisy frame's tokens to a multiple of 128.",
    "Its cache holds random numbers: it would take too much memory to fill it by the model on a CPU.",
    "So it is another network, and its output is compared with nothing.",
)


TEXT_CHANNELS = 16
MAX_FRAMES = 1024  # its rotary table is built once, for so many


class AnyFlowStep:
    """A denoising step of the last frame of a clip, the others being cached; `DIFFERENCES` says what is not equal.

    Args:
        transformer (`FARTransformer3DModel`): Whose sizes it is built in.
        clip (`Clip`).
    """

    def __init__(self, transformer: FARTransformer3DModel, clip: Clip):
        config, (self.num_frames, size) = transformer.config, (clip.latents.shape[1], clip.latents.shape[-1])
        plan = transformer.context_plan(self.num_frames, size, size)
        torch.manual_seed(SEED)
        self.transformer = AnyFlowFARTransformer3DModel(
            patch_size=(1, config.patch_size, config.patch_size),
            compressed_patch_size=(1, *(config.long_patch_size or config.patch_size,) * 2),
            full_chunk_limit=plan.num_short_frames,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            text_dim=TEXT_CHANNELS,
            ffn_dim=int(config.mlp_ratio * transformer.inner_dim),
            num_layers=config.num_layers,
            cross_attn_norm=False,
            rope_max_seq_len=MAX_FRAMES,
        ).eval()
        self.kv_cache = [self._random_cache(plan) for _ in range(config.num_layers)]
        self.text = torch.randn(1, 1, TEXT_CHANNELS)
        self.noisy = clip.noise[:, -1:]
        with warnings.catch_warnings():  # torch says once that flex attention should be compiled
            warnings.simplefilter("ignore")
            self()

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """A velocity, `(1, 1, C, H, W)`."""
        timestep = torch.full((1, 1), 500)
        return self.transformer(
            self.noisy,
            timestep,
            r_timestep=timestep,
            encoder_hidden_states=self.text,
            chunk_partition=[1] * self.num_frames,
            kv_cache=self.kv_cache,
            kv_cache_flag={"num_cached_chunks": self.num_frames - 1, "is_cache_step": False},
            return_dict=False,
        )[0]

    def _random_cache(self, plan: ContextPlan) -> dict[str, torch.Tensor]:
        """Keys and values of a layer, as diffusers' pipeline lays them out."""
        config = self.transformer.config
        num_full_tokens = plan.num_short_tokens - plan.tokens_per_short_frame
        sizes = {"full_cache": num_full_tokens, "compressed_cache": plan.num_long_tokens}
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        return {name: torch.randn(2, 1, heads, num_tokens, head_dim) for name, num_tokens in sizes.items()}
