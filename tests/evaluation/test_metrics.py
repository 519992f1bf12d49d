import math

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from diffusers_far.evaluation.metrics import (
    Estimate,
    best_trajectory,
    frame_lpips,
    frame_psnr,
    frame_ssim,
    mean_where,
    revisited_and_unseen,
    revisits_by_age,
    seen_before,
)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 3, 20, 24, generator=generator)
    return (truth + 0.1 * torch.randn(truth.shape, generator=generator)).clamp(0, 1), truth


@pytest.mark.parametrize(
    ("of_frames", "of_one"),
    [
        (frame_psnr, PeakSignalNoiseRatio(data_range=1.0)),
        (frame_ssim, StructuralSimilarityIndexMeasure(data_range=1.0)),
    ],
)
def test_each_frame_has_the_score_that_it_has_alone(pair, of_frames, of_one):
    scores = of_frames(*pair)
    assert scores.shape == (2, 3)
    for video in range(2):
        for frame in range(3):
            alone = of_one(pair[0][video, frame][None], pair[1][video, frame][None])
            assert scores[video, frame] == pytest.approx(alone.item(), rel=1e-5)


def test_psnr_of_a_known_error_is_that_of_the_formula():
    truth = torch.full((1, 1, 3, 4, 4), 0.5)
    assert frame_psnr(truth + 0.1, truth).item() == pytest.approx(20, abs=1e-4)


def test_equal_frames_have_the_best_scores(pair):
    truth = pair[1]
    assert (frame_psnr(truth, truth) == 100).all()
    torch.testing.assert_close(frame_ssim(truth, truth), torch.ones(2, 3))


def test_lpips_sees_images_from_minus_one_to_one_and_keeps_the_order_of_frames(pair):
    class AbsoluteError(torch.nn.Linear):
        def forward(self, images, target):
            assert images.min() < -0.5 and images.max() > 0.5
            return (images - target).abs().mean((1, 2, 3))

    expected = 2 * (pair[0] - pair[1]).abs().mean((2, 3, 4))
    torch.testing.assert_close(frame_lpips(AbsoluteError(1, 1), *pair), expected)


def test_the_best_trajectory_is_one_trajectory_and_not_the_best_of_each_frame():
    scores = torch.tensor([[[1.0, 9.0], [6.0, 6.0]], [[3.0, 3.0], [2.0, 1.0]]])
    assert best_trajectory(scores, higher_is_better=True).tolist() == [[6, 6], [3, 3]]
    assert best_trajectory(scores, higher_is_better=False).tolist() == [[1, 9], [2, 1]]


def test_a_view_is_seen_again_after_a_turn_all_the_way_round():
    """A walker turns on the spot by 90 degrees a frame, walks off at frame 5 and comes back at frame 7."""
    heading = torch.tensor([0.0, 90, 180, 270, 360, 450, 540, 630])
    place = torch.tensor([0.0, 0, 0, 0, 0, 100, 100, 0])
    pose = torch.stack([place, torch.zeros(8), heading], dim=1)
    everything = slice(0, 8)
    assert seen_before(pose, everything, everything).tolist() == [False] * 4 + [True, False, False, True]
    assert seen_before(pose, everything, everything, min_age=4)[4:].tolist() == [True, False, False, True]
    assert not seen_before(pose, everything, everything, min_age=5).any()
    assert not seen_before(
        pose, slice(0, 3), slice(6, 8)
    ).any()  # frame 3, which frame 7 looks like, is not remembered


def test_a_revisit_is_one_definition_whether_long_ago_is_told_by_age_or_by_place():
    """Two walks of 12 frames among four places; ages are counted one by one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        places = torch.randint(4, (12,), generator=generator)
        pose = torch.stack([1000.0 * places, torch.zeros(12), torch.zeros(12)], dim=1)
        revisited, unseen = revisits_by_age(pose, slice(4, 12), min_revisit_age=5, max_recent_age=1)
        for frame in range(4, 12):
            ages = [frame - other for other in range(frame) if places[other] == places[frame]]
            long_ago, since = any(age >= 5 for age in ages), any(1 < age < 5 for age in ages)
            assert revisited[frame - 4].item() == (long_ago and not since)
            assert unseen[frame - 4].item() == (not long_ago and not since)
        by_place = (seen_before(pose, part, slice(11, 12)) for part in (slice(0, 7), slice(7, 10)))
        by_age = revisits_by_age(pose, slice(11, 12), min_revisit_age=5, max_recent_age=1)
        assert [mask.item() for mask in revisited_and_unseen(*by_place)] == [mask.item() for mask in by_age]


def test_near_means_within_distance_and_angle_whichever_way_round():
    pose = torch.tensor([[0.0, 0, 355], [0, 40, 10], [0, 40.1, 355], [0, 0, 10.1]])
    seen = [seen_before(pose[[0, other]], slice(0, 1), slice(1, 2)).item() for other in (1, 2, 3)]
    assert seen == [True, False, False]


def test_a_video_without_masked_frames_has_no_mean():
    values, mask = torch.tensor([[1.0, 3], [5, 7]]), torch.tensor([[True, True], [False, False]])
    means = mean_where(values, mask)
    assert means[0] == 2 and math.isnan(means[1])
    assert Estimate.of(means).num_samples == 1
    assert Estimate.of(means).to_json() == {"mean": 2, "half_width": None, "num_samples": 1}
    assert Estimate.of(means[1:]).to_json() == {"mean": None, "half_width": None, "num_samples": 0}
