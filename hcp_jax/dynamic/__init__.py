"""Schedule dynamic context parallelism: each document runs on as many devices as it needs.

    from hcp_jax import dynamic

    plan = dynamic.schedule(lengths, num_devices=64, max_tokens_per_device=2048)
    print(plan)
    arrays = dynamic.pack(plan.microbatches[0], plan.lengths, plan.max_tokens_per_device)

It uses NumPy only and never imports jax, so a host can plan before any device is used. The names
are imported on first use, so that `hcp --help` stays fast.
"""

from typing import TYPE_CHECKING

from hcp_jax.base.lazy import lazy_names

if TYPE_CHECKING:
    from hcp_jax.dynamic.cost import Cost as Cost
    from hcp_jax.dynamic.cost import model_cost as model_cost
    from hcp_jax.dynamic.group import TimedMicrobatch as TimedMicrobatch
    from hcp_jax.dynamic.menu import choose_menu as choose_menu
    from hcp_jax.dynamic.menu import schedule_batches as schedule_batches
    from hcp_jax.dynamic.plan import Schedule as Schedule
    from hcp_jax.dynamic.scheduler import schedule as schedule
    from hcp_jax.sequence.packing import Microbatch as Microbatch
    from hcp_jax.sequence.packing import PackedMicrobatch as PackedMicrobatch
    from hcp_jax.sequence.packing import max_runs as max_runs
    from hcp_jax.sequence.packing import pack as pack

_HOME = {
    "Cost": "hcp_jax.dynamic.cost",
    "Microbatch": "hcp_jax.sequence.packing",
    "PackedMicrobatch": "hcp_jax.sequence.packing",
    "Schedule": "hcp_jax.dynamic.plan",
    "TimedMicrobatch": "hcp_jax.dynamic.group",
    "choose_menu": "hcp_jax.dynamic.menu",
    "max_runs": "hcp_jax.sequence.packing",
    "model_cost": "hcp_jax.dynamic.cost",
    "pack": "hcp_jax.sequence.packing",
    "schedule": "hcp_jax.dynamic.scheduler",
    "schedule_batches": "hcp_jax.dynamic.menu",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME)
