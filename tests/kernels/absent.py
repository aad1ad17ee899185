"""GPUs that are not here, for tests that only compile."""

import jax
import pytest

from hcp_jax import hardware
from hcp_jax.compiled import aot


def devices(gpu: str, hosts: int, gpus_per_host: int) -> list[jax.Device]:
    """Return the devices of a cluster; skip the test where the compiler for GPUs is missing."""
    try:
        return aot.devices(hardware.Cluster(hardware.gpu(gpu), hosts, gpus_per_host))
    except NotImplementedError as error:
        pytest.skip(str(error))
