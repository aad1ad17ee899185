"""Generate the table of what is supported, by calling the code that decides it.

    python -m hcp_jax.support docs/comm-types.md

For every strategy, layout, mask and head shape, attention and its gradient are traced on eight
simulated devices, with sinks, a soft cap, v heads of another size and lse as a second output. The
table says "yes" unless the call raises. It lies between two marks on that page; a test generates
it again and compares. tests/attention checks that the numbers are right.
"""

import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.attention.heads import replicate_kv
from hcp_jax.cost.traffic import STRATEGIES
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import make_mesh
from hcp_jax.sequence import mask as masks
from hcp_jax.sequence.dense_mask import from_dense
from hcp_jax.sequence.layout import LAYOUTS
from hcp_jax.sequence.placed_mask import PlacedMask

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"

OUTER, INNER = 2, 4
LENGTH = 100  # needs padding in both layouts, as real streams do
HEADS = {"MHA": [(32, 32)], "GQA": [(32, 8), (32, 2), (12, 4), (6, 2)], "MQA": [(32, 1)]}
MASKS = {
    "causal": masks.causal(),
    "bidirectional": masks.bidirectional(),
    "sliding_window": masks.sliding_window(17),
    "chunked_local": masks.chunked_local(17),
    "prefix_lm": masks.prefix_lm(17),
    "lengths": masks.lengths(83),
    "documents": masks.documents(np.repeat([1, 2, 3], [3, 60, 37])),
    "intervals": masks.intervals(*masks.causal().intervals(LENGTH)),
    "from_dense": from_dense(np.tri(LENGTH, dtype=bool)),
}
MASKS["causal & documents & sliding_window"] = (
    MASKS["causal"] & MASKS["documents"] & MASKS["sliding_window"]
)


class Case(NamedTuple):
    """One combination of strategy, layout, mask and heads."""

    comm_type: str
    layout: str
    mask: str
    query_heads: int
    kv_heads: int


def refusal(case: Case) -> str | None:
    """Return the error that attention or its gradient raises for a case; None if it works."""
    cp = _context(case.comm_type, case.layout)
    mask = _placed_mask(case.layout, case.mask)
    size, heads, kv_heads = cp.padded_length(LENGTH), case.query_heads, case.kv_heads
    shapes = ((1, size, heads, 16), (1, size, kv_heads, 16), (1, size, kv_heads, 24), (heads,))

    def total(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        both: Any = dot_product_attention(
            q,
            k,
            v,
            cp=cp,
            mask=mask,
            sinks=sinks,
            logits_soft_cap=30.0,
            return_residual=True,
        )
        return jnp.sum(both[0]) + jnp.sum(both[1])

    try:
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        jax.eval_shape(jax.grad(total, range(4)), *arrays)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def markdown() -> str:
    """Return the table in Markdown, with the refusals below it; needs eight devices."""
    names = list(itertools.product(LAYOUTS, MASKS))
    reasons: dict[str, int] = {}
    lines = [
        "| heads | layouts and masks | " + " | ".join(f"`{s}`" for s in STRATEGIES) + " |",
        "|---|---|" + "---|" * len(STRATEGIES),
    ]
    for kind, heads in _head_shapes():
        alike: dict[tuple[str | None, ...], list[tuple[str, str]]] = {}
        for layout, mask in names:
            cells = tuple(refusal(Case(s, layout, mask, *heads)) for s in STRATEGIES)
            alike.setdefault(cells, []).append((layout, mask))
        for cells, which in alike.items():
            shown = [
                _yes(strategy, heads[1])
                if reason is None
                else f"no [{reasons.setdefault(reason, len(reasons) + 1)}]"
                for strategy, reason in zip(STRATEGIES, cells, strict=True)
            ]
            where = "all" if len(which) == len(names) else _listed(which)
            row = [f"{kind}, N={heads[0]}, K={heads[1]}", where, *shown]
            lines.append("| " + " | ".join(row) + " |")
    listed = ", ".join(f"`{name}`" for name in MASKS)
    return "\n".join(
        [
            f"On {OUTER * INNER} devices, cp_outer={OUTER} and cp_inner={INNER}; N query heads, K "
            "kv heads; ×r: each kv head is sent r times.",
            "",
            *lines,
            "",
            f"All layouts: {', '.join(LAYOUTS)}. All masks: {listed}.",
            *(f"\n[{number}] {reason}" for reason, number in reasons.items()),
        ]
    )


def insert_table(text: str, table: str) -> str:
    """Return `text` with `table` between its marks.

    Raises:
        ValueError: if the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no place for the table: it goes between {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


@functools.cache
def _context(comm_type: str, layout: str) -> ContextParallel:
    devices = jax.devices()[: OUTER * INNER]
    return ContextParallel(
        make_mesh(cp_outer=OUTER, cp_inner=INNER, devices=devices), comm_type, layout
    )


@functools.cache
def _placed_mask(layout: str, mask: str) -> PlacedMask:
    # Placed as by shard_batch, a mask is data, so one trace serves all masks.
    return _context("p2p", layout).place(MASKS[mask], LENGTH)


def _head_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    for kind, shapes in HEADS.items():
        for shape in shapes:
            yield kind, shape


def _yes(comm_type: str, kv_heads: int) -> str:
    cp = _context(comm_type, LAYOUTS[0])
    size = cp.axis_size(cp.strategy.exchange)
    kv = jax.ShapeDtypeStruct((1, 1, kv_heads, 1), jnp.float32)
    times = jax.eval_shape(functools.partial(replicate_kv, size=size), kv).shape[2] // kv_heads
    return "yes" if times == 1 else f"yes, ×{times}"


def _listed(which: list[tuple[str, str]]) -> str:
    return "; ".join(
        f"{layout}: {', '.join(mask for _, mask in group)}"
        for layout, group in itertools.groupby(which, lambda pair: pair[0])
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", OUTER * INNER)
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hcp_jax.support docs/comm-types.md")
    path = pathlib.Path(sys.argv[1])
    path.write_text(insert_table(path.read_text(), markdown()))
