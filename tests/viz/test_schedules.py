"""The picture of a schedule of documents on groups of devices."""

import pytest

from hcp_jax import viz
from hcp_jax.dynamic import schedule


def test_there_is_a_box_for_every_document_in_the_colour_of_its_length_until_the_schedule_ends():
    plan = schedule([3000, 700, 900, 100, 100], 4, 1024)
    figure = viz.draw_schedule(plan, "five documents")
    axes, bar = figure.axes
    documents = axes.collections[0]
    assert len(documents.get_paths()) == len(plan.lengths)
    assert len({tuple(colour) for colour in documents.get_facecolor()}) == len(set(plan.lengths))
    assert bar.get_ylim() == pytest.approx((100, 3000))
    assert axes.get_xlim()[1] == pytest.approx(plan.modelled_seconds)
    ends = max(path.vertices[:, 0].max() for c in axes.collections for path in c.get_paths())
    assert ends == pytest.approx(plan.modelled_seconds)


def test_one_document_and_documents_of_one_length_can_be_drawn():
    for lengths in ([5], [7, 7]):
        viz.draw_schedule(schedule(lengths, 2, 8))
