"""Estimate the seconds and transfers of one layer's mixer: attention, or a recurrence."""

import functools

import numpy as np

from hcp_jax.cost.pairs import causal_chunk_pairs, pairs_by_hop
from hcp_jax.cost.recurrence import Recurrence
from hcp_jax.cost.shape import BACKWARD, ModelShape
from hcp_jax.cost.split import Split, Transfer, path
from hcp_jax.cost.stages import with_recomputed_chunks
from hcp_jax.cost.traffic import (
    GATHER_KV,
    HALO,
    RING_HOP,
    STATE_SCAN,
    Traffic,
    layer_traffic,
)
from hcp_jax.hardware import Cluster


@functools.lru_cache(maxsize=64)
def stream_pairs(model: ModelShape, seq_len: int, chunks: int) -> np.ndarray:
    """Return `chunk_pairs` of a model's mask, `[chunks, chunks]`, without arrays of length T."""
    return causal_chunk_pairs(seq_len, chunks, model.sliding_window)


@functools.lru_cache(maxsize=256)
def _busiest_by_hop(model: ModelShape, seq_len: int, cp: int, move: int) -> np.ndarray:
    """Return the visible pairs of the busiest ring rank at each hop, in zigzag, `[hops]`."""
    by_hop = pairs_by_hop(stream_pairs(model, seq_len, 2 * cp), cp, "zigzag", move)
    busiest: np.ndarray = by_hop.max(axis=0)
    return busiest


class AttentionCost:
    """Cost of one layer's attention, forward and backward, with recomputation."""

    def __init__(
        self,
        model: ModelShape,
        split: Split,
        cluster: Cluster,
        seq_len: int,
        rows: int,
        implementation: str,
    ) -> None:
        self.split, self.cluster = split, cluster
        heads, kv_heads = model.num_heads // split.tp, model.num_kv_heads // split.tp
        t = rows * seq_len // split.cp  # tokens of a device, before heads are exchanged
        self.traffic = layer_traffic(
            split.strategy,
            {"cp_outer": split.cp_outer, "cp_inner": split.cp_inner},
            tokens=t,
            heads=heads,
            kv_heads=kv_heads,
            head_size=model.head_size,
            item_bytes=2,
            remat=split.remat,
        )
        if split.pp > 1:
            self.traffic = with_recomputed_chunks(self.traffic)
        per_pair = 4.0 * model.head_size * (heads // split.exchange) * rows
        # At each hop all devices wait for the busiest one.
        flops = per_pair * _busiest_by_hop(model, seq_len, split.cp, split.move)
        gpu = cluster.gpu
        self.forward_hops = flops / gpu.attention_rate(implementation, "forward").value
        backward = gpu.attention_rate(implementation, "backward").value
        self.backward_hops = BACKWARD * flops / backward
        self.forwards = 1 + (split.remat == "full") + (split.pp > 1)
        # Each hop merges partials and adds gradients in float32.
        merged = 12.0 * t * heads * model.head_size
        hops = split.move - 1 if split.strategy.by == "ring" else 0
        self.merge_s = hops * merged / gpu.memory_bandwidth

    @property
    def compute_s(self) -> float:
        """Seconds of computation in a step."""
        return (
            self.forwards * (float(self.forward_hops.sum()) + self.merge_s)
            + float(self.backward_hops.sum())
            + self.merge_s
        )

    @property
    def transfers(self) -> list[Transfer]:
        """Transfers of a step."""
        ring = [t for t in self.traffic if t.scope == RING_HOP]
        gather = [t for t in self.traffic if t.scope == GATHER_KV]
        exchange = [t for t in self.traffic if t not in ring and t not in gather]
        forward = [t for t in ring if t.direction == "forward" or t.repeated]
        backward = [t for t in ring if t not in forward]
        passes = self._together("K/V round the ring, forward", forward[:1], self.forward_hops)
        return [
            *(one.times(len(forward)) for one in passes),
            *self._together("K/V and their gradients, backward", backward, self.backward_hops),
            *self._alone("K/V gathered, gradients scattered", gather, 1),
            *self._alone("heads exchanged for sequence", exchange, None),
        ]

    def _together(self, what: str, moves: list[Traffic], hops: np.ndarray) -> list[Transfer]:
        """Return transfers that run at the same time, hidden behind the attention of each hop."""
        if not moves:
            return []
        first = moves[0]
        link, rate, latency = path(self.cluster, self.split, first.axes, first.kind)
        size = sum(move.sent_bytes for move in moves)
        one = size / rate + latency
        exposed = sum(max(0.0, one - float(hop)) for hop in hops[:-1])
        return [Transfer(what, first.axes, link, first.count * size, first.count * one, exposed)]

    def _alone(self, what: str, moves: list[Traffic], starts: int | None) -> list[Transfer]:
        """Return transfers that nothing hides; arguments as in the function of this name."""
        if not moves:
            return []
        alone = alone_cost(self.cluster, self.split, moves, starts)
        return [Transfer(what, moves[0].axes, *alone)]


# Fitted to audits of 4-layer hybrids (gated delta net, Mamba-2) on 2 x 8 H200 at 128K tokens: how
# often each array of a chunk is read or written, and by how much products of float32 are slower
# than those of bfloat16 (some, of delta rules, are at the highest precision).
_PASSES = 7


_SLOWER_NUMBERS, _SLOWER_MATRICES = 4, 12


class RecurrentCost:
    """Cost of one layer's recurrence, forward and backward, without its projections."""

    def __init__(
        self, recurrence: Recurrence, split: Split, cluster: Cluster, t: int, rows: int
    ) -> None:
        self.split, self.cluster = split, cluster
        gpu = cluster.gpu
        each = t / split.tp * (2 + split.forwards)
        slower = _SLOWER_MATRICES if recurrence.matrix else _SLOWER_NUMBERS
        products = slower * each * recurrence.chunk_flops / gpu.product_rate.value
        moved = _PASSES * each * recurrence.chunk_bytes / gpu.memory_bandwidth
        self.compute_s = products + moved
        self.traffic = recurrence.traffic(
            ("cp_outer", "cp_inner"),
            {"cp_outer": split.cp_outer, "cp_inner": split.cp_inner},
            runs=2,
            rows=rows,
            tp=split.tp,
            item_bytes=2,
            remat=split.remat,
        )

    @property
    def transfers(self) -> list[Transfer]:
        """Transfers of a step."""
        return [
            Transfer(what, moves[0].axes, *alone_cost(self.cluster, self.split, moves))
            for what, scope in (("states passed on", STATE_SCAN), ("halos of convolutions", HALO))
            if (moves := [move for move in self.traffic if move.scope == scope])
        ]


def alone_cost(
    cluster: Cluster, split: Split, moves: list[Traffic], starts: int | None = None
) -> tuple[str, float, float, float]:
    """Return link, bytes, seconds and exposed seconds of transfers that nothing hides.

    Args:
        cluster: the cluster.
        split: its split.
        moves: traffic over the same axes.
        starts: number of latencies per execution; None for one per array.
    """
    sent = sum(move.count * move.sent_bytes for move in moves)
    seconds = 0.0
    for move in moves:
        link, rate, latency = path(cluster, split, move.axes, move.kind)
        calls = move.count * (starts or move.arrays)
        seconds += move.count * move.sent_bytes / rate + calls * latency
    return link, sent, seconds, seconds
