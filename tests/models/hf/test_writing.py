"""Weights out: what was read is written bit for bit, in files of the size asked for."""

import json

import ml_dtypes
import numpy as np
import pytest

from hcp_jax.models.hf import config_json, loading, model_folder, writing
from tests.models.folders import CONFIG, make_folder, tensors_of


def write(folder, out, dtype, shard_bytes=60_000):
    stored = loading.check(CONFIG, folder)
    raw = config_json.raw_config(CONFIG, 512, dtype)
    out.mkdir()
    return writing.write_folder(
        out, CONFIG, raw, lambda slot: loading.read_slot(slot, stored[slot.name]), shard_bytes
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_round_trip_is_bit_equal(tmp_path, dtype):
    folder = make_folder(tmp_path / "in", dtype=dtype)
    write(folder, tmp_path / "out", np.dtype(dtype).name)
    assert tensors_of(tmp_path / "out") == tensors_of(folder)


def test_files_are_as_large_as_asked_and_the_index_says_where_tensors_are(tmp_path):
    folder = make_folder(tmp_path / "in")
    number = write(folder, tmp_path / "out", "bfloat16", 40_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i + 1:05}-of-{number:05}.safetensors" for i in range(number)
    ]
    assert number > 3
    assert all(f.stat().st_size < 40_000 + 5_000 for f in files)
    index = json.loads((tmp_path / "out" / model_folder.INDEX).read_text())
    assert index["weight_map"].keys() == {slot.name for slot in loading.slots(CONFIG)}
    held = sum(len(data) for _, _, data in tensors_of(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == held


def test_what_fits_one_file_has_no_index(tmp_path):
    folder = make_folder(tmp_path / "in")
    assert write(folder, tmp_path / "out", "float32", 10**9) == 1
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"config.json", model_folder.ONE_FILE}
