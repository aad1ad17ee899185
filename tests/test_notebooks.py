"""The notebooks run from top to bottom, and stand in the repository without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_it_holds_no_outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert [cell.outputs for cell in cells if cell.outputs] == []
    assert {cell.execution_count for cell in cells} == {None}


@pytest.mark.slow
def test_it_runs_and_draws(notebook, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    ran = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    kinds = {
        kind
        for cell in ran.cells
        for out in cell.get("outputs", [])
        for kind in out.get("data", ())
    }
    assert "image/png" in kinds
