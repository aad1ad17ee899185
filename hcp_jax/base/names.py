"""Check names that a user gives; an unknown name raises an error that suggests the nearest one."""

import difflib
from collections.abc import Iterable

LAYOUTS = ("contiguous", "zigzag")

_OTHER_WORDS = {
    "ring": "p2p",
    "ring_attention": "p2p",
    "ulysses": "a2a",
    "all_to_all": "a2a",
    "alltoall": "a2a",
    "allgather": "all_gather",
    "ag": "all_gather",
    "ulysses+ring": "a2a+p2p",
    "ring+ulysses": "a2a+p2p",
    "usp": "a2a+p2p",
    "hierarchical": "a2a+p2p",
    "p2p+a2a": "a2a+p2p",
}
"""Comm types under the names of other libraries; used for hints in errors."""


def require_known(what: str, name: object, known: Iterable[str]) -> None:
    """Raise a ValueError that lists the known names and the nearest one, if `name` is unknown.

    >>> require_known("comm_type", "ring", ("p2p", "all_gather", "a2a"))
    Traceback (most recent call last):
    ...
    ValueError: unknown comm_type 'ring': there are p2p, all_gather, a2a; did you mean 'p2p'?
    """
    known = tuple(known)
    if name in known:
        return
    same = _OTHER_WORDS.get(str(name).lower().replace("-", "_"))
    near = [same] if same in known else difflib.get_close_matches(str(name)[:100], known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown {what} {str(name)[:100]!r}: there are {', '.join(known)}{hint}")
