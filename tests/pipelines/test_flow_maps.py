"""Pipelines of flow maps: one checkpoint for any number of steps."""

from unittest.mock import patch

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import tiny_pipeline, tiny_separable, tiny_transformer

from diffusers_far import FARPipeline
from diffusers_far.pipelines.rollout import Rollout


both_models = pytest.mark.parametrize("make", [tiny_transformer, tiny_separable], ids=["FAR", "separable"])


def flow_map_pipeline(make=tiny_transformer, scheduler=None, **settings) -> FARPipeline:
    transformer = make(num_actions=3, action_shift=1, flow_map=True)
    return tiny_pipeline(transformer, scheduler=scheduler or FlowMapEulerDiscreteScheduler(), **settings)


def call(pipe: FARPipeline, **arguments) -> torch.Tensor:
    latents = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    defaults = {"video_latents": latents, "actions": [[0, 1, 2, 0]], "num_frames": 2, "output_type": "latent"}
    return pipe(**{**defaults, "generator": torch.Generator().manual_seed(1), **arguments}).frames


@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_a_flow_map_of_a_known_field_is_exact_in_any_number_of_steps(num_steps):
    rate, noise = 1.7, torch.randn(1, 1, 4, 4, 4)

    def mean_velocity(self, noisy, timestep, modulation, told):
        """Of `dx/dt = rate * x`, whose paths are exponentials."""
        span = (timestep - told["r_timestep"]) / 1000
        return (noisy.latents * (1 - torch.exp(-rate * span)) / span).float()

    with patch.object(Rollout, "_velocity", mean_velocity):
        options = {"num_frames": 1, "actions": [[0, 1]], "latents": noise, "use_cache": False}
        made = call(flow_map_pipeline(), num_inference_steps=num_steps, **options)
    torch.testing.assert_close(made[:, :1], noise * torch.exp(torch.tensor(-rate)), atol=1e-5, rtol=1e-4)


def ends_of_steps(pipe: FARPipeline, **arguments) -> list[float | None]:
    ends, velocity = [], Rollout._velocity

    def spy(self, noisy, timestep, modulation, told):
        ends.append(float(told["r_timestep"]) if told else None)
        return velocity(self, noisy, timestep, modulation, told)

    with patch.object(Rollout, "_velocity", spy):
        call(pipe, **{"num_inference_steps": 4, "use_cache": False, **arguments})
    return ends


def test_each_step_is_told_where_it_ends_by_a_scheduler_that_goes_there_at_once():
    assert ends_of_steps(flow_map_pipeline()) == [750, 500, 250, 0] * 2
    shifted = ends_of_steps(flow_map_pipeline(scheduler=FlowMapEulerDiscreteScheduler(shift=3.0)))
    assert shifted == pytest.approx([900, 750, 500, 0] * 2)
    assert ends_of_steps(flow_map_pipeline(), num_inference_steps=None, sigmas=[0.8, 0.2]) == pytest.approx(
        [200, 0] * 2
    )
    assert ends_of_steps(flow_map_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())) == [None] * 8
    flow = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1), scheduler=FlowMapEulerDiscreteScheduler())
    assert ends_of_steps(flow) == [None] * 8


@both_models
@pytest.mark.parametrize("num_steps", [1, 4])
def test_cached_and_uncached_frames_of_a_flow_map_are_the_same(make, num_steps):
    pipe = flow_map_pipeline(make)
    cached, uncached = (call(pipe, num_inference_steps=num_steps, use_cache=use) for use in (True, False))
    torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cached, call(pipe, num_inference_steps=num_steps + 1), atol=1e-3)


@both_models
def test_a_session_makes_the_frames_of_a_call(make):
    pipe = flow_map_pipeline(make, num_inference_steps=2)
    latents = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    session = pipe.start_session(
        video_latents=latents, actions=[[0]], generator=torch.Generator().manual_seed(1), output_type="latent"
    )
    frames = torch.stack([session.step(action) for action in ([1], [2])], dim=1)
    assert torch.equal(frames, call(pipe))


def test_steps_and_guidance_are_stored_with_a_flow_map(tmp_path):
    pipe = flow_map_pipeline(num_inference_steps=2, guidance_scale=1.0)
    pipe.save_pretrained(tmp_path)
    loaded = FARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is FlowMapEulerDiscreteScheduler and loaded.transformer.config.flow_map
    assert (loaded.default_inference_steps, loaded.default_guidance_scale) == (2, 1.0)
    assert torch.equal(call(loaded), call(pipe))
