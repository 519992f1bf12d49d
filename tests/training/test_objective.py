"""The draws of the training objective and its loss."""

from dataclasses import replace

import pytest
import torch

from diffusers_far.training.clips import step_generator
from diffusers_far.training.objective import (
    ObjectiveDraw,
    TrainingObjective,
    add_noise,
    draw_num_long_frames,
    draw_steps,
    draw_timesteps,
    flow_map_loss,
    flow_map_target,
    velocity_loss,
)


LATENT_SHAPE = (2, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_batch(objective: TrainingObjective, num_clips: int, num_frames: int, num_long_frames: int = 0):
    generator = seeded()
    return ObjectiveDraw.stack(
        [objective.draw(num_frames, num_long_frames, LATENT_SHAPE, generator) for _ in range(num_clips)]
    )


def example(num_clips: int = 3, num_frames: int = 6, num_long_frames: int = 2):
    draw = draw_batch(TrainingObjective(clean_context_ratio=0.3), num_clips, num_frames, num_long_frames)
    return torch.randn(num_clips, num_frames, *LATENT_SHAPE, generator=seeded(1)), draw


def test_timesteps_are_the_integers_of_a_logit_normal_distribution():
    timestep = draw_timesteps(200_000, seeded())
    assert timestep.min() >= 1 and timestep.max() <= 1000
    assert torch.equal(timestep, timestep.round())
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(share)).sigmoid() * 1000
        assert abs(timestep.quantile(share) - expected) < 6


def test_a_shifted_mean_draws_more_noise():
    median = draw_timesteps(20_000, seeded(), logit_mean=1.0, logit_std=0.5).median()
    assert abs(median - 1000 * torch.tensor(1.0).sigmoid()) < 6
    objective = TrainingObjective(logit_mean=1.0)
    timestep = draw_batch(objective, 200, 8).timestep
    assert timestep[timestep > 0].median() > 650


def test_every_number_of_long_frames_is_drawn_equally_often():
    generator = seeded()
    counts = torch.bincount(torch.tensor([draw_num_long_frames(12, 8, generator) for _ in range(5000)]))
    assert len(counts) == 5
    assert (counts / 5000 - 0.2).abs().max() < 0.02
    assert draw_num_long_frames(8, 8, generator) == 0


def test_a_tenth_of_the_frames_is_clean():
    timestep = draw_batch(TrainingObjective(), 2000, 8).timestep
    assert abs((timestep == -1).float().mean() - 0.1) < 0.01


def test_long_frames_are_clean_and_have_no_noise():
    draw = draw_batch(TrainingObjective(clean_context_ratio=0.0), 10, 6, num_long_frames=2)
    assert (draw.timestep[:, :2] == -1).all() and (draw.timestep[:, 2:] >= 1).all()
    assert not draw.noise[:, :2].any() and draw.noise[:, 2:].all()


def test_a_clean_prefix_has_every_length_and_is_followed_by_a_noisy_frame():
    draw = draw_batch(TrainingObjective(clean_prefix_ratio=1.0, clean_context_ratio=0.0), 600, 7, num_long_frames=2)
    num_clean = (draw.timestep == -1).sum(dim=1)
    assert set(num_clean.tolist()) == {3, 4, 5, 6}
    for timestep, length in zip(draw.timestep, num_clean):
        assert (timestep[:length] == -1).all() and (timestep[length:] >= 1).all()


def test_a_prefix_leaves_a_noisy_frame_whatever_else_is_clean():
    draw = draw_batch(TrainingObjective(clean_prefix_ratio=1.0, clean_context_ratio=1.0), 100, 5)
    assert ((draw.timestep >= 1).sum(dim=1) == 1).all()


def test_video_dit_has_one_noise_level_and_no_clean_context():
    draw = draw_batch(TrainingObjective("video_dit", clean_context_ratio=0.5), 50, 6)
    assert (draw.timestep == draw.timestep[:, :1]).all() and (draw.timestep >= 1).all()
    assert draw.timestep.unique().numel() > 10


def test_with_teacher_forcing_every_short_frame_is_noisy():
    objective = TrainingObjective(teacher_forcing=True, clean_context_ratio=0.5, clean_prefix_ratio=0.5)
    timestep = draw_batch(objective, 50, 6, num_long_frames=2).timestep
    assert (timestep[:, :2] == -1).all() and (timestep[:, 2:] >= 1).all()


def test_every_decoder_draw_has_noise_and_levels_of_its_own_and_the_conditions_are_shared():
    draw = draw_batch(TrainingObjective(teacher_forcing=True, decoder_draws=3), 5, 6)
    assert draw.noise.shape == (5, 3, 6, *LATENT_SHAPE) and draw.timestep.shape == (5, 3, 6)
    assert draw.timestep.unique().numel() > 60 and draw.noise.unique().numel() == draw.noise.numel()
    assert draw.keeps_action.shape == (5, 6) and (draw.timestep >= 1).all()


def test_a_frame_without_a_feature_is_clean_in_every_draw():
    for learn_start, num_long_frames, num_clean in ((True, 0, 0), (False, 0, 1), (True, 2, 3), (False, 2, 3)):
        objective = TrainingObjective(teacher_forcing=True, decoder_draws=2, learn_start=learn_start)
        timestep = draw_batch(objective, 4, 6, num_long_frames).timestep
        assert (timestep[..., :num_clean] == -1).all() and (timestep[..., num_clean:] >= 1).all()


def test_the_loss_of_several_draws_is_the_mean_of_theirs():
    latents = torch.randn(3, 6, *LATENT_SHAPE, generator=seeded(1))
    draw = draw_batch(TrainingObjective(teacher_forcing=True, decoder_draws=2), 3, 6)
    noise, timestep = draw.noise.transpose(0, 1), draw.timestep.transpose(0, 1)
    velocity = torch.randn(2, 3, 4, *LATENT_SHAPE, generator=seeded(2))
    losses = [velocity_loss(velocity[each], latents, noise[each], timestep[each]) for each in range(2)]
    torch.testing.assert_close(velocity_loss(velocity, latents, noise, timestep), sum(losses) / 2)


def test_decoder_draws_need_clean_context():
    with pytest.raises(ValueError, match="`decoder_draws` is 2 and `teacher_forcing` False"):
        TrainingObjective(decoder_draws=2)


def test_teacher_forcing_of_a_video_dit_is_refused():
    with pytest.raises(ValueError, match="`teacher_forcing` needs frames in an order"):
        TrainingObjective("video_dit", teacher_forcing=True)


def test_conditions_are_dropped_at_their_share():
    draw = draw_batch(TrainingObjective(condition_dropout=0.3), 1000, 8)
    assert abs(draw.keeps_action.float().mean() - 0.7) < 0.02
    assert abs(draw.keeps_label.float().mean() - 0.7) < 0.05
    assert draw_batch(TrainingObjective(condition_dropout=0.0), 10, 8).keeps_action.all()


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 33])
def test_a_repeated_clip_is_a_stretch_of_itself_over_and_over(num_frames):
    lengths = set()
    for order in draw_batch(TrainingObjective(repeat_ratio=1.0), 300, num_frames).frame_order:
        jumps = (order.diff() != 1).nonzero().flatten() + 1
        length = int(jumps[0]) if len(jumps) else num_frames
        assert torch.equal(order, order[0] + torch.arange(num_frames) % length)
        assert 0 <= order[0] and order.max() < num_frames
        lengths.add(length)
    assert lengths == ({1} if num_frames == 1 else set(range(-(-num_frames // 8), num_frames // 2 + 1)))


def test_clips_are_repeated_at_their_share_and_drawn_as_if_they_were_not():
    plain, repeated = (draw_batch(TrainingObjective(repeat_ratio=ratio), 1, 8) for ratio in (0.0, 1.0))
    for name in ("noise", "timestep", "keeps_label"):
        assert torch.equal(getattr(plain, name), getattr(repeated, name))
    assert torch.equal(plain.frame_order, torch.arange(8)[None])
    orders = draw_batch(TrainingObjective(repeat_ratio=0.3), 1000, 8).frame_order
    assert abs((orders != torch.arange(8)).any(dim=1).float().mean() - 0.3) < 0.05


def test_no_action_leads_from_the_end_of_a_stretch_to_its_start():
    draw = draw_batch(TrainingObjective(repeat_ratio=1.0, condition_dropout=0.0), 100, 12)
    assert torch.equal(draw.keeps_action[:, 1:], draw.frame_order.diff(dim=1) == 1)
    assert draw.keeps_action[:, 0].all()


def test_draws_depend_on_seed_and_step_and_clip_alone():
    objective = TrainingObjective(clean_prefix_ratio=0.5)

    def draw(seed, step, clip):
        return objective.draw(6, 2, LATENT_SHAPE, step_generator(seed, step, clip, stream=2))

    first = draw(0, 7, 3)
    torch.manual_seed(123)
    again = draw(0, 7, 3)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.timestep, again.timestep)
    for other in (draw(1, 7, 3), draw(0, 8, 3), draw(0, 7, 4)):
        assert not torch.equal(first.noise, other.noise)


def test_noisy_frames_lie_between_data_and_noise_and_clean_ones_are_untouched():
    latents, draw = example()
    noisy = add_noise(latents, draw.noise, draw.timestep)
    is_clean = draw.timestep == -1
    assert torch.equal(noisy[is_clean], latents[is_clean])
    time = (draw.timestep / 1000)[..., None, None, None]
    expected = latents + time * (draw.noise - latents)
    torch.testing.assert_close(noisy[~is_clean], expected[~is_clean])
    pure_noise = add_noise(latents, draw.noise, torch.full_like(draw.timestep, 1000.0))
    assert torch.equal(pure_noise, draw.noise)


def test_the_true_velocity_has_no_loss_and_leads_back_to_the_data():
    latents, draw = example()
    velocity = draw.noise - latents
    assert velocity_loss(velocity[:, 2:], latents, draw.noise, draw.timestep) == 0
    noisy = add_noise(latents, draw.noise, draw.timestep)
    time = (draw.timestep.clamp(min=0) / 1000)[..., None, None, None]
    torch.testing.assert_close(noisy - time * velocity, latents)


def test_the_loss_ignores_clean_and_long_frames():
    latents, draw = example()
    velocity = torch.randn(3, 4, *LATENT_SHAPE, generator=seeded(2))
    loss = velocity_loss(velocity, latents, draw.noise, draw.timestep)

    is_clean = (draw.timestep[:, 2:] == -1)[..., None, None, None]
    assert is_clean.any()
    assert velocity_loss(velocity + 5 * is_clean, latents, draw.noise, draw.timestep) == loss
    long_part = torch.cat([torch.randn(3, 2, *LATENT_SHAPE, generator=seeded(3)), latents[:, 2:]], dim=1)
    assert velocity_loss(velocity, long_part, draw.noise, draw.timestep) == loss
    assert velocity_loss(velocity + 5 * ~is_clean, latents, draw.noise, draw.timestep) > loss


def test_each_clip_counts_the_same_whatever_its_number_of_noisy_frames():
    latents = torch.zeros(2, 4, *LATENT_SHAPE)
    timestep = torch.tensor([[500.0, 500.0, 500.0, 500.0], [-1.0, -1.0, -1.0, 500.0]])
    velocity = torch.ones(2, 4, *LATENT_SHAPE)
    velocity[1] = 3.0
    assert velocity_loss(velocity, latents, latents, timestep) == pytest.approx((1 + 9) / 2)


def test_a_clip_without_a_noisy_frame_has_no_loss():
    latents = torch.zeros(1, 2, *LATENT_SHAPE)
    assert velocity_loss(torch.ones_like(latents), latents, latents, torch.full((1, 2), -1.0)) == 0


@pytest.mark.parametrize("name", ["clean_context_ratio", "clean_prefix_ratio", "condition_dropout"])
def test_shares_outside_0_to_1_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is 1.5"):
        TrainingObjective(**{name: 1.5})


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="`name` is 'gan'"):
        TrainingObjective("gan")


FLOW_MAP = TrainingObjective(teacher_forcing=True, flow_map=True)


def test_half_of_the_steps_end_where_they_begin_and_a_quarter_at_0():
    start, end = draw_steps((5000, 8), seeded())
    assert start.min() >= 5 and start.max() <= 995 and end.min() >= 0 and (end <= start).all()
    assert (end == start).float().mean() == 0.5 and (end == 0).float().mean() == 0.25
    assert ((end == start)[:, 1:] | (end == start)[:, :-1]).all()
    assert abs(start.mean() - 2000 / 3) < 5  # the larger of two uniforms
    assert abs(end[(end > 0) & (end < start)].mean() - 1000 / 3) < 10  # the smaller


@pytest.mark.parametrize("decoder_draws", [None, 2])
def test_clean_and_long_frames_have_no_step(decoder_draws):
    objective = replace(FLOW_MAP, decoder_draws=decoder_draws, flow_map_guidance=2.0)
    draw = draw_batch(objective, 3, 6, num_long_frames=2)
    assert draw.r_timestep.shape == draw.timestep.shape and draw.guidance_scale == 2.0
    assert ((draw.timestep == -1) == (draw.r_timestep == -1)).all()
    assert (draw.timestep == -1).sum(dim=-1).unique().tolist() == [3 if decoder_draws else 2]
    moved = draw.to("meta")
    assert moved.r_timestep.device.type == moved.noise.device.type == "meta"


def test_the_target_of_a_known_field_is_its_mean_velocity():
    """Of `dx/dt = x cos(4t)`, whose paths are `x(r) = x(t) exp((sin 4r - sin 4t) / 4)`."""

    def mean_velocity(latents, timestep, r_timestep):
        t, r = ((each.clamp(min=0) / 1000)[..., None, None, None] for each in (timestep, r_timestep))
        share = 1 - torch.exp((torch.sin(4 * r) - torch.sin(4 * t)) / 4)
        return latents * torch.where(t == r, torch.cos(4 * t), share / (t - r).where(t != r, 1))

    draw, latents = draw_batch(FLOW_MAP, 4, 8), torch.randn(4, 8, *LATENT_SHAPE, generator=seeded(1))
    time = (draw.timestep / 1000)[..., None, None, None]
    way = (latents, latents * torch.cos(4 * time), draw.timestep, draw.r_timestep)
    expected = mean_velocity(latents, draw.timestep, draw.r_timestep)
    # Where r = t the target is v; a difference that crosses r must not change it.
    target = flow_map_target(mean_velocity, *way)
    torch.testing.assert_close(target, expected, atol=2e-4, rtol=1e-3)
    is_flow = draw.r_timestep == draw.timestep
    assert torch.equal(target[is_flow], way[1][is_flow])


def test_the_error_of_a_step_is_as_large_as_the_mean_of_plain_flow_beside_it_and_keeps_its_direction():
    timestep = torch.tensor([[500.0, 500.0, 500.0, -1.0]]).repeat(2, 1)
    end = torch.tensor([[500.0, 500.0, 100.0, -1.0], [100.0, 100.0, 100.0, -1.0]])
    target, weight = torch.zeros(2, 4, *LATENT_SHAPE), 0.5 * 0.5**0.5
    velocity = (
        torch.tensor([1.0, 3.0, 7.0, 100.0])[None, :, None, None, None].expand_as(target).clone().requires_grad_()
    )
    loss = flow_map_loss(velocity, target, timestep, end)
    # The second clip has no plain flow, and is left as it is.
    assert loss.item() == pytest.approx(weight * ((1 + 9 + 5) / 3 + (1 + 9 + 49) / 3) / 2)
    loss.backward()
    assert not velocity.grad[:, 3].any() and (velocity.grad[:, :3] > 0).all()
    assert torch.allclose(velocity.grad[0, 2] / velocity.grad[1, 2], torch.tensor(5 / 49))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"flow_map": True}, "`teacher_forcing` is False, but the frames of a flow map"),
        ({"flow_map": True, "teacher_forcing": True, "logit_mean": 1.0}, "`logit_mean` is 1.0 .*leave them out"),
        ({"flow_map_guidance": 2.0}, "`flow_map_guidance` is 2.0 and `flow_map` False"),
    ],
)
def test_flow_maps_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingObjective(**settings)
