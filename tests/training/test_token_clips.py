from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_vq

from diffusers_far import TokenARConfig, TokenARForVideo
from diffusers_far.data.clips import Clip, ClipBatch
from diffusers_far.models.codec import decode_codes
from diffusers_far.training.objective import ObjectiveDraw, TrainingObjective
from diffusers_far.training.tokens import continue_clips, measure_tokens, token_conditions, token_loss
from diffusers_far.training.validation import psnr_per_horizon


DECODER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


def tiny_token_ar(num_actions: int | None = 3) -> TokenARForVideo:
    torch.manual_seed(0)
    config = TokenARConfig(num_codes=16, tokens_per_frame=6, num_actions=num_actions, decoder=DECODER)
    return TokenARForVideo(config).eval()


@pytest.fixture
def clips() -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (2, 4, 1, 2, 3), generator=generator)
    return ClipBatch(codes, torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]]), None)


def draw_for(clips: ClipBatch, dropout: float) -> ObjectiveDraw:
    objective = TrainingObjective(condition_dropout=dropout)
    draws = [objective.draw(4, 0, (1, 2, 3), torch.Generator().manual_seed(seed)) for seed in range(2)]
    return ObjectiveDraw.stack(draws)


def test_each_frame_is_fed_the_action_that_led_to_it_and_the_first_none(clips):
    conditions = token_conditions(clips, tiny_token_ar().config)
    assert conditions["actions"][:, 1:].tolist() == [[0, 1, 2], [2, 2, 1]]
    assert conditions["action_mask"].tolist() == [[False, True, True, True]] * 2


def test_dropped_actions_are_null_and_the_first_frame_has_none_in_any_case(clips):
    config = tiny_token_ar().config
    kept = token_conditions(clips, config, draw_for(clips, 0.0))["action_mask"]
    dropped = token_conditions(clips, config, draw_for(clips, 1.0))["action_mask"]
    assert kept.tolist() == [[False, True, True, True]] * 2 and not dropped.any()


def test_a_model_without_actions_is_fed_none(clips):
    assert token_conditions(clips, tiny_token_ar(None).config) == {}
    assert torch.isfinite(token_loss(tiny_token_ar(None), tiny_token_ar(None).config, replace(clips, actions=None)))


def test_the_loss_of_an_untrained_model_is_about_that_of_a_guess(clips):
    model = tiny_token_ar()
    assert token_loss(model, model.config, clips).item() == pytest.approx(torch.tensor(16.0).log().item(), abs=0.3)


def test_clips_are_continued_at_true_actions_the_same_every_time_against_decoded_codes(clips):
    model, vq = tiny_token_ar(), tiny_vq()
    generated, truth = continue_clips(model, vq, clips, 2)
    assert generated.shape == truth.shape == (2, 2, 3, 4, 6)
    torch.testing.assert_close(truth[1], decode_codes(vq, clips.latents[1, 2:, 0]))
    again, _ = continue_clips(model, vq, clips, 2)
    assert torch.equal(generated, again)


def test_repeating_the_last_frame_is_measured_beside_the_model(clips):
    class Codes:
        num_frames, latent_shape = np.array([4, 4]), (1, 2, 3)

        def clip(self, trajectory, start, length, interval=1):
            return Clip(clips.latents[trajectory], clips.actions[trajectory], None)

    vq = tiny_vq()
    sizes = {"num_frames": 4, "num_clips": 2, "num_videos": 2, "num_new_frames": 2, "batch_size": 2}
    metrics = measure_tokens(tiny_token_ar(), vq, Codes(), **sizes)
    repeated, truth = (
        decode_codes(vq, clips.latents[:, 1, 0]),
        [decode_codes(vq, clips.latents[:, 2 + i, 0]) for i in (0, 1)],
    )
    expected = psnr_per_horizon(repeated[:, None], torch.stack(truth, dim=1))
    assert [metrics[f"repeated_psnr_of_frame_{horizon}"] for horizon in (1, 2)] == pytest.approx(expected)
    assert {"loss", "psnr", "psnr_of_frame_2"} <= metrics.keys()
