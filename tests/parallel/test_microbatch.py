"""A packed microbatch on the devices of its groups, and a model that is fed it."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.dynamic import Microbatch
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.transformer import abstract_model, init_params
from hcp_jax.parallel import microbatch
from hcp_jax.parallel.microbatch import abstract_microbatch, own_devices, place_microbatch
from tests import oracle

M = 13
GROUPING = (4, 2, 1, 1)
DOCUMENTS = Microbatch(GROUPING, ((0, 3), (1, 2), (), (4, 5, 6)))
LENGTHS = (30, 17, 6, 16, 7, 1, 4)


@functools.cache
def context(widest=4, comm_type="a2a+p2p", **sizes):
    mesh = hcp.make_mesh(**sizes or {"dp": 2, "cp_outer": 2, "cp_inner": 2})
    return hcp.ContextParallel(mesh, comm_type, widest_group=widest)


def test_every_buffer_lies_on_its_device():
    cp = context()
    packed = dynamic.pack(DOCUMENTS, LENGTHS, M)
    x = np.arange(8 * M * 3).reshape(8, M, 3)
    batch = place_microbatch(cp, packed, {"x": x, "document": packed.document})
    order = list(cp.mesh.devices.flat)  # tp is of size 1, so in the order of the groups
    for shard in batch["x"].addressable_shards:
        assert np.array_equal(shard.data[0], x[order.index(shard.device)])
    assert np.array_equal(np.asarray(batch["positions"]).reshape(8, M), packed.position)
    for shard in batch["mask"].intervals.start.addressable_shards:
        row = order.index(shard.device) // 2 * 2  # of cp_inner
        assert np.array_equal(shard.data[0], packed.start[row : row + 2].reshape(-1))


@pytest.mark.parametrize(
    ("widest", "lanes", "grouping"),
    [(4, 1, GROUPING), (8, 1, GROUPING), (8, 2, (4, 2, 2)), (1, 1, (1,) * 8), (2, 2, (2,) * 4)],
)
def test_shapes_depend_on_the_widest_group_alone(widest, lanes, grouping):
    cp = context(widest)
    shapes = abstract_microbatch(cp, M, {"tokens": np.int32, "weights": np.float32}, lanes)
    empty = Microbatch(grouping, ((),) * len(grouping), lanes)
    full = Microbatch(grouping, tuple((i,) for i in range(len(grouping))), lanes)
    for held, lengths in ((empty, ()), (full, [size * M for size in grouping])):
        packed = dynamic.pack(held, lengths, M)
        arrays = {"tokens": packed.document, "weights": packed.document.astype(np.float32)}
        batch = place_microbatch(cp, packed, arrays)
        assert jax.tree.structure(batch) == jax.tree.structure(shapes)
        for found, told in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
            assert (found.shape, found.dtype) == (told.shape, told.dtype)
            assert found.sharding.is_equivalent_to(told.sharding, found.ndim)


class Part(NamedTuple):
    """What one of several hosts knows of a global array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    of_device: dict[int, np.ndarray]


def test_a_host_packs_the_buffers_of_its_own_devices_alone(monkeypatch):
    cp, own = context(), range(2, 6)
    whole = place_microbatch(cp, dynamic.pack(DOCUMENTS, LENGTHS, M), {})

    def make_array(shape, sharding, part):
        index = sharding.devices_indices_map(shape)
        mine = {d.id: part(index[d]) for d in list(cp.mesh.devices.flat)[own.start : own.stop]}
        return Part(shape, next(iter(mine.values())).dtype, mine)

    monkeypatch.setattr(microbatch, "own_devices", lambda cp: own)
    monkeypatch.setattr(jax, "make_array_from_callback", make_array)
    part = place_microbatch(cp, dynamic.pack(DOCUMENTS, LENGTHS, M, devices=own), {})
    given, all_given = part["mask"].intervals, whole["mask"].intervals
    for mine, everybody_s in (
        (part["positions"], whole["positions"]),
        (given.start, all_given.start),
        (given.end, all_given.end),
        (part["mask"].runs.starts, whole["mask"].runs.starts),
    ):
        assert len(mine.of_device) == len(own)
        for shard in everybody_s.addressable_shards:
            if shard.device.id in mine.of_device:
                assert np.array_equal(mine.of_device[shard.device.id], shard.data)


def test_a_process_without_devices_packs_nothing(monkeypatch):
    assert own_devices(context()) == range(8)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert own_devices(context()) == range(0)


def test_inputs_that_do_not_fit_are_refused(monkeypatch):
    cp = context()
    packed = dynamic.pack(DOCUMENTS, LENGTHS, M)
    with pytest.raises(ValueError, match="devices 0 … 3 does not lie in a block of widest_group=2"):
        place_microbatch(context(2), packed, {})
    with pytest.raises(ValueError, match=r"grouping \(4, 2, 1, 1\) is for 8 devices, but cp has 4"):
        place_microbatch(context(2, tp=2, cp_outer=4), packed, {})
    with pytest.raises(ValueError, match="cp has no groups"):
        place_microbatch(dataclasses.replace(cp, widest_group=None), packed, {})
    part = dynamic.pack(DOCUMENTS, LENGTHS, M, devices=range(4))
    with pytest.raises(ValueError, match=r"of devices range\(0, 4\), .* those of range\(0, 8\)"):
        place_microbatch(cp, part, {})
    with pytest.raises(ValueError, match=r"tokens has shape \(8, 11\), but the buffers are"):
        place_microbatch(cp, packed, {"tokens": np.zeros((8, 11))})
    monkeypatch.setattr(microbatch, "num_runs", lambda *_: 3)
    with pytest.raises(ValueError, match="up to 4 runs of keys, but 3 are compiled for with 13"):
        place_microbatch(cp, packed, {})
    with pytest.raises(ValueError, match="cp has no groups"):
        abstract_microbatch(dataclasses.replace(cp, widest_group=None), M, {})


CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    sliding_window=11,
    compute_dtype="float32",
)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(cp, params, batch):
    def loss(params):
        model = nnx.merge(abstract_model(CONFIG)[0], params)
        hidden = model(batch["tokens"], batch["positions"], mask=batch["mask"], cp=cp)
        of_tokens = batch["targets"], batch["weights"]
        return summed_cross_entropy(hidden, model.unembedding, *of_tokens, cp=cp)

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    ("comm_type", "widest", "microbatch"),
    [
        ("p2p", 4, DOCUMENTS),
        pytest.param(
            ("p2p", "a2a+p2p"),
            8,
            Microbatch((4, 2, 2), ((0, 3), (1, 2), (4, 5, 6)), 2),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_loss_and_gradients_of_a_microbatch_are_those_of_its_documents_on_one_device(
    comm_type, widest, microbatch
):
    rng = np.random.default_rng(0)
    stream = [rng.integers(0, 32, length + 1).astype(np.int32) for length in LENGTHS]
    params = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))

    want, want_grads, place = 0.0, None, np.arange(max(LENGTHS), dtype=np.int32)
    for document, length in zip(stream, LENGTHS, strict=True):
        padded = np.pad(document, (0, place.size - length))
        alone = {"tokens": padded[None, :-1], "targets": padded[None, 1:], "positions": place[None]}
        alone |= {"weights": (place < length)[None].astype(np.float32), "mask": CONFIG.mask()}
        loss, grads = loss_and_grads(None, params, alone)
        want += loss
        want_grads = grads if want_grads is None else jax.tree.map(jnp.add, want_grads, grads)

    packed = dynamic.pack(microbatch, LENGTHS, M)
    inside = packed.document >= 0
    text = np.stack([np.pad(d, (0, place.size + 1 - d.size)) for d in stream])
    arrays = {
        "tokens": np.where(inside, text[packed.document, packed.position], 0),
        "targets": np.where(inside, text[packed.document, packed.position + 1], 0),
        "weights": inside.astype(np.float32),
    }
    cp = context(widest, comm_type)
    batch = place_microbatch(cp, packed, arrays, sliding_window=CONFIG.sliding_window)
    loss, grads = loss_and_grads(cp, params, batch)
    assert oracle.relative(loss, want) <= 2e-6
    errors = jax.tree.map(oracle.relative, grads, want_grads)
    assert max(jax.tree.leaves(errors)) <= 2e-6, errors
