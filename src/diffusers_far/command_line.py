"""What scripts and commands share on the command line: help with defaults, types of arguments that say in one line what they
take, a log that stays readable, progress, one process."""

import argparse
import copy
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable

from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

# What launchers tell a process of how many there are: torchrun, which Accelerate calls, and MPI.
NUM_PROCESSES_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class HelpWithDefaults(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the description as it is written, and says the default of each flag that has one."""

    def add_argument(self, action: argparse.Action) -> None:
        default = action.default
        says_nothing = default is None or default is False or default in ("", [], (), argparse.SUPPRESS)
        if action.option_strings and action.help is not argparse.SUPPRESS and not says_nothing:
            action, text = copy.copy(action), action.help or ""
            if isinstance(default, (list, tuple)):
                action.default = " ".join(str(each) for each in default)
            if "default:" not in text.lower():
                action.help = f"{text} (default: %(default)s)".strip()
        super().add_argument(action)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """An argument type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a number from {low:g} to {high:g}")
        return value

    return parse


class HeightAndWidth(argparse.Action):
    """For a flag `--size`: height and width, or one number for both, become a pair."""

    def __init__(self, **options) -> None:
        super().__init__(**({"help": "Height and width, or one for both: crop and resize."} | options))

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if len(values) > 2:
            parser.error(f"{option_string} has {len(values)} numbers; give height and width, or one for both.")
        setattr(namespace, self.dest, (values[0], values[-1]))


def shown(value: object, max_length: int = 60) -> str:
    """A value as it appears in a message: quoted, on one line, not too long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= max_length else text[:max_length] + "...")


def set_up_logging(script: str) -> None:
    """Let the log hold what `script` (its `__name__`) and this package tell, and of other libraries only warnings: some
    write a line for each file. Where stderr is no terminal, their progress bars are left out too."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    for name in (script, __package__):
        logging.getLogger(name).setLevel(logging.INFO)
    if not sys.stderr.isatty():
        # Only here: a script that shows its help should not wait for them.
        from datasets import disable_progress_bars as disable_datasets_bars
        from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
        from huggingface_hub.utils import disable_progress_bars as disable_hub_bars

        disable_datasets_bars()
        disable_diffusers_bars()
        disable_hub_bars()


class Progress:
    """How far a run is: a bar where stderr is a terminal, elsewhere a line of the log now and then, after the first step
    and after the last.

    Args:
        total (`int`): Steps of the whole run.
        first (`int`): Steps that were done before this launch.
        unit (`str`): What a step is called.
        seconds_between_lines (`float`): Where there is no bar.
        max_hours (`float`, *optional*): After which this launch stops, for the time that is left.
        is_silent (`bool`): Neither bar nor lines, as for all processes but one.

    Attributes:
        num_done (`int`): Steps that are done, those before this launch included.
    """

    def __init__(
        self,
        total: int,
        first: int = 0,
        *,
        unit: str = "step",
        seconds_between_lines: float = 30.0,
        max_hours: float | None = None,
        is_silent: bool = False,
    ) -> None:
        # `None`: no bar where stderr is no terminal.
        self._bar = tqdm(total=total, initial=first, unit=unit, disable=True if is_silent else None)
        self._writes_lines = self._bar.disable and not is_silent
        self._total, self._first, self._unit, self.num_done = total, first, unit, first
        self._seconds_between_lines = seconds_between_lines
        self._max_hours = max_hours
        self._start_time = self._last_time = time.perf_counter()
        self._last_line_time = -float("inf")
        self._figures: dict[str, list[float]] = {}
        self.seconds_of_last_step = 0.0

    def update(self, count: int = 1, **figures: float) -> None:
        """`count` more steps are done. Lines hold the means of `figures` since the line before, the bar their last values."""
        now = time.perf_counter()
        self.seconds_of_last_step, self._last_time = (now - self._last_time) / count, now
        self.num_done += count
        if not self._writes_lines:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
            self._bar.update(count)
            return
        for name, value in figures.items():
            self._figures.setdefault(name, []).append(value)
        if now - self._last_line_time >= self._seconds_between_lines or self.num_done >= self._total:
            logger.info(self._line(now - self._start_time))
            self._last_line_time = now
            self._figures.clear()

    def _line(self, elapsed: float) -> str:
        seconds_per_step = elapsed / (self.num_done - self._first)
        left = seconds_per_step * (self._total - self.num_done)
        if self._max_hours is not None:
            left = min(left, max(0.0, self._max_hours * 3600 - elapsed))
        means = {name.replace("_", " "): sum(values) / len(values) for name, values in self._figures.items()}
        parts = [f"{name} {mean:.4g}" for name, mean in means.items()]
        parts += [f"{seconds_per_step:.3g} s per {self._unit}", f"{in_hours(left)} left"]
        return f"{self._unit} {self.num_done} of {self._total}: {', '.join(parts)}"

    def close(self) -> None:
        self._bar.close()


def in_hours(seconds: float) -> str:
    """A duration to be read, such as `2 h 05 min` or `40 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def require_one_process(what: str) -> None:
    """Refuse a launcher that started several processes, each of which would do the whole work and write over the others.

    Args:
        what (`str`): Is run by one process, such as the script's name.

    Raises:
        ValueError: There are several.
    """
    for variable in NUM_PROCESSES_VARIABLES:
        number = os.environ.get(variable, "1")
        if number.isdecimal() and int(number) > 1:
            raise ValueError(
                f"{what} was launched as {number} processes (`{variable}`), but it runs as one; start it with `python`."
            )
