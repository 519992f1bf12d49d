"""Half precision on a CPU without units for it is said to be slow, once."""

import pytest
import torch
from tiny_models import tiny_pipeline, tiny_transformer

from diffusers_far.pipelines import pipeline_far


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
