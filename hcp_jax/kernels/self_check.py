"""Check kernels on this machine's first device: of attention, or of the products of experts.

`python -m hcp_jax.kernels.self_check mosaic` compares output, lse and gradients with the reference
for each head size, on masks and key runs that are data of one program; repeats each call for equal
bits; and times forward and backward beside Triton's. With `expert_product` it does the same for
output, dx and dw of the products, in float64, on loads that are data, and beside `ragged_dot`. It
prints its findings, and the verdict as a line of JSON (`trust.py` reads it).
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hcp_jax.base import terminal
from hcp_jax.kernels import core, expert_product, trust
from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.expert_product import How
from hcp_jax.kernels.tiles import Tiles
from hcp_jax.kernels.trust import Verdict
from hcp_jax.sequence.layout import PADDING, KeyRuns
from hcp_jax.sequence.mask import Intervals

TOLERANCES = {"bfloat16": 0.01, "float16": 0.01, "float32": 1e-4}
"""Largest difference from the reference, as a share of its largest value, by dtype."""

LSE_TOLERANCE = 1e-4
"""Largest difference of lse, absolute: logits and sums are float32 in every implementation."""

PRODUCT_TOLERANCES = {"bfloat16": 0.01, "float16": 0.002, "float32": 1e-5}
"""Largest difference of products of experts, as a share of the largest value, by dtype."""

_NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Finding:
    """How one result compares with the reference.

    Attributes:
        case: the case, such as "head size 128, window".
        result: "out", "lse", "dq", "dk" or "dv"; of products of experts "out", "dx" or "dw".
        error: largest difference; for all but lse, as a share of the reference's largest value.
        tolerance: largest allowed.
        same_bits: whether a second call gave the same bits.
    """

    case: str
    result: str
    error: float
    tolerance: float
    same_bits: bool

    @property
    def passed(self) -> bool:
        """Whether the result is exact and repeats; False if the error is not a number."""
        return self.same_bits and self.error <= self.tolerance


def findings(
    implementation: str,
    *,
    length: int = 704,
    head_sizes: tuple[int, ...] = (64, 128, 256),
    dtype: str = "bfloat16",
    tiles: Tiles | None = None,
) -> Iterator[Finding]:
    """Compare an implementation with the reference on the first device.

    Args:
        implementation: one of `core.IMPLEMENTATIONS`; interpreted on a CPU.
        length: number of queries and of key slots.
        head_sizes: head sizes; the second one (or the only one) also with a soft cap.
        dtype: dtype of q, k and v.
        tiles: tile sizes of the Pallas kernels; from the device kind's table if None.
    """
    device = jax.devices()[0]
    for head_size in head_sizes:
        caps = (None, 5.0) if head_size == head_sizes[min(1, len(head_sizes) - 1)] else (None,)
        problem = _problem(device, head_size, dtype)
        if (why := core.unsupported(implementation, problem)) is not None:
            raise NotImplementedError(f"{implementation} cannot be checked: {why}")
        arrays = _arrays(length, head_size, 4, 2, dtype)
        for cap in caps:
            spec = CoreSpec(
                implementation,
                scale=head_size**-0.5,
                logits_soft_cap=cap,
                device_kind=device.device_kind,
                interpret=device.platform == "cpu",
                tiles=tiles,
            )
            run = jax.jit(functools.partial(_values_and_gradients, spec))
            exact = jax.jit(
                functools.partial(
                    _values_and_gradients, dataclasses.replace(spec, implementation="reference")
                )
            )
            for name, intervals, runs in _cases(length):
                case = f"head size {head_size}{', soft cap' if cap else ''}, {name}"
                got, again = (jax.device_get(run(*arrays, intervals, runs)) for _ in range(2))
                wide = [x.astype(jnp.float32) for x in arrays]
                expected = jax.device_get(exact(*wide, intervals, runs))
                for result, a, b, c in zip(_NAMES, got, expected, again, strict=True):
                    yield _compare(case, result, a, b, c, TOLERANCES[dtype])


def seconds(implementation: str, *, length: int = 4096, repeats: int = 20) -> float:
    """Return the median seconds of forward and backward, causal, head size 128."""
    device = jax.devices()[0]
    spec = CoreSpec(implementation, 128**-0.5, None, device.device_kind, device.platform == "cpu")
    arrays = _arrays(length, 128, 16, 4, "bfloat16")
    index = np.arange(length, dtype=np.int32)[None]
    intervals = Intervals(np.zeros_like(index), index + 1)
    runs = _runs([0], [length])
    run = jax.jit(functools.partial(_values_and_gradients, spec))
    return _median_seconds(functools.partial(run, *arrays, intervals, runs), repeats)


def product_findings(
    how: How,
    *,
    shapes: tuple[tuple[int, int, int, int], ...] = ((1000, 6, 320, 1100), (1000, 6, 256, 384)),
    dtypes: tuple[str, ...] = tuple(PRODUCT_TOLERANCES),
) -> Iterator[Finding]:
    """Compare products of experts with each row's own product in float64.

    Args:
        how: what multiplies.
        shapes: rows, experts (at least 4), K and N of the cases.
        dtypes: dtypes of the first shape; the others are compared in the first dtype alone.
    """
    for number, (rows, experts, k, n) in enumerate(shapes):
        for dtype in dtypes if number == 0 else dtypes[:1]:
            arrays = _product_arrays(rows, experts, k, n, dtype)
            run = jax.jit(functools.partial(_product_and_gradients, how))
            for name, sizes in _loads(rows, experts):
                case = f"{rows} rows, {experts} experts {k} x {n}, {dtype}, {name}"
                got, again = (jax.device_get(run(*arrays, jnp.asarray(sizes))) for _ in range(2))
                expected = _exact_products(*arrays, sizes)
                tolerance = PRODUCT_TOLERANCES[dtype]
                for result, a, b, c in zip(("out", "dx", "dw"), got, expected, again, strict=True):
                    yield _compare(case, result, a, b, c, tolerance)


def product_seconds(how: How, *, rows: int = 8192, experts: int = 16, repeats: int = 20) -> float:
    """Return the median seconds of products with 2048 x 768 weights, forward and backward."""
    arrays = _product_arrays(rows, experts, 2048, 768, "bfloat16")
    sizes = jnp.full(experts, rows // experts, jnp.int32)
    run = jax.jit(functools.partial(_product_and_gradients, how))
    return _median_seconds(functools.partial(run, *arrays, sizes), repeats)


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    timings = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        jax.block_until_ready(call())
        timings.append(time.perf_counter() - start)
    return statistics.median(timings[3:])


def judge(
    found: list[Finding], own_seconds: float, other_seconds: float, other: str = "triton"
) -> Verdict:
    """Return the verdict over findings, and timings beside those of the `other` kernels."""
    bad = [x for x in found if not x.passed]
    if bad:
        first = bad[0]
        how = f"differs by {first.error:.2g}" if first.same_bits else "changes from call to call"
        return Verdict(
            False,
            f"{len(bad)} of {len(found)} results are wrong, such as {first.result} of "
            f"{first.case}, which {how}",
        )
    ratio = other_seconds / own_seconds
    right = f"all {len(found)} results are right"
    if ratio < 1:
        return Verdict(False, f"{right}, but {other} takes {ratio:.2f} of their time")
    return Verdict(True, f"{right}, at {ratio:.2f} times the speed of {other}")


def main() -> None:
    """Check the kernels that the command line names; print findings and verdict."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kernels", choices=(*core.IMPLEMENTATIONS, trust.EXPERT_PRODUCT))
    kernels = parser.parse_args().kernels
    device = jax.devices()[0]
    if device.platform != "gpu":
        verdict = Verdict(False, "there is no GPU here")
    elif kernels == trust.EXPERT_PRODUCT:
        how = How("triton", device.device_kind)
        found = _told(product_findings(how))
        dense = product_seconds(How("ragged_dot", device.device_kind))
        verdict = judge(found, product_seconds(how), dense, "ragged_dot")
    else:
        found = _told(findings(kernels))
        own = seconds(kernels)
        verdict = judge(found, own, own if kernels == "triton" else seconds("triton"))
    terminal.say(json.dumps(verdict._asdict()))


def _told(found: Iterator[Finding]) -> list[Finding]:
    """Return the findings, and print each as it comes."""
    results = []
    for x in found:
        state = "ok" if x.passed else "WRONG"
        terminal.say(f"{x.case}: {x.result} {x.error:.2e} of {x.tolerance:.0e} {state}")
        results.append(x)
    return results


def _values_and_gradients(
    spec: CoreSpec, q: Any, k: Any, v: Any, dout: Any, intervals: Intervals, runs: KeyRuns
) -> tuple[Any, ...]:
    out, lse = core.attend(spec, q, k, v, intervals, runs)
    delta = jnp.sum(dout.astype(out.dtype) * out, axis=-1)
    delta = jnp.where(lse == -jnp.inf, 0, delta)
    return out, lse, *core.attend_grads(spec, q, k, v, intervals, runs, dout, lse, delta)


def _arrays(length: int, head_size: int, heads: int, kv_heads: int, dtype: str) -> list[Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    numbers = (heads, kv_heads, kv_heads, heads)
    return [
        jax.random.normal(key, (1, length, n, head_size), dtype)
        for key, n in zip(keys, numbers, strict=True)
    ]


def _cases(length: int) -> Iterator[tuple[str, Intervals, KeyRuns]]:
    """Yield masks and key runs of one shape: one compiled program serves all of them."""
    index = np.arange(length, dtype=np.int32)[None]
    half, window = length // 2, length // 3
    rng = np.random.default_rng(0)
    borders = np.unique(np.concatenate([[0], rng.integers(1, length, 6)]))
    begins = borders[np.searchsorted(borders, index, side="right") - 1].astype(np.int32)
    own = _runs([0, half], [half, length - half])
    yield "causal", Intervals(np.zeros_like(index), index + 1), own
    yield "documents", Intervals(begins, index + 1), own
    yield "window", Intervals(np.maximum(index + 1 - window, 0), index + 1), own
    # A hop of a ring: the keys are others', in another order, and the last slots are padding.
    far = _runs([3 * half, PADDING], [half, length - half])
    yield "another device's keys", Intervals(np.zeros_like(index), 4 * index), far
    any_start, any_end = rng.integers(0, 2 * length, (2, 1, length)).astype(np.int32)
    yield "any intervals", Intervals(any_start, any_end), _runs([length, 7], [half, length - half])
    yield "nothing to see", Intervals(index, index), own


def _runs(starts: list[int], sizes: list[int]) -> KeyRuns:
    return KeyRuns(
        np.asarray(starts, np.int32), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    )


def _product_and_gradients(how: How, x: Any, weights: Any, dout: Any, sizes: Any) -> Any:
    out, back = jax.vjp(lambda x, w: expert_product.product(how, x, w, sizes), x, weights)
    return out, *back(dout)


def _product_arrays(
    rows: int, experts: int, k: int, n: int, dtype: str
) -> tuple[Array, Array, Array]:
    """Return x, weights and the cotangent of the products."""
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (rows, k), dtype),
        jax.random.normal(keys[1], (experts, k, n), dtype),
        jax.random.normal(keys[2], (rows, n), dtype),
    )


def _loads(rows: int, experts: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield loads of the experts; they are data of one program."""
    shares = np.random.default_rng(0).dirichlet(np.full(experts - 2, 0.7))
    some = np.floor(shares * rows).astype(np.int32)
    uneven = np.insert(some, [0, 1], 0)  # the first expert, and one between others, has no rows
    uneven[-1] += rows - uneven.sum()
    yield "uneven, experts without rows", uneven
    yield "rows behind the experts", (uneven * 3 // 4).astype(np.int32)
    yield "all rows to one expert", rows * np.eye(experts, dtype=np.int32)[1]
    yield "no rows", np.zeros(experts, np.int32)


def _exact_products(x: Any, weights: Any, dout: Any, sizes: np.ndarray) -> tuple[Any, ...]:
    """Return out, dx and dw in float64, expert by expert; zeros behind the experts."""
    x, weights, dout = (np.asarray(a, np.float64) for a in (x, weights, dout))
    out, dx, dw = np.zeros(dout.shape), np.zeros(x.shape), np.zeros(weights.shape)
    ends = np.cumsum(sizes)
    for expert, (first, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        own = slice(first, end)
        out[own], dx[own] = x[own] @ weights[expert], dout[own] @ weights[expert].T
        dw[expert] = x[own].T @ dout[own]
    return out, dx, dw


def _compare(
    case: str, result: str, got: Any, expected: Any, again: Any, tolerance: float
) -> Finding:
    same = np.array_equal(got, again, equal_nan=True)
    got = np.asarray(got, np.float64)
    seen = np.isfinite(expected)
    if not np.array_equal(seen, np.isfinite(got)):
        return Finding(case, result, float("inf"), 0.0, same)
    error = float(np.max(np.abs(got[seen] - expected[seen]), initial=0.0))
    if result == "lse":
        return Finding(case, result, error, LSE_TOLERANCE, same)
    largest = float(np.max(np.abs(expected), initial=0.0))
    return Finding(case, result, error / max(largest, 1e-3), tolerance, same)


def _problem(device: jax.Device, head_size: int, dtype: str) -> Problem:
    return Problem(dtype, 4, 2, head_size, head_size, device.platform, device.device_kind)


if __name__ == "__main__":
    main()
