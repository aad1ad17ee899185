"""The picture of a pipeline's ticks."""

import numpy as np
import pytest

from hcp_jax import viz
from hcp_jax.dynamic.pipeline import make_schedule, seconds


@pytest.mark.parametrize("v", [1, 2])
def test_every_pass_has_a_box_as_long_as_it_takes_until_the_last_tick_ends(v):
    times = np.array([3.0, 6.0, 9.0])
    schedule = make_schedule(3, 2, v)
    figure = viz.draw_ticks(schedule, times, ["4", "2×2", "4"])
    (axes,) = figure.axes
    widths = sorted(box.get_width() for box in axes.patches)
    assert np.allclose(widths, sorted([t * s / v for t in times for s in (1 / 3, 2 / 3)] * 2 * v))
    assert axes.get_xlim()[1] == pytest.approx(seconds(schedule, times / 3, times * 2 / 3))
    # By name, so that a name keeps its colour when the microbatches run in another order.
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["2×2", "4"]
