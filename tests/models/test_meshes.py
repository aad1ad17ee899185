"""The model and its loss on meshes of any axis order and type, and inside a shard_map."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hcp_jax as hcp
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.transformer import abstract_model, init_params

CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="attention",
    mlp_chunk=4,
)
T = 16
TOKENS = np.random.default_rng(0).integers(0, 32, (2, T)).astype(np.int32)
BATCH = {
    "tokens": TOKENS,
    "positions": np.arange(T, dtype=np.int32)[None].repeat(2, 0),
    "targets": np.roll(TOKENS, -1, 1),
    "weights": np.ones((2, T), np.float32),
    "mask": CONFIG.mask(),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WHOLE = PartitionSpec()


def loss(cp, params, batch):
    model = nnx.merge(abstract_model(CONFIG)[0], params)
    hidden = model(batch["tokens"], batch["positions"], mask=batch["mask"], cp=cp)
    targets, weights = batch["targets"], batch["weights"]
    return summed_cross_entropy(hidden, model.unembedding, targets, weights, cp=cp, chunk=4)


@functools.cache
def expected():
    params = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
    return params, jax.jit(jax.value_and_grad(functools.partial(loss, None)))(params, BATCH)


def assert_expected(found):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected()[1]), strict=True):
        scale = np.abs(b).max()
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * scale


MIXED = pytest.param((EXPLICIT, AUTO, AUTO, EXPLICIT), marks=pytest.mark.slow)


@pytest.mark.parametrize("types", [(EXPLICIT,) * 4, MIXED], ids=["explicit", "mixed"])
def test_a_model_on_explicit_axes_is_the_model_of_one_device(types):
    mesh = jax.make_mesh((2, 1, 2, 2), ("cp_inner", "dp", "cp_outer", "tp"), axis_types=types)
    cp = hcp.ContextParallel(mesh, ("p2p", "a2a+p2p"))
    params = jax.device_put(expected()[0], NamedSharding(mesh, WHOLE))
    with jax.set_mesh(mesh) if AUTO in types else contextlib.nullcontext():
        grad_of = jax.jit(jax.value_and_grad(functools.partial(loss, cp)))
        found = grad_of(params, cp.shard_batch(BATCH))
    assert_expected(found)


def mapped_loss(axes, check_vma, types=(AUTO,) * 3):
    """Return a batch, and the loss in a shard_map over the first axes of a mesh."""
    mesh = jax.make_mesh((2, 2, 2), ("rows", "cp_inner", "cp_outer"), axis_types=types)
    inside = "cp_outer" in axes
    cp = hcp.ContextParallel(mesh, "a2a+p2p", dp="rows" if inside else None, tp=None)
    batch = cp.shard_batch(BATCH)
    tokens = cp.spec(2) if inside else PartitionSpec("rows")
    specs = {name: WHOLE if name == "mask" else tokens for name in batch}

    def step(params, batch):
        return jax.lax.psum(loss(cp, params, batch), axes)

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(WHOLE, specs),
        out_specs=WHOLE,
        axis_names=set(axes),
        check_vma=check_vma,
    )
    return mapped, batch


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("axes", [("rows",), ("rows", "cp_inner", "cp_outer")], ids=str)
def test_a_model_inside_a_shard_map_is_the_model_outside(axes, check_vma):
    mapped, batch = mapped_loss(axes, check_vma)
    assert_expected(jax.jit(jax.value_and_grad(mapped))(expected()[0], batch))


def test_what_models_cannot_do_inside_a_shard_map_is_refused():
    mapped, batch = mapped_loss(("rows",), True, (AUTO, EXPLICIT, AUTO))
    with pytest.raises(NotImplementedError, match="leaves other axes Explicit"):
        jax.eval_shape(mapped, expected()[0], batch)
    mesh = hcp.make_mesh(tp=2, cp_outer=4)
    cp = hcp.ContextParallel(mesh, "p2p")
    over_tp = jax.shard_map(
        functools.partial(loss, cp),
        mesh=mesh,
        in_specs=(WHOLE, WHOLE),
        out_specs=WHOLE,
        axis_names={"tp"},
    )
    with pytest.raises(NotImplementedError, match=r"over its tp axis \(tp\)"):
        jax.eval_shape(over_tp, expected()[0], BATCH)


MODES = {
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "64 bits": lambda: jax.enable_x64(True),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_model_works_in_the_modes_of_jax(mode):
    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), "a2a+p2p")
    params, batch = expected()[0], cp.shard_batch(BATCH)
    with MODES[mode]():
        assert_expected(jax.jit(jax.value_and_grad(functools.partial(loss, cp)))(params, batch))


@pytest.mark.slow
def test_a_model_works_without_jit():
    with jax.disable_jit():
        assert_expected(jax.value_and_grad(functools.partial(loss, None))(expected()[0], BATCH))
