"""The fingerprint of a text: every change is seen and named, and a folder may be moved."""

import json
import os

import pytest

from hcp_jax.train.data import DataConfig, fingerprint
from hcp_jax.train.data.fingerprint import changes, doubts, run_fingerprint, summary


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "c.txt", "deep/d.txt"):
        (folder / name).write_text(f"the text of {name} " * 40)
    return folder


def as_saved(files):
    return json.loads(json.dumps(files))


def edit(folder):
    content = bytearray((folder / "b.txt").read_bytes())
    content[77] ^= 1
    (folder / "b.txt").write_bytes(content)


def swap(folder):
    a, b = (folder / "a.txt").read_bytes(), (folder / "b.txt").read_bytes()
    (folder / "a.txt").write_bytes(b)
    (folder / "b.txt").write_bytes(a)


CHANGES = {
    "edited": (edit, ["data.path: 'b.txt' has other contents of the same size"]),
    "swapped": (
        swap,
        [f"data.path: '{name}.txt' has other contents of the same size" for name in "ab"],
    ),
    "longer": (
        lambda folder: (folder / "b.txt").write_text("x"),
        ["data.path: 'b.txt' had 720 bytes and has 1"],
    ),
    "renamed": (
        lambda folder: (folder / "deep/d.txt").rename(folder / "deep/e.txt"),
        ["data.path: 'deep/e.txt' is new", "data.path: 'deep/d.txt' is gone"],
    ),
    "added": (
        lambda folder: (folder / "deep/a.txt").write_text("x"),
        ["data.path: 'deep/a.txt' is new"],
    ),
    "removed": (lambda folder: (folder / "a.txt").unlink(), ["data.path: 'a.txt' is gone"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_named(name, folder):
    change, says = CHANGES[name]
    config = DataConfig(path=str(folder))
    before = run_fingerprint(config, None)
    assert changes(as_saved(before), run_fingerprint(config, None)) == []
    change(folder)
    now = run_fingerprint(config, None)
    assert changes(as_saved(before), now) == says
    assert summary(now) != summary(before)
    # The same of the held-out text, beside a text that stays.
    assert changes(
        as_saved({"eval.path": before["data.path"]}), {"eval.path": now["data.path"]}
    ) == [line.replace("data.path", "eval.path") for line in says]


def test_a_folder_may_be_moved_and_touched(folder):
    before = run_fingerprint(DataConfig(path=str(folder)), None)
    moved = folder.rename(folder.with_name("moved"))
    os.utime(moved / "a.txt", (1, 1))
    now = run_fingerprint(DataConfig(path=str(moved)), None)
    assert (changes(as_saved(before), now), doubts(as_saved(before), now)) == ([], [])
    assert summary(now) == summary(before)


def test_a_tokenised_folder_its_tokenizer_and_held_out_text_belong_to_it(folder):
    tokenised = folder.with_name("tokens")
    tokenised.mkdir()
    for name in ("tokens.npy", "offsets.npy", "meta.json"):
        (tokenised / name).write_text(name)
    tokenizer = folder.with_name("tokenizer.json")
    tokenizer.write_text("{}")
    config = DataConfig(path=str(tokenised), tokenizer=str(tokenizer))
    before = run_fingerprint(config, str(folder / "a.txt"))
    (tokenised / "tokens.npy").write_text("tokens.npx")
    tokenizer.write_text("[]")
    (folder / "a.txt").write_text("x" * 720)
    assert changes(as_saved(before), run_fingerprint(config, str(folder / "a.txt"))) == [
        "data.path: 'tokens.npy' has other contents of the same size",
        "data.tokenizer: 'tokenizer.json' has other contents of the same size",
        "eval.path: 'a.txt' has other contents of the same size",
    ]


def test_of_a_large_file_samples_are_read_and_its_time_is_told(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "FULL", 64)
    monkeypatch.setattr(fingerprint, "BLOCK", 8)
    config = DataConfig(path=str(folder))
    before = run_fingerprint(config, None)
    content = bytearray((folder / "b.txt").read_bytes())
    for place in (0, len(content) - 1):  # begin and end are always seen
        content[place] ^= 1
        (folder / "b.txt").write_bytes(content)
        assert changes(as_saved(before), run_fingerprint(config, None)) == [CHANGES["edited"][1][0]]
        content[place] ^= 1
    (folder / "b.txt").write_bytes(content)
    os.utime(folder / "b.txt", (1, 1))
    now = run_fingerprint(config, None)
    assert changes(as_saved(before), now) == []
    assert [
        "'b.txt' has the same size and samples" in line for line in doubts(as_saved(before), now)
    ] == [True]


def test_very_many_files_share_entries(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "GROUPS", 2)
    config = DataConfig(path=str(folder))
    before = run_fingerprint(config, None)
    edit(folder)
    assert len(before["data.path"]) == 2
    assert changes(as_saved(before), run_fingerprint(config, None)) == [
        "data.path: 'one of a.txt to b.txt' has other contents of the same size"
    ]


def test_the_standard_library_is_read_as_a_whole():
    [entries] = run_fingerprint(DataConfig(), None).values()
    assert len(entries) > 400
    assert {entry.modified for entry in entries} == {None}
    assert "ast.py" in [entry.name for entry in entries]
