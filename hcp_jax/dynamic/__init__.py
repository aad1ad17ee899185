"""Schedule dynamic context parallelism: each document runs on as many devices as it needs.

    from hcp_jax import dynamic

    plan = dynamic.schedule(lengths, num_devices=64, max_tokens_per_device=2048)
    print(plan)
    arrays = dynamic.pack(plan.microbatches[0], plan.lengths, plan.max_tokens_per_device)

It uses NumPy only and never imports jax, so a host can plan before any device is used. The names
are imported on first use, so that `hcp --help` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcp_jax.dynamic.cost import Cost as Cost
    from hcp_jax.dynamic.cost import TimedMicrobatch as TimedMicrobatch
    from hcp_jax.dynamic.cost import model_cost as model_cost
    from hcp_jax.dynamic.menu import choose_menu as choose_menu
    from hcp_jax.dynamic.menu import schedule_batches as schedule_batches
    from hcp_jax.dynamic.plan import Schedule as Schedule
    from hcp_jax.dynamic.scheduler import schedule as schedule
    from hcp_jax.sequence.packing import Microbatch as Microbatch
    from hcp_jax.sequence.packing import PackedMicrobatch as PackedMicrobatch
    from hcp_jax.sequence.packing import max_runs as max_runs
    from hcp_jax.sequence.packing import pack as pack

_HOME = {
    "Cost": "dynamic.cost",
    "Microbatch": "sequence.packing",
    "PackedMicrobatch": "sequence.packing",
    "Schedule": "dynamic.plan",
    "TimedMicrobatch": "dynamic.cost",
    "choose_menu": "dynamic.menu",
    "max_runs": "sequence.packing",
    "model_cost": "dynamic.cost",
    "pack": "sequence.packing",
    "schedule": "dynamic.scheduler",
    "schedule_batches": "dynamic.menu",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hcp_jax.dynamic' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hcp_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
