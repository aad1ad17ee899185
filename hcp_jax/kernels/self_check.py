"""Check an implementation of the attention core on this machine's first device.

`python -m hcp_jax.kernels.self_check mosaic` compares output, lse and gradients with the reference
for each head size, on masks and key runs that are data of one program; repeats each call for equal
bits; and times forward and backward beside Triton's. It prints its findings, and the verdict as a
line of JSON (`trust.py` reads it).
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hcp_jax.base import terminal
from hcp_jax.kernels import core
from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.trust import Verdict
from hcp_jax.sequence.layout import PADDING, KeyRuns
from hcp_jax.sequence.mask import Intervals

TOLERANCE = 0.01
"""Largest difference from the reference, as a share of the reference's largest value (bfloat16)."""

LSE_TOLERANCE = 1e-4
"""Largest difference of lse, absolute: logits and sums are float32 in every implementation."""

_NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Finding:
    """How one result compares with the reference.

    Attributes:
        case: the case, such as "head size 128, window".
        result: "out", "lse", "dq", "dk" or "dv".
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
    implementation: str, *, length: int = 704, head_sizes: tuple[int, ...] = (64, 128, 256)
) -> Iterator[Finding]:
    """Compare an implementation with the reference on the first device.

    Args:
        implementation: one of `core.IMPLEMENTATIONS`; interpreted on a CPU.
        length: number of queries and of key slots.
        head_sizes: head sizes; the second one (or the only one) also with a soft cap.
    """
    device = jax.devices()[0]
    for head_size in head_sizes:
        caps = (None, 5.0) if head_size == head_sizes[min(1, len(head_sizes) - 1)] else (None,)
        problem = _problem(device, head_size)
        if (why := core.unsupported(implementation, problem)) is not None:
            raise NotImplementedError(f"{implementation} cannot be checked: {why}")
        arrays = _arrays(length, head_size, heads=4, kv_heads=2)
        for cap in caps:
            spec = CoreSpec(
                implementation,
                scale=head_size**-0.5,
                logits_soft_cap=cap,
                device_kind=device.device_kind,
                interpret=device.platform == "cpu",
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
                    yield _compare(case, result, a, b, c)


def seconds(implementation: str, *, length: int = 4096, repeats: int = 20) -> float:
    """Return the median seconds of forward and backward, causal, head size 128."""
    device = jax.devices()[0]
    spec = CoreSpec(implementation, 128**-0.5, None, device.device_kind, device.platform == "cpu")
    arrays = _arrays(length, 128, heads=16, kv_heads=4)
    index = np.arange(length, dtype=np.int32)[None]
    intervals = Intervals(np.zeros_like(index), index + 1)
    runs = _runs([0], [length])
    run = jax.jit(functools.partial(_values_and_gradients, spec))
    timings = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays, intervals, runs))
        timings.append(time.perf_counter() - start)
    return statistics.median(timings[3:])


def judge(found: list[Finding], own_seconds: float, triton_seconds: float) -> Verdict:
    """Return the verdict over findings and timings."""
    bad = [x for x in found if not x.passed]
    if bad:
        first = bad[0]
        how = f"differs by {first.error:.2g}" if first.same_bits else "changes from call to call"
        return Verdict(
            False,
            f"{len(bad)} of {len(found)} results are wrong, such as {first.result} of "
            f"{first.case}, which {how}",
        )
    ratio = triton_seconds / own_seconds
    if ratio < 1:
        return Verdict(
            False, f"all {len(found)} results are right, but Triton's take {ratio:.2f} of its time"
        )
    return Verdict(True, f"all {len(found)} results are right, at {ratio:.2f} times Triton's speed")


def main() -> None:
    """Check the implementation that the command line names; print findings and verdict."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("implementation", choices=core.IMPLEMENTATIONS)
    implementation = parser.parse_args().implementation
    if jax.devices()[0].platform != "gpu":
        verdict = Verdict(False, "there is no GPU here")
    else:
        found = list(findings(implementation))
        for x in found:
            state = "ok" if x.passed else "WRONG"
            terminal.say(f"{x.case}: {x.result} {x.error:.2e} of {x.tolerance:.0e} {state}")
        own = seconds(implementation)
        verdict = judge(found, own, own if implementation == "triton" else seconds("triton"))
    terminal.say(json.dumps(verdict._asdict()))


def _values_and_gradients(
    spec: CoreSpec, q: Any, k: Any, v: Any, dout: Any, intervals: Intervals, runs: KeyRuns
) -> tuple[Any, ...]:
    out, lse = core.attend(spec, q, k, v, intervals, runs)
    delta = jnp.sum(dout.astype(out.dtype) * out, axis=-1)
    delta = jnp.where(lse == -jnp.inf, 0, delta)
    return out, lse, *core.attend_grads(spec, q, k, v, intervals, runs, dout, lse, delta)


def _arrays(length: int, head_size: int, *, heads: int, kv_heads: int) -> list[Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    numbers = (heads, kv_heads, kv_heads, heads)
    return [
        jax.random.normal(key, (1, length, n, head_size), jnp.bfloat16)
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


def _compare(case: str, result: str, got: Any, expected: Any, again: Any) -> Finding:
    same = np.array_equal(got, again, equal_nan=True)
    seen = np.isfinite(expected)
    if not np.array_equal(seen, np.isfinite(got)):
        return Finding(case, result, float("inf"), 0.0, same)
    error = float(np.max(np.abs(got[seen] - expected[seen]), initial=0.0))
    if result == "lse":
        return Finding(case, result, error, LSE_TOLERANCE, same)
    largest = float(np.max(np.abs(expected), initial=0.0))
    return Finding(case, result, error / max(largest, 1e-3), TOLERANCE, same)


def _problem(device: jax.Device, head_size: int) -> Problem:
    return Problem("bfloat16", 4, 2, head_size, head_size, device.platform, device.device_kind)


if __name__ == "__main__":
    main()
