"""`tools/compare_runs.py` finds what differs between two runs, and nothing where only times do."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parents[1] / "tools" / "compare_runs.py"
FIGURES = {"name": "finetuned", "frechet": 1.5, "ms_per_image": 3.0, "protocol": {"recorded": {"torch": "2"}}}
LINE = {"step": 1, "seconds": 0.5, "loss": 0.25, "images_per_s": 7.0}


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """Two runs that are equal but for measured times."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in ("distill", "model", "samples", "finetune/states/04"):
        (a / folder).mkdir(parents=True)
    weights = {"w": torch.tensor([1.0, float("nan"), 0.0, 4.0]), "n": torch.tensor(3)}
    save_file(weights, a / "distill" / "operators.safetensors")
    save_file(weights, a / "model" / "diffusion_pytorch_model.safetensors")
    images = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
    save_file({"images": images, "labels": torch.arange(4)}, a / "samples" / "finetuned.safetensors")
    save_file(weights, a / "finetune" / "states" / "04" / "state.safetensors")
    (a / "metrics.json").write_text(json.dumps([FIGURES]))
    (a / "distill" / "log.jsonl").write_text(json.dumps(LINE) + "\n")
    shutil.copytree(a, b)
    shutil.rmtree(b / "finetune")
    later = {"ms_per_image": 9.0, "protocol": {"recorded": {"torch": "3"}}}
    (b / "metrics.json").write_text(json.dumps([FIGURES | later]))
    (b / "distill" / "log.jsonl").write_text(json.dumps(LINE | {"seconds": 2.0, "images_per_s": 1.0}) + "\n")
    return a, b


def change(path: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(path) | tensors, path)


def test_equal_but_for_times(compare, runs, capsys):
    assert compare.report_differences(*runs) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["equal", name]
        for name in (
            "distill/log.jsonl",
            "distill/operators.safetensors",
            "metrics.json",
            "model/diffusion_pytorch_model.safetensors",
            "samples/finetuned.safetensors",
        )
    ]
    assert last == "5 files are equal"


def test_every_difference_is_told(compare, runs, capsys):
    _, b = runs
    model = b / "model" / "diffusion_pytorch_model.safetensors"
    change(b / "distill" / "operators.safetensors", w=torch.tensor([1.0, float("nan"), -0.0, 4.5]))
    change(model, n=torch.tensor(3.0), extra=torch.ones(1))
    change(b / "samples" / "finetuned.safetensors", labels=torch.tensor([0, 1, 2, 5]))
    (b / "metrics.json").write_text(json.dumps([FIGURES | {"frechet": 1.75}]))
    (b / "distill" / "log.jsonl").unlink()
    assert compare.report_differences(*runs) == 5
    printed = capsys.readouterr().out
    for line in (
        f"there is no {b / 'distill' / 'log.jsonl'}",
        "w: 2 of 4 elements, by 0.5 at most",
        "n: torch.int64 [] and torch.float32 []",
        "extra: in B alone",
        "labels: 1 of 4 elements, by 2 at most",
        "0.frechet: 1.5 and 1.75 (0.25 apart)",
        "5 of 5 files differ",
    ):
        assert line in printed


def test_exit_status(compare, runs, tmp_path, monkeypatch):
    def status(*folders: Path) -> int:
        monkeypatch.setattr("sys.argv", ["compare_runs.py", *map(str, folders)])
        return compare.main()

    a, b = runs
    assert status(a, b) == 0
    change(b / "samples" / "finetuned.safetensors", images=torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    assert status(a, b) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        status(a, tmp_path / "empty")
