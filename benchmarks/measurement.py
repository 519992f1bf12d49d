"""What was measured: a quantity with its spread, and a row of such quantities that belong together."""

import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


def format_seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def format_difference(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


FORMATS: dict[str, Callable[[float], str]] = {
    "s": format_seconds,
    "bytes": format_bytes,
    "x": "{:.2f}x".format,
    "share": "{:.0%}".format,
    "GFLOP": "{:.0f} GFLOP".format,
    "difference": format_difference,
    "error": "{:.2%}".format,
    "frames/s": "{:,.0f}".format,
    "TFLOP/s": "{:.3g} TFLOP/s".format,
}
RATIOS = ("x", "share")


@dataclass(frozen=True)
class Measurement:
    """A quantity, measured once or in several rounds.

    Args:
        values (`tuple[float, ...]`): In the order of the rounds.
        unit (`str`): A key of `FORMATS`.
    """

    values: tuple[float, ...]
    unit: str

    def __post_init__(self):
        if not self.values or self.unit not in FORMATS:
            raise ValueError(
                f"A measurement of {len(self.values)} values has the unit {self.unit!r}; it needs a value and one of the "
                f"units {', '.join(FORMATS)}."
            )

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """First quartile."""
        return self._quartiles[0]

    @property
    def high(self) -> float:
        """Third quartile."""
        return self._quartiles[2]

    @property
    def _quartiles(self) -> list[float]:
        if len(self.values) == 1:
            return [self.values[0]] * 3
        return statistics.quantiles(self.values, n=4, method="inclusive")

    def per(self, other: "Measurement", unit: str = "x") -> "Measurement":
        """The ratio in each round: what disturbs the machine hits both in the same round alike, and cancels."""
        return Measurement(tuple(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)), unit)

    def per_median(self, other: "Measurement") -> "Measurement":
        """The ratio of what was measured outside of the rounds, as a run that takes minutes, to the median of `other`."""
        return Measurement(tuple(mine / other.median for mine in self.values), "x")

    @classmethod
    def total(cls, parts: Sequence[tuple["Measurement", int]]) -> "Measurement":
        """The sum in each round of parts, each so many times."""
        rounds = zip(*(part.values for part, _ in parts), strict=True)
        counts = [count for _, count in parts]
        return cls(tuple(sum(map(operator.mul, counts, values)) for values in rounds), parts[0][0].unit)

    def __str__(self) -> str:
        """The median; of ratios the quartiles too."""
        show = FORMATS[self.unit]
        if self.unit not in RATIOS or len(self.values) == 1:
            return show(self.median)
        return f"{show(self.median)} ({show(self.low)} to {show(self.high)})"

    def to_json(self) -> dict[str, Any]:
        values = [float(f"{value:.6g}") for value in self.values]
        rounded = Measurement(tuple(values), self.unit)
        spread = {} if len(values) == 1 else {"low": rounded.low, "high": rounded.high}
        return {"unit": self.unit, "median": rounded.median, **spread, "values": values}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Measurement":
        return cls(tuple(content["values"]), content["unit"])


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        case (`str`): The benchmark that it is of.
        settings (`dict`): What was measured, a column each: the model, the number of frames and so on.
        measurements (`dict`): What came out, a column each.
        notes (`dict`): What the JSON file alone has.
    """

    case: str
    settings: dict[str, str | int]
    measurements: dict[str, Measurement]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> dict[str, str]:
        """Headings and contents of the columns."""
        return {name: str(value) for name, value in (self.settings | self.measurements).items()}

    def to_json(self) -> dict[str, Any]:
        measurements = {name: measurement.to_json() for name, measurement in self.measurements.items()}
        return {"case": self.case, "settings": self.settings, "measurements": measurements, "notes": self.notes}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Row":
        measurements = {name: Measurement.from_json(each) for name, each in content["measurements"].items()}
        return cls(content["case"], content["settings"], measurements, content["notes"])


def compared(timings: dict[str, Measurement]) -> dict[str, Measurement]:
    """The times of rivals, "FAR" among them, and how it compares: its share of the limit, and how many times as long the
    others take."""
    far, ratios = timings["FAR"], {}
    for name, timing in timings.items():
        if name == "limit":
            ratios["of the limit"] = timing.per(far, "share")
        elif name != "FAR":
            ratios[f"{name} / FAR"] = timing.per(far)
    return timings | ratios
