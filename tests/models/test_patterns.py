"""Models whose layers differ: windows, positions, norms and sizes by pattern."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.base.settings import fixed_values
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.attention import Attention, narrowed
from hcp_jax.models.layers.decoder import DecoderLayer
from hcp_jax.models.pattern import LayerConfig
from hcp_jax.models.specs import plan
from hcp_jax.models.transformer import Transformer, abstract_model, init_params
from hcp_jax.parallel.microbatch import place_microbatch
from hcp_jax.sequence.layout import to_layout

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 4,
    "num_kv_heads": 4,
    "compute_dtype": "float32",
}
T, IDS = 32, np.repeat([[1] * 19 + [2] * 13, [1] * 32], 1, 0).astype(np.int32)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, T)).astype(np.int32)
POSITIONS = np.stack([np.r_[np.arange(19), np.arange(13)], np.arange(T)]).astype(np.int32)
MANY = ModelConfig(
    **SIZES,
    num_layers=8,
    rope_theta=1e5,
    layers=(
        LayerConfig(sliding_window=5, rope_theta=1e3),
        LayerConfig(sliding_window=11, rotary_share=0.5, mlp_bias=True),
        LayerConfig(rotary=False, head_size=8, intermediate_size=48, o_bias=True, norms="both"),
    ),
)


def of_layers(config, params):
    """The parameters of each layer, in the order of the model."""
    stacks = config.plan.stacks
    alone = len(stacks) == 1
    found = {}
    for s, stack in enumerate(stacks):
        own = params["layers"] if alone else params["layers"][str(s)]
        for i, layer in enumerate(stack.layers):
            found[layer] = jax.tree.map(lambda p, i=i: p[i], own)
    return [found[i] for i in range(config.num_layers)]


def layer_by_layer(config, params):
    """Logits from layers that are called one by one, each with a mask written for it alone."""
    x = params["embed_tokens"]["embedding"][TOKENS]
    for spec, p in zip(config.specs, of_layers(config, params), strict=True):
        window = spec.mixer.window
        mask = hcp.causal() & hcp.documents(IDS)
        mask = mask if window is None else mask & hcp.sliding_window(window)
        graph, _ = nnx.split(nnx.eval_shape(lambda s=spec: DecoderLayer(s, rngs=nnx.Rngs(0))))
        shared = Attention.share(spec.mixer, POSITIONS, mask, window)
        x, _ = nnx.merge(graph, p)(x, shared, None, None)
    model = nnx.merge(abstract_model(config)[0], params)
    return model.logits(model.norm(x))


@pytest.fixture(scope="module")
def params():
    leaves, tree = jax.tree.flatten(init_params(MANY, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [x + 0.1 * rng.normal(size=x.shape) for x in leaves])


def logits(config, params, cp=None):
    graph, _ = abstract_model(config)
    batch = {"tokens": TOKENS, "positions": POSITIONS, "mask": config.mask(IDS)}
    batch = batch if cp is None else cp.shard_batch(batch)

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch["tokens"], batch["positions"], mask=batch["mask"], cp=cp))

    return run(params, batch)


def test_layers_of_a_pattern_are_computed_in_order_each_with_its_own_settings(params):
    assert [stack.layers for stack in MANY.plan.stacks] == [(0, 3, 6), (1, 4, 7), (2, 5)]
    np.testing.assert_allclose(logits(MANY, params), layer_by_layer(MANY, params), atol=2e-5)


@pytest.mark.parametrize(
    "comm_type", ["a2a+p2p", ("p2p", "all_gather", "p2p", "a2a+p2p") * 2], ids=["one", "mixed"]
)
def test_a_pattern_over_a_mesh_computes_what_one_device_does(params, comm_type):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=2, cp_inner=2, tp=2), comm_type=comm_type)
    here = cp.unshard(logits(MANY, params, cp), dim=1)
    np.testing.assert_allclose(here, logits(MANY, params), atol=2e-5)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_a_placed_mask_narrowed_to_a_window_is_the_placed_mask_of_the_window(layout):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), layout=layout)
    for wide in (hcp.causal() & hcp.documents(IDS), hcp.prefix_lm(9), hcp.bidirectional()):
        got = narrowed(cp.place(wide, T), 7).intervals
        for g, w in zip(got, (wide & hcp.sliding_window(7)).intervals(T), strict=True):
            assert np.array_equal(g, to_layout(np.asarray(w), 8, layout, 1))


def test_a_microbatch_narrowed_to_a_window_is_the_microbatch_of_the_window():
    cp = hcp.ContextParallel(
        hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), comm_type="p2p", widest_group=4
    )
    documents = ((0, 1), (2,), (3,), (4,))
    packed = dynamic.pack(
        dynamic.Microbatch((4, 2, 1, 1), documents), np.array([19, 8, 11, 5, 7]), 8
    )
    wide = place_microbatch(cp, packed, {})["mask"]
    own = place_microbatch(cp, packed, {}, sliding_window=6)["mask"]
    got = narrowed(wide, 6)
    for here, wanted in zip(got.intervals, own.intervals, strict=True):
        assert np.array_equal(here, wanted)
    assert int(np.max(got.intervals.end)) > 16
    assert (got.placement, got.runs) == (wide.placement, wide.runs)


@pytest.mark.parametrize(
    ("specs", "stacks", "sections"),
    [
        ("AAAA", [(0, 1, 2, 3)], [((0,), 0, 4, 0)]),
        ("ABABA", [(0, 2, 4), (1, 3)], [((0, 1), 0, 2, 0), ((0,), 4, 1, 2)]),
        ("AABB", [(0, 1), (2, 3)], [((0,), 0, 2, 0), ((1,), 2, 2, 0)]),
        ("AAB" * 3, [(0, 3, 6), (1, 4, 7), (2, 5, 8)], [((0, 1, 2), 0, 3, 0)]),
        ("A", [(0,)], [((0,), 0, 1, 0)]),
    ],
)
def test_layers_are_stacked_by_period_or_by_runs(specs, stacks, sections):
    found = plan(specs)
    assert [stack.layers for stack in found.stacks] == stacks
    assert list(found.sections) == sections


def test_the_settings_of_equal_layers_are_those_of_a_model_without_pattern():
    alike = ModelConfig(**SIZES, num_layers=4, layers=(LayerConfig(sliding_window=4),) * 2)
    plain = ModelConfig(**SIZES, num_layers=4, sliding_window=4)
    assert alike.plan == plain.plan
    assert alike.widest_window == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": "WB", "sliding_window": 4}, "unknown letters B"),
        ({"layers": "WA"}, "sliding_window is null"),
        ({"layers": "AA", "sliding_window": 4}, "has no W"),
        ({"layers": ""}, "has 0 layers"),
        ({"layers": (LayerConfig(),) * 5}, "has 5 layers, and the model has num_layers=4"),
        ({"layers": (LayerConfig(rotary_share=0.3),)}, "times rotary_share=0.3"),
        ({"layers": (LayerConfig(head_size=5),)}, "head size is 5"),
        ({"norms": "twice"}, "norms must be one of before, after, both"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig(**SIZES, num_layers=4, **options)


def test_numbers_of_a_layer_have_bounds():
    with pytest.raises(ValueError, match="model.layers: sliding_window must be positive"):
        LayerConfig(sliding_window=0)


def test_a_mask_of_the_model_has_the_window_of_the_widest_layer():
    assert MANY.mask() == hcp.causal()
    narrow = dataclasses.replace(MANY, layers=MANY.layers[:2])
    assert narrow.mask() == hcp.causal() & hcp.sliding_window(11)
    assert narrow.window_shares == {5: 0.5, 11: 0.5}


def test_final_soft_cap_and_embedding_scale_change_the_model_as_named():
    config = ModelConfig(**SIZES, num_layers=1)
    model = Transformer(config, rngs=nnx.Rngs(0))
    hidden = model(TOKENS, POSITIONS)
    capped = dataclasses.replace(config, final_soft_cap=0.25)
    plain = model.logits(hidden)
    model.config = capped
    np.testing.assert_allclose(model.logits(hidden), 0.25 * np.tanh(plain / 0.25), rtol=1e-5)
    model.config = dataclasses.replace(config, embedding_scale=3.0)
    scaled = model(TOKENS, POSITIONS)
    model.config = config
    model.embed_tokens.embedding[...] = 3.0 * model.embed_tokens.embedding[...]
    np.testing.assert_allclose(scaled, model(TOKENS, POSITIONS), rtol=1e-5)


def test_a_checkpoint_of_a_model_without_pattern_is_described_as_before_there_were_patterns():
    plain = fixed_values(ModelConfig(**SIZES, num_layers=4))
    assert set(plain) == {
        *("vocab_size", "num_layers", "hidden_size", "intermediate_size", "num_heads"),
        *("num_kv_heads", "head_size", "qk_norm", "qkv_bias", "tie_embeddings", "attention_sinks"),
    }
    assert fixed_values(MANY)["layers"][0]["sliding_window"] == 5
