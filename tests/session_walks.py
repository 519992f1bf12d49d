"""Sessions of tiny models, with contexts and actions for them; shared by the tests of sessions.

B batch, F frames; h/w pixels.
"""

import torch
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far import FARPipeline, FARSession


NUM_CONTEXT, NUM_NEW = 3, 6
MODELS = [{}, {"long_patch_size": None}, {"num_actions": None, "action_dim": 2}]
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "latent"}


def pipeline(scheduler=None, **overrides) -> FARPipeline:
    config = {"long_patch_size": 2, "num_actions": 3, "action_shift": 1, **overrides}
    return tiny_pipeline(tiny_transformer(**config), scheduler=scheduler)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (4, 5)]


def walk(pipe: FARPipeline, num_new: int = NUM_NEW) -> tuple[torch.Tensor, torch.Tensor]:
    """A context of two samples, and the actions taken at all frames but the last."""
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, NUM_CONTEXT, 3, 8, 12, generator=generator)
    shape = (2, NUM_CONTEXT + num_new - 1)
    if pipe.transformer.config.action_dim is not None:
        return video, torch.randn(*shape, pipe.transformer.config.action_dim, generator=generator)
    return video, torch.randint(0, 3, shape, generator=generator)


def start(pipe: FARPipeline, **overrides) -> FARSession:
    video, actions = walk(pipe)
    arguments = {"generator": generators(), **SETTINGS, **overrides}
    return pipe.start_session(video=video, actions=actions[:, : NUM_CONTEXT - 1], **arguments)


def go_on(session: FARSession, actions: torch.Tensor, first: int = 0, end: int = NUM_NEW) -> torch.Tensor:
    """Frames of the steps from `first` up to and without `end`, `(B, F, ...)`."""
    return torch.stack([session.step(actions[:, NUM_CONTEXT - 1 + step]) for step in range(first, end)], dim=1)


def led_along(session: FARSession, actions: torch.Tensor, frames: torch.Tensor) -> FARSession:
    """The session after as many steps as there are `frames`, with these frames in place of its own."""
    for step in range(frames.shape[1]):
        action = actions[:, NUM_CONTEXT - 1 + step]
        session.advance(action, on_frame_end=lambda latents, step=step: frames[:, step : step + 1])
    return session


def call(pipe: FARPipeline, **overrides) -> torch.Tensor:
    video, actions = walk(pipe)
    arguments = {"generator": generators(), **SETTINGS, **overrides}
    return pipe(video=video, actions=actions, num_frames=NUM_NEW, **arguments).frames
