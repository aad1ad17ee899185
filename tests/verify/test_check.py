"""`hcp.check` names what is wrong with small programs, and finds nothing wrong with right ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax.verify.check import INPUTS, MASK_LENGTH, PADDING
from hcp_jax.verify.repairs import ALONE, POSITIONS, SHIFTS

T, HEADS, H = 24, 4, 4


def _cp(comm_type="a2a+p2p", layout="zigzag"):
    mesh = hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2)
    return hcp.ContextParallel(mesh, comm_type=comm_type, layout=layout)


def _batch(length=T, rows=2):
    tokens = np.random.default_rng(0).integers(1, 20, (rows, length))
    x = np.random.default_rng(1).normal(size=(rows, length, HEADS * H)).astype(np.float32)
    return {"tokens": tokens, "x": x}


def _rotate(x, positions):
    """Some function of the position that is not linear in it."""
    return x * jnp.cos(0.3 * positions[..., None, None])


def _embedded(weights, x, cp, mistake):
    """One layer and its prediction of the next token's input: a loss in natural order."""
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights["qkv"])
    positions = np.arange(x.shape[1])[None] if mistake == POSITIONS else cp.positions(x.shape[1])
    q, k = _rotate(q, positions), _rotate(k, positions)
    out = hcp.dot_product_attention(
        q, k, v, cp=None if mistake == ALONE else cp, mask=hcp.causal() & hcp.sliding_window(9)
    )
    out = jnp.einsum("btnh,nhd->btd", out, weights["out"])
    target = jnp.roll(x, -1, axis=1) if mistake == SHIFTS else cp.roll(x, -1, dim=1)
    error = jnp.sum((out - target) ** 2, axis=2)
    if mistake == PADDING:
        return jnp.mean(error)
    real = (
        cp.positions(x.shape[1]) < T - 3
    )  # the last ones have no next token, or none that is real
    return jnp.sum(jnp.where(real, error, 0))


def _weights():
    keys = jax.random.split(jax.random.key(0), 4)
    qkv = [jax.random.normal(key, (HEADS * H, HEADS, H)) / 5 for key in keys[:3]]
    return {"qkv": qkv, "out": jax.random.normal(keys[3], (HEADS, H, HEADS * H)) / 5}


def _step(mistake, weights, batch, cp):
    x = jnp.asarray(batch["x"]) if mistake == INPUTS else cp.shard(batch["x"], dim=1)
    return _embedded(weights, x, cp, mistake)


class Decoder(nnx.Module):
    """Tokens to logits, by Flax's own attention module."""

    def __init__(self, cp, mistake, rngs):
        self.cp, self.mistake = cp, mistake
        self.embed = nnx.Embed(20, HEADS * H, rngs=rngs)
        self.places = nnx.Embed(4 * T, HEADS * H, rngs=rngs)
        own = None if mistake == ALONE else cp
        mask = None if mistake == PADDING else hcp.causal()
        self.attend = nnx.MultiHeadAttention(
            HEADS,
            HEADS * H,
            attention_fn=hcp.attention_fn(own, mask=mask),
            decode=False,
            rngs=rngs,
        )

    def __call__(self, batch):
        tokens, cp = batch["tokens"], self.cp
        length = tokens.shape[1]
        x = self.embed(tokens)
        x += self.places(
            jnp.arange(length)[None] if self.mistake == POSITIONS else cp.positions(length)
        )
        if self.mistake == SHIFTS:
            before = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        else:
            first = cp.positions(length)[..., None] == 0
            before = jnp.where(first, 0, cp.roll(x, 1, dim=1))
        return self.embed.attend(self.attend(x + before))


def _build(mistake, cp):
    return Decoder(cp, mistake, nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("comm_type", "layout"), [("p2p", "zigzag"), ("a2a+p2p", "contiguous"), ("p2p", "contiguous")]
)
def test_a_right_function_passes_with_padding_too(comm_type, layout):
    step, batch = functools.partial(_step, None), {"x": _batch(T - 1)["x"]}
    report = hcp.check(step, batch, _cp(comm_type, layout), params=_weights())
    assert report.ok, report
    assert list(report.differences) == [
        "output",
        "gradient of params['out']",
        *(f"gradient of params['qkv'][{i}]" for i in range(3)),
        "gradient of batch['x']",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("comm_type", "layout"), [("a2a+p2p", "zigzag"), ("p2p", "zigzag"), ("a2a+p2p", "contiguous")]
)
def test_a_right_model_passes_with_padding_too(comm_type, layout):
    batch = {"tokens": _batch(T - 1)["tokens"]}
    report = hcp.check(functools.partial(_build, None), batch, _cp(comm_type, layout))
    assert report.ok, report
    assert len(report.differences) == 11
    assert "gradient of params['embed']['embedding'].value" in report.differences


_SLOW = [pytest.param(mistake, marks=pytest.mark.slow) for mistake in (POSITIONS, SHIFTS, PADDING)]


@pytest.mark.parametrize("mistake", [INPUTS, ALONE, *_SLOW])
def test_a_mistake_in_a_function_is_named(mistake):
    step = functools.partial(_step, mistake)
    batch = {"x": _batch(T - 1 if mistake == PADDING else T)["x"]}
    report = hcp.check(step, batch, _cp(), params=_weights())
    assert report.mistakes == (mistake,), report
    assert not report.ok
    assert f"looks like: {mistake}. " in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [POSITIONS, SHIFTS, ALONE, PADDING])
def test_a_mistake_in_a_model_is_named(mistake):
    batch = {"tokens": _batch(T - 1 if mistake == PADDING else T)["tokens"]}
    report = hcp.check(functools.partial(_build, mistake), batch, _cp())
    assert report.mistakes == (mistake,), report


def test_two_mistakes_and_an_entry_that_was_forgotten_are_told_apart():
    """The labels were never placed, and positions are those of the layout's places."""

    def step(batch, cp):
        x = cp.shard(batch["x"], dim=1) * jnp.arange(T)[None, :, None]
        return jnp.sum(jnp.sin(x) * batch["labels"][..., None] * cp.positions(T)[..., None])

    batch = {"x": _batch()["x"], "labels": _batch()["tokens"].astype(np.float32)}
    report = hcp.check(step, batch, _cp())
    assert report.mistakes == (INPUTS, POSITIONS), report
    assert report.notes == ("never put in the layout: labels",)


def test_a_mask_of_too_few_tokens_is_named_and_raised_if_asked():
    def step(batch, cp):
        x = cp.shard(batch["x"].reshape(2, T, HEADS, H), dim=1)
        mask = hcp.causal() & hcp.documents(np.repeat([1, 2], 5))
        return hcp.dot_product_attention(x, x, x, cp=cp, mask=mask)

    with pytest.raises(ValueError, match=f"(?s)MaskLengthError.*looks like: {MASK_LENGTH}"):
        hcp.check(step, {"x": _batch()["x"]}, _cp(), raise_if_wrong=True)


def test_a_mask_of_the_batch_of_too_few_tokens_is_refused_when_it_is_placed():
    batch = {"x": _batch()["x"], "mask": hcp.documents(np.repeat([1, 2], 5))}
    with pytest.raises(ValueError, match="written for 10 queries, .* pads to 16, but there are 24"):
        _cp().shard_batch(batch)

    def step(batch, cp):
        return cp.shard_batch(batch)["x"]

    assert hcp.check(step, batch, _cp()).mistakes == (MASK_LENGTH,)


def test_a_weight_of_zero_may_hide_what_padding_changes():
    def step(batch, cp):
        x, weights = (cp.shard(batch[name], dim=1) for name in ("x", "weights"))
        return jnp.sum(weights[..., None] * cp.roll(x, -1, dim=1) ** 2)

    weights = np.ones((2, T - 1), np.float32)
    weights[:, -1] = 0
    report = hcp.check(step, {"x": _batch(T - 1)["x"], "weights": weights}, _cp())
    assert report.ok, report


def test_what_is_wrong_otherwise_is_not_called_one_of_the_mistakes():
    def step(batch, cp):
        return cp.shard(batch["x"], dim=1) * cp.size

    report = hcp.check(step, {"x": _batch()["x"]}, _cp())
    assert not report.ok
    assert report.mistakes == ()
    assert "no known mistake explains it" in str(report)

    def broken(batch, cp):
        if cp.size > 1:
            raise KeyError("no such axis")
        return step(batch, cp)

    report = hcp.check(broken, {"x": _batch()["x"]}, _cp())
    assert not report.ok
    assert "it raised KeyError: 'no such axis'" in str(report)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda: 0, "cannot run <lambda>, which takes 0 arguments.*it needs a function"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), r"cannot run Linear.*lambda cp: Model\(cp"),
        (
            lambda cp: nnx.Linear(2, 2, rngs=nnx.Rngs(np.random.randint(2**30))),
            "different parameters",
        ),
    ],
)
def test_programs_that_it_cannot_run_are_refused(program, message):
    with pytest.raises(ValueError, match=message):
        hcp.check(program, _batch(), _cp())
