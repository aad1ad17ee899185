"""The pictures show what the library computes with."""

import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.viz import tokens

T = 64


@pytest.fixture(params=["contiguous", "zigzag"])
def cp(request):
    return hcp.ContextParallel(hcp.make_mesh(cp_outer=8), "p2p", request.param)


def test_pairs_of_all_ranks_and_hops_are_those_of_the_mask(cp):
    for mask in (hcp.causal(), hcp.bidirectional(), hcp.causal() & hcp.sliding_window(9)):
        start, end = mask.intervals(T)
        assert tokens.ring_pairs(cp, mask, T).sum() == (end - start).sum()


def test_a_mask_is_drawn_in_the_colours_of_the_devices_that_hold_the_queries(cp):
    panel = hcp.viz.draw_mask([cp], hcp.causal(), T).axes[0]
    image = np.asarray(panel.images[0].get_array())
    held = np.asarray(cp.shard(np.arange(T)[None])).reshape(8, -1)
    assert (image[np.triu_indices(T, 1)] == 1).all()  # not seen: white
    colours = [np.unique(image[tokens, 0], axis=0) for tokens in held]
    assert all(len(colour) == 1 for colour in colours)
    assert len(np.unique(np.concatenate(colours), axis=0)) == 8


def test_the_busiest_rank_sets_the_pace():
    cps = [
        hcp.ContextParallel(hcp.make_mesh(cp_outer=8), "p2p", x) for x in ("contiguous", "zigzag")
    ]
    contiguous, zigzag, *_ = hcp.viz.draw_work(cps, hcp.causal(), 512).axes
    assert "1.87 ×" in contiguous.get_title()
    assert "1.00 ×" in zigzag.get_title()


def test_a_row_of_the_layout_is_what_a_device_holds(cp):
    axes = hcp.viz.draw_layout(cp, T).axes[0]
    held = np.asarray(cp.shard(np.arange(T)[None])).reshape(8, -1)
    drawn = {device: set() for device in range(8)}
    for bar in axes.patches:
        drawn[round(bar.get_y() + bar.get_height() / 2)] |= set(
            range(round(bar.get_x()), round(bar.get_x() + bar.get_width()))
        )
    assert drawn == {device: set(tokens) for device, tokens in enumerate(held.tolist())}


def test_contexts_that_are_none_are_told():
    for wrong in ([], ["p2p"], [None]):
        with pytest.raises(ValueError, match=r"give a hcp_jax\.ContextParallel, or a list"):
            hcp.viz.draw_mask(wrong, hcp.causal(), 64)


def test_a_length_that_is_no_whole_layout_is_told():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8))
    with pytest.raises(ValueError, match=r"60 tokens do not divide into a zigzag layout.*draw 64"):
        hcp.viz.draw_mask([cp], hcp.causal(), 60)
