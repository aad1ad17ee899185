"""The README: its example runs, its output is the quickstart's; tables and map of docs/ are the code's."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import hcp_jax
from hcp_jax import support
from hcp_jax.cost.traffic import EXCHANGE_HEADS, total
from hcp_jax.train import config
from hcp_jax.train.metrics import traffic

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.slow
def test_the_example_runs_and_agrees_with_one_device():
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment = kept | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # of a CUDA plugin that finds no GPU
    assert "8 devices" in done.stdout
    assert "K/V ring over cp_outer (4)" in done.stdout
    assert 0 < float(done.stdout.split()[-1]) < 1e-4


@pytest.mark.slow
def test_the_table_of_what_is_supported_is_what_the_code_answers():
    page = (ROOT / "docs" / "comm-types.md").read_text()
    assert support.insert_table(page, support.markdown()) == page, (
        "run python -m hcp_jax.support docs/comm-types.md"
    )


def test_every_mask_of_the_face_is_in_the_table():
    made = {
        name
        for name in hcp_jax.__all__
        if getattr(getattr(hcp_jax, name), "__module__", "").endswith(".mask")
    }
    assert made - {"Mask"} <= set(support.MASKS)


def test_the_map_names_what_is_there_and_all_that_is_there():
    [house] = re.findall(r"```\n(hcp_jax/\n.*?)```", ARCHITECTURE, re.S)
    folder, missing = ROOT, []
    top = set()
    for line in house.splitlines():
        indent = len(line) - len(line.lstrip())
        name, *rest = line.split()
        parent = ROOT / "hcp_jax" if indent else ROOT
        top |= {name.rstrip("/")} if indent else set()
        folder = parent / name
        inside = re.findall(r"\w+(?:\.py\b|/)", " ".join(rest)) if name.endswith("/") else []
        missing += [str(p) for p in (folder, *(folder / n for n in inside)) if not p.exists()]
    assert not missing
    private = {"__init__.py", "__pycache__"}
    there = {p.name for p in (ROOT / "hcp_jax").iterdir()} - private
    assert there == top


def test_the_output_shown_is_of_the_quickstart():
    run = config.load(ROOT / "configs" / "quickstart.yaml")
    cp = run.parallel.context_parallel(run.model.num_layers)
    assert cp.describe() in README
    moved = traffic.layer_traffic(cp, run.model.specs[0].mixer, run.batch_size, run.seq_len)
    assert total(moved, (EXCHANGE_HEADS,), "forward") == 320 * 1024
    assert "heads 320 KiB forward, 320 KiB backward" in README
    assert f"step  {run.steps - 1}  loss" in README


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
