"""Hostile and odd folders: hundreds of damaged ones end in a line, and what one is, is named."""

import dataclasses
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from hcp_jax import cli
from hcp_jax.models.hf import config_json, loading, model_folder
from hcp_jax.models.layers.rope import RopeScaling
from hcp_jax.train.hf import weights
from tests.models.folders import CONFIG, make_folder, stored_values

Q0 = "model.layers.0.self_attn.q_proj.weight"

ODD = [
    *(None, True, False, 0, -1, 1, 1.5, 7, 2**31, 2**63, 10**40, float("nan"), float("inf"), 1e300),
    *("", "8", "true", "\x1b[2J", "\ud800", "\0", "x" * 5000, "../x", "/etc/passwd", ".", ".."),
    *([], [1], {}, {"a": 1}, {"class_path": "this.X"}, [[[[[]]]]], ["sliding_attention", 3]),
]
"""Values of JSON where another one is meant."""


class Damage:
    """Seeded damage to a folder; each method is one kind."""

    def __init__(self, rng, folder, outside):
        self.rng, self.folder, self.outside = rng, folder, outside

    def _file(self):
        return self.rng.choice(sorted(self.folder.iterdir()))

    def _edit(self, name, change):
        values = json.loads((self.folder / name).read_text())
        change(values)
        (self.folder / name).write_text(json.dumps(values))

    def _edit_head(self, change):
        file = self.rng.choice(sorted(self.folder.glob("*.safetensors")))
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        head = json.loads(content[8 : 8 + size])
        change(head)
        new = json.dumps(head).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])

    def config_value(self):
        def change(raw):
            key = self.rng.choice([*raw, "rope_scaling", "sliding_window", "use_sliding_window"])
            raw[key] = self.rng.choice(ODD)

        self._edit("config.json", change)

    def config_family(self):
        def change(raw):
            raw["model_type"] = self.rng.choice(["mistral", "qwen2", "qwen3", "llama"])
            raw[self.rng.choice(["layer_types", "max_window_layers", "head_dim"])] = (
                self.rng.choice(ODD)
            )
            raw["use_sliding_window"] = self.rng.choice([True, "true"])

        self._edit("config.json", change)

    def config_rope(self):
        kind = self.rng.choice(["linear", "llama3", "yarn", "dynamic"])
        values = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 128}
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
        values[self.rng.choice([*values, "beta_fast", "attention_factor", "mscale"])] = (
            self.rng.choice(ODD)
        )
        form = self.rng.choice(["rope_scaling", "rope_parameters"])
        self._edit("config.json", lambda raw: raw.update({form: values}))

    def config_text(self):
        text = (self.folder / "config.json").read_text()
        texts = [
            "",
            "{",
            "[]",
            "3",
            "[" * 10**5,
            '{"a":' * 10**5,
            text + text,
            text.replace("}", ""),
        ]
        texts += ["{}", '{"model_type": "llama", ' + text[1:], "\ufeff" + text, text[:-9] + "\0}"]
        texts += [text[: self.rng.randrange(len(text))], '{"vocab_size": ' + "9" * 5000 + "}"]
        (self.folder / "config.json").write_text(self.rng.choice(texts), encoding="utf-8")

    def index_value(self):
        def change(index):
            name = self.rng.choice(sorted(index["weight_map"]))
            index["weight_map"][name] = self.rng.choice([*ODD, str(self.outside / "x.safetensors")])

        self._edit(model_folder.INDEX, change)

    def index_shape(self):
        odd = self.rng.choice([None, 3, [], {}, "x", [["a", "b"]]])
        self._edit(model_folder.INDEX, lambda index: index.update(weight_map=odd))

    def index_text(self):
        text = self.rng.choice(["", "{", "[" * 10**5, "3", '{"weight_map": {"a": "b", "a": "c"}}'])
        (self.folder / model_folder.INDEX).write_text(text)

    def cut(self):
        file = self._file()
        os.truncate(file, self.rng.randrange(file.stat().st_size))

    def flip(self):
        file = self._file()
        content = bytearray(file.read_bytes())
        for _ in range(self.rng.randint(1, 8)):
            content[self.rng.randrange(min(len(content), 4000))] = self.rng.randrange(256)
        file.write_bytes(content)

    def head_length(self):
        file = self.rng.choice(sorted(self.folder.glob("*.safetensors")))
        size = self.rng.choice([0, 1, 7, 2**20, 2**31, 2**32, 2**63, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])

    def head_value(self):
        def change(head):
            entry = head[self.rng.choice([name for name in head if name != "__metadata__"])]
            entry[self.rng.choice(["dtype", "shape", "data_offsets"])] = self.rng.choice(
                [*ODD, "F64", "F8_E4M3", "I4", [2**63, 2], [0, 0], [10, 5], [0, 2**62], [-1, 4]]
            )

        self._edit_head(change)

    def head_names(self):
        def change(head):
            names = [name for name in head if name != "__metadata__"]
            old, new = self.rng.choice(names), self.rng.choice(["", "\x1b[2J", "x" * 9000, *names])
            head[new] = head[old] if self.rng.random() < 0.5 else head.pop(old)

        self._edit_head(change)

    def head_metadata(self):
        self._edit_head(lambda head: head.update(__metadata__=self.rng.choice(ODD)))

    def no_numbers(self):
        bad = self.rng.choice([np.nan, np.inf, -np.inf])
        files = {}
        for name, stored in model_folder.stored_tensors(self.folder).items():
            files.setdefault(stored.file, {})[name] = np.full(stored.shape, bad, np.float32)
        for file, tensors in files.items():
            save_file(tensors, file)

    def other_kind(self):
        file = self._file()
        kept = file.read_bytes()
        file.unlink()
        kind = self.rng.randrange(6)
        if kind == 0:
            file.mkdir()
        elif kind == 1:
            os.mkfifo(file)
        elif kind == 2:
            file.symlink_to(file)
        elif kind == 3:
            file.symlink_to("/dev/zero")
        elif kind == 4:
            (self.outside / file.name).write_bytes(kept)
            file.symlink_to(self.rng.choice([self.outside / file.name, f"../outside/{file.name}"]))
        else:
            file.write_bytes(b"")

    def another_name(self):
        file = self._file()
        file.rename(
            self.folder
            / self.rng.choice(
                ["\x1b[2J.bin", "漢字.gguf", "x\n.safetensors", model_folder.ONE_FILE]
            )
        )


KINDS = [name for name in vars(Damage) if not name.startswith("_")]


class Opened:
    """The files that are opened inside this context, links followed, by Python and by safetensors."""

    def __init__(self):
        self.names, self._listening = [], False
        sys.addaudithook(self._hear)  # there is no way to take one away

    def __enter__(self):
        self._listening = True

    def __exit__(self, *_):
        self._listening = False

    def _hear(self, event, args):
        if self._listening and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            self.names.append(os.path.realpath(os.fsdecode(args[0])))

    def safe_open(self, file, **options):
        self.names.append(os.path.realpath(file))
        return safe_open(file, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of a model as small as it can be."""
    config = dataclasses.replace(CONFIG, num_layers=1, vocab_size=32, qkv_bias=False)
    folder = make_folder(tmp_path_factory.mktemp("hf") / "whole", config, shard_bytes=20_000)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_hostile_folder_is_a_line_and_nothing_outside_is_read(
    whole, tmp_path, capsys, monkeypatch
):
    """300 folders, seeded: no traceback, nothing outside, no import, no unpickling, safe to print."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(next(whole.glob("*.safetensors")), outside / "x.safetensors")
    opened = Opened()
    for module in (loading, model_folder):
        monkeypatch.setattr(module, "safe_open", opened.safe_open)
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    assert cli.main(["import", str(whole)]) == 0
    modules, refused, codes = set(sys.modules), set(), []
    capsys.readouterr()
    for seed in range(300):
        rng = random.Random(seed)
        folder = shutil.copytree(whole, tmp_path / "folder")
        kind = KINDS[seed % len(KINDS)]
        getattr(Damage(rng, folder, outside), kind)()
        with opened:
            codes.append(cli.main(["import", str(folder)]))
        captured = capsys.readouterr()
        assert codes[-1] in (0, 2), (seed, kind)
        assert all(line.isprintable() for line in (captured.out + captured.err).split("\n")), seed
        assert len(captured.err) < 1500, (seed, kind, captured.err)
        if codes[-1]:
            assert captured.err.startswith("hcp: "), (seed, kind)
            assert captured.err.count("\n") == 1, (seed, kind)
            refused.add(kind)
        shutil.rmtree(folder)
    assert refused == set(KINDS)
    assert codes.count(2) > 200
    assert [n for n in opened.names if n.startswith((str(outside), "/dev/zero", "/etc"))] == []
    assert any(name.startswith(str(tmp_path / "folder")) for name in opened.names)
    assert set(sys.modules) == modules


def test_a_value_that_would_compute_something_else_is_refused_by_name():
    raw = config_json.raw_config(CONFIG, 512, "float32") | {"model_type": "llama"}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    llama3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4}
    nan, inf = float("nan"), float("inf")
    for key, value in (
        *(("rms_norm_eps", eps) for eps in (-1, 0, nan, inf, 1e3, "1e-5", True, [])),
        *(("rope_theta", theta) for theta in (0, -1e4, nan, inf, 1, "10000", False, 10**400)),
        *(("num_attention_heads", heads) for heads in (0, 8.0, True, "8", -8, None, 10**30)),
        *(("num_key_value_heads", heads) for heads in (0, 2.0, True, "2", -2, [2])),
        *(("head_dim", size) for size in (0, 16.0, True, "16")),
        *(("num_hidden_layers", layers) for layers in (0, 2**40, True)),
        *(("max_position_embeddings", size) for size in (0, 1.5, "512", -1)),
        ("tie_word_embeddings", "false"),
        ("rope_scaling", [1]),
    ):
        with pytest.raises(ValueError, match=f"^config.json: {key} must be "):
            config_json.model_config(raw | {key: value})
    for values, key in (
        *((yarn, name) for name in ("factor", "beta_fast", "attention_factor", "rope_theta")),
        *((llama3, name) for name in ("low_freq_factor", "high_freq_factor", "factor")),
    ):
        for value in (nan, inf, -1, "2", True, 0):
            with pytest.raises(ValueError, match=f"^config.json: rope_scaling: {key} must be "):
                config_json.model_config(raw | {"rope_scaling": values | {key: value}})
    for window in (1.5, 0, -3, True, "4", nan):
        with pytest.raises(ValueError, match="sliding_window must be an integer"):
            config_json.model_config(raw | {"model_type": "mistral", "sliding_window": window})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    [slot] = (s for s in loading.slots(CONFIG) if s.name == Q0)
    values = stored_values(slot, np.float32)
    everywhere = make_folder(tmp_path / "x", **{Q0: np.full_like(values, bad)})
    with pytest.raises(ValueError, match=rf"{Q0} has 64 values of 64 read that are NaN or inf"):
        loading.check(CONFIG, everywhere)
    values[77, 3] = bad  # one, which only reading all of them finds
    once = make_folder(tmp_path / "y", **{Q0: values})
    loading.check(CONFIG, once)
    with pytest.raises(ValueError, match=rf"{Q0} has 1 values of"):
        loading.load_params(CONFIG, once)


def touch(*names):
    def make(folder):
        for file in folder.glob("*safetensors*"):
            file.unlink()
        for name in names:
            (folder / name).write_bytes(b"{}")

    return make


def rename_tensors(change):
    def make(folder):
        shutil.rmtree(folder)
        old = loading.slots(CONFIG)
        changes = {s.name: None for s in old} | {change(s.name): stored_values(s) for s in old}
        make_folder(folder, **changes)

    return make


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (touch("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), "has shards .* without model.safetensors.index.json"),
        (touch("weights.safetensors"), "has weights.safetensors, but neither model.safetensors nor"),
        (touch("adapter_config.json", "adapter_model.safetensors"), r"adapter \(LoRA\).*merge_and_unload"),
        (touch("llama.Q4_K_M.gguf"), r"holds GGUF files.*llama.Q4_K_M.gguf.*not read here"),
        (touch("tf_model.h5"), "holds weights of TensorFlow"),
        (touch("pytorch_model.bin"), "is a pickle"),
        (lambda f: (f / "config.json").rename(f / "params.json"), "original form of Meta"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "holds an adapter"),
        (lambda f: (f / "config.json").rename(f / "config.yaml"), "a run of hcp train; hcp export"),
        (lambda f: (f / "config.json").rename(f / "snapshots"), "cache of the Hugging Face Hub.*snapshots/REV"),
        (lambda f: (f / "config.json").rename(f / "x"), "has no config.json"),
        (lambda f: save_file({"a": np.zeros(2)}, f / "model.safetensors"), "two sets of weights: model.safetensors, which transformers reads, and shard-0"),
        (rename_tensors("module.{}".format), r"lacks .*'module\.' before their names"),
        (rename_tensors("language_model.{}".format), r"'language_model\.' before their names"),
        (rename_tensors(lambda n: n.removeprefix("model.")), "lack 'model.' before their names: it is the base model"),
        (rename_tensors("base_model.model.{}".format), r"it holds an adapter \(LoRA\)"),
        (rename_tensors(lambda n: f"h.{len(n)}.{n.replace('.', '_')}"), "named as in no family that is read"),
    ],
)  # fmt: skip
def test_what_a_folder_is_instead_is_named(tmp_path, capsys, make, says):
    folder = make_folder(tmp_path / "model")
    make(folder)
    with pytest.raises(ValueError, match=says):
        weights.check(CONFIG, str(folder))
    assert cli.main(["import", str(folder)]) == 2


def test_an_index_of_the_one_file_may_lie_beside_it(tmp_path):
    folder = make_folder(tmp_path / "x", shard_bytes=10**9)
    (folder / "shard-0.safetensors").rename(folder / model_folder.ONE_FILE)
    index = (folder / model_folder.INDEX).read_text()
    (folder / model_folder.INDEX).write_text(index.replace("shard-0", "model"))
    loading.check(CONFIG, folder)


@pytest.mark.parametrize(
    "name",
    ["meta-llama/Llama-3.1-8B", "https://huggingface.co/meta-llama/Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B/"],
)  # fmt: skip
def test_a_name_of_the_hub_is_told_how_to_become_a_folder(name, capsys):
    told = "hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B"
    with pytest.raises(ValueError, match=f"nothing is downloaded.*{told}"):
        weights.check(CONFIG, name)
    assert cli.main(["import", name]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/nowhere/x", "x" * 5000, "no such"])
def test_a_folder_that_is_not_there_is_told(name):
    with pytest.raises(ValueError, match="it does not exist"):
        weights.check(CONFIG, name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match="is a file; give the Hugging Face folder"):
        weights.check(CONFIG, str(tmp_path / "x.safetensors"))


def test_links_are_followed_inside_and_in_the_cache_of_the_hub_alone(tmp_path):
    cache = tmp_path / "models--a--b"
    folder = make_folder(tmp_path / "files")
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(pathlib.Path("../../blobs", str(number)))
    weights.check(CONFIG, str(snapshot))
    (tmp_path / "link").symlink_to(folder)
    weights.check(CONFIG, str(tmp_path / "link"))
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ValueError, match=f"tokenizer.json is a link to {secret}, outside"):
        weights.check(CONFIG, str(folder))


def test_a_sequence_longer_than_the_model_was_made_for_is_a_warning(tmp_path):
    folder = str(make_folder(tmp_path / "x"))  # max_position_embeddings=512
    warning = "warning: seq_len 1,024 is longer than the 512 tokens that the model was made for"
    assert warning in weights.check(CONFIG, folder, 1024)
    assert "warning" not in weights.check(CONFIG, folder, 512)
    longer = dataclasses.replace(CONFIG, rope_theta=8e6)
    assert "warning" not in weights.check(longer, folder, 1024)
    for factor, warns in ((2.0, False), (1.5, True)):
        scaled = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("yarn", factor, 512))
        assert ("warning" in weights.check(scaled, folder, 1024)) == warns


def test_a_byte_order_mark_changes_nothing(tmp_path):
    folder = make_folder(tmp_path / "x")
    for name in ("config.json", model_folder.INDEX):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    weights.check(CONFIG, str(folder))
