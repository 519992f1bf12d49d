"""Models as environments of Gymnasium: what Gymnasium asks of one, and what the package promises."""

import warnings
from functools import partial

import gymnasium
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.environments import FARWorldEnv, FARWorldVectorEnv


GAME = "diffusers_far.environments:FARWorld-v0"
SIZE = 8


@pytest.fixture(scope="module")
def pipe():
    own = {"action_names": ["left", "right", "stay"], "height": SIZE, "width": SIZE, "num_inference_steps": 2}
    return tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1), **own)


@pytest.fixture(scope="module")
def steered():
    return tiny_pipeline(
        tiny_transformer(action_dim=2, action_shift=1), height=SIZE, width=SIZE, num_inference_steps=2
    )


@pytest.fixture(scope="module")
def walks():
    """Four rows of 2, 5, 6 and 3 frames."""
    rows = [
        {"video": [PIL.Image.fromarray(frame) for frame in video(length)], "actions": [row % 3] * length}
        for row, length in enumerate((2, 5, 6, 3))
    ]
    return Dataset.from_list(rows, features=Features({"video": List(Image()), "actions": List(Value("int64"))}))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("environments") / "pipe"
    pipe.save_pretrained(folder)
    return str(folder)


def video(num_frames: int) -> np.ndarray:
    return np.random.default_rng(num_frames).integers(0, 256, (num_frames, SIZE, SIZE, 3), np.uint8)


def walk(world, seed, actions) -> list[np.ndarray]:
    return [world.reset(seed=seed)[0], *(world.step(action)[0] for action in actions)]


# What Gymnasium asks


def test_gymnasium_finds_nothing_to_warn_of_in_a_world_that_it_made(folder):
    world = gymnasium.make(GAME, pipe=folder, render_mode="rgb_array", max_episode_steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(world.unwrapped)


@pytest.mark.parametrize("begin", ["video", "dataset"])
def test_gymnasium_finds_nothing_to_warn_of_however_a_world_begins(pipe, walks, begin):
    context = (
        {"video": video(3), "actions": [0, 2]} if begin == "video" else {"dataset": walks, "num_context_frames": 3}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(FARWorldEnv(pipe, **context), skip_render_check=True)


def test_gymnasium_finds_nothing_to_warn_of_in_a_world_of_continuous_actions(steered):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(FARWorldEnv(steered), skip_render_check=True)


def test_gymnasium_makes_several_worlds_that_advance_together(folder):
    worlds = gymnasium.make_vec(GAME, num_envs=3, pipe=folder, max_episode_steps=5)
    assert isinstance(worlds.unwrapped, FARWorldVectorEnv)
    frames, _ = worlds.reset(seed=0)
    assert frames in worlds.observation_space and frames.shape == (3, SIZE, SIZE, 3)


# Spaces


def test_spaces_are_those_of_the_model(pipe, steered):
    world = FARWorldEnv(pipe)
    assert world.action_space == gymnasium.spaces.Discrete(3) and world.action_names == ["left", "right", "stay"]
    assert world.observation_space == gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    assert FARWorldEnv(steered, action_range=(-3, 2)).action_space == gymnasium.spaces.Box(-3, 2, (2,), np.float32)
    assert FARWorldEnv(pipe, height=16, width=12).observation_space.shape == (16, 12, 3)


# Frames


@pytest.mark.parametrize("begin", ["nothing", "video", "dataset"])
def test_the_same_seed_and_actions_make_the_same_frames_to_the_bit(pipe, walks, begin):
    context = {
        "nothing": {},
        "video": {"video": video(3), "actions": [0, 2]},
        "dataset": {"dataset": walks, "num_context_frames": 3},
    }[begin]
    world, again = FARWorldEnv(pipe, **context), FARWorldEnv(pipe, **context)
    first = walk(world, 5, [0, 2, 1])
    assert np.array_equal(first, walk(again, 5, [0, 2, 1])) and np.array_equal(first, walk(world, 5, [0, 2, 1]))
    assert not np.array_equal(first[1:], walk(world, 6, [0, 2, 1])[1:])
    assert not np.array_equal(first[1:], walk(world, 5, [1, 2, 1])[1:])


def test_a_world_without_a_new_seed_is_another_one_and_follows_from_the_last_seed(pipe):
    world = FARWorldEnv(pipe)
    first, second = walk(world, 1, []), walk(world, None, [])
    assert not np.array_equal(first, second)
    assert np.array_equal(walk(world, 1, []), first) and np.array_equal(walk(world, None, []), second)


def test_frames_are_those_of_a_session_behind_the_same_context(pipe):
    world = FARWorldEnv(pipe, video=video(3), actions=[0, 2], num_inference_steps=3)
    frames = walk(world, 0, [1, 0])
    noise = torch.Generator().manual_seed(int(gymnasium.utils.seeding.np_random(0)[0].integers(2**63)))
    session = pipe.start_session(
        video=video(3), actions=[0, 2], num_inference_steps=3, generator=noise, output_type="np"
    )
    expected = [session.frames[-1], session.step(1), session.step(0)]
    assert np.array_equal(frames, [np.round(frame[0] * 255) for frame in expected])


def test_a_world_from_a_dataset_begins_with_the_row_and_place_that_it_names(pipe, walks):
    world, seen = FARWorldEnv(pipe, dataset=walks, num_context_frames=3), set()
    for seed in range(40):
        frame, facts = world.reset(seed=seed)
        row, first = int(facts["row"]), int(facts["first_frame"])
        if (row, first) in seen:
            continue
        seen.add((row, first))
        context = np.stack([np.asarray(image) for image in walks[row]["video"][first : first + 3]])
        session = pipe.start_session(video=context, actions=walks[row]["actions"][:2], output_type="np")
        assert np.array_equal(frame, np.round(session.frames[-1][0] * 255))
        assert all(action.item() == row % 3 for action in world.session.actions[:2])
    assert seen == {
        *((1, first) for first in range(3)),
        *((2, first) for first in range(4)),
        (3, 0),
    }  # row 0 is too short


def test_each_of_several_worlds_is_that_of_its_own_seed_alone(pipe, walks):
    arguments = {"dataset": walks, "num_context_frames": 3, "max_episode_steps": 2}
    worlds, actions = FARWorldVectorEnv(pipe, 3, **arguments), np.array([[0, 1, 2], [2, 2, 0]])
    together = np.stack(walk(worlds, 7, actions), axis=1)
    for number in range(3):
        alone = FARWorldEnv(pipe, **arguments)
        frames = np.stack(walk(alone, 7 + number, actions[:, number]))
        assert np.abs(frames.astype(int) - together[number]).max() <= 1  # rounding, of one level
    assert np.array_equal(together, np.stack(walk(worlds, [7, 8, 9], actions), axis=1))


# Rewards and ends


def test_rewards_are_what_the_function_says_of_the_new_frame_and_the_action_that_led_to_it(pipe):
    world = FARWorldEnv(pipe, reward_fn=lambda frame, action: frame.mean() + 1000 * action)
    world.reset(seed=0)
    frame, reward, terminated, truncated, facts = world.step(2)
    assert reward == frame.mean() + 2000 and (terminated, truncated, facts) == (False, False, {})
    plain = FARWorldEnv(pipe)
    plain.reset(seed=0)
    assert plain.step(2)[1] == 0


def test_a_world_is_truncated_after_its_steps_and_then_refuses_to_go_on(pipe):
    world = FARWorldEnv(pipe, max_episode_steps=2)
    with pytest.raises(gymnasium.error.ResetNeeded, match="no world yet"):
        world.step(0)
    world.reset(seed=0)
    assert [world.step(0)[3] for _ in range(2)] == [False, True]
    with pytest.raises(gymnasium.error.ResetNeeded, match="was truncated"):
        world.step(0)


def test_several_worlds_end_together_and_the_next_step_begins_new_ones(pipe):
    worlds = FARWorldVectorEnv(pipe, 2, max_episode_steps=1, reward_fn=lambda frame, action: 1.0)
    assert worlds.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    worlds.reset(seed=0)
    _, rewards, terminations, truncations, _ = worlds.step(np.array([0, 1]))
    assert rewards.tolist() == [1, 1] and not terminations.any() and truncations.all()
    begun, rewards, terminations, truncations, _ = worlds.step(np.array([0, 1]))
    assert rewards.tolist() == [0, 0] and not terminations.any() and not truncations.any()
    other = FARWorldVectorEnv(pipe, 2)
    other.reset(seed=0)
    assert np.array_equal(begun, other.reset()[0])


def test_render_shows_the_frame_that_is_seen_and_changing_it_changes_nothing(pipe):
    world = FARWorldEnv(pipe, render_mode="rgb_array")
    world.reset(seed=0)
    frame = world.step(1)[0]
    world.render()[:] = 0
    assert np.array_equal(world.render(), frame) and frame.any()
    unseen, worlds = FARWorldEnv(pipe), FARWorldVectorEnv(pipe, 2, render_mode="rgb_array")
    with pytest.raises(gymnasium.error.ResetNeeded, match="no world yet"):
        unseen.render()
    unseen.reset()
    assert unseen.render() is None
    assert np.array_equal(worlds.reset(seed=0)[0], worlds.render())


def test_a_planner_forks_the_session_of_a_world(pipe):
    world = FARWorldEnv(pipe)
    world.reset(seed=0)
    future = world.session.fork().step(1)[0]
    assert np.array_equal(world.step(1)[0], np.round(future * 255))


# Refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_envs": 0}, "`num_envs` is 0"),
        ({"max_episode_steps": 0}, "`max_episode_steps` is 0"),
        ({"render_mode": "human"}, "`render_mode` is 'human'; choose one of rgb_array"),
        ({"video": video(3), "actions": [0]}, "`actions` has 1 frames"),
        ({"height": 7}, "multiples of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_before_a_world_is_asked_for(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        FARWorldVectorEnv(pipe, **arguments)


def test_datasets_that_no_world_can_begin_with_are_refused(pipe, walks):
    refused = partial(pytest.raises, ValueError)
    with refused(match="`num_context_frames` is 9 but the longest row of `dataset` has 6; choose fewer"):
        FARWorldEnv(pipe, dataset=walks, num_context_frames=9)
    with refused(match="it also needs `actions`"):
        FARWorldEnv(pipe, dataset=walks.remove_columns("actions"))
    with refused(match="`dataset` and `video` were both given"):
        FARWorldEnv(pipe, dataset=walks, video=video(3))


def test_a_model_without_actions_is_no_environment():
    with pytest.raises(ValueError, match="takes no actions"):
        FARWorldEnv(tiny_pipeline(height=SIZE, width=SIZE))


def test_what_a_reset_cannot_do_is_refused(pipe):
    with pytest.raises(ValueError, match=r"`options` has \['reset_mask'\]"):
        FARWorldVectorEnv(pipe, 2).reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="`seed` has 3 seeds but there are 2 worlds"):
        FARWorldVectorEnv(pipe, 2).reset(seed=[0, 1, 2])
