"""From the records of a study to its figures: means over walks, differences walk by walk, verdicts.

A record is a `dict` with `variant`, `seed`, `share`, `task`, `method` and `by_walk`: a list per metric with a number for
each walk, `None` where the walk has no such frame.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_far.evaluation.metrics import Estimate

from .settings import Comparison


HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted", "undecided"


def select(records: Iterable[Mapping], **wanted) -> list[Mapping]:
    """The records that have all of these values."""
    return [record for record in records if all(record.get(name) == value for name, value in wanted.items())]


def walk_values(record: Mapping, metric: str) -> np.ndarray:
    """A metric of each walk, NaN where it has none."""
    return np.array([np.nan if value is None else value for value in record["by_walk"][metric]], dtype=np.float64)


def estimate(records: Sequence[Mapping], metric: str) -> Estimate:
    """Of several seeds: each walk's mean over them, and from those the mean with its 95% interval over walks."""
    return Estimate.of(np.mean([walk_values(record, metric) for record in records], axis=0))


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Args:
        difference ([`Estimate`]): Higher minus lower side: walk by walk, the mean over seeds, then over walks.
        by_seed (`tuple[float, ...]`): The same of each seed.
        text (`str`): `HOLDS`, `CONTRADICTED` or `UNDECIDED`.
    """

    difference: Estimate
    by_seed: tuple[float, ...]
    text: str


def compare(records: Sequence[Mapping], comparison: Comparison) -> Verdict:
    """Judge a claim. A gain holds where the 95% interval over walks lies above 0 and every seed's difference too; it is
    contradicted where all of that lies below 0. That a side gains nothing, by a margin, holds where the interval ends
    below the margin, and is contradicted where it begins above 0 and every seed's difference is above 0.

    Raises:
        ValueError: A side has no records, or the two have other seeds.
    """
    higher, lower = (by_seed(select(records, **side)) for side in comparison.sides)
    if not higher or higher.keys() != lower.keys():
        raise ValueError(
            f"{comparison.claim!r} compares the seeds {sorted(higher)} with {sorted(lower)}; both sides need the same."
        )
    differences = np.array(
        [
            walk_values(higher[seed], comparison.metric) - walk_values(lower[seed], comparison.metric)
            for seed in sorted(higher)
        ]
    )
    difference = Estimate.of(differences.mean(axis=0))
    seeds = tuple(Estimate.of(values).mean for values in differences)
    return Verdict(difference, seeds, judge(difference, seeds, comparison.margin))


def judge(difference: Estimate, seeds: Sequence[float], margin: float | None) -> str:
    """The rule of [`compare`]. A difference of one walk or none has no interval, and so it decides nothing."""
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    is_gain = low > 0 and min(seeds) > 0
    if margin is not None:
        return HOLDS if high <= margin else CONTRADICTED if is_gain else UNDECIDED
    if is_gain:
        return HOLDS
    return CONTRADICTED if high < 0 and max(seeds) < 0 else UNDECIDED


def judge_speed(ratios: Sequence[float]) -> str:
    """Whether something is faster, from how many times it was, round by round: all rounds must agree."""
    if min(ratios) > 1:
        return HOLDS
    return CONTRADICTED if max(ratios) < 1 else UNDECIDED


def by_seed(records: Iterable[Mapping]) -> dict[int, Mapping]:
    """One record for each seed.

    Raises:
        ValueError: A seed has several.
    """
    found = {}
    for record in records:
        if record["seed"] in found:
            raise ValueError(f"Seed {record['seed']} has several records; narrow the selection down.")
        found[record["seed"]] = record
    return found
