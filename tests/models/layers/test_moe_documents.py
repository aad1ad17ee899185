"""The load-balance loss by document against each document alone, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.moe import MoE
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.stacks import routed_tokens

E, K, D = 6, 2, 8
MODEL = ModelConfig(
    vocab_size=32,
    num_layers=1,
    hidden_size=D,
    intermediate_size=8,
    num_heads=2,
    num_kv_heads=2,
    compute_dtype="float32",
    moe=MoEConfig(
        num_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=4,
        router="sigmoid",
        n_group=2,
        score_correction=True,
        sequence_aux_loss_coef=1e-4,
    ),
)
LENGTHS = [21, 1, 2, 9, 17, 3, 1, 7]
ROWS = [[0, 1, 2, None], [3, 4, None, 5, 6]]  # documents in streams of 33; None is padding
"""Padding of the first row is at its end, that of the second between documents."""


@functools.cache
def module():
    """Return a mixture of experts whose correction moves every choice."""
    graph, state = nnx.split(MoE(MODEL.specs[0].ffn, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    params["gate"]["correction"] = jnp.linspace(1.0, -1.0, E)
    return graph, params


@functools.cache
def documents():
    rng = np.random.default_rng(1)
    return [rng.normal(size=(n, D)).astype(np.float32) for n in LENGTHS]


@functools.cache
def alone(which):
    """Return Σ tokens · loss of the documents, each alone, and gradients, in float64."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        kernel = jnp.asarray(np.asarray(module()[1]["gate"]["kernel"]), jnp.float64)

        def loss(kernel, x):
            scores = jax.nn.sigmoid(x @ kernel)
            chosen = scores >= jnp.sort(scores, -1)[:, -K, None]
            f = E / (K * len(x)) * chosen.sum(0)
            p = (scores / scores.sum(-1, keepdims=True)).mean(0)
            return len(x) * (f * p).sum()

        of = jax.value_and_grad(loss, (0, 1))
        found = [of(kernel, jnp.asarray(documents()[d], jnp.float64)) for d in which]
        total, dkernel = sum(v for v, _ in found), sum(g[0] for _, g in found)
        return jax.device_get((total, dkernel, [g[1] for _, g in found]))


def assert_alone(which, x, positions, mask, cp, document, position):
    """Compare the loss and its gradients with those of the documents alone.

    Args:
        which: the documents.
        x: activations, as the layer takes them.
        positions: likewise.
        mask: likewise.
        cp: context; None for one device.
        document: the document of each token of `x`, -1 for padding.
        position: its position in the document.
    """
    graph, params = module()

    def loss(params, x):
        tokens = routed_tokens(MODEL, mask, jnp.asarray(positions), x.shape[:2], cp)
        return nnx.merge(graph, params).treat(x, tokens, cp)[1].by_document

    (got, (dparams, dx)) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    total, dkernel, by_document = alone(tuple(which))
    dx, document, position = np.asarray(dx), np.asarray(document), np.asarray(position)
    assert abs(got - total) <= 2e-6 * total
    assert np.abs(dparams["gate"]["kernel"] - dkernel).max() <= 2e-6 * np.abs(dkernel).max()
    assert not np.any(dx[document < 0])
    for d, right in zip(which, by_document, strict=True):
        own = document == d
        assert own.sum() == LENGTHS[d]
        error = dx[own] - right[position[own]]
        assert np.abs(error).max() <= 2e-6 * max(np.abs(g).max() for g in by_document)


def streams():
    """Return the document and the position of each token of the packed streams."""
    document, position = np.full((2, 33), -1, np.int32), np.zeros((2, 33), np.int32)
    for row, held in enumerate(ROWS):
        place = 0
        for d in held:
            n = 2 if d is None else LENGTHS[d]
            document[row, place : place + n] = -1 if d is None else d
            position[row, place : place + n] = 0 if d is None else np.arange(n)
            place += n
    return document, position


@pytest.mark.parametrize(
    "sizes",
    [
        None,
        {"cp_outer": 2, "cp_inner": 2},
        pytest.param({"dp": 2, "tp": 2, "cp_inner": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_documents_in_packed_streams_count_as_alone(sizes):
    document, position = streams()
    x = np.full((2, 33, D), 9.0, np.float32)
    for d in range(7):
        x[document == d] = documents()[d]
    mask = hcp.causal() & hcp.documents(document + 1, padding_id=0)
    batch = {"x": x, "positions": position, "mask": mask, "document": document + 1}
    cp = None
    if sizes is not None:
        devices = jax.devices()[: math.prod(sizes.values())]
        cp = hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices))
        batch = cp.shard_batch(batch)
    found = np.asarray(batch["document"]) - 1
    x, positions, mask = (batch[name] for name in ("x", "positions", "mask"))
    assert_alone(range(7), x, positions, mask, cp, found, positions)


@pytest.mark.parametrize(
    ("sizes", "comm_type", "lanes", "grouping"),
    [
        ({"dp": 2, "cp_outer": 4}, "p2p", 1, (4, 2, 1, 1)),
        pytest.param(
            {"cp_outer": 4, "cp_inner": 2}, "a2a+p2p", 2, (4, 2, 2), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_documents_in_groups_count_as_alone(sizes, comm_type, lanes, grouping):
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes), comm_type, widest_group=4)
    held = ((0, 1, 2), (4, 5), (3,), (7, 6)) if lanes == 1 else ((0, 1, 2), (4, 5), (3, 7, 6))
    packed = dynamic.pack(dynamic.Microbatch(grouping, held, lanes), LENGTHS, 12)
    x = np.full((8, 12, D), 9.0, np.float32)
    for d in range(8):
        own = packed.document == d
        x[own] = documents()[d][packed.position[own]]
    batch = hcp.place_microbatch(cp, packed, {"tokens": np.zeros_like(packed.document)})
    rows = sizes.get("dp", 1)
    document, position = (y.reshape(rows, -1) for y in (packed.document, packed.position))
    x = x.reshape(rows, -1, D)
    assert_alone(range(8), x, position, batch["mask"], cp, document, position)
