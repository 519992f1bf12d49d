import copy
import inspect
from unittest.mock import patch

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AmusedScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    CONDITIONS,
    base_and_long,
    model_configs,
    property_test,
    spy_attention,
    tensors_of,
    tiny_dc,
    tiny_kl,
    tiny_pipeline,
    tiny_transformer,
)

from diffusers_far import FARPipeline, FARTransformer3DModel, FlexRoPEConfig, VideoDiTPipeline
from diffusers_far.models.codec import encode_video, spatial_compression
from diffusers_far.pipelines.rollout import check_scheduler
from diffusers_far.pipelines.settings import GenerationRequest


CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LATENT_SIZE = (4, 6)
SIZE = (8, 12)  # in pixels, with the VAE that `tiny_pipeline` has by default


def kind_of(condition: dict) -> str:
    return "-".join(condition) or "unconditional"


def random_video(
    num_frames: int = 4, batch_size: int = 2, height: int = SIZE[0], width: int = SIZE[1]
) -> torch.Tensor:
    return torch.rand(batch_size, num_frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def random_latents(num_frames: int, batch_size: int = 2, size: tuple[int, int] = LATENT_SIZE, seed: int = 0):
    return torch.randn(batch_size, num_frames, 4, *size, generator=torch.Generator().manual_seed(seed))


def conditions_of(model: FARTransformer3DModel, num_frames: int, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """The arguments of a call for the conditions that the model takes."""
    generator = torch.Generator().manual_seed(1)
    conditions = {}
    if model.config.num_actions:
        conditions["actions"] = torch.randint(0, 3, (batch_size, num_frames), generator=generator)
    if model.config.action_dim:
        conditions["actions"] = torch.randn(batch_size, num_frames, model.config.action_dim, generator=generator)
    if model.config.num_classes:
        conditions["class_labels"] = torch.randint(0, 2, (batch_size,), generator=generator)
    return conditions


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def latent_frames(pipe: FARPipeline, **arguments) -> torch.Tensor:
    arguments = {"num_frames": 3, "num_inference_steps": 2, "output_type": "latent", **arguments}
    return pipe(**arguments).frames


@torch.no_grad()
def rollout_by_hand(
    model, context, noise, num_inference_steps, actions=None, class_labels=None, guidance_scale=1.0
) -> torch.Tensor:
    """What a call computes, written out: every step runs the model on the whole video so far, twice with guidance, which
    may be a list, of each step's."""
    video, batch_size = context, len(noise)
    for frame in range(noise.shape[1]):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(num_inference_steps)
        latents, num_frames = noise[:, frame : frame + 1], video.shape[1] + 1
        kwargs, null_kwargs = {}, {}
        if actions is not None:
            shift = model.config.action_shift
            first_is_null = torch.arange(num_frames) > 0 if shift else torch.ones(num_frames, dtype=torch.bool)
            fed = torch.cat([actions[:, :shift], actions[:, : num_frames - shift]], dim=1)
            kwargs |= {"actions": fed, "action_mask": first_is_null.expand(batch_size, -1)}
            null_kwargs |= {"actions": fed, "action_mask": torch.zeros(batch_size, num_frames, dtype=torch.bool)}
        if class_labels is not None:
            kwargs |= {"class_labels": class_labels}
            null_kwargs |= {"class_labels": torch.full_like(class_labels, model.config.num_classes)}
        for step, timestep in enumerate(scheduler.timesteps):
            scale = guidance_scale
            if isinstance(guidance_scale, list):
                scale = guidance_scale[frame * num_inference_steps + step]
            inputs = torch.cat([video, latents], dim=1)
            timesteps = torch.full((batch_size, num_frames), -1.0)
            timesteps[:, -1] = timestep
            velocity = model(inputs, timesteps, **kwargs).sample[:, -1:]
            if scale > 1:
                null_velocity = model(inputs, timesteps, **null_kwargs).sample[:, -1:]
                velocity = null_velocity + scale * (velocity - null_velocity)
            latents = scheduler.step(velocity, timestep, latents).prev_sample
        video = torch.cat([video, latents], dim=1)
    return video[:, context.shape[1] :]


# What a call computes


@property_test
@given(
    config=model_configs(),
    action_shift=st.integers(0, 1),
    num_context_frames=st.integers(0, 5),
    guidance_scale=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 2**16),
)
def test_a_call_is_the_rollout_written_out_by_hand(config, action_shift, num_context_frames, guidance_scale, seed):
    model = tiny_transformer(seed, action_shift=action_shift, **config)
    if not (model.takes_actions or model.takes_labels):
        guidance_scale = 1.0
    unit = model.config.long_patch_size or model.config.patch_size
    context = random_latents(num_context_frames, size=(unit, 2 * unit), seed=seed)
    noise = random_latents(3, size=(unit, 2 * unit), seed=seed + 1)
    conditions = conditions_of(model, num_context_frames + 3)
    expected = rollout_by_hand(model, context, noise, 2, guidance_scale=guidance_scale, **conditions)
    for use_cache in (True, False):
        frames = latent_frames(
            tiny_pipeline(model),
            video_latents=context if num_context_frames else None,
            latents=noise,
            guidance_scale=guidance_scale,
            use_cache=use_cache,
            **conditions,
        )
        torch.testing.assert_close(frames, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale, is_guided", [(0.0, False), (0.5, False), (1.0, False), (1.5, True)])
def test_only_guidance_above_1_runs_the_null_condition_in_the_same_batch(guidance_scale, is_guided):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    with spy_attention() as calls:
        latent_frames(
            pipe, video_latents=random_latents(2), actions=torch.zeros(2, 5).long(), guidance_scale=guidance_scale
        )
    assert {len(query) for query, *_ in calls} == {4 if is_guided else 2}
    assert pipe.guidance_scale == guidance_scale


def test_with_an_action_shift_the_last_action_may_be_left_out():
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1))
    context, noise, actions = random_latents(2), random_latents(3, seed=1), torch.tensor([[0, 1, 2, 1, 0]] * 2)
    expected = latent_frames(pipe, video_latents=context, latents=noise, actions=actions)
    assert torch.equal(latent_frames(pipe, video_latents=context, latents=noise, actions=actions[:, :4]), expected)


@pytest.mark.parametrize("action_shift", [0, 1])
def test_an_action_changes_the_frames_it_leads_to_and_none_before(action_shift):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=action_shift))
    context, noise, actions = random_latents(2), random_latents(4, seed=1), torch.zeros(2, 6).long()
    frames = latent_frames(pipe, video_latents=context, latents=noise, actions=actions, num_frames=4)
    actions[:, 3] = 1  # taken at the second new frame
    changed = latent_frames(pipe, video_latents=context, latents=noise, actions=actions, num_frames=4)
    first_changed = 1 + action_shift
    assert torch.equal(changed[:, :first_changed], frames[:, :first_changed])
    for frame in range(first_changed, 4):
        assert (changed[:, frame] - frames[:, frame]).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["list", "array", "one row", "int32"])
def test_actions_of_every_form_are_the_tensor(form):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    context, noise, actions = random_latents(2), random_latents(3, seed=1), torch.tensor([[0, 1, 2, 1, 0]] * 2)
    forms = {"list": actions.tolist(), "array": actions.numpy(), "one row": actions[0], "int32": actions.int()}
    expected = latent_frames(pipe, video_latents=context, latents=noise, actions=actions)
    assert torch.equal(latent_frames(pipe, video_latents=context, latents=noise, actions=forms[form]), expected)


def test_one_label_serves_the_batch_and_the_null_class_is_a_label():
    pipe = tiny_pipeline(tiny_transformer(num_classes=2))
    noise = random_latents(3)
    expected = latent_frames(pipe, latents=noise, class_labels=torch.tensor([1, 1]))
    assert torch.equal(latent_frames(pipe, latents=noise, class_labels=1), expected)
    assert torch.equal(latent_frames(pipe, latents=noise, class_labels=[1, 1]), expected)
    assert not torch.equal(latent_frames(pipe, latents=noise, class_labels=2), expected)


# Batches and generators


@pytest.mark.parametrize("condition", CONDITIONS, ids=kind_of)
@base_and_long
def test_a_batch_is_its_members(condition, long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, **condition)
    pipe, context, conditions = tiny_pipeline(model), random_latents(2), conditions_of(model, 5)
    guidance_scale = 2.0 if condition else 1.0
    batch = latent_frames(
        pipe, video_latents=context, generator=seeds(5, 6), guidance_scale=guidance_scale, **conditions
    )
    for index, seed in enumerate((5, 6)):
        alone = latent_frames(
            pipe,
            video_latents=context[index : index + 1],
            generator=seeds(seed),
            guidance_scale=guidance_scale,
            **{name: value[index : index + 1] for name, value in conditions.items()},
        )
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_same_generator_seed_gives_the_same_video():
    pipe, context = tiny_pipeline(), random_latents(2)
    first, again, other = (latent_frames(pipe, video_latents=context, generator=seeds(seed)[0]) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_a_shorter_video_is_the_start_of_a_longer_one():
    pipe, context = tiny_pipeline(tiny_transformer(long_patch_size=2)), random_latents(2)
    short, long = (
        latent_frames(pipe, video_latents=context, generator=seeds(5, 6), num_frames=num_frames)
        for num_frames in (2, 4)
    )
    torch.testing.assert_close(long[:, :2], short, atol=1e-6, rtol=1e-6)


def test_given_noise_is_the_noise_that_a_generator_draws_frame_after_frame():
    pipe = tiny_pipeline()
    generators = seeds(5, 6)
    noise = torch.cat(
        [
            torch.cat([torch.randn(1, 1, 4, *LATENT_SIZE, generator=generator) for _ in range(3)], dim=1)
            for generator in generators
        ]
    )
    expected = latent_frames(pipe, height=SIZE[0], width=SIZE[1], actions=None, latents=noise)
    context = random_latents(1)
    assert torch.equal(
        latent_frames(pipe, video_latents=context, generator=seeds(5, 6)),
        latent_frames(pipe, video_latents=context, latents=noise),
    )
    assert expected.shape == (2, 3, 4, *LATENT_SIZE)


@pytest.mark.parametrize("condition", CONDITIONS, ids=kind_of)
def test_continuations_of_a_context_follow_each_other(condition):
    model = tiny_transformer(**condition)
    pipe, context, conditions = tiny_pipeline(model), random_latents(2), conditions_of(model, 5)
    frames = latent_frames(
        pipe, video_latents=context, num_videos_per_context=2, generator=seeds(1, 2, 3, 4), **conditions
    )
    repeated = latent_frames(
        pipe,
        video_latents=context.repeat_interleave(2, dim=0),
        generator=seeds(1, 2, 3, 4),
        **{name: value.repeat_interleave(2, dim=0) for name, value in conditions.items()},
    )
    assert frames.shape == (4, 3, 4, *LATENT_SIZE)
    assert torch.equal(frames, repeated)


def test_a_video_from_nothing_takes_its_batch_from_noise_labels_or_actions():
    size = {"height": SIZE[0], "width": SIZE[1]}
    assert len(latent_frames(tiny_pipeline(), **size)) == 1
    assert len(latent_frames(tiny_pipeline(), latents=random_latents(3, batch_size=3))) == 3
    assert len(latent_frames(tiny_pipeline(), latents=random_latents(3, batch_size=4), num_videos_per_context=2)) == 4
    assert len(latent_frames(tiny_pipeline(tiny_transformer(num_classes=2)), class_labels=[0, 1, 1], **size)) == 3
    with_actions = tiny_pipeline(tiny_transformer(num_actions=3))
    assert len(latent_frames(with_actions, actions=[[0, 1, 2], [2, 1, 0]], **size)) == 2
    assert len(latent_frames(with_actions, actions=[0, 1, 2], **size)) == 1


# Streams


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_stream_is_bit_equal_to_the_call(output_type, use_cache):
    pipe = tiny_pipeline(tiny_transformer(long_patch_size=2, num_actions=3))
    arguments = {
        "video": random_video(),
        "actions": conditions_of(pipe.transformer, 7)["actions"],
        "num_frames": 3,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "output_type": output_type,
        "use_cache": use_cache,
    }
    videos = pipe(**arguments, generator=seeds(1, 2)).frames
    stream = list(pipe.stream(**arguments, generator=seeds(1, 2)))
    assert len(stream) == 3
    for index, frame in enumerate(stream):
        assert len(frame) == 2
        for sample in range(2):
            assert np.array_equal(np.asarray(frame[sample]), np.asarray(videos[sample][index]))


def test_streams_of_one_pipeline_do_not_disturb_each_other():
    pipe = tiny_pipeline(scheduler=FlowMatchHeunDiscreteScheduler())
    calls = [
        {"video_latents": random_latents(2, seed=seed), "num_inference_steps": steps}
        for seed, steps in ((1, 2), (2, 3))
    ]
    expected = [latent_frames(pipe, generator=seeds(1)[0], **call) for call in calls]
    streams = [pipe.stream(num_frames=3, output_type="latent", generator=seeds(1)[0], **call) for call in calls]
    for index, frames in enumerate(zip(*streams)):
        for frame, videos in zip(frames, expected):
            assert torch.equal(frame, videos[:, index])


def test_a_stream_yields_a_frame_before_it_makes_the_next():
    pipe = tiny_pipeline()
    stream = pipe.stream(height=SIZE[0], width=SIZE[1], num_frames=1000, num_inference_steps=1)
    with spy_attention() as calls:
        next(stream)
    assert len(calls) == 2  # one step through 2 layers
    stream.close()


def test_a_stream_checks_its_inputs_before_the_first_frame_is_asked_for():
    with pytest.raises(ValueError, match="`num_frames` is 0"):
        tiny_pipeline().stream(height=8, width=12, num_frames=0)


# Nothing of the caller's changes


def test_the_arguments_are_unchanged_after_a_call():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, num_classes=2, long_patch_size=2), scheduler=scheduler)
    video = random_video()
    arguments = {
        "actions": conditions_of(pipe.transformer, 7)["actions"],
        "class_labels": torch.tensor([0, 1]),
        "latents": random_latents(3, batch_size=4),
        "attention_kwargs": {"scale": 1.0},
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    before = tensors_of(video, arguments)
    scheduler_before = copy.deepcopy(vars(scheduler))
    latents = encode_video(pipe.vae, video.flatten(0, 1)).unflatten(0, (2, 4))
    for context in ({"video": video}, {"video_latents": latents}):
        pipe(**context, **arguments, num_frames=3, num_inference_steps=2, guidance_scale=2.0, num_videos_per_context=2)
    for value, value_before in zip(tensors_of(video, arguments), before):
        assert torch.equal(value, value_before)
    assert arguments["attention_kwargs"] == {"scale": 1.0}
    assert arguments["callback_on_step_end_tensor_inputs"] == ["latents"]
    assert pipe.scheduler is scheduler
    assert vars(scheduler).keys() == scheduler_before.keys()
    for name, value in scheduler_before.items():
        now = getattr(scheduler, name) if not name.startswith("_internal") else vars(scheduler)[name]
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value, name


def test_lists_and_images_are_unchanged_after_a_call():
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    video = [
        PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)) for seed in (0, 1)
    ]
    actions = [[0, 1, 2, 1, 0]]
    before = ([image.copy() for image in video], copy.deepcopy(actions))
    pipe(video, actions=actions, num_frames=3, num_inference_steps=1)
    assert (video, actions) == before


def test_a_result_carries_no_gradient_and_gradients_stay_enabled():
    pipe = tiny_pipeline()
    assert not latent_frames(pipe, video_latents=random_latents(2)).requires_grad
    for frame in pipe.stream(video_latents=random_latents(2), num_frames=2, num_inference_steps=1, output_type="pt"):
        assert not frame.requires_grad
        assert torch.is_grad_enabled()


# Every form of input and output


def frames_as(form: str, video: torch.Tensor):
    """A video, (B, F, 3, h, w) uint8, in another form."""
    array = video.movedim(-3, -1).numpy()
    images = [[PIL.Image.fromarray(frame) for frame in frames] for frames in array]
    return {
        "PIL images": images[0],
        "lists of PIL images": images,
        "images with alpha": [image.convert("RGBA") for image in images[0]],
        "array of bytes": array,
        "array of one video": array[0],
        "array of floats": array.astype(np.float32) / np.float32(255),
        "list of arrays": list(array[0]),
        "list of videos": list(array),
        "tensor of bytes": video,
        "tensor of floats": video / 255,
        "tensor of one video": video[0],
        "list of tensors": list(video[0]),
        "tuple of lists of tensors": tuple(list(frames) for frames in video),
        "half precision": (video / 255).half(),
    }[form]


FORMS_OF_ONE = (
    "PIL images",
    "images with alpha",
    "array of one video",
    "list of arrays",
    "tensor of one video",
    "list of tensors",
)
FORMS_OF_A_BATCH = (
    "lists of PIL images",
    "array of bytes",
    "array of floats",
    "list of videos",
    "tensor of bytes",
    "tensor of floats",
    "tuple of lists of tensors",
    "half precision",
)


@pytest.mark.parametrize("form", FORMS_OF_ONE + FORMS_OF_A_BATCH)
def test_a_video_of_every_form_is_the_same_context(form):
    pipe = tiny_pipeline()
    video = torch.randint(0, 256, (2, 3, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch_size = 1 if form in FORMS_OF_ONE else 2
    latents = encode_video(pipe.vae, video[:batch_size].flatten(0, 1)).unflatten(0, (batch_size, 3))
    expected = latent_frames(pipe, video_latents=latents, generator=seeds(*range(batch_size)))
    frames = latent_frames(pipe, video=frames_as(form, video), generator=seeds(*range(batch_size)))
    atol = 1e-2 if form == "half precision" else 1e-6
    torch.testing.assert_close(frames, expected, atol=atol, rtol=0)


def test_output_types_are_the_same_video():
    pipe = tiny_pipeline()
    outputs = {
        output_type: pipe(
            random_video(),
            num_frames=3,
            num_inference_steps=2,
            generator=seeds(1, 2),
            output_type=output_type,
        ).frames
        for output_type in ("pil", "np", "pt", "latent")
    }
    assert outputs["latent"].shape == (2, 3, 4, *LATENT_SIZE)
    assert outputs["pt"].shape == (2, 3, 3, *SIZE) and outputs["pt"].dtype == torch.float32
    assert 0 <= outputs["pt"].min() and outputs["pt"].max() <= 1 and outputs["pt"].std() > 0
    assert isinstance(outputs["np"], np.ndarray) and outputs["np"].shape == (2, 3, *SIZE, 3)
    assert np.array_equal(outputs["np"], outputs["pt"].movedim(2, -1).numpy())
    assert [len(frames) for frames in outputs["pil"]] == [3, 3]
    assert outputs["pil"][0][0].size == SIZE[::-1]
    pixels = np.stack([[np.asarray(image) for image in frames] for frames in outputs["pil"]])
    assert np.array_equal(pixels, (outputs["np"] * 255).round().astype(np.uint8))


def test_images_are_the_default_and_a_tuple_holds_the_same():
    pipe, arguments = tiny_pipeline(), {"height": 8, "width": 12, "num_frames": 2, "num_inference_steps": 1}
    output = pipe(**arguments, generator=seeds(1)[0])
    (frames,) = pipe(**arguments, generator=seeds(1)[0], return_dict=False)
    assert isinstance(output.frames[0][0], PIL.Image.Image)
    assert frames == output.frames


def test_the_size_is_the_videos_else_the_given_else_the_pipelines_own():
    pipe = tiny_pipeline(height=4, width=8)
    arguments = {"num_frames": 1, "num_inference_steps": 1, "output_type": "pt"}
    assert pipe(**arguments).frames.shape[-2:] == (4, 8)
    assert pipe(height=8, width=12, **arguments).frames.shape[-2:] == (8, 12)
    assert pipe(height=8, **arguments).frames.shape[-2:] == (8, 8)
    assert pipe(random_video(2, 1, 12, 4), **arguments).frames.shape[-2:] == (12, 4)
    assert pipe(random_video(2, 1, 12, 4), height=12, width=4, **arguments).frames.shape[-2:] == (12, 4)


# VAEs


@pytest.mark.parametrize("build", [tiny_dc, tiny_kl])
def test_it_works_with_every_vae(build):
    pipe = tiny_pipeline(vae=build())
    compression = spatial_compression(pipe.vae)
    video = random_video(2, 2, 2 * compression, 3 * compression)
    frames = pipe(video, num_frames=2, num_inference_steps=1, output_type="pt", generator=seeds(1, 2)).frames
    assert frames.shape == (2, 2, 3, 2 * compression, 3 * compression)
    latents = encode_video(pipe.vae, video.flatten(0, 1)).unflatten(0, (2, 2))
    again = pipe(
        video_latents=latents, num_frames=2, num_inference_steps=1, output_type="pt", generator=seeds(1, 2)
    ).frames
    torch.testing.assert_close(frames, again, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [tiny_dc, tiny_kl])
def test_with_slicing_the_vae_runs_one_frame_at_a_time(build):
    pipe, batch_sizes = tiny_pipeline(vae=build()), []
    compression = spatial_compression(pipe.vae)
    video = random_video(3, 2, compression, compression)
    arguments = {"num_frames": 2, "num_inference_steps": 1, "output_type": "pt"}
    expected = pipe(video, generator=seeds(1, 2), **arguments).frames
    for side in (pipe.vae.encoder, pipe.vae.decoder):
        side.register_forward_hook(lambda module, args, output: batch_sizes.append(len(args[0])))
    pipe.vae.enable_slicing()
    sliced = pipe(video, generator=seeds(1, 2), **arguments).frames
    assert set(batch_sizes) == {1}
    torch.testing.assert_close(sliced, expected, atol=1e-5, rtol=0)


# Schedulers


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DPMSolverSinglestepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_every_flow_matching_scheduler_makes_each_frame_from_its_start(scheduler):
    pipe, context, noise = tiny_pipeline(scheduler=scheduler), random_latents(2), random_latents(2, seed=1)
    frames = latent_frames(pipe, video_latents=context, latents=noise, num_frames=2, num_inference_steps=3)
    uncached = latent_frames(
        pipe, video_latents=context, latents=noise, num_frames=2, num_inference_steps=3, use_cache=False
    )
    torch.testing.assert_close(frames, uncached, atol=1e-5, rtol=1e-5)
    # The second frame as the first frame after a longer context: no state of the scheduler is left from the first.
    longer = torch.cat([context, frames[:, :1]], dim=1)
    second = latent_frames(pipe, video_latents=longer, latents=noise[:, 1:], num_frames=1, num_inference_steps=3)
    torch.testing.assert_close(second, frames[:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDIMScheduler(), "DDIMScheduler has `prediction_type` 'epsilon'"),
        (EulerDiscreteScheduler(prediction_type="v_prediction"), "has `prediction_type` 'v_prediction'"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "UniPCMultistepScheduler has `prediction_type` 'epsilon'"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "UniPCMultistepScheduler leaves .* of the noise"),
        (DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "leaves 0.* of the noise"),
        (IPNDMScheduler(), "IPNDMScheduler cannot be stepped .* its timesteps are .* to 1;"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "has `use_dynamic_shifting`.* set `shift`"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), "its timesteps are .* to 500; pure noise is 1000"),
        (FlowMatchEulerDiscreteScheduler(shift=-1.0), "its timesteps are -"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "EulerDiscreteScheduler (leaves|cannot)"),
        (AmusedScheduler(0), "AmusedScheduler cannot be stepped from noise to data"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_a_scheduler_that_follows_no_flow_is_refused_by_name_at_the_start_and_whenever_it_is_set(scheduler, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(scheduler=scheduler)
    pipe, context = tiny_pipeline(), random_latents(2)
    pipe.scheduler = scheduler
    whole_clips = VideoDiTPipeline(
        tiny_transformer(frame_causal=False), tiny_kl(), FlowMatchEulerDiscreteScheduler(), context_mode="clean"
    )
    whole_clips.scheduler = scheduler
    for refused in (pipe, pipe.stream, pipe.start_session, whole_clips):
        with pytest.raises(ValueError, match=message):
            refused(video_latents=context)


def test_a_scheduler_is_tried_once_and_again_when_it_was_changed():
    pipe, context = tiny_pipeline(), {"video_latents": random_latents(2), "num_frames": 1, "num_inference_steps": 1}
    with patch("diffusers_far.pipelines.pipeline_far.check_scheduler") as check:
        pipe(**context)
        assert not check.called
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        pipe(**context)
        pipe(**context)
        assert check.call_count == 1
    pipe.scheduler.set_shift(-1.0)
    with pytest.raises(ValueError, match="its timesteps are -"):
        pipe(**context)


def test_a_flex_rope_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`flex_rope` is {'slopes': 1}; it has the fields of a FlexRoPEConfig"):
        tiny_pipeline(flex_rope={"slopes": 1})


@pytest.mark.parametrize("name", ["transformer", "vae", "scheduler"])
def test_a_pipeline_can_be_loaded_and_moved_without_a_component_but_makes_no_frames(tmp_path, name):
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = FARPipeline.from_pretrained(tmp_path, **{name: None}).to("cpu")
    for refused in (pipe, pipe.stream, pipe.start_session):
        with pytest.raises(ValueError, match=f"loaded without {name}; load it whole"):
            refused(video_latents=random_latents(2))


def test_trying_a_scheduler_leaves_it_and_the_global_generator_as_they_are():
    scheduler = FlowMatchLCMScheduler()
    scheduler.set_timesteps(7)
    state, before = torch.get_rng_state(), scheduler.timesteps.clone()
    check_scheduler(scheduler)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(scheduler.timesteps, before)


def test_heun_makes_an_exact_flow_better_than_euler():
    """On a velocity that is a known function of time, the error of Heun's method is of second order."""
    target, noise = torch.ones(1, 1, 4, *LATENT_SIZE), random_latents(1, batch_size=1)
    errors = {}
    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler()):
        pipe = tiny_pipeline(scheduler=scheduler)

        def velocity(latents, timestep, **kwargs):
            time = torch.as_tensor(timestep).clamp(min=1) / 1000
            return (torch.sin(3 * time) * (latents - target),)

        no_modulations = patch.object(pipe.transformer, "frame_modulations", lambda *args: None)
        with no_modulations, patch.object(pipe.transformer, "forward", velocity):
            frames = latent_frames(pipe, latents=noise, num_frames=1, num_inference_steps=8)
            fine = latent_frames(tiny_pipeline(pipe.transformer), latents=noise, num_frames=1, num_inference_steps=200)
        errors[type(scheduler).__name__] = (frames - fine).abs().max().item()
    assert errors["FlowMatchHeunDiscreteScheduler"] < 0.5 * errors["FlowMatchEulerDiscreteScheduler"]


def test_steps_are_counted_over_all_frames():
    for scheduler, steps_per_frame in ((FlowMatchEulerDiscreteScheduler(), 3), (FlowMatchHeunDiscreteScheduler(), 5)):
        pipe = tiny_pipeline(scheduler=scheduler)
        latent_frames(pipe, video_latents=random_latents(1), num_frames=2, num_inference_steps=3)
        assert pipe.num_timesteps == 2 * steps_per_frame


@pytest.mark.parametrize(
    "own, steps, guidance", [({}, 50, 1.0), ({"num_inference_steps": 3, "guidance_scale": 1.5}, 3, 1.5)]
)
def test_a_call_takes_the_steps_and_the_guidance_that_the_pipeline_is_shipped_with(own, steps, guidance, tmp_path):
    tiny_pipeline(tiny_transformer(num_classes=3), **own).save_pretrained(tmp_path)
    pipe = FARPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    context = {"video_latents": random_latents(1, batch_size=1), "class_labels": [1]}
    pipe(**context, num_frames=1, output_type="latent")
    assert (pipe.num_timesteps, pipe.guidance_scale) == (steps, guidance)
    pipe(**context, num_frames=1, num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    assert (pipe.num_timesteps, pipe.guidance_scale) == (2, 2.0)
    config = pipe.start_session(**context).config
    assert (config.num_inference_steps, config.guidance_scale) == (steps, guidance)


@pytest.mark.parametrize("short_cache", ["rolling", 2])
def test_a_call_takes_the_short_cache_that_the_pipeline_is_shipped_with(short_cache, tmp_path):
    transformer = tiny_transformer(long_patch_size=2, num_actions=3)
    tiny_pipeline(transformer, short_cache=short_cache).save_pretrained(tmp_path)
    pipe = FARPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    walk = {"video_latents": random_latents(4, batch_size=1), "actions": [0, 1, 2, 0, 1, 2, 0, 1]}

    def frames(pipe, **options):
        return latent_frames(pipe, **walk, num_frames=4, generator=seeds(0), **options)

    exact = tiny_pipeline(transformer)
    assert torch.equal(frames(pipe), frames(exact, short_cache=short_cache))
    assert torch.equal(frames(pipe, short_cache="exact"), frames(exact))
    assert not torch.equal(frames(pipe), frames(exact))
    torch.testing.assert_close(frames(pipe, use_cache=False), frames(exact), atol=1e-4, rtol=1e-4)
    session = pipe.start_session(video_latents=walk["video_latents"], actions=[0, 1, 2])
    assert session.rollout.config.cache_options.short_cache == short_cache
    assert f"`short_cache={short_cache!r}`" in (tmp_path / "README.md").read_text()


def test_noise_that_a_scheduler_adds_comes_from_the_generator():
    pipe, context = tiny_pipeline(scheduler=FlowMatchLCMScheduler()), random_latents(2)
    first, again = (
        latent_frames(pipe, video_latents=context, generator=seeds(5)[0], num_inference_steps=3) for _ in range(2)
    )
    assert torch.equal(first, again)


# Callbacks and interruption


def test_the_step_callback_sees_every_step_and_replaces_the_latents():
    pipe, seen = tiny_pipeline(), []

    def zero(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    frames = latent_frames(pipe, video_latents=random_latents(2), num_frames=2, callback_on_step_end=zero)
    timesteps = [1000.0, 1.0]
    shape = (2, 1, 4, *LATENT_SIZE)
    assert seen == [(step, timesteps[step % 2], shape) for step in range(4)]
    assert not frames.any()


@pytest.mark.parametrize("result", [None, {}])
def test_a_callback_may_return_nothing(result):
    pipe, context = tiny_pipeline(), random_latents(2)
    expected = latent_frames(pipe, video_latents=context, generator=seeds(1)[0])
    frames = latent_frames(
        pipe,
        video_latents=context,
        generator=seeds(1)[0],
        callback_on_step_end=lambda *args: result,
        callback_on_frame_end=lambda *args: result,
    )
    assert torch.equal(frames, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("schedule", [[2.5, 0.0, 0.0, 0.0], [2.5, 1.5, 4.0, 1.0], [2.5, 1.0, 3.0, 0.5]])
def test_a_callback_changes_the_guidance_of_the_next_step_across_1_too(schedule, use_cache):
    model = tiny_transformer(num_actions=3, long_patch_size=2)
    pipe, context, noise = tiny_pipeline(model), random_latents(3), random_latents(2, seed=1)
    actions, seen = conditions_of(model, 5)["actions"], []

    def change(pipe, step, timestep, tensors):
        seen.append(pipe.guidance_scale)
        if step < 3:
            pipe._guidance_scale = schedule[step + 1]
        return tensors

    arguments = {
        "video_latents": context,
        "latents": noise,
        "actions": actions,
        "num_frames": 2,
        "guidance_scale": 2.5,
    }
    frames = latent_frames(pipe, **arguments, use_cache=use_cache, callback_on_step_end=change)
    assert seen == schedule
    torch.testing.assert_close(frames, rollout_by_hand(model, context, noise, 2, actions, None, schedule), **CLOSE)


def test_the_frame_callback_changes_the_guidance_of_the_next_frame():
    model = tiny_transformer(num_actions=3)
    pipe, context, noise = tiny_pipeline(model), random_latents(3), random_latents(2, seed=1)
    actions = conditions_of(model, 5)["actions"]
    frames = latent_frames(
        pipe,
        video_latents=context,
        latents=noise,
        actions=actions,
        num_frames=2,
        guidance_scale=2.5,
        callback_on_frame_end=lambda pipe, *_: setattr(pipe, "_guidance_scale", 0.0),
    )
    expected = rollout_by_hand(model, context, noise, 2, actions, None, [2.5, 2.5, 0.0, 0.0])
    torch.testing.assert_close(frames, expected, **CLOSE)


@pytest.mark.parametrize(
    "begun, changed, message",
    [
        (1.0, 2.0, "encoded without a null half; start with a guidance above 1"),
        (2.0, float("nan"), "`guidance_scale` is nan"),
        (2.0, -1.0, "`guidance_scale` is -1.0"),
        (2.0, "3", "`guidance_scale` is '3'"),
    ],
)
def test_guidance_that_a_callback_cannot_set_is_refused(begun, changed, message):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    with pytest.raises(ValueError, match=message):
        latent_frames(
            pipe,
            video_latents=random_latents(2),
            actions=torch.zeros(2, 5, dtype=torch.int64),
            guidance_scale=begun,
            callback_on_step_end=lambda pipe, *_: setattr(pipe, "_guidance_scale", changed),
        )


def test_a_callback_of_one_stream_does_not_change_the_guidance_of_another():
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    arguments = {
        "video_latents": random_latents(2),
        "latents": random_latents(2, seed=1),
        "actions": torch.zeros(2, 4, dtype=torch.int64),
        "num_frames": 2,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    expected = list(pipe.stream(**arguments))
    switch_off = {"callback_on_step_end": lambda pipe, *_: setattr(pipe, "_guidance_scale", 0.0)}
    watch = {"callback_on_step_end": lambda pipe, *_: None}
    pairs = list(zip(pipe.stream(**arguments, **watch), pipe.stream(**arguments, **switch_off)))
    for (frame, other), wanted in zip(pairs, expected):
        assert torch.equal(frame, wanted) and not torch.equal(other, wanted)


def test_a_callback_that_asks_for_no_tensor_gets_none():
    seen = []
    latent_frames(
        tiny_pipeline(),
        video_latents=random_latents(2),
        num_frames=1,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}, {}]


def test_what_the_frame_callback_returns_is_the_frame_and_the_context_of_the_next():
    pipe, context, noise = tiny_pipeline(), random_latents(2), random_latents(2, seed=1)
    seen = []

    def replace(pipe, frame_index, tensors):
        seen.append((frame_index, tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0 + 0.5} if frame_index == 0 else {}

    frames = latent_frames(pipe, video_latents=context, latents=noise, num_frames=2, callback_on_frame_end=replace)
    assert seen == [(0, (2, 1, 4, *LATENT_SIZE)), (1, (2, 1, 4, *LATENT_SIZE))]
    assert (frames[:, 0] == 0.5).all()
    longer = torch.cat([context, frames[:, :1]], dim=1)
    expected = latent_frames(pipe, video_latents=longer, latents=noise[:, 1:], num_frames=1)
    torch.testing.assert_close(frames[:, 1:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_an_interrupted_call_returns_the_frames_that_are_finished(output_type):
    pipe, context = tiny_pipeline(), random_latents(2)
    arguments = {"video_latents": context, "num_inference_steps": 2, "output_type": output_type}
    expected = pipe(**arguments, num_frames=2, generator=seeds(1)[0]).frames

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 4  # the first step of the third frame

    frames = pipe(**arguments, num_frames=9, generator=seeds(1)[0], callback_on_step_end=interrupt).frames
    assert pipe.interrupt
    assert torch.equal(frames, expected) if output_type == "latent" else frames == expected
    assert len(pipe(**arguments, num_frames=2).frames[0]) == 2  # the next call runs to its end


def test_the_progress_bar_counts_the_steps_of_all_frames():
    pipe = tiny_pipeline()
    with patch.object(pipe, "progress_bar") as progress_bar:
        latent_frames(pipe, video_latents=random_latents(1), num_frames=2)
    progress_bar.assert_called_once_with(total=4)
    assert progress_bar.return_value.__enter__.return_value.update.call_count == 4


# Saving and loading


def test_a_saved_pipeline_loads_bit_equal(tmp_path):
    pipe = tiny_pipeline(
        tiny_transformer(long_patch_size=2, num_actions=3, trained_frames=4),
        scheduler=FlowMatchHeunDiscreteScheduler(shift=2.0),
        fps=10,
        action_names=["left", "right", "forward"],
        height=8,
        width=12,
    )
    pipe.save_pretrained(tmp_path)
    arguments = {"video": random_video(), "actions": conditions_of(pipe.transformer, 7)["actions"]}
    expected = latent_frames(pipe, generator=seeds(1, 2), output_type="pt", **arguments)
    for loader in (FARPipeline, diffusers.DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is FARPipeline
        for name in ("fps", "action_names", "height", "width", "flex_rope"):
            assert loaded.config[name] == pipe.config[name], name
        assert type(loaded.scheduler) is FlowMatchHeunDiscreteScheduler and loaded.scheduler.config.shift == 2.0
        assert torch.equal(latent_frames(loaded, generator=seeds(1, 2), output_type="pt", **arguments), expected)


@pytest.mark.parametrize(
    "config", [FlexRoPEConfig(0.3, "constant"), FlexRoPEConfig(0.3), FlexRoPEConfig(0.3, trained_frames=3)]
)
def test_flex_rope_is_kept_when_saved_and_applied_when_loaded(config, tmp_path):
    pipe, context = tiny_pipeline(tiny_transformer(trained_frames=2)), random_latents(4)
    plain = latent_frames(pipe, video_latents=context, generator=seeds(1, 2))
    pipe.enable_flex_rope(config)
    expected = latent_frames(pipe, video_latents=context, generator=seeds(1, 2))
    assert not torch.allclose(expected, plain, atol=1e-3)
    pipe.save_pretrained(tmp_path)
    loaded = FARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.flex_rope == pipe.config.flex_rope
    assert torch.equal(latent_frames(loaded, video_latents=context, generator=seeds(1, 2)), expected)
    loaded.disable_flex_rope()
    assert torch.equal(latent_frames(loaded, video_latents=context, generator=seeds(1, 2)), plain)
    loaded.save_pretrained(tmp_path)
    assert FARPipeline.from_pretrained(tmp_path).config.flex_rope is None


def test_a_function_as_schedule_is_not_saved(tmp_path):
    pipe = tiny_pipeline()
    pipe.enable_flex_rope(FlexRoPEConfig(schedule=lambda *position: 0.1))
    pipe.save_pretrained(tmp_path)
    assert FARPipeline.from_pretrained(tmp_path).config.flex_rope is None


def test_a_pipeline_made_from_another_shares_its_models():
    pipe = tiny_pipeline(height=8, width=12)
    other = FARPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer and other.config.height == 8


# Precision, devices, offload


@base_and_long
def test_it_runs_in_half_precision(long_patch_size):
    pipe = tiny_pipeline(tiny_transformer(long_patch_size=long_patch_size, num_actions=3))
    arguments = {
        "video": random_video(),
        "actions": conditions_of(pipe.transformer, 7)["actions"],
        "guidance_scale": 2.0,
        "output_type": "pt",
    }
    expected = latent_frames(pipe, generator=seeds(1, 2), **arguments)
    frames = latent_frames(pipe.to(torch.bfloat16), generator=seeds(1, 2), **arguments)
    assert frames.dtype == torch.float32 and torch.isfinite(frames).all()
    assert (frames - expected).abs().mean() < 0.05 * expected.std() + 0.02


def test_it_runs_under_autocast():
    pipe = tiny_pipeline(tiny_transformer(long_patch_size=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(latent_frames(pipe, video=random_video())).all()


def test_a_transformer_in_training_mode_is_warned_of_for_it_drops_conditions():
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    pipe.transformer.train()
    with patch("diffusers_far.pipelines.pipeline_far.logger.warning") as warning:
        latent_frames(pipe, video=random_video(), actions=torch.zeros(2, 7).long())
    assert "training mode" in warning.call_args[0][0]


def test_latents_stay_in_single_precision_between_steps():
    pipe, dtypes = tiny_pipeline().to(torch.bfloat16), []

    def record(pipe, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)

    frames = latent_frames(pipe, video_latents=random_latents(2), callback_on_step_end=record)
    assert {frames.dtype, *dtypes} == {torch.float32}


def test_models_are_offloaded_and_flex_rope_stays_alive_in_the_first_run_and_the_second():
    pipe, video = tiny_pipeline(tiny_transformer(long_patch_size=2)), random_video(4)
    plain = latent_frames(pipe, video=video, generator=seeds(1, 2))
    pipe.enable_flex_rope(FlexRoPEConfig(0.3, "constant"))
    expected = latent_frames(pipe, video=video, generator=seeds(1, 2), output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        frames = latent_frames(pipe, video=video, generator=seeds(1, 2), output_type="pt")
        assert torch.equal(frames, expected)
    stream = pipe.stream(video=video, generator=seeds(1, 2), num_frames=3, num_inference_steps=2, output_type="pt")
    assert torch.equal(torch.stack(list(stream), dim=1), expected)
    pipe.disable_flex_rope()
    assert torch.equal(latent_frames(pipe, video=video, generator=seeds(1, 2)), plain)


def test_flex_rope_enabled_after_the_offload_is_alive_too():
    pipe, video = tiny_pipeline(), random_video(4)
    pipe.enable_flex_rope(FlexRoPEConfig(0.3, "constant"))
    expected = latent_frames(pipe, video=video, generator=seeds(1, 2))
    pipe.disable_flex_rope()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_flex_rope(FlexRoPEConfig(0.3, "constant"))
    for _ in range(2):
        assert torch.equal(latent_frames(pipe, video=video, generator=seeds(1, 2)), expected)


# FlexRoPE in a call


def test_a_schedule_sees_every_step_of_a_call_and_none_in_its_writes():
    pipe, seen = tiny_pipeline(tiny_transformer(num_layers=1)), []
    pipe.enable_flex_rope(FlexRoPEConfig(schedule=lambda *position: seen.append(position) or 0.1))
    latent_frames(pipe, video_latents=random_latents(2), num_frames=2)
    assert seen == [
        (0, None, None),
        (1, None, None),
        (2, 0, 2),
        (2, 1, 2),
        (2, None, None),
        (3, 0, 2),
        (3, 1, 2),
    ]


def test_inside_the_trained_length_a_call_with_flex_rope_is_bit_equal_to_one_without():
    pipe, context = tiny_pipeline(tiny_transformer(long_patch_size=2, trained_frames=5)), random_latents(2)
    expected = latent_frames(pipe, video_latents=context, generator=seeds(1, 2), num_frames=4)
    pipe.enable_flex_rope(FlexRoPEConfig(0.5))
    frames = latent_frames(pipe, video_latents=context, generator=seeds(1, 2), num_frames=4)
    assert torch.equal(frames[:, :3], expected[:, :3])
    assert not torch.equal(frames[:, 3], expected[:, 3])


@pytest.mark.parametrize("schedule", ["constant", "beyond_training", lambda frame, step, num_steps: 0.05 * frame])
def test_a_cached_call_with_flex_rope_is_the_uncached_one(schedule):
    pipe, context = tiny_pipeline(tiny_transformer(long_patch_size=2)), random_latents(4)
    pipe.enable_flex_rope(FlexRoPEConfig(0.3, schedule, trained_frames=3))
    cached, uncached = (
        latent_frames(pipe, video_latents=context, generator=seeds(1, 2), use_cache=use_cache)
        for use_cache in (True, False)
    )
    torch.testing.assert_close(cached, uncached, atol=1e-4, rtol=1e-4)


# Bad input


class Refused:
    """A pipeline for bad calls: neither the transformer nor the VAE may run."""

    def __init__(self, vae=None, **config):
        self.pipe = tiny_pipeline(tiny_transformer(**config), vae=vae)

    def expect(self, message: str, **arguments):
        ran = AssertionError("ran before the arguments were checked")
        with (
            patch.object(FARTransformer3DModel, "forward", side_effect=ran),
            patch.object(type(self.pipe.vae), "encode", side_effect=ran),
            pytest.raises(ValueError, match=message),
        ):
            self.pipe(**{"num_frames": 3, **arguments})


CONTEXT = {"video_latents": random_latents(2)}
GIVEN_SIZE = {"height": 8, "width": 12}


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (
            {"num_actions": 3},
            {},
            "`actions` is None but this model is conditioned on actions; pass integers from 0 to 2",
        ),
        (
            {"action_dim": 2},
            {},
            "`actions` is None but this model is conditioned on actions; pass floats for 5 frames",
        ),
        (
            {},
            {"actions": torch.zeros(2, 5).long()},
            "`actions` was given but this model takes no actions; leave it out",
        ),
        (
            {"num_classes": 3},
            {"class_labels": 0, "actions": [0] * 5},
            "`actions` was given but this model takes no actions",
        ),
        ({"num_actions": 3}, {"actions": torch.zeros(2, 4).long()}, "`actions` has 4 frames but .* need 5; pass one"),
        ({"num_actions": 3}, {"actions": torch.zeros(2, 6).long()}, "`actions` has 6 frames but .* need 5; pass one"),
        (
            {"num_actions": 3, "action_shift": 1},
            {"actions": torch.zeros(2, 3).long()},
            r"`actions` has 3 frames but .* need 5; pass one action per frame \(the last may be left out\)",
        ),
        ({"action_dim": 2}, {"actions": torch.zeros(2, 4, 2)}, "`actions` has 4 frames but .* need 5; pass one"),
        (
            {"num_actions": 3},
            {"actions": torch.zeros(3, 5).long()},
            "`actions` has 3 rows but the batch is 2; pass one",
        ),
        ({"num_actions": 3}, {"actions": torch.zeros(2, 5, 1).long()}, r"`actions` has shape \(2, 5, 1\); this model"),
        ({"num_actions": 3}, {"actions": [[0] * 5, [0] * 4]}, "`actions` cannot be read as a tensor .* equal length"),
        ({"num_actions": 3}, {"actions": "forward"}, "`actions` cannot be read as a tensor"),
        pytest.param({"num_actions": 3}, {"actions": {}}, "`actions`"),
        ({"num_actions": 3}, {"actions": [[None] * 5] * 2}, "`actions` cannot be read as a tensor"),
        ({"num_actions": 3}, {"actions": torch.full((2, 5), 3)}, "`actions` has values from 3 to 3; .* 0 to 2"),
        ({"num_actions": 3}, {"actions": torch.full((2, 5), -1)}, "`actions` has values from -1 to -1; .* 0 to 2"),
        ({"num_actions": 3}, {"actions": torch.zeros(2, 5)}, "`actions` has dtype torch.float32 .* pass integers"),
        ({"num_actions": 3}, {"actions": torch.zeros(2, 5).bool()}, "`actions` has dtype torch.bool .* pass integers"),
        ({"action_dim": 2}, {"actions": torch.zeros(2, 5, 3)}, "`actions` has 3 channels; this model takes 2"),
        ({"action_dim": 2}, {"actions": torch.full((2, 5, 2), float("nan"))}, "`actions` .* must be finite"),
        ({"action_dim": 2}, {"actions": torch.zeros(5).long()}, r"`actions` has shape \(5,\); .*\(batch, frames, 2\)"),
    ],
)
def test_bad_actions_are_refused_before_any_work(config, arguments, message):
    Refused(**config).expect(message, **CONTEXT, **arguments)


@pytest.mark.parametrize(
    "config, class_labels, message",
    [
        ({"num_classes": 3}, None, "`class_labels` is None but .* pass integers from 0 to 3"),
        ({}, 0, "`class_labels` was given but this model takes no classes; leave it out"),
        ({"num_classes": 3}, [0, 1, 2], "`class_labels` has 3 labels but the batch is 2; pass one per sample"),
        ({"num_classes": 3}, [[0], [1]], r"`class_labels` has dtype torch.int64 and shape \(2, 1\); pass one integer"),
        ({"num_classes": 3}, [0, 4], "`class_labels` has values from 0 to 4; .* 0 to 2, and 3 is the null class"),
        ({"num_classes": 3}, -1, "`class_labels` has values from -1 to -1"),
        ({"num_classes": 3}, [0.0, 1.0], "`class_labels` has dtype torch.float32"),
        ({"num_classes": 3}, [True, False], "`class_labels` has dtype torch.bool"),
        pytest.param({"num_classes": 3}, "dog", "`class_labels`"),
        pytest.param({"num_classes": 3}, {}, "`class_labels`"),
        pytest.param({"num_classes": 3}, [0, None], "`class_labels`"),
    ],
)
def test_bad_class_labels_are_refused_before_any_work(config, class_labels, message):
    Refused(**config).expect(message, **CONTEXT, class_labels=class_labels)


def video_with(value: float) -> torch.Tensor:
    video = random_video()
    video[1, 2, 0, 3, 4] = value
    return video


@pytest.mark.parametrize(
    "video, message",
    [
        (video_with(1.1), r"`video` has values from .* to 1.1; pass floats in \[0, 1\]"),
        (video_with(-0.1), r"`video` has values from -0.1 to .*; pass floats in \[0, 1\]"),
        (255 * random_video(), r"`video` has values from .*; pass floats in \[0, 1\]"),
        (video_with(float("nan")), "`video` contains NaN or infinite values; pass finite"),
        (video_with(float("inf")), "`video` contains NaN or infinite values; pass finite"),
        (random_video()[:, :, :1], r"`video` is a tensor of shape \(2, 4, 1, 8, 12\); pass \(batch, frames, 3"),
        (random_video().movedim(2, -1), r"`video` is a tensor of shape \(2, 4, 8, 12, 3\); pass \(batch, frames, 3"),
        (
            random_video().numpy(),
            r"`video` is an array of shape \(2, 4, 3, 8, 12\); pass \(frames, height, width, 3\)",
        ),
        (random_video()[0, 0], r"`video` is a tensor of shape \(3, 8, 12\)"),
        (random_video().long(), "`video` has dtype torch.int64; pass uint8, or floats"),
        (random_video()[:, :0], r"`video` has shape \(2, 0, 3, 8, 12\): no frames; leave it out"),
        (random_video()[:0], r"`video` has shape \(0, 4, 3, 8, 12\): no frames; leave it out"),
        ([], "`video` is an empty list; leave it out"),
        ("video.mp4", "`video` is a str; pass a list of PIL images, an array or a tensor"),
        (["frame.png"], "`video` is a list of str; pass PIL images"),
        pytest.param(random_video(height=0), "`video`"),
        pytest.param(np.full((2, 8, 12, 3), None), "`video`"),
        ([PIL.Image.new("RGB", (12, 8)), PIL.Image.new("RGB", (8, 8))], "`video` has frames of sizes .* resize"),
        ([random_video()[0], random_video()[0, :3]], "`video` has parts of shapes .* equal sizes and frame counts"),
        pytest.param([PIL.Image.new("RGB", (12, 8)), np.zeros((8, 12, 3), np.uint8)], "`video`"),
        (random_video(height=9), "`video` is 9x12 pixels; VAE and patches need multiples of 2: resize.* to 8x12"),
        (random_video(width=13), "`video` is 8x13 pixels; VAE and patches need multiples of 2: resize"),
    ],
)
def test_a_bad_video_is_refused_before_any_work(video, message):
    Refused().expect(message, video=video)


def test_a_video_that_the_long_patches_do_not_divide_is_refused_before_any_work():
    message = "`video` is 8x12 pixels; VAE and patches need multiples of 8: resize, for example to 8x16"
    Refused(long_patch_size=4).expect(message, video=random_video())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"video": random_video(), **CONTEXT}, "`video` and `video_latents` were both given; pass .* one"),
        ({"num_frames": 0, **CONTEXT}, "`num_frames` is 0; pass a whole number of at least 1"),
        ({"num_frames": -2, **CONTEXT}, "`num_frames` is -2; pass a whole number"),
        ({"num_frames": 2.0, **CONTEXT}, "`num_frames` is 2.0; pass a whole number"),
        ({"num_frames": True, **CONTEXT}, "`num_frames` is True; pass a whole number"),
        ({"num_inference_steps": 0, **CONTEXT}, "`num_inference_steps` is 0; pass a whole number"),
        ({"num_videos_per_context": 0, **CONTEXT}, "`num_videos_per_context` is 0; pass a whole number"),
        ({"output_type": "gif", **CONTEXT}, "`output_type` is 'gif'; choose one of pil, np, pt, latent"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"], **CONTEXT},
            r"`callback_on_step_end_tensor_inputs` has \['noise'\]; there are \['latents'\]",
        ),
        (
            {"guidance_scale": 2.0, **CONTEXT},
            "`guidance_scale` is 2.0 but this model has no condition .* leave it at 1",
        ),
        ({"guidance_scale": -1.0, **CONTEXT}, "`guidance_scale` is -1.0; it is at least 0"),
        ({"guidance_scale": float("nan"), **CONTEXT}, "`guidance_scale` is nan"),
        ({"generator": seeds(1, 2, 3), **CONTEXT}, "`generator` is a list of 3 but the call makes 2 videos; pass one"),
        (
            {"generator": seeds(1, 2), "num_videos_per_context": 2, **CONTEXT},
            "`generator` is a list of 2 but the call makes 4 videos; pass one",
        ),
        pytest.param({"generator": 5, **CONTEXT}, "`generator`"),
        ({"latents": random_latents(2), **CONTEXT}, r"`latents` has shape \(2, 2, 4, 4, 6\); it must be \(any, 3, 4"),
        ({"latents": random_latents(3)[:, :, :3], **CONTEXT}, r"`latents` has shape \(2, 3, 3, 4, 6\)"),
        ({"latents": random_latents(3, size=(4, 4)), **CONTEXT}, r"`latents` has shape .* must be \(2, 3, 4, 4, 6\)"),
        ({"latents": random_latents(3, batch_size=3), **CONTEXT}, r"`latents` has shape .* must be \(2, 3, 4, 4, 6\)"),
        ({"latents": random_latents(3)[0], **CONTEXT}, r"`latents` has shape \(3, 4, 4, 6\)"),
        ({"latents": random_latents(3) / 0, **CONTEXT}, "`latents` contains NaN or infinite values"),
        ({"latents": random_latents(3).long(), **CONTEXT}, "`latents` is torch.int64; pass a float tensor"),
        ({"latents": random_latents(3).numpy(), **CONTEXT}, "`latents` is ndarray; pass a float tensor"),
        (
            {"latents": random_latents(3, batch_size=3), "num_videos_per_context": 2},
            "`latents` has a batch of 3; it must be a multiple of `num_videos_per_context` 2",
        ),
        ({"video_latents": random_latents(2)[0]}, r"`video_latents` has shape \(2, 4, 4, 6\); it must be"),
        ({"video_latents": random_latents(2)[:, :, :2]}, r"`video_latents` has shape \(2, 2, 2, 4, 6\); it must be"),
        ({"video_latents": random_latents(2) / 0}, "`video_latents` contains NaN or infinite values"),
        ({}, "`height` and `width` are None and None, without a video, .* pass both, in pixels"),
        ({"height": 8}, "`height` and `width` are 8 and None"),
        ({"height": 9, "width": 12}, "`height`x`width` is 9x12 pixels; VAE and patches need multiples of 2"),
        ({"height": -8, "width": 12}, "`height`x`width` is -8x12 pixels"),
        ({"height": 8.0, "width": 12}, "`height` is 8.0; pass a whole number of pixels"),
        ({"guidance_scale": "2", **CONTEXT}, "`guidance_scale` is '2'"),
        ({"num_inference_steps": 10**9, **CONTEXT}, "`num_inference_steps` is 1000000000; .* to 1000"),
        ({"max_long_frames": "3", **CONTEXT}, "`max_long_frames` is '3'; it is a number of frames"),
        (
            {"height": 16, **CONTEXT},
            "`height` and `width` are 16 and None but `video_latents` is of 8x12 pixels; leave",
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message):
    Refused().expect(message, **arguments)


@pytest.mark.parametrize(
    "config, name, value",
    [
        ({"num_actions": 3}, "actions", []),
        ({"num_actions": 3}, "actions", [[]]),
        ({"num_actions": 3}, "actions", torch.zeros(0, 3).long()),
        ({"num_classes": 3}, "class_labels", []),
        ({"num_classes": 3}, "class_labels", torch.zeros(0).long()),
        ({}, "video_latents", random_latents(0)),
        ({}, "video_latents", random_latents(2, batch_size=0)),
        ({}, "latents", random_latents(3, batch_size=0)),
    ],
)
def test_empty_inputs_are_refused_before_any_work(config, name, value):
    size = {} if "latents" in name else GIVEN_SIZE
    Refused(**config).expect(f"`{name}`", **size, **{name: value})


def test_a_transformer_that_makes_whole_clips_is_refused():
    pipe = tiny_pipeline(tiny_transformer(frame_causal=False))
    for refused in (pipe, pipe.stream, pipe.start_session):
        with pytest.raises(
            ValueError, match="`frame_causal=False` and makes whole clips; load it as a `VideoDiTPipeline`"
        ):
            refused(**CONTEXT)


def test_an_argument_of_a_call_is_named_once_and_reaches_the_request():
    def parameters(function) -> dict:
        return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}

    request, call, session = map(parameters, (GenerationRequest, FARPipeline.__call__, FARPipeline.start_session))
    del call["self"], call["return_dict"], session["self"]
    assert {**request, "callback_on_step_end_tensor_inputs": ["latents"]} == call
    own = {"max_history", "max_seconds_per_frame", "min_inference_steps"}
    assert {name: value for name, value in session.items() if name not in own}.items() <= call.items()


# Noise levels of the user's


def test_the_schedulers_own_sigmas_make_the_same_frames_when_they_are_given():
    pipe, context = tiny_pipeline(), random_latents(2)
    pipe.scheduler.set_timesteps(4)
    own = pipe.scheduler.sigmas[:-1].tolist()
    arguments = {"video_latents": context, "num_frames": 2, "output_type": "latent"}
    expected = pipe(**arguments, num_inference_steps=4, generator=seeds(1, 2)).frames
    frames = pipe(**arguments, sigmas=own, generator=seeds(1, 2)).frames
    assert pipe.num_timesteps == 8
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-5)
    streamed = torch.stack(list(pipe.stream(**arguments, sigmas=own, generator=seeds(1, 2))), dim=1)
    assert torch.equal(streamed, frames)


def test_a_frame_takes_its_steps_at_the_sigmas_that_are_given():
    pipe, seen = tiny_pipeline(), []

    def note(pipe, step, timestep, tensors):
        seen.append(float(timestep))

    pipe(video_latents=random_latents(1), num_frames=2, sigmas=[0.9, 0.5, 0.1], callback_on_step_end=note)
    assert seen == pytest.approx([900, 500, 100] * 2)


def test_frames_are_decoded_when_all_are_made():
    pipe, order = tiny_pipeline(), []
    make, decode = pipe._make_frame, pipe.decode_frame
    pipe._make_frame = lambda *arguments: order.append("made") or make(*arguments)
    pipe.decode_frame = lambda *arguments: order.append("decoded") or decode(*arguments)
    pipe(video_latents=random_latents(1), num_frames=2, num_inference_steps=1)
    assert order == ["made", "made", "decoded", "decoded"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sigmas": []}, "`sigmas` is .*; pass a list of noise levels that fall"),
        ({"sigmas": 0.5}, "`sigmas` is 0.5; pass a list of noise levels that fall"),
        ({"sigmas": [0.5, 1.0]}, "`sigmas` is .*; pass a list of noise levels that fall"),
        ({"sigmas": [1.5, 0.5]}, "`sigmas` is .*; pass a list of noise levels that fall"),
        ({"sigmas": [1.0, 0.0]}, "`sigmas` is .*; pass a list of noise levels that fall"),
        ({"sigmas": [1.0, float("nan")]}, "`sigmas` is .*; pass a list of noise levels that fall"),
        (
            {"sigmas": [1.0, 0.5], "num_inference_steps": 3},
            "`sigmas` has 2 noise levels but `num_inference_steps` is 3",
        ),
    ],
)
def test_sigmas_that_are_no_schedule_are_refused(arguments, message):
    Refused().expect(message, video_latents=random_latents(1), **arguments)


def test_a_scheduler_that_takes_no_sigmas_is_refused_by_name():
    refused = Refused()
    refused.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    refused.expect(
        "`sigmas` was given but the scheduler, FlowMatchHeunDiscreteScheduler, takes none", sigmas=[1.0, 0.5]
    )
