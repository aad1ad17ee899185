"""YAML and JSON of strangers: plain values, or one line that says why not; no import, no growth."""

import itertools
import os
import pathlib
import random
import sys

import pytest

from hcp_jax.base import reading
from hcp_jax.train import config, config_keys

CONFIG = (pathlib.Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text()

REFUSED = {
    "an alias": ("a: &x [1, 1]\nb: [*x, *x]", r"anchor or alias \(& or \*\) \(line 1\)"),
    "an anchor alone": ("a: &x 1", "anchor or alias"),
    "a merge": ("a: 1\n<<: {b: 2}", r"merge key \(<<\) \(line 2\)"),
    "a tag that runs": ("a: !!python/object/apply:os.system [ls]", "has the tag"),
    "a tag that imports": ("!!python/module:this", "has the tag"),
    "a tag of its own": ("a: !x 1", "has the tag"),
    "a set": ("a: !!set {b}", "has the tag"),
    "a key twice": ("a: 1\nb: 2\na: 3", r"key 'a' twice \(line 3\)"),
    "a key twice, inside": ("a: {b: 1, 'b': 2}", "key 'b' twice"),
    "a number as a key": ("1: 2", "has 1 as a key"),
    "a list as a key": ("[1]: 2", "as a key"),
    "deep lists": ("a: " + "[" * 500 + "]" * 500, "nested more than 32 deep"),
    "very deep lists": ("[" * 100_000, "nest"),
    "deep mappings": ("{a: " * 50_000, "nest"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(400)), "nested more than 32 deep"),
    "many entries": ("".join(f"a{i}: 1\n" for i in range(100_000)), "more than 20,000 values"),
    "a long list": ("a: [" + "1," * 100_000 + "]", "more than 20,000 values"),
    "a tab": ("a:\n\t- 3", "indent with spaces, not tabs"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "is not YAML: Exceeds the limit"),
    "a date that there is not": ("a: 2020-99-99", "is not YAML: month"),
    "half of it": ("a: [1, {", "is not YAML"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_yaml_that_is_more_than_plain_values_is_refused_in_a_line(text, message):
    with pytest.raises(ValueError, match=rf"^the file .*{message}") as error:
        reading.parse_yaml(text, "the file")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_bombs_are_refused_before_they_are_built(monkeypatch):
    """The loader that builds values is not even asked."""
    import yaml

    monkeypatch.setattr(yaml, "load", lambda *_, **__: pytest.fail("built"))
    names = [f"a{i}" for i in range(30)]
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(names)
    )
    for text in (laughs, REFUSED["deep lists"][0], REFUSED["many entries"][0]):
        with pytest.raises(ValueError, match="the file"):
            reading.parse_yaml(text, "the file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested more than 32 deep"),
        ("9" * 5000, "is not JSON"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_is_ambiguous_or_deep_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^the file .*{message}"):
        reading.parse_json(text, "the file")


def test_what_is_plain_is_read(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: [1, 2.5, null, true, '<<', x]\nb: {c: 1e-3}\n")
    assert reading.read_yaml(file) == {"a": [1, 2.5, None, True, "<<", "x"], "b": {"c": "1e-3"}}
    file.write_bytes(b'\xef\xbb\xbf{"a": [1, {"b": null}]}')
    assert reading.read_json(file) == {"a": [1, {"b": None}]}


def test_what_is_no_text_of_its_size_is_refused(tmp_path):
    for content, message in (
        (b"a: \0", "not UTF-8 text: byte 0x00 at offset 3"),
        (b"\x93NUMPY", "not UTF-8 text: byte 0x93 at offset 0"),
        (b"a: " + 2**20 * b"x", "larger than 1 MiB"),
    ):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            reading.read_yaml(tmp_path / "x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"):
        reading.read_yaml(tmp_path / "fifo")
    with pytest.raises(ValueError, match="not a regular file"):
        reading.read_yaml("/dev/zero")


class _Imports:
    """A finder of modules that finds none, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def find_spec(self, name, path=None, target=None):
        self.asked.append(name)


_HOSTILE = [
    '"{\\"class_path\\": \\"this.X\\"}"',
    '\'{"class_path": "this.X", "init_args": {}}\'',
    "{class_path: this.X, init_args: {a: 1}}",
    "{class_path: antigravity}",
    "this.X",
    "antigravity",
    "!!python/name:this.s ''",
    "!!python/object/new:this.X []",
    "{__class__: this.X, __init__: x}",
    "{__path__: /etc/passwd}",
    "https://example.com/x.yaml",
    "/etc/passwd",
    "$HOME",
    "${oc.env:HOME}",
    ".nan",
    ".inf",
    "-1",
    "1e999",
    "[[[[1]]]]",
    "&a [*a]",
    "null",
    "[]",
    "{}",
    '"\\ud800"',
    "'" + "x" * 5000 + "'",
]


def test_no_value_of_a_config_imports_anything(tmp_path, monkeypatch):
    """Every key, with every hostile value, in a file and on the command line: 0 imports."""
    rng = random.Random(12)
    keys = [key for key, _, _ in config_keys.keys(config.TrainConfig)]
    file = tmp_path / "x.yaml"
    file.write_text("steps: 3")
    config.load(file, [("parallel.comm_type", "[p2p, p2p, p2p, p2p]"), ("steps", "4")])
    (tmp_path / "this.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    imports, refused, cases = _Imports(), [], 0
    monkeypatch.setattr(sys, "meta_path", [imports, *sys.meta_path])
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    before = set(sys.modules)
    for key in [*keys, "model", "parallel", "class_path", "model.class_path"]:
        for value in rng.sample(_HOSTILE, 4):
            *parts, last = key.split(".")
            file.write_text("".join(f"{' ' * i}{part}:\n" for i, part in enumerate(parts)))
            with file.open("a") as out:
                out.write(f"{' ' * len(parts)}{last}: {value}\n")
            for overrides, path in (((), file), ([(key, value)], None)):
                cases += 1
                try:
                    config.load(path, overrides)
                except (ValueError, NotImplementedError) as error:
                    refused.append(str(error))
    assert (imports.asked, set(sys.modules) - before) == ([], set())
    assert cases > 600
    assert len(refused) > cases / 2
    assert max(map(len, refused)) < 1000


def test_damaged_configs_are_read_or_refused_in_a_line(tmp_path):
    rng = random.Random(13)
    file, refused = tmp_path / "x.yaml", []
    for _ in range(200):
        content = bytearray(CONFIG.encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            kind = rng.randrange(4)
            if kind == 0:
                content[at] = rng.randrange(256)
            elif kind == 1:
                del content[at : at + rng.randrange(40)]
            elif kind == 2:
                content[at:at] = content[: rng.randrange(60)]
            else:
                content[at:at] = rng.choice(_HOSTILE).encode()
        file.write_bytes(content)
        try:
            config.load(file)
        except (ValueError, NotImplementedError) as error:
            refused.append(str(error))
    assert max(map(len, refused)) < 1000
