import pytest
import torch

from diffusers_far.models.frames import FrameBatch


def frame_batch(num_frames: int, *, is_masked: bool) -> FrameBatch:
    latents = torch.randn(2, num_frames, 1, 1, 1)
    action_mask = torch.zeros(2, num_frames, dtype=torch.bool) if is_masked else None
    return FrameBatch(latents, torch.randint(0, 3, (2, num_frames)), action_mask)


@pytest.mark.parametrize("masked", [(False, False), (False, True), (True, False), (True, True)])
def test_appended_frames_follow_the_earlier_ones(masked):
    earlier, later = (frame_batch(num_frames, is_masked=mask) for num_frames, mask in zip((2, 3), masked))
    joined = earlier.append(later)
    assert joined.num_frames == 5
    assert torch.equal(joined.latents, torch.cat([earlier.latents, later.latents], dim=1))
    assert torch.equal(joined.actions, torch.cat([earlier.actions, later.actions], dim=1))
    # A missing mask means that every action is given.
    given = [[not masked[0]] * 2 + [not masked[1]] * 3] * 2
    assert joined.action_mask is None if not any(masked) else joined.action_mask.tolist() == given
    assert torch.equal(joined.last(3).latents, later.latents) and torch.equal(joined.last(3).actions, later.actions)
    assert joined.last(0).num_frames == 0


def test_a_copy_does_not_change_with_the_original():
    frames = frame_batch(3, is_masked=True)
    copied, before = frames.copy(), frames.latents.clone()
    for tensor in (frames.latents, frames.actions, frames.action_mask):
        tensor.fill_(1)
    assert torch.equal(copied.latents, before)
    assert not copied.action_mask.any()


def test_frames_between_are_views():
    frames = frame_batch(5, is_masked=True)
    window = frames.between(1, 3)
    for part, whole in ((window.latents, frames.latents), (window.actions, frames.actions)):
        assert torch.equal(part, whole[:, 1:3])
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_what_is_not_given_stays_not_given():
    frames = FrameBatch(torch.randn(2, 3, 1, 1, 1))
    for batch in (frames.append(frames), frames.last(1), frames.between(0, 2), frames.copy()):
        assert batch.actions is None and batch.action_mask is None
