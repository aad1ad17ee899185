"""The picture of a schedule."""

from hcp_jax.compiled.clock import Schedule, Span
from hcp_jax.viz import timeline

SPANS = (
    Span("compute", "attention", "forward_kernel", 0.0, 1.0),
    Span("between hosts", "collective-permute", "send", 0.0, 1.5),
    Span("compute", "attention", "forward_kernel", 1.5, 2.0),
    Span("inside a host", "all-to-all", "exchange", 2.0, 2.5),
)
SCHEDULE = Schedule(SPANS, {}, {}, 1.0, 2.5)


def test_the_device_waits_in_the_gaps_between_its_kernels():
    assert timeline.waiting(SPANS) == [(1.0, 1.5), (2.0, 2.5)]


def test_the_stretch_shown_is_all_of_a_short_program_and_part_of_a_long_one():
    assert timeline.zoom(SPANS) == (0.0, 2.5)
    long = [Span("between hosts", "collective-permute", "", i, i + 0.5) for i in range(100)]
    assert timeline.zoom(long) == (44, 55.5)


def test_lanes_hold_their_spans_and_the_gaps_are_hatched():
    figure = timeline.draw_timeline(SCHEDULE, "two hops")
    above = figure.axes[0]
    assert [t.get_text() for t in above.get_yticklabels()] == [
        "compute",
        "inside a host",
        "between hosts",
    ]
    drawn = {
        (round(box.x0, 6), round(box.x1, 6), round(box.y0))
        for bars in above.collections
        for box in (path.get_extents() for path in bars.get_paths())
    }
    kernels_and_transfers = {(0, 1000, 0), (1500, 2000, 0), (0, 1500, 2), (2000, 2500, 1)}
    gaps = {(1000, 1500, 0), (2000, 2500, 0)}
    assert drawn == kernels_and_transfers | gaps
    [legend] = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "attention kernels",
        "ring (permute)",
        "all-to-all",
        "waiting",
    ]
