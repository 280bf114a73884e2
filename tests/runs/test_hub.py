"""Uploads, with a stub in place of the Hub: what is checked before, what is sent, and what a refusal looks like."""

import json

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import CheckpointError, RunError
from grafting.hosts import hosts
from grafting.runs.hub import push_to_hub
from grafting.weights.folder import save_model
from grafting.weights.locate import GRAFTED_NAME

PLAN = Plan(edits=(Replace(role="attention", blocks="odd", operator="hyena-x"),))


class StubHub:
    """Keeps what it was asked for, and what the folder's matching files held at that time."""

    def __init__(self):
        self.repos, self.uploads = [], []

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.repos.append((repo_id, private))

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        self.uploads.append((repo_id, folder_path, commit_message, allow_patterns))


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose model is grafted."""
    model = hosts()["dit"].tiny()
    graft(model, PLAN)
    save_model(tmp_path / "my-run" / "model", model, PLAN)
    (tmp_path / "my-run" / "manifest.json").write_text('{"recipe": ""}')
    (tmp_path / "my-run" / "recipe.yaml").write_text("name: my-run\nsource: testbed\n")
    figures = {"name": "finetuned", "frechet": 0.25, "protocol": {"num_images": 2000}}
    (tmp_path / "my-run" / "metrics.json").write_text(json.dumps([figures]))
    return tmp_path / "my-run"


def test_a_checked_folder_is_uploaded_with_its_card(run):
    hub = StubHub()
    assert push_to_hub(run / "model", "me/mine", api=hub) == "https://huggingface.co/me/mine"
    assert hub.repos == [("me/mine", True)]
    ((repo, folder, message, patterns),) = hub.uploads
    assert (repo, folder, message) == ("me/mine", str(run / "model"), "Upload a grafted model")
    assert {"config.json", "README.md", "*.safetensors"} <= set(patterns)
    card = (run / "model" / "README.md").read_text()
    assert "# my-run" in card
    assert "| finetuned | 0.25 |" in card
    assert "name: my-run\nsource: testbed" in card


def test_a_public_repository_is_asked_for(run):
    hub = StubHub()
    push_to_hub(run / "model", "me/mine", private=False, message="First", api=hub)
    assert hub.repos == [("me/mine", False)]
    assert hub.uploads[0][2] == "First"


def test_a_damaged_folder_is_not_uploaded(run):
    weights = run / "model" / GRAFTED_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    hub = StubHub()
    with pytest.raises(CheckpointError, match="is not the file that config.json describes"):
        push_to_hub(run / "model", "me/mine", api=hub)
    assert hub.repos == hub.uploads == []


def test_a_model_without_a_plan_is_not_uploaded(tmp_path):
    save_model(tmp_path, hosts()["dit"].tiny(), Plan())
    with pytest.raises(CheckpointError, match="has no plan: only grafted models are uploaded"):
        push_to_hub(tmp_path, "me/mine", api=StubHub())


@pytest.mark.parametrize("name", ["me", "me/", "https://huggingface.co/me/mine"])
def test_a_name_that_the_hub_does_not_take_is_refused_before_any_work(tmp_path, name):
    hub = StubHub()
    with pytest.raises(RunError, match="cannot upload .* is named owner/name"):
        push_to_hub(tmp_path / "missing", name, api=hub)
    assert hub.repos == hub.uploads == []


def test_a_refusal_of_the_hub_is_one_message(run, monkeypatch):
    hub = StubHub()

    def refuse(repo_id, **_):
        raise HFValidationError("Cannot have -- or .. in repo_id")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(RunError, match="cannot upload .*model to me/my--model: Cannot have"):
        push_to_hub(run / "model", "me/my--model", api=hub)


def test_a_hub_that_is_not_reached_is_one_message(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = HfApi(endpoint="http://127.0.0.1:1", token="none")  # nobody listens there
    with pytest.raises(RunError, match="cannot upload .*model to me/mine: .*refused"):
        push_to_hub(run / "model", "me/mine", api=api)
