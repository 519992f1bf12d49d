"""Half precision on a CPU without units for it is said to be slow, once; what is fast and near float32 is measured."""

from functools import partial

import pytest
import torch
from tiny_models import tiny_pipeline, tiny_separable, tiny_transformer

from diffusers_far.pipelines import latency, pipeline_far, precision


@pytest.fixture
def warnings(monkeypatch):
    records = []
    monkeypatch.setattr(pipeline_far.logger, "warning", records.append)
    pipeline_far.warn_of_slow_dtype.cache_clear()
    yield records
    pipeline_far.warn_of_slow_dtype.cache_clear()


@pytest.mark.parametrize("has_units", [False, True])
def test_half_precision_is_warned_of_once_where_the_cpu_has_no_units(warnings, monkeypatch, has_units):
    monkeypatch.setattr(pipeline_far, "has_half_precision_units", lambda dtype: has_units)
    pipe = tiny_pipeline(tiny_transformer().to(torch.bfloat16))
    for _ in range(2):
        pipe.start_session(height=16, width=16)
    assert len(warnings) == (0 if has_units else 1)
    assert has_units or "torch.bfloat16, for which this CPU has no units" in warnings[0]


def test_float32_is_never_warned_of(warnings, monkeypatch):
    monkeypatch.setattr(pipeline_far, "has_half_precision_units", lambda dtype: False)
    tiny_pipeline(tiny_transformer()).start_session(height=16, width=16)
    assert warnings == []


def test_a_machine_that_is_not_x86_is_trusted(monkeypatch):
    monkeypatch.setattr(pipeline_far.platform, "machine", lambda: "arm64")
    assert pipeline_far.has_half_precision_units(torch.bfloat16)


def compared(speeds: dict, distances: dict, max_distance: float = 0.1) -> precision.DtypeComparison:
    """Of passes that take so long on a clock of their own and compute ones, so far from those of float32."""
    now = 0.0

    def run(dtype):
        nonlocal now
        now += 1 / speeds[dtype]
        return {"velocity": [torch.ones(4) * (1 + distances.get(dtype, 0.0))]}

    passes = {dtype: partial(run, dtype) for dtype in speeds}
    return precision.compare_dtypes(passes, CPU, max_distance, clock=lambda: now)


CPU = torch.device("cpu")
HALVES = {torch.bfloat16: 0.01, torch.float16: 0.001}


@pytest.mark.parametrize(
    "speeds, distances, chosen",
    [
        ({torch.bfloat16: 2.0, torch.float16: 3.0}, HALVES, torch.float16),
        ({torch.bfloat16: 2.0, torch.float16: 3.0}, {torch.float16: 0.2}, torch.bfloat16),  # too far
        ({torch.bfloat16: 2.0}, {torch.bfloat16: float("nan")}, torch.float32),
        ({torch.bfloat16: 0.2}, HALVES, torch.float32),  # slower
        ({torch.bfloat16: 1.04}, HALVES, torch.float32),  # no gain that is worth it
    ],
)
def test_the_fastest_dtype_that_is_near_float32_is_chosen(speeds, distances, chosen):
    comparison = compared({**speeds, torch.float32: 1.0}, distances)
    assert comparison.chosen == chosen
    assert comparison.timings[0].dtype == torch.float32 and comparison.timings[0].seconds == pytest.approx(1)
    for timing in comparison.timings[1:]:
        assert timing.speedup == pytest.approx(speeds[timing.dtype])
        assert timing.distances["velocity"] == pytest.approx(distances.get(timing.dtype, 0), abs=1e-6, nan_ok=True)


def test_a_comparison_says_what_it_found():
    text = str(compared({torch.float32: 1.0, torch.bfloat16: 2.0}, HALVES))
    assert text.startswith("bfloat16 is taken (float32 1 s; bfloat16 0.5 s, 2.00 times as fast")
    assert "relative distance: velocity 0.01" in text


@pytest.fixture
def half_is_faster(monkeypatch):
    """Whatever is measured, bfloat16 wins."""

    def seconds_in_turn(passes, *arguments):
        seconds, outputs = latency.seconds_in_turn(passes, *arguments)
        return {key: [1.0] if key == torch.bfloat16 else [2.0] for key in seconds}, outputs

    monkeypatch.setattr(precision, "seconds_in_turn", seconds_in_turn)


@pytest.mark.parametrize("make", [tiny_transformer, tiny_separable])
@pytest.mark.parametrize("num_context_frames", [None, 0])
def test_a_pipeline_moves_its_transformer_to_the_fastest_dtype_and_goes_on(half_is_faster, make, num_context_frames):
    pipe = tiny_pipeline(make(num_actions=3, action_shift=1))
    weights = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    comparison = pipe.to_fastest(num_context_frames, height=16, width=16, guidance_scale=2.0)
    assert comparison.chosen == pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert 1e-5 < comparison.timings[1].distances["velocity"] < precision.MAX_STEP_DISTANCE
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16())
    frames = pipe(actions=[[0, 1]], height=16, width=16, num_frames=2, num_inference_steps=1, output_type="pt").frames
    assert frames.isfinite().all()


def test_a_dtype_that_is_too_far_is_not_moved_to_and_weights_keep_their_bits(half_is_faster):
    pipe = tiny_pipeline(tiny_transformer())
    weights = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    assert pipe.to_fastest(height=16, width=16, max_distance=0.0).chosen == torch.float32
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.transformer.state_dict().items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtypes": [torch.int8]}, "`dtypes` has torch.int8; give dtypes of floats"),
        ({"max_distance": -1.0}, "`max_distance` is -1.0; give a relative distance"),
        ({"num_context_frames": -1}, "`num_context_frames` is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(tiny_transformer()).to_fastest(height=16, width=16, **arguments)


def test_a_transformer_that_cannot_be_copied_is_refused():
    pipe = tiny_pipeline(tiny_transformer())
    pipe.transformer.enable_group_offload("cpu", torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="compiled, offloaded or int8; call it before"):
        pipe.to_fastest(height=16, width=16)
