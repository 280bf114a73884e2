"""Makes what lies beside this file: folders and files as the library wrote them at commit c516de7, for `tests/test_before.py`.

    git worktree add ../c516de7 c516de7
    PYTHONPATH=../c516de7/src OMP_NUM_THREADS=1 python tests/golden/before/make.py made

Writes a new folder, with copies of the recipes beside this file. One thread, no accelerator, half a minute. Everything is drawn from fixed seeds, so on a
like machine a second run gives the same tensors and images; measured times differ. It is run at that commit alone: these files
stand for what users have, and later code must read them as they are.
"""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from grafting import (
    Base,
    OperatorStore,
    Plan,
    Replace,
    graft,
    load_model,
    load_recipe,
    run,
    save_delta,
    save_model,
    with_plan,
)
from grafting.cli import app
from grafting.data.bundled import bundled_subset
from grafting.hosts import hosts
from grafting.models import DiT

# every kind of operator that fits a model of two blocks; what they are made of is in tests/operators
GRAFT = Plan(
    edits=(
        Replace(role="attention", blocks=[0], operator={"name": "window-2d", "radius": 1}),
        Replace(role="attention", blocks=[1], operator="linear"),
        Replace(role="mlp", blocks=[0], operator={"name": "mlp", "ratio": 3}),
        Replace(role="mlp", blocks=[1], operator="mlp-hyena-x"),
    )
)
PIPELINE = Plan(
    edits=(
        Replace(role="attention", blocks=[1], operator="hyena-x"),
        Replace(role="mlp", blocks=[0], operator={"name": "mlp", "ratio": 2}),
    )
)


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir()
    for recipe in Path(__file__).parent.glob("*.yaml"):
        shutil.copy(recipe, out)
    # recipes, runs and models name each other by paths in this folder
    os.chdir(out)
    torch.set_num_threads(1)
    # a run's folder says on which machine it was made
    with (
        mock.patch("platform.node", return_value="golden"),
        mock.patch("platform.processor", return_value="cpu"),
    ):
        make_source()
        make_runs()
        outputs = make_models() | make_pipeline() | make_latents()
        grafting("sample", "source", "--num", 12, "--batch-size", 4, "--steps", 3, "--out", "samples.npz")
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, "outputs.safetensors")
    # pictures, pages, and which process held a folder: nothing reads them again
    for path in (Path("samples.png"), Path("run-finished/report.html"), *Path().rglob(".lock*")):
        path.unlink()


def make_source() -> None:
    model = DiT(
        input_size=32, patch_size=8, in_channels=1, hidden_size=8, depth=2, num_heads=2, num_classes=10
    )
    save_model("source", randomised(model, seed=1), Plan())


def make_runs() -> None:
    """One recipe, four times: killed in stage 1, in stage 2 and while sampling, and finished. And a store of its operators."""
    run_and_kill("distill", stage="distill", done=5)
    run_and_kill("finetune", stage="finetune", done=5)
    run_and_kill("sample", stage="sample finetuned", done=8)
    recipe = load_recipe("recipe.yaml")
    run(recipe, "run-finished")
    run(recipe, "thrown-away", until="distill", store=OperatorStore(Path("store")))
    shutil.rmtree("thrown-away")


def run_and_kill(folder: str, *, stage: str, done: int) -> None:
    """Carries out the recipe in a process of its own until it is killed after a step."""

    def kill(name: str, step: object) -> None:
        if (name, step.done) == (stage, done):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=run, args=(load_recipe("recipe.yaml"), f"run-{folder}"), kwargs={"on_step": kill}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def make_models() -> dict[str, Tensor]:
    """A full graft of several operators and a delta; what they compute, and of what."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 1, 32, 32, generator=generator), torch.tensor([10, 900]), torch.tensor([3, 10])
    full, _ = load_model("source")
    graft(full, GRAFT)
    save_model("graft", randomised(full, seed=2), GRAFT, base=Base(id="source"))
    # of the other graft only what its operators add is new
    delta, _ = load_model("source")
    graft(delta, recipe_plan())
    save_delta("delta", delta, recipe_plan(), Base(id="source"))
    with torch.no_grad():
        outputs = {"graft": full.eval()(*inputs), "delta": delta.eval()(*inputs)}
    return dict(zip(("x", "t", "y"), inputs, strict=True)) | outputs


def recipe_plan() -> Plan:
    return load_recipe("recipe.yaml").edits


def make_pipeline() -> dict[str, Tensor]:
    """A grafted PixArt in a pipeline of diffusers, and an image that it draws."""
    model = hosts()["pixart"].model_class(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
        attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
    )  # fmt: skip
    graft(model.eval(), PIPELINE)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "latent_channels": 4, "norm_num_groups": 2, "sample_size": 16}
    vae = AutoencoderKL(**blocks, **sizes, layers_per_block=1)
    pipeline = PixArtSigmaPipeline(
        vae=randomised(vae, seed=5),
        transformer=with_plan(randomised(model, seed=6), PIPELINE),
        scheduler=DDIMScheduler(),
        tokenizer=None,
        text_encoder=None,
    )
    pipeline.save_pretrained("pipeline")
    return {"pipeline": draw(pipeline)}


def draw(pipeline: PixArtSigmaPipeline) -> Tensor:
    """As `tests/test_before.py` draws it."""
    generator = torch.Generator().manual_seed(7)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=torch.randn(1, 5, 8, generator=generator),
        prompt_attention_mask=torch.ones(1, 5),
        negative_prompt=None,
        negative_prompt_embeds=torch.randn(1, 5, 8, generator=generator),
        negative_prompt_attention_mask=torch.ones(1, 5),
        num_inference_steps=2,
        height=16,
        width=16,
        use_resolution_binning=False,
        generator=generator,
        output_type="pt",
    ).images


def make_latents() -> dict[str, Tensor]:
    """Six images as files, and their latents in two shards, by the pipeline's autoencoder."""
    images = bundled_subset()
    for label, name in ((3, "Dress"), (4, "Coat")):
        Path("images", name).mkdir(parents=True)
        for number, where in enumerate((images.labels == label).nonzero().flatten()[:3].tolist()):
            Image.fromarray(images.images[where, 0].numpy()).save(f"images/{name}/{number}.png")
    options = ["--images", "images", "--name", "two-classes", "--vae", "pipeline/vae", "--size", 16]
    grafting("data", "latents", "latents", *options, "--shard-size", 4, "--batch-size", 2, "--workers", 1)
    x, y = load_recipe("latents.yaml").data.load().batch(torch.arange(6))
    return {"latents.x": x, "latents.y": y}


def grafting(*arguments: object) -> None:
    """A command, as it is typed."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def randomised(model: nn.Module, *, seed: int) -> nn.Module:
    """The model with other weights where it is trained: fresh ones make nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


if __name__ == "__main__":
    main()
