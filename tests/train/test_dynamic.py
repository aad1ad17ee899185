"""Training with dynamic context parallelism is training: the same gradients, curves and bits."""

import dataclasses
import functools
import io
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import hcp_jax as hcp
from hcp_jax.compiled import hlo
from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.sequence.packing import pack
from hcp_jax.train import data, dynamic, loop
from hcp_jax.train.batch import PlacedMicrobatch
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.dynamic import DynamicProgram, GroupedText, HeldOutGroups
from hcp_jax.train.evaluation import Evaluator, HeldOutStreams
from hcp_jax.train.losses import summed_losses
from hcp_jax.train.metrics import metrics
from hcp_jax.train.sections import LogConfig
from hcp_jax.train.step import (
    OptimizerConfig,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
)
from tests.kept_programs import kept_programs

MODEL = ModelConfig(
    vocab_size=264,
    num_layers=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="none",
)
M, LONGEST, ROWS = 16, 128, 6
MENU = [8, 4, 2, 1]
QUIET = rich.console.Console(file=io.StringIO())


@functools.cache
def corpus():
    """Documents of 8 to 200 bytes; those above `LONGEST` tokens are cut."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(3.2, 0.9, 200).astype(int) + 8, 200)
    text = b"all work and no play makes jack a dull boy. " * 8
    begins = rng.integers(0, 44, 200)
    return data.Corpus([text[i : i + n] for i, n in zip(begins, lengths, strict=True)], "a test")


def make_config(dynamic=(), parallel=(), **words):
    dynamic = {"enabled": True, "max_tokens_per_device": M, "menu": MENU, **dict(dynamic)}
    base = {
        "steps": 50,
        "batch_size": 3,
        "seq_len": LONGEST,
        "model": MODEL,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=5, clip_norm=None),
        "parallel": ParallelConfig(
            dynamic=DynamicConfig(**dynamic),
            **{"cp_outer": 4, "cp_inner": 2, "comm_type": "a2a+p2p", **dict(parallel)},
        ),
    }
    return TrainConfig(**{**base, **words})


class Run:
    """A program and its state, ready to make steps."""

    def __init__(self, config):
        self.config = config
        self.cp = config.parallel.context_parallel(config.model.num_layers)
        self.program = DynamicProgram(config, self.cp, corpus(), QUIET)
        optimizer = make_optimizer(config.optimizer, config.steps)
        fsdp = config.parallel.fsdp
        self.abstract = abstract_state(config.model, optimizer, self.cp, fsdp=fsdp)
        self.program.compile(self.abstract)
        self._initial = init_state(config.model, optimizer, config.seed, self.cp, fsdp=fsdp)
        self._beginning = self.program.data_state()

    def fresh(self):
        """The state before step 0, and the data where they were then."""
        self.program.restore_data(self._beginning)
        return jax.tree.map(jnp.copy, self._initial)

    def sums(self, params, step):
        """Loss, weight and gradients of a step over all devices, without its update."""
        sums = jax.device_get(self.program.menu.sums(params, step.microbatches))
        over = functools.partial(np.sum, axis=0)
        if self.config.parallel.fsdp:
            return sums._replace(weight=over(sums.weight))
        return jax.tree.map(over, sums)


CONFIGS = {
    "cp8": lambda: make_config(),
    "dp2-tp2-cp2-fsdp-remat": lambda: make_config(
        {"menu": [4, 2], "max_tokens_per_device": 2 * M},
        {"dp": 2, "tp": 2, "cp_outer": 1, "fsdp": True},
        model=dataclasses.replace(MODEL, remat="attention"),
    ),
}


@functools.cache
def run(name):
    return Run(CONFIGS[name]())


def documents_of(program):
    """The steps that the program makes, as documents: each its pairs of token and target."""
    for step in program._planned:
        yield [pairs_of(program, d) for mb in step for group in mb.documents for d in group]


def pairs_of(program, number):
    places = program._text.segments.refs(number)
    return np.stack([corpus().tokens_at(places), corpus().targets_at(places)], axis=1)


def rows_of(documents, rows=ROWS, length=LONGEST):
    """The documents as the fixed program has them: one behind the other in rows, padded."""
    held = [[] for _ in range(rows)]
    for pairs in sorted(documents, key=len, reverse=True):
        row = next(r for r in held if sum(map(len, r)) + len(pairs) <= length)
        row.append(pairs)
    batch = {
        name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "positions")
    }
    ids = np.zeros((rows, length), np.int32)
    for r, row in enumerate(held):
        at = 0
        for number, pairs in enumerate(row, 1):
            here = slice(at, at := at + len(pairs))
            batch["tokens"][r, here], batch["targets"][r, here] = pairs.T
            batch["positions"][r, here] = np.arange(len(pairs))
            ids[r, here] = number
    # Padding is a document of its own, of no weight.
    return batch | {"weights": (ids > 0).astype(np.float32), "mask": MODEL.mask(ids)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cp8", "dp2-tp2-cp2-fsdp-remat"])
def test_the_gradients_of_a_step_are_those_of_the_same_documents_on_one_device(name):
    of = run(name)
    params, documents, used = of.fresh().params, documents_of(of.program), set()
    whole = jax.device_get(params)
    for _ in range(20):
        step, held = of.program.next_batch(), next(documents)
        programs = {microbatch.key for microbatch in step.microbatches}
        if programs <= used:
            continue
        used |= programs
        sums = of.sums(params, step)
        assert sums.weight == sum(map(len, held))
        loss, grads = _static_gradients()(whole, rows_of(held))
        assert sums.loss / sums.weight == pytest.approx(float(loss), rel=1e-6)
        for got, exact in zip(jax.tree.leaves(sums.grads), jax.tree.leaves(grads), strict=True):
            assert np.max(np.abs(got / sums.weight - exact)) < 2e-6 * np.max(np.abs(exact))
    assert used == set(of.program.menu.contexts)


@pytest.mark.slow
def test_groups_evaluate_to_the_losses_of_fixed_streams_on_one_device():
    of, held_out = (
        run("cp8"),
        data.Corpus([b"held out " * n for n in (1, 3, 9, 14, 2, 1)], "a test"),
    )
    params = jax.tree.map(lambda x: 3 * x, of.fresh().params)  # losses of tokens differ
    text = of.program.held_out(held_out)
    groups = Evaluator(MODEL, text, seq_len=LONGEST)
    groups.compile(params)
    found = groups.evaluate(0, params)
    alone = hcp.ContextParallel(hcp.make_mesh(devices=jax.devices()[:1]), comm_type="p2p")
    streams = HeldOutStreams(
        held_out, alone, seq_len=LONGEST, batch_size=2, tokens=None, mask=MODEL.mask
    )
    fixed = Evaluator(MODEL, streams, seq_len=LONGEST)
    whole = jax.device_put(jax.device_get(params), jax.devices()[0])
    fixed.compile(whole)
    expected = fixed.evaluate(0, whole)
    for ours, theirs in (
        (found.overall, expected.overall),
        (found.by_position, expected.by_position),
    ):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=2e-6)
    # Every group has the losses of its documents; some documents are longer than a device's buffer,
    # and some buffers are not full.
    sizes, longest, alone_in_group = text._text.segments.sizes, 0, 0
    for number, microbatch in enumerate(text._microbatches):
        sums, counts = groups._sums(number, params)
        assert len(sums) == len(microbatch.grouping)
        for group, held in enumerate(microbatch.documents):
            assert counts[group].sum() == sizes[list(held)].sum()
            longest = max(longest, *sizes[list(held)], 0)
            alone_in_group += len(held) == 1
            losses = sum(_loss_alone(text, whole, document) for document in held)
            assert sums[group].sum() == pytest.approx(losses, rel=2e-6)
    assert longest > M
    assert alone_in_group
    assert sizes.sum() < len(text) * 8 * M


def _loss_alone(text, params, document):
    """The sum of the losses of a held-out document by itself, on one device."""
    refs = text._text.segments.refs(document)
    corpus = text._text._corpus
    pairs = np.stack([corpus.tokens_at(refs), corpus.targets_at(refs)], axis=1)
    return float(_summed_loss()(params, rows_of([pairs], rows=1)))


@functools.cache
def _summed_loss():
    return jax.jit(lambda params, batch: summed_losses(MODEL)(params, batch).total)


@pytest.mark.slow  # it shares the programs of slow tests
def test_a_held_out_document_that_no_group_holds_is_refused():
    program = run("cp8").program
    narrow = program._planned.limits._replace(
        config=dataclasses.replace(program._planned.limits.config, menu=[4])
    )
    text = GroupedText(run("cp8").config, program.menu.contexts, corpus())
    with pytest.raises(ValueError, match=r"held-out document \d+ has 128 tokens.*to 32 or more"):
        HeldOutGroups(text, narrow, None)


@functools.cache
def _static_gradients():
    def loss_of(params, batch):
        return summed_losses(MODEL)(params, batch).total / jnp.sum(batch["weights"])

    return jax.jit(jax.value_and_grad(loss_of))


@pytest.mark.slow
def test_gradients_are_reduced_once_a_step_however_many_microbatches_it_has():
    of = run("cp8")
    menu, scalars = of.program.menu, 8  # bytes, of the sums of losses and weights
    gradients = sum(4 * x.size for x in jax.tree.leaves(of.abstract.params))
    for width, program in menu.programs.items():
        assert _reduced_bytes(program) == 0, width
    assert _reduced_bytes(menu.update) == gradients + scalars
    # With FSDP they are reduced as they come.
    sharded = run("dp2-tp2-cp2-fsdp-remat").program.menu
    assert all(_reduced_bytes(program) > 0 for program in sharded.programs.values())


def _reduced_bytes(program):
    found = hlo.collectives(program.as_text())
    kinds = ("all-reduce", "reduce-scatter")
    return sum(c.bytes * c.count for c in found if c.kind in kinds and len(c.groups[0]) > 1)


@pytest.mark.slow
def test_the_curve_over_50_steps_is_that_of_static_cp_on_the_same_documents():
    of = run("cp8")
    config, documents = of.config, documents_of(of.program)
    static = make_train_step(config.model, config.optimizer, config.steps, of.cp)
    ours, theirs = of.fresh(), of.fresh()
    curve = []
    for _ in range(config.steps):
        ours, dynamic = of.program.step(ours, of.program.next_batch())
        theirs, fixed = static(theirs, of.cp.shard_batch(rows_of(next(documents))))
        assert dynamic["tokens"] == fixed["tokens"]
        curve.append((float(dynamic["loss"]), float(fixed["loss"])))
    ours, theirs = np.array(curve).T
    assert theirs[-5:].mean() < theirs[0] - 2
    assert np.max(np.abs(ours - theirs)) < 2e-5


def test_nothing_is_compiled_once_training_runs():
    of, events = run("cp8"), []

    def listen(event, *_, **__):
        events.append(event)

    state = of.fresh()
    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        state, _ = of.program.step(state, of.program.next_batch())
    jax.block_until_ready(state)
    assert not [event for event in events if "compile" in event]
    jax.jit(lambda x: x + 1)(np.float32(1))  # would it have been seen?
    assert [event for event in events if "compile" in event]
    jax.monitoring.unregister_event_duration_listener(listen)


def test_what_would_have_to_be_compiled_is_an_error_that_says_why():
    of = run("cp8")
    state, step = of.fresh(), of.program.next_batch()
    key, arrays = step.microbatches[0]
    for wrong, message in (
        ((key, arrays | {"weights": arrays["weights"].astype(jnp.int32)}), "weights.*int32"),
        ((key, arrays | {"tokens": arrays["tokens"][:, :-8]}), r"tokens.*1,120"),
        ((3, arrays), "groups of up to 3 devices has no compiled program.*not on the menu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            of.program.step(state, step._replace(microbatches=(PlacedMicrobatch(*wrong),)))


def test_a_step_of_one_microbatch_is_a_step():
    of = run("cp8")
    state, step = of.fresh(), of.program.next_batch()
    one = step._replace(microbatches=step.microbatches[:1])
    _, values = of.program.step(state, one)
    assert values["tokens"] == np.sum(one.microbatches[0].arrays["weights"])
    assert np.isfinite(values["loss"])


def test_a_process_packs_and_reads_the_tokens_of_its_own_devices_alone(monkeypatch):
    program = run("cp8").program
    planned = (mb for step in program._planned for mb in step if len(mb.grouping) > 2)
    narrow = next(mb for mb in planned if all(mb.documents))
    arrays, read = [], []

    def keep(cp, packed, rows, *, sliding_window):
        arrays.append(rows)

    class Watched:
        def tokens_at(self, places):
            read.extend(corpus().documents_at(places[places > 0]))
            return corpus().tokens_at(places)

        targets_at = corpus().targets_at

    monkeypatch.setattr(dynamic, "place_microbatch", keep)
    program._text.put(narrow)
    monkeypatch.setattr(dynamic, "own_devices", lambda _: range(3, 6))
    monkeypatch.setattr(program._text, "_corpus", Watched())
    program._text.put(narrow)
    whole, own = arrays
    for name, rows in whole.items():
        np.testing.assert_array_equal(own[name], rows[3:6], err_msg=name)
    held = pack(narrow, program._text.segments.sizes, M).document[3:6]
    assert set(read) == {program._text.segments.document(d) for d in held[held >= 0]}
    assert len(set(read)) < sum(map(len, narrow.documents))


def test_a_step_tells_the_documents_that_it_has_tokens_of():
    program = run("cp8").program
    run("cp8").fresh()
    step, planned = program.next_batch(), next(iter(program._planned))
    segments = program._text.segments
    held = {segments.document(d) for mb in planned for group in mb.documents for d in group}
    assert step.documents == tuple(sorted(held))


def test_the_pairs_of_a_step_are_those_that_its_masks_show():
    run("cp8").fresh()
    step = run("cp8").program.next_batch()
    masks = [jax.device_get(mb.arrays["mask"]) for mb in step.microbatches]
    shown = [mask.intervals for mask in masks]
    assert step.facts["pairs"] == sum((end - start).sum() for start, end in shown)
    assert step.facts["microbatches"] == len(masks)
    weights = sum(mb.arrays["weights"].sum() for mb in step.microbatches)
    assert step.facts["fill"] == pytest.approx(float(weights) / (len(masks) * 8 * M))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of seconds on a file of uneven lines, and what it compiles kept for the next one."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = ("abc " * (2 + i * i % 29) + f"{i}" for i in range(100))
    text.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines))
    with kept_programs(tmp_path_factory.mktemp("cache"), 0.5):
        yield make_config(
            {"menu": MENU[:2], "lookahead": 4},
            name="small",
            steps=12,
            run_dir=str(tmp_path_factory.mktemp("runs")),
            model=dataclasses.replace(MODEL, num_layers=1),
            data=data.DataConfig(path=str(text)),
            log=LogConfig(every=4),
        )


def train(config, resume=None):
    """The outcome, and what was printed."""
    printed = io.StringIO()
    console = rich.console.Console(file=printed, width=100)
    return loop.train(config, resume=resume, console=console), printed.getvalue()


def curve(folder):
    """What must not depend on when a run was stopped."""
    timed = re.compile("seconds|tokens_per_second")
    return [{k: v for k, v in line.items() if not timed.search(k)} for line in metrics.read(folder)]


@pytest.fixture(scope="module")
def whole(small):
    return train(small)


@pytest.mark.slow
def test_a_run_tells_its_menu_its_tokens_and_the_programs_it_used(whole):
    outcome, printed = whole
    assert outcome.steps == 12
    for part in (
        "step: 384 tokens of whole documents, each document on 1 to 8 devices",
        "programs for groups of up to 4, 8 devices",
        " microbatches: groups of up to ",
        "; groups of up to ",
    ):
        assert part in printed
    for line in curve(outcome.folder):
        assert line["microbatches"] >= 1
        assert line["fill"] == pytest.approx(line["tokens"] / (line["microbatches"] * 8 * M))
        assert line["groupings"] >= 1
    assert len({line["tokens"] for line in curve(outcome.folder)}) > 6


@pytest.mark.slow
def test_a_run_that_was_stopped_in_a_window_goes_on_to_the_same_bits(small, whole, monkeypatch):
    write = metrics.Recorder.write

    def stop_at_step_4(self, step, values):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Recorder, "write", stop_at_step_4)
        outcome, _ = train(small)
    assert 5 <= outcome.steps < 8
    folder = outcome.folder
    elsewhere = folder.with_name("elsewhere")
    shutil.copytree(folder, elsewhere)
    train(small, resume=folder)
    assert curve(folder) == curve(whole[0].folder)

    # On half as many groups of devices: other microbatches of the same documents of each step.
    parallel = {"tp": 2, "cp_outer": 2}
    other = make_config({"menu": [4, 2], "max_tokens_per_device": 2 * M, "lookahead": 4}, parallel)
    train(dataclasses.replace(small, parallel=other.parallel), resume=elsewhere)
    rest = zip(curve(elsewhere)[:8], curve(whole[0].folder), strict=False)
    for step, (a, b) in enumerate(rest):
        assert a["tokens"] == b["tokens"], step
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5), step


@pytest.mark.slow
def test_a_run_with_groups_and_one_without_cannot_go_on_as_the_other(small, whole):
    fixed = dataclasses.replace(small, steps=20, parallel=ParallelConfig(cp_outer=4, cp_inner=2))
    says = "a run keeps these settings: parallel.dynamic.enabled was True and is False"
    with pytest.raises(ValueError, match=says):
        train(fixed, resume=whole[0].folder)


@pytest.mark.parametrize(
    ("dynamic", "parallel", "error", "message"),
    [
        (
            {"max_tokens_per_device": 8},
            {},
            ValueError,
            r"document 12 has 123 tokens.*to 16 or more",
        ),
        (
            {"menu": [8]},
            {"comm_type": "a2a"},
            NotImplementedError,
            "'a2a' keeps a document on devices",
        ),
        ({"cost": "/does/not/exist"}, {}, OSError, "exist"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(
    small, tmp_path, dynamic, parallel, error, message
):
    config = make_config({"menu": MENU[:2], **dynamic}, parallel)
    run_dir = tmp_path / "runs"
    with pytest.raises(error, match=message):
        train(dataclasses.replace(small, parallel=config.parallel, run_dir=str(run_dir)))
    assert not run_dir.exists()
