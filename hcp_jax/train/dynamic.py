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
from collections.abc import Mapping
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
from hcp_jax.dynamic.pipeline import order
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import host_of
from hcp_jax.parallel.microbatch import own_devices, place_microbatch
from hcp_jax.sequence.packing import Microbatch, pack
from hcp_jax.train.batch import Batch, PlacedMicrobatch, PlacedStep
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import held_out_segments, read, token_arrays
from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.data.documents import Limits, PlannedStep, PlannedSteps, check_longest
from hcp_jax.train.data.streams import Segments
from hcp_jax.train.evaluation import HeldOut
from hcp_jax.train.pipelined import make_menu
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
        self._tokens = config.parallel.dynamic.tokens
        segments = Segments(corpus, config.seq_len)
        limits = make_limits(config, cp)
        check_longest(segments, limits)
        self._planned = PlannedSteps(segments.sizes, limits)
        widths = self._planned.menu
        _require_same_everywhere(widths)
        contexts = {width: dataclasses.replace(cp, widest_group=width) for width in widths}
        self._text = GroupedText(config, contexts, corpus)
        menu = make_menu(config, contexts, name=_name)
        super().__init__(config, menu, self._planned.map(self._put_step), console)

    def describe(self, num_params: int) -> list[str]:
        """Return lines about the documents of a step and the menu."""
        limits = self._planned.limits
        sizes = [n for n in limits.widths if n <= self._planned.menu[-1]]
        lanes = limits.cost.lanes_of(limits.num_devices, limits.num_devices)
        exchanged = f", heads exchanged by {lanes}" if lanes > 1 else ""
        on = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
        return [
            f"step: {self._config.tokens_per_step:,} tokens of whole documents, each document on "
            f"{on} devices; microbatches of {self._tokens:,} tokens a device"
            f"{exchanged}",
            f"programs for groups of up to {', '.join(map(str, self._planned.menu))} devices",
        ]

    def held_out(self, corpus: Corpus) -> HeldOut:
        """Return text to evaluate on, scheduled as training schedules its own.

        Raises:
            ValueError: if a document is longer than the widest group holds.
        """
        limits, config = self._planned.limits, self._config
        of_menu = dataclasses.replace(limits.config, menu=list(self._planned.menu))
        text = GroupedText(config, self.menu.contexts, corpus)
        return HeldOutGroups(text, limits._replace(config=of_menu), config.eval.tokens)

    def example(self, key: int) -> Batch:
        """Return a batch without documents: all batches of a program have its shapes."""
        limits = self._planned.limits
        number = limits.num_devices // key
        empty = Microbatch(
            (key,) * number, ((),) * number, limits.cost.lanes_of(key, limits.num_devices)
        )
        return self._text.put(empty)

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
        segments = self._text.segments
        sizes = segments.sizes[numbers]
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
        documents = sorted({segments.document(number) for number in numbers})
        key, planned = self._text.key, self._in_order(planned)
        if self._config.parallel.pp > 1:
            widest = max(map(key, planned))  # one program serves all microbatches of a tick
            placed = [PlacedMicrobatch(widest, self._text.put(mb, widest)) for mb in planned]
        else:
            placed = [PlacedMicrobatch(key(mb), self._text.put(mb)) for mb in planned]
        return PlacedStep(tuple(placed), tuple(documents), facts)

    def _in_order(self, planned: PlannedStep) -> PlannedStep:
        """Return the microbatches in an order in which stages wait little for each other."""
        parallel, limits = self._config.parallel, self._planned.limits
        if parallel.pp == 1:
            return planned
        sizes = self._text.segments.sizes
        seconds = [
            limits.cost.microbatch_seconds(
                mb.grouping, [sizes[list(held)].tolist() for held in mb.documents], self._tokens
            )
            for mb in planned
        ]
        return tuple(planned[i] for i in order(seconds, parallel.pp, parallel.virtual_stages))


class GroupedText:
    """Puts the documents of microbatches into the buffers of their groups.

    Args:
        config: the run.
        contexts: the context parallelism of each program, by the devices of its widest group.
        corpus: the text.

    Attributes:
        contexts: as given.
        segments: the segments of the text, which microbatches number.
    """

    def __init__(
        self, config: TrainConfig, contexts: Mapping[int, ContextParallel], corpus: Corpus
    ):
        self.contexts, self.segments = contexts, Segments(corpus, config.seq_len)
        self._corpus, self._tokens = corpus, config.parallel.dynamic.tokens
        self._window = config.model.widest_window
        self._mtp_depths = config.model.mtp_depths

    def key(self, microbatch: Microbatch) -> int:
        """Return the key of the narrowest program that serves a microbatch."""
        return min(width for width in self.contexts if width >= microbatch.widest)

    def put(self, microbatch: Microbatch, key: int | None = None) -> Batch:
        """Read the tokens of this process's own devices, and put them there.

        Args:
            microbatch: its groups and their documents.
            key: the key of its program; None for the narrowest that serves it.
        """
        cp = self.contexts[self.key(microbatch) if key is None else key]
        devices = own_devices(cp)
        packed = pack(microbatch, self.segments.sizes, self._tokens, devices=devices)
        refs = np.zeros(packed.document.shape, np.int64)
        first = 0
        for size, held in zip(microbatch.grouping, microbatch.documents, strict=True):
            borders = np.array([first, first + size]) - devices.start
            begin, end = np.clip(borders, 0, len(devices))
            first += size
            if begin < end and held:
                stream = np.concatenate([self.segments.refs(number) for number in held])
                # A query's own index is end - 1; those of a group begin at its first slot.
                index = packed.end[begin:end] - (borders[0] + devices.start) * self._tokens
                inside = packed.document[begin:end] >= 0
                refs[begin:end] = np.where(inside, stream[np.where(inside, index, 1) - 1], 0)
        arrays = read(token_arrays(self._corpus, refs, self._mtp_depths))
        placed: Any = place_microbatch(cp, packed, arrays, sliding_window=self._window)
        return placed


class HeldOutGroups(HeldOut):
    """Held-out text in microbatches with groupings of their own.

    Args:
        text: the held-out text.
        limits: the limits of schedules, with the menu of the programs.
        tokens: see `EvalConfig`.

    Raises:
        ValueError: if a document is longer than the widest group holds.
    """

    def __init__(self, text: GroupedText, limits: Limits, tokens: int | None):
        self._text = text
        check_longest(text.segments, limits, "held-out document")
        numbers = held_out_segments(text.segments, tokens).tolist()
        self._tokens = int(text.segments.sizes[numbers].sum())
        self._microbatches = PlannedSteps(text.segments.sizes, limits).replan(numbers)
        used = {text.key(microbatch) for microbatch in self._microbatches}
        self.contexts = {width: cp for width, cp in text.contexts.items() if width in used}

    def __len__(self) -> int:
        return len(self._microbatches)

    def __str__(self) -> str:
        return f"{self._tokens:,} held-out tokens in {len(self)} microbatches"

    def key(self, number: int) -> int:
        """Return the key of a microbatch's program."""
        return self._text.key(self._microbatches[number])

    def put(self, number: int) -> Batch:
        """Read a microbatch and put it on the devices."""
        return self._text.put(self._microbatches[number])

    def streams(self, number: int) -> Int64[np.ndarray, "D"]:
        """Return the number of the group that each device is in."""
        grouping = self._microbatches[number].grouping
        return np.repeat(np.arange(len(grouping)), grouping)


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
        num_stages=config.parallel.pp,
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
