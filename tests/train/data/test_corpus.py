"""Data: nothing is lost, nothing crosses documents, and a run can go on where it stopped."""

import collections
import itertools
import json

import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.sequence.mask import documents, sliding_window
from hcp_jax.train import data
from hcp_jax.train.data import SEPARATOR, Corpus, DataConfig, open_corpus
from hcp_jax.train.data.batches import _batch, _in_documents
from hcp_jax.train.data.streams import Segments, Stream, Streams

T = 64


@pytest.fixture(scope="module")
def corpus():
    """Documents of 1 to 300 random bytes: hardly any pair of neighbours comes twice."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 40, 30).tolist(), 300, 200, 1, T - 1, T, T + 1, 2 * T - 1]
    return Corpus([rng.bytes(n) for n in lengths], "a test")


def host(batch):
    """A batch as arrays."""
    return batch | {name: batch[name].whole() for name in ("tokens", "targets")}


def batches_of(corpus, seed=0, **options):
    return data.make_batches(corpus, batch_size=2, seq_len=T, seed=seed, put=host, **options)


def epochs_of(corpus, number=1, seed=0, packing="whole"):
    """Streams, with the pairs of token and target at their places."""
    return [
        {
            "pairs": np.stack([at(x.refs) for at in (corpus.tokens_at, corpus.targets_at)], 1),
            "pairs_segment_ids": x.segment_ids,
            "pairs_positions": x.positions,
        }
        for x in Streams(Segments(corpus, T), seed, number, packing=packing)
    ]


def segments(stream):
    """(tokens, targets, positions) of each segment of a packed stream, in order."""
    ids = stream["pairs_segment_ids"]
    for i in range(1, ids.max() + 1):
        yield *stream["pairs"][ids == i].T, stream["pairs_positions"][ids == i]


def counted(pairs):
    return collections.Counter(map(tuple, np.asarray(pairs).tolist()))


@pytest.mark.parametrize("packing", ["whole", "dense"])
def test_every_token_of_every_document_comes_once_per_epoch_with_the_next_as_target(
    corpus, packing
):
    made = epochs_of(corpus, packing=packing)
    found = counted(np.concatenate([x["pairs"][x["pairs_segment_ids"] > 0] for x in made]))
    expected = collections.Counter()
    for i in range(len(corpus)):
        document = [SEPARATOR, *corpus[i].tolist(), SEPARATOR]
        expected += counted(list(itertools.pairwise(document)))
    assert found == expected
    assert max(expected.values()) < 4  # the pairs tell the places apart


@pytest.mark.parametrize("packing", ["whole", "dense"])
def test_a_segment_is_consecutive_tokens_of_one_document(corpus, packing):
    texts = [bytes(corpus[i]) for i in range(len(corpus))]
    for stream in epochs_of(corpus, packing=packing):
        for tokens, targets, positions in segments(stream):
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))
            assert np.all(tokens[1:] != SEPARATOR)
            text = bytes(targets[targets != SEPARATOR].astype(np.uint8))
            assert any(text in of_document for of_document in texts)


def test_long_documents_fill_whole_streams(corpus):
    whole = [x for x in epochs_of(corpus) if np.all(x["pairs_segment_ids"] == 1)]
    assert len(whole) >= sum((corpus.sizes + 1) // T)


def test_a_dense_epoch_has_less_padding_than_one_stream(corpus):
    packed = epochs_of(corpus, packing="dense")
    padding = sum(int((x["pairs_segment_ids"] == 0).sum()) for x in packed)
    assert padding < T
    assert T * len(packed) - padding == corpus.num_ids + len(corpus)


def test_no_token_attends_across_documents(corpus):
    batch = next(batches_of(corpus))
    start, end = batch["mask"].intervals(T)
    index = np.arange(T)
    # A token's interval reaches back to where its position counter began, and up to itself.
    real = batch["weights"] > 0
    np.testing.assert_array_equal(start[real], (index - batch["positions"])[real])
    np.testing.assert_array_equal(end[real], np.broadcast_to(index + 1, end.shape)[real])
    assert np.all((end <= start)[~real])
    begins = batch["positions"] == 0
    assert np.all(begins[:, 1:][batch["tokens"][:, 1:] == SEPARATOR])


def test_the_model_decides_the_mask_within_documents(corpus):
    def windowed(segment_ids):
        return documents(segment_ids) & sliding_window(5)

    wide = next(batches_of(corpus))["mask"].intervals(T)
    narrow = next(batches_of(corpus, mask=windowed))["mask"].intervals(T)
    real = wide.end > wide.start
    expected = np.maximum(wide.start, np.arange(T) - 4)
    np.testing.assert_array_equal(narrow.start[real], expected[real])


def test_padding_sees_nothing_and_weighs_nothing():
    corpus = Corpus([b"abc"], "a test")
    [stream] = Streams(Segments(corpus, 8), 0, 1)
    batch = host(_batch(corpus, Stream(*(x[None] for x in stream)), _in_documents))
    assert batch["tokens"].tolist() == [[SEPARATOR, *b"abc", 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[*b"abc", SEPARATOR, 0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    start, end = batch["mask"].intervals(8)
    assert (end - start).tolist() == [[1, 2, 3, 4, 0, 0, 0, 0]]


def test_the_seed_decides_the_batches_and_nothing_else_does(corpus):
    def first(seed):
        return [b["tokens"] for b in itertools.islice(batches_of(corpus, seed), 8)]

    np.testing.assert_array_equal(first(5), first(5))
    assert not np.array_equal(first(5), first(6))


def test_each_epoch_has_its_own_order():
    one_stream_each = Corpus([bytes([i]) * (T - 1) for i in range(40)], "a test")
    order = [int(x["pairs"][1, 0]) for x in epochs_of(one_stream_each, number=2)]
    assert sorted(order[:40]) == sorted(order[40:]) == list(range(40))
    assert order[:40] != order[40:]


def test_a_batch_is_not_all_of_one_document():
    corpus = Corpus([bytes([i]) * 20 * T for i in range(50)], "a test")
    batches = data.make_batches(corpus, batch_size=8, seq_len=T, seed=0, put=host)
    for batch in itertools.islice(batches, 10):
        assert len(set(batch["tokens"][:, 1].tolist())) >= 4


def test_documents_of_whole_streams_alone_come_for_ever_at_no_cost():
    corpus = Corpus([bytes([i]) * (T - 1) for i in range(3)], "a test")
    made = itertools.islice(Streams(Segments(corpus, T), 0), 30)
    assert collections.Counter(int(x.refs[1]) for x in made) == {
        int(corpus.refs(i, 1, 2)[0]): 10 for i in range(3)
    }


def test_dense_streams_go_on_over_epochs_without_padding():
    corpus = Corpus([b"abc", b"defg"], "a test")  # 9 tokens an epoch, T of 64
    made = [*itertools.islice(Streams(Segments(corpus, T), 0, packing="dense"), 9)]
    assert all(np.all(x.segment_ids > 0) for x in made)
    places = np.concatenate([x.refs for x in made])  # 64 epochs
    assert set(np.unique(places, return_counts=True)[1].tolist()) == {64}


def test_the_place_in_other_data_is_refused(corpus):
    state = iter(Streams(Segments(corpus, T), 0)).get_state()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        iter(Streams(Segments(corpus, T), 1)).set_state(state)
    with pytest.raises(ValueError, match="seq_len was 64 and is 32|segments was"):
        iter(Streams(Segments(corpus, T // 2), 0)).set_state(state)
    # Checkpoints of before there was a choice do not tell it: their streams were dense.
    for key in ("packing", "window_in_epoch"):
        del state[key]
    with pytest.raises(ValueError, match="packing was dense and is whole.*--data.packing dense"):
        iter(Streams(Segments(corpus, T), 0)).set_state(state)
    iter(Streams(Segments(corpus, T), 0, packing="dense")).set_state(state)


@pytest.mark.parametrize("packing", ["whole", "dense"])
@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_batches_after_a_restore_equal_those_without_interruption(corpus, stop, packing):
    whole = batches_of(corpus, packing=packing)
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = batches_of(corpus, packing=packing)
    resumed.set_state(state)
    for _ in range(12):
        a, b = next(whole), next(resumed)
        for key in ("tokens", "targets", "positions", "weights"):
            np.testing.assert_array_equal(a[key], b[key])
        np.testing.assert_array_equal(a["mask"].intervals(T), b["mask"].intervals(T))


def test_segments_are_the_pairs_of_documents_and_have_their_sizes(corpus):
    made = Segments(corpus, T)
    assert [len(made.refs(i)) for i in range(len(made))] == made.sizes.tolist()
    places = np.concatenate([made.refs(i) for i in range(len(made))])
    whole = np.stack([corpus.tokens_at(places), corpus.targets_at(places)], axis=1)
    documents = [[SEPARATOR, *corpus[i].tolist(), SEPARATOR] for i in range(len(corpus))]
    expected = [pair for document in documents for pair in itertools.pairwise(document)]
    np.testing.assert_array_equal(whole, expected)


def test_places_know_their_documents(corpus):
    for i in range(len(corpus)):
        places = corpus.refs(i, 0, int(corpus.sizes[i]) + 1)
        assert set(corpus.documents_at(places).tolist()) == {i}


def test_targets_further_on_never_pass_the_end_of_their_document(corpus):
    some = corpus.select(np.array([31, 3, 30]))
    empty = Corpus([b"", b"abc", b""], "a test")
    for held, places in itertools.product((corpus, some, empty), (1, 2, 7, 300)):
        for number in range(len(held)):
            refs = held.refs(number, 0, held[number].size + 1)
            targets, further = held.targets_at(refs), held.further(refs, places)
            left = max(targets.size - places, 0)
            np.testing.assert_array_equal(held.targets_at(further)[:left], targets[places:])
            np.testing.assert_array_equal(further > 0, np.arange(targets.size) < left)
    assert not corpus.further(np.zeros(3, np.int64), 1).any()  # padding


@pytest.mark.parametrize("packing", ["whole", "dense"])
def test_batches_bring_the_targets_of_depths(corpus, packing):
    batch = next(batches_of(corpus, packing=packing, mtp_depths=2))
    further, weights = batch["mtp_targets"].whole(), batch["mtp_weights"]
    same = batch["positions"][:, 1:] == batch["positions"][:, :-1] + 1
    np.testing.assert_array_equal(further[:, :-1, 0][same], batch["targets"][:, 1:][same])
    np.testing.assert_array_equal(further[:, :-1, 1][same], further[:, 1:, 0][same])
    assert weights[:, :-1][same, 0].all()
    # Behind a cut they go on: as many as the documents have.
    assert (weights[..., 0] == (batch["targets"] != SEPARATOR) * batch["weights"]).all()


@pytest.mark.parametrize("sizes", [{"dp": 2, "cp_outer": 4}, {"dp": 8}])
def test_devices_read_their_own_tokens_once_and_no_others(corpus, sizes):
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes), comm_type="p2p")
    asked = []

    def tokens_at(places):
        asked.append(places.shape)
        return corpus.tokens_at(places)

    batch = next(data.make_batches(corpus, batch_size=8, seq_len=T, seed=0))
    tokens = batch["tokens"]._replace(read=tokens_at)
    placed = cp.shard_batch({"tokens": tokens, "mask": batch["mask"]})["tokens"]
    assert asked == [(8 // cp.axis_size("dp"), T // cp.size)] * 8
    np.testing.assert_array_equal(cp.unshard(placed), batch["tokens"].whole())


def test_the_standard_library_is_megabytes_of_documents_of_many_lengths():
    corpus = open_corpus(DataConfig())
    lengths = corpus.sizes
    assert corpus.num_ids > 5e6
    assert len(corpus) > 500
    assert lengths.max() > 10 * np.median(lengths)
    text = bytes(corpus[0]).decode()
    assert "\0" not in text


def test_text_files_jsonl_and_folders_are_read_in_a_fixed_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("één")
    (tmp_path / "a.txt").write_text("two\nlines")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n\n{"text": "yy", "id": 3}\n')
    (tmp_path / ".hidden").write_bytes(b"\xff\0")
    (tmp_path / "empty.txt").touch()

    def read(path):
        corpus = open_corpus(DataConfig(path=str(path)))
        return [bytes(d).decode() for d in corpus]

    assert read(tmp_path) == ["two\nlines", "x", "yy", "één"]
    assert read(tmp_path / "c.jsonl") == ["x", "yy"]
    assert read(tmp_path / "a.txt") == ["two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, r"gone\.txt does not exist"),
        ("empty.txt", b"", r"empty\.txt is empty"),
        ("image.txt", b"ab\ncd\0e", r"image\.txt is not text: byte 0x00 at offset 5 \(line 2\)"),
        ("latin.txt", b"caf\xe9 au lait", r"latin\.txt is not text: byte 0xe9 at offset 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', r"bad\.jsonl, line 2: not JSON"),
        ("body.jsonl", b'{"text": "a"}\n{"body": "b"}', r"line 2: no text in field 'text' .*body"),
        ("list.jsonl", b'["a"]', r"list\.jsonl, line 1: no text in field 'text' .*list"),
        ("half.jsonl", b'{"text": "\\ud800"}', r"half\.jsonl, line 1: field 'text' is not text"),
        ("none.jsonl", b'{"text": ""}\n', r"none\.jsonl is empty"),
    ],
)
def test_bad_data_is_refused_by_file_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_corpus(DataConfig(path=str(tmp_path / name)))


def test_a_folder_without_text_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no text files"):
        open_corpus(DataConfig(path=str(tmp_path)))
