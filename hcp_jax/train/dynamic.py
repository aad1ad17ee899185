"""Train with dynamic context parallelism: each microbatch has its own grouping of the devices.

A step is a few microbatches, each run by the program of its grouping, and one update:

    plan        PlannedSteps     choose documents, microbatches and groups
    pack        in a thread      cut documents over their groups; read the tokens of own devices
    put         in that thread   copy the arrays to the devices
    accumulate  a menu program   add loss and gradients to the sums
    update      at the end       divide by the weight of the step; clipping and AdamW

All programs are compiled before step 0. A microbatch that would need another program while training
runs is an error that says why.
"""

import dataclasses
import pathlib
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import rich.console
import rich.progress
from jax.experimental import multihost_utils
from jaxtyping import Int64

from hcp_jax.cost.shape import ModelShape
from hcp_jax.dynamic.calibrate import read_cost
from hcp_jax.dynamic.cost import Cost, model_cost
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import host_of
from hcp_jax.parallel.microbatch import own_devices, place_microbatch
from hcp_jax.sequence import groupings
from hcp_jax.sequence.packing import Microbatch, pack
from hcp_jax.train import accumulate
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.data.documents import Limits, PlannedStep, PlannedSteps, check_longest
from hcp_jax.train.data.streams import Segments
from hcp_jax.train.step import TrainState


class PlacedMicrobatch(NamedTuple):
    """A microbatch on the devices, from `place_microbatch`."""

    layout: groupings.Layout
    arrays: dict[str, Any]


class PlacedStep(NamedTuple):
    """A step on the devices.

    Attributes:
        microbatches: in the order in which they run.
        documents: the numbers of its documents.
        facts: metrics that are known beforehand: "microbatches", how many; "layouts", how many
            different groupings; "fill", the share of the slots of all devices that hold a token;
            "pairs", the (query, key) pairs that attention visits.
    """

    microbatches: tuple[PlacedMicrobatch, ...]
    documents: tuple[int, ...]
    facts: dict[str, float]


class DynamicProgram:
    """A program for each grouping of a menu; see `program.Program`.

    Args:
        config: the run; its `parallel.dynamic` is enabled.
        cp: the context parallelism, without groups.
        corpus: the text.
        console: where the progress of compiling is shown.

    Attributes:
        menu: the groupings that have programs.
        programs: the compiled `accumulate.make_accumulate` of each of them.

    Raises:
        ValueError: if a document is longer than the widest group holds.
        NotImplementedError: if groups do not support the run's comm type.
    """

    def __init__(
        self,
        config: TrainConfig,
        cp: ContextParallel,
        corpus: Corpus,
        console: rich.console.Console,
    ):
        self._config, self._cp, self._console = config, cp, console
        self._tokens = config.parallel.dynamic.tokens
        self._corpus = corpus
        self._segments = Segments(corpus, config.seq_len)
        limits = make_limits(config, cp)
        check_longest(self._segments, limits)
        self._planned = PlannedSteps(self._segments.sizes, limits)
        self.menu = self._planned.menu
        _require_same_everywhere(self.menu)
        self._contexts = {layout: dataclasses.replace(cp, groups=layout) for layout in self.menu}
        placed = self._planned.map(self._put_step)
        self._steps = iter(
            grain.experimental.ThreadPrefetchIterDataset(
                placed, prefetch_buffer_size=config.data.prefetch
            )
        )
        self._zeros: Any = None
        self.programs: dict[groupings.Layout, Any] = {}
        self._update: Any = None
        self._used: Counter[groupings.Layout] = Counter()

    def describe(self, num_params: int) -> list[str]:
        """Return lines about the documents of a step and the menu."""
        widest = max(max(layout) for layout in self.menu)
        narrowest = min(min(layout) for layout in self.menu)
        return [
            f"step: {self._config.tokens_per_step:,} tokens of whole documents, each document on "
            f"{narrowest} to {widest} devices; microbatches of {self._tokens:,} tokens a device",
            f"menu of {len(self.menu)} layouts: {'; '.join(map(groupings.describe, self.menu))}",
        ]

    def compile(self, abstract: TrainState) -> int:
        """Compile the menu's programs, and those that begin and end a step.

        Returns:
            Bytes that the largest of them needs per device.
        """
        config = self._config
        like = accumulate.abstract_sums(abstract, self._cp)
        jitted = accumulate.make_update(config.optimizer, config.steps, abstract, like)
        self._zeros = accumulate.make_zeros(like).lower().compile()
        self._update = jitted.lower(abstract, like).compile()
        for layout in rich.progress.track(
            self.menu, "compiling the menu", console=self._console, transient=True
        ):
            program = accumulate.make_accumulate(config.model, self._contexts[layout], like)
            empty = self._put(Microbatch(layout, ((),) * len(layout)))
            lowered = program.lower(abstract.params, like, empty.arrays)
            self.programs[layout] = lowered.compile()
        # The optimizer's state is not their argument, but it is on the devices, too.
        besides = sum(map(_bytes_per_device, jax.tree.leaves(abstract.opt_state)))
        widest = max(_bytes(program) for program in self.programs.values())
        return max(_bytes(self._update), besides + widest)

    def next_batch(self) -> PlacedStep:
        """Return the next step; a thread has packed it and put it on the devices."""
        step: PlacedStep = next(self._steps)
        return step

    def step(self, state: TrainState, batch: PlacedStep) -> tuple[TrainState, dict[str, Any]]:
        """Make a step; its metrics are those of `apply_gradients` and `PlacedStep.facts`.

        Raises:
            RuntimeError: if a microbatch has no compiled program; says why.
        """
        sums = self._zeros()
        for microbatch in batch.microbatches:
            sums = self._add(state.params, sums, microbatch)
        state, metrics = self._update(state, sums)
        self._used.update(microbatch.layout for microbatch in batch.microbatches)
        return state, metrics | batch.facts

    def documents(self, batch: PlacedStep) -> Sequence[int]:
        """Return the numbers of the documents of a step."""
        return batch.documents

    def summary(self) -> list[str]:
        """Return a line with the share of microbatches of each grouping."""
        total = self._used.total()
        shares = (
            f"{groupings.describe(layout)} in {count / total:.0%}"
            for layout, count in self._used.most_common()
        )
        return [f"{total} microbatches: {'; '.join(shares)}"] if total else []

    def data_state(self) -> dict[str, Any]:
        """Return the position in the order of documents, and the remaining steps of the window."""
        state: dict[str, Any] = self._steps.get_state()
        return state

    def restore_data(self, state: dict[str, Any]) -> None:
        """Restore the state of the data; schedule its steps anew if this run cannot make them.

        Raises:
            ValueError: if the state is from other data, or from a run without dynamic CP.
        """
        self._steps.set_state(state)

    def close(self) -> None:
        """Stop the thread that packs."""
        self._steps.close()

    def _add(self, params: Any, sums: Any, microbatch: PlacedMicrobatch) -> Any:
        layout, arrays = microbatch
        try:
            return self.programs[layout](params, sums, arrays)
        except (KeyError, TypeError, ValueError) as error:
            known = layout in self.programs
            cause = str(error) if known else "this layout is not on the menu."
            raise RuntimeError(
                f"a microbatch of layout {groupings.describe(layout)} has no compiled program, and "
                f"nothing is compiled once training runs: {cause}"
            ) from error

    def _put_step(self, planned: PlannedStep) -> PlacedStep:
        numbers = [d for mb in planned for held in mb.documents for d in held]
        sizes = self._segments.sizes[numbers]
        pairs = sum(
            share * _visible_pairs(sizes, window)
            for window, share in self._config.model.window_shares.items()
        )
        facts = {
            "microbatches": len(planned),
            "layouts": len({mb.layout for mb in planned}),
            "fill": float(sizes.sum() / (len(planned) * sum(planned[0].layout) * self._tokens)),
            "pairs": float(pairs),
        }
        documents = sorted({self._segments.document(number) for number in numbers})
        return PlacedStep(tuple(map(self._put, planned)), tuple(documents), facts)

    def _put(self, microbatch: Microbatch) -> PlacedMicrobatch:
        devices = own_devices(self._cp)
        packed = pack(microbatch, self._segments.sizes, self._tokens, devices=devices)
        refs = np.zeros(packed.document.shape, np.int64)
        first = 0
        for size, held in zip(microbatch.layout, microbatch.documents, strict=True):
            borders = np.array([first, first + size]) - devices.start
            begin, end = np.clip(borders, 0, len(devices))
            first += size
            if begin < end and held:
                stream = np.concatenate([self._segments.refs(number) for number in held])
                # A query sees the keys of its group up to itself: its own index is end - 1.
                index = packed.end[begin:end]
                refs[begin:end] = np.where(index > 0, stream[index - 1], 0)
        arrays = {
            "tokens": self._corpus.tokens_at(refs),
            "targets": self._corpus.targets_at(refs),
            "weights": (refs > 0).astype(np.float32),
        }
        window = self._config.model.widest_window
        cp = self._contexts[microbatch.layout]
        placed = place_microbatch(cp, packed, arrays, sliding_window=window)
        return PlacedMicrobatch(microbatch.layout, placed)


def _visible_pairs(sizes: Int64[np.ndarray, "n"], window: int | None) -> int:
    """Return the visible pairs of documents: a query sees its document up to itself, or a window.

    Args:
        sizes: tokens of each document.
        window: number of tokens that a query sees; None for all earlier ones.
    """
    seen = sizes if window is None else np.minimum(sizes, window)
    return int((seen * (seen + 1) // 2 + (sizes - seen) * seen).sum())


def make_limits(config: TrainConfig, cp: ContextParallel) -> Limits:
    """Return the limits of a run's schedules.

    Raises:
        ValueError: if the file `parallel.dynamic.cost` does not hold a cost.
    """
    cost = config.parallel.dynamic.cost
    return Limits(
        num_devices=cp.axis_size(cp.flat_axes),
        tokens_per_step=config.tokens_per_step,
        seed=config.seed,
        config=config.parallel.dynamic,
        cost=_cost(config.model, cp) if cost is None else read_cost(pathlib.Path(cost)),
    )


def _cost(model: ModelConfig, cp: ContextParallel) -> Cost:
    """Return the cost of the run's model on modelled H200s, with the hosts of its mesh."""
    tp, devices = cp.axis_size(cp.tp), list(cp.mesh.devices.flat)
    on_first = sum(host_of(device) == host_of(devices[0]) for device in devices)
    shape = ModelShape.from_config(model)
    return model_cost(shape, tp=tp, devices_per_host=max(1, on_first // tp))


def _require_same_everywhere(menu: tuple[groupings.Layout, ...]) -> None:
    """Check that all processes have the same menu: else they would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    menus = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(menu).encode())))
    if (menus != menus[0]).any():
        raise ValueError(
            "the processes chose different menus of layouts for the same data; every host needs "
            "the same versions of Python and NumPy, or give the layouts in parallel.dynamic.menu."
        )


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def _bytes_per_device(x: jax.ShapeDtypeStruct) -> int:
    shape = x.sharding.shard_shape(x.shape)
    return int(np.prod(shape, dtype=np.int64)) * int(x.dtype.itemsize)
