"""Evaluation: the same numbers on any mesh, of the same tokens always, in the bins they belong to."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.transformer import abstract_model, init_params
from hcp_jax.train import data, evaluation
from hcp_jax.train.data import Corpus, DataConfig
from hcp_jax.train.evaluation import EvalConfig, Evaluator, HeldOutStreams, Means

MODEL = ModelConfig(
    vocab_size=264,
    num_layers=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    loss_chunk=24,
    z_loss=1e-2,
    remat="none",
)
T = 40
MESHES = [
    {"cp_outer": 1},
    {"cp_outer": 4, "cp_inner": 2},
    {"dp": 2, "tp": 2, "cp_inner": 2},
    {"dp": 4, "cp_outer": 2},
]


@functools.cache
def corpus():
    rng = np.random.default_rng(0)
    sizes = [100, 1, 7, 55, 39, 40, 41, 3, 200, 12]
    return Corpus([rng.integers(97, 123, n, np.uint8).tobytes() for n in sizes], "a test")


@functools.cache
def params():
    # Larger than at the start of a training, so that losses of tokens differ.
    fresh = jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x, fresh)


@functools.cache
def evaluated(mesh, batch_size=4):
    sizes = MESHES[mesh]
    devices = jax.devices()[: math.prod(sizes.values())]
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices), comm_type="p2p")
    text = HeldOutStreams(
        corpus(), cp, seq_len=T, batch_size=batch_size, tokens=None, mask=MODEL.mask
    )
    evaluator = Evaluator(MODEL, text, seq_len=T)
    weights = jax.device_put(
        params(), jax.sharding.NamedSharding(cp.mesh, jax.sharding.PartitionSpec())
    )
    evaluator.compile(weights)
    return evaluator.evaluate(7, weights)


@functools.cache
def token_losses():
    """(positions, losses) of all tokens of the corpus, from all logits at once."""
    [batch] = data.held_out_batches(
        corpus(), batch_size=16, seq_len=T, tokens=None, mask=MODEL.mask
    )
    tokens, targets = batch["tokens"].whole(), batch["targets"].whole()
    transformer = nnx.merge(abstract_model(MODEL)[0], params())
    hidden = transformer(jnp.asarray(tokens), jnp.asarray(batch["positions"]), mask=batch["mask"])
    log_p = jax.nn.log_softmax(transformer.logits(hidden))
    losses = -np.take_along_axis(np.asarray(log_p, np.float64), targets[..., None], -1)[..., 0]
    counts = batch["weights"] > 0
    return batch["positions"][counts], losses[counts]


@pytest.mark.parametrize("mesh", range(len(MESHES)), ids=[str(sizes) for sizes in MESHES])
def test_every_token_counts_once_in_the_bin_of_its_position_on_any_mesh(mesh):
    found = evaluated(mesh)
    positions, losses = token_losses()
    assert found.step == 7
    assert found.overall.tokens[0] == losses.size == corpus().num_ids + len(corpus())
    np.testing.assert_allclose(found.loss, losses.mean(), rtol=1e-6)
    assert found.borders == (0, 1, 2, 4, 8, 16, 32, 40)
    for i, (begin, end) in enumerate(zip(found.borders[:-1], found.borders[1:], strict=True)):
        inside = (begin <= positions) & (positions < end)
        assert found.by_position.tokens[i] == inside.sum()
        np.testing.assert_allclose(found.by_position.loss[i], losses[inside].mean(), rtol=1e-6)


def test_neither_batch_size_nor_mesh_changes_what_is_found():
    one_device = evaluated(0)
    for mesh, batch_size in ((0, 3), (1, 4), (2, 4), (3, 4)):
        other = evaluated(mesh, batch_size)
        for a, b in (
            (one_device.overall, other.overall),
            (one_device.by_position, other.by_position),
        ):
            np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
            np.testing.assert_allclose(a.stderr, b.stderr, rtol=1e-4)
            np.testing.assert_array_equal(a.tokens, b.tokens)


def test_a_share_of_the_tokens_is_taken_from_all_of_the_text():
    corpus = Corpus([bytes([65 + i]) * (T - 1) for i in range(50)], "a test")
    few, again = (
        data.held_out_batches(corpus, batch_size=n, seq_len=T, tokens=10 * T, mask=MODEL.mask)
        for n in (4, 10)
    )
    first = np.concatenate([batch["targets"].whole() for batch in few])
    assert sum(int(batch["weights"].sum()) for batch in few) == 10 * T
    documents = first[:10, 0] - 65
    assert np.all(np.diff(documents) > 0)  # in their order, each once
    assert np.all(np.diff(documents) <= 8)  # and from everywhere
    np.testing.assert_array_equal(again[0]["targets"].whole(), first[:10])


def test_the_standard_error_is_that_of_streams_and_not_of_tokens():
    rng = np.random.default_rng(0)
    of_stream = rng.normal(3, 0.5, 200)  # all tokens of a stream are alike
    counts = np.full((200, 1), 64.0)
    means = Means.of(of_stream[:, None] * counts, counts)
    expected = of_stream.std(ddof=1) / math.sqrt(200)
    assert means.stderr[0] == pytest.approx(expected)
    assert means.loss[0] == pytest.approx(of_stream.mean())


def test_the_standard_error_is_how_far_repeated_draws_of_streams_lie_apart():
    rng = np.random.default_rng(1)

    def draw():
        counts = rng.integers(1, 50, (40, 1)).astype(float)
        return rng.normal(3, 0.5, (40, 1)) * counts, counts

    drawn = [Means.of(*draw()) for _ in range(2000)]
    apart = np.std([means.loss[0] for means in drawn])
    assert np.mean([means.stderr[0] for means in drawn]) == pytest.approx(apart, rel=0.1)


def test_what_is_not_known_is_null():
    means = Means.of(np.array([[6.0, 0.0]]), np.array([[2.0, 0.0]]))
    found = evaluation.Evaluation(3, Means.of(*np.array([[[6.0]], [[2.0]]])), (0, 1, 2), means, 0.5)
    line = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert line["loss"] == 3.0
    assert line["stderr"] is None
    assert line["loss_by_position"] == [3.0, None]
    assert line["tokens_by_position"] == [2, 0]
    assert str(found) == "held-out loss 3.0000 after 3 steps (2 tokens, 0.5 s)"


@pytest.fixture
def lines(tmp_path):
    def write(name, number):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(number)))
        return str(path)

    return write


def texts(corpus):
    return [bytes(corpus[i]).decode() for i in range(len(corpus))]


def test_without_a_path_documents_are_held_out_and_not_trained_on(lines):
    whole = [f"a.jsonl {i}" for i in range(40)]
    of_data = DataConfig(path=lines("a.jsonl", 40))
    training, held_out = evaluation.open_corpora(of_data, EvalConfig(every=5, holdout=0.1), 264)
    assert sorted(texts(training) + texts(held_out)) == sorted(whole)
    assert len(held_out) == 4
    assert texts(training) == [text for text in whole if text not in texts(held_out)]
    # Numbers of documents count the text, whoever asks.
    [batch] = data.held_out_batches(
        held_out, batch_size=1, seq_len=64, tokens=None, mask=MODEL.mask
    )
    places = batch["tokens"].places
    numbers = np.unique(training.documents_at(places[places > 0]))
    assert sorted(whole[i] for i in numbers) == sorted(texts(held_out))


def test_with_a_path_nothing_is_held_out(lines):
    of_data, config = DataConfig(path=lines("a", 9)), EvalConfig(every=5, path=lines("b", 3))
    training, held_out = evaluation.open_corpora(of_data, config, 264)
    assert (len(training), len(held_out)) == (9, 3), "JSON lines, whatever their file is called"
    assert texts(held_out) == ["b 0", "b 1", "b 2"]


def test_without_evaluation_the_whole_text_is_trained_on(lines):
    training, held_out = evaluation.open_corpora(
        DataConfig(path=lines("a.jsonl", 9)), EvalConfig(), 264
    )
    assert held_out is None
    assert len(training) == 9


def test_held_out_text_that_cannot_be_is_told(lines):
    of_data = DataConfig(path=lines("a.jsonl", 2))
    with pytest.raises(ValueError, match=r"eval\.path: /gone does not exist"):
        evaluation.open_corpora(of_data, EvalConfig(every=1, path="/gone"), 264)
    with pytest.raises(ValueError, match="of 2 documents leaves none to train on"):
        evaluation.open_corpora(of_data, EvalConfig(every=1, holdout=0.6), 264)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 0}, r"eval\.every must be at least 1, got 0 \(or null\)"),
        ({"tokens": 0}, r"eval\.tokens"),
        ({"holdout": 1.0}, r"eval\.holdout must be at most 0.999999, got 1.0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**values)


def test_an_evaluation_is_due_before_the_first_step_and_after_the_last():
    config = EvalConfig(every=4)
    assert [n for n in range(11) if config.is_due(n, steps=10)] == [0, 4, 8, 10]
    assert not any(EvalConfig().is_due(n, steps=10) for n in range(11))
