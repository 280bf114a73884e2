"""Presets are the paper's designs: which operators they are, that nothing is inherited, and how they are asked for."""

import jsonschema
import pytest

from grafting.contract import Grid, Site
from grafting.editing.plan import Plan
from grafting.operators import PRESETS, operator_configs, parse_operator
from grafting.operators.hyena import HyenaXConfig
from grafting.operators.mlp import MLPConfig
from grafting.operators.mlp_hyena import MLPHyenaXConfig
from grafting.operators.softmax import SoftmaxConfig
from grafting.operators.window import Window1dConfig

every_preset = pytest.mark.parametrize("name", PRESETS)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("swa", Window1dConfig(window=4, projections="random")),
        ("self-graft", SoftmaxConfig(projections="random")),
        ("mlp-r3", MLPConfig(ratio=3, init="random")),
        ("hyena-x-published", HyenaXConfig(kernel_size=4, geometry="causal", init="random")),
        ("mlp-hyena-x-published", MLPHyenaXConfig(kernel_size=4, filters="per-token", init="random")),
    ],
)
def test_what_a_preset_stands_for(name, config):
    assert parse_operator(name) == config


@every_preset
def test_nothing_is_taken_from_the_host(name):
    config = parse_operator(name)
    assert config.randomised() == config


@every_preset
def test_it_stands_in_the_published_model(name):
    config = parse_operator(name)
    role, facts = ("mlp", {"hidden_dim": 4608}) if "mlp" in config.roles else ("attention", {"num_heads": 16})
    assert config.faults(Site(role=role, block=0, path="part", dim=1152, grid=Grid(16, 16), **facts)) == []


@every_preset
def test_what_is_written_down_is_the_operator(name):
    """A run's files hold all settings, so they mean the same when a preset changes."""
    config = parse_operator(name)
    assert config.name in operator_configs()
    assert parse_operator(config.model_dump(mode="json")) == config


def test_no_preset_has_the_name_of_an_operator():
    assert not PRESETS.keys() & operator_configs().keys()


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(
        ValueError,
        match="no operator 'swaa'; did you mean 'swa'. there are .*window-3d, and the presets ",
    ):
        parse_operator("swaa")


def test_a_preset_takes_no_settings():
    with pytest.raises(
        ValueError, match="'swa' is a preset, which takes no settings: it stands for .*'window': 4"
    ):
        parse_operator({"name": "swa", "window": 8})


@every_preset
def test_editors_know_it(name):
    edit = {"edit": "replace", "role": "attention", "operator": name}
    validator = jsonschema.Draft202012Validator(Plan.model_json_schema())
    assert validator.is_valid({"edits": [edit]})
    assert not validator.is_valid({"edits": [edit | {"operator": f"{name}-2"}]})
