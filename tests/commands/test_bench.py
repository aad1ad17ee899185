"""`hcp bench attention` on a CPU, where its figures mean nothing."""

import argparse
import dataclasses
import functools
import json
import types

import jax
import pytest

from hcp_jax.commands import bench
from hcp_jax.kernels import kept_tiles, self_check, user_cache
from hcp_jax.kernels.self_check import Finding
from hcp_jax.kernels.tiles import Tile, Tiles


def _run(tmp_path, *options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    small = "--length 64 --stream 64 --document 32 --heads 2 --kv-heads 2 --head-size 16"
    common = [*small.split(), "--dtype", "float32", "--repeats", "1", "--output", str(tmp_path)]
    assert bench.run(parser.parse_args(["attention", *common, *options])) == 0
    [path] = tmp_path.glob("*.json")
    assert path.with_suffix(".png").exists()
    return json.loads(path.read_text())["rows"]


def test_a_contestant_that_cannot_is_told_and_the_others_are_timed(tmp_path, capsys):
    names = ("xla", "cudnn", "mosaic")
    rows = _run(tmp_path, "--contestants", *names, "--masks", "causal", "packed")
    assert [(row["contestant"], row["mask"]) for row in rows] == [
        (name, mask) for mask in ("causal", "packed") for name in names
    ]
    assert rows[0]["forward_tflops"] > 0
    assert all(row["forward_tflops"] is None and row["note"] for row in rows[1:])
    assert "NotImplementedError" in capsys.readouterr().out


def test_flops_are_those_that_the_mask_asks_for(tmp_path):
    rows = _run(tmp_path, "--contestants", "blockwise")
    pairs = {"causal": 64**2 / 2, "full": 64**2, "packed": 2 * 32**2 / 2}
    assert len(rows) == 3
    for row in rows:
        assert row["forward_tflops"] is not None, row["note"]
        flops = row["forward_tflops"] * row["forward_seconds"] * 1e12
        assert flops == pytest.approx(2 * (16 + 16) * 2 * pairs[row["mask"]])


def test_a_stream_of_broken_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give a stream of whole documents"):
        _run(tmp_path, "--stream", "65")


def test_a_sweep_compiles_each_of_its_tiles(tmp_path, monkeypatch):
    """Once it timed one tile twenty times: the jit inside the op did not see that tiles changed."""
    compiled = []

    def trace(function, args, setting, gradients=False):
        heads = [args.heads, args.kv_heads, args.kv_heads, args.heads][: 3 + gradients]
        shapes = [jax.ShapeDtypeStruct((1, setting.length, n, 16), args.dtype) for n in heads]
        calls = _pallas_calls(function.trace(*shapes).jaxpr.jaxpr)
        compiled.append([_grid_and_schedule(call) for call in calls])
        return 1.0

    monkeypatch.setattr(bench, "_seconds", trace)
    rows = _run(tmp_path, "--sweep", "--masks", "causal", "--length", "512")
    assert not [row["note"] for row in rows if row["note"]]
    assert rows.pop(0)["contestant"] == "the table's"
    forward, both = compiled[2::2], compiled[3::2]
    for row, [alone], [out, dq, dkv] in zip(rows, forward, both, strict=True):
        blocks, warps, stages = row["contestant"].split(", ")
        block_q, block_k = map(int, blocks.split("×"))
        schedule = int(warps.split()[0]), int(stages.split()[0])
        # Blocks and heads may be in either order, whichever shares the work better.
        for (grid, *found), block in (
            (alone, block_q),
            (out, block_q),
            (dq, block_q),
            (dkv, block_k),
        ):
            assert (sorted(grid), *found) == (sorted((512 // block, 2, 1)), *schedule)
    assert len({tuple(kernels) for kernels in both}) == len(rows) == 20


def test_a_sweep_keeps_the_fastest_tiles_that_are_right(tmp_path, monkeypatch, capsys):
    """On a made-up GPU, with made-up times and findings."""
    kind = "NVIDIA A10"
    monkeypatch.setattr(
        jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", device_kind=kind)]
    )
    monkeypatch.setattr(user_cache, "cache_folder", lambda: tmp_path)
    args = argparse.Namespace(dtype="bfloat16", head_size=64)
    first, second, none = (Tiles(*[Tile(size, size, 4, 1)] * 3) for size in (16, 32, 64))

    def row(forward, backward):
        return bench.Row("", "causal", 64, forward, backward, None, None, "")

    timed = [
        (first, [row(1.0, 3.0), row(1.0, 3.0)]),
        (second, [row(0.5, 2.0), row(2.0, 2.0)]),
        (none, [row(0.1, 0.1), row(None, None)]),  # fails on a mask
    ]
    checked = []

    def findings(passed, implementation, **options):
        checked.append(options["tiles"])
        yield Finding("case", "dk", 0.0, 0.01, passed)

    monkeypatch.setattr(self_check, "findings", functools.partial(findings, False))
    bench._keep_fastest(args, timed)
    assert "dk of case is wrong" in capsys.readouterr().out
    assert not kept_tiles.path().exists()
    monkeypatch.setattr(self_check, "findings", functools.partial(findings, True))
    bench._keep_fastest(args, timed)
    best = Tiles(first.forward, second.dq, second.dkv)
    assert checked == [best, best]
    [(key, kept)] = json.loads(kept_tiles.path().read_text()).items()
    assert key == user_cache.key("triton", kind)
    assert kept == {"bfloat16 with head size 64": dataclasses.asdict(best)}
    bench._keep_fastest(args, timed[2:])
    assert "none computed every mask" in capsys.readouterr().out


def _grid_and_schedule(call):
    params = call.params["compiler_params"]
    params = params["triton"] if isinstance(params, dict) else params
    return call.params["grid_mapping"].grid, params.num_warps, params.num_stages


def _pallas_calls(jaxpr):
    """Yield the equations of `jaxpr` that are Pallas calls, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _pallas_calls(inner)
