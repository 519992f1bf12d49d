"""Flow maps: a model that is told where a step ends as well."""

from dataclasses import replace

import pytest
import torch
from tiny_models import base_and_long, random_clip, tiny_separable, tiny_transformer

from diffusers_far import FARTransformer3DModel
from diffusers_far.models.frames import FrameBatch
from diffusers_far.models.identity import model_identity, public_config
from diffusers_far.training.pretrained import as_flow_map


both_models = pytest.mark.parametrize("make", [tiny_transformer, tiny_separable], ids=["FAR", "separable"])


def predict(model, clip, **arguments) -> torch.Tensor:
    """Velocity of a clip; of a separable model, whose clean frames are half its latents."""
    if model.is_separable and "kv_cache" not in arguments:
        arguments = {"clean_hidden_states": clip.latents / 2, **arguments}
    with torch.no_grad():
        return model(clip.latents, clip.timestep, actions=clip.actions, **arguments).sample


@both_models
@base_and_long
def test_a_flow_model_that_became_a_flow_map_computes_the_same_where_a_step_ends_at_its_beginning(
    make, long_patch_size
):
    model = make(num_actions=3, long_patch_size=long_patch_size)
    flow_map, clip = as_flow_map(model).eval(), random_clip(model, 5)
    assert flow_map.config.flow_map and not model.config.flow_map and as_flow_map(flow_map) is flow_map
    expected = predict(model, clip)
    for end in (None, clip.timestep):
        assert torch.equal(predict(flow_map, clip, r_timestep=end), expected)
    assert not torch.allclose(predict(flow_map, clip, r_timestep=0), expected, atol=1e-4)


@both_models
def test_the_end_of_a_step_counts_for_noisy_frames_alone(make):
    model = make(num_actions=3, flow_map=True)
    clip = random_clip(model, 4).clean_but_last()
    expected, changed = (predict(model, clip, r_timestep=end) for end in (None, 0))
    assert torch.equal(changed[:, :-1], expected[:, :-1]) and not torch.equal(changed[:, -1], expected[:, -1])
    ends = torch.zeros(2, 4)
    assert torch.equal(predict(model, clip, r_timestep=ends), changed)
    assert torch.equal(predict(model, clip, r_timestep=ends[:, 0]), changed)


@both_models
@base_and_long
def test_a_cached_frame_of_a_flow_map_equals_that_of_its_whole_clip(make, long_patch_size):
    model = make(num_actions=3, flow_map=True, long_patch_size=long_patch_size)
    clip = random_clip(model, 5)
    if not model.is_separable:
        clip = clip.clean_but_last()
    context, noisy = clip.frames(0, 4), clip.frames(4, 5)
    cache = model.init_kv_cache(2, 4, 6, 5)
    following = {"next_action": clip.actions[:, 4]} if model.is_separable else {}
    clean = context.latents / 2 if model.is_separable else context.latents
    model(clean, -1, actions=context.actions, kv_cache=cache, update_cache=True, **following)
    expected = predict(model, clip, r_timestep=100)[:, -1:]
    assert torch.allclose(predict(model, noisy, kv_cache=cache, r_timestep=100), expected, atol=1e-5)

    starts, ends = torch.tensor([900.0, 400.0]), torch.tensor([400.0, 0.0])
    frame = FrameBatch(noisy.latents, noisy.actions)
    for start, end, modulation in zip(starts, ends, model.frame_modulations(frame, starts, r_timesteps=ends)):
        known = model(noisy.latents, modulation=modulation, kv_cache=cache).sample
        own = predict(model, replace(noisy, timestep=start), kv_cache=cache, r_timestep=end)
        assert torch.allclose(known, own, atol=1e-5)


def test_several_draws_of_a_flow_map_equal_calls_of_their_own():
    model = tiny_separable(num_actions=3, flow_map=True)
    clips, ends = [random_clip(model, 4, seed=seed) for seed in range(2)], torch.tensor([[[7.0]], [[300.0]]])
    ends = ends.expand(2, 2, 4)
    draws, starts = (torch.stack([getattr(clip, name) for clip in clips]) for name in ("latents", "timestep"))
    clean = {"clean_hidden_states": clips[0].latents / 2}
    together = predict(model, replace(clips[0], latents=draws, timestep=starts), r_timestep=ends, **clean)
    for sample, clip, end in zip(together, clips, ends, strict=True):
        each = replace(clips[0], latents=clip.latents, timestep=clip.timestep)
        assert torch.allclose(sample, predict(model, each, r_timestep=end, **clean), atol=1e-5)


def test_a_new_flow_map_starts_as_a_flow_model():
    model = FARTransformer3DModel(in_channels=4, num_layers=1, num_attention_heads=1, flow_map=True)
    start, end = model.timestep_embedder.state_dict(), model.r_timestep_embedder.state_dict()
    assert all(torch.equal(end[name], tensor) for name, tensor in start.items())
    assert start["linear_1.weight"].data_ptr() != end["linear_1.weight"].data_ptr()


def test_of_a_separable_flow_map_only_the_decoder_knows_where_a_step_ends():
    names = [name for name, _ in tiny_separable(flow_map=True).named_parameters() if "r_timestep" in name]
    assert names and all(name.startswith("decoder.") for name in names)


def test_a_model_that_is_no_flow_map_is_what_it_was_before_there_were_any():
    model = tiny_transformer()
    assert "flow_map" not in public_config(model.config)
    flow_map = as_flow_map(model)
    assert public_config(flow_map.config)["flow_map"] is True
    assert model_identity(flow_map) != model_identity(model)


def test_a_saved_flow_map_is_loaded_with_all_its_weights(tmp_path):
    model = tiny_transformer(num_actions=3, flow_map=True)
    model.save_pretrained(tmp_path)
    clip, loaded = random_clip(model, 3), FARTransformer3DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(loaded, clip, r_timestep=0), predict(model, clip, r_timestep=0))


def test_what_makes_no_sense_is_refused():
    model = tiny_transformer(num_actions=3)
    clip = random_clip(model, 3)
    with pytest.raises(ValueError, match="`r_timestep` was given, but this model has `flow_map=False`"):
        predict(model, clip, r_timestep=0)
    flow_map = as_flow_map(model).eval()
    with pytest.raises(ValueError, match=r"`r_timestep` has shape \(5,\) but the batch is 2 clips of 3"):
        predict(flow_map, clip, r_timestep=torch.zeros(5))
    cache, frame = flow_map.init_kv_cache(2, 4, 6, 3), clip.frames(0, 1)
    (modulation,) = flow_map.frame_modulations(FrameBatch(frame.latents, frame.actions), torch.tensor([500.0]))
    with pytest.raises(ValueError, match="`r_timestep` was given beside `modulation`"):
        flow_map(frame.latents, r_timestep=0, modulation=modulation, kv_cache=cache)
    for config in ({"flow_map": 1}, {"flow_map": True, "frame_causal": False}):
        with pytest.raises(ValueError, match="`flow_map` is"):
            tiny_transformer(**config)
