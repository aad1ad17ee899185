"""A pipeline's sums are one device's, for any number of microbatches, grouping and kind of layer."""

import contextlib
import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.dynamic import Microbatch
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.mtp import look_ahead
from hcp_jax.models.recurrent_specs import GatedDeltaConfig, KDAConfig, Mamba2Config
from hcp_jax.models.transformer import init_params
from hcp_jax.pipeline.stages import whole_params
from hcp_jax.pipeline.ticks import Pipeline
from hcp_jax.train.losses import summed_losses

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
    comm_type: str | tuple[str, ...]
    virtual_stages: int
    model: ModelConfig
    groupings: tuple[tuple[int, ...], ...] | None
    numbers: tuple[int, ...]
    fsdp: bool
    ep: int
    explicit: bool

    @functools.cached_property
    def cp(self):
        sizes = dict(self.mesh)
        devices = jax.devices()[: math.prod(sizes.values())]
        mesh = hcp.make_mesh(**sizes, devices=devices)
        if self.explicit:
            types = (AxisType.Explicit,) * len(mesh.axis_names)
            mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
        cp = hcp.ContextParallel(mesh, self.comm_type, ep=self.ep)
        if self.groupings is None:
            return cp
        return dataclasses.replace(cp, widest_group=cp.axis_size(cp.flat_axes))


def case(mesh, comm_type="p2p", v=1, groupings=None, numbers=(1, 3), **others):
    words = {"fsdp": False, "ep": 1, "explicit": False}
    words |= {name: others.pop(name) for name in words if name in others}
    config = dataclasses.replace(MODEL, **others)
    return Case(tuple(mesh.items()), comm_type, v, config, groupings, numbers, **words)


EXPERTS = MoEConfig(
    4,
    2,
    8,
    router="sigmoid",
    score_correction=True,
    shared_expert_intermediate_size=8,
    router_aux_loss_coef=0.02,
    router_z_loss_coef=0.01,
    sequence_aux_loss_coef=0.03,
)
RECURRENT = {
    "mamba2": Mamba2Config(num_heads=4, head_size=8, state_size=8, chunk=4),
    "gated_delta": GatedDeltaConfig(num_key_heads=2, num_value_heads=4, chunk=4),
    "kda": KDAConfig(num_heads=4, head_size=8, chunk=4),
}
GROUPS = ((4,), (2, 2), (1, 1, 2), (1, 1, 1, 1), (2, 1, 1))
CASES = [
    pytest.param(
        case(
            {"pp": 2, "cp_outer": 2, "cp_inner": 2},
            ("a2a+p2p", "p2p", "a2a+p2p"),
            groupings=GROUPS,
            numbers=(5, 1),
            num_layers=3,  # the second stage has one layer and one of zeros
        ),
        id="groups, comm types by layer",
    ),
    pytest.param(
        case(
            {"pp": 2, "cp_outer": 2},
            v=2,
            numbers=(3,),
            num_layers=4,
            moe=EXPERTS,
            mtp_depths=2,
            **TIED,
        ),
        marks=pytest.mark.slow,
        id="v2, experts, depths",
    ),
    pytest.param(
        case(
            {"pp": 4, "tp": 2},
            v=2,
            numbers=(1, 6),
            explicit=True,
            num_layers=8,
            remat="full",
        ),
        marks=pytest.mark.slow,
        id="pp4 tp2 v2, Explicit axes",
    ),
    pytest.param(
        case(
            {"pp": 2, "dp": 2, "cp_outer": 2},
            groupings=GROUPS,
            numbers=(3,),
            num_layers=3,  # the last layer of the second period is one of zeros
            layers="WK",
            sliding_window=4,
            kda=RECURRENT["kda"],
            **TIED,
        ),
        marks=pytest.mark.slow,
        id="groups over dp, two kinds of layers",
    ),
    pytest.param(
        case(
            {"pp": 2, "cp_outer": 2},
            numbers=(3,),
            num_layers=4,
            layers="MGK",
            **RECURRENT,
        ),
        marks=pytest.mark.slow,
        id="recurrent layers",
    ),
    pytest.param(
        case(
            {"pp": 2, "dp": 2, "cp_outer": 2},
            numbers=(3,),
            groupings=GROUPS,
            fsdp=True,
            ep=2,
            moe=EXPERTS,
        ),
        marks=pytest.mark.slow,
        id="fsdp, experts over devices, groups",
    ),
]


def static_batches(case, number, rng):
    """Microbatches in streams, on the devices and as one device has them."""
    cp, model = case.cp, case.model
    for _ in range(number):
        shape = cp.axis_size(cp.dp), 2 * M * cp.size
        tokens = rng.integers(0, 32, shape).astype(np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        host = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions}
        host |= {"weights": rng.random(shape).astype(np.float32), "mask": model.mask()}
        if model.mtp_depths:
            arrays = look_ahead(host["targets"], host["weights"], positions, model.mtp_depths)
            host |= dict(zip(("mtp_targets", "mtp_weights"), arrays, strict=True))
        yield cp.shard_batch(host), host


def grouped_batches(case, number, rng):
    """Microbatches in groups; one device has all documents in one row, and padding."""
    for i in range(number):
        grouping = case.groupings[i % len(case.groupings)]
        # In each group one document that does not fill it, and one more that may.
        sizes = [max(1, g * M - int(rng.integers(2, M))) for g in grouping]
        held = tuple((n, len(grouping) + n) for n in range(len(grouping)))
        lengths = sizes + [
            int(rng.integers(1, g * M - n + 1)) for g, n in zip(grouping, sizes, strict=True)
        ]
        packed = dynamic.pack(Microbatch(grouping, held), lengths, M)
        ahead = case.model.mtp_depths + 1
        documents = [rng.integers(0, 32, n + ahead) for n in lengths]
        placed = token_arrays(packed.document, packed.position, documents, case.model)
        batch = hcp.place_microbatch(
            case.cp, packed, placed, sliding_window=case.model.widest_window
        )
        document = np.full((1, M * sum(grouping)), -1)
        document[0, : sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
        position = np.zeros_like(document)
        position[0, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
        alone = token_arrays(document, position, documents, case.model)
        mask = case.model.packed_mask((document + 1).astype(np.int32))
        yield batch, alone | {"positions": position.astype(np.int32), "mask": mask}


def token_arrays(document, position, documents, model):
    """Arrays `[rows, slots]` of tokens; a slot of no document has -1."""
    real = document >= 0

    def slots(ahead):
        found = [
            documents[d][p + ahead] for d, p in zip(document[real], position[real], strict=True)
        ]
        array = np.zeros(document.shape, np.int32)
        array[real] = found
        return array

    arrays = {"tokens": slots(0), "targets": slots(1), "weights": real.astype(np.float32)}
    if model.mtp_depths:
        depths = range(2, model.mtp_depths + 2)
        arrays["mtp_targets"] = np.stack([slots(d) for d in depths], axis=-1)
        arrays["mtp_weights"] = np.stack([arrays["weights"] for _ in depths], axis=-1)
    return arrays


@functools.cache
def one_device(model):
    """Return the function of a microbatch that returns its loss and means, and gradients."""
    losses = summed_losses(model)

    def total(params, batch):
        found = losses(params, batch)
        return found.total, (found.main, found.means)

    return jax.jit(jax.grad(total, has_aux=True))


def expected(model, params, batches):
    found = [one_device(model)(params, batch) for batch in batches]
    grads, (loss, means) = jax.tree.map(lambda *x: np.sum(x, axis=0), *found)
    return grads, loss, means


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
        placed, alone = zip(*batches[:number], strict=True)
        with jax.set_mesh(case.cp.mesh) if case.explicit else contextlib.nullcontext():
            grads, *scalars = pipeline.sums_and_means(staged, placed)
        assert jax.tree.leaves(grads)[0].sharding.mesh == case.cp.mesh
        found = whole_params(pipeline.stages, grads), *scalars
        pairs = zip(
            jax.tree.leaves_with_path(found),
            jax.tree.leaves(expected(case.model, params, alone)),
            strict=True,
        )
        errors = {jax.tree_util.keystr(p): relative(a, b) for (p, a), b in pairs}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 2e-6, (number, worst, errors[worst])
    # Forward, both, backward, whatever the number of microbatches; and the two ends.
    assert pipeline.num_programs == 5


@pytest.mark.slow
def test_fifty_steps_with_a_layer_of_zeros_are_those_of_one_device():
    model = dataclasses.replace(MODEL, num_layers=3)
    alone = case({"pp": 2}, num_layers=3)
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
    placed, host = zip(*batches, strict=True)
    for _ in range(50):
        grads, loss, _ = expected(model, states[0][0], host)
        staged_grads, staged_loss = pipeline.sums(states[1][0], placed)
        losses.append((float(loss), float(staged_loss)))
        states = [update(*s, g) for s, g in zip(states, (grads, staged_grads), strict=True)]
    one, pipelined = np.transpose(losses)
    assert one[-1] < 0.8 * one[0]
    assert np.abs(pipelined / one - 1).max() <= 2e-4
    zeros = jax.tree.map(lambda x: x[1, 0, 1], states[1][0]["layers"])
    assert not any(map(np.any, jax.tree.leaves(zeros)))
