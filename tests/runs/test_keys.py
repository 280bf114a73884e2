"""What a recipe has wrong is refused with the nearest thing that it could have."""

from typing import Any

import pytest

from grafting.errors import RecipeError, did_you_mean
from grafting.runs.file import parse_recipe

RECIPE = {"name": "x", "data": {"name": "testbed-subset"}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distil": {}}, "distil: unknown key; did you mean 'distill'?"),
        ({"finetune": {"step": 3}}, "finetune.step: unknown key; did you mean 'steps'?"),
        ({"distill": {"gaurd": {}}}, "distill.gaurd: unknown key; did you mean 'guard'?"),
        ({"distill": {"guard": {"polcy": 1}}}, "distill.guard.polcy: unknown key; did you mean 'policy'?"),
        ({"data": {"name": "latents", "foldr": "x"}}, "data.foldr: unknown key; did you mean 'folder'?"),
        ({"data": {"name": "testbed-subst"}}, "did you mean 'testbed-subset'?"),
        ({"source": {"host": "dit", "confg": {}}}, "unknown key; did you mean 'config'?"),
        ({"rows": ["pretraind"]}, "found 'pretraind'; did you mean 'pretrained'?"),
        ({"plan": [{"role": "attn", "operator": "swa"}]}, "found 'attn'; did you mean 'attention'?"),
        ({"plan": [{"role": "mlp", "operator": "mpl"}]}, "no operator 'mpl'; did you mean 'mlp'?"),
        (
            {"plan": [{"role": "mlp", "block": 1, "operator": "mlp"}]},
            "plan.0.block: unknown key; did you mean 'blocks'?",
        ),
        ({"plan": [{"edit": "merge", "strat": "sum"}]}, "plan.0.strat: unknown key; did you mean 'start'?"),
        (
            {"plan": [{"role": "attention", "operator": {"name": "mamba2", "state_dimm": 3}}]},
            "plan.0.operator.state_dimm: unknown key; did you mean 'state_dim'?",
        ),
        ({"plan": [{"edit": "marge", "blocks": "all"}]}, "did you mean 'merge'?"),
        ({"zzz": 1}, "zzz: unknown key\n"),
    ],
)
def test_the_nearest_is_named(wrong: dict[str, Any], message: str):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE | wrong, source="here")
    assert message in f"{caught.value}\n"


def test_nothing_near_is_no_guess():
    assert did_you_mean("zzz", ["attention", "mlp"]) == ""
