"""Check documents on groups of devices against one device, for a config with dynamic CP.

The checks cover every program of the menu that training on the config's data would compile:

1. outputs and gradients of attention, for every grouping and every comm type of the config's
   layers; each document is compared with dense float64 attention on that document alone;
2. loss and gradient norm of one step over microbatches of all groupings, computed by the programs
   that training runs, against one step on one device over the same documents;
3. bytes that each grouping's programs put into ring hops and exchanges of heads, per device,
   against the bytes that the device's group needs.

The attention of one group needs nothing from another group. So an attention collective that leaves
its group is a *stray* and fails its row. In the programs of check 1, which contain attention only,
all collectives are examined.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
from jaxtyping import Int64, Shaped

from hcp_jax import dynamic
from hcp_jax.attention.grouped import exchange_size
from hcp_jax.compiled import hlo
from hcp_jax.cost.traffic import EXCHANGE_HEADS, RING_HOP, Strategy
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.microbatch import flat_devices, place_microbatch
from hcp_jax.sequence.groupings import Layout, group_of_device
from hcp_jax.sequence.groupings import describe as describe_layout
from hcp_jax.sequence.packing import Microbatch, PackedMicrobatch
from hcp_jax.train import data, evaluation
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.streams import Segments
from hcp_jax.train.dynamic import DynamicProgram, PlacedMicrobatch, PlacedStep
from hcp_jax.train.optimizer import make_optimizer
from hcp_jax.train.step import (
    abstract_state,
    init_state,
    make_eval_loss,
    make_train_step,
)
from hcp_jax.verify import measures
from hcp_jax.verify.measures import EXACT, Attended, Check

_SCOPES = (RING_HOP, EXCHANGE_HEADS)
_FILL = 2  # number of microbatches that the documents of each grouping fill
_NO_TOKEN = 50.0  # value of slots without a token; it must not change results


class PackedDocuments(NamedTuple):
    """Microbatch with the lengths of its documents, which are numbered from 0 group by group."""

    microbatch: Microbatch
    lengths: Int64[np.ndarray, "n"]

    def packed(self, tokens: int) -> tuple[PackedMicrobatch, Int64[np.ndarray, "D M"]]:
        """Return its buffers, and the token number in each slot, or -1 for an empty slot.

        Tokens are numbered over all documents, concatenated.
        """
        packed = dynamic.pack(self.microbatch, self.lengths, tokens)
        begins = np.append(np.cumsum(self.lengths) - self.lengths, -1)
        return packed, begins[packed.document] + packed.position


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
        NotImplementedError: if a grouping does not support the comm type of a layer.
    """
    corpus, _ = evaluation.open_corpora(config.data, config.eval, config.model.vocab_size)
    with contextlib.closing(DynamicProgram(config, cp, corpus, console)) as training:
        small, cp = _reduced(config, cp, training.menu)
    if small.data != config.data:
        corpus = data.open_corpus(small.data, small.model.vocab_size)
    model, tokens = small.model, small.parallel.dynamic.tokens
    contexts = {layout: dataclasses.replace(cp, groups=layout) for layout in training.menu}
    for grouped in contexts.values():
        _needed_bytes(model, grouped, tokens)  # raises for unsupported groupings before compiling
    yield (
        "attention against each document alone in dense float64, largest error over largest value\n"
        f"(in float32, {tokens} tokens a device; of several groups one is full, one empty; at most "
        f"{EXACT:.0e};\n{measures.describe(model)}; strays: collectives that leave their group)",
        _attention(contexts, model, tokens),
    )
    with contextlib.closing(DynamicProgram(small, cp, corpus, console)) as program:
        optimizer = make_optimizer(small.optimizer, small.steps)
        abstract = abstract_state(model, optimizer, cp, fsdp=small.parallel.fsdp)
        program.compile(abstract)
        segments = Segments(corpus, config.seq_len)
        texts = [
            text for layout in contexts for text in _corpus_microbatches(layout, segments, tokens)
        ]
        placed = [_placed(text, corpus, contexts, small) for text in texts]
        yield (
            f"one training step of {len(texts)} microbatches in these groups, in float32, against "
            "one device",
            _one_step(small, cp, program, placed, _stacked(texts, corpus, small)),
        )
        yield (
            "bytes that all devices put into collectives, and what the algorithm needs\n"
            "(where nothing is needed and nothing moves, there is no row)",
            _traffic(small, contexts, program, abstract.params, dict(placed)),
        )


def _reduced(
    config: TrainConfig, cp: ContextParallel, menu: Sequence[Layout]
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
        menu=[list(layout) for layout in menu],
    )
    return dataclasses.replace(
        small,
        seq_len=min(config.seq_len, tokens * max(map(max, menu))),
        parallel=dataclasses.replace(small.parallel, dynamic=dynamic_config),
    ), cp


def _attention(
    contexts: dict[Layout, ContextParallel], model: ModelConfig, tokens: int
) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    for layout, cp in contexts.items():
        held = _random_documents(layout, tokens, rng)
        inputs = measures.random_inputs(rng, model, (int(held.lengths.sum()),))
        packed, index = held.packed(tokens)
        alone = _alone(model, held.lengths, inputs)._asdict()
        exact = {
            part: _in_buffers(x, index, -np.inf if part == "lse" else 0.0)
            for part, x in alone.items()
        }
        float32 = {
            name: _in_buffers(x.astype(np.float32), index, _NO_TOKEN) for name, x in inputs.items()
        }
        window = model.widest_window
        for layer_cp, layers in measures.layers_by_comm_type(cp, model).items():
            batch = place_microbatch(layer_cp, packed, float32, sliding_window=window)
            compiled = measures.attention.lower(
                layer_cp, model.logits_soft_cap, model.implementation, batch
            ).compile()
            strays = _strays(hlo.collectives(compiled.as_text() or ""), layer_cp)
            errors = {}
            for part, value in compiled(batch)._asdict().items():
                found = np.asarray(value, np.float64).reshape(exact[part].shape)
                errors[part] = measures.relative(found, exact[part])
            cells = {
                "layers": layers,
                "comm type": str(layer_cp.comm_type),
                "groups": describe_layout(layout),
                **{part: f"{error:.1e}" for part, error in errors.items()},
                "strays": str(strays),
            }
            yield Check(cells, max(errors.values()) <= EXACT and strays == 0)


def _random_documents(layout: Layout, tokens: int, rng: np.random.Generator) -> PackedDocuments:
    """Return up to six random documents per group; a widest group is full, a narrowest empty."""
    full, empty = layout.index(max(layout)), layout.index(min(layout))
    if full == empty and len(layout) > 1:
        empty = full + 1
    lengths: list[int] = []
    documents = []
    for group, size in enumerate(layout):
        most = size * tokens
        total = most if group == full else 0 if group == empty else rng.integers(1, most + 1)
        borders = np.unique([0, *rng.integers(0, total + 1, 5), total])
        documents.append(tuple(range(len(lengths), len(lengths) + borders.size - 1)))
        lengths += np.diff(borders).tolist()
    return PackedDocuments(Microbatch(layout, tuple(documents)), np.array(lengths, np.int64))


def _alone(
    model: ModelConfig, lengths: Int64[np.ndarray, "n"], inputs: dict[str, np.ndarray]
) -> Attended:
    """Compute dense float64 attention on each document by itself; concatenate the results."""
    answers = []
    for begin, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        # Pad to few different lengths, because each is compiled; the document does not see the
        # padding after it.
        tail = max(16, 1 << int(length - 1).bit_length()) - length
        row = {
            name: np.pad(x[begin : begin + length], ((0, tail), (0, 0), (0, 0)))[None]
            for name, x in inputs.items()
        }
        with jax.enable_x64(True):
            found = measures.attention(
                None, model.logits_soft_cap, "reference", row | {"mask": model.mask()}
            )
        answers.append([np.asarray(x)[0, :length] for x in found])
    return Attended(*map(np.concatenate, zip(*answers, strict=True)))


def _in_buffers(
    natural: Shaped[np.ndarray, "T ..."], index: Int64[np.ndarray, "D M"], otherwise: float
) -> Shaped[np.ndarray, "D M ..."]:
    """Move values of concatenated tokens to their slots; `otherwise` fills the empty slots."""
    inside = (index >= 0).reshape(*index.shape, *[1] * (natural.ndim - 1))
    return np.where(inside, natural[index], np.asarray(otherwise, natural.dtype))


def _corpus_microbatches(layout: Layout, segments: Segments, tokens: int) -> list[CorpusMicrobatch]:
    """Schedule documents of the corpus onto one grouping, in several microbatches.

    The first document is the longest one, cut to what the widest group holds. The others are cut to
    random lengths, because most documents of a corpus may be as long as `seq_len` allows.
    """
    most, num_devices = max(layout) * tokens, sum(layout)
    rng = np.random.default_rng(0)
    numbers = [int(segments.sizes.argmax())]
    lengths = [min(int(segments.sizes.max()), most)]
    others = itertools.cycle(data.evenly(len(segments)).tolist())
    while sum(lengths) < _FILL * num_devices * tokens:
        numbers.append(next(others))
        lengths.append(int(rng.integers(min(segments.sizes[numbers[-1]], most)) + 1))
    plan = dynamic.schedule(lengths, num_devices, tokens, menu=[layout])
    plan.check()
    texts = []
    for microbatch in plan.microbatches:
        order = [d for group in microbatch.documents for d in group]
        count = itertools.count()
        renumbered = tuple(tuple(next(count) for _ in group) for group in microbatch.documents)
        held = PackedDocuments(
            Microbatch(layout, renumbered), np.array([lengths[d] for d in order])
        )
        indices = [segments.refs(numbers[d], 0, lengths[d]) for d in order]
        texts.append(CorpusMicrobatch(held, np.concatenate(indices)))
    return texts


def _placed(
    text: CorpusMicrobatch,
    corpus: data.Corpus,
    contexts: dict[Layout, ContextParallel],
    config: TrainConfig,
) -> PlacedMicrobatch:
    """Put a microbatch into the buffers of its groups, as input for a program of the menu."""
    packed, index = text.held.packed(config.parallel.dynamic.tokens)
    corpus_index = _in_buffers(text.corpus_index, index, 0)
    arrays = {
        "tokens": corpus.tokens_at(corpus_index),
        "targets": corpus.targets_at(corpus_index),
        "weights": (corpus_index > 0).astype(np.float32),
    }
    window = config.model.widest_window
    cp = contexts[packed.layout]
    placed = place_microbatch(cp, packed, arrays, sliding_window=window)
    return PlacedMicrobatch(packed.layout, placed)


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
        "tokens": corpus.tokens_at(whole_index),
        "targets": corpus.targets_at(whole_index),
        "weights": (whole_index > 0).astype(np.float32),
        "positions": positions.astype(np.int32),
        "mask": config.model.mask(ids.astype(np.int32)),
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
    _, single = make_train_step(model, config.optimizer, config.steps)(state, whole)
    yield from measures.same_step(jax.device_get(many), jax.device_get(single))


def _traffic(
    config: TrainConfig,
    contexts: dict[Layout, ContextParallel],
    program: DynamicProgram,
    params: Any,
    batches: dict[Layout, dict[str, Any]],
) -> Iterator[Check]:
    for layout, cp in contexts.items():
        eval_loss: Any = make_eval_loss(config.model, cp)
        forward = eval_loss.lower(params, batches[layout]).compile()
        needed = _needed_bytes(config.model, cp, config.parallel.dynamic.tokens)
        # As for streams, backward moves at least as much again as forward.
        for name, compiled, times in (
            ("forward", forward, 1),
            ("step", program.programs[layout], 2),
        ):
            found = hlo.collectives(compiled.as_text())
            for scope in _SCOPES:
                scoped = [c for c in found if scope in c.op_name]
                if not scoped and not needed[scope].any():
                    continue
                moved, least, exact = _moved(scoped, cp), times * needed[scope], times == 1
                strays = _strays(scoped, cp)
                cells = measures.traffic_cells(
                    scope, scoped, int(moved.sum()), int(least.sum()), exact
                )
                enough = np.array_equal(moved, least) if exact else (moved >= least).all()
                yield Check(
                    {
                        "groups": describe_layout(layout),
                        "program": name,
                        **cells,
                        "strays": str(strays),
                    },
                    bool(enough) and strays == 0,
                )


def _needed_bytes(
    model: ModelConfig, cp: ContextParallel, tokens: int
) -> dict[str, Int64[np.ndarray, "D"]]:
    """Return the bytes that each device puts into each scope's collectives in a float32 forward."""
    assert cp.groups is not None
    tp, numbers, group_size = cp.axis_size(cp.tp), _numbers(cp), group_of_device(cp.groups)[1]
    needed = {scope: np.zeros(cp.mesh.size, np.int64) for scope in _SCOPES}
    strategy = Strategy(("exchange",), ("ring",))
    for layer in range(model.num_layers):
        exchange = exchange_size(cp.for_layer(layer), model.num_heads // tp)
        for size in set(cp.groups):
            sizes = {"exchange": exchange, "ring": size // exchange}
            each = measures.needed_bytes(model, tp, tokens, strategy, sizes)
            for scope in _SCOPES:
                needed[scope][numbers[group_size == size]] += each[scope]
    return needed


def _moved(found: Sequence[hlo.Collective], cp: ContextParallel) -> Int64[np.ndarray, "D"]:
    """Return the bytes that each device puts in, by its number in the compiled program."""
    moved = np.zeros(cp.mesh.size, np.int64)
    for c in found:
        members = [device for group in c.groups if len(group) > 1 for device in group]
        moved[[source for source, _ in c.pairs] or members] += c.bytes * c.count
    return moved


def _strays(found: Sequence[hlo.Collective], cp: ContextParallel) -> int:
    """Count the collectives that join devices of several groups, or of several parts of tp."""
    assert cp.groups is not None
    numbers = _numbers(cp)
    home = np.zeros(cp.mesh.size, np.int64)
    first = group_of_device(cp.groups)[0][:, None]
    home[numbers] = first * numbers.shape[1] + np.arange(numbers.shape[1])
    return sum(
        c.count for c in found if any(np.unique(home[list(group)]).size > 1 for group in c.groups)
    )


def _numbers(cp: ContextParallel) -> Int64[np.ndarray, "D lanes"]:
    """Return the numbers, in a compiled program, of each group device and its tp parts."""
    return flat_devices(cp, np.arange(cp.mesh.size).reshape(cp.mesh.devices.shape))
