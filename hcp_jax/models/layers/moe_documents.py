"""Count the experts that each document's tokens score best, for the load-balance loss by document.

Documents are contiguous in their stream, and a device holds few runs of consecutive tokens. So a
document that lies on several devices, or in several runs of one, reaches the first or the last
token of each of these runs. Only the counts of such *edges* cross devices, in one all-gather:

    device 0   a a a b b b        edges a, b        counts of b: those of both devices
    device 1   b b c c d d        edges b, d        c lies inside, and is counted here

Nothing bounds the number of documents. A device of n tokens, E experts and R runs holds counts of
n · E, and those of the 2 R edges of each device that it shares documents with: 2 runs in a zigzag
layout; under groups those of the mask, at most `dynamic.max_runs`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from hcp_jax.models.layers.moe_router import Routing
from hcp_jax.models.specs import MoESpec
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence import arrays

_GATHER_EDGES = "gather_document_edges"


@arrays.pytree
@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """What routers know of the tokens of a batch; a pytree.

    Attributes:
        real: False for padding.
        index: global index of each token; None without a loss by document.
        document: global index of the first token of its document, likewise.
        runs: number of runs of consecutive tokens on a device, or more.
    """

    real: Bool[Array, "B T"]
    index: Int32[Array, "B T"] | None = None
    document: Int32[Array, "B T"] | None = None
    runs: int = dataclasses.field(default=1, metadata={"static": True})


def document_loads(
    spec: MoESpec, tokens: RoutedTokens, routing: Routing, peers: Peers, after: Any
) -> Float[Array, "n E"]:
    """Return the load of each expert in each token's document, in multiples of the mean load.

    Call it inside `shard_map`. A token counts for the k experts of its best scores, without the
    correction and the groups that choose experts (DeepSeek-V3, 2024, equation 18). No gradient.

    Args:
        spec: of the layer.
        tokens: of this device, with `document`.
        routing: of these tokens, from `moe_router.route`.
        peers: the devices that documents may lie on.
        after: an array that another collective has made: processes that began two collectives in
            different orders would wait for each other.
    """
    assert tokens.index is not None
    assert tokens.document is not None
    best = routing.expert
    if spec.correction or spec.groups != spec.topk_groups:
        best = jax.lax.top_k(jax.lax.stop_gradient(routing.share), spec.top_k)[1]
    (rows, length), number = tokens.real.shape, tokens.real.size
    breaks = tokens.index[:, 1:] != tokens.index[:, :-1] + 1
    turns = tokens.document[:, 1:] != tokens.document[:, :-1]
    first = jnp.ones((rows, 1), bool)
    # Pieces of documents, counted from 0 over all rows.
    piece = jnp.cumsum(jnp.concatenate([first, turns], axis=1).reshape(-1)) - 1
    added = jnp.broadcast_to(tokens.real.reshape(-1, 1), best.shape).astype(jnp.float32)
    counts = jnp.zeros((number, spec.num_experts), jnp.float32)
    counts = counts.at[piece[:, None], best].add(added)
    if peers.size * tokens.runs > 1:
        begins, ends = (
            jnp.concatenate(parts, axis=1) & tokens.real
            for parts in ((first, breaks), (breaks, first))
        )
        slots = _slots(begins, tokens.runs), _slots(ends, tokens.runs)
        slot = jnp.sort(jnp.concatenate(slots, axis=1), axis=1)
        edge = jnp.take_along_axis(piece.reshape(rows, length), slot, axis=1)
        document = jnp.take_along_axis(tokens.document, slot, axis=1)
        counts = counts.at[edge].set(_joined(counts[edge], edge, document, peers, after))
    choices = jnp.sum(counts, axis=1, keepdims=True)
    return (counts * (spec.num_experts / jnp.maximum(choices, 1)))[piece]


def _slots(chosen: Bool[Array, "b t"], most: int) -> Int32[Array, "b R"]:
    """Return the slots that are chosen in each row, filled up with slot 0."""
    size = min(most, chosen.shape[1])
    return jax.vmap(lambda row: jnp.nonzero(row, size=size, fill_value=0)[0])(chosen)


def _joined(
    counts: Float[Array, "b e E"],
    edge: Int32[Array, "b e"],
    document: Int32[Array, "b e"],
    peers: Peers,
    after: Any,
) -> Float[Array, "b e E"]:
    """Return the counts of the documents of edges, over all edges of all devices.

    Args:
        counts: of the pieces at the edges.
        edge: the pieces, ascending in each row; a piece may come several times.
        document: their documents.
        peers: as in `document_loads`.
        after: as in `document_loads`.
    """
    again = jnp.concatenate([jnp.zeros_like(edge[:, :1], bool), edge[:, 1:] == edge[:, :-1]], 1)
    every = jnp.where(again[..., None], 0, counts), document
    if peers.size > 1:
        every, _ = jax.lax.optimization_barrier((every, after))
        with jax.named_scope(_GATHER_EDGES):
            every = jax.tree.map(
                lambda x: jax.lax.all_gather(
                    x, peers.axes, axis=1, axis_index_groups=peers.index_groups, tiled=True
                ),
                every,
            )
    same = (document[:, :, None] == every[1][:, None]).astype(jnp.float32)
    return jnp.einsum("bij,bje->bie", same, every[0], precision="highest")
