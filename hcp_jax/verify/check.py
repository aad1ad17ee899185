"""Check that a user's program computes on a mesh what it computes on one device (`hcp.check`).

The program runs twice, on `cp`'s mesh and on one device, and outputs and gradients are compared. If
they differ, the checker repairs in turn each mistake that is known to give wrong numbers silently.
It reports the mistake whose repair removes the difference.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from hcp_jax.attention.refusals import CutSequenceError
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.placing import MaskLengthError
from hcp_jax.sequence.mask import Mask
from hcp_jax.verify.programs import (
    Ran,
    Subject,
    compare,
    is_float,
    make_subject,
    on_host,
    one_device,
    ran,
)
from hcp_jax.verify.repairs import ALONE, POSITIONS, SHIFTS, Order, Trial

INPUTS, MASK_LENGTH, PADDING = "inputs never put in the layout", "mask length", "padding"

ADVICE = {
    INPUTS: "give the model cp.shard_batch(batch), or cp.shard(x, dim=1) for each array",
    POSITIONS: "positions, or a table by position, are in natural order, as np.arange(T) is; use "
    "cp.positions(T), and index tables with it",
    SHIFTS: "jnp.roll, x[:, 1:] or the like takes the next slot in the layout for the next token; "
    "use cp.roll(x, shift)",
    ALONE: "attention ran without cp on tokens that are in the layout; pass cp=cp, or "
    "hcp.attention_fn(cp)",
    MASK_LENGTH: "the mask is for another number of tokens than the queries have; make it from ids "
    "of all tokens",
    PADDING: "the tokens that cp.shard added take part: join masks that look ahead with "
    "hcp.lengths(T), and leave padding out of means and losses",
}
"""Advice for each mistake."""

_TOLERANCE = {2: 3e-2, 4: 1e-4, 8: 1e-9}  # by bytes of the dtype


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `hcp.check`; print it.

    Attributes:
        differences: largest error over largest value for every output and, if the outputs agree,
            for every gradient; inf where shapes or NaNs differ.
        tolerance: largest allowed difference.
        mistakes: mistakes in the program, keys of `ADVICE`; empty if it is right, or if no known
            mistake explains the difference.
        notes: what was not compared, and what is right only by luck.
        error: error that the program raised on the mesh; "" if none.
    """

    differences: dict[str, float]
    tolerance: float
    mistakes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""

    @property
    def ok(self) -> bool:
        """True if the mesh computes what one device computes."""
        good = all(x <= self.tolerance for x in self.differences.values())
        return good and not self.error and not self.mistakes

    def __str__(self) -> str:
        verdict = "what one device computes" if self.ok else "NOT what one device computes"
        lines = [f"hcp.check: the mesh computes {verdict}"]
        width = max((len(name) for name in self.differences), default=0)
        for name, x in self.differences.items():
            lines.append(f"  {name:<{width}}  {x:.1e}{'' if x <= self.tolerance else '  WRONG'}")
        lines += [f"  it raised {self.error}"] if self.error else []
        lines += [f"  looks like: {name}. {ADVICE[name]}." for name in self.mistakes]
        if not self.ok and not self.mistakes:
            lines.append(
                "  no known mistake explains it (sequence dims are recognised by their size: give "
                "the batch a length that no other dim has)"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def check(
    program: Callable[..., Any],
    example_batch: Any,
    cp: ContextParallel,
    *,
    params: Any = None,
    tolerance: float | None = None,
    raise_if_wrong: bool = False,
) -> Report:
    """Run a program or a model under `cp` and on one device, and compare outputs and gradients.

    On one device the program runs with a `cp` of the same axes, each of size 1, so it needs no
    special case. Use a small model in float32 and a short batch: the program is compiled a few
    times. With a batch whose length needs padding, the check also finds errors caused by padding.

    Args:
        program: one of

            * a function `f(batch, cp)`, or `f(params, batch, cp)` with `params`: the user's whole
              step. It gets the batch in natural order and puts it in the layout itself. Call linen
              models inside such a function. It returns arrays: a loss, or outputs in the layout or
              in natural order.
            * an `nnx.Module` that is called as `model(batch, cp)`: only the model, so `check` puts
              the batch in the layout first.
            * a class or function `build(cp)` that returns a model called as `model(batch)`, from a
              fixed seed; for models that take cp when they are built.
        example_batch: input of the program: an array `[B, T, ...]`, or a dict of such arrays, of
            arrays `[B]`, scalars and `Mask`s; in natural order, on the host.
        cp: mesh and strategy to check.
        params: parameters, for a function that takes them first; any pytree.
        tolerance: largest allowed error over largest value; if None, by dtype (1e-4 for float32).
        raise_if_wrong: raise an error instead of returning a report that is not ok.

    Returns:
        The report: `report.ok`, `report.mistakes`, and a text to print.

    Raises:
        NotImplementedError: if `cp` has groups.
        ValueError: if the program has another signature; with `raise_if_wrong`, if the report is
            not ok. Errors that the program raises on one device are passed on.

    >>> import jax, jax.numpy as jnp, numpy as np, hcp_jax as hcp
    >>> def step(batch, cp):
    ...     x = cp.shard(batch["x"], dim=1)
    ...     angle = cp.positions(16)[..., None, None] * 0.1
    ...     q = x * jnp.cos(angle)
    ...     return hcp.dot_product_attention(q, q, x, cp=cp, is_causal=True)
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), comm_type="p2p")
    >>> batch = {"x": np.random.default_rng(0).normal(size=(1, 16, 2, 8)).astype(np.float32)}
    >>> hcp.check(step, batch, cp).ok
    True
    """
    cp.placement.require_streams("hcp.check")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}.")
    subject = make_subject(program, params, cp)
    checker = _Checker(subject, example_batch, cp, -1.0 if tolerance is None else tolerance)
    report = checker.report()
    if raise_if_wrong and not report.ok:
        raise ValueError(str(report))
    return report


@dataclasses.dataclass(frozen=True)
class _Way:
    """One way to run the program on the mesh.

    Attributes:
        length: number of tokens that the batch is cut to; None keeps all.
        sharded: entries of the batch that the checker puts in the layout in place of the program.
        repairs: kinds of mistakes repaired in the program itself.
    """

    length: int | None = None
    sharded: tuple[str, ...] = ()
    repairs: frozenset[str] = frozenset()


class _Results(NamedTuple):
    differences: dict[str, float]
    found: set[str]
    error: Exception | None = None


@dataclasses.dataclass
class _Checker:
    subject: Subject
    batch: Any
    cp: ContextParallel
    tolerance: float  # negative means by dtype

    def __post_init__(self) -> None:
        self.batch = jax.tree.map(on_host, self.batch)
        params = jax.tree.map(on_host, self.subject.params)
        self.subject = self.subject._replace(params=params)
        arrays = jax.tree.leaves((params, self.batch))
        widths = [x.dtype.itemsize for x in arrays if is_float(x)]
        if self.tolerance < 0:
            self.tolerance = _TOLERANCE[min(widths, default=4)]
        lengths = [x.shape[1] for x in jax.tree.leaves(self.batch) if np.ndim(x) > 1]
        if not lengths:
            raise ValueError("hcp.check needs an example_batch with an array [B, T, ...].")
        self.length = max(lengths)
        self.notes: list[str] = []
        self._ran_alone: dict[int | None, Ran] = {}

    def report(self) -> Report:
        try:
            first = self._try(_Way())
        except MaskLengthError as short:  # raised on one device
            first = _Results({}, set(), short)
        mistakes = () if self._good(first) else self._diagnose(first)
        if self._good(first) and ALONE in first.found:
            self.notes.append(
                "attention ran without cp on the whole sequence: each device computes all of it, "
                "and in another layout the numbers would be wrong"
            )
        error = first.error
        told = f"{type(error).__name__}: {error}" if error is not None else ""
        return Report(
            first.differences,
            self.tolerance,
            mistakes,
            tuple(dict.fromkeys(self.notes)),
            told,
        )

    def _diagnose(self, first: _Results) -> tuple[str, ...]:
        """Return the smallest set of mistakes whose repair removes the difference."""
        if isinstance(first.error, MaskLengthError):
            return (MASK_LENGTH,)
        if isinstance(first.error, CutSequenceError):
            return (ALONE,)
        whole = self._whole_length()
        padded = whole is not None and whole != self.length
        if padded and self._good(self._try(_Way(length=whole))):
            return (PADDING,)
        length = whole if padded else None
        for names, kinds in self._suspects(first, length):
            if self._good(self._try(_Way(length, names, kinds))):
                found = ((INPUTS,) if names else ()) + tuple(sorted(kinds))
                if padded and not self._good(self._try(_Way(None, names, kinds))):
                    found += (PADDING,)
                if names and set(names) != set(self._streams()):
                    self.notes.append(f"never put in the layout: {', '.join(names)}")
                return found
        return ()

    def _suspects(
        self, first: _Results, length: int | None
    ) -> Iterator[tuple[tuple[str, ...], frozenset[str]]]:
        """Yield possible repairs, the smallest first: batch entries to shard, kinds of mistakes."""
        names = self._streams()
        sharded: list[tuple[str, ...]] = [()]
        if not self.subject.is_model:
            sharded += [names, *((name,) for name in names if len(names) > 1)]
        found = set(first.found)
        for entries in sharded[1:] if first.error is not None else ():
            found |= self._try(_Way(length, entries)).found
        kinds = [
            frozenset(chosen)
            for size in range(len(found) + 1)
            for chosen in itertools.combinations(sorted(found), size)
        ]
        pairs = [(entries, kind) for entries in sharded for kind in kinds if entries or kind]
        yield from sorted(pairs, key=lambda pair: bool(pair[0]) + len(pair[1]))

    def _streams(self) -> tuple[str, ...]:
        """Return the names of batch entries with a sequence dim; "" for a batch of one array."""
        if not isinstance(self.batch, dict):
            return ("",)
        return tuple(k for k, x in self.batch.items() if np.ndim(x) > 1)

    def _whole_length(self) -> int | None:
        """Return the longest length that needs no padding, at most the batch's; None if none."""
        masks = jax.tree.leaves(self.batch, is_leaf=lambda x: isinstance(x, Mask))
        if any(isinstance(x, Mask) and x.length is not None for x in masks):
            return None
        lengths = range(self.length, 0, -1)
        return next((n for n in lengths if self.cp.padded_length(n) == n), None)

    def _good(self, results: _Results) -> bool:
        agree = all(x <= self.tolerance for x in results.differences.values())
        return results.error is None and agree

    def _try(self, way: _Way) -> _Results:
        """Return the differences of the mesh from one device when the program runs this way."""
        alone = self._alone(way.length)
        trial = Trial(Order(self.cp, self.cp.padded_length(way.length or self.length)), way.repairs)
        try:
            here = self._run(self.cp, way, trial)
            differences = compare(here, alone, trial.order, self.tolerance)
        except Exception as error:  # the report shows any error of the user's program
            return _Results({}, trial.found, error)
        return _Results(differences, trial.found)

    def _alone(self, length: int | None) -> "Ran":
        if length not in self._ran_alone:
            one = one_device(self.cp)
            self._ran_alone[length] = self._run(one, _Way(length), Trial(Order(one, -1)))
        return self._ran_alone[length]

    def _run(self, cp: ContextParallel, way: _Way, trial: Trial) -> "Ran":
        batch = self._cut(way.length)
        if way.sharded:
            entries = batch if isinstance(batch, dict) else {"": batch}
            entries |= cp.shard_batch({name: entries[name] for name in way.sharded})
            batch = entries if isinstance(batch, dict) else entries[""]
        try:
            return ran(self.subject, batch, cp, trial)
        except jax.errors.TracerArrayConversionError:
            self.notes.append(
                "gradients of the batch's own arrays were not compared: the program reads them on "
                "the host (cp.shard_batch does; cp.shard(x, dim=1) does not)"
            )
            return ran(self.subject, batch, cp, trial, batch_gradients=False)

    def _cut(self, length: int | None) -> Any:
        def cut(x: Any) -> Any:
            return x[:, :length] if np.ndim(x) > 1 and x.shape[1] == self.length else x

        batch = self.batch if length is None else jax.tree.map(cut, self.batch)
        return dict(batch) if isinstance(batch, dict) else batch
