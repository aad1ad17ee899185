"""Describe GPUs, links and clusters as data: one table, each number with its source; plain Python.

from hcp_jax import hardware

cluster = hardware.Cluster(hardware.gpu("h200"), hosts=8, gpus_per_host=8)
"""

from hcp_jax.hardware.cluster import BETWEEN as BETWEEN
from hcp_jax.hardware.cluster import INSIDE as INSIDE
from hcp_jax.hardware.cluster import NO_LINK as NO_LINK
from hcp_jax.hardware.cluster import Cluster as Cluster
from hcp_jax.hardware.gpu import GPU as GPU
from hcp_jax.hardware.gpu import Direction as Direction
from hcp_jax.hardware.gpu import Link as Link
from hcp_jax.hardware.gpu import Path as Path
from hcp_jax.hardware.gpu import Rate as Rate
from hcp_jax.hardware.table import GPU_NAMES as GPU_NAMES
from hcp_jax.hardware.table import GPUS as GPUS
from hcp_jax.hardware.table import PEAK_FLOPS as PEAK_FLOPS
from hcp_jax.hardware.table import gpu as gpu
from hcp_jax.hardware.table import peak_flops as peak_flops
