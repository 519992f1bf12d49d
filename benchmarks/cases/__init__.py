"""The benchmarks, by name. Each is a function of the number of rounds that yields rows; its sizes are arguments too."""

from . import frame, growth, int8, loading, prefill, rollout, step, training


CASES = {
    "step": step.run,
    "frame": frame.run,
    "rollout": rollout.run,
    "prefill": prefill.run,
    "training": training.run,
    "loading": loading.run,
    "growth": growth.run,
    "int8": int8.run,
}
