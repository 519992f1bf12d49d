import pytest
import torch

from diffusers_far.evaluation.protocols import PROTOCOLS, Case, LatteProtocol, McvdProtocol, TecoProtocol


def lengths(protocol) -> list[tuple[int, int]]:
    return [(task.num_context_frames, task.num_frames) for task in protocol.tasks]


def test_the_defaults_are_the_published_numbers():
    teco, mcvd, latte = (PROTOCOLS[name]() for name in ("teco", "mcvd", "latte"))
    assert lengths(teco) == [(144, 156), (36, 264)] and teco.num_frames_needed == 300
    assert [(task.compares_frames, task.compares_distributions) for task in teco.tasks] == [
        (True, False),
        (False, True),
    ]
    assert lengths(mcvd) == [(4, 12)] and mcvd.tasks[0].num_trajectories == 100
    assert lengths(latte) == [(0, 16)] and latte.num_videos == 2048 and latte.seeds == (0, 2, 4, 6)
    assert [teco.num_videos, mcvd.num_videos] == [256, 256]
    assert [teco.guidance_scale, mcvd.guidance_scale, latte.guidance_scale] == [1.5, 1.0, 2.0]
    assert lengths(McvdProtocol(num_context_frames=2, num_frames=28)) == [(2, 28)]


def test_free_generation_is_not_guided_unless_asked_for():
    assert LatteProtocol(condition="free").guidance_scale == 1.0
    assert LatteProtocol(condition="free", guidance_scale=1.5).guidance_scale == 1.5


def test_batches_hold_every_case_once_and_one_task_each():
    protocol = TecoProtocol(num_videos=5, seeds=(0, 1), batch_size=4)
    batches = protocol.batches()
    assert sorted(case for batch in batches for case in batch) == sorted(protocol.cases())
    assert len(set(protocol.cases())) == 2 * 2 * 5
    assert all(len({case.task for case in batch}) == 1 and len(batch) <= 4 for batch in batches)


def test_cases_draw_noise_of_their_own_that_depends_on_nothing_else():
    case = Case("a", 0, 1, 2)
    noise = [torch.rand(4, generator=each.generator()) for each in (case, Case("a", 0, 1, 2), Case("a", 0, 2, 1))]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_clips_of_generation_start_anywhere_and_of_continuation_where_they_are_told_to():
    latte = LatteProtocol(num_frames=4, frame_interval=3)
    assert latte.num_frames_needed == 10
    starts = {latte.first_frame(video, 13) for video in range(50)}
    assert starts == {0, 1, 2, 3}
    assert latte.first_frame(7, 13) == LatteProtocol(num_frames=4, frame_interval=3).first_frame(7, 13)
    teco = TecoProtocol(first_context_frame=9)
    assert teco.first_frame(0, 400) == 9 and teco.num_frames_needed == 309


@pytest.mark.parametrize(
    ("protocol", "settings", "message"),
    [
        (McvdProtocol, {"num_trajectories": 0}, "num_trajectories"),
        (McvdProtocol, {"frame_interval": 0}, "frame_interval"),
        (McvdProtocol, {"seeds": (1, 1)}, "seeds"),
        (TecoProtocol, {"first_context_frame": -1}, "first_context_frame"),
        (TecoProtocol, {"max_recent_age": 50}, "max_recent_age"),
        (LatteProtocol, {"condition": "none"}, "'class' or 'free'"),
    ],
)
def test_settings_out_of_range_are_named(protocol, settings, message):
    with pytest.raises(ValueError, match=message):
        protocol(**settings)
