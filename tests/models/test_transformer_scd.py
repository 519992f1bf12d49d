"""The separable transformer: an encoder with a cache, a decoder that sees one frame and its feature."""

import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from diffusers import AutoModel
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Clip, base_and_long, property_test, random_clip, tensors_of, tiny_separable

from diffusers_far import SCDTransformer3DModel
from diffusers_far.models.frames import FrameBatch


CONDITIONS = ({}, {"num_actions": 3}, {"action_dim": 2}, {"num_classes": 3}, {"num_actions": 3, "num_classes": 2})


def predict(model, clip: Clip, **arguments) -> torch.Tensor:
    """Velocity of the short frames of a clip, whose clean frames are half its latents."""
    arguments = {"clean_hidden_states": clip.latents / 2, **arguments}
    with torch.no_grad():
        return model(
            clip.latents, clip.timestep, actions=clip.actions, class_labels=clip.class_labels, **arguments
        ).sample


def write(model, clip: Clip, cache, first: int, end: int) -> None:
    """Write the clean frames from `first` to before `end`, of a clip that goes on."""
    part = clip.frames(first, end)
    following = {} if clip.actions is None else {"next_action": clip.actions[:, end]}
    conditions = {"actions": part.actions, "class_labels": part.class_labels}
    model(part.latents / 2, -1, **conditions, kv_cache=cache, update_cache=True, **following)


def filled_cache(model, clip: Clip, chunks=None, **options):
    """A cache of all frames but the last; its memory starts as NaN."""
    batch_size, num_frames, _, height, width = clip.latents.shape
    cache = model.init_kv_cache(batch_size, height, width, num_frames, **options)
    cache._key_stores.fill_(float("nan"))
    cache._value_stores.fill_(float("nan"))
    first = 0
    for size in chunks or [1] * (num_frames - 1):
        write(model, clip, cache, first, first + size)
        first += size
    return cache


def predict_cached(model, clip: Clip, chunks=None, **options) -> torch.Tensor:
    last = clip.frames(clip.num_frames - 1, clip.num_frames)
    return predict(model, last, kv_cache=filled_cache(model, clip, chunks, **options), clean_hidden_states=None)


@st.composite
def separable_models_with_clips(draw, min_frames: int = 1):
    """A random separable model with a random clip for it."""
    seed, patch_size = draw(st.integers(0, 2**16)), draw(st.sampled_from([1, 2]))
    config = {
        "patch_size": patch_size,
        "short_window": draw(st.integers(2, 4)),
        "num_encoder_layers": draw(st.integers(1, 3)),
        "num_decoder_layers": draw(st.integers(1, 2)),
        **draw(st.sampled_from(CONDITIONS)),
    }
    if draw(st.booleans()):
        config["long_patch_size"] = patch_size * draw(st.sampled_from([1, 2]))
    model = tiny_separable(seed, **config)
    unit = model.config.long_patch_size or patch_size
    height, width = unit * draw(st.integers(1, 2)), unit * draw(st.integers(1, 2))
    return model, random_clip(model, draw(st.integers(min_frames, 7)), height, width, draw(st.integers(1, 2)), seed)


@property_test
@given(separable_models_with_clips(), st.data())
def test_cached_frames_equal_those_of_a_whole_clip(model_and_clip, data):
    model, clip = model_and_clip
    chunks, num_left = [], clip.num_frames - 1
    while num_left:
        chunks.append(data.draw(st.integers(1, num_left)))
        num_left -= chunks[-1]
    expected = predict(model, clip)[:, -1:]
    assert torch.allclose(predict_cached(model, clip, chunks), expected, atol=1e-4)


@property_test
@given(separable_models_with_clips(min_frames=2), st.data())
def test_the_future_never_changes_the_past(model_and_clip, data):
    model, clip = model_and_clip
    change = data.draw(st.integers(1, clip.num_frames - 1))
    first_short = clip.num_frames - predict(model, clip).shape[1]
    later = copy.deepcopy(clip)
    for tensor in (later.latents, later.timestep, *([] if later.actions is None else [later.actions])):
        tensor[:, change:] = tensor[:, change:].flip(0) if tensor.dtype == torch.int64 else tensor[:, change:] * 0.7
    before = slice(0, max(0, change - first_short))
    assert torch.allclose(predict(model, later)[:, before], predict(model, clip)[:, before], atol=1e-6)


def test_a_frame_sees_the_finished_frames_and_its_own_action():
    model = tiny_separable(num_actions=3)
    clip = random_clip(model, 4)
    expected = predict(model, clip)
    clean = clip.latents / torch.tensor([2.0, 2.0, 4.0, 2.0])[:, None, None, None]
    actions = (clip.actions + torch.tensor([0, 0, 0, 1])) % 3
    for changed in (predict(model, clip, clean_hidden_states=clean), predict(model, replace(clip, actions=actions))):
        assert torch.allclose(changed[:, :3], expected[:, :3], atol=1e-6)
        assert not torch.allclose(changed[:, 3], expected[:, 3], atol=1e-3)


@pytest.mark.parametrize("short_cache", ["exact", "rolling", 2])
def test_features_and_short_frames_come_from_the_same_cache_options_as_far(short_cache):
    model = tiny_separable(long_patch_size=2, num_actions=3, short_window=4)
    clip = random_clip(model, 9)
    sample = predict_cached(model, clip, short_cache=short_cache)
    assert sample.isfinite().all()
    exact = predict(model, clip)[:, -1:]
    assert torch.allclose(sample, exact, atol=1e-4) == (short_cache == "exact")


def test_memory_stays_bounded_while_the_video_goes_on():
    model = tiny_separable(long_patch_size=2, num_actions=3)
    clip = random_clip(model, 12)
    cache = filled_cache(model, clip, max_long_frames=3, num_sink_frames=1)
    last = predict(model, clip.frames(11, 12), kv_cache=cache, clean_hidden_states=None)
    assert cache.num_frames <= 5 and last.isfinite().all()


@base_and_long
def test_a_denoising_step_reads_the_feature_and_no_keys(long_patch_size):
    model = tiny_separable(long_patch_size=long_patch_size, num_actions=3)
    clip = random_clip(model, 6)
    cache, noisy = filled_cache(model, clip), clip.frames(5, 6)
    expected = predict(model, noisy, kv_cache=cache, clean_hidden_states=None)
    cache._key_stores.fill_(float("nan"))
    cache._value_stores.fill_(float("nan"))
    assert torch.equal(predict(model, noisy, kv_cache=cache, clean_hidden_states=None), expected)


@base_and_long
def test_a_write_computes_of_the_last_block_only_the_last_frame(long_patch_size):
    model, shapes = tiny_separable(long_patch_size=long_patch_size), []
    clip = random_clip(model, 6)
    model.encoder.transformer_blocks[-1].mlp.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    filled_cache(model, clip, chunks=[5])
    assert shapes == [(2, 1, 24, 32)]


def test_calls_leave_their_arguments_and_the_cache_as_they_are():
    model = tiny_separable(num_actions=3, long_patch_size=2)
    clip, noise = random_clip(model, 5), torch.randn(2, 1, 24, 32)
    cache = filled_cache(model, clip)
    given_before = tensors_of(clip.latents, clip.actions, noise, cache.feature.states, cache._key_stores)
    last = clip.frames(4, 5)
    predict(model, last, kv_cache=cache, clean_hidden_states=None, null_feature_noise=noise)
    predict(model, clip)
    after = tensors_of(clip.latents, clip.actions, noise, cache.feature.states, cache._key_stores)
    assert all(torch.equal(*pair) for pair in zip(given_before[:-1], after[:-1]))


def test_the_first_short_frame_of_a_longer_clip_has_no_feature_and_no_output():
    model = tiny_separable(long_patch_size=2)
    sample = predict(model, random_clip(model, 6))
    assert sample.shape[1] == 3 and not sample[:, 0].any() and sample[:, 1:].any()
    assert predict(model, random_clip(model, 3))[:, 0].any()  # frame 0, which reads the learned start
    model = tiny_separable(learn_start=False)
    assert not predict(model, random_clip(model, 3))[:, 0].any()


@pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
def test_modulations_that_are_computed_once_a_frame_change_nothing(conditions):
    model = tiny_separable(num_decoder_layers=2, **conditions)
    clip = random_clip(model, 4)
    cache, noisy = filled_cache(model, clip), clip.frames(3, 4)
    frame = FrameBatch(noisy.latents, noisy.actions)
    for noise in (None, torch.randn(2, 1, 24, 32)):
        options = {"kv_cache": cache, "null_feature_noise": noise, "clean_hidden_states": None}
        for timestep, modulation in zip(
            (900, 250), model.frame_modulations(frame, torch.tensor([900, 250]), noisy.class_labels)
        ):
            known = model(noisy.latents, modulation=modulation, **options).sample
            own = model(
                noisy.latents, timestep, actions=noisy.actions, class_labels=noisy.class_labels, **options
            ).sample
            assert torch.allclose(known, own, atol=1e-5)


def test_a_noisy_feature_makes_the_null_half_and_leaves_the_other_as_it_is():
    model = tiny_separable(num_actions=3)
    clip, noise = random_clip(model, 4), torch.randn(2, 1, 24, 32)
    cache = filled_cache(model, clip)
    last = clip.frames(3, 4)
    null, sample = predict(model, last, kv_cache=cache, clean_hidden_states=None, null_feature_noise=noise).chunk(2)
    assert torch.allclose(sample, predict(model, last, kv_cache=cache, clean_hidden_states=None), atol=1e-6)
    assert not torch.allclose(null, sample, atol=1e-3)
    whole = predict(model, clip, null_feature_noise=noise)[:, -1:]
    assert torch.allclose(whole, torch.cat([null, sample]), atol=1e-4)


@base_and_long
def test_several_draws_equal_calls_of_their_own(long_patch_size):
    model = tiny_separable(long_patch_size=long_patch_size, num_actions=3, num_classes=2)
    clips = [random_clip(model, 5, seed=seed) for seed in range(3)]
    first = clips[0]
    draws, levels = (torch.stack([getattr(clip, name) for clip in clips]) for name in ("latents", "timestep"))
    together = predict(model, replace(first, latents=draws, timestep=levels), clean_hidden_states=first.latents / 2)
    for sample, clip in zip(together, clips, strict=True):
        alone = predict(
            model, replace(first, latents=clip.latents, timestep=clip.timestep), clean_hidden_states=first.latents / 2
        )
        assert torch.allclose(sample, alone, atol=1e-5)


def test_training_drops_conditions_once_for_both_parts_and_puts_noise_on_the_feature():
    model = tiny_separable(num_actions=3, feature_noise=0.5, condition_dropout=0.4).train()
    clip, masks = random_clip(model, 5), []
    embed = type(model.encoder.action_embedder).forward
    with patch.object(
        type(model.encoder.action_embedder),
        "forward",
        lambda self, actions, mask=None: masks.append(mask) or embed(self, actions, mask),
    ):
        torch.manual_seed(0)
        first = predict(model, clip)
    encoder_mask, decoder_mask = masks
    assert torch.equal(encoder_mask, decoder_mask[:, 1:]) and not decoder_mask.all()
    model.register_to_config(condition_dropout=0.0)
    for part in (model.encoder, model.decoder):
        part.config = model.config
    assert not torch.allclose(predict(model, clip), predict(model, clip))
    assert first.isfinite().all()


@base_and_long
def test_training_reaches_every_weight_and_checkpointing_changes_no_gradient(long_patch_size):
    model = tiny_separable(long_patch_size=long_patch_size, num_actions=3, num_classes=2)
    clip = random_clip(model, 3)  # so short that the start is read; long frames are in the next
    gradients = []
    for _ in range(2):
        model.zero_grad()
        for each in (clip, random_clip(model, 6)):
            arguments = {"actions": each.actions, "class_labels": each.class_labels}
            sample = model(each.latents, each.timestep, clean_hidden_states=each.latents / 2, **arguments).sample
            sample.square().mean().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        # After the encoder's last block nobody reads the long tokens.
        unread = [name for name, grad in grads.items() if grad is None or not grad.any()]
        last = "encoder.transformer_blocks.1.attn."
        assert all(name.startswith((f"{last}add_q_proj", f"{last}norm_added_q")) for name in unread)
        gradients.append([grad.clone() for name, grad in grads.items() if name not in unread])
        model.enable_gradient_checkpointing()
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients))


def test_the_feature_belongs_to_the_cache():
    model = tiny_separable(num_actions=3)
    clip = random_clip(model, 6)
    cache, last = filled_cache(model, clip), clip.frames(5, 6)
    expected = predict(model, last, kv_cache=cache, clean_hidden_states=None)
    twin = cache.clone()
    tensors, clock = cache.state()
    assert {"feature_states", "feature_gain"} <= tensors.keys() and cache.num_bytes > 2 * cache._key_stores.nbytes

    cache.rewind(4, FrameBatch(clip.latents[:, :0]))
    assert cache.feature is None
    write(model, clip, cache, 4, 5)
    assert torch.allclose(predict(model, last, kv_cache=cache, clean_hidden_states=None), expected, atol=1e-6)
    assert torch.equal(predict(model, last, kv_cache=twin, clean_hidden_states=None), expected)
    restored = model.init_kv_cache(2, 4, 6, 6)
    restored.restore(tensors, clock)
    assert torch.equal(predict(model, last, kv_cache=restored, clean_hidden_states=None), expected)


def test_a_saved_model_computes_the_same_and_diffusers_finds_its_class(tmp_path):
    import diffusers

    model = tiny_separable(num_actions=3)
    clip = random_clip(model, 4)
    model.save_pretrained(tmp_path)
    for loaded in (SCDTransformer3DModel.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(loaded) is SCDTransformer3DModel is diffusers.SCDTransformer3DModel
        assert torch.equal(predict(loaded.eval(), clip), predict(model, clip))


def test_both_parts_run_in_int8():
    model = tiny_separable(num_actions=3)
    clip = random_clip(model, 4)
    exact = predict(model, clip)
    model.quantize_int8()
    layers = {name for name, module in model.named_modules() if "quantized" in type(module).__module__}
    assert {name.split(".")[0] for name in layers} == {"encoder", "decoder"}
    assert 0 < (predict(model, clip) - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize(
    "config, named",
    [
        ({"frame_causal": False}, "`frame_causal` is False"),
        ({"long_patch_size": 2, "short_window": 1}, "`short_window` is 1"),
        ({"feature_noise": -0.1}, "`feature_noise` is -0.1"),
        ({"feature_noise": "much"}, "`feature_noise` is 'much'"),
        ({"learn_start": 1}, "`learn_start` is 1"),
        ({"num_decoder_layers": 0}, "`num_decoder_layers` is 0"),
        ({"num_encoder_layers": 10**9}, "`num_encoder_layers` is 1000000000"),
    ],
)
def test_impossible_models_are_refused(config, named):
    with pytest.raises(ValueError, match=named):
        tiny_separable(**config)


def test_calls_that_make_no_sense_are_refused():
    model = tiny_separable(num_actions=3, learn_start=False)
    clip = random_clip(model, 4)
    frame, cache = clip.frames(0, 1), model.init_kv_cache(2, 4, 6, 4)
    with pytest.raises(ValueError, match="`clean_hidden_states` is None"):
        predict(model, clip, clean_hidden_states=None)
    with pytest.raises(ValueError, match="`next_action` is None"):
        model(frame.latents, -1, actions=frame.actions, kv_cache=cache, update_cache=True)
    with pytest.raises(ValueError, match="`next_action` was given"):
        predict(model, clip, next_action=clip.actions[:, 0])
    with pytest.raises(ValueError, match="`next_action` has shape"):
        model(frame.latents, -1, actions=frame.actions, kv_cache=cache, update_cache=True, next_action=clip.actions)
    draws = replace(clip, latents=torch.stack([clip.latents] * 3))
    with pytest.raises(
        ValueError, match=r"`timestep` has shape \(2, 4\); with 3 draws of 2 clips of 4 frames it must"
    ):
        predict(model, draws, clean_hidden_states=clip.latents)
    with pytest.raises(ValueError, match="several draws of whole clips, but `kv_cache` was given"):
        predict(model, draws, kv_cache=cache, clean_hidden_states=None)
    with pytest.raises(ValueError, match="`null_feature_noise` has shape"):
        predict(model, clip, null_feature_noise=torch.randn(2, 24, 32))
    with pytest.raises(ValueError, match="`learn_start=False`"):
        predict(model, frame, kv_cache=cache, clean_hidden_states=None)
    with pytest.raises(ValueError, match="`learn_start=False`"):
        predict(model, frame)
    assert cache.num_frames == 0


def test_compiled_and_offloaded_parts_compute_the_same():
    clip = random_clip(tiny_separable(num_actions=3), 6)
    expected = predict_cached(tiny_separable(num_actions=3), clip)
    compiled, offloaded = tiny_separable(num_actions=3), tiny_separable(num_actions=3)
    compiled.compile_repeated_blocks(backend="eager", dynamic=True)
    offloaded.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    for model in (compiled, offloaded):
        assert torch.allclose(predict_cached(model, clip), expected, atol=1e-5)
    torch._dynamo.reset()
