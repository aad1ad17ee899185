"""GPUs, links and clusters as data: one table, each number with its source."""

from hcp_jax.hardware.table import (
    BETWEEN,
    GPU,
    GPUS,
    INSIDE,
    NO_LINK,
    Cluster,
    Link,
    Path,
    Rate,
    add_arguments,
    gpu,
    target_config,
)

__all__ = [
    "BETWEEN",
    "GPU",
    "GPUS",
    "INSIDE",
    "NO_LINK",
    "Cluster",
    "Link",
    "Path",
    "Rate",
    "add_arguments",
    "gpu",
    "target_config",
]
