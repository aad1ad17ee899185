"""Train with dynamic context parallelism: each microbatch has its own grouping of the devices.

A step is a few microbatches, each run by the program of its widest group, and one update:

    plan        PlannedSteps     choose documents, microbatches and groups
    pack        in a thread      cut documents over their groups; read the tokens of own devices
    put         in that thread   copy the arrays to the devices
    run         `menu.Menu`      add the sums of each microbatch; then the update

All programs are compiled before step 0. A microbatch that would need another program while training
runs is an error that says why.
"""

import dataclasses
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils
from jaxtyping import Int64

from hcp_jax.attention.strategy import microbatch_lanes
from hcp_jax.cost.shape import ModelShape
from hcp_jax.dynamic.calibrate import read_cost
from hcp_jax.dynamic.cost import Cost, model_cost
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import host_of
from hcp_jax.parallel.microbatch import own_devices, place_microbatch
from hcp_jax.sequence.packing import Microbatch, pack
from hcp_jax.train.batch import Batch, PlacedMicrobatch, PlacedStep
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import read, token_arrays
from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.data.documents import Limits, PlannedStep, PlannedSteps, check_longest
from hcp_jax.train.data.streams import Segments
from hcp_jax.train.menu import Menu
from hcp_jax.train.program import Program


class DynamicProgram(Program):
    """Programs by the devices of the widest group that they serve, which is their key.

    Args:
        config: the run; its `parallel.dynamic` is enabled.
        cp: the context parallelism, without groups.
        corpus: the text.
        console: where the progress of compiling is shown.

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
        self._cp, self._corpus = cp, corpus
        self._tokens = config.parallel.dynamic.tokens
        self._segments = Segments(corpus, config.seq_len)
        limits = make_limits(config, cp)
        check_longest(self._segments, limits)
        self._planned = PlannedSteps(self._segments.sizes, limits)
        widths = self._planned.menu
        _require_same_everywhere(widths)
        contexts = {width: dataclasses.replace(cp, widest_group=width) for width in widths}
        menu = Menu(config, contexts, name=_name)
        super().__init__(config, menu, self._planned.map(self._put_step), console)

    def describe(self, num_params: int) -> list[str]:
        """Return lines about the documents of a step and the menu."""
        limits = self._planned.limits
        sizes = [n for n in limits.widths if n <= self._planned.menu[-1]]
        lanes = limits.cost.lanes_of(limits.num_devices, limits.num_devices)
        exchanged = f", heads exchanged by {lanes}" if lanes > 1 else ""
        return [
            f"step: {self._config.tokens_per_step:,} tokens of whole documents, each document on "
            f"{sizes[0]} to {sizes[-1]} devices; microbatches of {self._tokens:,} tokens a device"
            f"{exchanged}",
            f"programs for groups of up to {', '.join(map(str, self._planned.menu))} devices",
        ]

    def example(self, key: int) -> Batch:
        """Return a batch without documents: all batches of a program have its shapes."""
        limits = self._planned.limits
        number = limits.num_devices // key
        empty = Microbatch(
            (key,) * number, ((),) * number, limits.cost.lanes_of(key, limits.num_devices)
        )
        return self._put(empty).arrays

    def summary(self) -> list[str]:
        """Return a line with the share of microbatches of each program."""
        used = self.menu.used
        total = used.total()
        shares = (
            f"groups of up to {width} in {count / total:.0%}" for width, count in used.most_common()
        )
        return [f"{total} microbatches: {'; '.join(shares)}"] if total else []

    def _put_step(self, planned: PlannedStep) -> PlacedStep:
        """Put a step on the devices.

        Its facts are: "microbatches", how many; "groupings", how many different ones; "fill", the
        share of the slots of all devices that hold a token; "pairs", the (query, key) pairs that
        attention visits.
        """
        numbers = [d for mb in planned for held in mb.documents for d in held]
        sizes = self._segments.sizes[numbers]
        pairs = sum(
            share * _visible_pairs(sizes, window)
            for window, share in self._config.model.window_shares.items()
        )
        facts = {
            "microbatches": len(planned),
            "groupings": len({mb.grouping for mb in planned}),
            "fill": float(sizes.sum() / (len(planned) * sum(planned[0].grouping) * self._tokens)),
            "pairs": float(pairs),
        }
        documents = sorted({self._segments.document(number) for number in numbers})
        return PlacedStep(tuple(map(self._put, planned)), tuple(documents), facts)

    def _put(self, microbatch: Microbatch) -> PlacedMicrobatch:
        devices = own_devices(self._cp)
        packed = pack(microbatch, self._segments.sizes, self._tokens, devices=devices)
        refs = np.zeros(packed.document.shape, np.int64)
        first = 0
        for size, held in zip(microbatch.grouping, microbatch.documents, strict=True):
            borders = np.array([first, first + size]) - devices.start
            begin, end = np.clip(borders, 0, len(devices))
            first += size
            if begin < end and held:
                stream = np.concatenate([self._segments.refs(number) for number in held])
                # A query's own index is end - 1; those of a group begin at its first slot.
                index = packed.end[begin:end] - (borders[0] + devices.start) * self._tokens
                inside = packed.document[begin:end] >= 0
                refs[begin:end] = np.where(inside, stream[np.where(inside, index, 1) - 1], 0)
        arrays = read(token_arrays(self._corpus, refs, self._config.model.mtp_depths))
        window = self._config.model.widest_window
        key = next(width for width in self._planned.menu if width >= microbatch.widest)
        placed: Any = place_microbatch(
            self.menu.contexts[key], packed, arrays, sliding_window=window
        )
        return PlacedMicrobatch(key, placed)


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
        cost=dataclasses.replace(
            _cost(config.model, cp) if cost is None else read_cost(pathlib.Path(cost)),
            lanes=microbatch_lanes(cp, config.model.num_heads),
        ),
    )


def _cost(model: ModelConfig, cp: ContextParallel) -> Cost:
    """Return the cost of the run's model on modelled H200s, with the hosts of its mesh."""
    tp, devices = cp.axis_size(cp.tp), list(cp.mesh.devices.flat)
    on_first = sum(host_of(device) == host_of(devices[0]) for device in devices)
    shape = ModelShape.from_config(model)
    return model_cost(shape, tp=tp, devices_per_host=max(1, on_first // tp))


def _name(width: int) -> str:
    return f"groups of up to {width} devices"


def _require_same_everywhere(menu: tuple[int, ...]) -> None:
    """Check that all processes have the same menu: else they would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    menus = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(menu).encode())))
    if (menus != menus[0]).any():
        raise ValueError(
            "the processes chose different programs for the same data; every host needs "
            "the same versions of Python and NumPy, or give them in parallel.dynamic.menu."
        )
