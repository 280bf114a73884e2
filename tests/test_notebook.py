"""The notebooks run from top to bottom, and show what they showed when they last ran.

`RENEW_NOTEBOOKS=1 pytest -m slow tests/test_notebook.py` writes the new outputs into `notebooks/`.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures_of(notebook):
    return [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


def renew(notebook, path):
    """Store a notebook with what it printed and drew, without times and what libraries warn of."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    stored = len(pictures_of(notebook))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    if os.environ.get("RENEW_NOTEBOOKS"):
        renew(notebook, path)
    else:
        assert len(pictures_of(notebook)) == stored
    assert (tmp_path / "grid.png").stat().st_size > 1000
    said = [line for output in outputs_of(notebook) for line in output.get("text", "").splitlines()]
    assert "the same images: True" in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 300_000
    assert len(pictures_of(notebook)) == 2
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not {output.output_type for output in outputs_of(notebook)} & {"error"}
    # no warning, no progress bar and no path of a machine
    assert not [o for o in outputs_of(notebook) if o.get("name") == "stderr"]
    assert "/site-packages/" not in path.read_text()
