"""Dynamic against fixed context parallelism: the same documents, in one run, step by step in turn.

    python benchmarks/dynamic.py configs/dynamic-cp.yaml --count 8 --rows timed.jsonl

Dynamic is what `hcp train` runs with the config. Fixed is the config's own dp, cp and comm type:
each step's documents are packed into rows of `seq_len` by best fit, rows of like work side by side,
and as many rows make a microbatch as have no more tokens a device. Both sum gradients over
microbatches in the same way, so that only what is between differs.

On simulated devices look at the CPU seconds: the devices share a machine's cores, so that one that
waits gives its core to another, and a slow link is a copy in memory. They show what is computed and
copied, not what idle devices or real links would cost. `--rows` writes a line for each dynamic
microbatch that `hcp dynamic calibrate` fits the cost model to; on GPUs, that is what it is for.
"""

import argparse
import itertools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hcp_jax.cli import set_up_platform
from hcp_jax.train import config as configuration

if TYPE_CHECKING:
    from hcp_jax.train.batch import Batch, PlacedMicrobatch


def main() -> None:
    """Compile both, run the steps in turn, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    configuration.add_arguments(parser)
    parser.add_argument("--count", type=int, default=8, help="steps that are timed")
    parser.add_argument("--rows", type=pathlib.Path, help="write timed microbatches here")
    args = parser.parse_args()
    config = configuration.from_arguments(args)
    set_up_platform(config.parallel.num_devices)
    dynamic, fixed = Dynamic(config), Fixed(config)
    print(f"dynamic: {'; '.join(dynamic.program.describe(0))}")
    print(
        f"fixed: dp {fixed.cp.axis_size('dp')} × cp {fixed.cp.size}, {fixed.cp.comm_type}, "
        f"{fixed.rows} rows of {fixed.length} tokens"
    )
    took: dict[str, list[tuple[float, float]]] = {"dynamic": [], "fixed": []}
    number = {"dynamic": 0, "fixed": 0}
    tokens = 0
    # The first step of each is not counted: pages are touched for the first time.
    for step, documents in enumerate(itertools.islice(dynamic.documents(), args.count + 1)):
        for name, program in (("dynamic", dynamic), ("fixed", fixed)):
            before = time.perf_counter(), time.process_time()
            microbatches = program.step(documents)
            after = time.perf_counter(), time.process_time()
            if step:
                took[name].append((after[0] - before[0], after[1] - before[1]))
                number[name] += microbatches
        tokens += sum(map(len, documents)) if step else 0
        if not step:
            dynamic.timed.clear()
    if args.rows is not None:
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in dynamic.timed))
    wall, cpu = ({n: sum(t[i] for t in took[n]) for n in took} for i in (0, 1))
    print(f"{args.count} steps, {tokens} tokens; losses differ by {dynamic.largest(fixed):.1e}")
    for name in took:
        print(
            f"{name:8} {number[name]:4d} microbatches  {wall[name]:8.2f} s  "
            f"{args.count / wall[name]:6.3f} steps/s  {cpu[name]:8.2f} CPU s"
        )
    of_steps = sorted(f[1] / d[1] for d, f in zip(took["dynamic"], took["fixed"], strict=True))
    print(
        f"fixed / dynamic: {wall['fixed'] / wall['dynamic']:.2f} by the clock, "
        f"{cpu['fixed'] / cpu['dynamic']:.2f} by CPU seconds (single steps {of_steps[0]:.2f} to "
        f"{of_steps[-1]:.2f})"
    )


class Dynamic:
    """The program of `hcp train`."""

    def __init__(self, config: configuration.TrainConfig):
        import jax
        import rich.console

        from hcp_jax.train import data
        from hcp_jax.train.dynamic import DynamicProgram

        cp = config.parallel.context_parallel(config.model.num_layers)
        corpus = data.open_corpus(config.data, config.model.vocab_size)
        self.program = DynamicProgram(config, cp, corpus, rich.console.Console(stderr=True))
        self.state = _state(config, cp)
        self.program.compile(jax.tree.map(_abstract, self.state))
        self.losses: list[float] = []
        self.timed: list[dict[str, Any]] = []

    def documents(self):
        """Yield the documents of every step, as pairs of a token and its target."""
        self._planned = iter(self.program._planned)
        for planned in iter(self.program._planned):
            numbers = (d for mb in planned for group in mb.documents for d in group)
            yield [self._pairs(number) for number in numbers]

    def _pairs(self, number: int) -> np.ndarray:
        places, corpus = self.program._text.segments.refs(number), self.program._text._corpus
        return np.stack([corpus.tokens_at(places), corpus.targets_at(places)], axis=1)

    def step(self, documents: Sequence[np.ndarray]) -> int:
        """Make the next step, of these documents; return the number of its microbatches."""
        import jax

        batch = self.program.next_batch()
        sizes, tokens = self.program._text.segments.sizes, self.program._tokens
        sums = self.program.menu.zeros()
        for planned, placed in zip(next(self._planned), batch.microbatches, strict=True):
            began = time.perf_counter()
            sums = jax.block_until_ready(self.program.menu.add(self.state.params, sums, placed))
            seconds = time.perf_counter() - began
            lengths = [[int(sizes[d]) for d in group] for group in planned.documents]
            self.timed.append(
                {
                    "grouping": planned.grouping,
                    "lengths": lengths,
                    "tokens": tokens,
                    "seconds": seconds,
                }
            )
        self.state, metrics = self.program.menu.update(self.state, sums)
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"]))
        return len(batch.microbatches)

    def largest(self, other: "Fixed") -> float:
        """Return the largest difference between the losses of both."""
        return float(np.max(np.abs(np.subtract(self.losses, other.losses))))


class Fixed:
    """The same documents at one context-parallel size, in packed rows."""

    def __init__(self, config: configuration.TrainConfig):
        import jax
        import rich.console

        from hcp_jax.train.menu import Menu

        self.model = config.model
        self.cp = config.parallel.context_parallel(config.model.num_layers)
        tokens = config.parallel.dynamic.tokens * self.cp.size
        self.length, self.rows = config.seq_len, tokens // config.seq_len * self.cp.axis_size("dp")
        if not self.rows:
            raise ValueError(
                f"a row of {self.length} tokens does not fit cp={self.cp.size} buffers."
            )
        self.state = _state(config, self.cp)
        abstract = jax.tree.map(_abstract, self.state)
        self._menu = Menu(config, {"rows": self.cp})
        self._menu.compile(abstract, lambda _: self._placed([]).arrays, rich.console.Console())
        self.losses: list[float] = []

    def step(self, documents: Sequence[np.ndarray]) -> int:
        """Make a step of these documents; return the number of its microbatches."""
        import jax

        rows = self._best_fit(documents)
        microbatches = [rows[i : i + self.rows] for i in range(0, len(rows), self.rows)]
        sums = self._menu.zeros()
        for held in microbatches:
            placed = self._placed(held)
            sums = jax.block_until_ready(self._menu.add(self.state.params, sums, placed))
        self.state, metrics = self._menu.update(self.state, sums)
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"]))
        return len(microbatches)

    def _best_fit(self, documents: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        rows: list[list[np.ndarray]] = []
        for document in sorted(documents, key=len, reverse=True):
            room = [self.length - sum(map(len, row)) - len(document) for row in rows]
            fits = [i for i, left in enumerate(room) if left >= 0]
            if fits:
                rows[min(fits, key=lambda i: room[i])].append(document)
            else:
                rows.append([document])
        return sorted(rows, key=lambda row: -sum(len(d) ** 2 for d in row))

    def _placed(self, held: Sequence[Sequence[np.ndarray]]) -> "PlacedMicrobatch":
        from hcp_jax.train.batch import PlacedMicrobatch

        rows = [*held, *[[]] * (self.rows - len(held))]
        batch = cast("Batch", self.cp.shard_batch(self._packed(rows)))
        return PlacedMicrobatch("rows", batch)

    def _packed(self, rows: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
        from hcp_jax.sequence.mask import documents

        pairs = np.zeros((len(rows), self.length, 2), np.int32)
        ids, positions = (np.zeros((len(rows), self.length), np.int32) for _ in range(2))
        for r, row in enumerate(rows):
            end = 0
            for number, document in enumerate(row, 1):
                begin, end = end, end + len(document)
                pairs[r, begin:end], ids[r, begin:end] = document, number
                positions[r, begin:end] = np.arange(len(document))
        return {
            "tokens": pairs[..., 0],
            "targets": pairs[..., 1],
            "positions": positions,
            "weights": (ids > 0).astype(np.float32),
            "mask": self.model.mask() & documents(ids, padding_id=0),
        }


def _state(config: configuration.TrainConfig, cp: Any) -> Any:
    from hcp_jax.train.step import init_state, make_optimizer

    optimizer = make_optimizer(config.optimizer, config.steps)
    return init_state(config.model, optimizer, config.seed, cp, fsdp=config.parallel.fsdp)


def _abstract(x: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


if __name__ == "__main__":
    main()
