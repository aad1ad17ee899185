"""The notebooks run from top to bottom, and show small results of an earlier run."""

import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = "04_documents"
WITHOUT_PICTURES = ("03_your_flax_model", "07_extend_a_hugging_face_model")
NEEDS = {
    "05_a_million_tokens": ("jax_cuda13_plugin",),
    "07_extend_a_hugging_face_model": ("torch", "transformers"),
}
MOST_BYTES = 400_000  # a code host shows it at once


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_how_to_install_and_shows_small_results_without_errors(path):
    assert path.stat().st_size < MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    assert "pip install -e '.[notebooks" in notebook.cells[0].source
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert outputs
    assert [out for out in outputs if out.output_type == "error"] == []
    text = "".join(out.get("text", "") for out in outputs)
    assert "\x1b" not in text  # of a terminal
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", "".join(c.source for c in notebook.cells))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem == QUICK else pytest.mark.slow) for p in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_it_runs_and_draws(path, monkeypatch):
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(pathlib.Path(sys.executable).parent), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    ran = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    kinds = {
        kind
        for cell in ran.cells
        for out in cell.get("outputs", [])
        for kind in out.get("data", ())
    }
    assert ("image/png" in kinds) == (path.stem not in WITHOUT_PICTURES)
