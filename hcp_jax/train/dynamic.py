"""Training with dynamic context parallelism: every microbatch on groups of its own.

A step is a few microbatches, each the program of a group layout, and one update:

    plan        PlannedSteps     which documents, in which microbatches, on which groups
    pack        in a thread      each onto its group's devices; this process reads its own devices'
    place       in that thread   onto the devices
    accumulate  one of the menu  loss and gradients, added to the sums
    update      at the end       clipping and AdamW, for the sums over the weight of the step

Every program there is has been compiled before step 0, and only those are ever called: what would
have to be compiled while training runs is an error that says why.
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

from hcp_jax.cost.shape import ModelShape
from hcp_jax.dynamic.calibrate import read_cost
from hcp_jax.dynamic.cost import Cost, model_cost
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import host_of
from hcp_jax.parallel.microbatch import own_devices, place_microbatch
from hcp_jax.sequence import groupings
from hcp_jax.sequence.packing import Microbatch, pack
from hcp_jax.train import accumulate, data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.documents import Limits, PlannedStep, PlannedSteps, check_longest
from hcp_jax.train.data.streams import Segments
from hcp_jax.train.step import TrainState


class PlacedMicrobatch(NamedTuple):
    """A microbatch on the devices, as `place_microbatch` leaves it."""

    layout: groupings.Layout
    arrays: dict[str, Any]


class PlacedStep(NamedTuple):
    """A step on the devices.

    Attributes:
        microbatches: in the order in which they run.
        documents: the numbers of the documents that it has tokens of.
        facts: what is known of it beforehand, for its metrics: "microbatches"; "layouts",
            different ones; "fill", the share of the places of all buffers, on all devices, that
            hold a token; "pairs", the (query, key) pairs that attention looks at.
    """

    microbatches: tuple[PlacedMicrobatch, ...]
    documents: tuple[int, ...]
    facts: dict[str, float]


class DynamicProgram:
    """A program for each group layout of a menu; see `program.Program`.

    Args:
        config: the run; its `parallel.dynamic` is enabled.
        cp: the mesh, without groups.
        corpus: the text.
        console: where the progress of compiling is shown.

    Attributes:
        menu: the layouts that there are programs for.
        programs: what `compile` made for each of them: `accumulate.make_accumulate`, compiled.

    Raises:
        ValueError: if a document is longer than the widest group holds.
        NotImplementedError: if groups cannot have the run's comm type.
    """

    def __init__(
        self,
        config: TrainConfig,
        cp: ContextParallel,
        corpus: data.Corpus,
        console: rich.console.Console,
    ):
        self._config, self._cp, self._console = config, cp, console
        self._tokens = config.parallel.dynamic.tokens
        self._corpus = corpus
        self._segments = Segments(corpus, config.seq_len)
        limits = limits_of(config, cp)
        check_longest(self._segments, limits)
        self._planned = PlannedSteps(self._segments.sizes, limits)
        self.menu = self._planned.menu
        _require_same_everywhere(self.menu)
        self._of_layout = {layout: dataclasses.replace(cp, groups=layout) for layout in self.menu}
        placed = self._planned.map(self._place_step)
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
        """The documents of a step, the menu, and what is sent."""
        widest = max(max(layout) for layout in self.menu)
        narrowest = min(min(layout) for layout in self.menu)
        return [
            f"step: {self._config.tokens_per_step:,} tokens of whole documents, each document on "
            f"{narrowest} to {widest} devices; microbatches of {self._tokens:,} tokens a device",
            f"menu of {len(self.menu)} layouts: {'; '.join(map(groupings.describe, self.menu))}",
        ]

    def compile(self, abstract: TrainState) -> int:
        """Compiles the menu's programs, and those that begin and end a step."""
        config = self._config
        like = accumulate.abstract_sums(abstract, self._cp)
        jitted = accumulate.make_update(config.optimizer, config.steps, abstract, like)
        self._zeros = accumulate.make_zeros(like).lower().compile()
        self._update = jitted.lower(abstract, like).compile()
        for layout in rich.progress.track(
            self.menu, "compiling the menu", console=self._console, transient=True
        ):
            of_layout = accumulate.make_accumulate(config.model, self._of_layout[layout], like)
            empty = self._place(Microbatch(layout, ((),) * len(layout)))
            lowered = of_layout.lower(abstract.params, like, empty.arrays)
            self.programs[layout] = lowered.compile()
        # The optimizer's state is no argument of theirs, but it is there.
        besides = sum(map(_bytes_per_device, jax.tree.leaves(abstract.opt_state)))
        widest = max(_bytes(program) for program in self.programs.values())
        return max(_bytes(self._update), besides + widest)

    def next_batch(self) -> PlacedStep:
        """The next step; a thread has packed its microbatches and put them on the devices."""
        return next(self._steps)

    def step(self, state: TrainState, batch: PlacedStep) -> tuple[TrainState, dict[str, Any]]:
        """Makes a step; its metrics are `apply_gradients`' and `PlacedStep.facts`.

        Raises:
            RuntimeError: if something would have to be compiled for it; says what.
        """
        sums = self._zeros()
        for microbatch in batch.microbatches:
            sums = self._add(state.params, sums, microbatch)
        state, metrics = self._update(state, sums)
        self._used.update(microbatch.layout for microbatch in batch.microbatches)
        return state, metrics | batch.facts

    def documents(self, batch: PlacedStep) -> Sequence[int]:
        """The numbers of the documents of a step."""
        return batch.documents

    def summary(self) -> list[str]:
        """Which layouts have been used, for the end of a run's output."""
        total = self._used.total()
        shares = (
            f"{groupings.describe(layout)} in {count / total:.0%}"
            for layout, count in self._used.most_common()
        )
        return [f"{total} microbatches: {'; '.join(shares)}"] if total else []

    def data_state(self) -> dict[str, Any]:
        """The place in the order of documents, and the steps of the window that are to come."""
        return self._steps.get_state()

    def restore_data(self, state: dict[str, Any]) -> None:
        """Puts the documents there; those of a window's steps are scheduled anew where they must.

        Raises:
            ValueError: if the state is of other data, or of a run without dynamic CP.
        """
        self._steps.set_state(state)

    def close(self) -> None:
        """Ends the thread that packs."""
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

    def _place_step(self, planned: PlannedStep) -> PlacedStep:
        numbers = [d for mb in planned for held in mb.documents for d in held]
        sizes = self._segments.sizes[numbers]
        # A query sees the tokens of its document up to itself, or the last of them.
        seen = np.minimum(sizes, self._config.model.sliding_window or self._config.seq_len)
        facts = {
            "microbatches": len(planned),
            "layouts": len({mb.layout for mb in planned}),
            "fill": float(sizes.sum() / (len(planned) * sum(planned[0].layout) * self._tokens)),
            "pairs": float((seen * (seen + 1) // 2 + (sizes - seen) * seen).sum()),
        }
        documents = sorted({self._segments.document(number) for number in numbers})
        return PlacedStep(tuple(map(self._place, planned)), tuple(documents), facts)

    def _place(self, microbatch: Microbatch) -> PlacedMicrobatch:
        devices = own_devices(self._cp)
        packed = pack(microbatch, self._segments.sizes, self._tokens, devices=devices)
        places = np.zeros(packed.document.shape, np.int64)
        first = 0
        for size, held in zip(microbatch.layout, microbatch.documents, strict=True):
            borders = np.array([first, first + size]) - devices.start
            begin, end = np.clip(borders, 0, len(devices))
            first += size
            if begin < end and held:
                stream = np.concatenate([self._segments.places(number) for number in held])
                # A query sees the keys of its group up to itself, so that it is number end - 1.
                index = packed.end[begin:end]
                places[begin:end] = np.where(index > 0, stream[index - 1], 0)
        arrays = {
            "tokens": self._corpus.tokens_at(places),
            "targets": self._corpus.targets_at(places),
            "weights": (places > 0).astype(np.float32),
        }
        window = self._config.model.sliding_window
        of_groups = self._of_layout[microbatch.layout]
        placed = place_microbatch(of_groups, packed, arrays, sliding_window=window)
        return PlacedMicrobatch(microbatch.layout, placed)


def limits_of(config: TrainConfig, cp: ContextParallel) -> Limits:
    """What the schedules of a run keep to.

    Raises:
        ValueError: if the file of the cost holds none.
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
    """Processes that schedule differently would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    of_all = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(menu).encode())))
    if (of_all != of_all[0]).any():
        raise ValueError(
            "the processes chose different menus of layouts for the same data; every host needs "
            "the same versions of Python and NumPy, or give the layouts in parallel.dynamic.menu."
        )


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _bytes_per_device(x: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
