"""Run `hcp train` from beginning to end: put together data, program, run folder and steps.

Everything that a run depends on is in its config and its folder, so that `--resume` continues it
to the same bits as if it had never stopped. Ctrl-C (or SIGTERM, which a cluster's scheduler sends)
ends it after the current step, with a checkpoint.
"""

import contextlib
import pathlib
import time
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import jax
import rich.console

from hcp_jax.base import terminal
from hcp_jax.kernels import expert_product
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train import evaluation, folder, lock
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import fingerprint
from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.dynamic import DynamicProgram
from hcp_jax.train.evaluation import Evaluator
from hcp_jax.train.folder import RunFolder
from hcp_jax.train.hf import weights
from hcp_jax.train.hosts.signals import Signals
from hcp_jax.train.hosts.watchdog import Peers
from hcp_jax.train.metrics.meter import Meter
from hcp_jax.train.metrics.profile import Profiler, ProfileSteps, check_profile
from hcp_jax.train.optimizer import fitted_warmup
from hcp_jax.train.pipelined import describe_stages, make_evaluator
from hcp_jax.train.program import FixedProgram, Program
from hcp_jax.train.remat_choice import memory_by_kind, with_remat
from hcp_jax.train.resuming import Resumption
from hcp_jax.train.step import TrainState
from hcp_jax.train.steps import Outcome, Steps


def train(
    config: TrainConfig,
    *,
    resume: pathlib.Path | None = None,
    begin: bool = False,
    console: rich.console.Console | None = None,
    profile: ProfileSteps | None = None,
    peers: Peers | None = None,
    accept: Collection[str] = (),
    signals: Signals | None = None,
) -> Outcome:
    """Train, or resume a training, and write a run folder.

    The folder has config.yaml (which can be run again), metrics.jsonl, TensorBoard events, loss.png
    and the checkpoints; with `eval.every`, also eval.jsonl and eval_by_position.png. Nothing is
    written before the step has compiled.

    Args:
        config: the run.
        resume: the folder of a run to resume; None for a new run.
        begin: whether to start a run in that folder if it has no checkpoint.
        console: where process 0 prints; None: standard output.
        profile: steps to trace into the folder `profile` of the run folder.
        peers: the connections to the other processes, which must have the same data.
        accept: what may differ from the run that is resumed: words of `resuming.CONSENT`.
        signals: the handler of Ctrl-C and SIGTERM; None: they ask to stop while steps are made.

    Raises:
        ValueError: if config, data, mesh and checkpoint do not fit together; if another process
            trains in the folder.
        FloatingPointError: if too many steps in a row had a loss or gradient that is not finite.
    """
    console = console or terminal.console()
    console.quiet = console.quiet or jax.process_index() != 0
    corpus, held_out, files = _open_texts(config, peers)
    cp = config.parallel.context_parallel(config.model.num_layers)
    # The run folder keeps "auto": a resumed run may be on other GPUs.
    computed, chosen = with_remat(config, cp, memory_by_kind(cp.device_kind))
    if resume is None and config.init_from is not None:
        _print(console, weights.check(config.model, config.init_from, config.seq_len))
    kind = DynamicProgram if config.parallel.dynamic.enabled else FixedProgram
    with contextlib.closing(kind(computed, cp, corpus, console)) as program, ExitStack() as held:
        _print(console, "\n".join([_introduction(config, cp, corpus, program), *chosen]))
        state = None
        if resume is not None:
            held.enter_context(lock.held(resume))
            resumption = Resumption(config, files, frozenset(accept))
            state = _restore(resumption, resume, program, begin, console)
        evaluator = None
        if held_out is not None:
            evaluator = make_evaluator(computed, program.held_out(held_out))
        if resume is not None and state is not None and int(state.step) >= config.steps:
            return _conclude(config, resume, evaluator, state, files, begin, console)
        check_profile(profile, 0 if state is None else int(state.step), config.steps)
        _compile(config, program, evaluator, held_out, console)
        path = _new_folder(config, held) if resume is None else resume
        if state is None:
            state = weights.initial_state(config, program.form, path)
        return _make_steps(
            config, path, program, evaluator, state, cp, files, profile, signals, console
        )


def _new_folder(config: TrainConfig, held: ExitStack) -> pathlib.Path:
    """Make a run folder, and hold its lock."""
    path = folder.make_new(config)
    held.enter_context(lock.held(path))
    return path


def _make_steps(
    config: TrainConfig,
    path: pathlib.Path,
    program: Program,
    evaluator: Evaluator | None,
    state: TrainState,
    cp: ContextParallel,
    files: dict[str, Any],
    profile: ProfileSteps | None,
    signals: Signals | None,
    console: rich.console.Console,
) -> Outcome:
    """Make the steps after `state` and write them into the run folder."""
    title, start = f"{config.name}: {_describe_mesh(cp)}", int(state.step)
    with (
        RunFolder(config, path, start, title, files) as run,
        Profiler(profile, start, config.steps, path) as profiler,
    ):
        meter = Meter(config.model, cp.mesh)
        steps = Steps(config, program, evaluator, run, console, profiler, meter)
        outcome = steps.make(state, signals)
    kept = ", ".join(sorted(entry.name for entry in path.iterdir()))
    _print(console, f"{path}: {kept}")
    return outcome


def _open_texts(
    config: TrainConfig, peers: Peers | None
) -> tuple[Corpus, Corpus | None, dict[str, Any]]:
    """Return the text to train on, that to evaluate on, and the fingerprint of their files."""
    corpus, held_out = evaluation.open_corpora(config.data, config.eval, config.model.vocab_size)
    held_out_path = config.eval.path if config.eval.every is not None else None
    files = fingerprint.run_fingerprint(config.data, held_out_path)
    if peers is not None:
        peers.agree(corpus.fingerprint())
        peers.agree({"the contents of the text's files": fingerprint.summary(files)})
    return corpus, held_out, files


def _compile(
    config: TrainConfig,
    program: Program,
    evaluator: Evaluator | None,
    held_out: Corpus | None,
    console: rich.console.Console,
) -> None:
    """Compile all that the run needs, and print how long it took and the memory it needs."""
    began = time.perf_counter()
    abstract = program.form.trained
    size = program.compile(abstract)
    beside = 0 if evaluator is None else evaluator.compile(abstract.params)
    took = time.perf_counter() - began
    _print(console, f"compiled in {took:.0f} s: {size / 2**20:,.0f} MiB per device")
    if evaluator is not None:
        every, more = config.eval.every, f"{beside / 2**20:,.0f} MiB beside the state"
        _print(console, f"evaluation every {every} steps: {evaluator}; {more}")
    if held_out is not None and config.eval.path is not None:
        _print(console, "\n".join(f"  {line}" for line in held_out.report))


def _restore(
    resumption: Resumption,
    path: pathlib.Path,
    program: Program,
    begin: bool,
    console: rich.console.Console,
) -> TrainState | None:
    """Restore the data of a run, and return its state; None if there is no checkpoint yet."""
    if begin and not folder.has_checkpoint(path):
        return None
    config = resumption.config
    checkpoints = folder.open_checkpoints(config, path)
    restored = checkpoints.restore(program.form.stored, resumption.require)
    checkpoints.close()
    for line in resumption.describe(restored):
        _print(console, line)
    for line in resumption.restore_data(program, restored.data):
        _print(console, line)
    return program.form.take(restored.state)


def _conclude(
    config: TrainConfig,
    path: pathlib.Path,
    evaluator: Evaluator | None,
    state: TrainState,
    files: dict[str, Any],
    begin: bool,
    console: rich.console.Console,
) -> Outcome:
    """End a run that has made all its steps; evaluate if a signal stopped it before it did.

    Raises:
        ValueError: if there is nothing to do, and `begin` does not say that this is fine.
    """
    made = f"{path} has made all its {config.steps} steps"
    if evaluator is not None and not folder.has_evaluation(path, config.steps):
        _print(console, f"{made}; its last evaluation is missing and is done now.")
        evaluator.compile(state.params)
        with RunFolder(config, path, config.steps, config.name, files) as run:
            found = evaluator.evaluate(config.steps, state.params)
            assert found is not None
            run.record_evaluation(found)
            _print(console, str(found))
    elif not begin:
        raise ValueError(f"{made}; to go on, give --steps a greater number.")
    else:
        _print(console, f"{made}.")
    return Outcome(path, config.steps)


def _describe_warmup(config: TrainConfig) -> list[str]:
    wanted, fitted = config.optimizer.warmup_steps, fitted_warmup(config.optimizer, config.steps)
    if wanted == fitted:
        return []
    return [
        f"warm-up: {fitted} step{'s' * (fitted != 1)}, since {wanted} do not fit into a training "
        f"of {config.steps}"
    ]


def _print(console: rich.console.Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _introduction(
    config: TrainConfig,
    cp: ContextParallel,
    corpus: Corpus,
    program: Program,
) -> str:
    model = config.model
    num_params = program.form.num_params
    depths = f" and {model.mtp_depths} of multi-token prediction" if model.mtp_depths else ""
    return "\n".join(
        [
            cp.describe(),
            f"model: {model.num_layers} layers{depths}, {num_params / 1e6:,.2f} M parameters, "
            f"{model.num_heads} query heads and {model.num_kv_heads} kv heads of {model.head_dim}",
            *_describe_experts(model, cp),
            f"data: {corpus}",
            *_describe_warmup(config),
            *(f"  {line}" for line in corpus.report),
            *describe_stages(config),
            *program.describe(num_params),
        ]
    )


def _describe_experts(model: ModelConfig, cp: ContextParallel) -> list[str]:
    if model.moe is None:
        return []
    how = expert_product.describe(
        model.moe.product, model.compute_dtype, cp.platform, cp.device_kind
    )
    return [
        f"experts: {model.moe.num_experts_per_tok} of {model.moe.num_experts} for each token, "
        f"multiplied by {how}"
    ]


def _describe_mesh(cp: ContextParallel) -> str:
    """Return the mesh as text for a title, such as "a2a+p2p on 4 × 2 devices"."""
    comm_type = cp.comm_type if isinstance(cp.comm_type, str) else "mixed comm types"
    sizes = " × ".join(str(size) for size in cp.mesh.shape.values() if size > 1)
    return f"{comm_type} on {sizes or 'one'} device{'s' if sizes else ''}"
