"""Training with dynamic context parallelism: every microbatch on groups of its own.

A step is a few microbatches, each the program of a group layout, and one update:

    documents   PlannedSteps     which documents, in which microbatches, on which groups    (NumPy)
    pack        a thread         the tokens of this process's own devices, and no others    (NumPy)
    place       next_batch       onto the devices
    accumulate  one of the menu  loss and gradients, added to the sums
    update      at the end       clipping and AdamW, for the sums over the weight of the step

Every program there is has been compiled before step 0, and only those are ever called: what would
have to be compiled while training runs is an error that says why.
"""

import dataclasses
import pathlib
import zlib
from collections import Counter
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import rich.console
import rich.progress
from jax.experimental import multihost_utils
from jaxtyping import Float32, Int32

from hcp_jax.context import ContextParallel
from hcp_jax.dynamic import groups
from hcp_jax.dynamic.calibrate import read_cost
from hcp_jax.dynamic.cost import Cost, ModelShape, model_cost
from hcp_jax.dynamic.packing import PackedMicrobatch, pack
from hcp_jax.dynamic.plan import Microbatch
from hcp_jax.mesh import host_of
from hcp_jax.microbatch import own_devices, place_microbatch
from hcp_jax.models.config import ModelConfig
from hcp_jax.train import accumulate, data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.documents import Limits, PlannedStep, PlannedSteps
from hcp_jax.train.step import TrainState


class HostMicrobatch(NamedTuple):
    """A microbatch on the host: the rows of the devices that this process packs for.

    Attributes:
        packed: positions, intervals and runs.
        tokens: of each place; 0 for padding.
        targets: the token to be predicted at each place.
        weights: 1, and 0 for padding.
    """

    packed: PackedMicrobatch
    tokens: Int32[np.ndarray, "D M"]
    targets: Int32[np.ndarray, "D M"]
    weights: Float32[np.ndarray, "D M"]


class HostStep(NamedTuple):
    """A step on the host.

    Attributes:
        microbatches: in the order in which they run.
        fill: share of the places of all buffers, on all devices, that hold a token.
        documents: the numbers of the documents that it has tokens of.
    """

    microbatches: tuple[HostMicrobatch, ...]
    fill: float
    documents: tuple[int, ...]


class PlacedStep(NamedTuple):
    """A step on the devices: (layout, batch) of each microbatch; the rest as in `HostStep`."""

    microbatches: tuple[tuple[groups.Layout, dict[str, Any]], ...]
    fill: float
    documents: tuple[int, ...]


class DynamicProgram:
    """A program for each group layout of a menu; see `program.Program`.

    Args:
        config: the run; its `parallel.dynamic` is enabled.
        cp: the mesh, without groups.
        corpus: the text.
        console: where the progress of compiling is shown.

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
        self._corpus, self._segments = corpus, data.Segments(corpus, config.seq_len)
        self._planned = PlannedSteps(self._segments.sizes, limits_of(config, cp))
        self.menu = self._planned.menu
        _require_same_everywhere(self._segments.sizes, self.menu)
        self._of_layout = {layout: dataclasses.replace(cp, groups=layout) for layout in self.menu}
        packed = self._planned.map(self._pack_step)
        self._steps = iter(
            grain.experimental.ThreadPrefetchIterDataset(
                packed, prefetch_buffer_size=config.data.prefetch
            )
        )
        self._zeros: Any = None
        self._accumulate: dict[groups.Layout, Any] = {}
        self._update: Any = None
        self._used: Counter[groups.Layout] = Counter()

    def describe(self, num_params: int) -> list[str]:
        """The documents of a step, the menu, and what is sent."""
        widest = max(max(layout) for layout in self.menu)
        narrowest = min(min(layout) for layout in self.menu)
        return [
            f"step: documents of {self._config.tokens_per_step:,} tokens, each on {narrowest} to "
            f"{widest} devices, {self._tokens:,} tokens a device in each microbatch",
            f"menu of {len(self.menu)} layouts: {'; '.join(map(groups.describe, self.menu))}",
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
            nothing = self._place(self._pack(Microbatch(layout, ((),) * len(layout))))
            lowered = of_layout.lower(abstract.params, like, nothing)
            self._accumulate[layout] = lowered.compile()
        # The optimizer's state is no argument of theirs, but it is there.
        besides = sum(map(_bytes_per_device, jax.tree.leaves(abstract.opt_state)))
        widest = max(_bytes(program) for program in self._accumulate.values())
        return max(_bytes(self._update), besides + widest)

    def next_batch(self) -> PlacedStep:
        """The next step's microbatches, on their way to the devices."""
        step = next(self._steps)
        placed = tuple((mb.packed.layout, self._place(mb)) for mb in step.microbatches)
        return PlacedStep(placed, step.fill, step.documents)

    def step(self, state: TrainState, batch: PlacedStep) -> tuple[TrainState, dict[str, Any]]:
        """Makes a step; besides `apply_gradients`' metrics, "microbatches", "layouts" and "fill".

        Raises:
            RuntimeError: if something would have to be compiled for it; says what.
        """
        sums = self._zeros()
        for layout, of_groups in batch.microbatches:
            sums = self._add(layout, state.params, sums, of_groups)
        state, metrics = self._update(state, sums)
        layouts = [layout for layout, _ in batch.microbatches]
        self._used.update(layouts)
        facts = {"microbatches": len(layouts), "layouts": len(set(layouts)), "fill": batch.fill}
        return state, metrics | facts

    def documents(self, batch: PlacedStep) -> tuple[int, ...]:
        """The numbers of the documents in a step."""
        return batch.documents

    def summary(self) -> list[str]:
        """Which layouts have been used, for the end of a run's output."""
        total = self._used.total()
        shares = (
            f"{groups.describe(layout)} in {count / total:.0%}"
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

    def _add(self, layout: groups.Layout, params: Any, sums: Any, batch: dict[str, Any]) -> Any:
        try:
            return self._accumulate[layout](params, sums, batch)
        except (KeyError, TypeError, ValueError) as error:
            known = layout in self._accumulate
            cause = str(error) if known else "this layout is not on the menu."
            raise RuntimeError(
                f"a microbatch of layout {groups.describe(layout)} has no compiled program, and "
                f"nothing is compiled once training runs: {cause}"
            ) from error

    def _pack_step(self, planned: PlannedStep) -> HostStep:
        held = [d for mb in planned for of_group in mb.documents for d in of_group]
        places = len(planned) * self._planned.limits.num_devices * self._tokens
        return HostStep(
            tuple(self._pack(mb) for mb in planned),
            fill=float(self._segments.sizes[held].sum()) / places,
            documents=tuple(sorted({self._segments.document(d) for d in held})),
        )

    def _pack(self, microbatch: Microbatch) -> HostMicrobatch:
        devices = own_devices(self._cp)
        packed = pack(microbatch, self._segments.sizes, self._tokens, devices=devices)
        places = np.zeros(packed.document.shape, np.int64)
        first = 0
        for size, held in zip(microbatch.layout, microbatch.documents, strict=True):
            own = slice(max(first, devices.start), min(first + size, devices.stop))
            first += size
            if own.start >= own.stop or not held:
                continue
            rows = slice(own.start - devices.start, own.stop - devices.start)
            stream = np.concatenate([self._segments.places(d) for d in held])
            real = packed.document[rows] >= 0
            # A query sees the keys up to itself: its own index in the group's stream is end - 1.
            places[rows][real] = stream[packed.end[rows][real] - 1]
        return HostMicrobatch(
            packed,
            tokens=self._corpus.tokens_at(places),
            targets=self._corpus.targets_at(places),
            weights=(places > 0).astype(np.float32),
        )

    def _place(self, microbatch: HostMicrobatch) -> dict[str, Any]:
        packed, *arrays = microbatch
        return place_microbatch(
            self._of_layout[packed.layout],
            packed,
            dict(zip(("tokens", "targets", "weights"), arrays, strict=True)),
            sliding_window=self._config.model.sliding_window,
        )


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
    """The run's model on modelled H200s, with the hosts of its mesh."""
    tp, devices = cp.axis_size(cp.tp), list(cp.mesh.devices.flat)
    query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    of_layer = model.hidden_size * (2 * query + 2 * kv + 3 * model.intermediate_size)
    dense = model.num_layers * of_layer + model.vocab_size * model.hidden_size
    shape = ModelShape(model.num_layers, dense // tp, query // tp, kv // tp)
    on_first = sum(host_of(device) == host_of(devices[0]) for device in devices)
    return dataclasses.replace(model_cost(shape), devices_per_host=max(1, on_first // tp))


def _require_same_everywhere(sizes: np.ndarray, menu: tuple[groups.Layout, ...]) -> None:
    """Processes that schedule differently would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    mark = np.array([zlib.crc32(sizes.tobytes()), zlib.crc32(repr(menu).encode())], np.int64)
    of_all = multihost_utils.process_allgather(mark)
    if (of_all != of_all[0]).any():
        what = "data" if (of_all[:, 0] != of_all[0, 0]).any() else "menus of layouts"
        raise ValueError(
            f"the processes have different {what}; every host needs the same files, and the same "
            "versions of Python and NumPy."
        )


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _bytes_per_device(x: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
