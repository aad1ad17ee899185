"""Key runs that several tests of the kernels use."""

import numpy as np

from hcp_jax.sequence.layout import KeyRuns


def single_run(length: int, start: int = 0) -> KeyRuns:
    """Return one run of `length` keys whose first key has global index `start`."""
    return KeyRuns(np.asarray([start], np.int32), np.asarray([0, length], np.int32))
