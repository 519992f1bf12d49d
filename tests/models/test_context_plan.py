import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import property_test

from diffusers_far.models.context_plan import ContextPlan


def plan_for(num_frames: int, short_window: int, **sizes) -> ContextPlan:
    sizes = {"height": 4, "width": 8, "patch_size": 1, "long_patch_size": 4, **sizes}
    return ContextPlan.for_frames(num_frames, short_window=short_window, **sizes)


def kinds(plan: ContextPlan) -> dict[int, str]:
    """Absolute frame index -> kind."""
    return {
        frame: "long" if frame < plan.first_short_frame else "short"
        for frame in range(plan.first_frame, plan.end_frame)
    }


@property_test
@given(num_frames=st.integers(0, 40), short_window=st.integers(1, 20))
def test_the_last_window_is_short_and_all_before_it_long(num_frames, short_window):
    plan = plan_for(num_frames, short_window)
    expected = ["long"] * max(0, num_frames - short_window) + ["short"] * min(num_frames, short_window)
    assert list(kinds(plan).values()) == expected
    assert plan.num_frames == plan.end_frame == num_frames


@property_test
@given(num_frames=st.integers(0, 40), short_window=st.integers(1, 20))
def test_without_long_patches_no_frame_is_long(num_frames, short_window):
    plan = plan_for(num_frames, short_window, long_patch_size=None)
    assert (plan.num_long_frames, plan.num_short_frames, plan.num_long_tokens) == (0, num_frames, 0)


@property_test
@given(
    num_frames=st.integers(0, 12),
    short_window=st.integers(1, 6),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch_size=st.integers(1, 2),
    patches_per_long_patch=st.integers(1, 3),
)
def test_tokens_are_the_patches_of_all_frames(
    num_frames, short_window, rows, columns, patch_size, patches_per_long_patch
):
    long_patch_size = patch_size * patches_per_long_patch
    plan = plan_for(
        num_frames,
        short_window,
        height=rows * long_patch_size,
        width=columns * long_patch_size,
        patch_size=patch_size,
        long_patch_size=long_patch_size,
    )
    assert plan.tokens_per_long_frame == rows * columns
    assert plan.tokens_per_short_frame == rows * columns * patches_per_long_patch**2
    assert plan.num_tokens == sum(
        plan.tokens_per_long_frame if kind == "long" else plan.tokens_per_short_frame for kind in kinds(plan).values()
    )


@property_test
@given(
    num_frames=st.integers(0, 20),
    short_window=st.integers(1, 10),
    cuts=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_frames_of_a_segment_keep_their_kind_and_their_index(num_frames, short_window, cuts):
    first_frame, end_frame = sorted(min(cut, num_frames) for cut in cuts)
    plan = plan_for(num_frames, short_window)
    segment = plan.segment(first_frame, end_frame)
    assert kinds(segment) == {frame: kind for frame, kind in kinds(plan).items() if first_frame <= frame < end_frame}
    assert segment.first_frame == first_frame and segment.end_frame == end_frame
    assert plan.segment(first_frame).end_frame == num_frames
    assert plan.segment(0, first_frame).num_tokens + plan.segment(first_frame).num_tokens == plan.num_tokens
    assert plan.segment(first_frame).segment(end_frame) == plan.segment(end_frame)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("patch_size", {"height": 5, "patch_size": 2, "long_patch_size": None}),
        ("patch_size", {"width": 3, "patch_size": 2, "long_patch_size": None}),
        ("long_patch_size", {"height": 6}),
        ("long_patch_size", {"width": 10}),
    ],
)
def test_a_size_that_patches_do_not_divide_is_refused(name, sizes):
    height, width = sizes.get("height", 4), sizes.get("width", 8)
    with pytest.raises(ValueError, match=f"{height}x{width} cannot be cut by `{name}` .*multiples of"):
        plan_for(3, 2, **sizes)


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_for(3, 2).num_long_frames = 5
