"""Say where a parameter lies in a stored tensor that it shares with others.

Some families store several parameters as one tensor, such as q, k and v one after the other, or the
gate and up weights of all experts with their columns in turns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Part of a stored tensor that is a parameter of one layer, or of one of its experts.

    Rows of the tensor are taken, split into more dims and indexed, and the dims that are left are
    put in the order of the parameter.

    Attributes:
        name: name of the tensor inside its layer.
        shape: shape of the tensor.
        rows: part of its first dim.
        split: shape that these rows get.
        inside: part of them, by dim.
        axes: order of the dims that are left; the result has the parameter's entries in order.

    >>> gate = Part("gate_up_proj", (4, 3), slice(0, 2), (2, 3), (), (1, 0))
    >>> gate.take(np.arange(6).reshape(2, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """

    name: str
    shape: tuple[int, ...]
    rows: slice
    split: tuple[int, ...]
    inside: tuple[slice | int, ...]
    axes: tuple[int, ...]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the parameter's entries from the rows of the tensor."""
        return rows.reshape(self.split)[self.inside].transpose(self.axes)

    def put(self, tensor: np.ndarray, values: np.ndarray) -> None:
        """Write the parameter's entries into the tensor, which is contiguous."""
        here = tensor[self.rows].reshape(self.split)[self.inside]
        ordered = values.reshape([here.shape[axis] for axis in self.axes])
        here[...] = ordered.transpose(np.argsort(self.axes))


def rows(name: str, sizes: Sequence[int], which: int, others: Sequence[int] = ()) -> Part:
    """Return the part of a matrix or vector whose rows belong to several parameters in turn.

    The rows are the outputs, the parameter's last entries; `others` are the sizes of the other
    dims.

    Args:
        name: name of the tensor.
        sizes: number of rows of each parameter.
        which: index of the parameter.
        others: sizes of the other dims of the tensor.
    """
    first = sum(sizes[:which])
    split = (sizes[which], *others)
    axes = (*range(1, len(split)), 0)
    return Part(name, (sum(sizes), *others), slice(first, first + sizes[which]), split, (), axes)
