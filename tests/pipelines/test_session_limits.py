"""What a session holds, and what happens when callers or steps get in each other's way."""

import gc
import logging
import threading
import types
from dataclasses import replace

import pytest
import torch
from session_walks import generators, go_on, led_along, pipeline, start, walk
from tiny_models import tiny_pipeline

from diffusers_far import FARSession


OUTSIDE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType, logging.Logger)


def held(session: FARSession) -> tuple[int, int]:
    """Bytes of tensors, each storage once, and number of references, in all that can be reached from a session: its
    models, hooks and scheduler too, so that nothing can grow in a corner."""
    seen, storages, num_references, waiting = set(), {}, 0, [session]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, OUTSIDE):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and not value.is_meta:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        referents = gc.get_referents(value)
        num_references += len(referents)
        waiting.extend(referents)
    return sum(storages.values()), num_references


def play(session: FARSession, num_steps: int) -> None:
    """Steps with everything that a player does between them."""
    for step in range(num_steps):
        assert session.step(step % 3).isfinite().all()
        if step % 5 == 4:
            session.fork().step(1)
        if step % 7 == 6:
            session.rewind(1)
            session.step(0)


@pytest.mark.parametrize("options", [{}, {"short_cache": "rolling"}, {"max_seconds_per_frame": 100.0}])
def test_an_endless_session_holds_no_more_after_three_times_as_many_steps(options):
    session = start(pipeline(), max_history=4, max_long_frames=4, num_sink_frames=1, **options)
    play(session, 14)
    before, num_bytes = held(session), session.num_bytes
    play(session, 28)
    assert held(session) == before and session.num_bytes == num_bytes


def test_what_is_forgotten_of_a_long_context_is_freed():
    pipe = pipeline()
    arguments = {"max_history": 4, "max_long_frames": 4, "generator": generators(), "num_inference_steps": 1}
    num_bytes = []
    for num_frames in (12, 48):
        latents = torch.randn(2, num_frames, 4, 4, 6, generator=torch.Generator().manual_seed(0))
        actions = torch.zeros(2, num_frames - 1, dtype=torch.int64)
        session = pipe.start_session(video_latents=latents, actions=actions, output_type="latent", **arguments)
        del latents, actions
        session.step(0)
        session.step(0)
        num_bytes.append(held(session)[0])
    assert num_bytes[0] == num_bytes[1]


def test_a_stream_holds_no_more_as_it_goes_on():
    pipe = pipeline()
    generations, begin = [], pipe._begin
    pipe._begin = lambda *args: generations.append(begin(*args)) or generations[-1]
    stream = pipe.stream(
        height=8, width=12, actions=[[0] * 20], num_frames=20, num_inference_steps=1, max_long_frames=4
    )
    num_bytes = [held(generations[0])[0] for _ in stream]
    assert len(set(num_bytes[10:])) == 1


VERBS = {
    "step": lambda session, path: session.step(0),
    "advance": lambda session, path: session.advance(None),
    "fork": lambda session, path: session.fork(),
    "rewind": lambda session, path: session.rewind(1),
    "save": lambda session, path: session.save(path),
    "set_config": lambda session, path: session.set_config(num_inference_steps=9),
    "set_generator": lambda session, path: session.set_generator(0),
    "set_latency_budget": lambda session, path: session.set_latency_budget(1.0),
    "reencode": lambda session, path: session.reencode(),
}


def test_a_second_caller_is_refused_and_the_session_goes_on_as_if_it_had_not_called(tmp_path):
    pipe = pipeline()
    _, actions = walk(pipe)
    expected = go_on(start(pipe), actions, 0, 3)
    session = start(pipe)
    first = session.step(actions[:, 2])
    is_inside, may_leave, frames = threading.Event(), threading.Event(), []
    decode = session.decode

    def wait_and_decode(*arguments):  # the last thing that a step does
        is_inside.set()
        assert may_leave.wait(60)
        return decode(*arguments)

    session.decode = wait_and_decode
    caller = threading.Thread(target=lambda: frames.append(session.step(actions[:, 3])))
    caller.start()
    assert is_inside.wait(60)
    for verb, call in VERBS.items():
        with pytest.raises(RuntimeError, match=f"`{verb}` was called while this session is in the middle of `step`"):
            call(session, tmp_path / "session.safetensors")
    may_leave.set()
    caller.join()
    session.decode = decode
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.stack([first, *frames, session.step(actions[:, 4])], dim=1), expected)


def test_a_callback_in_the_middle_of_a_step_is_a_second_caller():
    session = start(pipeline())
    with pytest.raises(RuntimeError, match="`fork` was called while this session is in the middle of `advance`"):
        session.advance(None, on_step_end=lambda *_: session.fork())


class Interrupted(Exception):
    pass


def interrupt(*_):
    raise Interrupted


@pytest.mark.parametrize("config", [{}, {"action_shift": 0}, {"long_patch_size": None, "action_shift": 0}])
@pytest.mark.parametrize("num_before", [0, 3])
def test_a_step_that_fails_can_be_taken_otherwise(config, num_before):
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    session, straight = start(pipe, max_history=4), start(pipe)
    for each in (session, straight):
        for step in range(num_before):
            each.step(actions[:, 2 + step])
    other_action, decode = (actions[:, 5] + 1) % 3, session.decode
    for _ in range(2):
        with pytest.raises(Interrupted):
            session.advance(other_action, on_step_end=interrupt)
        session.decode = interrupt
        with pytest.raises(Interrupted):
            session.step(other_action)
        session.decode = decode
    assert session.num_frames == 3 + num_before and session.actions[-1] is None
    for step in (5, 6):
        torch.testing.assert_close(
            session.step(actions[:, step]), straight.step(actions[:, step]), atol=1e-5, rtol=1e-5
        )


def fail_in_last_block(session: FARSession):
    return session.rollout.transformer.transformer_blocks[-1].register_forward_pre_hook(interrupt)


def test_a_write_that_fails_midway_is_made_anew_from_the_whole_past():
    pipe = pipeline()
    _, actions = walk(pipe)
    session, straight = start(pipe), start(pipe)
    for each in (session, straight):
        go_on(each, actions, 0, 3)
    hook = fail_in_last_block(session)
    with pytest.raises(Interrupted):
        session.step(1)
    hook.remove()
    torch.testing.assert_close(session.step(2), straight.step(2), atol=1e-5, rtol=1e-5)


def test_a_cache_that_cannot_be_made_anew_is_never_gone_on_with(tmp_path):
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe, max_history=4)
    go_on(session, actions, 0, 3)
    hook = fail_in_last_block(session)
    with pytest.raises(Interrupted):
        session.step(1)
    hook.remove()
    for verb, call in VERBS.items():
        with pytest.raises(
            RuntimeError, match="failed while it wrote to the cache.*only 4 of 6 frames are remembered"
        ):
            call(session, tmp_path / "session.safetensors")
    assert len(session.frames) == 4


def test_a_write_that_is_refused_leaves_the_session_as_it_was():
    pipe = pipeline()
    _, actions = walk(pipe)
    session, straight = start(pipe, max_history=4), start(pipe)
    for each in (session, straight):
        go_on(each, actions, 0, 3)
    pipe.transformer.to(torch.float64)
    with pytest.raises(ValueError, match="`kv_cache` holds torch.float32"):
        session.step(1)
    pipe.transformer.to(torch.float32)
    assert torch.equal(session.step(2), straight.step(2))


def test_a_rewind_to_noise_of_a_device_that_is_not_here_leaves_the_session_as_it_was():
    session = tiny_pipeline().start_session(height=8, width=8, num_inference_steps=1)
    for _ in range(2):
        session.step()
    frame, latents = session.history.frames[1], session.latents
    frame.noise = replace(frame.noise, device="elsewhere")
    with pytest.raises(ValueError, match="'elsewhere', which this machine does not have"):
        session.rewind(1)
    assert torch.equal(session.latents, latents) and session.num_frames == 2


def test_sessions_of_one_pipeline_take_turns_without_noticing_each_other():
    pipe = pipeline()
    _, actions = walk(pipe)
    expected = go_on(start(pipe), actions, 0, 3)
    session, other = start(pipe), led_along(start(pipe, num_inference_steps=5), actions, expected[:, :1])
    frames = []
    for step in range(3):
        frames.append(session.step(actions[:, 2 + step]))
        other.step(1)
    assert torch.equal(torch.stack(frames, dim=1), expected)
