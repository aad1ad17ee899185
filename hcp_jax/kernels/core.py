"""The core's contract, and the dispatch to its implementations.

    attend(spec, q, k, v, intervals, runs)                    -> Partial(out, lse)
    attend_grads(spec, q, k, v, intervals, runs, dout, lse, delta) -> (dq, dk, dv)

`intervals` says which global key indices each query sees; `runs` says which global indices the
keys at hand have. That is all a core knows. `lse` and `delta` in the gradient are *global*, over
all the keys of the stream wherever they are, so that a ring adds up the gradients of its hops.

An implementation is a module with three functions: `forward` and `backward` with these signatures,
and `unsupported(problem)`, which gives the reason why it cannot do a call, or None.
"""

import dataclasses
import difflib
import importlib
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array, Float

from hcp_jax.kernels import tiles
from hcp_jax.kernels.merge import Partial
from hcp_jax.kernels.tiles import Tiles
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

IMPLEMENTATIONS = ("reference", "blockwise", "triton", "mosaic")

# What `implementation=None` tries on GPUs, in turn. "mosaic" has never run on one: it is to come
# first on Hopper as soon as `pytest -m gpu` has passed there.
_BEST_ON_GPUS = ("triton", "blockwise")


@dataclasses.dataclass(frozen=True)
class CoreSpec:
    """How the core computes; static, hashable.

    Attributes:
        implementation: one of `IMPLEMENTATIONS`, resolved.
        scale: logits are `scale · q·k`.
        logits_soft_cap: c, if logits are to be `c · tanh(logits / c)`.
        device_kind: `jax.Device.device_kind` of the devices it will run on: tile sizes.
        interpret: run a Pallas kernel in its interpreter (CPU devices).
        tiles: tile sizes of the Pallas kernels; those of the device kind's table if None.
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
    """Attention of all queries against the keys at hand that their intervals show them.

    Args:
        spec: what to compute, and with what.
        q: queries; query head n reads kv head n // (N / K).
        k: keys; places at or past `runs.offsets[-1]` are padding.
        v: values.
        intervals: global key indices that each query sees.
        runs: global indices of the keys.

    Returns:
        `out` and the natural-log `lse`, both float32 (float64 if q is); zeros and -inf for a query
        that sees none of these keys.
    """
    # The scopes' names stand in the compiled program: `hcp audit` knows attention by them.
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
    """What these queries and these keys add to dq, dk and dv.

    With p = exp(s - lse) and ds = p · (dout·v - delta), dq = scale · ds k, dk = scale · dsᵀ q and
    dv = pᵀ dout (Dao, FlashAttention-2, 2023), dk and dv summed over the query heads of a group.

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
    """The implementation that will run `problem`: the one named, or the best that can.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one named cannot do this call; says what can.
    """
    if implementation is None:
        best = _BEST_ON_GPUS if problem.platform in ("gpu", "cuda") else ("blockwise",)
        return next(name for name in best if _module(name).unsupported(problem) is None)
    if implementation not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(implementation, IMPLEMENTATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown implementation {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}"
            f"{hint}"
        )
    reason = _module(implementation).unsupported(problem)
    if reason is not None:
        can = [n for n in IMPLEMENTATIONS if _module(n).unsupported(problem) is None]
        raise NotImplementedError(
            f"implementation={implementation!r} cannot do this call: {reason}. "
            f"These can: {', '.join(can)} (or implementation=None for the best of them)."
        )
    return implementation


def describe(platform: str, device_kind: str) -> str:
    """What `implementation=None` is on devices of this kind, for the usual call, in words.

    >>> describe("cpu", "cpu")
    'blockwise'
    """
    usual = Problem("bfloat16", 8, 8, 128, 128, platform, device_kind)
    name = resolve(None, usual)
    own_tiles = name in ("triton", "mosaic")
    return f"{name} ({tiles.describe(device_kind)})" if own_tiles else name


def _module(implementation: str) -> ModuleType:
    # Imported on first use: a Pallas backend that is never used need not load.
    return importlib.import_module(f"hcp_jax.kernels.{implementation}")
