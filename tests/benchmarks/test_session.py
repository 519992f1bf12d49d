import pytest
import torch
from session_walks import pipeline

from benchmarks.session import run


@pytest.mark.parametrize("config", [{}, {"num_actions": None, "action_dim": 2}, {"num_actions": None}])
def test_a_row_sums_up_so_many_steps_and_forks_leave_nothing_behind(config):
    session = pipeline(**config).start_session(
        height=8, width=12, num_inference_steps=1, max_history=4, max_long_frames=4, output_type="pt"
    )
    rows = list(run(session, num_steps=20, steps_per_fork=3, steps_per_row=8, seed=0))
    assert [row.settings["steps"] for row in rows] == [8, 16, 20]
    assert session.num_frames == 20
    held = [row.measurements["session"].median for row in rows]
    assert held[1] == held[2] and rows[2].settings["remembered"] == 4


def test_a_frame_that_is_not_finite_ends_the_run():
    pipe = pipeline()
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(float("nan"))
    session = pipe.start_session(height=8, width=12, num_inference_steps=1, output_type="pt")
    with pytest.raises(RuntimeError, match="Frame 0 is not finite"):
        list(run(session, num_steps=2, steps_per_fork=3, steps_per_row=8, seed=0))
