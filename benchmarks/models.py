"""The models that are measured, and clips for them; random, from one seed.

B batch, F frames, C latent channels, H/W latent height/width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler

from diffusers_far import FARPipeline, FARSession, FARTransformer3DModel, SCDTransformer3DModel, preset_config
from diffusers_far.models.transformer_far import FrameTransformer


SEED = 0
CONDITIONS = {"num_actions": 4, "action_shift": 1}


@dataclass(frozen=True)
class Clip:
    """Frames with actions.

    Args:
        latents (`torch.Tensor` of shape `(1, F, C, H, W)`).
        noise (`torch.Tensor` of shape `(1, F, C, H, W)`).
        actions (`torch.Tensor` of shape `(1, F)`): Taken at each frame.
        fed_actions (`torch.Tensor` of shape `(1, F)`): As a model with `action_shift=1` is fed them: those that led to each
            frame, and to the first one the null action.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    actions: torch.Tensor
    fed_actions: torch.Tensor


@dataclass(frozen=True)
class BenchmarkModel:
    """A size of FAR, or of a separable model.

    Args:
        name (`str`): In tables.
        config (`dict`): Arguments of the transformer; with discrete actions and `action_shift=1`.
        latent_size (`int`): Height and width of the latents.
        transformer_class (`type`).
    """

    name: str
    config: dict[str, Any] = field(hash=False)
    latent_size: int = 8
    transformer_class: type[FrameTransformer] = FARTransformer3DModel

    def build(self) -> FrameTransformer:
        """A transformer with random weights. As it initialises itself, its output would be zero. A flow map still is the flow
        model that it starts as."""
        torch.manual_seed(SEED)
        transformer = self.transformer_class(**self.config).eval()
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        network = transformer.denoising_network
        if transformer.config.flow_map:
            network.r_timestep_embedder.load_state_dict(network.timestep_embedder.state_dict())
        return transformer

    def clip(self, num_frames: int) -> Clip:
        generator = torch.Generator().manual_seed(SEED)
        num_actions = self.config["num_actions"]
        shape = (1, num_frames, self.config.get("in_channels", 32), self.latent_size, self.latent_size)
        actions = torch.randint(0, num_actions, (1, num_frames), generator=generator)
        return Clip(
            latents=torch.randn(shape, generator=generator),
            noise=torch.randn(shape, generator=generator),
            actions=actions,
            fed_actions=torch.cat([torch.tensor([[num_actions]]), actions[:, :-1]], dim=1),
        )


FAR_B = BenchmarkModel("far-b", preset_config("far-b", **CONDITIONS))
FAR_B_LONG = BenchmarkModel("far-b-long", preset_config("far-b-long", **CONDITIONS))
FLOW_MAPS = (
    BenchmarkModel("far-b", preset_config("far-b", flow_map=True, **CONDITIONS)),
    BenchmarkModel("far-b-long", preset_config("far-b-long", flow_map=True, **CONDITIONS)),
    BenchmarkModel("scd-b", {"flow_map": True, **CONDITIONS}, transformer_class=SCDTransformer3DModel),
)
# Small enough for whole rollouts: 16 tokens a short frame, 1 a long one.
SMALL_CONFIG = {"num_layers": 4, "num_attention_heads": 4, "in_channels": 8, **CONDITIONS}
SMALL = BenchmarkModel("small", SMALL_CONFIG, latent_size=4)
SMALL_LONG = BenchmarkModel("small-long", {**SMALL_CONFIG, "long_patch_size": 4}, latent_size=4)


def latent_pipeline(transformer: FrameTransformer) -> FARPipeline:
    """A quiet pipeline that makes latents, where the transformer lies; its VAE only completes it."""
    vae = AutoencoderTiny(
        latent_channels=transformer.config.in_channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipe = FARPipeline(transformer, vae.eval().to(transformer.device), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start_session(pipe: FARPipeline, clip: Clip, **settings) -> FARSession:
    """A session in which all frames of a clip but the last are made, and all but the last two are written. Its frames are
    latents and take one step, unless the settings say otherwise."""
    settings = {"num_inference_steps": 1, "output_type": "latent", **settings}
    session = pipe.start_session(video_latents=clip.latents[:, :-2], actions=clip.actions[:, :-3], **settings)
    session.advance(clip.actions[:, -3], on_frame_end=lambda made: clip.latents[:, -2:-1])
    return session


def frame_without_cache(pipe: FARPipeline, clip: Clip, num_steps: int) -> torch.Tensor:
    """The last frame of a clip, `(1, C, H, W)`, with the whole context computed anew at every step."""
    made = pipe(
        video_latents=clip.latents[:, :-1],
        actions=clip.actions,
        latents=clip.noise[:, -1:],
        num_frames=1,
        num_inference_steps=num_steps,
        use_cache=False,
        output_type="latent",
    )
    return made.frames[:, 0]
