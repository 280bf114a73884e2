"""The example in Python of docs/quickstart.md runs as it is written, but for the number of steps, and is as short as it is said to be."""

import re
from pathlib import Path

import pytest
import torch

import grafting
from grafting.hosts import hosts

PAGE = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text()
EXAMPLE = re.search(r"## In Python\n.*?```python\n(.*?)```", PAGE, flags=re.DOTALL).group(1)


def test_it_is_at_most_eight_lines_of_calls():
    verbs = ("load", "load_data", "build_operators", "distill", "place", "finetune", "save")
    calls = re.findall(rf"grafting\.({'|'.join(verbs)})\(", EXAMPLE)
    assert calls == ["load", "load_data", "build_operators", "distill", "place", "finetune", "save", "load"]


def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fewer = {
        "DistillConfig(steps=60, lr=2e-3)": "DistillConfig(steps=1, batch_size=4, holdout=8)",
        "steps=100, batch_size=64": "steps=1, batch_size=4",
    }
    for long in fewer:
        assert long in EXAMPLE
    names: dict = {}
    exec(re.sub("|".join(map(re.escape, fewer)), lambda found: fewer[found[0]], EXAMPLE), names)
    assert "r2/blocks.4.attn" in capsys.readouterr().out
    student, model = names["student"], names["model"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert grafting.plan_of(model) == grafting.plan_of(student)
    assert [edit.blocks for edit in grafting.plan_of(model).edits] == [(4, 5, 6, 7)]
    said = repr(names["graft"])
    assert len(said.splitlines()) <= 5
    for part in ("Graft of DiT, 4 places edited", "operator='window-2d'", "in operators", "in all (+0)"):
        assert part in said
    names["graft"].undo()
    assert grafting.plan_of(student) == grafting.Plan()


@pytest.mark.parametrize(
    "edits",
    [
        [{"role": "mlp", "blocks": [0, 2], "operator": {"name": "mlp", "ratio": 2.0}}],
        [{"edit": "merge", "blocks": "0-1"}, {"role": "attention", "blocks": [1], "operator": "softmax"}],
        [{"edit": "drop", "blocks": [1]}],
    ],
)
def test_a_plan_is_read_off_a_model_that_was_grafted_in_place(edits):
    plan = grafting.Plan.model_validate({"edits": edits})
    host, first, second = hosts()["dit"], hosts()["dit"].tiny(), hosts()["dit"].tiny()
    grafting.graft(first, plan)
    grafting.graft(second, grafting.plan_of(first))
    second.load_state_dict(first.state_dict())
    inputs = host.example(first, rows=8, cols=8, batch_size=2)
    with torch.no_grad():
        assert torch.equal(first.eval()(**inputs), second.eval()(**inputs))
