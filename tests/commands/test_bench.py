"""`hcp bench attention` on a CPU, where its figures mean nothing."""

import argparse
import json

import pytest

from hcp_jax.commands import bench


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
