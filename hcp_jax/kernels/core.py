"""Define the attention core's interface and dispatch to its implementations.

    attend(spec, q, k, v, intervals, runs)                    -> Partial(out, lse)
    attend_grads(spec, q, k, v, intervals, runs, dout, lse, delta) -> (dq, dk, dv)

`intervals` gives the global key indices that each query sees, and `runs` gives the global indices
of the keys passed in. The core knows nothing else. `lse` and `delta` in the gradient are *global*:
they cover all keys of the stream on all devices, so a ring just adds up the gradients of its hops.

An implementation is a module with three functions: `forward` and `backward` with these signatures,
and `unsupported(problem)`, which returns why it does not support a call, or None.
"""

import dataclasses
import difflib
import importlib
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array, Float

from hcp_jax.kernels import kept_tiles, tiles, trust
from hcp_jax.kernels.merge import Partial
from hcp_jax.kernels.tiles import Tiles
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

IMPLEMENTATIONS = ("reference", "blockwise", "triton", "mosaic")

# What `implementation=None` tries on GPUs, in this order, and which of them it takes only after a
# check on the GPU at hand (`trust.py`): Mosaic's kernels have not run on many.
_BEST_ON_GPUS = ("mosaic", "triton", "blockwise")
_TO_BE_CHECKED = ("mosaic",)


@dataclasses.dataclass(frozen=True)
class CoreSpec:
    """How the core computes; static, hashable.

    Attributes:
        implementation: one of `IMPLEMENTATIONS`, resolved.
        scale: logits are `scale · q·k`.
        logits_soft_cap: c, to compute logits `c · tanh(logits / c)`; None for no cap.
        device_kind: `jax.Device.device_kind` of the devices to run on; it selects tile sizes.
        interpret: run a Pallas kernel in its interpreter (on CPU devices).
        tiles: tile sizes of the Pallas kernels; from the device kind's table if None. The attention
            op asks `tiles_kept`.
    """

    implementation: str
    scale: float
    logits_soft_cap: float | None = None
    device_kind: str = ""
    interpret: bool = False
    tiles: Tiles | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes, dtype and device of a call; an implementation says whether it supports them."""

    dtype: str
    query_heads: int
    kv_heads: int
    head_size: int
    v_head_size: int
    platform: str
    device_kind: str

    @classmethod
    def from_arrays(cls, q: Any, k: Any, v: Any, platform: str, device_kind: str) -> "Problem":
        """Return the problem of arrays (or shapes) q `BTNH`, k `BSKH` and v `BSKHv`."""
        return cls(
            dtype=str(q.dtype),
            query_heads=q.shape[2],
            kv_heads=k.shape[2],
            head_size=q.shape[3],
            v_head_size=v.shape[3],
            platform=platform,
            device_kind=device_kind,
        )


def attend(
    spec: CoreSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    intervals: Intervals,
    runs: KeyRuns,
) -> Partial:
    """Compute attention of the queries against those of the keys that their intervals contain.

    Args:
        spec: how to compute it.
        q: queries; query head n reads kv head n // (N / K).
        k: keys; slots at or past `runs.offsets[-1]` are padding.
        v: values.
        intervals: global key indices that each query sees.
        runs: global indices of the keys.

    Returns:
        `out` and the natural-log `lse`, both float32 (float64 if q is). A query that sees none of
        these keys has zero `out` and -inf `lse`.
    """
    # The compiled program contains these scope names; `hcp audit` finds attention by them.
    with jax.named_scope("attend"):
        return _module(spec.implementation).forward(spec, q, k, v, intervals, runs)


def attend_grads(
    spec: CoreSpec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    intervals: Intervals,
    runs: KeyRuns,
    dout: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Return the contributions of these queries and keys to dq, dk and dv.

    With p = exp(s - lse) and ds = p · (dout·v - delta), dq = scale · ds k, dk = scale · dsᵀ q and
    dv = pᵀ dout (Dao, FlashAttention-2, 2023); dk and dv are summed over the query heads of each kv
    head.

    Args:
        spec: as in `attend`.
        q: as in `attend`.
        k: as in `attend`.
        v: as in `attend`.
        intervals: as in `attend`.
        runs: as in `attend`.
        dout: cotangent of the final output.
        lse: log-sum-exp over *all* keys of the stream; -inf for a query that sees none.
        delta: Σ_h dout · out over the final output, less the cotangent of lse.

    Returns:
        (dq, dk, dv), float32 (float64 if q is); zeros for empty queries and padding keys.
    """
    grads = _module(spec.implementation).backward
    with jax.named_scope("attend_grads"):
        return grads(spec, q, k, v, intervals, runs, dout, lse, delta)


def resolve(implementation: str | None, problem: Problem) -> str:
    """Return the implementation to run `problem` with: the one named, or the best that supports it.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the named one does not support the call; the message names those
            that do.
    """
    if implementation is None:
        best = _BEST_ON_GPUS if problem.platform in ("gpu", "cuda") else ("blockwise",)
        return next(
            name
            for name in best
            if unsupported(name, problem) is None
            and (name not in _TO_BE_CHECKED or trust.why_not(name, problem.device_kind) is None)
        )
    if implementation not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(implementation, IMPLEMENTATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown implementation {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}"
            f"{hint}"
        )
    reason = unsupported(implementation, problem)
    if reason is not None:
        can = [n for n in IMPLEMENTATIONS if unsupported(n, problem) is None]
        raise NotImplementedError(
            f"implementation={implementation!r} cannot do this call: {reason}. "
            f"These can: {', '.join(can)} (or implementation=None for the best of them)."
        )
    return implementation


def tiles_kept(implementation: str, problem: Problem) -> Tiles | None:
    """Return the tiles that a sweep on this GPU has kept for such calls; None if there are none."""
    sizes = problem.head_size, problem.v_head_size
    return kept_tiles.find(implementation, problem.device_kind, problem.dtype, *sizes)


def unsupported(implementation: str, problem: Problem) -> str | None:
    """Return why an implementation does not support a call, or None."""
    reason: str | None = _module(implementation).unsupported(problem)
    return reason


def describe(platform: str, device_kind: str) -> str:
    """Describe which implementation `None` chooses for a typical call on devices of this kind.

    >>> describe("cpu", "cpu")
    'blockwise'
    """
    typical = Problem("bfloat16", 8, 8, 128, 128, platform, device_kind)
    name = resolve(None, typical)
    if name not in ("triton", "mosaic"):
        return name
    told = (tiles.describe(device_kind), kept_tiles.describe(name, device_kind))
    return f"{name} ({'; '.join(filter(None, told))})"


def _module(implementation: str) -> ModuleType:
    # Imported on first use, so that an unused Pallas backend is not loaded.
    return importlib.import_module(f"hcp_jax.kernels.{implementation}")
