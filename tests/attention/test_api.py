"""The table: every strategy, layout, mask, head shape and dtype against the dense oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.cost.traffic import STRATEGIES
from tests import oracle

T = 50  # not a multiple of anything: padded to 64 on eight devices, 60 on six
SOFT_CAP = 3.0
HEADS = {"MHA": (8, 8, 8, 8), "GQA": (8, 2, 8, 8), "MQA, v wider": (8, 1, 8, 12)}
TRITON_HEADS = (8, 2, 16, 16)  # the least head size of its matrix products
MESHES = {
    "4x2": {"cp_outer": 4, "cp_inner": 2},
    "2x4": {"cp_outer": 2, "cp_inner": 4},
    "8 flat": {"cp_outer": 8},
    "2 flat": {"cp_outer": 2},
    "2x2 dp2": {"dp": 2, "cp_outer": 2, "cp_inner": 2},
    "2x2 tp2": {"tp": 2, "cp_outer": 2, "cp_inner": 2},
    "3x2 of 6": {"cp_outer": 3, "cp_inner": 2},
}


@functools.cache
def context(mesh: str, comm_type: str, layout: str = "zigzag") -> hcp.ContextParallel:
    sizes = MESHES[mesh]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices), comm_type, layout)


@functools.cache
def expected(mask: str, heads: str, soft_cap=None, sinks=False) -> oracle.Answer:
    return oracle.attention(
        oracle.inputs(T, *HEADS[heads]), MASKS[mask].dense, soft_cap=soft_cap, sinks=sinks
    )


MASKS = oracle.masks(T)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run(cp, soft_cap, use_sinks, implementation, x: oracle.Inputs, mask):
    def loss(q, k, v, sinks):
        out, lse = hcp.dot_product_attention(
            q,
            k,
            v,
            cp=cp,
            mask=mask,
            sinks=sinks if use_sinks else None,
            logits_soft_cap=soft_cap,
            implementation=implementation,
            return_residual=True,
        )
        seen = jnp.where(lse == -jnp.inf, 0, lse)
        total = jnp.sum(out.astype(jnp.float32) * x.dout) + jnp.sum(seen * x.dlse)
        return total, (out, lse)

    (_, aux), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*x[:4])
    return *aux, *grads


def answer(cp, x: oracle.Inputs, mask, *, soft_cap=None, sinks=False, dtype=np.float32, impl=None):
    """The library's answer in natural order, through its layout and its placed masks."""
    cut = [cp.shard(a.astype(dtype)) if a.ndim > 1 else a for a in x[:4]]
    placed = oracle.Inputs(*cut, *(cp.shard(a) for a in x[4:]))
    out, lse, dq, dk, dv, dsinks = run(cp, soft_cap, sinks, impl, placed, cp.place(mask, T))
    natural = (np.asarray(cp.unshard(a, 1, length=T)) for a in (out, lse, dq, dk, dv))
    return oracle.Answer(*natural, np.asarray(dsinks))


def assert_exact(got: oracle.Answer, want: oracle.Answer, case: str, tolerance: float = 2e-6):
    errors = {
        name: oracle.relative(getattr(got, name), getattr(want, name)) for name in want._fields
    }
    assert max(errors.values()) <= tolerance, f"{case}: {errors}"


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_every_strategy_computes_every_mask_exactly(comm_type, layout):
    cp = context("4x2", comm_type, layout)
    x = oracle.inputs(T, *HEADS["GQA"])
    for name, case in MASKS.items():
        got = answer(cp, x, case.mask)
        assert_exact(got, expected(name, "GQA"), f"{comm_type}, {layout}, {name}")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [name for name in MESHES if name not in ("4x2", "2 flat")])
@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_every_strategy_is_exact_on_every_mesh(comm_type, mesh):
    cp = context(mesh, comm_type)
    x = oracle.inputs(T, *HEADS["GQA"])
    if comm_type == "a2a" and mesh == "3x2 of 6":
        with pytest.raises(ValueError, match=r"N=8 heads; a2a .*=6 needs N % 6 == 0"):
            answer(cp, x, hcp.causal())
        return
    for name in ("causal documents with padding", "prefix-LM", "any intervals", "bidirectional"):
        got = answer(cp, x, MASKS[name].mask)
        assert_exact(got, expected(name, "GQA"), f"{comm_type}, {mesh}, {name}")


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["MHA", "MQA, v wider"])
@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_every_strategy_is_exact_for_every_head_shape(comm_type, heads):
    x = oracle.inputs(T, *HEADS[heads])
    for layout in ("zigzag", "contiguous"):
        for name in ("causal documents with padding", "sliding window"):
            got = answer(context("4x2", comm_type, layout), x, MASKS[name].mask)
            assert_exact(got, expected(name, heads), f"{comm_type}, {layout}, {heads}, {name}")


@pytest.mark.slow
@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_the_triton_kernels_compute_the_same_table(comm_type):
    x = oracle.inputs(T, *TRITON_HEADS)
    for name, case in MASKS.items():
        got = answer(context("4x2", comm_type), x, case.mask, impl="triton")
        want = oracle.attention(x, case.dense)
        assert_exact(got, want, f"{comm_type}, {name}")


@pytest.mark.parametrize("comm_type", ["p2p", "a2a+p2p", "a2a+all_gather"])
def test_soft_cap_and_sinks_count_once_whatever_the_number_of_hops(comm_type):
    cp = context("4x2", comm_type)
    x = oracle.inputs(T, *HEADS["GQA"])
    for name in ("causal", "causal documents with padding"):
        got = answer(cp, x, MASKS[name].mask, soft_cap=SOFT_CAP, sinks=True)
        assert_exact(got, expected(name, "GQA", SOFT_CAP, sinks=True), f"{comm_type}, {name}")


@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_bfloat16_is_no_further_off_than_dense_bfloat16(comm_type):
    x = oracle.inputs(T, *HEADS["GQA"])
    rounded = oracle.Inputs(*(np.asarray(a, jnp.bfloat16).astype(np.float32) for a in x))
    case = MASKS["causal documents with padding"]
    exact = oracle.attention(rounded, case.dense)
    dense = oracle.attention(rounded, case.dense, dtype=jnp.bfloat16)
    got = answer(context("4x2", comm_type), rounded, case.mask, dtype=jnp.bfloat16)
    for name in ("out", "dq", "dk", "dv"):
        ours, theirs = (
            np.linalg.norm(np.asarray(getattr(a, name), np.float64) - getattr(exact, name))
            for a in (got, dense)
        )
        assert ours <= theirs, f"{name}: {ours:.4g} against dense {theirs:.4g}"


@pytest.mark.parametrize("comm_type", ["a2a+p2p", "p2p"])
def test_heads_in_groups_give_the_same_answer(comm_type):
    cp = dataclasses.replace(context("4x2", comm_type), head_groups=2)
    x = oracle.inputs(T, 8, 4, 8, 8)
    case = MASKS["causal documents with padding"]
    want = oracle.attention(x, case.dense, soft_cap=SOFT_CAP, sinks=True)
    got = answer(cp, x, case.mask, soft_cap=SOFT_CAP, sinks=True)
    assert_exact(got, want, comm_type)


def test_one_device_needs_no_mesh():
    x = oracle.inputs(T, *HEADS["GQA"])
    for impl in ("reference", "blockwise"):
        for name, case in MASKS.items():
            numbers = hcp.intervals(*case.mask.intervals(T))  # one kind of mask: one compile
            got = run(None, None, False, impl, x, numbers)
            assert_exact(
                oracle.Answer(*map(np.asarray, got)), expected(name, "GQA"), f"{impl}, {name}"
            )


def test_a_query_that_sees_nothing_gives_zeros_and_zero_gradients():
    nothing = hcp.intervals(*(np.zeros((1, T), np.int32),) * 2)
    got = answer(context("4x2", "a2a+p2p"), oracle.inputs(T, *HEADS["GQA"]), nothing)
    assert np.all(got.lse == -np.inf)
    assert not any(np.any(a) for a in (got.out, got.dq, got.dk, got.dv))


def test_masks_in_natural_order_are_placed_by_the_op():
    cp = context("4x2", "a2a+p2p")
    x = oracle.inputs(T, *HEADS["GQA"])
    q, k, v = (cp.shard(a) for a in x[:3])
    for name, case in MASKS.items():
        if name == "bidirectional":  # does not know where padding begins
            continue
        if name == "any intervals":  # are taken as they are: those that reach into padding see it
            case = case._replace(mask=case.mask & hcp.lengths(T))
        out = hcp.dot_product_attention(q, k, v, cp=cp, mask=case.mask)
        error = oracle.relative(cp.unshard(out, length=T), expected(name, "GQA").out)
        assert error <= 2e-6, name
    out = hcp.dot_product_attention(q, k, v, cp=cp, mask=hcp.bidirectional() & hcp.lengths(T))
    assert oracle.relative(cp.unshard(out, length=T), expected("bidirectional", "GQA").out) <= 2e-6


def test_is_causal_is_the_causal_mask():
    cp = context("4x2", "p2p")
    q, k, v = (cp.shard(a) for a in oracle.inputs(T, *HEADS["GQA"])[:3])
    out = hcp.dot_product_attention(q, k, v, cp=cp, is_causal=True)
    assert oracle.relative(cp.unshard(out, length=T), expected("causal", "GQA").out) <= 2e-6


def test_keys_may_be_of_another_length_than_queries():
    cp = context("4x2", "a2a+p2p")
    x, y = oracle.inputs(48, *HEADS["GQA"]), oracle.inputs(80, *HEADS["GQA"])
    out = hcp.dot_product_attention(cp.shard(x.q), cp.shard(y.k), cp.shard(y.v), cp=cp)
    both = jax.nn.dot_product_attention(x.q, y.k, y.v)
    assert oracle.relative(cp.unshard(out), both) <= 2e-6


@pytest.mark.parametrize(("length", "key_length"), [(1, 2), (3, 4), (13, 16), (16, 13), (4, 9)])
def test_cross_attention_sees_the_keys_that_intervals_say_whatever_the_lengths(length, key_length):
    cp = context("2 flat", "p2p", "contiguous")
    x, y = oracle.inputs(length, 2, 1, 4, 4), oracle.inputs(key_length, 2, 1, 4, 4)
    rng = np.random.default_rng(length)
    start = rng.integers(0, key_length, (1, length)).astype(np.int32)
    end = rng.integers(start, key_length + 1).astype(np.int32)
    end[0, -1] = key_length
    dense = (start[..., None] <= np.arange(key_length)) & (np.arange(key_length) < end[..., None])
    want = oracle.attention(x._replace(k=y.k, v=y.v), dense).out
    q, k, v = cp.shard(x.q), cp.shard(y.k), cp.shard(y.v)
    mask = hcp.intervals(start, end)
    for here in (mask, cp.place(mask, length, key_length)):
        out = hcp.dot_product_attention(q, k, v, cp=cp, mask=here)
        assert oracle.relative(cp.unshard(out, length=length), want) <= 2e-6
    alone = hcp.dot_product_attention(x.q, y.k, y.v, mask=mask)
    assert oracle.relative(alone, want) <= 2e-6
    if cp.padded_length(length) != cp.padded_length(key_length):
        with pytest.raises(ValueError, match=r"placed for .* keys .* key_length=S"):
            hcp.dot_product_attention(q, k, v, cp=cp, mask=cp.place(mask, length))


def test_the_op_works_under_remat_and_scan():
    cp = context("4x2", "a2a+p2p")
    x = cp.shard(oracle.inputs(T, 4, 4, 8, 8).q)

    def layer(x, _):
        return hcp.dot_product_attention(x, x, x, cp=cp, is_causal=True), None

    def loss(x, body):
        return jnp.sum(jax.lax.scan(body, x, None, length=2)[0] ** 2)

    plain = jax.jit(jax.grad(functools.partial(loss, body=layer)))(x)
    remat = jax.jit(jax.grad(functools.partial(loss, body=jax.checkpoint(layer))))(x)
    assert oracle.relative(remat, plain) <= 1e-6


def test_the_op_works_under_vmap():
    cp = context("4x2", "a2a+p2p")
    x = oracle.inputs(48, *HEADS["GQA"])
    attend = functools.partial(hcp.dot_product_attention, cp=cp, is_causal=True)
    two = [jnp.stack([cp.shard(a), cp.shard(2 * a)]) for a in x[:3]]
    out = jax.jit(jax.vmap(attend))(*two)
    for i in range(2):
        assert oracle.relative(out[i], attend(*(a[i] for a in two))) <= 1e-6


def test_the_op_works_inside_the_shard_map_of_a_pipeline():
    mesh = jax.make_mesh(
        (2, 2, 2), ("pp", "cp_outer", "cp_inner"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    cp = hcp.ContextParallel(mesh, "a2a+p2p", dp=None, tp=None)
    x = oracle.inputs(48, *HEADS["GQA"])

    def stage(q, k, v):
        out = hcp.dot_product_attention(q, k, v, cp=cp, is_causal=True)
        return jax.lax.ppermute(out, "pp", [(0, 1), (1, 0)])

    rows = jax.sharding.PartitionSpec("pp")
    piped = jax.shard_map(
        stage, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"pp"}, check_vma=False
    )
    out = jax.jit(piped)(*(cp.shard(a) for a in x[:3]))
    swapped = np.asarray(cp.unshard(out))[::-1]
    plain = jax.nn.dot_product_attention(*x[:3], is_causal=True)
    assert oracle.relative(swapped, plain) <= 2e-6


def test_other_axes_of_a_mesh_are_left_alone():
    mesh = jax.make_mesh(
        (2, 2, 2), ("fsdp", "ring", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    cp = hcp.ContextParallel(mesh, "p2p", dp="fsdp", tp=None, cp_outer="ring", cp_inner=None)
    x = oracle.inputs(48, *HEADS["GQA"])
    attend = jax.jit(functools.partial(hcp.dot_product_attention, cp=cp, is_causal=True))
    out = attend(*(cp.shard(a) for a in x[:3]))
    plain = jax.nn.dot_product_attention(*x[:3], is_causal=True)
    assert oracle.relative(cp.unshard(out), plain) <= 2e-6


BAD_CALLS = {
    "q, k and v must have one dtype": lambda q, k: (q, k.astype(jnp.bfloat16), k),
    r"q must be \[B, T, N, H\]": lambda q, k: (q[0], k, k),
    "one batch size B": lambda q, k: (q, k[:1], k[:1]),
    "the same length S and heads K": lambda q, k: (q, k, k[:, :32]),
    "the same head size H": lambda q, k: (q, k[..., :4], k[..., :4]),
    "K must divide N": lambda q, k: (q[:, :, :7], k, k),
    "must be of float16": lambda q, k: (q.astype(int), k.astype(int), k.astype(int)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_arrays_that_do_not_fit_are_refused(message):
    x = oracle.inputs(64, *HEADS["GQA"])
    with pytest.raises(ValueError, match=message):
        hcp.dot_product_attention(*BAD_CALLS[message](jnp.asarray(x.q), jnp.asarray(x.k)))


def test_bad_masks_names_and_sizes_are_refused_with_what_to_do():
    cp = context("4x2", "a2a+p2p")
    x = oracle.inputs(64, *HEADS["GQA"])
    q, k, v = x[:3]
    attend = functools.partial(hcp.dot_product_attention, cp=cp)
    with pytest.raises(ValueError, match=r"mask must be a hcp_jax.Mask, got ndarray"):
        attend(q, k, v, mask=np.ones((64, 64), bool))
    with pytest.raises(
        ValueError, match=r"unknown implementation 'blockwize'.*did you mean 'blockwise'"
    ):
        attend(q, k, v, implementation="blockwize")
    with pytest.raises(ValueError, match=r"q has 50 tokens, .* pads it to 64"):
        attend(q[:, :50], k, v)
    with pytest.raises(ValueError, match=r"mask was written for 70 queries, but there are only 64"):
        attend(q, k, v, mask=hcp.documents(np.zeros(70, int)))
    with pytest.raises(ValueError, match="placed for"):
        attend(q, k, v, mask=context("4x2", "p2p", "contiguous").place(hcp.causal(), 64))
    with pytest.raises(ValueError, match=r"placed for 32 queries \(padded\), but q has 64"):
        attend(q, k, v, mask=cp.place(hcp.causal(), 30))
    with pytest.raises(ValueError, match=r"length must be an integer >= 0, got 3.5"):
        cp.place(hcp.causal(), 3.5)
    with pytest.raises(ValueError, match="sinks must have one logit per query head"):
        attend(q, k, v, sinks=np.zeros(3))
    with pytest.raises(ValueError, match=r"the mask has 3 rows, but q has a batch of 2"):
        attend(q, k, v, mask=hcp.prefix_lm(np.array([1, 2, 3])))
    with pytest.raises(ValueError, match=r"N=5 heads; a2a\+p2p over cp_inner=2 needs N % 2 == 0"):
        attend(q[:, :, :5], k[:, :, :1], v[:, :, :1])
    with pytest.raises(
        ValueError, match=r"head_groups=2 must divide the 1 kv heads .* use one of 1"
    ):
        hcp.dot_product_attention(q, k, v, cp=dataclasses.replace(cp, head_groups=2))
    with pytest.raises(ValueError, match="one comm_type per layer"):
        hcp.dot_product_attention(q, k, v, cp=hcp.ContextParallel(cp.mesh, ("p2p", "a2a")))
