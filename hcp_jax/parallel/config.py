"""Configure a mesh and its communication, in this library's words or in Megatron's.

This is separate from `ContextParallel`, so that a config can be read, and its devices counted,
before any devices exist.
"""

import dataclasses
import math
from dataclasses import field
from typing import TYPE_CHECKING, Any

from hcp_jax.base.names import LAYOUTS, require_known
from hcp_jax.base.settings import MOST, check, free
from hcp_jax.cost.expert_axes import innermost_axes
from hcp_jax.cost.traffic import COMM_TYPES
from hcp_jax.dynamic.config import DynamicConfig

if TYPE_CHECKING:
    import jax

    from hcp_jax.parallel.context import ContextParallel


_SCHEDULERS = ("default_dynamic_cp", "dp_balanced")
_DYNAMIC = {field.name: field.default for field in dataclasses.fields(DynamicConfig)}
_DYNAMIC_WORDS = (
    "dynamic_context_parallel",
    "sequence_packing_scheduler",
    "max_seqlen_per_dp_cp_rank",
    "min_dynamic_context_parallel_size",
)


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
        fsdp: shard parameters and optimizer state over dp and cp.
        head_groups: as in `ContextParallel`.
        ep: number of devices that experts are cut over, those of the innermost of dp, cp_outer and
            cp_inner: they are the same devices that cut tokens, and not a part of their product.
        dynamic: dynamic context parallelism: each document uses as many of the dp * cp devices as
            it needs.
        expert_model_parallel_size: Megatron's word for ep.
        context_parallel_size: Megatron's word for cp_outer * cp_inner.
        cp_comm_type: Megatron's word for comm_type.
        hierarchical_context_parallel_sizes: Megatron's [cp_inner, cp_outer].
        dynamic_context_parallel: Megatron's word for dynamic.enabled.
        sequence_packing_scheduler: Megatron's word for how documents are scheduled:
            "default_dynamic_cp" is dynamic CP; "dp_balanced" keeps every document on all
            cp_outer * cp_inner devices of a dp rank, and balances the work of the ranks. It is
            dynamic CP with one width.
        max_seqlen_per_dp_cp_rank: Megatron's word for dynamic.max_tokens_per_device.
        min_dynamic_context_parallel_size: Megatron's word for dynamic.min_cp_size.
        hybrid_context_parallel: Megatron's older word for dynamic CP; refused, with what to write.
        pp: stages of a pipeline; each has dp * tp * cp_outer * cp_inner devices.
        virtual_stages: chunks of consecutive layers on each stage; more than 1 only with pp > 1.
        pipeline_model_parallel_size: Megatron's word for pp.
        virtual_pipeline_model_parallel_size: Megatron's word for virtual_stages.

    Raises:
        ValueError: for unknown or contradicting values.
    """

    dp: int = field(default=1, metadata=free(least=1, most=MOST))
    tp: int = field(default=1, metadata=free(least=1, most=MOST))
    cp_outer: int = field(default=1, metadata=free(least=1, most=MOST))
    cp_inner: int = field(default=1, metadata=free(least=1, most=MOST))
    comm_type: str | list[str] = field(default="a2a+p2p", metadata=free())
    layout: str = field(default="zigzag", metadata=free())
    fsdp: bool = field(default=False, metadata=free())
    head_groups: int = field(default=1, metadata=free(least=1, most=MOST))
    ep: int = field(default=1, metadata=free(least=1, most=MOST))
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    expert_model_parallel_size: int | None = field(default=None, metadata=free(least=1, most=MOST))
    context_parallel_size: int | None = field(default=None, metadata=free(least=1, most=MOST))
    cp_comm_type: str | list[str] | None = field(default=None, metadata=free())
    hierarchical_context_parallel_sizes: list[int] | None = field(
        default=None, metadata=free(least=1, most=MOST)
    )

    dynamic_context_parallel: bool | None = field(default=None, metadata=free())
    sequence_packing_scheduler: str | None = field(default=None, metadata=free())
    max_seqlen_per_dp_cp_rank: int | None = field(default=None, metadata=free(least=1, most=MOST))
    min_dynamic_context_parallel_size: int | None = field(
        default=None, metadata=free(least=1, most=MOST)
    )
    hybrid_context_parallel: bool | None = field(default=None, metadata=free())
    pp: int = field(default=1, metadata=free(least=1, most=MOST))
    virtual_stages: int = field(default=1, metadata=free(least=1, most=MOST))
    pipeline_model_parallel_size: int | None = field(
        default=None, metadata=free(least=1, most=MOST)
    )
    virtual_pipeline_model_parallel_size: int | None = field(
        default=None, metadata=free(least=1, most=MOST)
    )

    def __post_init__(self) -> None:
        check(self, "parallel.")
        self._take_words_of_pipelines()
        self._take_words_of_dynamic_cp()
        for one in (*_listed(self.comm_type), *_listed(self.cp_comm_type or ())):
            require_known("comm_type", one, COMM_TYPES)
        require_known("layout", self.layout, LAYOUTS)

    def _take_words_of_pipelines(self) -> None:
        """Write Megatron's words for stages into `pp` and `virtual_stages`, and forget them."""
        for own, word in (
            ("pp", "pipeline_model_parallel_size"),
            ("virtual_stages", "virtual_pipeline_model_parallel_size"),
        ):
            given, value = getattr(self, word), getattr(self, own)
            object.__setattr__(self, word, None)
            if given is None:
                continue
            if value not in (1, given):
                raise ValueError(
                    f"{own}={value} is given together with Megatron's {word}={given}; use one of "
                    "the two."
                )
            object.__setattr__(self, own, given)
        if self.virtual_stages > 1 and self.pp == 1:
            raise ValueError(
                f"virtual_stages={self.virtual_stages} cuts the layers of each stage of a "
                "pipeline, but pp is 1: give pp the number of stages, or leave virtual_stages out."
            )

    def _take_words_of_dynamic_cp(self) -> None:
        """Write Megatron's words for dynamic CP into `dynamic`, and forget them."""
        if self.hybrid_context_parallel is not None:
            raise ValueError(
                "hybrid_context_parallel is Megatron's older name of dynamic context parallelism "
                "(not of the hierarchical one, which is comm_type a2a+p2p): write "
                "dynamic_context_parallel, or dynamic.enabled."
            )
        scheduler = self.sequence_packing_scheduler
        if scheduler is not None:
            require_known("sequence_packing_scheduler", scheduler, _SCHEDULERS)
        if scheduler == "dp_balanced" and self.dynamic_context_parallel:
            raise ValueError(
                "sequence_packing_scheduler 'dp_balanced' keeps one CP size, but "
                "dynamic_context_parallel is true; use 'default_dynamic_cp', or leave it out."
            )
        words: dict[str, Any] = {
            "enabled": True if scheduler else self.dynamic_context_parallel,
            "max_seqlen_per_dp_cp_rank": self.max_seqlen_per_dp_cp_rank,
            "min_cp_size": self.min_dynamic_context_parallel_size,
        }
        if scheduler == "dp_balanced":
            width = math.prod(_cp_sizes(self))
            if words["min_cp_size"] not in (None, width):
                raise ValueError(
                    f"min_dynamic_context_parallel_size={words['min_cp_size']}, but 'dp_balanced' "
                    f"keeps every document on cp_outer * cp_inner = {width} devices; leave it out."
                )
            words |= {"min_cp_size": width, "max_cp_size": width, "menu": [width]}
        given: dict[str, Any] = {n: value for n, value in words.items() if value is not None}
        if scheduler == "default_dynamic_cp" and self.dynamic_context_parallel is False:
            raise ValueError(
                f"dynamic_context_parallel is false, but sequence_packing_scheduler={scheduler!r} "
                "schedules dynamic CP; leave one of them out."
            )
        for name, value in given.items():
            own = getattr(self.dynamic, name)
            if own not in (value, _DYNAMIC[name]):
                raise ValueError(
                    f"dynamic.{name} is {own}, but Megatron's words say {value}; give one of them."
                )
        if given:
            object.__setattr__(self, "dynamic", dataclasses.replace(self.dynamic, **given))
        for word in _DYNAMIC_WORDS:
            object.__setattr__(self, word, None)

    def resolve(self) -> "ParallelConfig":
        """Return the same config with Megatron's words replaced by this library's.

        Raises:
            ValueError: if the two sets of words contradict each other.
        """
        sizes = _cp_sizes(self)
        ep = self.expert_model_parallel_size or self.ep
        if self.ep not in (1, ep):
            raise ValueError(
                f"ep={self.ep} is given together with Megatron's expert_model_parallel_size={ep}; "
                "use one of the two."
            )
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
            ep=ep,
            expert_model_parallel_size=None,
            hierarchical_context_parallel_sizes=None,
        )

    @property
    def num_devices(self) -> int:
        """The number of devices of the mesh."""
        return self.pp * self.devices_per_stage

    @property
    def devices_per_stage(self) -> int:
        """The number of devices of one stage; of the mesh without a pipeline."""
        r = self.resolve()
        return r.dp * r.tp * r.cp_outer * r.cp_inner

    def check_model(self, model: Any) -> None:
        """Check that the axes divide the heads and matrices of a model.

        Args:
            model: a `ModelConfig`.

        Raises:
            ValueError: if a size is not divisible; the message names sizes that are.
        """
        r = self.resolve()
        if not isinstance(r.comm_type, str) and len(r.comm_type) != model.num_layers:
            raise ValueError(
                f"comm_type lists {len(r.comm_type)} layers, but the model has "
                f"{model.num_layers}; give one comm type, or one per layer."
            )
        by_layer = {name: n for s in model.plan.stacks for name, n in s.spec.tp_sizes.items()}
        for name, size in (by_layer | {"vocab_size": model.vocab_size}).items():
            if size % r.tp:
                up = -(-size // r.tp) * r.tp
                raise ValueError(
                    f"tp={r.tp} cannot cut {name}={size}; use a tp that divides it, or {name} {up}."
                )
        innermost_axes({"dp": r.dp, "cp_outer": r.cp_outer, "cp_inner": r.cp_inner}, r.ep)
        experts = 1 if model.moe is None else model.moe.num_experts
        if experts % r.ep:
            why = "the model has no experts" if model.moe is None else f"num_experts={experts}"
            raise ValueError(f"ep={r.ep} cannot cut experts: {why}; use ep 1, or one that divides.")
        if r.dynamic.enabled:
            return  # each grouping exchanges heads among as many devices as the heads allow
        heads, kv_heads = model.num_heads // r.tp, model.num_kv_heads // r.tp
        for comm_type in dict.fromkeys(_listed(r.comm_type)):
            exchange = _exchange_size(r, comm_type)
            if heads % exchange:
                raise ValueError(_heads_do_not_divide(r, model, comm_type, exchange))
            after = math.lcm(kv_heads, exchange) // exchange
            if after % r.head_groups:
                raise ValueError(
                    f"head_groups={r.head_groups} must divide the {after} kv heads that a device "
                    f"has after the exchange; use one of {_divisors(after)}."
                )

    def context_parallel(
        self, num_layers: int | None = None, devices: "list[jax.Device] | None" = None
    ) -> "ContextParallel":
        """Make the mesh and return its `ContextParallel`.

        Args:
            num_layers: number of layers of the model; None if unknown.
            devices: devices of the mesh; all of `jax.devices()` if None.

        Raises:
            ValueError: if the mesh or the comm types are not possible.
        """
        from hcp_jax.parallel.context import ContextParallel
        from hcp_jax.parallel.mesh import make_mesh

        r = self.resolve()
        comm_type = r.comm_type if isinstance(r.comm_type, str) else tuple(r.comm_type)
        if not isinstance(comm_type, str) and num_layers not in (None, len(comm_type)):
            raise ValueError(
                f"comm_type lists {len(comm_type)} layers, but the model has {num_layers}; "
                "give one comm type, or one per layer."
            )
        mesh = make_mesh(r.dp, r.tp, r.cp_outer, r.cp_inner, pp=r.pp, devices=devices)
        return ContextParallel(
            mesh, comm_type=comm_type, layout=r.layout, head_groups=r.head_groups, ep=r.ep
        )


def _cp_sizes(config: ParallelConfig) -> tuple[int, int]:
    """Return (cp_inner, cp_outer), from this library's words or from Megatron's."""
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
            f"cp_outer] whose product is context_parallel_size={total}: they say which devices "
            "exchange heads."
        )
    # One level. Heads are exchanged inside hosts, so a2a uses the inner axis.
    return (total, 1) if "a2a" in _listed(comm_type) else (1, total)


def _listed(comm_type: str | list[str] | tuple[str, ...]) -> list[str]:
    return [comm_type] if isinstance(comm_type, str) else list(comm_type)


def _exchange_size(r: ParallelConfig, comm_type: str) -> int:
    """Return how many devices exchange heads with each other; `r` is resolved."""
    if not comm_type.startswith("a2a"):
        return 1
    return r.cp_inner * (r.cp_outer if comm_type == "a2a" else 1)


def _heads_do_not_divide(r: ParallelConfig, model: Any, comm_type: str, exchange: int) -> str:
    heads = model.num_heads // r.tp
    after_tp = f" ({heads} on each tp device)" if r.tp > 1 else ""
    axes = "cp_outer * cp_inner" if comm_type == "a2a" else "cp_inner"
    return (
        f"comm_type {comm_type!r} exchanges heads among {axes}={exchange} devices, which must "
        f"divide the model's num_heads={model.num_heads}{after_tp}; use comm_type 'p2p', or one "
        f"of {_divisors(heads)} for {axes}."
    )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
