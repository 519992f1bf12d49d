"""The batches of the training steps, and what the transformer is fed of them."""

from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_models import tiny_dc, tiny_separable, tiny_transformer

from diffusers_far.data.clips import Clip
from diffusers_far.data.video_clips import EncodedDataset
from diffusers_far.models.transformer_far import FARTransformer3DModel
from diffusers_far.training.clips import TrainingBatches, clip_loss, encode_batches, fed_conditions
from diffusers_far.training.config import FARSettings
from diffusers_far.training.lora import add_lora, lora_targets
from diffusers_far.training.objective import TrainingObjective
from diffusers_far.training.optimizers import rates_by_part


class FakeLatents:
    """Latents that tell where they are from: 1000 times the trajectory plus the frame."""

    num_frames = np.array([30, 11, 40, 25])
    latent_shape = (2, 4, 4)

    def clip(self, trajectory, start, length, interval=1):
        frames = start + interval * torch.arange(length)
        assert 0 <= start and frames[-1] < self.num_frames[trajectory]
        latents = (1000.0 * trajectory + frames)[:, None, None, None].expand(-1, *self.latent_shape)
        return Clip(latents.clone(), frames % 3, trajectory)


def make_batches(objective: TrainingObjective | None = None, **changes) -> TrainingBatches:
    arguments = {
        "num_frames": 12,
        "short_window": 4,
        "interval": 1,
        "batch_size": 4,
        "num_accumulated": 1,
        "seed": 0,
    }
    objective = objective or TrainingObjective(clean_prefix_ratio=0.5)
    return TrainingBatches(FakeLatents(), objective, **(arguments | changes))


def make_transformer(**changes) -> FARTransformer3DModel:
    torch.manual_seed(0)
    sizes = {
        "in_channels": 2,
        "num_layers": 2,
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "patch_size": 2,
        "long_patch_size": 4,
        "short_window": 4,
        "num_actions": 3,
        "action_shift": 1,
    }
    return FARTransformer3DModel(**(sizes | changes))


def test_a_batch_depends_on_seed_and_number_alone():
    clips, draw = make_batches()[5]
    again, draw_again = make_batches()[5]
    assert torch.equal(clips.latents, again.latents) and torch.equal(draw.noise, draw_again.noise)
    assert not torch.equal(draw.timestep, make_batches()[6][1].timestep[:, : draw.timestep.shape[1]])
    assert not torch.equal(draw.noise[:, -1], make_batches(seed=1)[5][1].noise[:, -1])


@pytest.mark.parametrize(
    "split", [{"num_processes": 2}, {"num_accumulated": 2}], ids=["two processes", "two accumulated batches"]
)
def test_a_step_is_the_same_however_it_is_split(split):
    step = 3
    clips, draw = make_batches()[step]
    if "num_processes" in split:
        parts = [make_batches(batch_size=2, process_index=index, **split)[step] for index in range(2)]
    else:
        parts = [make_batches(batch_size=2, **split)[2 * step + accumulated] for accumulated in range(2)]
    assert torch.equal(torch.cat([part.latents for part, _ in parts]), clips.latents)
    assert torch.equal(torch.cat([part.noise for _, part in parts]), draw.noise)
    assert torch.equal(torch.cat([part.timestep for _, part in parts]), draw.timestep)


def test_clip_lengths_run_from_the_short_window_to_the_longest_clip():
    lengths = {batches_length(step) for step in range(200)}
    assert lengths == set(range(4, 13))


def batches_length(step: int) -> int:
    return make_batches()[step][0].latents.shape[1]


def test_without_long_frames_all_clips_have_full_length():
    batches = make_batches(short_window=None)
    assert {batches[step][0].latents.shape[1] for step in range(10)} == {12}


def test_short_trajectories_are_left_out_and_the_others_seen_once_an_epoch():
    batches = make_batches(batch_size=1)
    assert batches.trajectories.tolist() == [0, 2, 3]
    seen = [batches[step][0].labels.item() for step in range(6)]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 2, 3]


def test_frames_lie_an_interval_apart():
    clips, _ = make_batches(interval=2, num_frames=8)[0]
    assert (clips.latents.diff(dim=1) == 2).all()


def test_clips_longer_than_every_trajectory_are_refused():
    with pytest.raises(ValueError, match="`num_frames` 41 at `frame_interval` 1 need 41 frames, but the longest of 4"):
        make_batches(num_frames=41)


@pytest.mark.parametrize("num_frames", [3, 4])
def test_clips_within_the_window_have_no_long_frames_and_a_warning_says_so(num_frames, caplog):
    batches = make_batches(num_frames=num_frames)
    assert f"`num_frames` is {num_frames}, within the short window of 4" in caplog.text
    for step in range(4):
        clips, draw = batches[step]
        assert clips.latents.shape[1] == num_frames and batches.num_long_frames(step) == 0
        assert draw.timestep.shape[-1] == num_frames
    assert batches.longest.num_long_frames(0) == 0 and batches.longest.clip_length(0) == num_frames


def test_dropped_and_missing_actions_are_null():
    clips, draw = make_batches(short_window=None)[0]
    conditions = fed_conditions(clips, make_transformer().config, draw)
    assert torch.equal(conditions["actions"][:, 1:], clips.actions[:, :-1])
    assert not conditions["action_mask"][:, 0].any()
    assert torch.equal(conditions["action_mask"][:, 1:], draw.keeps_action[:, 1:])
    assert fed_conditions(clips, make_transformer().config)["action_mask"][:, 1:].all()


def test_dropped_labels_are_null():
    clips, draw = make_batches()[0]
    config = make_transformer(num_actions=None, num_classes=4).config
    labels = fed_conditions(clips, config, draw)["class_labels"]
    assert torch.equal(labels, torch.where(draw.keeps_label, clips.labels, torch.tensor(4)))


def test_the_loss_reaches_every_parameter_that_can_matter():
    transformer = make_transformer()
    torch.nn.init.normal_(transformer.proj_out.weight)
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight)
        torch.nn.init.normal_(block.norm2.linear.weight)
    clips, draw = make_batches().longest[0]
    clip_loss(transformer, transformer.config, clips, draw).backward()
    without = {
        name
        for name, parameter in transformer.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    # After the last block nobody reads the long tokens, so what they ask there changes nothing.
    assert without == {
        f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    }


def test_teacher_forcing_feeds_the_transformer_the_clean_latents():
    transformer = make_transformer()
    clips, draw = make_batches(objective=TrainingObjective(teacher_forcing=True))[0]
    fed = {}
    transformer.register_forward_pre_hook(lambda module, args, kwargs: fed.update(kwargs), with_kwargs=True)
    clip_loss(transformer, transformer.config, clips, draw.to("cpu"))
    assert torch.equal(fed["clean_hidden_states"], clips.latents)


def test_a_repeated_clip_feeds_frames_with_the_actions_that_were_taken_at_them():
    transformer, objective = (
        make_transformer(),
        TrainingObjective(teacher_forcing=True, repeat_ratio=1.0, condition_dropout=0.0),
    )
    clips, draw = make_batches(objective=objective, short_window=None)[0]
    fed = {}
    transformer.register_forward_pre_hook(lambda module, args, kwargs: fed.update(kwargs), with_kwargs=True)
    clip_loss(transformer, transformer.config, clips, draw)
    for clip, order in enumerate(draw.frame_order):
        assert torch.equal(fed["clean_hidden_states"][clip], clips.latents[clip, order])
        assert torch.equal(fed["actions"][clip, 1:], clips.actions[clip, order[:-1]])
        jumps = (order.diff() != 1).nonzero().flatten() + 1
        assert len(jumps) and not fed["action_mask"][clip, jumps].any()


# Videos that are encoded in the process that trains


@pytest.fixture
def videos(tmp_path, monkeypatch) -> Dataset:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    features, random = Features({"video": List(Image()), "actions": List(Value("int64"))}), np.random.default_rng(0)
    videos = [list(random.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)) for _ in range(5)]
    return Dataset.from_dict({"video": videos, "actions": [[0, 1, 2] * 3] * 5}, features=features)


def load_videos(videos: Dataset, num_workers: int = 0) -> list:
    encoded = EncodedDataset(videos, tiny_dc())
    sizes = {"short_window": 3, "interval": 1, "batch_size": 2, "num_accumulated": 1, "seed": 0}
    batches = TrainingBatches(encoded, TrainingObjective(), num_frames=5, **sizes)
    return list(encode_batches(batches.load(0, 4, num_workers), tiny_dc()))


def test_the_latents_of_a_clip_do_not_depend_on_the_batch(videos):
    vae, encoded = tiny_dc(), EncodedDataset(videos, tiny_dc())
    sizes = {"num_frames": 5, "short_window": 3, "interval": 1, "batch_size": 2, "num_accumulated": 1, "seed": 0}
    not_encoded = TrainingBatches(encoded, TrainingObjective(), **sizes)
    for step, (clips, draw) in enumerate(load_videos(videos)):
        expected, expected_draw = not_encoded[step]
        by_itself = [Clip(frames=frames).encode(vae).latents for frames in expected.frames]
        assert torch.equal(clips.latents, torch.stack(by_itself)) and torch.equal(clips.actions, expected.actions)
        assert torch.equal(draw.noise, expected_draw.noise)


@pytest.mark.full
def test_worker_processes_change_nothing(videos):
    for (clips, draw), (expected, expected_draw) in zip(load_videos(videos, 2), load_videos(videos), strict=True):
        assert torch.equal(clips.latents, expected.latents) and torch.equal(draw.timestep, expected_draw.timestep)


def separable_pass(decoder_draws: int, long_patch_size: int | None = None):
    """A separable model without noise of its own, and the clips and draws of one pass of its training."""
    config = {"in_channels": 2, "num_actions": 3, "action_shift": 1, "short_window": 4, "feature_noise": 0.0}
    model = tiny_separable(**config, long_patch_size=long_patch_size, condition_dropout=0.0).train()
    objective = TrainingObjective(teacher_forcing=True, decoder_draws=decoder_draws, condition_dropout=0.3)
    short_window = None if long_patch_size is None else 4
    clips, draw = make_batches(objective, num_frames=6, short_window=short_window).longest[1]
    return model, replace(clips, latents=torch.randn(clips.latents.shape)), draw


def gradients(model, clips, draw) -> list[torch.Tensor]:
    model.zero_grad()
    clip_loss(model, model.config, clips, draw).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("long_patch_size", [None, 2], ids=["base", "long"])
def test_the_gradient_of_several_draws_is_the_mean_of_those_of_each_alone(long_patch_size):
    model, clips, draw = separable_pass(3, long_patch_size)
    together = gradients(model, clips, draw)
    alone = [
        gradients(model, clips, replace(draw, noise=draw.noise[:, each], timestep=draw.timestep[:, each]))
        for each in range(3)
    ]
    for mean, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(mean, sum(parts) / 3, atol=1e-5, rtol=1e-4)


def test_several_draws_take_one_pass_of_the_encoder():
    model, clips, draw = separable_pass(3)
    encoded, decoded = [], []
    model.encoder.x_embedder.register_forward_hook(lambda *call: encoded.append(call[-1].shape[:2]))
    model.decoder.x_embedder.register_forward_hook(lambda *call: decoded.append(call[-1].shape[:2]))
    clip_loss(model, model.config, clips, draw)
    assert encoded == [(4, 5)] and decoded == [(12, 6)]


def test_the_longest_batches_differ_in_length_alone():
    batches = make_batches()
    assert {batches.longest[step][0].latents.shape[1] for step in range(20)} == {12}
    assert torch.equal(batches.longest[3][0].labels, batches[3][0].labels)
    assert batches.clip_length(3) < 12


def test_an_adapter_of_a_separable_model_learns_in_both_parts():
    model, clips, draw = separable_pass(2)
    trained = add_lora(model, rank=2, alpha=2.0, dropout=0.0, targets=lora_targets(model, ["attention"]))
    settings = FARSettings(output_dir="run", latents_dir="latents", learning_rate=0.5)
    encoder, decoder = rates_by_part(settings, model)
    assert decoder["lr"] == 1.0 and len(encoder["params"]) + len(decoder["params"]) == len(trained)
    clip_loss(model, model.config, clips, draw).backward()
    assert all(any(parameter.grad.any() for parameter in group["params"]) for group in (encoder, decoder))


def flow_map_pass(is_separable: bool, guidance_scale: float = 1.0, **config):
    """A flow map that is trained, and the clips and draws of one pass."""
    make, draws = (tiny_separable, 2) if is_separable else (tiny_transformer, None)
    model = make(in_channels=2, num_actions=3, action_shift=1, condition_dropout=0.0, flow_map=True, **config).train()
    objective = TrainingObjective(
        teacher_forcing=True, decoder_draws=draws, flow_map=True, flow_map_guidance=guidance_scale
    )
    clips, draw = make_batches(objective, num_frames=6, short_window=None)[1]
    return model, replace(clips, latents=torch.randn(clips.latents.shape)), draw


far_and_separable = pytest.mark.parametrize("is_separable", [False, True], ids=["FAR", "separable"])


@far_and_separable
def test_the_loss_of_a_flow_map_reaches_both_times_and_is_the_same_again(is_separable):
    model, clips, draw = flow_map_pass(is_separable, guidance_scale=2.0)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(clip_loss(model, model.config, clips, draw))
    assert losses[0] == losses[1] > 0
    losses[0].backward()
    embedders = {name: weight for name, weight in model.named_parameters() if "timestep_embedder" in name}
    assert any(".r_" in f".{name}" for name in embedders)
    assert all(weight.grad.any() for name, weight in embedders.items())


@pytest.mark.parametrize("guidance_scale, num_passes", [(1.0, 3), (2.0, 4)])
def test_all_passes_of_a_step_draw_the_same_noise_on_features_and_one_has_a_gradient(guidance_scale, num_passes):
    model, clips, draw = flow_map_pass(True, guidance_scale, feature_noise=0.5)
    features, has_gradient = [], []
    model.decoder.x_embedder.register_forward_hook(lambda *call: has_gradient.append(call[-1].requires_grad))
    encode = model.encoder.output
    model.encoder.output = lambda *arguments: features.append(encode(*arguments)) or features[-1]
    clip_loss(model, model.config, clips, draw)
    assert has_gradient == [False] * (num_passes - 1) + [True]
    masked = [each.states for each in features[num_passes - 3 :]]  # those that are fed the conditions
    assert all(torch.equal(each, masked[0]) for each in masked)


def test_a_flow_map_learns_the_velocities_that_guidance_gives():
    """Without conditions this model says 0.5 everywhere; with them what guidance makes of that and the true velocity."""
    model, clips, draw = flow_map_pass(False, guidance_scale=3.0)
    draw = replace(draw, r_timestep=draw.timestep)
    velocity = draw.noise - clips.in_order(draw.frame_order).latents

    def says(latents, timestep, action_mask, **others):
        null = torch.full_like(latents, 0.5)
        return SimpleNamespace(sample=null + 3.0 * (velocity - null) if action_mask.any() else null)

    assert clip_loss(says, model.config, clips, draw) < 1e-10
    assert clip_loss(says, model.config, clips, replace(draw, guidance_scale=2.0)) > 0.1


@far_and_separable
def test_a_flow_map_learns_to_take_one_step_to_a_single_point(is_separable):
    """All clips are zeros, whatever is added to them: from any noise the one step to 0 is the noise itself."""
    model, clips, draw = flow_map_pass(is_separable)
    clips = replace(clips, latents=torch.zeros_like(clips.latents))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(clip_loss(model, model.config, clips, draw))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
