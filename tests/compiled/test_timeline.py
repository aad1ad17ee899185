"""The picture of a schedule."""

import pytest

from hcp_jax.compiled import timeline
from hcp_jax.compiled.clock import Schedule, Span

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


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_it_is_written_in_the_format_of_its_name(tmp_path, suffix, begins):
    file = tmp_path / f"schedule{suffix}"
    timeline.draw(SCHEDULE, file, "two hops")
    assert file.read_bytes().startswith(begins)


def test_another_format_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must be a .png or .svg"):
        timeline.draw(SCHEDULE, tmp_path / "schedule.gif", "two hops")
