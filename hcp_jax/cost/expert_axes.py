"""Choose the mesh axes that experts are cut over; separate from the mesh, without jax."""

from collections.abc import Mapping

from hcp_jax.base import checks


def innermost_axes(sizes: Mapping[str, int], ep: int) -> tuple[str, ...]:
    """Return the innermost axes that have `ep` devices together, the slowest first.

    Args:
        sizes: devices along the axes that tokens are cut over, the slowest first.
        ep: number of devices that experts are cut over.

    Raises:
        ValueError: if no axes have as many devices.

    >>> innermost_axes({"dp": 2, "cp_outer": 4, "cp_inner": 2}, 8)
    ('cp_outer', 'cp_inner')
    """
    ep = checks.integer("ep", ep, least=1)
    axes: tuple[str, ...] = ()
    total, possible = 1, [1]
    for axis, size in reversed(list(sizes.items())):
        if total == ep:
            break
        if size > 1:
            axes, total = (axis, *axes), total * size
            possible.append(total)
    if total != ep:
        text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"ep={ep} cannot cut experts over {text}: experts are cut over whole axes, the last "
            f"ones first; use one of {', '.join(map(str, possible))}."
        )
    return axes
