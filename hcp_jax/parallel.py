"""The configuration of a mesh and its communication, in this library's words or in Megatron's.

Apart from `ContextParallel`, so that a config can be read, and its devices counted, before there
are any.
"""

import dataclasses
from dataclasses import field

import jax

from hcp_jax.context import STRATEGIES, ContextParallel, require_known
from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.mesh import make_mesh
from hcp_jax.settings import MOST, check, free


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The mesh and the communication of a run, in this library's words or in Megatron's.

    Attributes:
        dp: data parallelism.
        tp: tensor parallelism.
        cp_outer: P, size of the ring between hosts.
        cp_inner: A, size of the all-to-all inside a host.
        comm_type: one comm type, or one per layer.
        layout: "zigzag" or "contiguous".
        fsdp: cut parameters and optimizer state over dp and cp.
        head_groups: as in `ContextParallel`.
        dynamic: each document on as many of the dp * cp devices as it needs.
        context_parallel_size: Megatron's word for cp_outer * cp_inner.
        cp_comm_type: Megatron's word for comm_type.
        hierarchical_context_parallel_sizes: Megatron's [cp_inner, cp_outer].
    """

    dp: int = field(default=1, metadata=free(least=1, most=MOST))
    tp: int = field(default=1, metadata=free(least=1, most=MOST))
    cp_outer: int = field(default=1, metadata=free(least=1, most=MOST))
    cp_inner: int = field(default=1, metadata=free(least=1, most=MOST))
    comm_type: str | list[str] = field(default="a2a+p2p", metadata=free())
    layout: str = field(default="zigzag", metadata=free())
    fsdp: bool = field(default=False, metadata=free())
    head_groups: int = field(default=1, metadata=free(least=1, most=MOST))
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    context_parallel_size: int | None = field(default=None, metadata=free(least=1, most=MOST))
    cp_comm_type: str | list[str] | None = field(default=None, metadata=free())
    hierarchical_context_parallel_sizes: list[int] | None = field(
        default=None, metadata=free(least=1, most=MOST)
    )

    def __post_init__(self):
        check(self, "parallel.")

    def resolve(self) -> "ParallelConfig":
        """The same run in this library's words alone.

        Raises:
            ValueError: if the two sets of words contradict each other.
        """
        sizes = _cp_sizes(self)
        comm_type = self.comm_type
        if self.cp_comm_type is not None:
            comm_type = self.cp_comm_type
        return dataclasses.replace(
            self,
            cp_outer=sizes[1],
            cp_inner=sizes[0],
            comm_type=comm_type,
            context_parallel_size=None,
            cp_comm_type=None,
            hierarchical_context_parallel_sizes=None,
        )

    @property
    def num_devices(self) -> int:
        """How many devices the mesh has."""
        r = self.resolve()
        return r.dp * r.tp * r.cp_outer * r.cp_inner

    def context_parallel(
        self, num_layers: int | None = None, devices: list[jax.Device] | None = None
    ) -> ContextParallel:
        """Make the mesh.

        Args:
            num_layers: how many layers the model has, where it is known.
            devices: all of `jax.devices()` if None.

        Raises:
            ValueError: for anything about the mesh or the comm types that cannot be.
        """
        r = self.resolve()
        comm_type = r.comm_type if isinstance(r.comm_type, str) else tuple(r.comm_type)
        if not isinstance(comm_type, str) and num_layers not in (None, len(comm_type)):
            raise ValueError(
                f"comm_type lists {len(comm_type)} layers, but the model has {num_layers}; "
                "give one comm type, or one per layer."
            )
        for one in _listed(comm_type):
            require_known("comm_type", one, tuple(STRATEGIES))
        mesh = make_mesh(r.dp, r.tp, r.cp_outer, r.cp_inner, devices=devices)
        return ContextParallel(
            mesh, comm_type=comm_type, layout=r.layout, head_groups=r.head_groups
        )


def _cp_sizes(config: ParallelConfig) -> tuple[int, int]:
    """(cp_inner, cp_outer), from whichever words the config uses."""
    own = (config.cp_inner, config.cp_outer)
    total, levels = config.context_parallel_size, config.hierarchical_context_parallel_sizes
    if own != (1, 1) and (total, levels) != (None, None):
        raise ValueError(
            f"cp_inner={own[0]} and cp_outer={own[1]} are given together with Megatron's "
            "context_parallel_size or hierarchical_context_parallel_sizes; use one of the two."
        )
    if levels is not None:
        if len(levels) != 2:
            raise ValueError(
                "hierarchical_context_parallel_sizes needs two sizes, [all-to-all, p2p] = "
                f"[cp_inner, cp_outer], got {levels}."
            )
        if total is not None and levels[0] * levels[1] != total:
            raise ValueError(
                f"hierarchical_context_parallel_sizes {levels} multiply to "
                f"{levels[0] * levels[1]}, but context_parallel_size is {total}."
            )
        return levels[0], levels[1]
    if total is None:
        return own
    comm_type = config.cp_comm_type if config.cp_comm_type is not None else config.comm_type
    if any("+" in one for one in _listed(comm_type)) and total != 1:
        raise ValueError(
            f"comm_type {comm_type!r} needs hierarchical_context_parallel_sizes [cp_inner, "
            f"cp_outer] whose product is context_parallel_size={total}; without them there is no "
            "telling which devices exchange heads."
        )
    # One level. Heads are exchanged inside hosts, so a2a is given the inner axis.
    return (total, 1) if "a2a" in _listed(comm_type) else (1, total)


def _listed(comm_type: str | list[str] | tuple[str, ...]) -> list[str]:
    return [comm_type] if isinstance(comm_type, str) else list(comm_type)
