"""Dynamic context parallelism: each document on as many devices as it needs.

    from hcp_jax import dynamic

    plan = dynamic.schedule(lengths, num_devices=64, max_tokens_per_device=2048)
    print(plan)
    arrays = dynamic.pack(plan.microbatches[0], plan.lengths, plan.max_tokens_per_device)

NumPy alone: nothing here imports jax, so that a host can plan before any device is touched.
"""

from hcp_jax.dynamic.cost import Cost as Cost
from hcp_jax.dynamic.cost import TimedMicrobatch as TimedMicrobatch
from hcp_jax.dynamic.cost import model_cost as model_cost
from hcp_jax.dynamic.menu import choose_menu as choose_menu
from hcp_jax.dynamic.menu import schedule_batches as schedule_batches
from hcp_jax.dynamic.packing import PackedMicrobatch as PackedMicrobatch
from hcp_jax.dynamic.packing import max_runs as max_runs
from hcp_jax.dynamic.packing import pack as pack
from hcp_jax.dynamic.plan import Microbatch as Microbatch
from hcp_jax.dynamic.plan import Schedule as Schedule
from hcp_jax.dynamic.scheduler import schedule as schedule
