"""Packing: documents that fit stay whole, hardly a place is empty, and nothing depends on chance."""

import itertools
import json

import numpy as np
import pytest

from hcp_jax.train.data import (
    Corpus,
    DataConfig,
    batches,
    describe_packing,
    open_corpus,
    packing_metrics,
)
from hcp_jax.train.data import packing as packing_module
from hcp_jax.train.data.streams import Segments, Streams, make_stream

T = 4096


def of_sizes(tokens):
    """A corpus whose documents have these numbers of tokens, of which none can be read."""
    corpus = Corpus([], "a test")
    corpus._set_offsets(np.cumsum([0, *(np.asarray(tokens) - 1)], dtype=np.int64))
    return corpus


def lognormal(mean, sigma, count=4000):
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(mean * T) - sigma**2 / 2, sigma, count)
    return np.maximum(2, drawn).astype(int)


def windows(streams, count):
    """The first windows, one after the other."""
    at, left_over = (0, 0), np.zeros((0, 2), np.int64)
    for _ in range(count):
        made = streams.window(*at, left_over)
        yield made
        at, left_over = streams.next_window(*at), made.left_over


def fill_and_whole(tokens, packing="whole", seq_len=T, epochs=2):
    """(share of places that hold a token, share of the documents that fit which are whole)."""
    segments = Segments(of_sizes(tokens), seq_len)
    streams = Streams(segments, 0, epochs, packing=packing)
    used = places = 0
    whole = np.zeros(len(segments), int)
    for made in windows(streams, epochs * streams._windows):
        number, begin, end = made.parts.T
        used, places = used + (end - begin).sum(), places + len(made) * seq_len
        np.add.at(whole, number[(end - begin) == segments.sizes[number]], 1)
        lengths = np.add.reduceat(end - begin, made.starts[:-1])
        assert lengths.max() <= seq_len
    assert used == epochs * np.sum(tokens)  # each token once an epoch
    return used / places, whole[segments.fits].sum() / max(1, epochs * segments.fits.sum())


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("mean", [0.1, 0.5, 2.0])
def test_documents_of_lognormal_lengths_stay_whole_in_full_streams(mean, sigma):
    tokens = lognormal(mean, sigma)
    fill, whole = fill_and_whole(tokens)
    assert fill >= 0.97
    assert whole >= 0.99
    assert fill_and_whole(tokens, "dense")[1] < whole - 0.01


@pytest.mark.parametrize("seq_len", [2048, 32768])
def test_files_of_the_standard_library_stay_whole_in_full_streams(seq_len):
    tokens = open_corpus(DataConfig()).sizes + 1
    fill, whole = fill_and_whole(tokens, seq_len=seq_len)
    assert fill >= 0.97
    assert whole == 1


def test_lengths_that_leave_gaps_are_cut_only_where_that_fills_them():
    # Two of these hardly ever fill a stream: a few are cut to come to 97 %.
    fill, whole = fill_and_whole(lognormal(0.5, 0.2))
    assert fill >= 0.97
    assert 0.99 <= whole < 1
    # No packing fills more than 90 %, or 100 %, with these: none is cut.
    assert fill_and_whole(np.full(3000, int(0.9 * T))) == pytest.approx((0.9, 1), abs=1e-3)
    assert fill_and_whole(np.full(3000, T - 1)) == pytest.approx((1, 1), abs=1e-3)
    assert fill_and_whole(np.full(3000, T)) == (1, 1)


def test_what_is_longer_than_a_stream_is_cut_into_whole_streams_and_a_rest():
    tokens = np.random.default_rng(0).integers(1, 6 * T, 300)
    segments = Segments(of_sizes(tokens), T)
    [made] = windows(Streams(segments, 0), 1)
    number, begin, end = made.parts.T
    of_whole = segments.sizes[number] == T
    assert np.all(begin[of_whole] == 0)
    assert np.all(end[of_whole] == T)


@pytest.mark.parametrize("packing", ["whole", "dense"])
def test_streams_go_on_at_any_step_in_any_window(packing, monkeypatch):
    monkeypatch.setattr(packing_module, "WINDOW", 64)
    monkeypatch.setattr(packing_module, "_WINDOW_STREAMS", 2)
    segments = Segments(of_sizes(lognormal(0.3, 1, 300)), T)
    streams = Streams(segments, 5, packing=packing)
    assert packing == "dense" or streams._windows > 2
    made, states = [], []
    through = iter(streams)
    for _ in range(250):  # more than two epochs
        states.append(json.dumps(through.get_state()))
        made.append(next(through))
    assert json.loads(states[-1])["epoch"] >= 2
    assert packing == "dense" or any(json.loads(s)["left_over"] for s in states)
    for step in range(0, 245, 7):
        resumed = iter(Streams(segments, 5, packing=packing))
        resumed.set_state(json.loads(states[step]))
        for before in made[step : step + 4]:
            for ours, theirs in zip(next(resumed), before, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_no_document_waits_for_ever_and_the_state_stays_small():
    # One document of two thirds among those of more than half: nothing ever fits beside any.
    tokens = np.append(np.random.default_rng(0).integers(33, 64, 999), 43)
    through, seen = iter(Streams(Segments(of_sizes(tokens), 64), 0)), np.zeros(1000, int)
    for _ in range(12_000):
        stream = next(through)
        seen[through._window.stream(through._next - 1)[:, 0]] += 1
        assert stream.segment_ids.max() == 1
    assert seen.min() >= 12 - packing_module._WINDOWS_WAITED
    tiny = iter(Streams(Segments(of_sizes(np.full(200_000, 2)), 2**17), 0))
    assert (next(tiny).refs > 0).all()
    assert max(len(json.dumps(tiny.get_state())) for _ in itertools.islice(tiny, 8)) < 100_000


def test_a_corpus_of_one_byte_is_packed_once_for_each_stream(monkeypatch):
    calls = []
    packs = packing_module.pack_whole
    monkeypatch.setattr(
        "hcp_jax.train.data.streams.pack_whole",
        lambda *args, **options: calls.append(args[0].size) or packs(*args, **options),
    )
    made = itertools.islice(Streams(Segments(Corpus([b"x"], "a test"), 2**15), 0), 3)
    assert all((x.refs > 0).all() for x in made)
    assert calls == [2**14] * 3


def test_streams_do_not_come_in_the_order_of_their_largest_document():
    segments = Segments(of_sizes(lognormal(0.3, 1, 3000)), T)
    largest = [
        int(np.max(np.diff(x, axis=1)[:, -1]))
        for x in (made.stream(i) for made in windows(Streams(segments, 0), 1) for i in range(400))
    ]
    assert abs(np.corrcoef(largest, np.arange(400))[0, 1]) < 0.2


def test_fill_and_whole_documents_are_told_and_measured():
    rng = np.random.default_rng(0)
    corpus = Corpus([rng.bytes(int(n)) for n in lognormal(0.5, 1, 200) // 32], "a test")
    streams = Streams(Segments(corpus, T // 32), 0, 1)
    told = describe_packing(corpus, seq_len=T // 32, seed=0, packing="whole")
    assert "100.0% of the documents that fit 128 tokens, whole; 99." in told
    dense = describe_packing(corpus, seq_len=T // 32, seed=0, packing="dense")
    assert "'dense'" in dense
    assert "100.0% of the slots" in dense

    def measured(packing):
        rows = [*Streams(streams.segments, 0, 1, packing=packing)]
        rows = batches._batch(
            corpus,
            type(rows[0])(*(np.stack(x) for x in zip(*rows, strict=True))),
            batches._in_documents,
        )
        return packing_metrics(corpus, rows)

    fill, whole = measured("whole").values()
    assert whole == 1
    assert 0.97 < fill < 1
    said = float(dense.split("packing 'dense': ")[1].split("%")[0]) / 100
    assert measured("dense")["whole_documents"] == pytest.approx(said, abs=0.01)
    assert said < 0.8


def test_a_stream_of_parts_has_their_places_and_positions():
    corpus = Corpus([b"abcd", b"xyz"], "a test")
    stream = make_stream(Segments(corpus, 8), np.array([[1, 0, 4], [0, 3, 5]]))
    assert corpus.tokens_at(stream.refs).tolist() == [256, *b"xyz", *b"cd", 0, 0]
    assert stream.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert stream.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 0]
