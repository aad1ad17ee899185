"""A pipeline's loss and gradients are one device's, for any number of microbatches and grouping."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.dynamic import Microbatch
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.recurrent_specs import Mamba2Config
from hcp_jax.models.transformer import abstract_model, init_params
from hcp_jax.pipeline.stages import whole_params
from hcp_jax.pipeline.ticks import Pipeline

M = 6  # tokens of a device
MODEL = ModelConfig(
    vocab_size=32,
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="none",
    loss_chunk=8,
    z_loss=1e-3,
)
TIED = {"tie_embeddings": True, "embedding_scale": 32.0, "final_soft_cap": 30.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline, and the groupings of its microbatches (None: static)."""

    mesh: tuple[tuple[str, int], ...]
    comm_type: str
    virtual_stages: int
    model: ModelConfig
    groupings: tuple[tuple[int, ...], ...] | None
    numbers: tuple[int, ...]
    fsdp: bool

    @functools.cached_property
    def cp(self):
        mesh = hcp.make_mesh(**dict(self.mesh))
        cp = hcp.ContextParallel(mesh, self.comm_type)
        if self.groupings is None:
            return cp
        return dataclasses.replace(cp, widest_group=cp.axis_size(cp.flat_axes))


def case(mesh, comm_type="p2p", v=1, groupings=None, numbers=(1, 3), fsdp=False, **model):
    config = dataclasses.replace(MODEL, **model)
    return Case(tuple(mesh.items()), comm_type, v, config, groupings, numbers, fsdp)


GROUPS = ((4,), (2, 2), (1, 1, 2), (1, 1, 1, 1), (2, 1, 1))
CASES = [
    pytest.param(
        case(
            {"pp": 2, "cp_outer": 2, "cp_inner": 2},
            "a2a+p2p",
            groupings=GROUPS,
            numbers=(5, 1),
            num_layers=3,  # the second stage has one layer and one of zeros
        ),
        id="groups",
    ),
    pytest.param(
        case({"pp": 4, "cp_outer": 2}, v=2, numbers=(1, 6, 16), num_layers=8, **TIED),
        marks=pytest.mark.slow,
        id="pp4 v2",
    ),
    pytest.param(
        case({"pp": 2, "dp": 2, "tp": 2}, v=2, numbers=(3, 8), num_layers=4, remat="full"),
        marks=pytest.mark.slow,
        id="dp2 tp2 v2",
    ),
    pytest.param(
        case(
            {"pp": 2, "dp": 2, "cp_outer": 2},
            groupings=GROUPS,
            numbers=(8,),
            num_layers=4,
            layers="WA",
            sliding_window=4,
            **TIED,
        ),
        marks=pytest.mark.slow,
        id="groups over dp, two kinds of layers",
    ),
    pytest.param(
        case(
            {"pp": 2, "cp_outer": 4},
            numbers=(3,),
            num_layers=4,
            layers="MA",
            mamba2=Mamba2Config(num_heads=4, head_size=8, state_size=8, chunk=4),
        ),
        marks=pytest.mark.slow,
        id="recurrent layers",
    ),
    pytest.param(
        case({"pp": 2, "dp": 2, "cp_outer": 2}, numbers=(3,), fsdp=True),
        marks=pytest.mark.slow,
        id="fsdp",
    ),
]


def static_batches(case, number, rng):
    cp = case.cp
    for _ in range(number):
        shape = cp.axis_size(cp.dp), 2 * M * cp.size
        tokens = rng.integers(0, 32, shape).astype(np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        host = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions}
        host |= {"weights": rng.random(shape).astype(np.float32), "mask": case.model.mask()}
        documents = [np.append(row, row[0]) for row in tokens]
        yield cp.shard_batch(host), documents, host["weights"]


def grouped_batches(case, number, rng):
    for i in range(number):
        grouping = case.groupings[i % len(case.groupings)]
        # In each group one document that does not fill it, and one more that may.
        sizes = [max(1, g * M - int(rng.integers(2, M))) for g in grouping]
        held = tuple((n, len(grouping) + n) for n in range(len(grouping)))
        lengths = sizes + [
            int(rng.integers(1, g * M - n + 1)) for g, n in zip(grouping, sizes, strict=True)
        ]
        packed = dynamic.pack(Microbatch(grouping, held), lengths, M)
        documents = [rng.integers(0, 32, n + 1) for n in lengths]

        def slots(ahead, packed=packed, documents=documents):
            rows = zip(packed.document, packed.position, strict=True)
            of = [
                [documents[d][p + ahead] if d >= 0 else 0 for d, p in zip(*row, strict=True)]
                for row in rows
            ]
            return np.array(of, np.int32)

        arrays = {"tokens": slots(0), "targets": slots(1)}
        arrays["weights"] = (packed.document >= 0).astype(np.float32)
        placed = hcp.place_microbatch(
            case.cp, packed, arrays, sliding_window=case.model.widest_window
        )
        yield placed, documents, [np.ones(n) for n in lengths]


@functools.cache
def one_device(model):
    """Return the gradient of one document's loss: its ids, padded, and weights of its tokens."""

    def loss(params, ids, weights):
        module = nnx.merge(abstract_model(model)[0], params)
        positions = np.arange(ids.size - 1, dtype=np.int32)[None]
        hidden = module(ids[None, :-1], positions)
        return summed_cross_entropy(
            hidden,
            module.unembedding,
            ids[None, 1:],
            weights[None],
            z_loss=model.z_loss,
            soft_cap=model.final_soft_cap,
        )

    return jax.jit(jax.value_and_grad(loss))


def expected(case, params, documents):
    total = None
    length = max(ids.size for ids, _ in documents)
    for ids, weights in documents:
        tail = length - ids.size
        padded = np.pad(ids, (0, tail)).astype(np.int32)
        found = one_device(case.model)(
            params, padded, np.pad(weights, (0, tail)).astype(np.float32)
        )
        total = found if total is None else jax.tree.map(np.add, total, found)
    return total


def relative(found, right):
    return float(np.linalg.norm(np.asarray(found) - right) / np.linalg.norm(right))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_device(case):
    params = jax.jit(functools.partial(init_params, case.model))(jax.random.key(0))
    pipeline = Pipeline(case.model, case.cp, virtual_stages=case.virtual_stages, fsdp=case.fsdp)
    staged = pipeline.shard_params(params)
    make = static_batches if case.groupings is None else grouped_batches
    batches = list(make(case, max(case.numbers), np.random.default_rng(0)))
    for number in case.numbers:
        grads, loss = pipeline.sums(staged, [batch for batch, _, _ in batches[:number]])
        documents = [pair for _, *pairs in batches[:number] for pair in zip(*pairs, strict=True)]
        right = expected(case, params, documents)
        pairs = (
            zip(jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True)
            for found, want in [((loss, whole_params(pipeline.stages, grads)), right)]
        )
        errors = {jax.tree_util.keystr(p): relative(a, b) for each in pairs for (p, a), b in each}
        assert max(errors.values()) <= 2e-6, (number, errors)
    # Forward, both, backward, whatever the number of microbatches; and the two ends.
    assert pipeline.num_programs == 5


@pytest.mark.slow
def test_fifty_steps_with_a_layer_of_zeros_are_those_of_one_device():
    model = dataclasses.replace(MODEL, num_layers=3)
    alone = case({"pp": 2, "devices": jax.devices()[:2]}, num_layers=3)
    pipeline = Pipeline(model, alone.cp)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    optimizer = optax.adamw(3e-3, weight_decay=0.1)
    losses = []
    staged = pipeline.shard_params(params)
    states = [(params, optimizer.init(params)), (staged, optimizer.init(staged))]

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batches = list(static_batches(alone, 2, np.random.default_rng(0)))
    documents = [pair for _, *pairs in batches for pair in zip(*pairs, strict=True)]
    for _ in range(50):
        loss, grads = expected(alone, states[0][0], documents)
        staged_grads, staged_loss = pipeline.sums(states[1][0], [batch for batch, *_ in batches])
        losses.append((float(loss), float(staged_loss)))
        states = [update(*s, g) for s, g in zip(states, (grads, staged_grads), strict=True)]
    one, pipelined = np.transpose(losses)
    assert one[-1] < 0.8 * one[0]
    assert np.abs(pipelined / one - 1).max() <= 2e-4
    zeros = jax.tree.map(lambda x: x[1, 0, 1], states[1][0]["layers"])
    assert not any(map(np.any, jax.tree.leaves(zeros)))
