"""The picture of ticks: a box for every pass, as long as it takes."""

import numpy as np
import pytest

from hcp_jax.pipeline.gantt import draw
from hcp_jax.pipeline.schedule import make_schedule, seconds


@pytest.mark.parametrize("v", [1, 2])
def test_every_pass_has_a_box_and_the_axis_ends_with_the_last_tick(v):
    times = np.array([3.0, 6.0, 9.0])
    schedule = make_schedule(3, 2, v)
    axes = draw(schedule, times, ["4", "2×2", "4"])
    widths = sorted(box.get_width() for box in axes.patches)
    assert np.allclose(widths, sorted([t * s / v for t in times for s in (1 / 3, 2 / 3)] * 2 * v))
    assert axes.get_xlim()[1] == pytest.approx(seconds(schedule, times / 3, times * 2 / 3))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["4", "2×2"]
