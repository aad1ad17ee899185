"""Describe a mesh, the roles of its axes and the layout of streams in one `ContextParallel`.

All parts of a program must agree on these: attention, the sharded data, the roll of multi-token
prediction, the checks of `hcp verify`. The object is frozen and hashable, so `jit` can close over
it. The roles themselves are in `roles.py`; the methods here move data.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

from hcp_jax.base import checks
from hcp_jax.parallel import placing
from hcp_jax.parallel.buffers import map_buffers
from hcp_jax.parallel.describe import describe
from hcp_jax.parallel.placing import Gathered
from hcp_jax.parallel.roles import MeshRoles
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask


@dataclasses.dataclass(frozen=True)
class ContextParallel(MeshRoles):
    """How sequences are split over a mesh; frozen and hashable.

    Attributes:
        mesh: any mesh that has the axes named below, in any order, Auto or Explicit; other axes are
            not used.
        comm_type: how the two cp axes communicate: "p2p", "all_gather", "a2a", "a2a+p2p" or
            "a2a+all_gather"; or a tuple with one per layer (`for_layer` selects one).
        layout: the order in which streams are cut, "zigzag" or "contiguous".
        dp: mesh axis, or axes, that the batch is cut over; None if there is none.
        tp: mesh axis, or axes, that attention heads are cut over; None if there is none.
        cp_outer: mesh axis of the ring between hosts; None if there is none.
        cp_inner: mesh axis of the all-to-all inside a host; None if there is none.
        head_groups: process the heads in this many parts, one after the other, so that the exchange
            of one part is hidden behind attention on another. It must divide the number of kv
            heads that a device has after the exchange. It helps where the exchange is a large part
            of the step (plain a2a with short sequences). Each part runs its own ring, whose first
            and last hops may not be hidden. `hcp audit` shows both effects.
        widest_group: dynamic context parallelism: the number of devices, counted along dp and the
            cp axes, of the widest group that a microbatch may have. Which devices form groups, and
            which documents they have, is data of the batch (`hcp.place_microbatch`). None: one
            stream over the cp axes for each dp device.
        ep: number of devices over which a model cuts its experts: those of the innermost of the
            axes dp, cp_outer, cp_inner (`expert_axes`).

    Raises:
        ValueError: for an axis that the mesh lacks or that has two roles, for an unknown comm type
            or layout, and for a widest group that does not divide the dp and cp devices.

    >>> import hcp_jax as hcp
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), comm_type="a2a+p2p")
    >>> cp.size
    8
    """

    def shard(self, x: Array | np.ndarray | Gathered, dim: int = 1) -> jax.Array:
        """Reorder an array from natural order to the layout and cut `dim` over the cp devices.

        Works on host arrays, device arrays and inside `jit`. `dim` is padded with zeros at its end
        to `padded_length`. A mask that looks ahead must then end where the stream ends
        (`mask & hcp.lengths(T)`); `shard_batch` does this itself.

        Args:
            x: dim 0 is the batch, cut over dp (unless `dim` is 0). Of a `Gathered`, only the parts
                on this process's own devices are read.
            dim: the sequence dim.

        Raises:
            ValueError: if dp does not divide the batch.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> tokens = cp.shard(np.arange(16)[None])
        >>> tokens[0, :4].tolist()  # what the first two devices hold
        [0, 15, 1, 14]
        """
        self.placement.require_streams("cp.shard")
        return placing.shard(self, x, dim)

    def unshard(self, x: jax.Array, dim: int = 1, length: int | None = None) -> jax.Array:
        """Reorder an array from the layout back to natural order.

        Args:
            x: an array in the layout.
            dim: the sequence dim.
            length: the length before padding, to cut the result to; keep the padding if None.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> cp.unshard(cp.shard(np.arange(10)[None]), length=10)[0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        """
        self.placement.require_streams("cp.unshard")
        return placing.unshard(self, x, dim, length)

    def shard_buffers(self, tree: Any, seq_dims: Any) -> Any:
        """Apply `shard` to every array of a tree, each along its own sequence dim.

        Token ids, labels, activations and positions (`np.arange(T)`, RoPE tables) of one stream
        then lie on the devices in the same order. Arrays whose seq_dim is not 0 have the batch as
        dim 0.

        Args:
            tree: arrays in natural order, in any containers; all of one length, a whole layout.
            seq_dims: one dim for all arrays, or the same containers with a dim for each array (or
                for a container of arrays). None: has no sequence dim, and is returned as it is.

        Raises:
            ValueError: if `seq_dims` does not fit the tree, an array lacks its dim, or the lengths
                differ or need padding; names the array.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> batch = {"x": np.ones((2, 64, 8)), "positions": np.arange(64), "rate": 0.1}
        >>> dims = {"x": 1, "positions": 0, "rate": None}
        >>> back = cp.unshard_buffers(cp.shard_buffers(batch, dims), dims)
        >>> back["positions"].tolist() == list(range(64))
        True
        """
        self.placement.require_streams("cp.shard_buffers")
        return map_buffers(self.shard, tree, seq_dims, self.padded_length)

    def unshard_buffers(self, tree: Any, seq_dims: Any) -> Any:
        """Reorder every array of a tree back to natural order; undo `shard_buffers`.

        Args and errors are those of `shard_buffers`. Works on results and gradients, too.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> tree = {"x": np.arange(16.0)[None]}
        >>> cp.unshard_buffers(cp.shard_buffers(tree, 1), 1)["x"][0, :3].tolist()
        [0.0, 1.0, 2.0]
        """
        self.placement.require_streams("cp.unshard_buffers")
        return map_buffers(self.unshard, tree, seq_dims, self.padded_length)

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Put a batch of host arrays in natural order on the devices, in the layout.

        Args:
            batch: arrays `[B, T, …]` or `Gathered` (cut over dp and cp), arrays `[B]` (cut over
                dp), scalars (replicated), and `Mask`s. Masks are placed: their intervals are
                computed here, once, and every cp device holds all of them (8 bytes per token).

        Returns:
            A batch with the same keys. T is padded to `padded_length` with zeros. In masks, padding
            sees nothing and no query sees it.

        Raises:
            ValueError: if the arrays have different lengths, or dp does not divide the batch.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> batch = {"tokens": np.ones((2, 50), np.int32), "mask": hcp.causal()}
        >>> cp.shard_batch(batch)["tokens"].shape
        (2, 64)
        """
        self.placement.require_streams("cp.shard_batch")
        return placing.shard_batch(self, batch)

    def place(self, mask: Mask, length: int, key_length: int | None = None) -> PlacedMask:
        """Place a mask: compute its intervals in the layout and put them on the devices.

        Args:
            mask: a mask in natural order, for a stream of `length` queries or of any length.
            length: T before padding.
            key_length: S before padding, in cross attention; T if None. No query sees later keys.

        Raises:
            ValueError: if the mask was written for more queries, or is already placed.

        >>> import hcp_jax as hcp
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> cp.place(hcp.bidirectional(), 50, key_length=70).key_length
        80
        """
        self.placement.require_streams("cp.place")
        return placing.place_mask(self, mask, length, key_length)

    def positions(self, length: int) -> Int32[jax.Array, "1 T"]:
        """Return the global index of every token of a stream, in the layout; for RoPE.

        >>> import hcp_jax as hcp
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> cp.positions(16)[0, :4].tolist()
        [0, 15, 1, 14]
        """
        self.placement.require_streams("cp.positions")
        return placing.positions(self, length)

    def roll(self, x: jax.Array, shift: int, dim: int = 1) -> jax.Array:
        """Apply `jnp.roll` along the stream to an array in the layout, across device borders.

        Only the |shift| tokens at the border of each chunk are sent, with one ppermute for each
        chunk of a device. A shift by more than a chunk repeats this for each chunk length.

        Args:
            x: an array in the layout.
            shift: number of tokens to shift by; -1 replaces each token by the next one.
            dim: the sequence dim.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> targets = cp.roll(cp.shard(np.arange(16)[None]), -1)
        >>> cp.unshard(targets)[0, :4].tolist()
        [1, 2, 3, 4]
        """
        self.placement.require_streams("cp.roll")
        shift = checks.integer("shift", shift)
        return placing.roll(self, x, shift, checks.dimension("dim", dim, x.ndim))

    def describe(self) -> str:
        """Describe the mesh, the groups and the link of each axis, the comm types and the core.

        >>> import hcp_jax as hcp
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> print(cp.describe().splitlines()[0])
        8 devices (cpu), context parallel size 8, zigzag layout
        """
        return describe(self)
