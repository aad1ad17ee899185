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

from typing import TYPE_CHECKING

from hcp_jax.base.lazy import lazy_names

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
    "Run": "hcp_jax.viz.runs",
    "draw_by_position": "hcp_jax.viz.runs",
    "draw_layout": "hcp_jax.viz.tokens",
    "draw_loss": "hcp_jax.viz.runs",
    "draw_mask": "hcp_jax.viz.tokens",
    "draw_rates": "hcp_jax.viz.rates",
    "draw_runs": "hcp_jax.viz.runs",
    "draw_schedule": "hcp_jax.viz.schedules",
    "draw_ticks": "hcp_jax.viz.pipelines",
    "draw_timeline": "hcp_jax.viz.timeline",
    "draw_traffic": "hcp_jax.viz.traffic",
    "draw_work": "hcp_jax.viz.tokens",
    "read_run": "hcp_jax.viz.runs",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME)
