"""Multi-token prediction against its definition, document by document, and on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import hcp_jax as hcp
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import config_json, loading
from hcp_jax.models.layers.attention import Attention
from hcp_jax.models.mtp import look_ahead
from hcp_jax.models.transformer import abstract_model, init_params, rule
from hcp_jax.train import config as configuration
from hcp_jax.train.data import Corpus
from hcp_jax.train.data.batches import read, token_arrays
from hcp_jax.train.losses import summed_losses
from hcp_jax.train.portions import Sums, reduced_once, split_portions, sum_portions
from hcp_jax.train.sharding import param_specs
from hcp_jax.train.step import summed_gradients

T, DEPTHS, LONGEST = 28, 2, 12
SIZES = [(1, 2, 12, 12), (12, 12), (2, 12), (1, 1, 2, 12)]
"""The documents of each row; most rows end with padding."""
MODEL = ModelConfig(
    vocab_size=260,
    num_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_heads=2,
    num_kv_heads=2,
    compute_dtype="float32",
    loss_chunk=8,
    mtp_depths=DEPTHS,
    mtp_loss_weight=0.5,
)


@functools.cache
def corpus():
    rng = np.random.default_rng(0)
    return Corpus([rng.bytes(size - 1) for row in SIZES for size in row], "a test")


@functools.cache
def batch():
    """The documents in rows, as the data pipeline makes a batch of their references."""
    refs, ids, positions = np.zeros((3, len(SIZES), T), np.int64)
    number = 0
    for row, sizes in enumerate(SIZES):
        at = 0
        for size in sizes:
            here = slice(at, at := at + size)
            refs[row, here] = corpus().refs(number, 0, size)
            positions[row, here], ids[row, here] = np.arange(size), number + 1
            number += 1
    arrays = read(token_arrays(corpus(), refs, DEPTHS))
    return arrays | {
        "positions": positions.astype(np.int32),
        "mask": MODEL.mask(ids.astype(np.int32)),
    }


def places():
    """(row, slot, ids of the document from the token at this slot on) of every token."""
    number = 0
    for row, sizes in enumerate(SIZES):
        at = 0
        for size in sizes:
            ids = [corpus().separator, *corpus()[number].tolist(), corpus().end]
            yield from ((row, at + i, ids[i:]) for i in range(size))
            at, number = at + size, number + 1


def test_targets_are_those_further_on_in_the_document_and_of_no_other():
    made = batch()
    further, weights = look_ahead(
        made["targets"], made["weights"], made["positions"], depths=DEPTHS
    )
    np.testing.assert_array_equal(made["mtp_targets"], further)
    np.testing.assert_array_equal(made["mtp_weights"], weights)
    want = np.zeros((len(SIZES), T, DEPTHS + 1))
    for row, slot, ids in places():
        want[row, slot, : len(ids) - 1] = ids[1 : DEPTHS + 2]
    counted = np.concatenate([made["weights"][..., None], made["mtp_weights"]], axis=-1)
    targets = np.concatenate([made["targets"][..., None], made["mtp_targets"]], axis=-1)
    np.testing.assert_array_equal(targets, want)
    lengths = np.array([size for row in SIZES for size in row])
    for depth in range(DEPTHS + 1):
        assert counted[..., depth].sum() == np.maximum(lengths - depth, 0).sum()


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_on_devices_they_are_rolled_across_borders(layout):
    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), "p2p", layout=layout)
    arrays = [batch()[name] for name in ("targets", "weights", "positions")]
    got = jax.jit(lambda *x: look_ahead(*x, 5, cp=cp))(*map(cp.shard, arrays))
    for here, want in zip(got, look_ahead(*arrays, 5), strict=True):
        np.testing.assert_array_equal(cp.unshard(here, length=T), want)


@functools.cache
def params():
    made = init_params(MODEL, jax.random.key(1))
    # Norms that do nothing would hide one that is left out.
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(made))))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), made)


def by_definition():
    """Σ loss of each depth, each document alone, from the ids of the document."""
    model = nnx.merge(abstract_model(MODEL)[0], params())
    table, unembedding = (np.asarray(x.embedding) for x in (model.embed_tokens, model.lm_head))
    here, layer = np.arange(LONGEST, dtype=np.int32)[None], MODEL.specs[-1]
    shared = Attention.share(layer.mixer, jnp.asarray(here), MODEL.mask(), None)
    apply = jax.jit(lambda layer, x: layer(x, shared, None, None)[0])
    alone = jax.jit(model)
    depths = [
        nnx.merge(graph, jax.tree.map(lambda x, d=d: x[d], stacked))
        for graph, stacked in [nnx.split(model.mtp)]
        for d in range(DEPTHS)
    ]
    losses = np.zeros(DEPTHS + 1)
    for ids in [ids for _, _, ids in places() if ids[0] == corpus().separator]:
        # Tokens behind the document are not seen.
        padded = np.array(ids + [0] * (LONGEST + DEPTHS), np.int32)
        hidden = normed = alone(padded[None, :LONGEST], here)
        for depth in range(DEPTHS + 1):
            if depth:
                own = depths[depth - 1]
                embedded = table[padded[depth : depth + LONGEST]][None]
                both = [_rms(embedded, own.enorm), _rms(hidden, own.hnorm)]
                x = np.concatenate(both, -1) @ np.asarray(own.eh_proj.kernel)
                hidden = apply(own.layer, jnp.asarray(x, jnp.float32))
                normed = _rms(hidden, own.norm)
            targets = np.array(ids[depth + 1 :], int)  # as many tokens have a target
            logits = (np.asarray(normed, np.float64) @ unembedding.T)[0, : len(targets)]
            log_z = np.log(np.exp(logits).sum(-1))
            losses[depth] += (log_z - logits[np.arange(len(targets)), targets]).sum()
    return losses


def _rms(x, norm):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_eps) * np.asarray(norm.scale)


@functools.cache
def alone():
    """Losses and gradients of the batch on one device."""

    def total(params, batch):
        found = summed_losses(MODEL)(params, batch)
        return found.total, found

    return jax.jit(jax.grad(total, has_aux=True))(params(), batch())


def test_losses_are_those_of_the_definition():
    grads, found = alone()
    want = by_definition()
    by_depth = [found.means[f"mtp_loss_{d + 1}"] for d in range(DEPTHS)]
    np.testing.assert_allclose([found.main, *(x.total for x in by_depth)], want, rtol=1e-5)
    counts = [x.tokens for x in by_depth]
    np.testing.assert_array_equal(counts, batch()["mtp_weights"].sum((0, 1)))
    np.testing.assert_allclose(found.total, want[0] + 0.5 * want[1:].mean(), rtol=1e-5)
    # Every depth is trained, and feeds the next.
    for x in jax.tree.leaves(grads["mtp"]):
        assert (np.abs(x).reshape(DEPTHS, -1).max(axis=1) > 0).all()


@pytest.mark.slow
def test_losses_and_gradients_are_the_same_on_devices_and_in_portions():
    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, tp=2, cp_outer=2), "p2p")
    specs = param_specs(params(), cp)
    like = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(cp.mesh, spec)
        ),
        params(),
        specs,
    )
    summed = reduced_once(functools.partial(sum_portions, summed_gradients(MODEL, like, cp)), cp)
    got = jax.jit(lambda params, batch: summed(params, split_portions(batch, 2, cp), 1.0))(
        params(), cp.shard_batch(batch())
    )
    grads, found = alone()
    want = Sums(grads, found.main, batch()["weights"].sum(), found.means)
    for here, there in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5 * np.abs(there).max())


def test_parameters_are_cut_and_decayed_as_those_of_layers():
    cp = hcp.ContextParallel(hcp.make_mesh(tp=2, cp_outer=2, cp_inner=2))
    specs = param_specs(abstract_model(MODEL)[1], cp, fsdp=True)
    axes = ("cp_outer", "cp_inner")
    assert specs["mtp"]["layer"] == specs["layers"]
    assert tuple(specs["mtp"]["eh_proj"]["kernel"]) == (None, axes, None)
    assert rule(("mtp", "eh_proj", "kernel")).decay
    assert not rule(("mtp", "enorm", "scale")).decay


def test_wrong_calls_are_refused():
    made = batch()
    losses = summed_losses(MODEL)
    with pytest.raises(ValueError, match="mtp_depths=2, so a batch needs .* has none: make_b"):
        losses(params(), {n: x for n, x in made.items() if n != "mtp_targets"})
    with pytest.raises(ValueError, match="has those of 1"):
        losses(params(), made | {"mtp_targets": made["mtp_targets"][..., :1]})
    model = nnx.merge(abstract_model(MODEL)[0], params())
    with pytest.raises(ValueError, match="mtp_depths=2, but the targets"):
        model.further(jnp.ones((len(SIZES), T, 8)), made["mtp_targets"][..., :1], made["positions"])
    arrays = [made[name] for name in ("targets", "weights", "positions")]
    with pytest.raises(ValueError, match="depths"):
        look_ahead(*arrays, 0)
    groups = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), widest_group=8)
    with pytest.raises(NotImplementedError, match=r"cp.roll .* shifted targets"):
        look_ahead(*map(jnp.asarray, arrays), 1, cp=groups)


def test_folders_of_hugging_face_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="mtp_depths=2: Hugging Face folders"):
        loading.slots(MODEL)
    with pytest.raises(NotImplementedError, match="mtp_depths=2: Hugging Face folders"):
        config_json.raw_config(MODEL, 64, "float32")
    raw = config_json.raw_config(dataclasses.replace(MODEL, mtp_depths=0), 64, "float32")
    with pytest.raises(NotImplementedError, match="num_nextn_predict_layers=1 is not supported"):
        config_json.model_config(raw | {"num_nextn_predict_layers": 1})


@pytest.mark.parametrize("word", ["num_nextn_predict_layers", "mtp_num_layers"])
def test_words_of_other_programs_are_understood(word):
    with pytest.raises(ValueError, match=f"{word}.*did you mean 'model.mtp_depths'"):
        configuration.load(None, [(f"model.{word}", "1")])
