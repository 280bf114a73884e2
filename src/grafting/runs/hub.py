"""Uploads of model folders to the Hugging Face Hub, checked first, with their card."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from huggingface_hub import HfApi

from ..errors import CheckpointError, RunError
from ..machine.huberrors import HUB_ERRORS
from ..machine.reading import reason_of
from ..weights.adapter import ADAPTER_CONFIG_NAME
from ..weights.card import CARD_NAME
from ..weights.folder import load_model
from ..weights.locate import CONFIG_NAME, HUB_NAME
from .card import write_model_card

# what a folder may hold besides is not uploaded
UPLOADED = [CONFIG_NAME, ADAPTER_CONFIG_NAME, CARD_NAME, "*.safetensors", "*.safetensors.index.json"]


@runtime_checkable
class Hub(Protocol):
    """The part of `huggingface_hub.HfApi` that an upload needs."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object: ...

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, allow_patterns: list[str]
    ) -> object: ...


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    message: str = "Upload a grafted model",
    api: Hub | None = None,
) -> str:
    """Upload a grafted model's folder to `owner/name` on the Hub, and return its address.

    The folder is loaded first, and its card is rewritten, with the figures and recipe of the run that it belongs to. A
    repository that does not exist is made, private if not asked otherwise.

    Raises:
        CheckpointError: the folder is damaged, or its model is not grafted.
        RunError: `repo_id` is no `owner/name`, or the Hub refuses or is not reached.
    """
    folder = Path(folder)
    if not HUB_NAME.fullmatch(repo_id):
        raise RunError(f"cannot upload {folder} to {repo_id!r}: a repository of the Hub is named owner/name")
    _, plan = load_model(folder)
    if not plan.edits:
        raise CheckpointError(f"the model in {folder} has no plan: only grafted models are uploaded")
    write_model_card(folder)
    hub: Hub = HfApi() if api is None else api
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id, folder_path=str(folder), commit_message=message, allow_patterns=UPLOADED
        )
    except HUB_ERRORS as error:
        raise RunError(f"cannot upload {folder} to {repo_id}: {reason_of(error)}") from error
    return f"https://huggingface.co/{repo_id}"
