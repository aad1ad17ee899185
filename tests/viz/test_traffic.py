"""The picture of what comm types send."""

import pytest

import hcp_jax as hcp


def test_the_bars_are_the_bytes_of_the_formula():
    mesh = hcp.make_mesh(cp_outer=4, cp_inner=2)
    cps = [hcp.ContextParallel(mesh, comm_type) for comm_type in ("p2p", "a2a+p2p")]
    size = {"heads": 8, "kv_heads": 4, "head_size": 64}
    axes = hcp.viz.draw_traffic(cps, 8192, **size, dtype="bfloat16").axes[0]
    wide = {(round(b.get_y() + 0.18, 1), b.get_width() * 2**20) for b in axes.patches}
    kv = 2 * (8192 // 8) * 4 * 64 * 2  # K and V of one device
    q_and_out = 2 * (8192 // 8) * 8 * 64 * 2
    assert (-0.2, 7 * kv) in wide  # seven hops of the flat ring
    assert (0.8, (q_and_out + kv) / 2) in wide  # half of everything goes to the other device
    assert (0.8, 3 * kv) in wide  # then three hops


def test_what_cannot_be_drawn_is_told():
    with pytest.raises(ValueError, match="at least one context"):
        hcp.viz.draw_traffic([], 8, heads=1, kv_heads=1, head_size=1)
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8), "p2p")
    with pytest.raises(ValueError, match="dtype must be one of"):
        hcp.viz.draw_traffic([cp], 16, heads=1, kv_heads=1, head_size=1, dtype="int8")
