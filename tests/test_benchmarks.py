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
        "mamba2",
        "mlp-hyena-x",
        "modulated",
        "window-1d",
        "window-2d",
        "linear",
    }
    assert all(row["error"] == 0 for row in rows), "plain against plain"


@pytest.mark.slow
def test_nothing_has_become_slower_on_a_cpu(tmp_path):
    """No ratio to an alternative is 15 % below the committed one; on a machine with other work the best of three counts."""
    committed = json.loads((BENCHMARKS / "results/cpu.json").read_text())["rows"]
    before = {(row["name"], row["alternative"]): row["ratio"] for row in committed}
    best = dict.fromkeys(before, 0.0)
    for attempt in range(3):
        out = tmp_path / f"{attempt}.json"
        command = [sys.executable, str(BENCHMARKS / "cpu.py"), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=3600)
        for row in json.loads(out.read_text())["rows"]:
            if row["device"] != committed[0]["device"]:
                pytest.skip(f"the committed ratios are of {committed[0]['device']}")
            key = row["name"], row["alternative"]
            best[key] = max(best[key], row["ratio"])
        if all(best[key] >= 0.85 * before[key] for key in before):
            return
    assert {key: (best[key], before[key]) for key in before if best[key] < 0.85 * before[key]} == {}
