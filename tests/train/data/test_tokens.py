"""Tokens: what training sees is what the tokenizer says, from memory or from a mapped folder."""

import json

import numpy as np
import pytest
import tokenizers

from hcp_jax import cli
from hcp_jax.train.data import DataConfig, open_corpus, tokens
from hcp_jax.train.data.streams import Segments, Streams

TEXTS = ["a b c", "c b", "a <s> zebra b", "c" * 5]
WORDS = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5, "ccccc": 9}
IDS = [[3, 4, 5], [5, 4], [3, 0, 2, 4], [9]]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of whole words, as a model's folder has it, and the texts above as JSONL."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    made.enable_truncation(2)  # as some files have it, for inference
    made.save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    lines = (json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path


def tokenize(folder, *options):
    argv = ["tokenize", str(folder / "text.jsonl"), "--tokenizer", str(folder / "tokenizer.json")]
    return cli.main([*argv, "--out", str(folder / "out"), *options])


def read(folder, **options):
    return open_corpus(DataConfig(path=str(folder / "out"), **options))


def test_a_folder_of_tokens_is_mapped_and_holds_what_the_tokenizer_says(folder, capsys):
    assert tokenize(folder) == 0
    assert "4 documents, 10 tokens as uint16, vocabulary of 10" in capsys.readouterr().out
    corpus = read(folder, tokenizer=str(folder / "tokenizer.json"))
    assert [ids.tolist() for ids in corpus] == IDS
    assert corpus.sizes.tolist() == [3, 2, 4, 1]
    assert isinstance(corpus[2].base, np.memmap)
    assert (corpus.separator, corpus.end, corpus.vocab_size) == (0, 1, 10)


def test_text_with_a_tokenizer_gives_the_tokens_of_the_folder(folder):
    tokenize(folder)
    config = DataConfig(str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer.json"))
    for mapped, held in zip(read(folder), open_corpus(config), strict=True):
        np.testing.assert_array_equal(mapped, held)


def test_documents_begin_with_bos_and_their_last_target_is_eos(folder):
    tokenize(folder)
    corpus = read(folder)
    [stream] = Streams(Segments(corpus, 14), 0, 1)
    rows = {}
    for i in range(1, 5):
        places = stream.places[stream.segment_ids == i]
        rows[tuple(corpus.tokens_at(places).tolist())] = corpus.targets_at(places).tolist()
    assert rows == {(0, *ids): [*ids, 1] for ids in IDS}


def test_without_a_bos_the_eos_stands_before_documents_too(folder):
    (folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    tokenize(folder)
    assert (read(folder).separator, read(folder).end) == (1, 1)


def test_tokens_can_be_named_where_no_file_says_which_they_are(folder, capsys):
    (folder / "tokenizer_config.json").unlink()
    assert tokenize(folder) == 2
    assert "Run hcp tokenize with --eos" in capsys.readouterr().err
    assert tokenize(folder, "--bos", "<s>", "--eos", "b") == 0
    assert (read(folder).separator, read(folder).end) == (0, 4)


def test_more_than_65536_ids_take_four_bytes(folder, monkeypatch):
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["vocab"]["far"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenize(folder)
    assert read(folder)[0].dtype == np.uint32
    assert read(folder).vocab_size == 70_001


def test_long_texts_are_tokenised_in_portions_that_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(tokens, "_TEXT_AT_ONCE", 4)
    tokenize(folder)
    assert [ids.tolist() for ids in read(folder)] == IDS


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda out: (out / "meta.json").unlink(), "did not finish"),
        (lambda out: np.save(out / "offsets.npy", np.array([0, 3, 2, 9, 10])), "is damaged"),
        (lambda out: np.save(out / "tokens.npy", np.zeros(9, np.uint16)), r"\(9 tokens\)"),
        (lambda out: (out / "tokens.npy").write_bytes(b"short"), "is damaged"),
        (lambda out: (out / "meta.json").write_text("{}"), "is damaged"),
    ],
)
def test_a_damaged_folder_is_told(folder, break_it, says):
    tokenize(folder)
    break_it(folder / "out")
    with pytest.raises(ValueError, match=says):
        read(folder)


def test_a_folder_of_another_tokenizer_is_told(folder):
    tokenize(folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("ccccc", "ccccd"))
    with pytest.raises(ValueError, match="another tokenizer than data.tokenizer"):
        read(folder, tokenizer=str(file))


def test_a_model_that_knows_fewer_ids_is_refused(folder):
    tokenize(folder)
    with pytest.raises(ValueError, match="vocab_size=9 is too small: the tokenizer has 10 ids"):
        open_corpus(DataConfig(path=str(folder / "out")), 9)
    with pytest.raises(ValueError, match="vocab_size=256 is too small: bytes and the sep.* 257"):
        open_corpus(DataConfig(path=str(folder / "text.jsonl")), 256)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tokenizer", "/gone"], "/gone: there is no such file"),
        (["--tokenizer", "{}/text.jsonl"], "is no tokenizer.json"),
        (["--eos", "<end>"], "has no token '<end>'"),
        (["--out", "{}"], "exists and is not empty"),
        (["--field", "body"], "no text in field 'body'"),
    ],
)
def test_what_cannot_be_tokenised_is_one_line(folder, capsys, options, says):
    assert tokenize(folder, *(option.format(folder) for option in options)) == 2
    assert says in capsys.readouterr().err
