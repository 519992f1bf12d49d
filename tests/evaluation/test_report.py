import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_far.evaluation.metrics import Gaussian, frechet_distance
from diffusers_far.evaluation.protocols import LatteProtocol
from diffusers_far.evaluation.report import join_sheets, markdown_table, summarize
from diffusers_far.evaluation.rollouts import MetricNetworks


def test_the_truth_is_perfect_and_noise_is_not(truth_pipeline, noise_pipeline, protocol, networks, evaluate):
    perfect = summarize(protocol, networks, evaluate(truth_pipeline, protocol, folder="truth"))["prediction"]
    noise = summarize(protocol, networks, evaluate(noise_pipeline, protocol, folder="noise"))["prediction"]
    assert perfect["psnr"]["best"]["mean"] == perfect["psnr"]["mean"]["mean"] == 100
    assert perfect["ssim"]["best"]["mean"] == pytest.approx(1)
    assert perfect["frechet_distance"]["mean"] == pytest.approx(0, abs=1e-9)
    assert noise["psnr"]["best"]["mean"] < 10 and noise["ssim"]["best"]["mean"] < 0.3
    assert noise["frechet_distance"]["mean"] > 1e-5
    assert perfect["psnr"]["repeated"] == noise["psnr"]["repeated"]


def test_the_best_trajectory_counts_for_frames_and_all_of_them_for_the_distance(
    noise_pipeline, protocol, networks, evaluate
):
    folder = evaluate(noise_pipeline, protocol)
    figures = summarize(protocol, networks, folder)["prediction"]
    results = {case: folder.read(case) for case in protocol.cases()}
    means = np.array([[results[case]["psnr"].mean() for case in results if case.video == video] for video in range(3)])
    assert figures["psnr"]["best"]["mean"] == pytest.approx(means.max(axis=1).mean(), rel=1e-6)
    assert figures["psnr"]["mean"]["mean"] == pytest.approx(means.mean(), rel=1e-6)
    assert figures["psnr"]["best"]["num_samples"] == 3
    by_horizon = figures["psnr"]["by_horizon"]["best"]
    assert np.mean([frame["mean"] for frame in by_horizon]) == pytest.approx(figures["psnr"]["best"]["mean"])

    distance = figures["frechet_distance"]
    truth = torch.cat([results[case]["true_image_features"] for case in results if case.trajectory == 0])
    expected = [
        frechet_distance(
            Gaussian.of_samples(
                torch.cat([r["image_features"] for case, r in results.items() if case.trajectory == t])
            ),
            Gaussian.of_samples(truth),
        )
        for t in range(2)
    ]
    assert distance["values"] == pytest.approx(expected)
    assert distance["mean"] == pytest.approx(np.mean(expected))
    assert distance["deviation"] == pytest.approx(np.std(expected, ddof=1))
    assert distance["num_samples"] == 3 * 4 and distance["network"] == "mean colours"


def test_what_has_no_weights_says_so_and_is_no_number(noise_pipeline, protocol, evaluate):
    folder = evaluate(noise_pipeline, protocol, networks=MetricNetworks())
    figures = summarize(protocol, MetricNetworks(), folder)["prediction"]
    for metric in ("lpips", "frechet_distance", "fvd"):
        assert figures[metric] == {"missing": "no weights"}


def test_lpips_is_reported_with_its_lowest_trajectory(noise_pipeline, protocol, evaluate):
    class AbsoluteError(torch.nn.Linear):
        def forward(self, images, target):
            return (images - target).abs().mean((1, 2, 3))

    networks = MetricNetworks(lpips=AbsoluteError(1, 1))
    figures = summarize(protocol, networks, evaluate(noise_pipeline, protocol, networks=networks))["prediction"]
    assert 0 < figures["lpips"]["best"]["mean"] < figures["lpips"]["mean"]["mean"]


def test_revisited_and_unseen_views_are_reported_apart(fake_pipeline, videos, protocol, networks, evaluate):
    """A model that remembers: what it saw three frames ago it shows perfectly, the first predicted frame it cannot."""
    truth = torch.from_numpy(videos).movedim(-1, -3).float() / 255

    def remember(*, video, num_frames, **arguments):
        found = [next(v for v in truth if torch.equal(v[:2], context)) for context in video]
        frames = torch.stack([v[2 : 2 + num_frames] for v in found])
        frames[:, 0] = 1 - frames[:, 0]
        return frames

    wide = type(protocol)(
        **(vars(protocol) | {"max_turn": 60.0, "max_recent_age": 2})
    )  # the last two frames led there
    figures = summarize(wide, networks, evaluate(fake_pipeline(remember), wide))["prediction"]
    assert figures["views"]["revisited"]["psnr"]["mean"] == 100
    assert figures["views"]["revisited"]["share_of_frames"] == pytest.approx(4 / 5)
    assert figures["views"]["unseen"]["share_of_frames"] == pytest.approx(1 / 5)
    assert figures["views"]["unseen"]["psnr"]["mean"] < 30
    turning = summarize(protocol, networks, evaluate(fake_pipeline(remember), protocol, folder="turning"))[
        "prediction"
    ]
    assert turning["views"]["revisited"]["psnr"] == {"mean": None, "half_width": None, "num_samples": 0}
    assert turning["views"]["unseen"]["psnr"]["mean"] == pytest.approx(turning["psnr"]["best"]["mean"])


def test_each_seed_has_a_distance(fake_pipeline, noise_pipeline, networks, evaluate):
    protocol = LatteProtocol(num_videos=3, num_frames=4, seeds=(0, 2, 5), num_feature_frames=4)
    pipe = fake_pipeline(noise_pipeline.make_frames, num_classes=3)
    figures = summarize(protocol, networks, evaluate(pipe, protocol))["generation"]
    distance = figures["frechet_distance"]
    assert len(set(distance["values"])) == 3 and distance["deviation"] > 0
    assert distance["num_samples"] == 12 and "psnr" not in figures


def test_the_table_has_one_row_whose_cells_fit_its_columns(noise_pipeline, protocol, networks, evaluate):
    scores = {"tasks": summarize(protocol, networks, evaluate(noise_pipeline, protocol))}
    json.dumps(scores, allow_nan=False)
    head, rule, row = markdown_table(scores, protocol, "a-model", "a-dataset").splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    cells = dict(zip(head.split(" | "), row.split(" | ")))
    assert cells["LPIPS"] == "no weights" and cells["PSNR, revisited"] == "no frames"
    assert "12 frames" in cells["Fréchet distance of frames"] and "mean colours" in cells["Fréchet distance of frames"]
    assert "2 -> 5" in row and "FVD" in head


def test_samples_are_joined_on_one_sheet(truth_pipeline, protocol, evaluate):
    folder = evaluate(truth_pipeline, protocol, num_samples=2)
    join_sheets(folder)
    join_sheets(folder)  # the joined sheet is not joined again
    height = Image.open(folder.path / "samples" / "contact_sheet.png").height
    one = Image.open(sorted((folder.path / "samples").glob("*video00000*.png"))[0]).height
    assert height == 2 * one + 8
