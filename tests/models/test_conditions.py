"""Which action each frame is fed."""

import pytest
import torch

from diffusers_far.models.frames import shift_actions


DISCRETE = torch.tensor([[2, 0, 1, 2], [1, 1, 0, 2]])
CONTINUOUS = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_without_shift_each_frame_is_fed_the_action_taken_at_it(actions):
    fed, mask = shift_actions(actions, 0, num_frames=4)
    assert torch.equal(fed, actions)
    assert mask.all()


@pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("num_actions", [3, 4])
def test_with_shift_each_frame_is_fed_the_action_that_led_to_it(actions, num_actions):
    fed, mask = shift_actions(actions[:, :num_actions], 1, num_frames=4)
    assert fed.shape == actions.shape and fed.dtype == actions.dtype
    assert torch.equal(fed[:, 1:], actions[:, :3])
    assert torch.equal(mask, torch.tensor([[False, True, True, True]] * 2))


@pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_a_single_frame_needs_no_action_with_shift(actions):
    fed, mask = shift_actions(actions[:, :0], 1, num_frames=1)
    assert fed.shape == (2, 1, *actions.shape[2:])
    assert not mask.any()


def test_the_arguments_are_unchanged():
    actions = DISCRETE.clone()
    shift_actions(actions, 1, num_frames=4)
    assert torch.equal(actions, DISCRETE)


@pytest.mark.parametrize("action_shift, num_frames", [(0, 5), (0, 3), (1, 3), (1, 6)])
def test_a_wrong_number_of_actions_is_refused(action_shift, num_frames):
    with pytest.raises(ValueError, match=rf"`actions` has shape \(2, 4\) but there are {num_frames} frames"):
        shift_actions(DISCRETE, action_shift, num_frames)


def test_an_unknown_shift_is_refused():
    with pytest.raises(ValueError, match="`action_shift` is 2"):
        shift_actions(DISCRETE, 2, num_frames=4)
