"""The card says what is recorded, all of it and no more, and the Hub can read its header."""

import json

import pytest
import yaml

from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.hosts import hosts
from grafting.weights.card import model_card
from grafting.weights.folder import load_model, save_delta, save_model
from grafting.weights.portable import Base

PLAN = Plan(
    edits=(
        Replace(role="attention", blocks="odd", operator={"name": "hyena-x", "kernel_size": 3}),
        Replace(role="mlp", blocks=[0, 2], operator={"name": "mlp", "ratio": 2.0}),
    )
)


@pytest.fixture
def model():
    model = hosts()["dit"].tiny()
    graft(model, PLAN)
    return model


def _card(folder):
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


def test_every_saved_graft_gets_a_card(model, tmp_path):
    save_model(tmp_path / "mine", model, PLAN)
    header, body = _card(tmp_path / "mine")
    assert header == {"library_name": "grafting", "tags": ["grafting", "diffusion", "transformer"]}
    assert "# mine\n" in body
    assert (
        "| replace | attention | odd | hyena-x (version 1) | init: inherit, kernel_size: 3, geometry: centred |"
        in body
    )
    assert "| replace | mlp | [0, 2] | mlp (version 1) | init: inherit, ratio: 2.0 |" in body
    assert "## Base\n\nNot recorded." in body
    assert "grafting.load(" in body
    assert "## Figures" not in body
    assert "## Recipe" not in body


def test_a_model_without_a_graft_gets_none(tmp_path):
    save_model(tmp_path, hosts()["dit"].tiny(), Plan())
    assert not (tmp_path / "README.md").exists()


def test_the_base_is_named(model, tmp_path):
    base = Base(id="facebook/DiT-XL-2-256", revision="eab87f7", licence="CC-BY-NC-4.0")
    save_model(tmp_path, model, PLAN, base=base)
    header, body = _card(tmp_path)
    assert (header["base_model"], header["license"]) == ("facebook/DiT-XL-2-256", "cc-by-nc-4.0")
    assert "facebook/DiT-XL-2-256, revision `eab87f7`, licence of its weights: CC-BY-NC-4.0." in body


def test_a_delta_says_that_it_needs_its_base(tmp_path):
    save_model(tmp_path / "base", hosts()["dit"].tiny(), Plan())
    model, _ = load_model(tmp_path / "base")
    graft(model, PLAN)
    save_delta(tmp_path / "delta", model, PLAN, Base(id=str(tmp_path / "base")))
    header, body = _card(tmp_path / "delta")
    assert "base_model" not in header  # a folder is no address
    assert "This is a delta: its base is loaded too, and checked." in body
    assert "its licence is not recorded." in body


def test_figures_stand_with_their_protocols(model, tmp_path):
    save_model(tmp_path, model, PLAN)
    config = json.loads((tmp_path / "config.json").read_text())
    rows = [
        {"name": "pretrained", "frechet": 0.2, "agreement": 0.9, "protocol": {"num_images": 2000}},
        {"name": "finetuned", "frechet": 0.25, "protocol": {"num_images": 2000, "recorded": {"torch": "2"}}},
        {"name": "elsewhere", "frechet": 0.123456, "protocol": {"num_images": 50, "sampling": {"steps": 8}}},
    ]
    card = model_card(config, name="x", metrics=rows, recipe="name: x\n")
    assert "| model | Fréchet distance | Agreement |" in card
    assert "| pretrained | 0.2 | 0.9 |" in card
    assert "| finetuned | 0.25 |  |" in card
    assert "| elsewhere | 0.1235 |  |" in card
    assert (
        "Measured so (pretrained, finetuned):\n\n| protocol |  |\n| --- | --- |\n| num_images | 2000 |"
        in card
    )
    assert "Measured so (elsewhere):" in card
    assert '| sampling | {"steps": 8} |' in card
    assert "recorded" not in card.split("## Figures")[1].split("## Recipe")[0]
    assert "```yaml\nname: x\n```" in card


def test_a_recipe_does_not_leave_its_fence(model, tmp_path):
    recipe = "name: x\ndescription: |\n  ```\n  # Mine\n  ````html\n  <img src=x>\n"
    config = {"_class_name": "GraftedDiT", "grafting": {"plan": {"edits": []}, "base": None}}
    card = model_card(config, name="x", recipe=recipe)
    assert card.endswith(f"## Recipe\n\n`````yaml\n{recipe}`````\n")


def test_names_in_a_card_are_text(model, tmp_path):
    base = Base(id="a|b\n# not a heading <script>", revision=None, licence="![free](http://x)")
    save_model(tmp_path, model, PLAN, base=base)
    _, body = _card(tmp_path)
    assert "a\\|b # not a heading &lt;script>, licence of its weights: ![free]\\(http://x)." in body
    row = {"name": "a | b\nc", "frechet": 0.2, "protocol": {"key|": "<b>"}}
    config = json.loads((tmp_path / "config.json").read_text())
    card = model_card(config, name="x\n# y", metrics=[row])
    assert "\n# x # y\n" in card
    assert "| a \\| b c | 0.2 |" in card
    assert "| key\\| | &lt;b> |" in card
