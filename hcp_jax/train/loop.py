"""`hcp train`: the loop around the step, and all that a person sees of it.

The host stays off the critical path: a thread packs the next batches, a step is dispatched before
the metrics of the one before are fetched, and checkpoints are written while training goes on.

Everything that a run depends on is in its config and its folder, so that `--resume` continues it
to the same bits as if it had never stopped. Ctrl-C (or SIGTERM, as a cluster's scheduler sends it)
ends it after the step in hand, with a checkpoint.
"""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import socket
import time
from typing import Any

import grain
import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils

from hcp_jax.context import ContextParallel
from hcp_jax.train import config as configuration
from hcp_jax.train import data, metrics, traffic
from hcp_jax.train.checkpoint import Checkpoints
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.progress import Progress
from hcp_jax.train.signals import Signals
from hcp_jax.train.step import (
    TrainState,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: its run folder.
        steps: optimizer steps done, over all parts of the run.
        stopped_by: the signal that ended it early; None if it made all its steps.
    """

    folder: pathlib.Path
    steps: int
    stopped_by: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hcp train`."""
    configuration.add_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on from the last checkpoint of this run folder, or of the 'latest'; with its own "
        "config unless one is given",
    )
    parser.add_argument(
        "--distributed",
        metavar="HOW",
        help="be one of several processes: 'auto' under Slurm, Open MPI or Kubernetes, elsewhere "
        "ADDRESS:PORT,PROCESS,PROCESSES of the first process, of this one, and of all",
    )


def num_devices(args: argparse.Namespace) -> int:
    """How many devices this process must simulate where there is no GPU."""
    total = _config_of(args, _resumed_folder(args)).parallel.num_devices
    return total // _cluster(args.distributed).get("num_processes", 1)


def run(args: argparse.Namespace) -> int:
    """Runs `hcp train`; returns 0, or 128 plus the number of the signal that stopped it."""
    if args.distributed:
        cluster = _cluster(args.distributed)
        if cluster.get("process_id") == 0:
            _require_free_port(cluster["coordinator_address"])
        jax.distributed.initialize(**cluster)
    folder = _resumed_folder(args)
    outcome = train(_config_of(args, folder), resume=folder)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def train(
    config: TrainConfig,
    *,
    resume: pathlib.Path | None = None,
    console: rich.console.Console | None = None,
) -> Outcome:
    """Trains, or goes on training, and leaves a run folder behind.

    The folder has config.yaml (which can be run again), metrics.jsonl, TensorBoard events, loss.png
    and the checkpoints. Nothing is written before the step has compiled.

    Args:
        config: the run.
        resume: the folder of a run to go on with; None for a new one.
        console: where to print, standard output if None; only the first of several processes does.

    Raises:
        ValueError: for anything about config, data, mesh or checkpoint that cannot be.
        FloatingPointError: if the loss is no number any more.
    """
    console = console or rich.console.Console(highlight=False)
    console.quiet = console.quiet or jax.process_index() != 0
    corpus = data.open_corpus(config.data, config.model.vocab_size)
    cp = config.parallel.context_parallel(config.model.num_layers)
    fsdp = config.parallel.fsdp
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract = abstract_state(config.model, optimizer, cp, fsdp=fsdp)
    _print(console, _introduction(config, cp, corpus, abstract))

    batches = data.make_batches(
        corpus,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        mask=config.model.mask,
        prefetch=config.data.prefetch,
    )
    with contextlib.closing(batches):
        state = None if resume is None else _restore(config, resume, abstract, batches)
        step: Any = make_train_step(
            config.model,
            config.optimizer,
            config.steps,
            cp,
            fsdp=fsdp,
            accumulation=config.accumulation,
        )
        batch = cp.shard_batch(next(batches))
        began = time.perf_counter()
        compiled = step.lower(abstract, batch).compile()
        _print(console, _compiled(time.perf_counter() - began, compiled))

        folder = _new_folder(config) if resume is None else resume
        if state is None:
            state = init_state(config.model, optimizer, config.seed, cp, fsdp=fsdp)
        title = f"{config.name}: {_in_short(cp)}"
        with _Keeper(config, folder, int(state.step), title) as keeper:
            return _make_steps(config, cp, keeper, console, compiled, state, batch, batches)


class _Keeper:
    """Keeps what a run leaves in its folder: metrics, plot and checkpoints."""

    def __init__(self, config: TrainConfig, folder: pathlib.Path, start: int, title: str):
        self.folder, self._title = folder, title
        self._checkpoints = _checkpoints(config, folder)
        self._recorder = None
        if jax.process_index() == 0:
            (folder / "config.yaml").write_text(configuration.dump(config))
            self._recorder = metrics.Recorder(folder, start, config.log.tensorboard)

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(self, *_) -> None:
        self._checkpoints.close()
        if self._recorder is not None:
            self._recorder.close()
            metrics.plot(self.folder, self._title)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of a step, unless they show that it went wrong."""
        if not math.isfinite(values["loss"]):
            last = self._checkpoints.latest()
            saved = f"The last checkpoint is of step {last}." if last else "There is no checkpoint."
            raise FloatingPointError(
                f"the loss of step {step} is {values['loss']}. {saved} A lower "
                "optimizer.learning_rate, more warmup_steps or a lower clip_norm may help."
            )
        if self._recorder is not None:
            self._recorder.write(step, values)

    def save(self, done: int, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Begins to write a checkpoint."""
        self._checkpoints.save(done, state, batches.get_state())


def _make_steps(
    config: TrainConfig,
    cp: ContextParallel,
    keeper: _Keeper,
    console: rich.console.Console,
    compiled: Any,
    state: TrainState,
    batch: dict[str, Any],
    batches: grain.DatasetIterator,
) -> Outcome:
    """All steps that are left, or those until a signal comes; `batch` is that of the first."""
    start = done = int(state.step)
    every = config.checkpoint.every
    shown: list[float] = []

    def report(step: int, of_step: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in jax.device_get(of_step).items()}
        keeper.record(step, values | progress.show(step, values))
        shown.append(values["loss"])

    with (
        Signals() as signals,
        Progress(
            console, config.steps, start, config.log.every, config.tokens_per_step
        ) as progress,
    ):
        before: tuple[int, dict] | None = None
        while True:
            state, of_step = compiled(state, batch)
            # The devices work on this step while the host sees to the one before.
            if before is not None:
                report(*before)
            before, done = (done, of_step), done + 1
            stopped = signals.agreed(done)
            due = every is not None and done % every == 0
            if due or stopped is not None or done == config.steps:
                # A step whose loss is no number must not become a checkpoint.
                report(*before)
                before = None
                keeper.save(done, state, batches)
            if stopped is not None or done == config.steps:
                break
            batch = cp.shard_batch(next(batches))
    finished = done == config.steps
    _print(console, _ending(keeper.folder, start, done, shown, progress.seconds))
    if not finished:
        _print(
            console,
            f"Stopped after step {done} of {config.steps}. Go on with:\n"
            f"  hcp train --resume {keeper.folder}",
        )
    return Outcome(keeper.folder, done, None if finished else stopped)


def _restore(
    config: TrainConfig,
    folder: pathlib.Path,
    abstract: TrainState,
    batches: grain.DatasetIterator,
) -> TrainState:
    """The state of a run, and its batches put where they were."""
    checkpoints = _checkpoints(config, folder)
    restored = checkpoints.restore(abstract)
    checkpoints.close()
    if int(restored.state.step) >= config.steps:
        raise ValueError(
            f"{folder} has made all its {config.steps} steps; to go on, give --steps a greater "
            "number."
        )
    data.restore(batches, restored.data)
    return restored.state


def _checkpoints(config: TrainConfig, folder: pathlib.Path) -> Checkpoints:
    return Checkpoints(folder, dataclasses.asdict(config.model), config.checkpoint.keep)


def _new_folder(config: TrainConfig) -> pathlib.Path:
    """Makes `run_dir/name-001`, or with the first number after it that is free."""
    number = 0
    if jax.process_index() == 0:
        while True:
            number += 1
            try:
                _folder(config, number).mkdir(parents=True)
                break
            except FileExistsError:
                continue
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return _folder(config, number)


def _folder(config: TrainConfig, number: int) -> pathlib.Path:
    return pathlib.Path(config.run_dir, f"{config.name}-{number:03}")


def _resumed_folder(args: argparse.Namespace) -> pathlib.Path | None:
    """The folder of the run that a command line goes on with."""
    if args.resume is None:
        return None
    if args.resume != "latest":
        folder = pathlib.Path(args.resume)
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"--resume: {folder} is no run folder: it has no config.yaml.")
        return folder
    run_dir = pathlib.Path(configuration.from_arguments(args).run_dir)
    configs = list(run_dir.glob("*/config.yaml"))
    if not configs:
        raise ValueError(f"--resume latest: there are no runs in {run_dir}.")
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def _config_of(args: argparse.Namespace, folder: pathlib.Path | None) -> TrainConfig:
    """The config named, or that of the run resumed; overridden."""
    if args.config is not None or folder is None:
        if args.config is None:
            raise ValueError("hcp train needs a config (configs/quickstart.yaml) or --resume.")
        return configuration.from_arguments(args)
    return configuration.load(folder / "config.yaml", args.overrides or ())


def _cluster(how: str | None) -> dict[str, Any]:
    """What `jax.distributed.initialize` needs to be told."""
    if how in (None, "auto"):
        return {}
    parts = how.split(",")
    host, _, port = parts[0].rpartition(":")
    if len(parts) != 3 or not host or not all(p.isdecimal() for p in (port, *parts[1:])):
        raise ValueError(
            f"--distributed must be 'auto' or ADDRESS:PORT,PROCESS,PROCESSES (such as "
            f"10.0.0.1:1234,0,4), got {how!r}."
        )
    process, processes = int(parts[1]), int(parts[2])
    if process >= processes:
        raise ValueError(
            f"--distributed {how}: the processes of {processes} count from 0; {process} is none "
            "of them."
        )
    return {
        "coordinator_address": parts[0],
        "process_id": process,
        "num_processes": processes,
    }


def _require_free_port(address: str) -> None:
    """Told here, since jax's coordinator dies of a segmentation fault where a port is taken."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"--distributed: port {port} cannot be used here ({error.strerror}); choose "
                "another one, the same for every process."
            ) from None


def _print(console: rich.console.Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _introduction(
    config: TrainConfig, cp: ContextParallel, corpus: data.Corpus, abstract: TrainState
) -> str:
    model = config.model
    num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
    fsdp = config.parallel.fsdp
    sent = traffic.describe(cp, model, config.batch_size, config.seq_len, num_params, fsdp=fsdp)
    return "\n".join(
        [
            cp.describe(),
            f"model: {model.num_layers} layers, {num_params / 1e6:,.2f} M parameters, "
            f"{model.num_heads} query heads and {model.num_kv_heads} kv heads of {model.head_dim}",
            f"data: {corpus}",
            f"step: {config.batch_size} streams of {config.seq_len:,} tokens"
            + (f" in {config.accumulation} microbatches" if config.accumulation > 1 else ""),
            "each device sends per step:",
            *(f"  {line}" for line in sent),
        ]
    )


def _compiled(seconds: float, compiled: Any) -> str:
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return f"compiled in {seconds:.0f} s: {total / 2**20:,.0f} MiB per device"


def _ending(
    folder: pathlib.Path, start: int, done: int, losses: list[float], seconds: float
) -> str:
    last = losses[-10:]
    return (
        f"{done - start} steps in {seconds:.0f} s: loss {losses[0]:.3f} at step {start}, "
        f"{sum(last) / len(last):.3f} over the last {len(last)} steps\n"
        f"{folder}: metrics.jsonl, loss.png, tensorboard, config.yaml, checkpoints"
    )


def _in_short(cp: ContextParallel) -> str:
    """The mesh in a title, such as "a2a+p2p on 4 × 2 devices"."""
    comm_type = cp.comm_type if isinstance(cp.comm_type, str) else "mixed comm types"
    sizes = " × ".join(str(size) for size in cp.mesh.shape.values() if size > 1)
    return f"{comm_type} on {sizes or 'one'} device{'s' if sizes else ''}"
