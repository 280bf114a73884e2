"""What docs/text-to-image.md shows runs as it is written."""

import re
from pathlib import Path

import torch
from typer.testing import CliRunner

import grafting
from grafting.cli import app
from grafting.hosts import hosts

PAGE = (Path(__file__).parents[1] / "docs" / "text-to-image.md").read_text()


def test_prompts_latents_and_recipe_of_a_text_to_image_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = hosts()["pixart"].tiny()
    model.save_pretrained("transformer")
    captions = ["a ring", "two crosses", "a red bar"]

    def encode(words: str) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(len(words))
        return torch.randn(4, model.config.caption_channels, generator=draw), torch.ones(4)

    shape = hosts()["pixart"].shape(model)
    names = {
        "captions": captions,
        "encode": encode,
        "batches": [(torch.randn(600, *shape), torch.arange(600) % 3)],
    }
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    prompts = grafting.Prompts("prompts")
    assert (len(prompts), prompts.words(1), prompts.dropout) == (3, "two crosses", 0.1)
    assert prompts.nulls(torch.tensor([0, 2])).tolist() == [3, 3]
    Path("recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    result = CliRunner().invoke(app, ["check", "recipe.yaml"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "1 of 4 sites are edited" in result.stdout
    assert "The recipe is valid." in result.stdout
