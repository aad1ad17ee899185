"""Compute the fingerprint of a run's text: names, sizes and contents of its files.

It is kept in checkpoints, so that a run is not resumed with other text by mistake. If all files
have at most `FULL` bytes, every byte is read, and any change is noticed. If they have more, each
file is read in blocks spread evenly over it, its begin and end included, about `FULL` bytes in all.
Then a change of size or name is always noticed, and an edit of one spot that keeps the length is
noticed with a probability of `FULL` / size; the time of modification is kept as well, and reported
if it differs. Four threads read, at the speed of the disk and of BLAKE2 (about 1 GB/s each).

Files are identified by their names relative to the folder, so that a folder can be moved.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hcp_jax.train.data import tokens
from hcp_jax.train.data.text import Texts
from hcp_jax.train.sections import DataConfig

FULL = 2**32
"""The most bytes that are read in full; of larger corpora, about as many are sampled."""

BLOCK = 2**16
"""Bytes of a sample."""

GROUPS = 2048
"""The most entries: with more files, neighbours share one, so that checkpoints stay small."""

_SHOWN = 5


class Entry(NamedTuple):
    """The fingerprint of a file, or of neighbouring files in a folder with very many.

    Attributes:
        name: the file's name; of several files, the first and the last name.
        size: bytes of all files.
        digest: digest of names, sizes and contents.
        modified: the last time of modification, in ns since 1970, if only samples were read.
    """

    name: str
    size: int
    digest: str
    modified: int | None = None


def fingerprint(paths: Iterable[pathlib.Path], root: pathlib.Path) -> list[Entry]:
    """Return the fingerprint of files.

    Args:
        paths: the files, in the order in which they are read.
        root: the folder that their names are relative to.

    Raises:
        OSError: if a file cannot be read.
    """
    named = [(path.relative_to(root).as_posix(), path) for path in paths]
    total = sum(path.stat().st_size for _, path in named)
    share = min(1.0, FULL / total) if total else 1.0
    each = -(-len(named) // GROUPS) or 1
    groups = [named[i : i + each] for i in range(0, len(named), each)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda group: _entry(group, share), groups))


def run_fingerprint(data: DataConfig, held_out: str | None) -> dict[str, list[Entry]]:
    """Return the fingerprints of all files that a run reads, by the config's keys.

    Args:
        data: where the text comes from.
        held_out: `eval.path`, if the run evaluates on other text.
    """
    found = {"data.path": _files_of(data, data.path)}
    if data.tokenizer is not None:
        tokenizer = pathlib.Path(data.tokenizer)
        found["data.tokenizer"] = fingerprint([tokenizer], tokenizer.parent)
    if held_out is not None:
        found["eval.path"] = _files_of(data, held_out)
    return found


def summary(files: Mapping[str, Sequence[Entry]]) -> str:
    """Return a digest of a `run_fingerprint` without its times; to compare hosts."""
    told = {key: [entry[:3] for entry in entries] for key, entries in files.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def changes(before: Mapping[str, Any], now: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Return a line for each file that changed; compare only keys that both sides have.

    Args:
        before: a `run_fingerprint` from a checkpoint, each entry a list.
        now: a `run_fingerprint`.
    """
    found: list[str] = []
    for key in now:
        if key in before:
            found += _compare(key, [Entry(*entry) for entry in before[key]], now[key])
    more = len(found) - _SHOWN
    return found[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])


def doubts(before: Mapping[str, Any], now: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Return a line for each large file that was modified although no sample of it changed."""
    return [
        f"{key}: {entry.name!r} has the same size and samples as before, but was modified since; "
        "it is too large to be compared as a whole"
        for key in now
        for entry in now[key]
        for old in (Entry(*one) for one in before.get(key, ()))
        if old[:3] == entry[:3] and old.modified != entry.modified
    ]


def _files_of(data: DataConfig, name: str | None) -> list[Entry]:
    """Return the fingerprint of the text at a path, read as `data` says; None: the default text."""
    path = None if name is None else pathlib.Path(name)
    if path is not None and tokens.is_tokenised(path):
        return fingerprint([path / file for file in tokens.FILES], path)
    texts = Texts(path, data.field, data.bad_lines, data.skip)
    return fingerprint(texts.files, texts.root)


def _compare(key: str, before: list[Entry], now: Sequence[Entry]) -> list[str]:
    old, new = ({entry.name: entry for entry in entries} for entries in (before, now))
    found = []
    for name, entry in new.items():
        if name not in old:
            found.append(f"{key}: {name!r} is new")
        elif old[name].size != entry.size:
            sizes = f"{old[name].size:,} bytes and has {entry.size:,}"
            found.append(f"{key}: {name!r} had {sizes}")
        elif old[name].digest != entry.digest:
            found.append(f"{key}: {name!r} has other contents of the same size")
    return found + [f"{key}: {name!r} is gone" for name in old if name not in new]


def _entry(group: Sequence[tuple[str, pathlib.Path]], share: float) -> Entry:
    digest, size, modified = hashlib.blake2b(digest_size=16), 0, 0
    for name, path in group:
        with path.open("rb") as file:
            length = path.stat().st_size
            digest.update(json.dumps([name, length]).encode())
            if share == 1.0 or length <= BLOCK:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                for offset in _offsets(length, share):
                    file.seek(offset)
                    digest.update(file.read(BLOCK))
        size, modified = size + length, max(modified, path.stat().st_mtime_ns)
    first, last = group[0][0], group[-1][0]
    name = first if first == last else f"one of {first} to {last}"
    return Entry(name, size, digest.hexdigest(), None if share == 1.0 else modified)


def _offsets(length: int, share: float) -> list[int]:
    """Return offsets of blocks spread evenly over a file, its begin and end included."""
    number = max(2, round(length * share / BLOCK))
    return [i * (length - BLOCK) // (number - 1) for i in range(number)]
