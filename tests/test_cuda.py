"""What holds on the CPU holds on CUDA: run on a machine with an NVIDIA GPU, skipped elsewhere.

`far-maze` is the shipped model; the others are tiny, with random weights. Differences are of values of about unit size.
"""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMapEulerDiscreteScheduler
from session_walks import NUM_NEW, call, go_on, pipeline, start, walk
from tiny_models import (
    Clip,
    base_and_long,
    half_precision_error,
    predict,
    predict_cached,
    random_clip,
    tiny_pipeline,
    tiny_separable,
    tiny_transformer,
)

from diffusers_far import FARPipeline, FARSession, FlexRoPEConfig, apply_flex_rope
from diffusers_far.training.clips import ClipBatch, clip_loss
from diffusers_far.training.objective import ObjectiveDraw, TrainingObjective


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

FAR_MAZE = Path(__file__).parents[1] / "checkpoints" / "far-maze"
TOLERANCE = 1e-4  # of one pass, or of frames of a tiny model, in float32
ROLLOUT_TOLERANCE = 1e-3  # of frames of far-maze: errors grow from frame to frame


@pytest.fixture(autouse=True)
def exact_float32():
    """Without TF32, which convolutions would use and products could."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, allowed):
        place.allow_tf32 = value


def on_cuda(clip: Clip) -> Clip:
    return Clip(*(None if value is None else value.cuda() for value in vars(clip).values()))


def far_maze(device: str = "cuda", dtype: torch.dtype = torch.float32) -> FARPipeline:
    pipe = FARPipeline.from_pretrained(FAR_MAZE).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def continued(pipe: FARPipeline, num_frames: int = 4, **overrides) -> torch.Tensor:
    """New frames after 12 random ones, `(1, F, ...)`; context, actions and noise are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 12 * 3, 8, 8, generator=generator)
    video = F.interpolate(coarse, scale_factor=8, mode="bilinear").unflatten(1, (12, 3))
    actions = torch.randint(0, 3, (1, 12 + num_frames - 1), generator=generator)
    arguments = {"generator": torch.Generator().manual_seed(1), "output_type": "latent", **overrides}
    return pipe(video=video, actions=actions, num_frames=num_frames, **arguments).frames.cpu()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual.cpu().float() - expected.cpu().float()).abs().max().item()


# The model


@base_and_long
@pytest.mark.parametrize("chunks", [None, [6]], ids=["one by one", "at once"])
def test_cached_equals_uncached(long_patch_size, chunks):
    model = tiny_transformer(long_patch_size=long_patch_size, num_actions=3).cuda()
    clip = on_cuda(random_clip(model, 7).clean_but_last())
    assert difference(predict_cached(model, clip, chunks), predict(model, clip)[:, -1:]) < TOLERANCE


@base_and_long
def test_a_clip_gives_what_the_cpu_gives(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, num_actions=3)
    clip = random_clip(model, 7)
    expected = predict(model, clip)
    assert difference(predict(model.cuda(), on_cuda(clip)), expected) < TOLERANCE


@base_and_long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_future_never_changes_the_past(long_patch_size, dtype):
    model = tiny_transformer(long_patch_size=long_patch_size).to("cuda", dtype)
    clip = on_cuda(random_clip(model, 7))
    clip = replace(clip, latents=clip.latents.to(dtype))
    other = replace(clip, latents=clip.latents.clone(), timestep=clip.timestep.clone())
    other.latents[:, -1] = 10 - other.latents[:, -1]
    other.timestep[:, -1] = 1000 - other.timestep[:, -1]
    ours, theirs = predict(model, clip), predict(model, other)
    assert torch.equal(ours[:, :-1], theirs[:, :-1])
    assert not torch.equal(ours[:, -1], theirs[:, -1])


# FlexRoPE


def with_decay(model):
    apply_flex_rope(model, FlexRoPEConfig(0.2, "constant"))
    return model


@base_and_long
def test_flex_rope_gives_what_the_cpu_gives(long_patch_size):
    model = with_decay(tiny_transformer(long_patch_size=long_patch_size))
    clip = random_clip(model, 7).clean_but_last()
    expected = predict(model, clip)
    model, clip = model.cuda(), on_cuda(clip)
    assert difference(predict(model, clip), expected) < TOLERANCE
    for chunks in (None, [6]):
        assert difference(predict_cached(model, clip, chunks), expected[:, -1:]) < TOLERANCE


def test_flex_rope_takes_a_write_whose_views_start_anywhere_in_memory():
    model = with_decay(tiny_transformer(long_patch_size=2))
    clip = random_clip(model, 11, 2, 2).clean_but_last()  # 1 token in a long frame; 16 keys in view of the last write
    expected = predict(model, clip)[:, -1:]
    assert difference(predict_cached(model.cuda(), on_cuda(clip), [10]), expected) < TOLERANCE


@base_and_long
@pytest.mark.parametrize("has_decay", [False, True], ids=["plain", "FlexRoPE"])
def test_bfloat16_stays_near_float32(long_patch_size, has_decay):
    model = tiny_transformer(long_patch_size=long_patch_size)
    prepare = with_decay if has_decay else lambda model: model
    on_cpu = half_precision_error(model, random_clip(model, 7), 6, prepare)
    error = half_precision_error(model.cuda(), on_cuda(random_clip(model, 7)), 6, prepare)
    assert error < 1.5 * on_cpu


# The pipeline


@pytest.mark.parametrize("make", [call, continued], ids=["tiny", "far-maze"])
def test_frames_are_those_of_the_cpu_where_its_generator_draws(make):
    make_pipe, tolerance = (pipeline, TOLERANCE) if make is call else (lambda: far_maze("cpu"), ROLLOUT_TOLERANCE)
    for output_type in ("latent", "pt"):
        expected = make(make_pipe(), output_type=output_type)
        assert difference(make(make_pipe().to("cuda"), output_type=output_type), expected) < tolerance


def separable() -> FARPipeline:
    return tiny_pipeline(tiny_separable(long_patch_size=2, num_actions=3, action_shift=1))


def flow_map() -> FARPipeline:
    return pipeline(FlowMapEulerDiscreteScheduler(), flow_map=True)


@pytest.mark.parametrize("make_pipe", [separable, flow_map])
def test_separable_models_and_flow_maps_make_the_frames_of_the_cpu(make_pipe):
    expected = call(make_pipe())
    assert difference(call(make_pipe().to("cuda")), expected) < TOLERANCE


def test_far_maze_cached_equals_uncached():
    pipe = far_maze()
    cached, uncached = (continued(pipe, use_cache=use_cache, short_cache="exact") for use_cache in (True, False))
    assert difference(cached, uncached) < ROLLOUT_TOLERANCE


def test_a_rollout_in_bfloat16_stays_near_that_in_float32():
    exact = continued(far_maze(), output_type="pt")
    rounded = continued(far_maze(dtype=torch.bfloat16), output_type="pt").float()
    psnr = -10 * (exact - rounded).square().mean().log10().item()  # a CPU has 47 dB
    assert psnr > 38


def test_a_rollout_in_bfloat16_with_flex_rope_stays_near_that_in_float32():
    frames = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = far_maze(dtype=dtype)
        pipe.enable_flex_rope(FlexRoPEConfig(0.1, "constant"))
        frames.append(continued(pipe, output_type="pt").float())
    assert -10 * (frames[0] - frames[1]).square().mean().log10().item() > 38


def test_offloaded_models_make_the_same_frames():
    expected = call(pipeline().to("cuda"), output_type="pt")
    pipe = pipeline()
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert difference(call(pipe, output_type="pt"), expected) < TOLERANCE
    assert pipe.transformer.device.type == "cpu"


# Sessions


def test_a_session_steps_rewinds_forks_and_is_stored(tmp_path):
    pipe = pipeline().to("cuda")
    _, actions = walk(pipe)
    session = start(pipe, generator=[torch.Generator("cuda").manual_seed(seed) for seed in (4, 5)])
    frames = go_on(session, actions)
    assert frames.is_cuda and frames.isfinite().all()
    session.rewind(3)
    twin = session.fork()
    session.save(tmp_path / "session.safetensors")
    loaded = FARSession.load(pipe, tmp_path / "session.safetensors")
    for each in (session, twin, loaded):
        assert difference(go_on(each, actions, first=NUM_NEW - 3), frames[:, -3:]) < TOLERANCE


# Training


@base_and_long
def test_a_training_step_under_autocast_gives_finite_gradients_and_the_loss_of_the_cpu(long_patch_size):
    transformer = tiny_transformer(long_patch_size=long_patch_size, num_actions=3, condition_dropout=0.0).train()
    num_frames, num_long_frames = 6, 0 if long_patch_size is None else 3
    generator = torch.Generator().manual_seed(0)
    objective = TrainingObjective(teacher_forcing=True)
    draw = ObjectiveDraw.stack([objective.draw(num_frames, num_long_frames, (4, 4, 6), generator) for _ in range(2)])
    clip = random_clip(transformer, num_frames)
    clips = ClipBatch(clip.latents, clip.actions, None)
    expected = clip_loss(transformer, transformer.config, clips, draw)
    expected.backward()
    gradients = {name: each.grad for name, each in transformer.named_parameters() if each.grad is not None}

    trained = copy.deepcopy(transformer).cuda()
    trained.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = clip_loss(trained, trained.config, clips.to("cuda"), draw.to("cuda"))
    loss.backward()
    assert abs(loss.item() / expected.item() - 1) < 0.02
    ours = {name: each.grad.cpu() for name, each in trained.named_parameters() if each.grad is not None}
    assert ours.keys() == gradients.keys()
    assert all(each.isfinite().all() for each in ours.values())
    flat, flat_expected = (torch.cat([each.flatten() for each in part.values()]) for part in (ours, gradients))
    assert F.cosine_similarity(flat, flat_expected, dim=0) > 0.99


# Compiled, last because it takes longest


@base_and_long
def test_compiled_blocks_give_what_plain_blocks_give(long_patch_size):
    pytest.importorskip("triton", reason="torch.compile needs Triton")
    torch._dynamo.reset()
    plain = tiny_transformer(long_patch_size=long_patch_size).cuda()
    compiled = copy.deepcopy(plain)
    compiled.compile_repeated_blocks(dynamic=True)
    clip = on_cuda(random_clip(plain, 5, 4, 4, batch_size=1))
    caches = [model.init_kv_cache(1, 4, 4, clip.num_frames) for model in (plain, compiled)]
    for frame in range(clip.num_frames):
        noisy = clip.frames(frame, frame + 1)
        outputs = []
        for model, kv_cache in zip((plain, compiled), caches):
            outputs.append(predict(model, noisy, kv_cache=kv_cache))
            if frame + 1 < clip.num_frames:
                predict(model, replace(noisy, timestep=-1), kv_cache=kv_cache, update_cache=True)
        assert difference(*outputs) < TOLERANCE
    torch._dynamo.reset()
