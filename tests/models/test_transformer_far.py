import json
from dataclasses import replace
from unittest.mock import patch

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONDITIONS,
    base_and_long,
    fill_cache,
    half_precision_error,
    model_configs,
    models_with_clips,
    predict,
    predict_cached,
    property_test,
    random_clip,
    sharpened,
    tensors_of,
    tiny_transformer,
    using_backend,
)
from torch.nn.attention.flex_attention import BlockMask

from diffusers_far import FARTransformer3DModel
from diffusers_far.models import frame_network
from diffusers_far.models.frame_network import FARAdaLayerNorm


def kind_of(config: dict) -> str:
    return "-".join(config) or "unconditional"


every_condition = pytest.mark.parametrize("condition", CONDITIONS, ids=kind_of)


# Time runs one way


@property_test
@given(models_with_clips(min_frames=2), st.data())
def test_the_future_never_changes_the_past(model_and_clip, data):
    model, clip = model_and_clip
    first_changed = data.draw(st.integers(1, clip.num_frames - 1))
    other = random_clip(model, clip.num_frames, *clip.latents.shape[-2:], len(clip.latents), seed=2**17)

    def spliced(ours, theirs):
        return None if ours is None else torch.cat([ours[:, :first_changed], theirs[:, first_changed:]], dim=1)

    changed = replace(
        clip,
        latents=spliced(clip.latents, other.latents),
        timestep=spliced(clip.timestep, other.timestep),
        actions=spliced(clip.actions, other.actions),
    )
    expected, velocity = predict(model, clip), predict(model, changed)
    num_past = max(0, expected.shape[1] - (clip.num_frames - first_changed))
    assert torch.equal(velocity[:, :num_past], expected[:, :num_past])
    assert not torch.allclose(velocity[:, num_past:], expected[:, num_past:], atol=1e-3)


@base_and_long
def test_every_frame_of_the_past_changes_the_future(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, num_actions=3)
    clip = random_clip(model, 7)
    expected = predict(model, clip)[:, -1]
    for frame in range(7):
        latents, actions = clip.latents.clone(), clip.actions.clone()
        latents[:, frame] += 1
        actions[:, frame] = (actions[:, frame] + 1) % 3
        for changed in (replace(clip, latents=latents), replace(clip, actions=actions)):
            assert (predict(model, changed)[:, -1] - expected).abs().max() > 1e-3


def test_without_frame_causality_the_future_changes_the_past():
    model = tiny_transformer(frame_causal=False)
    clip = random_clip(model, 4)
    latents = clip.latents.clone()
    latents[:, 3] += 1
    assert (predict(model, replace(clip, latents=latents)) - predict(model, clip))[:, 0].abs().max() > 1e-3


# One class, one forward


@property_test
@given(models_with_clips())
def test_the_output_is_the_velocity_of_the_short_frames_in_training_and_evaluation(model_and_clip):
    model, clip = model_and_clip
    num_frames = clip.num_frames
    if model.config.long_patch_size is not None:
        num_frames = min(num_frames, model.config.short_window)
    batch_size, _, _, height, width = clip.latents.shape
    for is_training in (False, True):
        velocity = predict(model.train(is_training), clip)
        assert velocity.shape == (batch_size, num_frames, 4, height, width)


@property_test
@given(config=model_configs(is_long=True), num_frames=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_inside_its_window_a_long_model_is_the_base_model_with_the_same_weights(config, num_frames, seed):
    config = {**config, "short_window": 4}
    long_model = tiny_transformer(seed, **config)
    base_model = tiny_transformer(seed + 1, **{**config, "long_patch_size": None})
    base_model.load_state_dict({name: long_model.state_dict()[name] for name in base_model.state_dict()})
    unit = long_model.config.long_patch_size
    clip = random_clip(long_model, num_frames, unit, 2 * unit, seed=seed)
    assert torch.equal(predict(long_model, clip), predict(base_model, clip))


def test_without_long_patches_there_are_no_long_term_weights():
    base_names, long_names = (
        {name for name, _ in tiny_transformer(long_patch_size=size).named_parameters()} for size in (None, 2)
    )
    assert base_names < long_names
    long_only = ("context_embedder", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_", "to_add_out")
    assert all(any(part in name for part in long_only) for name in long_names - base_names)
    assert not any(any(part in name for part in long_only) for name in base_names)


@property_test
@given(models_with_clips())
def test_a_batch_is_its_members(model_and_clip):
    model, clip = model_and_clip
    members = [predict(model, clip.sample(index)) for index in range(len(clip.latents))]
    torch.testing.assert_close(predict(model, clip), torch.cat(members), atol=1e-5, rtol=1e-5)


def test_long_frames_are_clean_whatever_their_timestep():
    model = tiny_transformer(long_patch_size=2)
    clip = random_clip(model, 6)
    timestep = clip.timestep.clone()
    timestep[:, :3] = -1
    expected = predict(model, clip)
    assert torch.equal(predict(model, replace(clip, timestep=timestep)), expected)
    timestep[:, 3] = -1
    assert not torch.allclose(predict(model, replace(clip, timestep=timestep)), expected, atol=1e-3)


def test_a_timestep_may_be_given_once_per_clip_or_once_for_all():
    model = tiny_transformer()
    clip = random_clip(model, 4)
    per_clip = torch.tensor([700.0, 20.0])
    expected = predict(model, replace(clip, timestep=per_clip[:, None].expand(2, 4)))
    assert torch.equal(predict(model, replace(clip, timestep=per_clip)), expected)
    expected = predict(model, replace(clip, timestep=torch.full((2, 4), 700.0)))
    for timestep in (700, 700.0, torch.tensor(700), torch.tensor([700])):
        assert torch.equal(predict(model, replace(clip, timestep=timestep)), expected)


@property_test
@given(models_with_clips(min_frames=2))
def test_the_arguments_are_unchanged_after_a_call(model_and_clip):
    model, clip = model_and_clip
    arguments = (clip.latents, clip.timestep, clip.actions, clip.class_labels)
    before = tensors_of(*arguments)
    predict(model, clip)
    predict_cached(model, clip)
    attention_kwargs = {"scale": 0.5}
    predict(model.train(), clip, attention_kwargs=attention_kwargs)
    assert attention_kwargs == {"scale": 0.5}
    for value, value_before in zip(tensors_of(*arguments), before):
        assert torch.equal(value, value_before)


def test_a_tuple_holds_what_the_output_holds():
    model = tiny_transformer()
    clip = random_clip(model, 3)
    with torch.no_grad():
        (sample,) = model(clip.latents, clip.timestep, return_dict=False)
        kv_cache = model.init_kv_cache(2, 4, 6, max_frames=4)
        written = model(clip.latents, -1, kv_cache=kv_cache, update_cache=True, return_dict=False)
    assert torch.equal(sample, predict(model, clip))
    assert written == (None,)


# Conditions


@every_condition
def test_each_condition_matters(condition):
    model = tiny_transformer(**condition)
    clip = random_clip(model, 3)
    expected = predict(model, clip)
    if clip.actions is not None:
        other = (clip.actions + 1) % 3 if model.config.num_actions else clip.actions + 1
        assert (predict(model, replace(clip, actions=other)) - expected).abs().max() > 1e-2
    if clip.class_labels is not None:
        other = (clip.class_labels + 1) % 2
        assert (predict(model, replace(clip, class_labels=other)) - expected).abs().max() > 1e-2


def test_a_masked_discrete_action_is_the_null_action():
    model = tiny_transformer(num_actions=3)
    clip = random_clip(model, 4)
    action_mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    expected = predict(model, replace(clip, actions=clip.actions.masked_fill(~action_mask, 3)))
    assert torch.equal(predict(model, clip, action_mask=action_mask), expected)
    assert not torch.equal(predict(model, clip), expected)


def test_a_masked_continuous_action_is_a_learned_embedding_whatever_its_value():
    model = tiny_transformer(action_dim=2)
    clip = random_clip(model, 2)
    action_mask = torch.tensor([[True, False], [False, False]])
    expected = predict(model, clip, action_mask=action_mask)
    other = clip.actions.clone()
    other[~action_mask] = float("nan")
    assert torch.equal(predict(model, replace(clip, actions=other), action_mask=action_mask), expected)
    with torch.no_grad():
        model.action_embedder.null_embedding += 1
    assert not torch.allclose(predict(model, clip, action_mask=action_mask), expected, atol=1e-3)


def test_a_full_mask_is_no_mask():
    model = tiny_transformer(action_dim=2)
    clip = random_clip(model, 2)
    assert torch.equal(predict(model, clip, action_mask=torch.ones(2, 2, dtype=torch.bool)), predict(model, clip))


@pytest.mark.parametrize("condition", [{"num_actions": 3}, {"action_dim": 2}, {"num_classes": 3}], ids=kind_of)
def test_conditions_are_dropped_in_training_alone(condition):
    model = tiny_transformer(condition_dropout=1 - 1e-9, **condition)
    kept = tiny_transformer(condition_dropout=0.0, **condition)
    clip = random_clip(model, 3)
    null_mask = None if clip.actions is None else torch.zeros(2, 3, dtype=torch.bool)
    null_labels = None if clip.class_labels is None else torch.full((2,), 3)
    null = predict(model, replace(clip, class_labels=null_labels), action_mask=null_mask)
    expected = predict(model, clip)
    assert torch.equal(predict(model.train(), clip), null)
    assert torch.equal(predict(model.eval(), clip), expected)
    assert torch.equal(predict(kept.train(), clip), expected)
    assert not torch.equal(null, expected)


def test_actions_are_dropped_per_frame_and_labels_per_clip_at_the_given_rate():
    model = tiny_transformer(num_layers=1, num_actions=3, num_classes=2, condition_dropout=0.1).train()
    action_masks, labels = [], []
    model.action_embedder.register_forward_pre_hook(lambda module, args: action_masks.append(args[1]))
    model.label_embedder.register_forward_pre_hook(lambda module, args: labels.append(args[0]))
    torch.manual_seed(0)
    clip = random_clip(model, 4, 1, 1, batch_size=1500)
    predict(model, clip)
    assert (~action_masks[0]).float().mean().item() == pytest.approx(0.1, abs=0.015)
    is_partly_dropped = action_masks[0].any(dim=1) & ~action_masks[0].all(dim=1)
    assert is_partly_dropped.float().mean() > 0.25
    is_null = labels[0] == 2
    assert is_null.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(labels[0][~is_null], clip.class_labels[~is_null])


# Training


@base_and_long
def test_gradient_checkpointing_gives_the_same_gradients(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, num_actions=3, condition_dropout=0.5).train()
    clip = random_clip(model, 6)
    gradients = {}
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(0)
        with patch.object(frame_network.FARTransformerBlock, "forward", autospec=True) as forward:
            forward.side_effect = forward_of_block
            model(clip.latents, clip.timestep, actions=clip.actions).sample.square().mean().backward()
        # Each of 2 blocks runs once more where its activations were not kept.
        assert forward.call_count == (4 if is_checkpointing else 2)
        gradients[is_checkpointing] = {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
        }
    for name, gradient in gradients[False].items():
        assert torch.equal(gradients[True][name], gradient), name


forward_of_block = frame_network.FARTransformerBlock.forward


@every_condition
@base_and_long
def test_every_weight_has_a_gradient(condition, long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size, **condition)
    clip = random_clip(model, 6)
    kwargs = {} if clip.actions is None else {"action_mask": torch.arange(6).expand(2, 6) % 2 == 0}
    sample = model(clip.latents, clip.timestep, actions=clip.actions, class_labels=clip.class_labels, **kwargs).sample
    sample.square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # The last block's long tokens are attended to, but nobody reads what they would attend to.
    assert without == (set() if long_patch_size is None else names_of_last_long_queries(model))


def names_of_last_long_queries(model) -> set[str]:
    last = f"transformer_blocks.{model.config.num_layers - 1}.attn"
    return {f"{last}.add_q_proj.weight", f"{last}.add_q_proj.bias", f"{last}.norm_added_q.weight"}


def test_what_nobody_reads_is_not_trained_in_a_new_model_or_a_loaded_one(tmp_path):
    model = tiny_transformer(long_patch_size=2)
    model.save_pretrained(tmp_path)
    for each in (model, FARTransformer3DModel.from_pretrained(tmp_path)):
        frozen = {name for name, parameter in each.named_parameters() if not parameter.requires_grad}
        assert frozen == names_of_last_long_queries(each)


def test_a_call_with_a_cache_carries_no_gradient():
    model = tiny_transformer()
    clip = random_clip(model, 3)
    kv_cache = fill_cache(model, clip.frames(0, 2))
    assert not model(clip.latents[:, 2:], 500, kv_cache=kv_cache).sample.requires_grad


def test_a_new_model_starts_at_zero():
    model = FARTransformer3DModel(4, num_layers=1, num_attention_heads=1, num_actions=3)
    assert not predict(model, random_clip(model, 2)).any()


# Saving and loading


@pytest.mark.parametrize("condition", [{"num_actions": 3, "long_patch_size": 2}, {"action_dim": 2}], ids=kind_of)
def test_a_saved_model_loads_bit_equal(condition, tmp_path):
    model = tiny_transformer(trained_frames=12, action_shift=1, **condition)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    clip = random_clip(model, 5)
    for loader in (FARTransformer3DModel, diffusers.AutoModel):
        loaded = loader.from_pretrained(str(tmp_path))
        assert type(loaded) is FARTransformer3DModel and not loaded.training
        assert {**loaded.config, "_name_or_path": None} == json.loads(model.to_json_string()) | {"_name_or_path": None}
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, parameter in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], parameter), name
        assert torch.equal(predict(loaded, clip), predict(model, clip))


def test_a_model_loads_in_half_precision(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    loaded = FARTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("damage", ["truncated", "not safetensors"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not a tensor" * 100)
    with pytest.raises(Exception, match="diffusion_pytorch_model.safetensors"):
        FARTransformer3DModel.from_pretrained(tmp_path)


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks proj_out.bias"):
        FARTransformer3DModel.from_pretrained(tmp_path)


# Backends


@pytest.mark.full
@base_and_long
def test_flex_attention_equals_native_attention(long_patch_size):
    model = tiny_transformer(num_layers=1, long_patch_size=long_patch_size, num_actions=3)
    clip = random_clip(model, 6)
    expected, cached = predict(model, clip), predict_cached(model, clip)
    with using_backend(model, "flex"):
        torch.testing.assert_close(predict(model, clip), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(predict_cached(model, clip), cached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "mask_type"), [("flex", BlockMask), ("_native_math", torch.Tensor), ("native", torch.Tensor)]
)
def test_flex_attention_gets_a_block_mask_native_attention_chunks_and_the_others_a_dense_mask(backend, mask_type):
    model = tiny_transformer(num_layers=1)
    recorded = RuntimeError("recorded")
    with (
        using_backend(model, backend),
        patch("diffusers_far.models.frame_network.dispatch_attention_fn", side_effect=recorded) as dispatch,
        pytest.raises(RuntimeError) as error,
    ):
        predict(model, random_clip(model, 12))
    assert error.value is recorded
    mask, key = dispatch.call_args.kwargs["attn_mask"], dispatch.call_args.args[1]
    assert isinstance(mask, mask_type)
    assert key.shape[1] == (6 * 24 if backend == "native" else 12 * 24)  # the frames of the first chunk, or all


def test_a_batch_as_large_as_its_clips_have_tokens_is_masked_as_any_other():
    model = tiny_transformer(patch_size=1)
    torch.manual_seed(0)
    latents = torch.randn(4, 2, model.config.in_channels, 1, 2)  # 4 clips of 4 tokens
    alone = torch.cat([model(clip[None], 500).sample for clip in latents])
    torch.testing.assert_close(model(latents, 500).sample, alone)


# What a pass costs


@base_and_long
def test_modulation_runs_on_frames_and_not_on_tokens(long_patch_size):
    model = tiny_transformer(long_patch_size=long_patch_size)
    num_rows = []
    for module in model.modules():
        if isinstance(module, FARAdaLayerNorm):
            module.linear.register_forward_pre_hook(lambda linear, args: num_rows.append(args[0][..., 0].numel()))
    clip = random_clip(model, 5)
    predict(model, clip)
    # 2 samples x (long or short) frames; norm1, norm2 of 2 blocks on each kind, the last block's long MLP and norm_out not.
    expected = [10] * 5 if long_patch_size is None else [6] * 5 + [4] * 3
    assert sorted(num_rows) == sorted(expected)


def test_the_mask_of_a_whole_clip_is_built_once():
    model = tiny_transformer(num_layers=3)
    with patch.object(frame_network, "frame_causal_mask", wraps=frame_network.frame_causal_mask) as build:
        predict(model, random_clip(model, 4))
        assert build.call_count == 1
        predict(model, random_clip(model, 1))
        assert build.call_count == 1  # one frame sees itself whole


# Half precision


@base_and_long
def test_half_precision_is_as_exact_at_frame_700_as_at_frame_100(long_patch_size):
    model = sharpened(tiny_transformer(1, patch_size=2, long_patch_size=long_patch_size, short_window=4))
    clip = random_clip(model, 701, 2, 2, batch_size=12, seed=1)
    near, far = (half_precision_error(model, clip, frame) for frame in (100, 700))
    assert far < 1.3 * near


# Bad input


def test_other_channels_are_refused():
    model = tiny_transformer()
    with pytest.raises(ValueError, match="`hidden_states` has 5 channels but this model has `in_channels` 4; pass"):
        model(torch.randn(1, 2, 5, 4, 4), 500)


def test_a_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="3x4 cannot be cut by `patch_size` 2"):
        tiny_transformer(patch_size=2)(torch.randn(1, 2, 4, 3, 4), 500)


@pytest.mark.parametrize("shape", [(3,), (4,), (1, 2, 4)])
def test_a_timestep_of_another_shape_is_refused(shape):
    model = tiny_transformer()
    with pytest.raises(ValueError, match=r"`timestep` has shape .* pass one number, \(2,\) or \(2, 4\)"):
        model(torch.randn(2, 4, 4, 4, 4), torch.full(shape, 500.0))


@pytest.mark.parametrize("name", ["actions", "class_labels", "action_mask"])
def test_superfluous_conditions_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` was given but this model is not conditioned on it; leave it out"):
        tiny_transformer()(torch.randn(1, 2, 4, 4, 4), 500, **{name: torch.zeros(1, 2, dtype=torch.int64)})


@pytest.mark.parametrize(
    "condition, name",
    [({"num_actions": 3}, "actions"), ({"action_dim": 2}, "actions"), ({"num_classes": 3}, "class_labels")],
)
def test_missing_conditions_are_refused(condition, name):
    with pytest.raises(ValueError, match=f"`{name}` is None but this model is conditioned on it; pass {name}"):
        tiny_transformer(**condition)(torch.randn(1, 2, 4, 4, 4), 500)


@pytest.mark.parametrize(
    "condition, name, shape",
    [
        ({"num_actions": 3}, "actions", (1, 3)),
        ({"num_actions": 3}, "actions", (2, 2)),
        ({"action_dim": 2}, "actions", (1, 2, 3)),
        ({"num_classes": 3}, "class_labels", (2,)),
        ({"num_classes": 3}, "class_labels", (1, 2)),
    ],
)
def test_conditions_of_another_shape_are_refused(condition, name, shape):
    with pytest.raises(ValueError, match=rf"`{name}` has shape .*; with these latents it must be"):
        tiny_transformer(**condition)(torch.randn(1, 2, 4, 4, 4), 500, **{name: torch.zeros(shape, dtype=torch.int64)})


@pytest.mark.parametrize(
    "config, message",
    [
        ({"axes_dims_rope": (4, 6, 8)}, "`axes_dims_rope` is .* and `attention_head_dim` 16"),
        ({"axes_dims_rope": (5, 5, 6)}, "`axes_dims_rope` is .* must be even"),
        ({"patch_size": 2, "long_patch_size": 3}, "`long_patch_size` is 3 and `patch_size` 2.*choose a multiple"),
        ({"short_window": 0}, "`short_window` is 0; the noisy frame alone needs 1"),
        ({"action_shift": 2}, "`action_shift` is 2; it is 0 or 1"),
        ({"num_actions": 3, "action_dim": 2}, "`num_actions` is 3 and `action_dim` 2.*give one"),
        ({"condition_dropout": 1.0}, "`condition_dropout` is 1.0; it is a share, at least 0 and below 1"),
        ({"condition_dropout": None}, "`condition_dropout` is None"),
        ({"num_layers": 10**9}, "`num_layers` is 1000000000; pass a whole number from 1 to"),
        ({"num_layers": 0}, "`num_layers` is 0"),
        ({"num_layers": -1}, "`num_layers` is -1"),
        ({"num_layers": True}, "`num_layers` is True"),
        ({"num_layers": "2"}, "`num_layers` is '2'"),
        ({"in_channels": 0}, "`in_channels` is 0"),
        ({"out_channels": 0}, "`out_channels` is 0"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0"),
        ({"num_attention_heads": 2.0}, "`num_attention_heads` is 2.0"),
        ({"attention_head_dim": -16, "axes_dims_rope": (-4, -6, -6)}, "`attention_head_dim` is -16"),
        ({"axes_dims_rope": (-4, 10, 10)}, "`axes_dims_rope` is .*give three whole numbers"),
        ({"axes_dims_rope": (8, 8)}, "`axes_dims_rope` is .*give three whole numbers"),
        ({"axes_dims_rope": None}, "`axes_dims_rope` is None"),
        ({"patch_size": 0}, "`patch_size` is 0"),
        ({"long_patch_size": 0}, "`long_patch_size` is 0"),
        ({"short_window": 10**9}, "`short_window` is 1000000000"),
        ({"mlp_ratio": float("nan")}, "`mlp_ratio` is nan; give a finite number above 0"),
        ({"mlp_ratio": 0}, "`mlp_ratio` is 0"),
        ({"mlp_ratio": 1e-9}, "`mlp_ratio` is 1e-09; of a width of"),
        ({"mlp_ratio": 1e308}, r"`mlp_ratio` is 1e\+308; of a width of"),
        ({"rope_theta": float("nan")}, "`rope_theta` is nan"),
        ({"rope_theta": -1.0}, "`rope_theta` is -1.0"),
        ({"num_actions": -1}, "`num_actions` is -1"),
        ({"action_dim": 0}, "`action_dim` is 0"),
        ({"num_classes": 10**12}, "`num_classes` is 1000000000000"),
        ({"trained_frames": 0}, "`trained_frames` is 0"),
        ({"frame_causal": "no"}, "`frame_causal` is 'no'"),
        (
            {"num_layers": 1024, "num_attention_heads": 1024},
            "With `num_layers` 1024, `num_attention_heads` 1024, .* GiB in float32, and this machine has",
        ),
    ],
)
def test_an_impossible_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**config)


@pytest.mark.parametrize("load", ["from_config", "from_pretrained"])
def test_a_crafted_config_is_refused_before_memory_is_taken(tmp_path, load):
    tiny_transformer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`num_layers` is 1000000000"):
        getattr(FARTransformer3DModel, load)(config if load == "from_config" else tmp_path)


CACHES = [name for name in dir(diffusers.hooks) if name.endswith(("CacheConfig", "BroadcastConfig"))]


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers_are_refused_and_what_a_step_is_called_is_not(name):
    model, cache = tiny_transformer(), getattr(diffusers.hooks, name)
    with pytest.raises(ValueError, match=f"`config` is a {name}, .*`short_cache`"):
        model.enable_cache(cache.__new__(cache))
    assert not model.is_cache_enabled
    with model.cache_context("denoise", step_index=0):
        predict(model, random_clip(model, 2))
