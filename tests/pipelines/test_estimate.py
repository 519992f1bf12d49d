"""What frames cost before they are made: bytes are those that come, and measuring leaves no trace."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from session_walks import start, walk
from tiny_models import property_test, random_clip, tiny_pipeline, tiny_separable, tiny_transformer

from diffusers_far.pipelines.latency import LatencyBudget
from diffusers_far.pipelines.rollout import Rollout


SIZE = {"height": 16, "width": 8}  # latents of 8 x 4
WORLD = {"num_actions": 3, "action_shift": 1}


@st.composite
def ways(draw) -> tuple[dict, dict, bool]:
    """How a model is built, how it generates, and whether it is separable."""
    model, options = {**WORLD, "flow_map": draw(st.booleans())}, {"num_inference_steps": 1}
    options["guidance_scale"] = draw(st.sampled_from([1.0, 2.0]))
    if draw(st.booleans()):
        model["long_patch_size"] = 2
        options["short_cache"] = draw(st.sampled_from(["exact", "rolling", 2]))
        if draw(st.booleans()):
            options |= {"max_long_frames": draw(st.integers(7, 9)), "num_sink_frames": draw(st.integers(0, 1))}
    is_separable = draw(st.booleans())
    if is_separable:
        options["guidance_mode"] = draw(st.sampled_from(["condition", "feature"]))
    return model, options, is_separable


def pipeline(model: dict, is_separable: bool = False):
    make = tiny_separable if is_separable else tiny_transformer
    scheduler = FlowMapEulerDiscreteScheduler() if model.get("flow_map") else None
    return tiny_pipeline(make(**model), scheduler=scheduler)


def caches_of(pipe) -> list[Rollout]:
    """The rollouts of the calls that come."""
    rollouts, begin = [], pipe._begin

    def keep(inputs):
        generation = begin(inputs)
        rollouts.append(generation.rollout)
        return generation

    pipe._begin = keep
    return rollouts


@property_test
@given(ways(), st.integers(0, 5), st.integers(1, 9), st.integers(1, 2))
def test_the_cache_of_a_call_has_the_bytes_that_were_counted(way, num_context, num_new, batch_size):
    model, options, is_separable = way
    pipe = pipeline(model, is_separable)
    clip = random_clip(pipe.transformer, num_context + num_new, 8, 4, batch_size)
    context = {"video_latents": clip.latents[:, :num_context]} if num_context else SIZE
    cost = pipe.estimate(num_new, num_context, batch_size, measure=False, **SIZE, **options)
    rollouts = caches_of(pipe)
    pipe(actions=clip.actions, num_frames=num_new, output_type="latent", **context, **options)
    assert cost.cache_bytes == rollouts[0].num_bytes > 0
    assert cost.num_frames == num_context + num_new and cost.seconds is None


@property_test
@given(ways(), st.integers(0, 5), st.integers(0, 4), st.integers(0, 5))
def test_the_cache_of_a_session_grows_to_the_bytes_that_were_counted(way, num_context, num_before, num_more):
    model, options, is_separable = way
    pipe, context = pipeline(model, is_separable), SIZE
    clip = random_clip(pipe.transformer, 6, 8, 4)
    if num_context:
        context = {"video_latents": clip.latents[:, :num_context], "actions": clip.actions[:, : num_context - 1]}
    session = pipe.start_session(output_type="latent", **context, **options)

    def step():
        session.step(1 if session.num_frames else None)

    for _ in range(num_before):
        step()
    now, later = (session.estimate(number, measure=False) for number in (0, num_more))
    step()
    assert (now.num_frames, now.cache_bytes) == (session.num_frames, session.rollout.num_bytes)
    for _ in range(num_more):
        step()
    assert (later.num_frames, later.cache_bytes) == (session.num_frames, session.rollout.num_bytes)


@pytest.mark.parametrize("options", [{}, {"short_cache": 2}, {"max_long_frames": 4}, {"short_cache": "rolling"}])
@pytest.mark.parametrize("is_separable", [False, True])
def test_a_session_goes_on_to_the_bit_after_an_estimate(is_separable, options):
    sessions = []
    for _ in range(2):
        pipe = pipeline({**WORLD, "long_patch_size": 2}, is_separable)
        sessions.append(start(pipe, **options))
    actions, frames = walk(pipe)[1], []
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    for session, is_asked in zip(sessions, (False, True)):
        for number in range(4):
            if is_asked:
                assert session.estimate(number).seconds > 0
            frames.append(session.step(actions[:, 2 + number]))
    assert all(map(torch.equal, frames[:4], frames[4:])) and torch.equal(torch.get_rng_state(), drawn)


class Ticks:
    """A clock on which the writes of a rollout, its steps and the decoding take set times."""

    def __init__(self, monkeypatch, write: float, window: float, step: float, decode: float):
        self.time, self.decode_seconds = 0.0, decode
        monkeypatch.setattr(LatencyBudget.__init__, "__kwdefaults__", {"device": None, "clock": lambda: self.time})
        run, num_long = Rollout._predict, None

        def predict(rollout, *args, update_cache=False, **arguments):
            nonlocal num_long
            found = run(rollout, *args, update_cache=update_cache, **arguments)
            if update_cache:
                num_long, before = rollout.kv_cache.plan.num_long_frames, num_long
                self.time += window if before not in (None, num_long) else write
            else:
                self.time += step
            return found

        monkeypatch.setattr(Rollout, "_predict", predict)

    def decode(self, latents, output_type):
        self.time += self.decode_seconds


@pytest.mark.parametrize(
    "interval, seconds_of_write", [(1, 10.0), (2, (10 + 1) / 2), (4, (10 + 3) / 4), (7, (10 + 6) / 7)]
)
def test_a_frame_takes_its_write_all_its_steps_and_its_decoding(interval, seconds_of_write, monkeypatch):
    pipe = pipeline({**WORLD, "long_patch_size": 2, "short_window": 8})
    ticks = Ticks(monkeypatch, write=1.0, window=10.0, step=0.1, decode=0.01)
    pipe.decode_frame = ticks.decode
    cost = pipe.estimate(20, 4, num_inference_steps=30, short_cache=interval, **SIZE)
    assert cost.seconds == pytest.approx(seconds_of_write + 30 * 0.1 + 0.01)
    assert ticks.time < 12 * (seconds_of_write + 0.3)  # few steps were taken


def test_steps_that_take_two_passes_count_twice(monkeypatch):
    ticks = Ticks(monkeypatch, write=1.0, window=1.0, step=0.1, decode=0.0)
    pipe = tiny_pipeline(tiny_transformer(**WORLD), scheduler=FlowMatchHeunDiscreteScheduler())
    pipe.decode_frame = ticks.decode
    assert pipe.estimate(num_inference_steps=10, **SIZE).seconds == pytest.approx(1 + 19 * 0.1)


def test_without_a_cache_the_whole_context_is_measured_and_no_bytes_are_counted(monkeypatch):
    pipe, seen = tiny_pipeline(), set()
    run = Rollout._predict

    def predict(rollout, frames, *args, **arguments):
        seen.add(frames.num_frames)
        return run(rollout, frames, *args, **arguments)

    monkeypatch.setattr(Rollout, "_predict", predict)
    cost = pipe.estimate(3, 5, use_cache=False, num_inference_steps=2, **SIZE)
    assert cost.cache_bytes == 0 and cost.seconds > 0 and min(seen) == 3 + 5 + 1


@pytest.mark.parametrize(
    "prepare", [lambda model: model, lambda model: model.bfloat16(), lambda model: model.quantize_int8()]
)
def test_the_weights_are_those_of_transformer_and_vae(prepare):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3))
    vae = sum(each.nbytes for each in pipe.vae.state_dict().values())
    own = sum(each.nbytes for each in pipe.transformer.parameters())
    in_blocks = [module for module in pipe.transformer.transformer_blocks.modules() if type(module) is torch.nn.Linear]
    quarter = sum(layer.weight.nbytes for layer in in_blocks) // 4
    prepare(pipe.transformer)
    if pipe.transformer.is_int8:
        own += len(in_blocks) * 12 - 3 * quarter  # each layer has a scale and a zero point
    elif pipe.transformer.dtype == torch.bfloat16:
        own = sum(each.nbytes for each in pipe.transformer.parameters())
    assert pipe.estimate(measure=False, **SIZE).weight_bytes == own + vae


def test_more_than_fits_is_counted_without_taking_it():
    cost = tiny_pipeline().estimate(100, 900, batch_size=4, measure=False, height=256, width=256)
    assert cost.cache_bytes == 2 * 2 * 4 * 32 * 128**2 * (900 + 100) * 4  # 31 GiB


def test_an_estimate_is_read_in_one_line_and_does_not_change():
    cost = pipeline(WORLD).estimate(3, 2, **SIZE, num_inference_steps=1)
    assert (
        str(replace(cost, seconds=0.12345, weight_bytes=2**20)) == "frame 5: weights 1.0 MiB, cache 0.1 MiB, 0.123 s"
    )
    assert "None" not in str(replace(cost, seconds=None, weight_bytes=None))
    assert math.isfinite(cost.seconds)
    with pytest.raises(FrozenInstanceError):
        cost.seconds = 0


def test_a_model_that_needs_a_context_is_estimated_with_one():
    pipe = pipeline({**WORLD, "learn_start": False}, is_separable=True)
    assert pipe.estimate(1, 1, num_inference_steps=1, **SIZE).seconds > 0
    with pytest.raises(ValueError, match="cannot start from nothing"):
        pipe.estimate(**SIZE)


def test_classes_need_not_be_told():
    pipe = tiny_pipeline(tiny_transformer(num_classes=3))
    assert pipe.estimate(2, 2, guidance_scale=2, num_inference_steps=1, **SIZE).seconds > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_frames": 0}, "`num_frames` is 0"),
        ({"num_context_frames": -1}, "`num_context_frames` is -1"),
        ({"batch_size": 1.5}, "`batch_size` is 1.5"),
        ({"height": 15}, "15x8 pixels"),
        ({"height": None}, "`height` and `width` are None and 8"),
        ({"height": None, "num_context_frames": 2}, "`height` and `width` are None and 8"),
        ({"short_cache": "none"}, "`short_cache` is 'none'"),
        ({"max_long_frames": 4}, "this model has no long frames"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ],
)
def test_what_a_call_would_refuse_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(WORLD).estimate(**(SIZE | arguments))


def test_contents_and_parts_that_are_missing_are_refused():
    pipe = pipeline(WORLD)
    with pytest.raises(TypeError, match="'video'"):
        pipe.estimate(video=torch.zeros(1, 1, 3, 16, 8))
    with pytest.raises(ValueError, match="`num_frames` is -1"):
        pipe.start_session(**SIZE).estimate(-1)
    pipe.register_modules(transformer=None)
    with pytest.raises(ValueError, match="without transformer"):
        pipe.estimate(**SIZE)
