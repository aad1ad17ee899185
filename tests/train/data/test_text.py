"""Text: each document once, in order, whatever kind of file it is in, and nothing is silent."""

import bz2
import gzip
import json
import lzma
import os
import socket
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hcp_jax.train.data import DataConfig, open_corpus, unpacking
from hcp_jax.train.data.text import Texts

RECORDS = [{"text": "één"}, {"id": 3, "text": "two\nlines"}, {"text": ""}, {"text": "x" * 9}]
TEXTS = ["één", "two\nlines", "x" * 9]
LINES = "\n".join(map(json.dumps, RECORDS))


def read(path, **options):
    texts = Texts(path, **options)
    return [text.decode() for text in texts.documents()], texts.report()


def test_jsonl_is_read_line_by_line_and_faults_are_placed_in_the_whole_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n{"text": "\xe9"}\n')
    found = Texts(path).documents()
    assert [next(found), next(found)] == [b"one", b"two"]
    with pytest.raises(ValueError, match=r"byte 0xe9 at offset 43 \(line 4\)"):
        next(found)


def parquet_bytes(records):
    table, sink = pyarrow.Table.from_pylist(records), pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


CSV = 'id,text\n1,één\n2,"two\nlines"\n\n3,\n4,xxxxxxxxx\n'
FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.JSONL": LINES,
    "a.jsonl.txt": LINES,
    "a.txt": LINES,
    "a": LINES,
    "lines.json": LINES,
    "crlf.ndjson": LINES.replace("\n", "\r\n"),
    "array.json": json.dumps(RECORDS),
    "pretty.json": json.dumps(RECORDS, indent=1),
    "array.txt": json.dumps(RECORDS),
    "strings.json": json.dumps(["één", "two\nlines", "x" * 9]),
    "a.csv": CSV,
    "a.CSV": CSV.replace("\n", "\r\n").replace('two\r\nlines', 'two\nlines'),
    "semicolons.csv": CSV.replace(",", ";"),
    "a.tsv": CSV.replace(",", "\t"),
    "a.parquet": parquet_bytes(RECORDS),
    "a.PQ": parquet_bytes(RECORDS),
    "parquet": parquet_bytes(RECORDS),
}  # fmt: skip
PACK = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("name", FILES)
def test_records_are_found_under_any_name_packed_or_not(tmp_path, monkeypatch, name, pack, bom):
    content = FILES[name] if isinstance(FILES[name], bytes) else bom + FILES[name].encode()
    if isinstance(FILES[name], bytes) and (pack or bom):
        return  # Parquet is compressed inside
    path = tmp_path / f"{name}{pack}"
    path.write_bytes(PACK[pack](content))
    assert read(path)[0] == TEXTS
    monkeypatch.setattr(unpacking, "PIECE", 13)  # cuts characters, lines and records
    assert read(path)[0] == TEXTS


@pytest.mark.parametrize("pack", PACK)
def test_compressed_files_may_have_several_parts_and_must_be_whole(tmp_path, pack):
    path = tmp_path / f"a.txt{pack}"
    path.write_bytes(PACK[pack](b"one\n") + PACK[pack](b"two\n"))
    assert read(path)[0] == ["one\ntwo\n"]
    if pack:
        path.write_bytes(PACK[pack](os.urandom(3000).hex().encode())[:-9])
        with pytest.raises(ValueError, match=r"a\.txt\.\w+ is damaged"):
            read(path)
        path.write_bytes(b"plain")
        with pytest.raises(ValueError, match="is damaged: no"):
            read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "notes.md", "a.jsonl.bak", "{.txt"])
@pytest.mark.parametrize("text", ['{"a": 1}\n{"text": 3}\n', "[x] (y)", "{not json", "a,text\n1,b"])
def test_other_text_is_one_document_whatever_it_looks_like(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name)[0] == [text]


def test_what_a_folder_holds_and_what_is_left_out_is_told(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.jsonl", "b.ndjson", "c.csv"):
        (tmp_path / name).write_text(FILES["a.csv" if name == "c.csv" else "a.jsonl"])
    (tmp_path / "deep" / "d.txt").write_text("plain")
    for name in ("README.md", "index.json", "LICENSE", "dataset_infos.json", ".hidden"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "deep" / "none.txt").touch()
    (tmp_path / "package.json").write_text('{"name": "x"}')
    found, report = read(tmp_path)
    assert found == [*TEXTS * 3, "plain"]
    assert report == [
        "read: 1 file of CSV (3 documents), 2 files of JSON lines (6 documents), "
        "1 file of text (1 document)",
        "left out, JSON, but not a list of records: package.json",
        "left out, by data.skip: LICENSE, README.md, dataset_infos.json, index.json",
        "left out, empty: deep/none.txt",
        "left out, hidden: .hidden",
    ]
    assert "README.md" in str(Texts(tmp_path, skip=()).files)
    with pytest.raises(ValueError, match=r"package\.json is JSON, but not a list of records"):
        read(tmp_path / "package.json")
    only = tmp_path / "only"
    only.mkdir()
    (only / "README").write_text("text")
    with pytest.raises(ValueError, match=r"holds no text files.*left out, by data\.skip: README"):
        read(only)


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "data").mkdir()
    for link, target in (
        ("one", tmp_path / "real"),
        ("two", tmp_path / "real"),
        ("loop", tmp_path / "data"),
    ):
        (tmp_path / "data" / link).symlink_to(target)
    found, report = read(tmp_path / "data")
    assert found == ["a"]
    assert report[1] == "left out, folders that were read before: loop, two"


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="pipe is a pipe"):
            read(path)
    (tmp_path / "pipe").unlink()
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        read(type(tmp_path)("/dev/zero"))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="gone is a link to nothing"):
        read(tmp_path)
    (tmp_path / "gone").unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tmp_path / "s"))
        with pytest.raises(ValueError, match="s is a socket"):
            read(tmp_path)


BAD = [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "b"}', "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}', r"byte 0xff at offset 24 \(line 2\)"),
    ("a.jsonl", b'{"text": "a"}\n' + b"[" * 99_999 + b'\n{"text": "b"}', "line 2: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"x\x1b[2J": 1}\n{"text": "b"}', "line 2: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"x\\u001b[2J": 1}\n{"text": "b"}', r"it has: x\\x1b\[2J"),
    ("a.json", b'[{"text": "a"}, {"body": 1}, {"text": "b"}]', "record 2: no text in field"),
    ("a.csv", b"id,text\n1,a\n2\n3,b\n", "line 3: 1 values, but 2 columns"),
    ("a.csv", b'id,text\n1,a\n2,"x"y\n3,b\n', "line 3: not CSV"),
    ("a.parquet", parquet_bytes([{"text": "a"}, {"text": None}, {"text": "b"}]), "row 2: no text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_bad_line_is_refused_by_number_or_skipped_and_counted(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)
    found, report = read(tmp_path / name, bad_lines="skip")
    assert found == ["a", "b"]
    assert report[-1].startswith("skipped, 1 bad lines or records; the first: ")
    assert all(line.isprintable() for line in report)


def test_a_file_that_is_no_text_is_left_out_whole_where_bad_lines_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 3 * 2**20 + b"\0")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt is not text: byte 0x00 at offset 3145728"):
        read(tmp_path)
    found, report = read(tmp_path, bad_lines="skip")
    assert found == ["text"]
    assert report[1] == "left out, not text: a.txt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"te', "record 2: not JSON"),
        ("a.json", b'[{"text": "a"}', "breaks off after record 1"),
        ("a.json", b'[{"text": "a"}] []', "more text after the list"),
        ("a.json", b"3", "is JSON, but not a list of records"),
        ("a.json", b'{"text"', "not JSON"),
        ("a.csv", b"id,body\n1,a\n", r"no column 'text' \(it has: id, body\)"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is damaged"),
        ("a.parquet", b"text", "a.parquet is damaged"),
        ("a.parquet", parquet_bytes([{"body": "a"}]), r"no column 'text' \(it has: body\)"),
        ("wide.txt", "text".encode("utf-16"), "not text: byte 0xff at offset 0"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for bad_lines in ("refuse", "skip"):
        if name == "wide.txt" and bad_lines == "skip":
            message = r"left out, not text: wide\.txt"
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, bad_lines=bad_lines)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"text"))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ValueError, match="needs the package zstandard: pip install zstandard"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["one.txt", "many.jsonl", "many.json"])
def test_a_file_needs_hardly_more_memory_than_its_text(tmp_path, monkeypatch, name):
    monkeypatch.setattr(unpacking, "PIECE", 2**16)
    line = json.dumps({"text": "é" * 3000}, ensure_ascii=False)
    begin, text, end = {
        "one.txt": ("", "é" * 10_000, ""),
        "many.jsonl": ("", f"{line}\n", ""),
        "many.json": ("[", f"{line},\n", line + "]"),
    }[name]
    (tmp_path / name).write_text(begin + text * (2**24 // len(text.encode())) + end)
    tracemalloc.start()
    corpus = open_corpus(DataConfig(str(tmp_path / name)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.num_ids > 16e6
    assert peak < 1.2 * corpus.num_ids + 2**20
