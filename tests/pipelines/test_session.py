import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL.Image import Image
from session_walks import (
    MODELS,
    NUM_CONTEXT,
    NUM_NEW,
    SETTINGS,
    call,
    generators,
    go_on,
    led_along,
    pipeline,
    start,
    walk,
)
from tiny_models import property_test, tensors_of

from diffusers_far import FARSession


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("options", [{}, {"short_cache": "rolling"}, {"short_cache": 2}, {"max_history": 3}])
def test_steps_are_bit_equal_to_the_call_and_the_stream(config, options):
    if config.get("long_patch_size", 2) is None and "short_cache" in options:
        pytest.skip("no frame is long")
    pipe = pipeline(**config)
    video, actions = walk(pipe)
    steps = go_on(start(pipe, **options), actions)
    options = {name: value for name, value in options.items() if name != "max_history"}
    assert torch.equal(steps, call(pipe, **options))
    stream = pipe.stream(
        video=video, actions=actions, num_frames=NUM_NEW, generator=generators(), **SETTINGS, **options
    )
    assert torch.equal(steps, torch.stack(list(stream), dim=1))


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_long_frames": 4}, {"short_cache": "rolling"}])
def test_inference_mode_changes_no_frame_and_the_model_learns_afterwards(config, options):
    if config.get("long_patch_size", 2) is None and options:
        pytest.skip("no frame is long")
    pipe = pipeline(**config)
    video, actions = walk(pipe)
    expected = go_on(start(pipe, **options), actions)
    latents, model = torch.ones(2, 4, 4, 4, 6), pipe.transformer
    with torch.inference_mode():
        assert torch.equal(go_on(start(pipe, **options), actions), expected)
        model(latents, 500.0, actions=actions[:, :4])  # what is kept of its positions is then of this mode
    model.train()(latents, 500.0, actions=actions[:, :4]).sample.sum().backward()
    assert model.proj_out.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "output_type, kind, shape",
    [("pil", list, (2,)), ("np", np.ndarray, (2, 8, 12, 3)), ("pt", torch.Tensor, (2, 3, 8, 12))],
)
def test_frames_are_what_the_steps_returned(output_type, kind, shape):
    pipe = pipeline()
    session = start(pipe, output_type=output_type)
    frame = session.step(0)
    assert isinstance(frame, kind) and np.shape(frame)[: len(shape)] == shape
    assert output_type != "pil" or all(isinstance(image, Image) for image in frame)
    assert len(session.frames) == session.num_frames == NUM_CONTEXT + 1
    assert np.array_equal(np.stack(session.frames[-1]), np.stack(frame))


def test_actions_are_those_taken_at_the_frames_that_are_remembered():
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe, max_history=5)
    go_on(session, actions)
    assert len(session.actions) == 5 and session.actions[-1] is None
    assert torch.equal(torch.stack(session.actions[:-1], dim=1), actions[:, -4:])


@pytest.mark.parametrize("config", MODELS)
def test_a_fork_and_its_origin_each_go_their_own_way(config):
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    session = start(pipe)
    first = go_on(session, actions, 0, 2)
    fork = session.fork()
    other_actions = actions.roll(1, dims=0)
    other = go_on(fork, other_actions, 2)
    rest = go_on(session, actions, 2)
    assert torch.equal(torch.cat([first, rest], dim=1), call(pipe))
    straight = start(pipe)
    go_on(straight, actions, 0, 2)
    assert torch.equal(other, go_on(straight, other_actions, 2))


def test_a_fork_costs_a_copy_of_the_cache_and_shares_the_latents():
    pipe = pipeline()
    session = start(pipe)
    session.step(0)
    fork = session.fork()
    cache = session.rollout.kv_cache
    stores = cache._key_stores.nbytes + cache._value_stores.nbytes
    assert session.rollout.num_bytes == fork.rollout.num_bytes == stores
    assert fork.rollout.kv_cache._key_stores.data_ptr() != cache._key_stores.data_ptr()
    for ours, theirs in zip(session.history.frames, fork.history.frames):
        assert ours is not theirs and ours.latents is theirs.latents
    remembered = sum(
        tensor.nbytes
        for frame in session.history.frames
        for tensor in tensors_of(
            frame.latents, frame.previous_action, frame.action, getattr(frame.noise, "states", None)
        )
    )
    assert session.num_bytes == stores + remembered


@property_test
@given(num_steps=st.integers(1, NUM_NEW), num_back=st.integers(1, NUM_NEW), config=st.sampled_from(MODELS))
def test_going_back_and_acting_the_same_makes_the_same_frames(num_steps, num_back, config):
    num_back = min(num_back, num_steps)
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    session = start(pipe)
    expected = go_on(session, actions, 0, num_steps)
    session.rewind(num_back)
    assert session.num_frames == NUM_CONTEXT + num_steps - num_back
    assert session.actions[-1] is None
    again = go_on(session, actions, num_steps - num_back, num_steps)
    torch.testing.assert_close(again, expected[:, num_steps - num_back :], atol=1e-5, rtol=1e-5)


def test_going_back_into_the_context_draws_the_noise_from_its_start():
    pipe = pipeline()
    video, actions = walk(pipe)
    session = start(pipe)
    go_on(session, actions, 0, 2)
    session.rewind(3)
    shorter = pipe.start_session(
        video_latents=session.latents, actions=actions[:, : NUM_CONTEXT - 2], generator=generators(), **SETTINGS
    )
    action = actions[:, NUM_CONTEXT - 2]
    torch.testing.assert_close(session.step(action), shorter.step(action), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config, max_history, num_rewindable",
    [({}, 4, 1), ({}, 3, 0), ({}, None, 8), ({"long_patch_size": None}, 4, 3), ({"long_patch_size": None}, 1, 0)],
)
def test_a_session_goes_back_as_far_as_it_says_and_no_further(config, max_history, num_rewindable):
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    session = start(pipe, max_history=max_history)
    go_on(session, actions)
    assert session.num_rewindable == num_rewindable
    before = session.latents
    for too_many in (num_rewindable + 1, -1, 1.0, True):
        with pytest.raises(
            ValueError, match=f"`num_frames` is {too_many} but this session can go back {num_rewindable}"
        ):
            session.rewind(too_many)
    assert torch.equal(session.latents, before) and session.num_frames == NUM_CONTEXT + NUM_NEW
    session.rewind(num_rewindable)
    assert session.num_frames == NUM_CONTEXT + NUM_NEW - num_rewindable
    assert session.step(0).isfinite().all()


def test_where_the_cache_has_forgotten_the_sinks_and_the_short_window_stay():
    pipe = pipeline()
    session = start(pipe, max_long_frames=4, num_sink_frames=1)
    for _ in range(6):
        session.step(0)
    cached = session.rollout.kv_cache.num_frames
    assert session.num_frames == NUM_CONTEXT + 6 and cached < session.rollout.num_frames
    assert (
        session.num_rewindable == cached - 3
    )  # one sink and a window of two clean frames stay; the last is unwritten
    session.rewind(session.num_rewindable)
    assert session.step(0).isfinite().all()


@st.composite
def verbs(draw):
    """A random sequence of what a player does."""
    verb = st.one_of(
        st.tuples(st.just("step"), st.integers(0, 2)),
        st.tuples(st.just("rewind"), st.integers(0, 4)),
        st.tuples(st.sampled_from(["fork", "reload"]), st.none()),
    )
    return draw(st.lists(verb, min_size=4, max_size=10))


@property_test
@given(
    sequence=verbs(),
    config=st.sampled_from([{}, {"long_patch_size": None}, {"action_shift": 0}]),
    options=st.sampled_from([{}, {"max_history": 5}, {"short_cache": 2}]),
)
def test_whatever_a_player_does_equals_a_straight_run(sequence, config, options, tmp_path_factory):
    if config.get("long_patch_size", 2) is None:
        options = {name: value for name, value in options.items() if name != "short_cache"}
    pipe = pipeline(**config)
    session, taken = start(pipe, **options), []
    for verb, value in sequence:
        if verb == "step":
            session.step(value)
            taken.append(value)
        elif verb == "rewind":
            num_back = min(value, session.num_rewindable, len(taken))
            session.rewind(num_back)
            taken = taken[: len(taken) - num_back]
        elif verb == "fork":
            origin, session = session, session.fork()
            origin.step(1)
        else:
            path = tmp_path_factory.mktemp("sessions") / "session.safetensors"
            session.save(path)
            session = FARSession.load(pipe, path)
    straight = start(pipe, **options)
    for action in taken:
        straight.step(action)
    num_common = min(len(session.frames), len(straight.frames))
    torch.testing.assert_close(
        session.latents[:, -num_common:], straight.latents[:, -num_common:], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(session.step(2), straight.step(2), atol=1e-5, rtol=1e-5)


def test_a_session_can_start_from_nothing():
    pipe = pipeline()
    session = pipe.start_session(height=8, width=12, num_inference_steps=1, output_type="pt")
    assert session.latents.shape == (1, 0, 4, 4, 6) and session.frames == session.actions == []
    with pytest.raises(ValueError, match="there is no frame yet"):
        session.step(1)
    assert session.step().shape == (1, 3, 8, 12)
    assert session.step(1).shape == (1, 3, 8, 12)
    assert [action if action is None else action.item() for action in session.actions] == [1, None]
    assert session.num_rewindable == 1


@pytest.mark.parametrize(
    "action, message",
    [(None, "`actions` is None"), (3, "0 to 2"), (0.5, "dtype"), ([0, 1, 2], "3 rows"), ("left", "cannot be read")],
)
def test_a_bad_action_is_refused_and_the_session_stays_as_it_was(action, message):
    session = start(pipeline())
    with pytest.raises(ValueError, match=message):
        session.step(action)
    assert session.num_frames == NUM_CONTEXT
    session.step(0)


def test_the_actions_of_the_context_are_one_fewer_than_its_frames():
    pipe = pipeline()
    video, actions = walk(pipe)
    with pytest.raises(ValueError, match="`actions` has 3 frames but"):
        pipe.start_session(video=video, actions=actions[:, :NUM_CONTEXT])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_history": 2}, "`max_history` is 2 but the short window alone has 3 frames"),
        ({"max_history": 0}, "`max_history` is 0"),
        ({"max_seconds_per_frame": 0}, "`max_seconds_per_frame` is 0"),
        ({"max_seconds_per_frame": float("nan")}, "`max_seconds_per_frame` is nan"),
        ({"min_inference_steps": 0}, "`min_inference_steps` is 0"),
    ],
)
def test_a_session_that_could_not_go_on_is_refused_before_the_context_is_encoded(arguments, message, monkeypatch):
    pipe = pipeline()
    monkeypatch.setattr(pipe, "_encode_context", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=message):
        start(pipe, **arguments)


def test_without_an_action_shift_the_new_frame_is_fed_the_null_action():
    pipe = pipeline(action_shift=0)
    _, actions = walk(pipe)
    session = start(pipe)
    fed = []
    denoise = session.rollout.denoise
    session.rollout.denoise = lambda frame, *rest: (fed.append(frame.action_mask), denoise(frame, *rest))[1]
    writes = []
    write = session.rollout.write
    session.rollout.write = lambda frames, coming: (writes.append(frames), write(frames, coming))[1]
    go_on(session, actions, 0, 2)
    assert not any(mask.any() for mask in fed)
    assert torch.equal(writes[0].actions, actions[:, :NUM_CONTEXT]) and writes[0].action_mask.all()
    assert torch.equal(writes[1].actions, actions[:, NUM_CONTEXT : NUM_CONTEXT + 1])


def test_what_the_caller_does_with_its_tensors_is_not_done_to_the_session():
    pipe = pipeline()
    video, actions = walk(pipe)
    latents = torch.randn(2, NUM_CONTEXT, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    runs = []
    for scribble in (False, True):
        context, context_actions = latents.clone(), actions[:, : NUM_CONTEXT - 1].clone()
        session = pipe.start_session(
            video_latents=context, actions=context_actions, generator=generators(), **SETTINGS
        )
        if scribble:
            context.zero_(), context_actions.zero_()
        for step in range(2):
            action = actions[:, NUM_CONTEXT - 1 + step].clone()
            frame = session.step(action)
            if scribble:
                frame.zero_(), action.zero_(), session.frames[-1].zero_(), session.actions[-2].zero_()
        runs.append(session.step(actions[:, NUM_CONTEXT + 1]))
    assert torch.equal(*runs)


def test_a_callback_may_use_its_memory_again():
    pipe = pipeline()
    _, actions = walk(pipe)
    memory = torch.zeros(2, 1, 4, 4, 6)
    session = start(pipe)
    for step in range(2):
        session.advance(actions[:, 2], on_frame_end=lambda latents, step=step: memory.fill_(step))
    assert session.latents[:, -2].eq(0).all() and session.latents[:, -1].eq(1).all()


def test_a_session_led_along_frames_goes_on_from_these():
    pipe = pipeline()
    _, actions = walk(pipe)
    frames = go_on(start(pipe, guidance_scale=1.0), actions, 0, 3)
    session = led_along(start(pipe), actions, frames)
    assert torch.equal(session.latents[:, NUM_CONTEXT:], frames)


@pytest.mark.parametrize("take_along", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_session_is_neither_pickled_nor_copied_and_says_what_to_do(take_along):
    session = start(pipeline())
    with pytest.raises(TypeError, match="use `fork` for another one .* and `save` and `FARSession.load`"):
        take_along(session)
    session.step(0)
