import logging

import pytest
import torch
from session_walks import MODELS, SETTINGS, generators, go_on, led_along, pipeline, start, walk

from diffusers_far import FARSession, FlexRoPEConfig


OPTIONS = [{}, {"short_cache": "rolling"}, {"short_cache": 2}, {"max_long_frames": 2, "num_sink_frames": 1}]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def assert_goes_on_like(session, straight, action):
    """The next frames are the same, from the same noise."""
    session.set_generator(generators())
    straight.set_generator(generators())
    torch.testing.assert_close(session.step(action), straight.step(action), **CLOSE)
    torch.testing.assert_close(session.step(action), straight.step(action), **CLOSE)


@pytest.mark.parametrize("config, options", [(MODELS[0], options) for options in OPTIONS] + [(MODELS[1], {})])
@pytest.mark.parametrize("before, after", [(1.0, 1.5), (1.5, 1.0)])
def test_guidance_that_crosses_one_is_as_if_it_had_been_so_from_the_start(config, options, before, after):
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    session = start(pipe, guidance_scale=before, **options)
    frames = go_on(session, actions, 0, 4)
    session.set_config(guidance_scale=after)
    straight = led_along(start(pipe, guidance_scale=after, **options), actions, frames)
    assert_goes_on_like(session, straight, actions[:, -1])
    assert session.rollout.kv_cache.batch_size == (4 if after > 1 else 2)


def test_without_the_whole_past_guidance_can_be_dropped_but_not_begun():
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe, max_history=4)
    frames = go_on(session, actions, 0, 4)
    session.set_config(guidance_scale=1.0)
    straight = led_along(start(pipe, guidance_scale=1.0), actions, frames)
    assert_goes_on_like(session, straight, actions[:, -1])
    with pytest.raises(
        ValueError, match="`guidance_scale` 1.5 needs a null half .* only 4 of 9 frames are remembered"
    ):
        session.set_config(guidance_scale=1.5)
    assert session.config.guidance_scale == 1.0
    assert_goes_on_like(session, straight, actions[:, -1])


def test_guidance_that_crosses_one_and_comes_back_changes_nothing():
    pipe = pipeline()
    _, actions = walk(pipe)
    session, straight = start(pipe), start(pipe)
    for each in (session, straight):
        go_on(each, actions, 0, 3)
    session.set_config(guidance_scale=0.5)
    session.set_config(guidance_scale=1.5)
    assert_goes_on_like(session, straight, actions[:, -1])


def test_steps_and_guidance_change_from_the_next_frame_on():
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe)
    frames = go_on(session, actions, 0, 2)
    session.set_config(num_inference_steps=3)
    session.set_config(guidance_scale=2.0)
    assert (session.config.num_inference_steps, session.config.guidance_scale) == (3, 2.0)
    straight = led_along(start(pipe, num_inference_steps=3, guidance_scale=2.0), actions, frames)
    assert_goes_on_like(session, straight, actions[:, -1])
    assert session.num_inference_steps_used == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"guidance_scale": -1.0}, "`guidance_scale` is -1.0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(changes, message):
    session = start(pipeline())
    config = session.config
    with pytest.raises(ValueError, match=message):
        session.set_config(**changes)
    assert session.config == config
    session.step(0)


def test_another_seed_is_another_future_and_the_same_seed_the_same():
    session = start(pipeline())
    session.step(0)
    futures = []
    for seed in (1, 1, 2, [torch.Generator().manual_seed(1), torch.Generator().manual_seed(3)], None):
        fork = session.fork()
        fork.set_generator(seed)
        futures.append(fork.step(1))
    same, again, other, per_sample, random = futures
    assert torch.equal(same, again)
    assert not any(torch.equal(same, future) for future in (other, per_sample, random))
    with pytest.raises(ValueError, match="`generator` is a list of 1 but the call makes 2"):
        session.set_generator([torch.Generator()])
    with pytest.raises(ValueError, match="`generator` is 'seed'"):
        session.set_generator("seed")


@pytest.mark.parametrize("first, second", [(1, "list"), ("list", 1), (1, 2)])
def test_going_back_past_a_change_of_generator_draws_from_the_old_one_again(first, second):
    session = start(pipeline())
    session.set_generator(generators() if first == "list" else first)
    expected = session.step(1)
    session.set_generator(generators() if second == "list" else second)
    session.step(1)
    session.rewind(2)
    torch.testing.assert_close(session.step(1), expected, **CLOSE)


def test_flex_rope_leaves_what_is_cached_until_it_is_encoded_anew():
    flex_rope = FlexRoPEConfig(slope=0.5, schedule="constant")
    pipe = pipeline(long_patch_size=None)
    _, actions = walk(pipe)
    session = start(pipe)
    frames = go_on(session, actions, 0, 4)
    fork = session.fork()
    keys = session.rollout.state()[0]["keys"].clone()
    pipe.enable_flex_rope(flex_rope)
    plain_past = session.step(actions[:, -1])
    assert torch.equal(session.rollout.state()[0]["keys"][:, :, : keys.shape[2]], keys)

    fork.reencode()
    straight = led_along(start(pipe), actions, frames)
    decayed_past = fork.fork().step(actions[:, -1])
    assert_goes_on_like(fork, straight, actions[:, -1])
    assert not torch.allclose(decayed_past, plain_past, atol=1e-3)


def test_flex_rope_holds_from_the_next_frame_on():
    pipe = pipeline()
    session = start(pipe)
    session.step(0)
    forks = [session.fork() for _ in range(3)]
    plain = forks[0].step(1)
    pipe.enable_flex_rope(FlexRoPEConfig(slope=0.5, schedule="constant"))
    assert not torch.allclose(forks[1].step(1), plain, atol=1e-3)
    pipe.disable_flex_rope()
    assert torch.equal(forks[2].step(1), plain)


def test_encoding_anew_takes_the_whole_past():
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe, max_history=4)
    session.reencode()
    go_on(session, actions)
    with pytest.raises(ValueError, match="cannot be encoded anew, but only 4 of 9 frames are remembered"):
        session.reencode()


class Ticking:
    """A clock that a transformer and a VAE move: seconds per call of each."""

    def __init__(self, session, step_seconds: float, decode_seconds: float):
        self.time, self.step_seconds = 0.0, step_seconds
        session.latency.clock = lambda: self.time
        session.rollout.transformer.register_forward_pre_hook(self.tick_step, with_kwargs=True)
        decode = session.decode

        def tick_decode(*arguments):
            self.time += decode_seconds
            return decode(*arguments)

        session.decode = tick_decode

    def tick_step(self, module, args, kwargs):
        if not kwargs.get("update_cache"):
            self.time += self.step_seconds


def test_steps_are_lowered_so_that_frames_come_in_time_and_raised_again():
    session = start(pipeline(), num_inference_steps=20, max_seconds_per_frame=1.0, min_inference_steps=2)
    clock = Ticking(session, step_seconds=0.09, decode_seconds=0.25)

    def steps_and_seconds():
        before = clock.time
        session.step(0)
        return session.num_inference_steps_used, clock.time - before

    for _ in range(2):  # nothing, then only the frame with the whole context, has been measured
        assert steps_and_seconds()[0] == 2
    num_steps, seconds = steps_and_seconds()
    assert num_steps == 8 and seconds <= 1.0
    clock.step_seconds = 0.2
    late = [steps_and_seconds() for _ in range(3)]
    assert [seconds <= 1.0 for _, seconds in late] == [False] * 3
    assert steps_and_seconds()[0] == 3 and steps_and_seconds()[1] <= 1.0
    clock.step_seconds = 5.0
    for _ in range(4):
        steps_and_seconds()
    assert steps_and_seconds()[0] == 2  # never below the minimum, however late
    session.set_latency_budget(None)
    assert steps_and_seconds()[0] == 20


def test_without_a_budget_no_clock_is_read():
    session = start(pipeline())
    session.latency.clock = lambda: pytest.fail("read")
    session.step(0)
    assert session.num_inference_steps_used == session.config.num_inference_steps == 2


def test_a_change_of_steps_is_logged_once(caplog):
    session = start(pipeline(), num_inference_steps=20, max_seconds_per_frame=1.0, min_inference_steps=2)
    Ticking(session, step_seconds=0.09, decode_seconds=0.25)
    with caplog.at_level(logging.INFO, logger="diffusers_far.pipelines.latency"):
        for _ in range(6):
            session.step(0)
    messages = [record.getMessage() for record in caplog.records if "denoising steps" in record.getMessage()]
    assert [message.split(" denoising")[0] for message in messages] == ["2 of 20", "8 of 20"]


def test_a_batch_of_another_size_is_measured_anew():
    session = start(pipeline(), num_inference_steps=20, max_seconds_per_frame=1.0, min_inference_steps=2)
    Ticking(session, step_seconds=0.09, decode_seconds=0.25)
    for _ in range(3):
        session.step(0)
    assert session.num_inference_steps_used == 8
    session.set_config(guidance_scale=1.0)
    session.step(0)
    assert session.num_inference_steps_used == 2


def test_a_fork_and_a_loaded_session_know_what_was_set_and_measured(tmp_path):
    pipe = pipeline()
    session = start(pipe, num_inference_steps=20, max_seconds_per_frame=1.0, min_inference_steps=2)
    Ticking(session, step_seconds=0.09, decode_seconds=0.25)
    session.step(0)
    session.step(0)
    session.set_config(num_inference_steps=6, guidance_scale=2.0)
    session.set_generator(7)
    session.save(tmp_path / "session.safetensors")
    others = [session.fork(), FARSession.load(pipe, tmp_path / "session.safetensors")]
    expected = session.step(0)
    for other in others:
        assert other.config == session.config
        assert torch.equal(other.step(0), expected)
        assert other.num_inference_steps_used == 6


def test_settings_do_not_reach_other_sessions():
    pipe = pipeline()
    _, actions = walk(pipe)
    expected = go_on(start(pipe), actions, 0, 2)
    session = start(pipe)
    fork = session.fork()
    fork.set_config(num_inference_steps=5, guidance_scale=1.0)
    fork.set_generator(9)
    fork.set_latency_budget(1.0)
    fork.step(0)
    assert torch.equal(go_on(session, actions, 0, 2), expected)
    assert session.config.num_inference_steps == SETTINGS["num_inference_steps"]
