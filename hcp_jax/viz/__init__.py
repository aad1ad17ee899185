"""Draw what the library computes; every function returns a matplotlib `Figure`.

    import hcp_jax as hcp

    figure = hcp.viz.draw_mask([cp], hcp.causal(), 512)
    figure.savefig("mask.png")  # a notebook shows a figure that ends a cell

| function | picture |
|---|---|
| `draw_layout` | which device holds which tokens |
| `draw_mask` | which keys each query sees, in the colour of the query's device |
| `draw_work` | how many pairs each device computes at each hop |
| `draw_traffic` | what a device sends in a layer, for each comm type |
| `draw_timeline` | kernels and transfers of a compiled program over time |
| `draw_schedule` | documents on groups of devices over time (dynamic context parallelism) |
| `draw_ticks` | passes of microbatches through the stages of a pipeline over time |
| `draw_loss`, `draw_by_position` | the loss of a run, and held-out loss by position |
| `draw_runs` | several runs side by side |
| `draw_rates` | TFLOP/s of attention kernels |

The commands draw with the same functions. No other room imports matplotlib, and this one only when
a name is used. Colours are Okabe and Ito's, or go from dark to light: they can be told apart by
colour-blind people, and the ordered ones in grey print. Devices also have their numbers written on
them where there is room.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcp_jax.viz.pipelines import draw_ticks as draw_ticks
    from hcp_jax.viz.rates import draw_rates as draw_rates
    from hcp_jax.viz.runs import Run as Run
    from hcp_jax.viz.runs import draw_by_position as draw_by_position
    from hcp_jax.viz.runs import draw_loss as draw_loss
    from hcp_jax.viz.runs import draw_runs as draw_runs
    from hcp_jax.viz.runs import read_run as read_run
    from hcp_jax.viz.schedules import draw_schedule as draw_schedule
    from hcp_jax.viz.timeline import draw_timeline as draw_timeline
    from hcp_jax.viz.tokens import draw_layout as draw_layout
    from hcp_jax.viz.tokens import draw_mask as draw_mask
    from hcp_jax.viz.tokens import draw_work as draw_work
    from hcp_jax.viz.traffic import draw_traffic as draw_traffic

_HOME = {
    "Run": "runs",
    "draw_by_position": "runs",
    "draw_layout": "tokens",
    "draw_loss": "runs",
    "draw_mask": "tokens",
    "draw_rates": "rates",
    "draw_runs": "runs",
    "draw_schedule": "schedules",
    "draw_ticks": "pipelines",
    "draw_timeline": "timeline",
    "draw_traffic": "traffic",
    "draw_work": "tokens",
    "read_run": "runs",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hcp_jax.viz' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hcp_jax.viz.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
