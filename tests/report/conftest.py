"""A whole run's folder, for every test of the report."""

from pathlib import Path

import pytest

from report.synthetic_run import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")
