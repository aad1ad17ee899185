"""Count what a recurrent layer costs: FLOPs, bytes of memory, and what it moves between devices.

Per token and head, with a state [K, V], the recurrence itself needs

    state-space model   4 K V     add k vᵀ to the state, and read it
    delta rule          6 K V     read the state for the key, add, and read it for the query

FLOPs, besides 2 · width for each channel that is convolved. That is what MFU counts. A device
computes chunks of L tokens with matrix products instead, which costs more FLOPs and is faster.
"""

import dataclasses
import math
from collections.abc import Mapping

from hcp_jax.cost.traffic import (
    EXCHANGE_HEADS,
    STATE_BYTES,
    Direction,
    Remat,
    Traffic,
    halo_traffic,
    state_scan_traffic,
)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """What determines the cost of a recurrent layer; its specs make it (`models/specs.py`).

    Attributes:
        heads: H, heads with a state.
        key_size: K, the rows of a head's state.
        value_size: V, the columns of a head's state.
        matrix: True for delta rules, which multiply the state by a matrix [K, K]; False if they
            multiply it by a number.
        convolved: heads and their size, for each array that is convolved.
        conv_size: tokens that the convolution sees, the current one included.
        chunk: L.
        product_params: number of weights of the layer's matrix products.
        tp_sizes: sizes that tp must divide.
        key_heads: G, heads of queries and keys; H / G heads share one.
        channel_decays: True if each channel of the keys has a decay; False for one per head.
    """

    heads: int
    key_size: int
    value_size: int
    matrix: bool
    convolved: tuple[tuple[int, int], ...]
    conv_size: int
    chunk: int
    product_params: int
    tp_sizes: tuple[int, ...]
    key_heads: int
    channel_decays: bool = False

    @property
    def channels(self) -> int:
        """Number of channels that are convolved."""
        return sum(heads * size for heads, size in self.convolved)

    @property
    def token_flops(self) -> float:
        """FLOPs of the recurrence for one token, forward, without the projections.

        >>> Recurrence(2, 8, 4, True, ((2, 8), (2, 8), (2, 4)), 4, 64, 0, (2,), 2).token_flops
        704.0
        """
        each = 6.0 if self.matrix else 4.0
        return each * self.heads * self.key_size * self.value_size + (
            2.0 * self.conv_size * self.channels
        )

    @property
    def chunk_flops(self) -> float:
        """FLOPs of the matrix products that compute one token in chunks, forward.

        >>> Recurrence(1, 8, 4, False, ((1, 4), (1, 8), (1, 8)), 4, 16, 0, (1,), 1).chunk_flops
        512.0
        """
        k, v, length = self.key_size, self.value_size, self.chunk
        if not self.matrix:  # k by q, weights by v; B, and the read of the state
            return self.key_heads * 2.0 * length * k + self.heads * (2.0 * length * v + 4.0 * k * v)
        # Products of keys and of queries, the inverse, what it writes and erases, and the outputs
        # of both; A and B, the replay of the states, and the read.
        inside = length * (4 * k + 2 * length / 3 + 4 * (v + k))
        return self.heads * (inside + 2 * k * k + 4 * k * v + 2 * k * k * v / length)

    @property
    def chunk_bytes(self) -> float:
        """Bytes of one token in the arrays that a layer's backward pass reads, all float32."""
        k, v, length = self.key_size, self.value_size, self.chunk
        if not self.matrix:
            rows = self.key_heads * 2 * k + self.heads * (3 * v + 2 * length + 2 * k * v / length)
            return 4.0 * rows
        return 4.0 * self.heads * (6 * k + 3 * v + 5 * length + (k * k + 2 * k * v) / length)

    def traffic(
        self,
        axes: tuple[str, ...],
        sizes: Mapping[str, int],
        *,
        runs: int,
        rows: int,
        tp: int,
        item_bytes: int,
        remat: Remat = "none",
    ) -> tuple[Traffic, ...]:
        """List the collectives of one layer in one step.

        Args:
            axes: mesh axes that the stream is cut over, by names in `sizes`.
            sizes: devices along each axis.
            runs: runs of the stream on a device: 1 (contiguous) or 2 (zigzag).
            rows: rows of the batch on one device.
            tp: number of devices that the heads are cut over.
            item_bytes: bytes of an element of the activations, which halos are.
            remat: what backward recomputes; all policies but "none" repeat the forward pass.
        """
        channels = tuple((h if h % tp else h // tp) * size for h, size in self.convolved)
        halos = halo_traffic(
            axes,
            sizes,
            runs=runs,
            rows=rows,
            halo=self.conv_size - 1,
            channels=channels,
            item_bytes=item_bytes,
            remat=remat,
        )
        states = state_scan_traffic(
            axes,
            sizes,
            runs=runs,
            rows=rows,
            heads=self.heads // tp,
            key_size=self.key_size,
            value_size=self.value_size,
            matrix=self.matrix,
            remat=remat,
        )
        return halos + states

    def grouped_traffic(
        self,
        axes: tuple[str, ...],
        widest: int,
        *,
        tokens: int,
        tp: int,
        item_bytes: int,
        remat: Remat = "none",
    ) -> tuple[Traffic, ...]:
        """List the exchanges of heads of one layer in one step under groups; they grow with tokens.

        Args:
            axes: mesh axes that groups span.
            widest: devices of the widest group, among which heads are exchanged.
            tokens: slots of a device's buffer.
            tp: as in `traffic`.
            item_bytes: as in `traffic`.
            remat: as in `traffic`.
        """
        if widest == 1:
            return ()
        channels = [(h if h % tp else h // tp) * size for h, size in self.convolved]
        convolved = tokens * item_bytes * sum(-(-n // widest) * widest for n in channels)
        heads = self.heads // tp
        parts = widest // math.gcd(widest, heads)
        key_heads = math.lcm(math.lcm(self.key_heads, tp) // tp, widest)
        values = heads * parts * -(-self.value_size // parts)
        numbers = self.matrix + (self.key_size if self.channel_decays else 1)  # beta and decays
        items = 2 * key_heads * self.key_size + values
        inputs = tokens * (items * item_bytes + heads * parts * numbers * STATE_BYTES)
        outputs = tokens * values * item_bytes
        arrays = len(self.convolved)
        moved = (
            (arrays, convolved),
            (arrays, convolved),
            (4 + self.matrix, inputs),
            (1, outputs),
        )

        def all_of(direction: Direction, repeated: bool = False) -> list[Traffic]:
            names = EXCHANGE_HEADS, "all-to-all", direction, axes, widest
            return [Traffic(*names, arrays, 1, put, repeated) for arrays, put in moved]

        again = all_of("backward", repeated=True) if remat != "none" else []
        return (*all_of("forward"), *again, *all_of("backward"))
