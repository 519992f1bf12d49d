import av
import pytest
import torch
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.data.clips import Clip
from diffusers_far.data.workers import Share
from diffusers_far.evaluation.metrics import frame_psnr
from diffusers_far.evaluation.protocols import LatteProtocol, TecoProtocol
from diffusers_far.evaluation.rollouts import MetricNetworks, run_cases, view_masks


def read_all(folder, protocol) -> dict[str, torch.Tensor]:
    return {f"{case.name} {name}": tensor for case in protocol.cases() for name, tensor in folder.read(case).items()}


def test_an_interrupted_evaluation_that_goes_on_equals_an_uninterrupted_one(
    noise_pipeline, fake_pipeline, protocol, evaluate
):
    expected = read_all(evaluate(noise_pipeline, protocol, folder="whole"), protocol)

    num_calls = 0

    def stop_at_second_call(**arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise KeyboardInterrupt
        return noise_pipeline.make_frames(**arguments)

    with pytest.raises(KeyboardInterrupt):
        evaluate(fake_pipeline(stop_at_second_call), protocol, folder="stopped")
    folder = evaluate(fake_pipeline(noise_pipeline.make_frames), protocol, folder="stopped")
    found = read_all(folder, protocol)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_real_pipeline_resumed_in_the_middle_of_a_batch_is_equal_to_the_bit(dataset, evaluate, protocol):
    pipe = tiny_pipeline(tiny_transformer(num_actions=3, action_shift=1))
    protocol = type(protocol)(**(vars(protocol) | {"num_inference_steps": 1}))
    expected = read_all(evaluate(pipe, protocol, folder="whole"), protocol)
    folder = evaluate(pipe, protocol, folder="stopped")
    for case in (protocol.cases()[1], protocol.cases()[5]):
        (folder.path / "cases" / f"{case.name}.safetensors").unlink()
    found = read_all(evaluate(pipe, protocol, folder="stopped"), protocol)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_finished_cases_do_not_run_again(noise_pipeline, protocol, evaluate):
    evaluate(noise_pipeline, protocol)
    num_calls = len(noise_pipeline.calls)
    evaluate(noise_pipeline, protocol)
    assert len(noise_pipeline.calls) == num_calls == 2


def test_two_processes_make_together_what_one_would(noise_pipeline, protocol, evaluate):
    expected = read_all(evaluate(noise_pipeline, protocol, folder="one"), protocol)
    for process_index in range(2):
        folder = evaluate(noise_pipeline, protocol, folder="two", share=Share(process_index, 2))
    assert all(torch.equal(read_all(folder, protocol)[name], expected[name]) for name in expected)


def test_cases_are_counted_as_they_are_done(noise_pipeline, protocol, evaluate):
    counts = []
    evaluate(noise_pipeline, protocol, on_batch_end=counts.append)
    assert counts == [4, 2]


def test_the_true_frames_have_perfect_scores_and_the_repeated_frame_has_its_own(
    truth_pipeline, videos, protocol, evaluate
):
    folder = evaluate(truth_pipeline, protocol)
    truth = torch.from_numpy(videos).movedim(-1, -3).float() / 255
    for case in protocol.cases():
        result = folder.read(case)
        assert (result["psnr"] == 100).all() and torch.allclose(result["ssim"], torch.ones(5))
        if case.trajectory == 0:
            repeated = truth[case.video, 1].expand(1, 5, -1, -1, -1)
            expected = frame_psnr(repeated, truth[case.video, None, 2:7])[0]
            torch.testing.assert_close(result["repeated_psnr"], expected)
            assert torch.equal(result["true_image_features"], result["image_features"])


def test_views_are_revisited_if_seen_long_ago_and_not_since_and_unseen_where_only_the_last_frames_came_near(
    truth_pipeline, dataset, protocol, networks, evaluate
):
    """A turn of 20 degrees a frame never comes near an earlier heading; told that 60 degrees are near, it does at once."""
    case = protocol.cases()[0]
    turning = evaluate(truth_pipeline, protocol, folder="turning").read(case)
    assert not turning["revisited"].any() and turning["unseen"].all()
    wide = type(protocol)(**(vars(protocol) | {"max_turn": 60.0}))
    looking_around = evaluate(truth_pipeline, wide, folder="wide").read(case)
    # Frames t - 3 to t - 1 are near to frame t: what was seen long ago was seen since, two frames ago.
    assert not looking_around["revisited"].any() and not looking_around["unseen"].any()
    there_and_back = torch.tensor([[0.0, 0, 0], [100, 0, 0], [200, 0, 0], [0, 0, 0], [0, 0, 0], [100, 0, 0]])
    masks = view_masks(there_and_back, 2, protocol)
    # Frame 4 sees what frame 3 did, which led there, and frame 0.
    assert masks["revisited"].tolist() == [False, True, True, True]
    assert masks["unseen"].tolist() == [True, False, False, False]


def test_conditions_reach_the_pipeline_as_the_model_takes_them(fake_pipeline, noise_pipeline, dataset, evaluate):
    make_frames = noise_pipeline.make_frames
    latte = {"num_videos": 3, "num_frames": 4, "seeds": (0, 2)}
    pipe = fake_pipeline(make_frames, num_classes=3)
    evaluate(pipe, LatteProtocol(**latte), folder="class")
    assert pipe.calls[0]["class_labels"].tolist() == [2, 0, 1] * 2
    assert pipe.calls[0]["video"] is None and pipe.calls[0]["guidance_scale"] == 2.0
    assert (pipe.calls[0]["height"], pipe.calls[0]["width"]) == (16, 16)

    pipe = fake_pipeline(make_frames, num_classes=3)
    evaluate(pipe, LatteProtocol(condition="free", **latte), folder="free")
    assert pipe.calls[0]["class_labels"].tolist() == [3] * 6 and pipe.calls[0]["guidance_scale"] == 1.0

    pipe = fake_pipeline(make_frames, num_actions=3)
    teco = TecoProtocol(
        num_videos=2, num_context_frames=3, num_frames=2, num_distance_context_frames=2, num_distance_frames=4
    )
    evaluate(pipe, teco, folder="actions")
    assert [call["actions"].shape for call in pipe.calls] == [(2, 5), (2, 6)]
    assert [call["num_frames"] for call in pipe.calls] == [2, 4]


@pytest.mark.parametrize(
    ("config", "condition"), [({"num_classes": 3}, "class"), ({"num_classes": 3}, "free"), ({}, "free")]
)
def test_a_real_pipeline_generates_from_nothing(evaluate, config, condition):
    protocol = LatteProtocol(
        num_videos=3, num_frames=2, seeds=(0,), num_inference_steps=1, condition=condition, batch_size=2
    )
    folder = evaluate(tiny_pipeline(tiny_transformer(**config)), protocol)
    features = [folder.read(case)["image_features"] for case in protocol.cases()]
    assert len(features) == 3 and not torch.equal(features[0], features[1])


def test_a_task_that_nothing_can_measure_is_not_run(noise_pipeline, evaluate):
    teco = TecoProtocol(
        num_videos=2, num_context_frames=3, num_frames=2, num_distance_context_frames=2, num_distance_frames=4
    )
    evaluate(noise_pipeline, teco, networks=MetricNetworks())
    assert [call["num_frames"] for call in noise_pipeline.calls] == [2]


def test_samples_show_truth_beside_prediction(truth_pipeline, protocol, evaluate):
    folder = evaluate(truth_pipeline, protocol, num_samples=2)
    names = sorted(path.name for path in (folder.path / "samples").iterdir())
    assert len(names) == 4 and all("trajectory000" in name for name in names)
    with av.open(str(folder.path / "samples" / names[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 7 and frames[0].shape == (256, 512, 3)


def test_videos_of_two_sizes_are_refused(noise_pipeline, dataset, protocol, networks, evaluate, tmp_path):
    class TwoSizes:
        def clip(self, video, num_frames):
            return Clip(frames=torch.zeros(num_frames, 3, 16, 16 + 2 * video, dtype=torch.uint8))

    folder = evaluate(noise_pipeline, protocol, folder="new", share=Share(2, 3))
    with pytest.raises(ValueError, match="one size"):
        run_cases(noise_pipeline, TwoSizes(), protocol, networks, folder)
