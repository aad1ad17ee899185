"""Describe a `ContextParallel` in words, for the start of a run's log.

It is separate from `roles.py` because it only reports and decides nothing.
"""

import math

from jax.sharding import Mesh

from hcp_jax.kernels import core
from hcp_jax.parallel.mesh import as_tuple, axis_groups, axis_link
from hcp_jax.parallel.roles import MeshRoles


def describe(cp: MeshRoles) -> str:
    """Describe the mesh, the groups and the link of each axis, the comm types and the core."""
    lines = [
        f"{cp.mesh.devices.size} devices ({cp.device_kind}), context parallel size "
        f"{cp.size}, {cp.layout} layout"
    ]
    for field in ("dp", "tp", "cp_outer", "cp_inner"):
        for axis in as_tuple(getattr(cp, field)):
            lines.append(f"  {axis:<9} {_describe_axis(cp.mesh, axis)}")
    if cp.widest_group is not None:
        lines.append(f"  groups    of up to {cp.widest_group} devices, in the order of the mesh")
    if isinstance(cp.comm_type, str):
        lines.append(f"  attention {describe_strategy(cp)}")
    else:
        for layer in range(len(cp.comm_type)):
            lines.append(f"  layer {layer:<3} {describe_strategy(cp.for_layer(layer))}")
    lines.append(f"  core      {core.describe(cp.platform, cp.device_kind)}")
    return "\n".join(lines)


def describe_strategy(cp: MeshRoles) -> str:
    """Return one line on how attention with `cp`'s comm type communicates on `cp`'s mesh.

    >>> import hcp_jax as hcp
    >>> describe_strategy(hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2)))
    'a2a+p2p: heads exchanged over cp_inner (2), K/V ring over cp_outer (4)'
    """
    exchange, move, by = cp.strategy
    if cp.widest_group is not None:
        size = math.gcd(cp.widest_group, cp.axis_size(exchange))
        does = [f"heads exchanged by up to {size} devices"] if size > 1 else []
        moves = {"ring": "walk", "gather": "gather"}[by]
        does += [f"K/V {moves} inside each group"] if move and cp.widest_group > size else []
        return f"{cp.comm_type}: " + (", ".join(does) or "one device per group, nothing moves")
    does = []
    for axes, what in ((exchange, "heads exchanged"), (move, f"K/V {by}")):
        live = [axis for axis in axes if cp.mesh.shape[axis] > 1]
        if live:
            over = " x ".join(f"{axis} ({cp.mesh.shape[axis]})" for axis in live)
            does.append(f"{what} over {over}")
    return f"{cp.comm_type}: " + (", ".join(does) or "one device per sequence, nothing moves")


def _describe_axis(mesh: Mesh, axis: str) -> str:
    groups = [[d.id for d in group] for group in axis_groups(mesh, axis)]
    size = len(groups[0])
    if size == 1:
        return "size 1"
    shown = " ".join("[" + " ".join(map(str, group)) + "]" for group in groups[:8])
    more = f" ... {len(groups)} groups" if len(groups) > 8 else ""
    return f"size {size}, {axis_link(mesh, axis)}: {shown}{more}"
