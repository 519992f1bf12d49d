from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tiny_models import random_clip, spy_attention, tensors_of, tiny_transformer

from diffusers_far.models.frames import FrameBatch
from diffusers_far.pipelines.rollout import Rollout
from diffusers_far.pipelines.settings import GenerationSettings


cached_and_not = pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])


def frames_of(clip, first_frame: int, end_frame: int) -> FrameBatch:
    part = clip.frames(first_frame, end_frame)
    return FrameBatch(part.latents, part.actions)


def start(model, scheduler=None, batch_size=2, class_labels=None, max_frames=9, **config) -> Rollout:
    return Rollout(
        model,
        scheduler or FlowMatchEulerDiscreteScheduler(),
        latent_shape=(batch_size, 4, 4, 6),
        max_frames=max_frames,
        device=torch.device("cpu"),
        class_labels=class_labels,
        config=GenerationSettings(**{"num_inference_steps": 2, **config}),
    )


@pytest.fixture
def model():
    return tiny_transformer(long_patch_size=2, num_actions=3)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


pytestmark = pytest.mark.usefixtures("no_grad")


@cached_and_not
def test_denoising_leaves_the_context_as_it_is_until_the_frame_is_written(model, use_cache):
    clip, rollout = random_clip(model, 5), start(model, use_cache=use_cache)
    rollout.write(frames_of(clip, 0, 4))
    noise = frames_of(clip, 4, 5)
    first = rollout.denoise(noise)
    assert torch.equal(rollout.denoise(noise), first)
    rollout.write(replace(noise, latents=first))
    assert not torch.allclose(rollout.denoise(noise), first, atol=1e-3)


@cached_and_not
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_frames_written_one_by_one_are_frames_written_at_once(model, use_cache, guidance_scale):
    clip = random_clip(model, 7)
    frames = []
    for chunks in ([6], [1] * 6, [2, 3, 1]):
        rollout, first_frame = start(model, use_cache=use_cache, guidance_scale=guidance_scale), 0
        for size in chunks:
            rollout.write(frames_of(clip, first_frame, first_frame + size))
            first_frame += size
        frames.append(rollout.denoise(frames_of(clip, 6, 7)))
    for other in frames[1:]:
        torch.testing.assert_close(other, frames[0], atol=1e-5, rtol=1e-5)


@cached_and_not
def test_a_cache_changes_the_speed_alone(model, use_cache):
    clip = random_clip(model, 7)
    rollout, other = start(model, use_cache=use_cache), start(model, use_cache=not use_cache)
    for each in (rollout, other):
        each.write(frames_of(clip, 0, 6))
    noise = frames_of(clip, 6, 7)
    torch.testing.assert_close(rollout.denoise(noise), other.denoise(noise), atol=1e-5, rtol=1e-5)


@cached_and_not
def test_the_null_half_of_guidance_has_null_actions_and_classes_in_context_and_frame(use_cache):
    model = tiny_transformer(num_actions=3, num_classes=2)
    clip, fed, labels = random_clip(model, 4), [], []
    rollout = start(model, class_labels=clip.class_labels, use_cache=use_cache, guidance_scale=3.0)
    model.action_embedder.register_forward_pre_hook(lambda module, args: fed.append(args))
    model.label_embedder.register_forward_pre_hook(lambda module, args: labels.append(args[0]))
    rollout.write(frames_of(clip, 0, 3))
    rollout.denoise(frames_of(clip, 3, 4))
    assert fed and len(fed) == len(labels)
    for (actions, action_mask), class_labels in zip(fed, labels):
        assert len(actions) == 4 and not action_mask[:2].any() and action_mask[2:].all()
        assert class_labels.tolist() == [2, 2, *clip.class_labels.tolist()]


def test_guidance_is_null_plus_scale_times_condition_less_null():
    model = tiny_transformer(num_classes=2)
    clip = random_clip(model, 3)
    noise = frames_of(clip, 2, 3)
    null_labels = torch.full_like(clip.class_labels, 2)

    def one_step(class_labels, guidance_scale=1.0):
        rollout = start(
            model, class_labels=class_labels, guidance_scale=guidance_scale, num_inference_steps=1, use_cache=False
        )
        rollout.write(frames_of(clip, 0, 2))
        return rollout.denoise(noise)  # linear in the velocity

    condition, null = one_step(clip.class_labels), one_step(null_labels)
    guided = one_step(clip.class_labels, guidance_scale=3.0)
    torch.testing.assert_close(guided, null + 3 * (condition - null), atol=1e-4, rtol=1e-4)
    assert (guided - condition).abs().max() > 0.1


def test_rollouts_share_a_scheduler_and_leave_it_as_it_is(model):
    scheduler, clip = FlowMatchHeunDiscreteScheduler(), random_clip(model, 3)
    timesteps = scheduler.timesteps.clone()
    rollouts = [start(model, scheduler, num_inference_steps=steps) for steps in (2, 4)]
    alone = [start(model, scheduler, num_inference_steps=steps).denoise(frames_of(clip, 0, 1)) for steps in (2, 4)]
    interleaved = rollouts[0].denoise(
        frames_of(clip, 0, 1),
        on_step_end=lambda step, timestep, latents: (rollouts[1].denoise(frames_of(clip, 0, 1)), latents)[1],
    )
    assert torch.equal(interleaved, alone[0])
    assert torch.equal(rollouts[1].denoise(frames_of(clip, 0, 1)), alone[1])
    assert torch.equal(scheduler.timesteps, timesteps) and scheduler.step_index is None


@pytest.mark.parametrize(
    "scheduler, num_steps", [(FlowMatchEulerDiscreteScheduler(), 3), (FlowMatchHeunDiscreteScheduler(), 5)]
)
def test_each_step_of_the_scheduler_is_counted_and_called_back(model, scheduler, num_steps):
    rollout, seen = start(model, scheduler, num_inference_steps=3), []
    rollout.denoise(
        frames_of(random_clip(model, 1), 0, 1),
        on_step_end=lambda step, timestep, latents: seen.append(step) or latents,
    )
    assert rollout.num_steps == num_steps and seen == list(range(num_steps))


def test_latents_are_single_precision_whatever_the_model_computes_in(model):
    clip, rollout = random_clip(model, 3), start(model.bfloat16())
    assert rollout.kv_cache.dtype == torch.bfloat16
    rollout.write(frames_of(clip, 0, 2))
    dtypes = []
    frame = rollout.denoise(
        frames_of(clip, 2, 3), on_step_end=lambda step, timestep, latents: dtypes.append(latents.dtype) or latents
    )
    assert {frame.dtype, *dtypes} == {torch.float32}


@cached_and_not
def test_the_arguments_are_unchanged(model, use_cache):
    clip, rollout = random_clip(model, 6), start(model, use_cache=use_cache, guidance_scale=2.0)
    context, noise = frames_of(clip, 0, 5), frames_of(clip, 5, 6)
    before = tensors_of(context.latents, context.actions, noise.latents, noise.actions)
    rollout.write(context)
    frame = rollout.denoise(noise)
    rollout.write(replace(noise, latents=frame))
    rollout.denoise(noise)
    after = tensors_of(context.latents, context.actions, noise.latents, noise.actions)
    assert all(torch.equal(value, value_before) for value, value_before in zip(after, before))


def test_denoising_against_a_cache_runs_the_new_frame_alone(model):
    clip, rollout = random_clip(model, 8), start(model)
    rollout.write(frames_of(clip, 0, 7))
    with spy_attention() as calls:
        rollout.denoise(frames_of(clip, 7, 8))
    assert len(calls) == 2 * 2  # 2 steps, 2 layers
    assert {query.shape[1] for query, *_ in calls} == {24}
