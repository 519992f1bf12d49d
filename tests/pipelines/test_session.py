import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test, tiny_pipeline, tiny_transformer

from diffusers_far import FARSession


NUM_CONTEXT, NUM_NEW = 3, 6


def pipeline(**overrides):
    config = {"long_patch_size": 2, "num_actions": 3, "action_shift": 1, **overrides}
    return tiny_pipeline(tiny_transformer(**config))


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (4, 5)]


def walk(pipe):
    """A context of two samples, and the actions taken at all frames but the last."""
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, NUM_CONTEXT, 3, 8, 12, generator=generator)
    shape = (2, NUM_CONTEXT + NUM_NEW - 1)
    if pipe.transformer.config.action_dim is not None:
        return video, torch.randn(*shape, pipe.transformer.config.action_dim, generator=generator)
    return video, torch.randint(0, 3, shape, generator=generator)


SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "pt"}


def start(pipe, **overrides):
    video, actions = walk(pipe)
    arguments = {"generator": generators(), **SETTINGS, **overrides}
    return pipe.start_session(video=video, actions=actions[:, : NUM_CONTEXT - 1], **arguments)


def go_on(session, actions, first=0, end=NUM_NEW):
    """Frames of the steps from `first` up to and without `end`, `(B, F, 3, h, w)`."""
    return torch.stack([session.step(actions[:, NUM_CONTEXT - 1 + step]) for step in range(first, end)], dim=1)


def call(pipe, **overrides):
    video, actions = walk(pipe)
    arguments = {"generator": generators(), **SETTINGS, **overrides}
    return pipe(video=video, actions=actions, num_frames=NUM_NEW, **arguments).frames


MODELS = [{}, {"long_patch_size": None}, {"num_actions": None, "action_dim": 2}]


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("options", [{}, {"short_cache": "rolling"}, {"short_cache": 2}])
def test_steps_are_bit_equal_to_the_call(config, options):
    if config.get("long_patch_size", 2) is None and options:
        pytest.skip("no frame is long")
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    assert torch.equal(go_on(start(pipe, **options), actions), call(pipe, **options))


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
    again = go_on(session, actions, num_steps - num_back, num_steps)
    torch.testing.assert_close(again, expected[:, num_steps - num_back :], atol=1e-5, rtol=1e-5)


def test_going_back_further_than_is_remembered_is_refused():
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe, max_history=4)
    go_on(session, actions)
    with pytest.raises(ValueError, match="`num_frames` is 4 but 4 of 9 frames are remembered"):
        session.rewind(4)
    assert session.num_frames == NUM_CONTEXT + NUM_NEW


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_long_frames": 3, "num_sink_frames": 1}, {"short_cache": "rolling"}])
def test_a_loaded_session_goes_on_bit_equal(config, options, tmp_path):
    if config.get("long_patch_size", 2) is None and options:
        pytest.skip("no frame is long")
    pipe = pipeline(**config)
    _, actions = walk(pipe)
    session = start(pipe, **options)
    go_on(session, actions, 0, 3)
    session.save(tmp_path / "session.safetensors")
    expected = go_on(session, actions, 3)
    loaded = FARSession.load(pipe, tmp_path / "session.safetensors")
    assert torch.equal(go_on(loaded, actions, 3), expected)
    assert loaded.num_frames == session.num_frames and torch.equal(loaded.latents, session.latents)


@pytest.mark.full
def test_a_session_goes_on_bit_equal_in_another_process(tmp_path):
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe)
    go_on(session, actions, 0, 3)
    session.save(tmp_path / "session.safetensors")
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(actions, tmp_path / "actions.pt")
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from diffusers_far import FARPipeline, FARSession
        from test_session import go_on
        torch.set_num_threads(1)
        pipe = FARPipeline.from_pretrained({str(tmp_path / "pipe")!r})
        session = FARSession.load(pipe, {str(tmp_path / "session.safetensors")!r})
        torch.save(go_on(session, torch.load({str(tmp_path / "actions.pt")!r}), 3), {str(tmp_path / "frames.pt")!r})
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "frames.pt"), go_on(session, actions, 3))


def test_a_session_is_never_written_over(tmp_path):
    session = start(pipeline())
    session.save(tmp_path / "session.safetensors")
    with pytest.raises(ValueError, match="exists and would be overwritten"):
        session.save(tmp_path / "session.safetensors")


def test_files_that_are_no_session_of_this_model_are_refused(tmp_path):
    pipe = pipeline()
    start(pipe).save(tmp_path / "session.safetensors")
    with pytest.raises(ValueError, match="of another transformer: num_layers differ"):
        FARSession.load(pipeline(num_layers=1), tmp_path / "session.safetensors")
    content = (tmp_path / "session.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        FARSession.load(pipe, tmp_path / "truncated.safetensors")


def test_settings_change_between_steps():
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe)
    go_on(session, actions, 0, 2)
    session.set_config(num_inference_steps=3)
    assert session.rollout.num_steps == 3
    session.set_config(guidance_scale=1.0)  # the null half goes: the past is encoded anew
    expected = start(pipe, guidance_scale=1.0, num_inference_steps=3)
    expected._history = list(session._history)
    expected.num_frames = expected._num_unwritten = session.num_frames
    for ours, theirs in zip(session.generator, expected.generator):
        theirs.set_state(ours.get_state())
    frame = session.step(actions[:, NUM_CONTEXT + 1])
    assert session.rollout.kv_cache.batch_size == 2
    assert torch.equal(frame, expected.step(actions[:, NUM_CONTEXT + 1]))


def test_a_session_can_start_from_nothing():
    pipe = pipeline()
    session = pipe.start_session(height=8, width=12, num_inference_steps=1, output_type="pt")
    with pytest.raises(ValueError, match="there is no frame yet"):
        session.step(1)
    assert session.step().shape == (1, 3, 8, 12)
    assert session.step(1).shape == (1, 3, 8, 12)
    assert [action if action is None else action.item() for action in session.actions] == [1, None]


@pytest.mark.parametrize(
    "action, message", [(None, "`actions` is None"), (3, "0 to 2"), (0.5, "dtype"), ([0, 1, 2], "3 rows")]
)
def test_a_bad_action_is_refused_and_the_session_stays_as_it_was(action, message):
    session = start(pipeline())
    with pytest.raises(ValueError, match=message):
        session.step(action)
    assert session.num_frames == NUM_CONTEXT


def test_the_actions_of_the_context_are_one_fewer_than_its_frames():
    pipe = pipeline()
    video, actions = walk(pipe)
    with pytest.raises(ValueError, match="`actions` has 3 frames but"):
        pipe.start_session(video=video, actions=actions[:, :NUM_CONTEXT])


def test_without_an_action_shift_the_new_frame_is_fed_the_null_action():
    pipe = pipeline(action_shift=0)
    _, actions = walk(pipe)
    session = start(pipe)
    fed = []
    denoise = session.rollout.denoise
    session.rollout.denoise = lambda frame, *rest: (fed.append(frame.action_mask), denoise(frame, *rest))[1]
    writes = []
    write = session.rollout.write
    session.rollout.write = lambda frames: (writes.append(frames), write(frames))[1]
    go_on(session, actions, 0, 2)
    assert not any(mask.any() for mask in fed)
    assert torch.equal(writes[0].actions, actions[:, :NUM_CONTEXT]) and writes[0].action_mask.all()
    assert torch.equal(writes[1].actions, actions[:, NUM_CONTEXT : NUM_CONTEXT + 1])


def test_history_is_bounded():
    pipe = pipeline()
    _, actions = walk(pipe)
    session = start(pipe, max_history=4, max_long_frames=2)
    go_on(session, actions)
    assert len(session.frames) == 4 and session.num_frames == NUM_CONTEXT + NUM_NEW
    assert session.rollout.kv_cache.plan.num_long_frames <= 2


def test_two_callers_cannot_step_one_session_at_once():
    session = start(pipeline())
    is_inside, may_leave = threading.Event(), threading.Event()
    denoise = session.rollout.denoise

    def wait(*arguments):
        is_inside.set()
        may_leave.wait(10)
        return denoise(*arguments)

    session.rollout.denoise = wait
    first = threading.Thread(target=session.step, args=(0,))
    first.start()
    is_inside.wait(10)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        session.step(0)
    may_leave.set()
    first.join()
    assert session.num_frames == NUM_CONTEXT + 1
