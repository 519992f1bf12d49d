"""Futures of one present: they come out as forks do, and store what they share once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test, tiny_pipeline, tiny_separable, tiny_transformer

from diffusers_far import FARSession, FlexRoPEConfig


FAR = {"num_actions": 3, "action_shift": 1, "long_patch_size": 2}
BASE = {**FAR, "long_patch_size": None}
CASES = {  # model, its config, how the session is started, frames that it has made before
    "base": (tiny_transformer, BASE, {}, 2),
    "base, guided, context": (tiny_transformer, BASE, {"guidance_scale": 1.5}, 0),
    "base, own action": (tiny_transformer, {**BASE, "action_shift": 0}, {"guidance_scale": 1.5}, 2),
    "base, continuous": (tiny_transformer, {**BASE, "num_actions": None, "action_dim": 2}, {}, 0),
    "base, labels": (tiny_transformer, {**BASE, "num_classes": 2}, {"class_labels": [1], "guidance_scale": 1.5}, 2),
    "long": (tiny_transformer, FAR, {"guidance_scale": 1.5}, 3),
    "long, context": (tiny_transformer, FAR, {}, 0),
    "long, own action": (tiny_transformer, {**FAR, "action_shift": 0}, {}, 2),
    "long, interval": (tiny_transformer, {**FAR, "short_window": 4}, {"short_cache": 2}, 2),
    "long, rolling": (tiny_transformer, {**FAR, "short_window": 4}, {"short_cache": "rolling"}, 5),
    "long, rolling, own action": (tiny_transformer, {**FAR, "action_shift": 0}, {"short_cache": "rolling"}, 0),
    "long, rolling, unfilled": (tiny_transformer, {**FAR, "short_window": 9}, {"short_cache": "rolling"}, 1),
    "long, window of one": (tiny_transformer, {**FAR, "short_window": 1}, {"short_cache": "rolling"}, 2),
    "long, bounded": (tiny_transformer, FAR, {"max_long_frames": 2, "num_sink_frames": 1}, 3),
    "separable": (tiny_separable, BASE, {"guidance_scale": 1.5}, 2),
    "separable, feature": (tiny_separable, BASE, {"guidance_scale": 2.0, "guidance_mode": "feature"}, 2),
    "separable, long": (tiny_separable, FAR, {"short_cache": "rolling"}, 3),
}
all_cases = pytest.mark.parametrize("model, config, options, num_taken", CASES.values(), ids=CASES)


def present(pipe, num_frames: int = 5, size: tuple[int, int] = (8, 12), **options) -> FARSession:
    """A session of one sample with a context."""
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, num_frames, 3, *size, generator=generator)
    settings = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(7)}
    actions = some_actions(pipe, num_frames - 1)
    return pipe.start_session(video=video, actions=actions[None], **{**settings, **options})


def some_actions(pipe, *shape: int, seed: int = 1) -> torch.Tensor:
    generator, config = torch.Generator().manual_seed(seed), pipe.transformer.config
    if config.action_dim is not None:
        return torch.randn(*shape, config.action_dim, generator=generator)
    return torch.randint(0, 3, shape, generator=generator)


def assert_futures_are_forks(session: FARSession, actions: torch.Tensor, rewinds: tuple[int, ...] = ()) -> None:
    """`actions` are of shape (futures, steps). Before the steps in `rewinds` all go a frame back."""
    twins = [session.fork() for _ in range(len(actions))]
    futures = session.fork_batch(len(actions))
    for step in range(actions.shape[1]):
        if step in rewinds:
            for each in (futures, *twins):
                each.rewind(1)
        frames = futures.step(actions[:, step])
        expected = torch.cat([twin.step(actions[number, step][None]) for number, twin in enumerate(twins)])
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


@all_cases
def test_futures_come_out_as_separate_forks(model, config, options, num_taken):
    pipe = tiny_pipeline(model(**config))
    session = present(pipe, **options)
    for action in some_actions(pipe, num_taken, seed=2):
        session.step(action)
    assert_futures_are_forks(session, some_actions(pipe, 3, 6, seed=3))


@pytest.mark.parametrize("name", ["base", "long", "long, rolling", "long, bounded", "separable, long"])
def test_futures_that_go_back_come_out_as_forks_that_do(name):
    model, config, options, num_taken = CASES[name]
    pipe = tiny_pipeline(model(**config))
    session = present(pipe, num_frames=6, **options)
    for action in some_actions(pipe, num_taken, seed=2):
        session.step(action)
    assert_futures_are_forks(session, some_actions(pipe, 2, 7, seed=3), rewinds=(3, 6))


@pytest.mark.parametrize("schedule", ["constant", lambda frame, step, num_steps: 0.02 * frame * (step or 1)])
@pytest.mark.parametrize("name", ["base", "long, rolling", "long"])
def test_futures_see_what_flex_rope_lets_them_see(name, schedule):
    model, config, options, num_taken = CASES[name]
    pipe = tiny_pipeline(model(**config))
    pipe.enable_flex_rope(FlexRoPEConfig(slope=0.3, schedule=schedule))
    session = present(pipe, **options)
    for action in some_actions(pipe, num_taken, seed=2):
        session.step(action)
    assert_futures_are_forks(session, some_actions(pipe, 2, 5, seed=3))


@property_test
@given(
    st.sampled_from(["exact", "rolling", 2]), st.integers(2, 5), st.integers(1, 7), st.integers(0, 3), st.booleans()
)
def test_futures_are_forks_whatever_the_window(short_cache, short_window, num_context, num_taken, is_separable):
    short_cache = 1 if short_cache == 2 and short_window < 3 else short_cache
    model = tiny_separable if is_separable else tiny_transformer
    pipe = tiny_pipeline(model(**FAR, short_window=short_window))
    session = present(pipe, num_context, short_cache=short_cache, num_inference_steps=1)
    for action in some_actions(pipe, num_taken, seed=2):
        session.step(action)
    assert_futures_are_forks(session, some_actions(pipe, 2, 3, seed=3))


@pytest.mark.parametrize(
    "config, options",
    [({"long_patch_size": None}, {}), ({"short_window": 48, "long_patch_size": 4}, {"short_cache": "rolling"})],
    ids=["base", "long, rolling"],
)
def test_64_futures_of_16_steps_hold_hardly_more_than_one_context_and_the_new_frames(config, options):
    pipe = tiny_pipeline(tiny_transformer(num_layers=1, num_actions=3, action_shift=1, **config))
    session = present(pipe, 128, size=(8, 8), num_inference_steps=1, **options)
    futures = session.fork_batch(64)
    session_bytes = session.rollout.outline([]).num_bytes
    for _ in range(16):
        futures.step(0)
    cache = pipe.transformer.init_kv_cache(1, 4, 4, max_frames=128, **options)
    token_bytes = 2 * cache.dtype.itemsize * pipe.transformer.inner_dim
    context_bytes = cache.plan_for_frames(129).segment(0, 128).num_tokens * token_bytes
    frame_bytes = cache.plan_for_frames(1).num_tokens * token_bytes
    assert futures.rollout.num_bytes <= 1.1 * (context_bytes + 64 * 16 * frame_bytes)
    assert session_bytes >= context_bytes


def test_the_past_that_is_shared_counts_once_in_the_history_too():
    session = present(tiny_pipeline(tiny_transformer(**BASE)), 6)
    futures = session.fork_batch(5)
    assert futures.history.num_bytes <= session.history.num_bytes
    assert futures.latents.shape == (5, 6, 4, 4, 6) and torch.equal(futures.latents[:1], session.latents)


def test_neither_the_present_nor_its_futures_change_each_other():
    pipe = tiny_pipeline(tiny_transformer(**BASE))
    session, twin = (present(pipe) for _ in range(2))
    futures = session.fork_batch(2)
    other = futures.fork()
    first = futures.step([0, 1])
    session.step(2)
    session.rewind(1)
    assert torch.equal(other.step([0, 1]), first)
    torch.testing.assert_close(session.step(1), twin.step(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(futures.step(1), other.step(1), rtol=0, atol=0)


def test_futures_with_generators_of_their_own_draw_their_own_noise():
    session = present(tiny_pipeline(tiny_transformer(**BASE)))
    futures = session.fork_batch(2)
    same = futures.step(1)
    torch.testing.assert_close(same[0], same[1])
    futures.set_generator([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    other = futures.step(1)
    assert not torch.allclose(other[0], other[1], atol=1e-3)


def test_futures_are_encoded_anew_as_a_batch_of_their_own():
    session = present(tiny_pipeline(tiny_transformer(**BASE)))
    futures = session.fork_batch(2)
    futures.step([0, 1])
    twin = futures.fork()
    twin.reencode()
    torch.testing.assert_close(twin.step([1, 1]), futures.step([1, 1]), rtol=0, atol=1e-5)
    futures.set_config(guidance_scale=1.5)
    assert torch.isfinite(futures.step([1, 1])).all()


def test_what_futures_cannot_do_is_refused_by_name_and_with_a_cure(tmp_path):
    session = present(tiny_pipeline(tiny_transformer(**BASE)), guidance_scale=1.5)
    with pytest.raises(ValueError, match="`num_futures` is 0"):
        session.fork_batch(0)
    futures = session.fork_batch(2)
    futures.step(0)
    refused = {
        "save": lambda: futures.save(tmp_path / "session.safetensors"),
        "estimate": futures.estimate,
        "set_config": lambda: futures.set_config(guidance_scale=1.0),
    }
    for verb, call in refused.items():
        with pytest.raises(ValueError, match=f"`{verb}` needs a past .* before `fork_batch`"):
            call()
    with pytest.raises(ValueError, match="has a batch of 2; start a session for each"):
        futures.fork_batch(2)
    with pytest.raises(ValueError, match="`num_frames` is 1 but this session can go back 0"):
        futures.rewind(1)
    assert torch.isfinite(futures.step(0)).all()


def test_a_step_of_futures_that_fails_can_be_taken_again():
    pipe = tiny_pipeline(tiny_transformer(**{**BASE, "action_shift": 0}))
    session = present(pipe)
    futures, twins = session.fork_batch(2), session.fork_batch(2)
    for each in (futures, twins):
        each.step(0)
    with pytest.raises(KeyboardInterrupt):
        futures.advance(torch.tensor([1, 1]), on_step_end=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    torch.testing.assert_close(futures.step([2, 0]), twins.step([2, 0]), rtol=0, atol=1e-5)
