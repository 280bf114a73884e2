"""A whole run's folder, for every test of the report."""

import shutil
from pathlib import Path

import pytest

from report.synthetic_run import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def bare_run(run_folder: Path) -> Path:
    """The same without images, which take the longest to write."""
    shutil.rmtree(run_folder / "samples")
    return run_folder
