import pytest

from diffusers_far.data.loading import choose_split


NAMES = [f"v_{index}.avi" for index in range(2000)]


def test_shares_are_met():
    splits = [choose_split(name, validation_share=0.1, test_share=0.2) for name in NAMES]
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert splits.count(split) / len(NAMES) == pytest.approx(share, abs=0.03)


def test_a_name_has_the_same_split_in_every_run():
    for name, split in (("c.npz", "test"), ("a.npz", "train"), ("episode_000001", "validation")):
        assert choose_split(name, 0.1, 0.2) == split


def test_a_share_that_grows_takes_from_the_rest_only():
    for name in NAMES:
        small, grown = choose_split(name, 0.1, 0.1), choose_split(name, 0.3, 0.2)
        assert grown == small or small == "train"


def test_without_shares_all_go_to_the_rest():
    assert {choose_split(name, 0, 0, rest="test") for name in NAMES} == {"test"}
    assert {choose_split(name, 1, 0) for name in NAMES} == {"validation"}
