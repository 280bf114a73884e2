"""Benchmarks that the suite can run: those with toy geometries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_gpu_benchmark_of_toy_geometries_fills_every_row(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--device", "cpu", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    rows = json.loads(out.read_text())["rows"]
    assert {row["section"] for row in rows} == {
        "ceilings",
        "correctness",
        "operators",
        "forward",
        "stage 1",
        "stage 2",
        "sampling",
    }
    assert [row["name"] for row in rows if row["fault"]] == []
    assert all(row["ratio"] > 0 for row in rows if row["alternative"])


@pytest.mark.slow
def test_gpu_benchmark_asks_for_toys_where_there_is_no_accelerator():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--toy takes small ones" in done.stderr


@pytest.mark.slow
def test_benchmark_of_the_kernels_runs_at_toy_sizes():
    command = [sys.executable, str(BENCHMARKS / "gpu_kernels.py"), "--toy"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["name"].split()[0] for row in rows} == {
        "hyena-x",
        "hyena-se",
        "hyena-y",
        "window-1d",
        "window-2d",
    }
    assert all(row["error"] == 0 for row in rows), "plain against plain"
