"""The code of docs/my-pipeline.md, on tiny pipelines of the five families that it names."""

import re
from pathlib import Path

import pytest
import torch

from grafting.contract import Grid
from grafting.hosts import load_spec
from hosts import pipelines

PAGE = (Path(__file__).parents[1] / "docs" / "my-pipeline.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
FAMILIES = {
    "FLUX.1": pipelines.flux,
    "SD3.5": pipelines.sd3,
    "Wan": pipelines.wan,
    "Qwen-Image": pipelines.qwen_image,
    "PixArt-Sigma": pipelines.pixart,
}


def test_the_page_names_these_families():
    assert re.findall(r"^\| ([\w.\- ]+) \| `\"", PAGE, flags=re.MULTILINE) == list(FAMILIES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    ["FLUX.1", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "FLUX.1")],
)
def test_the_code_of_the_page_runs(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe, call = FAMILIES[family]()
    draw = {"num_inference_steps": 2, "output_type": "latent"}
    names = {"pipe": pipe, "call": call, "draw": draw, "torch": torch, "grid": Grid(64, 64)}
    for block in CODE:
        draw["generator"] = torch.Generator().manual_seed(0)
        exec(block, names)
    assert torch.equal(
        names["image"], pipe(**call, **draw | {"generator": torch.Generator().manual_seed(0)})[0]
    )
    assert load_spec("spec.yaml") == names["traced"].spec
    assert names["spec"].native_grid.rows == 64
