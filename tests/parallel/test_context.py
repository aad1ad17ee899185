"""ContextParallel: arrays go into the layout and come back; what cannot be is refused."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.compiled.hlo import collectives
from hcp_jax.cost.traffic import STRATEGIES
from hcp_jax.parallel.describe import describe_strategy
from hcp_jax.parallel.padding import PaddingWarning

LAYOUTS = ["zigzag", "contiguous"]


def context(comm_type="a2a+p2p", layout="zigzag", **sizes) -> hcp.ContextParallel:
    sizes = sizes or {"cp_outer": 4, "cp_inner": 2}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices), comm_type, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 16, 50])
def test_shard_and_unshard_give_back_the_array(layout, length):
    cp = context(layout=layout)
    x = np.arange(2 * length * 3).reshape(2, length, 3)
    for y in (cp.shard(x), cp.shard(jax.numpy.asarray(x)), jax.jit(cp.shard)(x)):
        assert y.shape[1] == cp.padded_length(length)
        assert y.sharding.is_equivalent_to(cp.sharding(3), 3)
        assert np.array_equal(cp.unshard(y, length=length), x)


def test_each_device_gets_its_chunks():
    cp = context()
    y = cp.shard(np.arange(32)[None])
    held = {shard.device.id: np.asarray(shard.data)[0].tolist() for shard in y.addressable_shards}
    assert held[0] == [0, 1, 30, 31]
    assert held[3] == [6, 7, 24, 25]


@pytest.mark.parametrize(
    "sizes", [{"cp_outer": 4, "cp_inner": 2}, {"dp": 2, "cp_outer": 3}, {"dp": 2}]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_roll_crosses_device_borders(layout, sizes):
    cp = context(layout=layout, **sizes)
    x = np.arange(2 * 48 * 2).reshape(2, 48, 2)
    for shift in (-1, 1, 3, -7, 25, -48, 100, 0):
        rolled = jax.jit(lambda y, s=shift: cp.roll(y, s, dim=1))(cp.shard(x))
        assert np.array_equal(cp.unshard(rolled), np.roll(x, shift, axis=1)), shift


def test_roll_sends_borders_alone():
    cp = context()
    y = cp.shard(np.zeros((1, 64, 4), np.float32))
    text = jax.jit(lambda y: cp.roll(y, -1)).lower(y).compile().as_text()
    assert [(c.kind, c.bytes) for c in collectives(text)] == [("collective-permute", 16)] * 2


def test_roll_has_the_gradient_of_a_roll():
    cp = context()
    x, w = np.random.default_rng(0).normal(size=(2, 1, 32)).astype(np.float32)
    weights = cp.shard(w)
    grad_of = jax.jit(jax.grad(lambda y: jax.numpy.sum(cp.roll(y, -1) * weights)))
    grad = grad_of(cp.shard(x))
    assert np.array_equal(cp.unshard(grad), np.roll(w, 1, axis=1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_global_indices(layout):
    cp = context(layout=layout)
    assert np.array_equal(cp.unshard(cp.positions(50)), np.arange(cp.padded_length(50))[None])


def test_shard_batch_cuts_arrays_and_places_masks():
    cp = context(dp=2, cp_outer=2, cp_inner=2)
    tokens = np.arange(2 * 21).reshape(2, 21)
    batch = cp.shard_batch({"tokens": tokens, "rows": np.arange(2), "n": 3, "mask": hcp.causal()})
    assert np.array_equal(cp.unshard(batch["tokens"], length=21), tokens)
    assert batch["n"] == 3
    end = batch["mask"].intervals.end
    assert np.array_equal(cp.unshard(end)[0], [*range(1, 22), 0, 0, 0])
    assert end.sharding.is_fully_replicated
    with pytest.raises(ValueError, match="one length T, got {'a': 8, 'b': 9}"):
        cp.shard_batch({"a": np.zeros((2, 8)), "b": np.zeros((2, 9))})
    with pytest.raises(ValueError, match="has a batch of 3, which dp=2 does not divide"):
        cp.shard_batch({"a": np.zeros((3, 8))})


def test_padding_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="hcp_jax"):
        context(cp_outer=5).shard(np.zeros((1, 33)))
    assert "padded 33 tokens with 7" in caplog.text


def test_attention_to_padding_is_warned_of_once_per_context_and_length():
    cp = context(cp_outer=4, layout="contiguous", comm_type="p2p")
    x = cp.shard(np.zeros((1, 34, 1, 4), np.float32))

    def attend(mask, x=x, cp=cp):
        return jax.eval_shape(lambda x: hcp.dot_product_attention(x, x, x, cp=cp, mask=mask), x)

    quiet = [hcp.lengths(34), hcp.causal() & hcp.chunked_local(5), hcp.prefix_lm(20)]
    for mask in (*quiet, cp.place(hcp.bidirectional(), 34), hcp.chunked_local(17)):
        attend(mask)  # a warning is an error
    for mask in (hcp.prefix_lm(35), None, hcp.bidirectional(), hcp.chunked_local(5)):
        again = dataclasses.replace(cp)
        again.shard(np.zeros((1, 70)))
        again.shard(np.zeros((1, 34)))
        with pytest.warns(PaddingWarning, match=r"34 tokens to 36, .* hcp.lengths\(34\)"):
            attend(mask, cp=again)
        attend(mask, cp=again)
    attend(None, cp.shard(np.zeros((1, 40, 1, 4), np.float32)))
    # Another context has padded nothing, though it is equal; that of a layer has padded what it
    # is made from has.
    attend(None, cp=dataclasses.replace(cp))
    of_layers = dataclasses.replace(cp, comm_type=("p2p", "all_gather"))
    of_layers.shard(np.zeros((1, 34)))
    with pytest.warns(PaddingWarning):
        attend(None, cp=of_layers.for_layer(1))


def test_a_context_is_hashable_and_names_its_groups():
    assert hash(context()) == hash(context())
    text = context().describe()
    assert "cp_outer  size 4, inside a host: [0 2 4 6] [1 3 5 7]" in text
    assert "a2a+p2p: heads exchanged over cp_inner (2), K/V ring over cp_outer (4)" in text


@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_every_strategy_uses_every_context_parallel_axis(comm_type):
    exchange, move, _ = context(comm_type).strategy
    assert sorted((*exchange, *move)) == ["cp_inner", "cp_outer"]


def test_comm_types_may_differ_by_layer():
    cp = context(("p2p", "a2a"))
    assert cp.for_layer(1).comm_type == "a2a"
    assert "layer 0   p2p" in cp.describe()
    with pytest.raises(ValueError, match="list for 2 layers, but the model has a layer 2"):
        cp.for_layer(2)


@pytest.mark.parametrize("sizes", [{"cp_outer": 8, "cp_inner": 1}, {"cp_outer": 1, "cp_inner": 8}])
def test_two_levels_on_one_axis_are_logged_and_still_communicate(sizes, caplog):
    cp = context(**sizes)
    assert "of size 1 is '" in caplog.text
    assert "(8)" in describe_strategy(cp)


def test_invalid_contexts_are_refused():
    mesh = hcp.make_mesh(cp_outer=4, cp_inner=2)
    with pytest.raises(
        ValueError, match=r"unknown comm_type 'a2a\+p2': .* did you mean 'a2a\+p2p'"
    ):
        hcp.ContextParallel(mesh, "a2a+p2")
    with pytest.raises(ValueError, match="unknown layout 'zig-zag': .* did you mean 'zigzag'"):
        hcp.ContextParallel(mesh, layout="zig-zag")
    with pytest.raises(ValueError, match=r"cp_outer='ring' is not an axis of the mesh"):
        hcp.ContextParallel(mesh, cp_outer="ring")


BAD_FIELDS = {
    "'cp_outer' has two roles, dp and cp_outer": {"dp": "cp_outer"},
    "'tp' has two roles, dp and tp": {"dp": ("dp", "tp")},
    "'dp' has two roles, dp and dp": {"dp": ("dp", "dp")},
    "'cp_outer' has two roles, cp_outer and cp_inner": {"cp_inner": "cp_outer"},
    r"cp_outer must be the name of one mesh axis, or None, got \('cp_outer', 'tp'\)": {
        "cp_outer": ("cp_outer", "tp"),
        "tp": None,
    },
    "dp must be names of axes, or None, got 3": {"dp": 3},
    "comm_type must be one name, or a list .* got None": {"comm_type": None},
    r"comm_type must be one name, or a list .* got \(\)": {"comm_type": []},
    "unknown comm_type '7'": {"comm_type": ("p2p", 7)},
    "unknown layout 'None'": {"layout": None},
    "head_groups must be a positive integer, got 2.0": {"head_groups": 2.0},
    "head_groups must be a positive integer, got True": {"head_groups": True},
    "widest_group must be": {"widest_group": (4, 4)},
    "mesh must be a jax.sharding.Mesh .* got list": {"mesh": []},
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_fields_of_a_wrong_kind_are_refused(message):
    fields = {"mesh": hcp.make_mesh(cp_outer=4, cp_inner=2)} | BAD_FIELDS[message]
    with pytest.raises(ValueError, match=message):
        hcp.ContextParallel(**fields)


def test_an_abstract_mesh_is_refused():
    with pytest.raises(ValueError, match="AbstractMesh, which has no devices"):
        hcp.ContextParallel(hcp.make_mesh(cp_outer=8).abstract_mesh)


def test_lists_are_taken_as_tuples():
    mesh = hcp.make_mesh(dp=2, cp_outer=4)
    cp = hcp.ContextParallel(mesh, ["p2p"], dp=["dp"])
    assert (cp.comm_type, cp.dp) == (("p2p",), ("dp",))
    assert hash(cp) == hash(hcp.ContextParallel(mesh, ("p2p",), dp=("dp",)))


def grouped(widest, comm_type="a2a+p2p") -> hcp.ContextParallel:
    mesh = hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2)
    return hcp.ContextParallel(mesh, comm_type, widest_group=widest)


def test_groups_are_described_with_the_mesh():
    text = grouped(4).describe()
    assert "groups    of up to 4 devices, in the order of the mesh" in text
    assert "heads exchanged by up to 2 devices, K/V walk inside each group" in text
    assert "K/V gather inside each group" in grouped(4, "all_gather").describe()
    assert "one device per group, nothing moves" in grouped(1).describe()


@pytest.mark.parametrize("widest", [0, 3, 16, 2.5, True, "4"])
def test_invalid_widest_groups_are_refused(widest):
    with pytest.raises(ValueError, match="widest_group"):
        grouped(widest)


@pytest.mark.parametrize("what", ["shard", "unshard", "positions", "roll", "place"])
def test_groups_have_no_stream_to_reorder(what):
    x = {"place": hcp.causal(), "positions": 16}.get(what, np.zeros((2, 16)))
    more = {"place": (16,), "roll": (-1,)}.get(what, ())
    with pytest.raises(
        NotImplementedError, match=f"cp.{what} works on streams.*hcp.place_microbatch"
    ):
        getattr(grouped(4), what)(x, *more)
