"""Tiles that a sweep kept on the user's GPU: which calls take them, and which files are ignored."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

import hcp_jax as hcp
from hcp_jax.kernels import core, kept_tiles, user_cache
from hcp_jax.kernels.tiles import Tile, Tiles
from hcp_jax.parallel import one_device
from tests.commands.test_bench import _grid_and_schedule, _pallas_calls

AMPERE = "NVIDIA A10"
TILES = Tiles(Tile(64, 32, 8, 2), Tile(16, 64, 4, 1), Tile(32, 128, 2, 3))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for the file, on a machine with such a GPU."""
    monkeypatch.setattr(user_cache, "cache_folder", lambda: tmp_path / "the cache")
    monkeypatch.setattr(user_cache, "is_here", lambda kind: kind == AMPERE)
    monkeypatch.delenv(kept_tiles.VARIABLE)
    kept_tiles._kept.cache_clear()
    yield tmp_path / "the cache"
    kept_tiles._kept.cache_clear()


def find(device_kind=AMPERE, dtype="bfloat16", head_size=128, v_head_size=128):
    return kept_tiles.find("triton", device_kind, dtype, head_size, v_head_size)


def kernels(monkeypatch):
    """Trace the public op as on the GPU; return grid, warps and stages of its kernels."""
    gpu = types.SimpleNamespace(platform="gpu", device_kind=AMPERE)
    monkeypatch.setattr(one_device, "_device", lambda x: gpu)
    q = jax.ShapeDtypeStruct((1, 256, 1, 128), jnp.bfloat16)

    def run(q, k, v):
        out, pull = jax.vjp(lambda *a: hcp.dot_product_attention(*a, is_causal=True), q, k, v)
        return pull(out)

    calls = _pallas_calls(jax.jit(run).trace(q, q, q).jaxpr.jaxpr)
    return [_grid_and_schedule(call) for call in calls]


def test_the_op_takes_kept_tiles_and_says_so(cache, monkeypatch):
    before = kernels(monkeypatch)
    assert kept_tiles.keep("triton", AMPERE, "bfloat16", 128, TILES)
    assert kernels(monkeypatch) == before  # a process keeps to what it has read
    kept_tiles._kept.cache_clear()  # as in a new process
    schedules = [tuple(schedule) for _, *schedule in kernels(monkeypatch)]
    assert schedules == [(8, 2), (4, 1), (2, 3)]
    told = core.describe("gpu", AMPERE)
    assert told.endswith(
        "for bfloat16 with head size 128 those that `hcp bench attention --sweep` kept)"
    )
    assert "kept" not in core.describe("gpu", "NVIDIA A100")


def test_other_calls_do_not_take_them(cache, monkeypatch):
    small = Tiles(TILES.dq, TILES.dq, TILES.dq)
    kept_tiles.keep("triton", AMPERE, "bfloat16", 128, TILES)
    kept_tiles.keep("triton", AMPERE, "float32", 64, small)
    assert (find(), find(dtype="float32", head_size=64, v_head_size=64)) == (TILES, small)
    assert find("NVIDIA H200") is find(dtype="float16") is find(head_size=64) is None
    assert kept_tiles.find("mosaic", AMPERE, "bfloat16", 128, 128) is None
    for owner, name, value in (
        (jax, "process_count", lambda: 2),
        (user_cache, "is_here", lambda kind: False),
        (user_cache, "sources", lambda: "others"),
    ):
        kept_tiles._kept.cache_clear()
        assert find() == TILES
        kept_tiles._kept.cache_clear()
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            assert find() is None
    kept_tiles._kept.cache_clear()
    monkeypatch.setenv(kept_tiles.VARIABLE, "off")
    assert find() is None


WHOLE = {"block_q": 64, "block_k": 64, "warps": 8, "stages": 2}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"bfloat16 with head size 128": [64, 64, 8, 2]},
        {"bfloat16 with head size 128": {"forward": WHOLE, "dq": WHOLE}},
        *(
            {"bfloat16 with head size 128": {"forward": WHOLE, "dq": WHOLE, "dkv": WHOLE | wrong}}
            for wrong in (
                {"block_k": 48},
                {"warps": "8"},
                {"stages": 0},
                {"block_q": 2**20},
                {"x": 1},
            )
        ),
        "no JSON",
        "no object",
        "a folder",
    ],
)
def test_a_wrong_file_is_ignored_and_said_how_to_remove(cache, caplog, entry):
    cache.mkdir()
    path = cache / "tiles.json"
    texts = {"no JSON": '{"triton', "no object": "[1]"}
    if entry == "a folder":
        path.mkdir()
    else:
        whole = json.dumps({user_cache.key("triton", AMPERE): entry})
        path.write_text(texts.get(entry, whole) if isinstance(entry, str) else whole)
    assert find() is find() is None
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"rm '{path}'" in record.getMessage()
    if entry != "a folder":
        assert kept_tiles.keep("triton", AMPERE, "bfloat16", 128, TILES)
        kept_tiles._kept.cache_clear()
        assert find() == TILES
