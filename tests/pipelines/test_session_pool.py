"""Sessions that share passes come out as they would alone, whatever the others do."""

import random
import threading
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import property_test, tiny_pipeline, tiny_separable, tiny_transformer

from diffusers_far import FARPipeline, FARSession, FlexRoPEConfig, SessionPool
from diffusers_far.pipelines.session_pool import PoolFullError


FAR = {"num_actions": 3, "action_shift": 1, "long_patch_size": 2, "num_layers": 1}
BASE = {**FAR, "long_patch_size": None}
MODELS = {  # a model, its config, how sessions are started
    "base": (tiny_transformer, BASE, {}),
    "base, own action, guided": (tiny_transformer, {**BASE, "action_shift": 0}, {"guidance_scale": 1.5}),
    "base, labels": (tiny_transformer, {**BASE, "num_classes": 2}, {"class_labels": [1], "guidance_scale": 1.5}),
    "long": (tiny_transformer, FAR, {}),
    "long, own action, interval": (tiny_transformer, {**FAR, "action_shift": 0}, {"short_cache": 2}),
    "long, rolling, guided": (tiny_transformer, FAR, {"short_cache": "rolling", "guidance_scale": 1.5}),
    "long, bounded": (tiny_transformer, FAR, {"max_long_frames": 3, "num_sink_frames": 1}),
    "separable": (tiny_separable, {k: v for k, v in BASE.items() if k != "num_layers"}, {"guidance_scale": 1.5}),
    "separable, feature": (
        tiny_separable,
        {k: v for k, v in FAR.items() if k != "num_layers"},
        {"guidance_scale": 2.0, "guidance_mode": "feature"},
    ),
}
all_models = pytest.mark.parametrize("model, config, options", MODELS.values(), ids=MODELS)


def started(pipe: FARPipeline, num_frames: int, seed: int = 0, **options) -> FARSession:
    """A session of one sample with a context; none for 0 frames."""
    generator = torch.Generator().manual_seed(seed)
    context = {"height": 8, "width": 8}
    if num_frames:
        actions = torch.randint(0, 3, (1, num_frames - 1), generator=generator)
        context = {"video_latents": torch.randn(1, num_frames, 4, 4, 4, generator=generator), "actions": actions}
    defaults = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipe.start_session(**context, **{**defaults, **options})


def assert_same(frame: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(frame, expected, rtol=0, atol=1e-5)


@all_models
def test_players_of_unequal_length_see_what_they_would_see_alone(model, config, options):
    pipe = tiny_pipeline(model(**config))
    pool, alone = SessionPool(), {}
    for seed, num_frames in enumerate((3, 6, 1, 0)):
        session = started(pipe, num_frames, seed, **options)
        alone[pool.add(session)] = session.fork()
    for step in range(4):
        actions = {player: (player + step) % 3 if twin.num_frames else None for player, twin in alone.items()}
        frames = pool.step(actions)
        for player, twin in alone.items():
            assert_same(frames[player], twin.step(actions[player]))


def test_ten_players_join_leave_fork_go_back_stall_and_fail_and_everybody_sees_the_right_frames():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool, alone, chance = SessionPool(max_players=10), {}, random.Random(0)

    def join(session: FARSession) -> None:
        alone[pool.add(session)] = session.fork()

    for seed, num_frames in enumerate((3, 5, 8, 13, 21, 34, 55, 89, 144, 200)):
        join(started(pipe, num_frames, seed))
    stalled, failing = 3, 7
    broken = pool.players[failing].rollout
    for turn in range(8):
        if turn % 4 == 1:
            left = chance.choice([player for player in alone if player not in (stalled, failing)])
            session = pool.remove(left)
            assert_same(session.step(0), alone.pop(left).step(0))
            join(session.fork())
        if turn % 4 == 2:
            left = chance.choice([player for player in alone if player not in (stalled, failing)])
            pool.remove(left), alone.pop(left)
            join(pool.players[chance.choice(list(alone))].fork())
        for player in chance.sample([each for each in alone if each not in (stalled, failing)], 3):
            num_frames = min(chance.randrange(4), pool.players[player].num_rewindable)
            pool.players[player].rewind(num_frames), alone[player].rewind(num_frames)
        actions = {player: chance.randrange(3) for player in alone if player != stalled or turn % 5 == 4}
        with patch.object(broken.kv_cache, "begin_noisy", side_effect=MemoryError("no room")):
            frames = pool.step(actions)
        assert isinstance(frames.pop(failing), MemoryError)
        assert frames.keys() == actions.keys() - {failing} and len(frames) >= 8
        for player, frame in frames.items():
            assert_same(frame, alone[player].step(actions[player]))
    assert_same(pool.step({failing: 1})[failing], alone[failing].step(1))


@pytest.mark.parametrize("name", ["base", "long, rolling, guided", "separable"])
def test_players_see_what_flex_rope_lets_them_see(name):
    model, config, options = MODELS[name]
    pipe = tiny_pipeline(model(**config))
    pipe.enable_flex_rope(FlexRoPEConfig(slope=0.3, schedule=lambda frame, step, num_steps: 0.02 * frame))
    pool, alone = SessionPool(), {}
    for seed, num_frames in enumerate((2, 7, 4)):
        session = started(pipe, num_frames, seed, **options)
        alone[pool.add(session)] = session.fork()
    for _ in range(3):
        for player, frame in pool.step(dict.fromkeys(alone, 1)).items():
            assert_same(frame, alone[player].step(1))


@settings(property_test, max_examples=6)
@given(st.randoms(use_true_random=False), st.sampled_from(list(MODELS)))
def test_whatever_players_do_their_frames_are_those_of_sessions_alone(chance, name):
    model, config, options = MODELS[name]
    pipe = tiny_pipeline(model(**config))
    pool, alone = SessionPool(max_players=4), {}
    for _ in range(4):
        if len(alone) < 4:
            session = started(pipe, chance.randrange(1, 7), chance.randrange(99), **options)
            alone[pool.add(session)] = session.fork()
        player = chance.choice(list(alone))
        num_frames = chance.randrange(1 + pool.players[player].num_rewindable)
        pool.players[player].rewind(num_frames), alone[player].rewind(num_frames)
        actions = {each: chance.randrange(3) for each in alone if chance.random() < 0.7}
        for each, frame in pool.step(actions).items():
            assert_same(frame, alone[each].step(actions[each]))


def test_settings_may_differ_between_players_and_change():
    pipe = tiny_pipeline(tiny_transformer(**FAR))
    pool, alone = SessionPool(), {}
    kinds = [
        {},
        {"num_inference_steps": 3},
        {"guidance_scale": 1.5},
        {"short_cache": "rolling"},
        {"output_type": "pt"},
    ]
    for seed, options in enumerate(kinds):
        session = started(pipe, 4, seed, **options)
        alone[pool.add(session)] = session.fork()
    for step in range(3):
        if step == 1:
            for sessions in (pool.players, alone):
                sessions[1].set_config(num_inference_steps=4, guidance_scale=2.0)
                sessions[2].set_latency_budget(1e9, min_inference_steps=1)
        for player, frame in pool.step(dict.fromkeys(alone, step)).items():
            assert_same(frame, alone[player].step(step))
    assert pool.players[1].num_inference_steps_used == 4


def test_players_of_one_kind_share_each_pass_of_the_model():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool = SessionPool()
    players = [pool.add(started(pipe, num_frames, num_frames)) for num_frames in (3, 20, 7)]
    pool.step(dict.fromkeys(players, 0))
    with patch.object(pipe.transformer, "forward", wraps=pipe.transformer.forward) as forward:
        pool.step(dict.fromkeys(players, 0))
    assert [call.args[0].shape[:2] for call in forward.call_args_list] == [(3, 1)] * 2  # a write and a step


def test_no_key_of_a_context_is_copied_or_padded():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool = SessionPool()
    players = [pool.add(started(pipe, num_frames, num_frames)) for num_frames in (3, 20)]
    pool.step(dict.fromkeys(players, 0))
    seen = []

    def attend(self, query, key, value, mask):
        seen.append((key.data_ptr(), key.shape[1], mask))
        return torch.zeros_like(query)

    with patch("diffusers_far.models.frame_network.FARAttnProcessor._attend", attend):
        pool.step(dict.fromkeys(players, 0))
    stores = [session.rollout.kv_cache._key_stores for session in pool.players.values()]
    assert {pointer for pointer, _, _ in seen} == {store.data_ptr() for store in stores}
    assert {(length, mask) for _, length, mask in seen} == {(5 * 16, None), (22 * 16, None)}  # with the noisy frame


def test_a_pool_that_is_full_says_so():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool = SessionPool(max_players=2)
    first = pool.add(started(pipe, 2))
    pool.add(started(pipe, 2))
    with pytest.raises(PoolFullError, match=r"The pool is full: 2 players .*`remove`.* `max_players`"):
        pool.add(started(pipe, 2))
    pool.remove(first)
    assert pool.add(started(pipe, 2)) == 3 and list(pool.players) == [2, 3]


def test_who_waits_longest_is_served_first():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool = SessionPool(max_players_per_pass=2)
    players = [pool.add(started(pipe, 2, seed)) for seed in range(3)]
    frames = {player: pool.submit(player, 0) for player in players}
    assert pool.advance() == 2 and [frame.done() for frame in frames.values()] == [True, True, False]
    frames[1] = pool.submit(1, 0)  # an eager player
    frames[2] = pool.submit(2, 0)
    assert pool.advance() == 2 and [frames[player].done() for player in players] == [True, False, True]
    assert pool.advance() == 1 and frames[2].done() and pool.advance() == pool.num_waiting == 0


def test_who_leaves_or_cancels_is_not_waited_for():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool = SessionPool()
    players = [pool.add(started(pipe, 2, seed)) for seed in range(3)]
    frames = [pool.submit(player, 0) for player in players]
    session = pool.remove(players[0])
    frames[1].cancel()
    assert pool.advance() == 1 and [frame.cancelled() for frame in frames] == [True, True, False]
    assert session.num_frames == pool.players[players[1]].num_frames == 2 and pool.players[players[2]].num_frames == 3


def test_what_cannot_be_is_refused_by_name_and_takes_nobody_along(tmp_path):
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool, session = SessionPool(), started(pipe, 2)
    player, other = pool.add(session), pool.add(started(pipe, 3))
    for wrong, message in {
        session: "has joined this pool already",
        started(tiny_pipeline(tiny_transformer(**BASE)), 2): "of another pipeline",
        session.fork_batch(2): "a batch of futures",
        pipe.start_session(video_latents=torch.zeros(2, 1, 4, 4, 4)): "a batch of 2",
    }.items():
        with pytest.raises(ValueError, match=message):
            pool.add(wrong)
    with pytest.raises(ValueError, match="`max_players` is 0"):
        SessionPool(0)
    with pytest.raises(KeyError, match="no player 9"):
        pool.submit(9, 0)
    with pytest.raises(ValueError, match="`actions` has values from 3 to 3"):
        pool.submit(player, 3)
    outcome = pool.step({player: None, other: 1, 9: 0})
    assert isinstance(outcome[player], ValueError) and isinstance(outcome[9], KeyError)
    assert outcome[other].shape == (1, 4, 4, 4)
    pool.submit(player, 0)
    with pytest.raises(RuntimeError, match="has sent an action that has no frame yet"):
        pool.submit(player, 0)


def test_a_step_together_that_is_interrupted_changes_no_session_and_is_told_to_all():
    pipe = tiny_pipeline(tiny_transformer(**{**BASE, "action_shift": 0}))
    pool, alone = SessionPool(), {}
    for seed, num_frames in enumerate((2, 5)):
        session = started(pipe, num_frames, seed)
        alone[pool.add(session)] = session.fork()
    pool.step(dict.fromkeys(alone, 2)), [twin.step(2) for twin in alone.values()]
    frames = [pool.submit(player, 0) for player in alone]
    with patch.object(FARPipeline, "decode_frame", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        for session in pool.players.values():
            session.decode = pipe.decode_frame
        pool.advance()
    for session in pool.players.values():
        session.decode = pipe.decode_frame
    assert all(isinstance(frame.exception(), KeyboardInterrupt) for frame in frames) and pool.num_waiting == 0
    for player, frame in pool.step(dict.fromkeys(alone, 1)).items():
        assert_same(frame, alone[player].step(1))


def test_players_in_threads_of_their_own_are_served_and_a_pause_holds_the_model():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    pool, alone, made = SessionPool(), {}, {}
    for seed, num_frames in enumerate((2, 6, 4)):
        session = started(pipe, num_frames, seed)
        alone[pool.add(session)] = session.fork()

    def play(player: int) -> None:
        made[player] = [pool.submit(player, action).result(timeout=60) for action in (0, 1, 2, 1)]

    with pool.serving():
        threads = [threading.Thread(target=play, args=(player,)) for player in alone]
        for thread in threads:
            thread.start()
        with pool.paused():
            assert torch.isfinite(alone[1].fork_batch(2).step(0)).all()
        for thread in threads:
            thread.join()
    for player, twin in alone.items():
        for frame, action in zip(made[player], (0, 1, 2, 1), strict=True):
            assert_same(frame, twin.step(action))
