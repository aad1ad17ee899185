"""Documents on groups of devices, against one device: the tables of a config with dynamic CP.

What is proved is every program of the menu that training on the config's data would compile:

1. attention, outputs and gradients, of every group layout and every comm type that the config's
   layers use, each document against dense attention in float64 on it alone;
2. the loss and the gradient's norm of one step over microbatches of all layouts, by the programs
   that training runs, against one step on one device over the same documents;
3. the bytes that each layout's programs put into ring hops and exchanges of heads, device by
   device, against what the device's group needs.

No group's attention needs anything of another's: a collective of attention that leaves its group is
a *stray*, and fails its row. Of attention alone, every collective of the program is looked at.
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
from hcp_jax.train.step import (
    abstract_state,
    init_state,
    make_eval_loss,
    make_optimizer,
    make_train_step,
)
from hcp_jax.verify import measures
from hcp_jax.verify.measures import EXACT, Attended, Check

_SCOPES = (RING_HOP, EXCHANGE_HEADS)
_FILL = 2  # microbatches' worth of documents for each layout
_NO_TOKEN = 50.0  # what stands where there is none, and must not matter


class Held(NamedTuple):
    """A microbatch, and the lengths of its documents, which are numbered from 0 group by group."""

    microbatch: Microbatch
    lengths: Int64[np.ndarray, "n"]

    def packed(self, tokens: int) -> tuple[PackedMicrobatch, Int64[np.ndarray, "D M"]]:
        """Its buffers; and, of all its documents end to end, the token at each place, or -1."""
        packed = dynamic.pack(self.microbatch, self.lengths, tokens)
        begins = np.append(np.cumsum(self.lengths) - self.lengths, -1)
        return packed, begins[packed.document] + packed.position


class Text(NamedTuple):
    """A microbatch, and the places in the corpus of the tokens of its documents, end to end."""

    held: Held
    places: Int64[np.ndarray, "T"]


def checks(
    config: TrainConfig, cp: ContextParallel, console: rich.console.Console
) -> Iterator[tuple[str, Iterator[Check]]]:
    """All checks of a config on a mesh, table by table, made as they are iterated over.

    Args:
        config: its `parallel.dynamic` is enabled.
        cp: the mesh, without groups.
        console: where the progress of compiling is shown.

    Raises:
        ValueError: if the data or the menu do not fit the groups, as in training.
        NotImplementedError: if the groups of a layout cannot have the comm type of a layer.
    """
    corpus, _ = evaluation.open_corpora(config.data, config.eval, config.model.vocab_size)
    with contextlib.closing(DynamicProgram(config, cp, corpus, console)) as training:
        small, cp = _reduced(config, cp, training.menu)
    if small.data != config.data:
        corpus = data.open_corpus(small.data, small.model.vocab_size)
    model, tokens = small.model, small.parallel.dynamic.tokens
    contexts = {layout: dataclasses.replace(cp, groups=layout) for layout in training.menu}
    for grouped in contexts.values():
        _needed_bytes(model, grouped, tokens)  # what cannot be is told before anything compiles
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
        texts = [text for layout in contexts for text in _texts(layout, segments, tokens)]
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
    """The menu's programs with small buffers, so that a widest group's dense attention fits."""
    small, cp = measures.narrowed(config, cp)
    dynamic_config = config.parallel.dynamic
    # An odd number, so that documents are cut into uneven chunks, too.
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
        packed, places = held.packed(tokens)
        alone = _alone(model, held.lengths, inputs)._asdict()
        exact = {
            part: _in_buffers(x, places, -np.inf if part == "lse" else 0.0)
            for part, x in alone.items()
        }
        float32 = {
            name: _in_buffers(x.astype(np.float32), places, _NO_TOKEN) for name, x in inputs.items()
        }
        window = model.sliding_window
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


def _random_documents(layout: Layout, tokens: int, rng: np.random.Generator) -> Held:
    """Up to six documents in each group: one of the widest full, one of the narrowest empty."""
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
    return Held(Microbatch(layout, tuple(documents)), np.array(lengths, np.int64))


def _alone(
    model: ModelConfig, lengths: Int64[np.ndarray, "n"], inputs: dict[str, np.ndarray]
) -> Attended:
    """Attention on each document by itself, dense in float64; the answers end to end."""
    answers = []
    for begin, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        # Few lengths, since each is compiled; what comes after the document it does not see.
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
    natural: Shaped[np.ndarray, "T ..."], places: Int64[np.ndarray, "D M"], otherwise: float
) -> Shaped[np.ndarray, "D M ..."]:
    """What belongs to tokens end to end, at the places where `Held.packed` puts the tokens."""
    inside = (places >= 0).reshape(*places.shape, *[1] * (natural.ndim - 1))
    return np.where(inside, natural[places], np.asarray(otherwise, natural.dtype))


def _texts(layout: Layout, segments: Segments, tokens: int) -> list[Text]:
    """Documents of the corpus as the scheduler puts them onto a layout, in several microbatches.

    The longest first, as much of it as the widest group holds; then others, of random lengths up
    to that, since most documents of a corpus may be as long as `seq_len` allows.
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
        held = Held(Microbatch(layout, renumbered), np.array([lengths[d] for d in order]))
        places = [segments.refs(numbers[d], 0, lengths[d]) for d in order]
        texts.append(Text(held, np.concatenate(places)))
    return texts


def _placed(
    text: Text, corpus: data.Corpus, contexts: dict[Layout, ContextParallel], config: TrainConfig
) -> PlacedMicrobatch:
    """The text in the buffers of its groups, as a program of the menu takes it."""
    packed, places = text.held.packed(config.parallel.dynamic.tokens)
    of_corpus = _in_buffers(text.places, places, 0)
    arrays = {
        "tokens": corpus.tokens_at(of_corpus),
        "targets": corpus.targets_at(of_corpus),
        "weights": (of_corpus > 0).astype(np.float32),
    }
    window = config.model.sliding_window
    cp = contexts[packed.layout]
    placed = place_microbatch(cp, packed, arrays, sliding_window=window)
    return PlacedMicrobatch(packed.layout, placed)


def _stacked(texts: Sequence[Text], corpus: data.Corpus, config: TrainConfig) -> dict[str, Any]:
    """The texts as a batch of one device: each a stream of documents, filled up to one length."""
    longest = max(text.places.size for text in texts)
    ids, positions, places = np.zeros((3, len(texts), longest), np.int64)
    for row, (held, of_corpus) in enumerate(texts):
        used, number = of_corpus.size, np.arange(held.lengths.size)
        begins = np.cumsum(held.lengths) - held.lengths
        ids[row, :used] = np.repeat(number + 1, held.lengths)
        positions[row, :used] = np.arange(used) - np.repeat(begins, held.lengths)
        places[row, :used] = of_corpus
    return {
        "tokens": corpus.tokens_at(places),
        "targets": corpus.targets_at(places),
        "weights": (places > 0).astype(np.float32),
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
        # As for streams: backward moves at least as much again as forward.
        for name, compiled, times in (
            ("forward", forward, 1),
            ("step", program.programs[layout], 2),
        ):
            found = hlo.collectives(compiled.as_text())
            for scope in _SCOPES:
                of_scope = [c for c in found if scope in c.op_name]
                if not of_scope and not needed[scope].any():
                    continue
                moved, least, exact = _moved(of_scope, cp), times * needed[scope], times == 1
                strays = _strays(of_scope, cp)
                cells = measures.traffic_cells(
                    scope, of_scope, int(moved.sum()), int(least.sum()), exact
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
    """Return what each device must put into the collectives of one forward pass, in float32."""
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
    """What each device puts into these collectives, by its number in the compiled program."""
    moved = np.zeros(cp.mesh.size, np.int64)
    for c in found:
        members = [device for group in c.groups if len(group) > 1 for device in group]
        moved[[source for source, _ in c.pairs] or members] += c.bytes * c.count
    return moved


def _strays(found: Sequence[hlo.Collective], cp: ContextParallel) -> int:
    """How many of these collectives join devices of several groups, or of several parts of tp."""
    assert cp.groups is not None
    numbers = _numbers(cp)
    home = np.zeros(cp.mesh.size, np.int64)
    first = group_of_device(cp.groups)[0][:, None]
    home[numbers] = first * numbers.shape[1] + np.arange(numbers.shape[1])
    return sum(
        c.count for c in found if any(np.unique(home[list(group)]).size > 1 for group in c.groups)
    )


def _numbers(cp: ContextParallel) -> Int64[np.ndarray, "D lanes"]:
    """The numbers that a compiled program gives to each device of the groups, and its tp parts."""
    return flat_devices(cp, np.arange(cp.mesh.size).reshape(cp.mesh.devices.shape))
