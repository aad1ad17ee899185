"""Tokens: what training sees is what the tokenizer says, from memory or from a mapped folder."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

from hcp_jax import cli
from hcp_jax.commands import tokenize as command
from hcp_jax.train.data import DataConfig, open_corpus, token_writer, tokenizer, tokens
from hcp_jax.train.data.streams import Segments, Streams

TEXTS = ["a b c", "c b", "a <s> zebra b", "c" * 5]
WORDS = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5, "ccccc": 9}
# "<s>" in a text is cut into "<" and "s>", which this tokenizer does not know.
IDS = [[3, 4, 5], [5, 4], [3, 2, 2, 2, 4], [9]]


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


def test_a_folder_of_tokens_holds_what_the_tokenizer_says(folder, capsys):
    assert tokenize(folder) == 0
    assert "4 documents, 11 tokens as uint16, vocabulary of 10" in capsys.readouterr().out
    corpus = read(folder, tokenizer=str(folder / "tokenizer.json"))
    assert [ids.tolist() for ids in corpus] == IDS
    assert corpus.sizes.tolist() == [3, 2, 5, 1]
    assert (corpus.separator, corpus.end, corpus.vocab_size) == (0, 1, 10)


def test_text_with_a_tokenizer_gives_the_tokens_of_the_folder(folder):
    tokenize(folder)
    config = DataConfig(str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer.json"))
    for mapped, held in zip(read(folder), open_corpus(config), strict=True):
        np.testing.assert_array_equal(mapped, held)


def test_documents_begin_with_bos_and_their_last_target_is_eos(folder):
    tokenize(folder)
    corpus = read(folder)
    [stream] = Streams(Segments(corpus, 15), 0, 1)
    rows = {}
    for i in range(1, 5):
        places = stream.refs[stream.segment_ids == i]
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
    monkeypatch.setattr(tokenizer, "_TEXT_AT_ONCE", 4)
    tokenize(folder)
    assert [ids.tolist() for ids in read(folder)] == IDS


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda out: (out / "meta.json").unlink(), "did not finish"),
        (lambda out: np.save(out / "offsets.npy", np.array([0, 3, 2, 9, 11])), "is damaged"),
        (lambda out: np.save(out / "tokens.npy", np.zeros(9, np.uint16)), "has 9 tokens"),
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
        (["--tokenizer", "{}/text.jsonl"], "is not a tokenizer.json"),
        (["--eos", "<end>"], "has no token '<end>'"),
        (["--out", "{}"], "exists and is not empty"),
        (["--field", "body"], "no text in field 'body'"),
    ],
)
def test_what_cannot_be_tokenised_is_one_line(folder, capsys, options, says):
    assert tokenize(folder, *(option.format(folder) for option in options)) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_writing_goes_on_where_it_stopped(folder, capsys, monkeypatch, stop):
    monkeypatch.setattr(tokenizer, "_TEXT_AT_ONCE", 4)
    whole = command.Texts.documents

    def interrupted(texts):
        for number, text in enumerate(whole(texts)):
            if number == stop:
                raise KeyboardInterrupt
            yield text
        if stop == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.Texts, "documents", interrupted)
        assert tokenize(folder) == 130
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"hcp tokenize did not finish\. Run it again"):
        read(folder)
    with (folder / "out" / "tokens.npy").open("ab") as file:
        file.write(b"what a killed process had written")
    assert tokenize(folder) == 0
    assert ("going on after" in capsys.readouterr().out) == (stop > 0)
    assert [ids.tolist() for ids in read(folder)] == IDS
    assert sorted(x.name for x in (folder / "out").iterdir()) == [
        "meta.json",
        "offsets.npy",
        "tokens.npy",
    ]


def test_writing_goes_on_with_the_same_text_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer, "_TEXT_AT_ONCE", 4)
    lines = (folder / "text.jsonl").read_text()
    (folder / "text.jsonl").write_text(lines + "\n[]")
    assert tokenize(folder) == 2
    assert "line 5" in capsys.readouterr().err
    assert tokenize(folder, "--special-tokens", "control") == 2
    assert "was begun with another special_tokens" in capsys.readouterr().err
    (folder / "text.jsonl").write_text(lines.replace("a b c", "a b b"))
    assert tokenize(folder) == 2
    assert "was begun with other text than there is now" in capsys.readouterr().err
    with (folder / "out" / "tokens.npy").open("rb") as file:
        token_writer._lock(file, folder)
        assert tokenize(folder) == 2
        assert "another hcp tokenize is writing there" in capsys.readouterr().err
    (folder / "text.jsonl").write_text(lines)
    assert tokenize(folder) == 0
    assert [ids.tolist() for ids in read(folder)] == IDS


@pytest.mark.slow
def test_signals_end_a_process_that_tokenises(folder):
    text = "a b c zebra " * 2000
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for _ in range(600))
    argv = [sys.executable, "-m", "hcp_jax.cli", "tokenize", str(folder / "text.jsonl")]
    argv += ["--tokenizer", str(folder / "tokenizer.json"), "--out", str(folder / "out")]
    progress, seen = folder / "out" / "progress.json", 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        started = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        while not progress.exists() or json.loads(progress.read_text())["documents"] <= seen:
            assert started.poll() is None
            time.sleep(0.05)
        started.send_signal(number)
        errors = started.communicate()[1]
        assert (started.returncode, errors.count("\n")) == (code, 1), errors
        assert "the same command goes on where it stopped" in errors
        seen = json.loads(progress.read_text())["documents"]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout.count(
        f"going on after {seen:,} documents"
    )
    assert read(folder).sizes.tolist() == [8000] * 600


def damages(rng, files):
    """(file name, its damaged bytes) of one kind of damage or another, at random."""
    name = str(rng.choice(sorted(files)))
    content, at = bytearray(files[name]), int(rng.integers(len(files[name])))
    match rng.integers(4):
        case 0:
            content[at] ^= 1 << int(rng.integers(8))
        case 1:
            del content[at:]
        case 2:
            content[at:at] = rng.bytes(int(rng.integers(1, 9)))
        case 3:
            content[at : at + 8] = bytes(len(content[at : at + 8]))
    return name, bytes(content)


def test_no_damage_to_a_folder_is_silent_or_a_traceback(folder):
    tokenize(folder)
    files = {x.name: x.read_bytes() for x in (folder / "out").iterdir()}
    rng, refused = np.random.default_rng(0), []
    for _ in range(250):
        name, content = damages(rng, files)
        (folder / "out" / name).write_bytes(content)
        try:
            corpus = read(folder)
        except ValueError as error:
            refused.append(str(error))
        else:  # white space in meta.json, say
            assert [ids.tolist() for ids in corpus] == IDS
            assert (corpus.separator, corpus.end, corpus.vocab_size) == (0, 1, 10)
        (folder / "out" / name).write_bytes(files[name])
    assert len(refused) > 180
    assert all(message.startswith("data.path: ") for message in refused)


META = {
    "vocab_size": 10,
    "bos_id": 0,
    "eos_id": 1,
    "tokenizer_sha256": "",
    "documents": 2,
    "tokens": 5,
}


@pytest.mark.parametrize(
    ("meta", "ids", "offsets", "says"),
    [
        ({"bos_id": -3}, None, None, "bos_id must be a number from 0, got -3"),
        ({"eos_id": 9999}, None, None, "eos_id=9999 is not in a vocabulary of 10"),
        ({"vocab_size": "10"}, None, None, "vocab_size must be a number from 0, got '10'"),
        ({"vocab_size": 10.0}, None, None, "vocab_size must be a number"),
        ({"tokens": True}, None, None, "tokens must be a number"),
        ({"x\x1b[2J": 1}, None, None, r"an unknown key: 'x\\\\x1b"),
        ({}, np.zeros(5), None, "holds float64 of shape .*must be a 1-dim array of uint16 or uint32"),
        ({}, np.full(5, -1), None, "holds int64"),
        ({}, np.zeros((5, 1), np.uint16), None, r"of shape \(5, 1\)"),
        ({}, np.zeros(5, ">u2"), None, "holds >u2"),
        ({}, np.full(5, 10, np.uint16), None, "has the id 10, but its vocabulary ends with 9"),
        ({}, np.array(["a"] * 5, object), None, "holds object"),
        ({}, None, np.array([0, 6, 5]), "must ascend from 0"),
        ({}, None, np.array([1, 3, 5]), "must ascend from 0"),
        ({}, None, np.array([0, 3, 9]), "5 tokens, offsets.npy 9"),
        ({}, None, np.array([0, 5]), "has 2 numbers; 2 documents need 3"),
        ({}, None, np.array([0.0, 3, 5]), "holds float64"),
        ({}, None, np.array([[0, 3, 5]]), r"of shape \(1, 3\)"),
        ({}, None, None, None),
    ],
)  # fmt: skip
def test_a_folder_of_other_hands_is_checked_too(tmp_path, meta, ids, offsets, says):
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "tokens.npy", np.arange(5, dtype=np.uint16) if ids is None else ids)
    np.save(tmp_path / "out" / "offsets.npy", np.array([0, 3, 5]) if offsets is None else offsets)
    (tmp_path / "out" / "meta.json").write_text(json.dumps(META | meta))
    if says is None:
        assert [x.tolist() for x in read(tmp_path)] == [[0, 1, 2], [3, 4]]
        return
    with pytest.raises(ValueError, match=says):
        read(tmp_path)


def test_a_file_that_becomes_shorter_is_told_and_ends_no_process(folder):
    tokenize(folder)
    corpus, file = read(folder), folder / "out" / "tokens.npy"
    places = corpus.refs(2, 0, 6)
    assert corpus.targets_at(places).tolist() == [*IDS[2], 1]
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(OSError, match=r"tokens\.npy has become shorter since it was opened"):
        corpus.targets_at(places)
    assert corpus[0].tolist() == IDS[0]


def test_runs_of_ids_are_read_together_and_in_order(folder, monkeypatch):
    tokenize(folder)
    ids, calls = read(folder)._ids, []
    whole, reads = ids[:], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args[2]) or reads(*args))
    for index in ([], [3], [0, 1, 2, 3], [5, 6, 0, 1, 9], [2, 2, 2]):
        calls.clear()
        index = np.array(index, np.int64)
        np.testing.assert_array_equal(ids[index], whole[index])
        assert len(calls) == (1 + np.count_nonzero(np.diff(index) != 1) if index.size else 0)


def test_large_folders_are_held_against_some_of_their_checksums(folder, monkeypatch):
    for module in (tokens, token_writer):
        monkeypatch.setattr(module, "BLOCK", 4)
    tokenize(folder)
    assert "compared with checksums: 4 of 6 parts" in "\n".join(read(folder).report)
    monkeypatch.setattr(tokens, "_BLOCKS_CHECKED", 9)
    assert "6 of 6" in "\n".join(read(folder).report)
