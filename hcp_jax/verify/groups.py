"""Check documents on groups of devices against one device, for a config with dynamic CP.

The checks cover every program of the menu that training on the config's data would compile; a
program serves all groupings up to its widest group:

1. outputs and gradients of attention, for several groupings of every program and every comm type of
   the config's layers; each document is compared with dense float64 attention on that document
   alone;
2. loss and gradient norm of one step over microbatches of all programs, computed by the programs
   that training runs, against one step on one device over the same documents;
3. bytes that each program puts into hops, gathers and exchanges of heads, per device, against those
   that its movers list.

No attention collective may leave its block of the widest group: one that does is a *stray* and
fails its row. In the programs of check 1, which contain attention only, all collectives are
examined.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
from jaxtyping import Int64

from hcp_jax import dynamic
from hcp_jax.attention.strategy import lanes_for, microbatch_lanes
from hcp_jax.compiled import hlo
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.microbatch import place_microbatch
from hcp_jax.sequence import groupings
from hcp_jax.train import data, evaluation
from hcp_jax.train.batch import PlacedMicrobatch, PlacedStep
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import read, token_arrays
from hcp_jax.train.data.streams import Segments
from hcp_jax.train.dynamic import DynamicProgram
from hcp_jax.train.optimizer import make_optimizer
from hcp_jax.train.step import (
    abstract_state,
    init_state,
    make_train_step,
)
from hcp_jax.verify import measures, recurrences
from hcp_jax.verify.documents import (
    PackedDocuments,
    in_buffers,
    random_documents,
    random_microbatch,
    some_groupings,
)
from hcp_jax.verify.group_traffic import count_strays, needed_bytes, traffic_checks
from hcp_jax.verify.measures import EXACT, Attended, Check

_FILL = 2  # number of microbatches that the documents of each program fill


class CorpusMicrobatch(NamedTuple):
    """Microbatch with the corpus index of each token of its concatenated documents."""

    held: PackedDocuments
    corpus_index: Int64[np.ndarray, "T"]


def checks(
    config: TrainConfig, cp: ContextParallel, console: rich.console.Console
) -> Iterator[tuple[str, Iterator[Check]]]:
    """Yield the title and rows of each table of checks; rows are computed during iteration.

    Args:
        config: config with `parallel.dynamic` enabled.
        cp: context without groups.
        console: console that shows the progress of compilation.

    Raises:
        ValueError: if the data or the menu do not fit the groups, as in training.
        NotImplementedError: if a grouping does not support the comm type of a layer; for a
            pipeline.
    """
    if config.parallel.pp > 1:
        raise NotImplementedError(
            f"parallel.pp is {config.parallel.pp}, and hcp verify does not check groups in a "
            "pipeline yet: check the groups with --parallel.pp 1, and the pipeline with "
            "--parallel.dynamic.enabled false."
        )
    corpus, _ = evaluation.open_corpora(config.data, config.eval, config.model.vocab_size)
    with contextlib.closing(DynamicProgram(config, cp, corpus, console)) as training:
        menu = tuple(training.menu.contexts)
        small, cp = _reduced(config, cp, menu)
    if small.data != config.data:
        corpus = data.open_corpus(small.data, small.model.vocab_size)
    model, tokens = small.model, small.parallel.dynamic.tokens
    contexts = {widest: dataclasses.replace(cp, widest_group=widest) for widest in menu}
    for context in contexts.values():
        needed_bytes(model, context, tokens)  # raises for unsupported programs before compiling
    yield (
        "attention against each document alone in dense float64, largest error over largest value\n"
        f"(in float32, {tokens} tokens a device; of several groups one is full, one empty; at most "
        f"{EXACT:.0e};\n{measures.describe(model)}; strays: collectives that leave their block)",
        _attention(contexts, model, tokens),
    )
    if any(layer.mixer.recurrence for layer in model.specs):
        yield (
            "recurrent layers against one token after the other in float64, largest error over "
            f"largest value\n(in float32; at most {recurrences.EXACT:.0e})",
            _recurrent(contexts, model, tokens),
        )
    with contextlib.closing(DynamicProgram(small, cp, corpus, console)) as program:
        optimizer = make_optimizer(small.optimizer, small.steps)
        abstract = abstract_state(model, optimizer, cp, fsdp=small.parallel.fsdp)
        program.compile(abstract)
        segments = Segments(corpus, config.seq_len)
        texts = [
            text
            for context in contexts.values()
            for text in _corpus_microbatches(context, model, segments, tokens)
        ]
        placed = [_placed(text, corpus, contexts, small) for text in texts]
        yield (
            f"one training step of {len(texts)} microbatches in these programs, in float32, "
            "against one device",
            _one_step(small, cp, program, placed, _stacked(texts, corpus, small)),
        )
        yield (
            "bytes that all devices put into collectives, and what the algorithm needs\n"
            "(where nothing is needed and nothing moves, there is no row)",
            traffic_checks(small, contexts, program, abstract.params, dict(placed)),
        )


def _reduced(
    config: TrainConfig, cp: ContextParallel, menu: Sequence[int]
) -> tuple[TrainConfig, ContextParallel]:
    """Return the config with small buffers, so that the widest group's dense attention fits."""
    small, cp = measures.narrowed(config, cp)
    dynamic_config = config.parallel.dynamic
    # With an odd number, some documents are cut into chunks of unequal size.
    tokens = min(dynamic_config.tokens, max(256 // cp.axis_size(cp.flat_axes), 8) - 1)
    dynamic_config = dataclasses.replace(
        dynamic_config,
        max_tokens_per_device=tokens,
        max_seqlen_per_dp_cp_rank=None,
        menu=list(menu),
    )
    return dataclasses.replace(
        small,
        seq_len=min(config.seq_len, tokens * max(menu)),
        parallel=dataclasses.replace(small.parallel, dynamic=dynamic_config),
    ), cp


def _attention(
    contexts: dict[int, ContextParallel], model: ModelConfig, tokens: int
) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    for widest, cp in contexts.items():
        for layer_cp, layers in measures.layers_by_comm_type(cp, model).items():
            lanes = lanes_for(layer_cp, model.num_heads // cp.axis_size(cp.tp))
            compiled, errors, strays = None, dict.fromkeys(Attended._fields, 0.0), 0
            tried = some_groupings(cp, widest, lanes)
            for grouping in tried:
                batch, exact = random_microbatch(layer_cp, model, grouping, lanes, tokens, rng)
                if compiled is None:
                    compiled = measures.attention.lower(
                        layer_cp, model.logits_soft_cap, model.implementation, batch
                    ).compile()
                    strays = count_strays(hlo.collectives(compiled.as_text() or ""), layer_cp)
                for part, value in compiled(batch)._asdict().items():
                    found = np.asarray(value, np.float64).reshape(exact[part].shape)
                    errors[part] = max(errors[part], measures.relative(found, exact[part]))
            cells = {
                "layers": layers,
                "comm type": str(layer_cp.comm_type),
                "widest": str(widest),
                "groupings": ", ".join(map(groupings.describe, tried)),
                **{part: f"{error:.1e}" for part, error in errors.items()},
                "strays": str(strays),
            }
            yield Check(cells, max(errors.values()) <= EXACT and strays == 0)


def _recurrent(
    contexts: dict[int, ContextParallel], model: ModelConfig, tokens: int
) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    mixers = {spec.mixer: spec.mixer.recurrence for spec in model.specs}
    found_in = itertools.product(contexts.items(), mixers.items())
    for (widest, cp), (mixer, recurrence) in found_in:
        if recurrence is None:
            continue
        errors: dict[str, float] = collections.defaultdict(float)
        tried = some_groupings(cp, widest, 1)
        for grouping in tried:
            held = random_documents(grouping, 1, tokens, rng)
            packed, index = held.packed(tokens)
            positions = np.concatenate([np.arange(n) for n in (*held.lengths, 0)])[None]
            inputs = recurrences.random_inputs(rng, recurrence, positions.shape)
            exact = recurrences.sequential(recurrence, inputs, positions == 0)
            buffers = {
                name: in_buffers(x[0].astype(np.float32), index, 0.0 if name == "dout" else 1.0)
                for name, x in inputs.items()
            }
            batch = place_microbatch(cp, packed, buffers)
            order = batch.pop("mask").intervals.end
            found = recurrences.computed(cp, recurrence, batch, batch.pop("positions"), order)
            for name, want in exact.items():
                got = np.asarray(found[name], np.float64).reshape(*index.shape, *want.shape[2:])
                error = measures.relative(got[index >= 0], want[0][index[index >= 0]])
                errors[name] = max(errors[name], error)
        cells = {"mixer": mixer.kind, "widest": str(widest)}
        cells["groupings"] = ", ".join(map(groupings.describe, tried))
        cells |= {name: f"{error:.1e}" for name, error in errors.items()}
        yield Check(cells, max(errors.values()) <= recurrences.EXACT)


def _corpus_microbatches(
    cp: ContextParallel, model: ModelConfig, segments: Segments, tokens: int
) -> list[CorpusMicrobatch]:
    """Schedule documents of the corpus for one program, in several microbatches.

    The first document is the longest one, cut to what the widest group holds. The others are cut to
    random lengths, because most documents of a corpus may be as long as `seq_len` allows.
    """
    widest, num_devices = cp.placement.reach, cp.axis_size(cp.flat_axes)
    most, lanes = widest * tokens, microbatch_lanes(cp, model.num_heads)
    rng = np.random.default_rng(0)
    numbers = [int(segments.sizes.argmax())]
    lengths = [min(int(segments.sizes.max()), most)]
    others = itertools.cycle(data.evenly(len(segments)).tolist())
    while sum(lengths) < _FILL * num_devices * tokens:
        numbers.append(next(others))
        lengths.append(int(rng.integers(min(segments.sizes[numbers[-1]], most)) + 1))
    cost = dynamic.Cost(lanes=lanes, devices_per_host=cp.axis_size(cp.cp_inner))
    plan = dynamic.schedule(lengths, num_devices, tokens, menu=[widest], cost=cost)
    plan.check()
    texts = []
    for microbatch in plan.microbatches:
        order = [d for group in microbatch.documents for d in group]
        count = itertools.count()
        renumbered = tuple(tuple(next(count) for _ in group) for group in microbatch.documents)
        held = PackedDocuments(
            dataclasses.replace(microbatch, documents=renumbered),
            np.array([lengths[d] for d in order]),
        )
        indices = [segments.refs(numbers[d], 0, lengths[d]) for d in order]
        texts.append(CorpusMicrobatch(held, np.concatenate(indices)))
    return texts


def _placed(
    text: CorpusMicrobatch,
    corpus: data.Corpus,
    contexts: dict[int, ContextParallel],
    config: TrainConfig,
) -> PlacedMicrobatch:
    """Put a microbatch into the buffers of its groups, as input for a program of the menu."""
    packed, index = text.held.packed(config.parallel.dynamic.tokens)
    corpus_index = in_buffers(text.corpus_index, index, 0)
    arrays = read(token_arrays(corpus, corpus_index, config.model.mtp_depths))
    window = config.model.widest_window
    widest = text.held.microbatch.widest
    placed: Any = place_microbatch(contexts[widest], packed, arrays, sliding_window=window)
    return PlacedMicrobatch(widest, placed)


def _stacked(
    texts: Sequence[CorpusMicrobatch], corpus: data.Corpus, config: TrainConfig
) -> dict[str, Any]:
    """Return microbatches as a batch for one device: one padded stream of documents for each."""
    longest = max(text.corpus_index.size for text in texts)
    ids, positions, whole_index = np.zeros((3, len(texts), longest), np.int64)
    for row, (held, corpus_index) in enumerate(texts):
        used, number = corpus_index.size, np.arange(held.lengths.size)
        begins = np.cumsum(held.lengths) - held.lengths
        ids[row, :used] = np.repeat(number + 1, held.lengths)
        positions[row, :used] = np.arange(used) - np.repeat(begins, held.lengths)
        whole_index[row, :used] = corpus_index
    return {
        **read(token_arrays(corpus, whole_index, config.model.mtp_depths)),
        "positions": positions.astype(np.int32),
        "mask": config.model.packed_mask(ids.astype(np.int32)),
    }


def _one_step(
    config: TrainConfig,
    cp: ContextParallel,
    program: DynamicProgram,
    placed: Sequence[PlacedMicrobatch],
    whole: dict[str, Any],
) -> Iterator[Check]:
    model, optimizer = config.model, make_optimizer(config.optimizer, config.steps)
    state = init_state(model, optimizer, config.seed, cp, fsdp=config.parallel.fsdp)
    _, many = program.step(state, PlacedStep(tuple(placed), documents=(), facts={}))
    state = init_state(model, optimizer, config.seed)
    # Each microbatch by itself: a router's losses count the tokens of a microbatch.
    portions = len(placed)
    step = make_train_step(model, config.optimizer, config.steps, accumulation=portions)
    _, single = step(state, whole)
    yield from measures.same_step(jax.device_get(many), jax.device_get(single))
