from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test

from diffusers_far.checks import check_count
from diffusers_far.pipelines.inputs import (
    batch_without_video,
    check_action_values,
    check_actions,
    check_class_labels,
    check_latents,
    repeat_samples,
    rows_of_videos,
    video_to_tensor,
)
from diffusers_far.pipelines.rollout import frame_noise


def action_config(num_actions: int | None = None, action_dim: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(num_actions=num_actions, action_dim=action_dim)


# Video


@property_test
@given(
    batch_size=st.integers(1, 2),
    num_frames=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_every_form_of_a_video_is_one_tensor(batch_size, num_frames, height, width, seed):
    array = np.random.default_rng(seed).integers(0, 256, (batch_size, num_frames, height, width, 3), np.uint8)
    expected = torch.from_numpy(array).movedim(-1, -3).float() / 255
    images = [[PIL.Image.fromarray(frame) for frame in frames] for frames in array]
    forms = [images, array, torch.from_numpy(array).movedim(-1, -3), expected, expected.double(), list(expected)]
    for video in forms:
        tensor = video_to_tensor(video)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected)
    for video in (images[0], array[0], list(array[0]), expected[0], list(expected[0])):
        assert torch.equal(video_to_tensor(video), expected[:1])
    np.testing.assert_allclose(video_to_tensor(array / 255), expected, atol=1e-7)


def test_grey_images_and_images_with_a_palette_become_rgb():
    grey = PIL.Image.new("L", (4, 2), 51)
    for image in (grey, grey.convert("P"), grey.convert("RGBA")):
        tensor = video_to_tensor([image])
        assert tensor.shape == (1, 1, 3, 2, 4)
        assert torch.equal(tensor, torch.full_like(tensor, 0.2))


def test_the_bounds_themselves_are_allowed():
    video = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)
    assert torch.equal(video_to_tensor(video), video)


def test_a_video_is_not_changed_by_reading_it():
    array = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    before = array.copy()
    video_to_tensor(array).fill_(0)
    assert np.array_equal(array, before)


# Actions and classes


@property_test
@given(batch_size=st.integers(1, 3), num_frames=st.integers(1, 5), is_continuous=st.booleans())
def test_one_row_of_actions_serves_every_sample(batch_size, num_frames, is_continuous):
    if is_continuous:
        config, row = action_config(action_dim=2), torch.randn(num_frames, 2)
    else:
        config, row = action_config(num_actions=4), torch.randint(0, 4, (num_frames,))
    expected = row.expand(batch_size, *row.shape)
    for actions in (row, row[None], row.tolist(), row.numpy(), expected, [row.tolist()] * batch_size):
        checked = rows_of_videos("actions", check_actions(actions, config, (num_frames,)), batch_size)
        assert checked.dtype == (torch.float32 if is_continuous else torch.int64)
        assert torch.equal(checked, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_discrete_actions_may_be_integers_of_every_size(dtype):
    checked = check_action_values(torch.tensor([[0, 3]], dtype=dtype), action_config(num_actions=4))
    assert checked.dtype == torch.int64 and checked.tolist() == [[0, 3]]


def test_continuous_actions_may_be_whole_numbers():
    checked = check_action_values(torch.tensor([[[0, 3]]]), action_config(action_dim=2))
    assert checked.dtype == torch.float32 and checked.tolist() == [[[0.0, 3.0]]]


def test_where_no_frame_needs_an_action_none_need_be_given():
    assert check_actions(None, action_config(num_actions=4), (0, 1)).shape == (1, 0)
    assert check_actions(None, action_config(action_dim=2), (0, 1)).shape == (1, 0, 2)
    assert check_actions(None, action_config(), (5,)) is None


@pytest.mark.parametrize("class_labels", [1, [1], [1, 1], torch.tensor(1), np.array([1, 1])])
def test_labels_are_one_integer_per_sample_or_one_for_all(class_labels):
    checked = rows_of_videos("class_labels", check_class_labels(class_labels, num_classes=3), batch_size=2)
    assert checked.dtype == torch.int64 and checked.tolist() == [1, 1]


def test_the_null_class_is_a_label():
    assert check_class_labels(3, num_classes=3).tolist() == [3]


# Latents, counts, noise


def test_latents_may_have_any_size_where_none_is_expected():
    check_latents("latents", torch.zeros(2, 3, 4, 5, 6), (None, 3, 4, None, None))
    with pytest.raises(ValueError, match=r"`latents` has shape \(2, 3, 4, 5, 6\); it must be \(any, 2, 4, any, any\)"):
        check_latents("latents", torch.zeros(2, 3, 4, 5, 6), (None, 2, 4, None, None))


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_a_count_is_a_whole_number_of_at_least_1(value):
    check_count("num_frames", value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "3"])
def test_other_counts_are_refused(value):
    with pytest.raises(ValueError, match=f"`num_frames` is {value!r}; pass a whole number of at least 1"):
        check_count("num_frames", value)


def test_each_sample_draws_from_its_own_generator():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = frame_noise((2, 1, 4, 2, 3), generators, torch.device("cpu"))
    for seed, sample in zip((1, 2), noise):
        alone = frame_noise((1, 1, 4, 2, 3), torch.Generator().manual_seed(seed), torch.device("cpu"))
        assert torch.equal(sample, alone[0])
    assert noise.dtype == torch.float32


@pytest.mark.parametrize(
    "given, batch_size",
    [
        ({"latents": torch.zeros(6, 2, 4, 4, 4), "num_videos_per_context": 2}, 3),
        ({"conditions": (None, torch.zeros(3))}, 3),
        ({"conditions": (torch.zeros(1, 5), torch.zeros(3))}, 3),
        ({"conditions": (torch.zeros(3, 5), torch.zeros(1))}, 3),
        ({"conditions": (None, torch.zeros(1))}, 1),
        ({}, 1),
    ],
)
def test_without_a_context_the_batch_is_that_of_the_noise_else_of_actions_or_labels(given, batch_size):
    defaults = {"latents": None, "conditions": (None, None), "num_videos_per_context": 1}
    assert batch_without_video(**{**defaults, **given}) == batch_size


def test_samples_are_repeated_in_a_row():
    assert repeat_samples(torch.tensor([1, 2]), 3).tolist() == [1, 1, 1, 2, 2, 2]
    tensor = torch.tensor([1, 2])
    assert repeat_samples(tensor, 1) is tensor
