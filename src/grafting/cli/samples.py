"""Command that samples images from a model."""

import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from ._shared import Model, Process, PromptsFolder, Shift, Spec, open_denoiser, open_model, out
from .display import fills, say, take
from .options import Options, command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from ..contract import Denoiser
    from ..latents.decoding import VaeConfig
    from ..sampling.chain import SamplingConfig
    from ..sampling.drawing import Drawing

app = typer.Typer()


def _sampling() -> Options:
    from ..sampling.chain import SamplingConfig

    return Options(
        config=SamplingConfig,
        title="Sampling",
        own={
            "num_images": {"names": ("--num", "--num-images"), "default": 16},
            "sampler": {"default": "dpm-solver++"},
            "steps": {"default": 20},
            "cfg_scale": {"default": 1.0},
            "shape": {"metavar": "C,H,W"},
            "batch_size": {"help": "Images per batch and per shard."},
            "precision": {
                "help": "Precision of the model and the autoencoder: fp32, bf16 or auto (bf16 where it is faster)."
            },
            "clip": {
                "default": None,
                "help": "Clip the predicted clean image at each step. [dim]Default: on for pixel-space diffusion models.[/]",
            },
        },
    )


def _vae() -> Options:
    from ..latents.decoding import VaeConfig

    return Options(
        config=VaeConfig,
        title="Autoencoder",
        prefix="vae-",
        own={"source": {"names": ("--vae",)}},
        without=frozenset({"precision"}),
    )


@command(app, sampling=_sampling, vae=_vae)
def sample(
    model: Model,
    sampling: "SamplingConfig",
    vae: "VaeConfig | None",
    out_file: Annotated[
        Path,
        typer.Option(
            "--out", help="Output .npz file; a .png grid of the first 100 images is written beside it."
        ),
    ] = Path("samples.npz"),
    png_folder: Annotated[
        Path | None,
        typer.Option("--png", metavar="FOLDER", help="Also write each image as a PNG file to this folder."),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write latents to this folder in the place of images, as data to train grafts of the model on.",
        ),
    ] = None,
    prompts: PromptsFolder = None,
    process: Process = None,
    shift: Shift = None,
    spec: Spec = None,
) -> None:
    """Sample images from a model into one .npz file.

    The file holds arr_0 [N, H, W, C] (uint8) and labels. Several processes share the work; the images do not depend on their number. An interrupted command can be run again
    to resume: finished batches stay in a folder beside the file until it is complete.

    [dim]$ grafting sample runs/quickstart --num 40 --labels 7,9[/]

    [dim]$ grafting sample scenes --num 60 --cfg-scale 3[/]

    [dim]$ grafting sample ./pixart --prompts ./prompts --num 8000 --latents ./made[/]

    [dim]$ torchrun --nproc-per-node 8 -m grafting sample DiT-XL-2 \\
      --vae stabilityai/sd-vae-ft-ema --num-images 50000 --batch-size 125 \\
      --sampler ddpm --steps 250 --cfg-scale 1.5 --guided-channels 3[/]
    """
    from ..diffusion import Diffusion
    from ..hosts import host_of
    from ..latents.decoding import load_decoder, makes_pixels
    from ..machine.devices import default_device
    from ..machine.processes import is_main
    from ..sampling.chain import check_sampling
    from ..sampling.drawing import Drawing, describe_model, settled_as_drawn
    from ..weights.portable import settings_of

    asks_clip = "clip" in sampling.model_fields_set
    config = settled_as_drawn(sampling, out_file.with_suffix(".shards"), out_file)
    if out_file.suffix != ".npz":
        raise DataError(f"--out names an .npz file, found {out_file}")
    loaded, plan = open_model(model)
    host = host_of(loaded)
    denoiser = open_denoiser(model, loaded, prompts=prompts, process=process, shift=shift)
    sampled = config.shape or host.shape(loaded)
    if faults := host.shape_faults(loaded, sampled):
        raise DataError(f"--shape: {faults[0]}")
    identity = {
        **describe_model(loaded, settings=[settings_of(loaded), plan.model_dump(mode="json")]),
        "grafting": version("grafting"),
        "torch": version("torch"),
    }
    if latents is not None:
        check_sampling(config, denoiser=denoiser, channels=sampled[0])
        _teach(model, loaded, config, latents, denoiser=denoiser, shape=sampled, identity=identity)
        return
    decoder = load_decoder(sampled, vae and vae.model_copy(update={"precision": config.precision}))
    if not asks_clip:
        # latents have no range to be clipped to, and flow no clean image
        clips = makes_pixels(sampled) and isinstance(denoiser.process, Diffusion)
        config = config.model_copy(update={"clip": clips})
    check_sampling(config, denoiser=denoiser, channels=sampled[0])
    drawing = Drawing(
        out_file.with_suffix(".shards"),
        config,
        denoiser=denoiser,
        shape=sampled,
        decoder=decoder.to(default_device()),
        identity=identity,
        pictures=png_folder,
    )
    if drawing.matches(out_file):
        if is_main():
            _say_drawn_before(drawing, out_file)
        return
    _draw(drawing, loaded.to(default_device()), out_file)


def _teach(
    name: str,
    model: "nn.Module",
    config: "SamplingConfig",
    folder: Path,
    *,
    denoiser: "Denoiser",
    shape: tuple[int, ...],
    identity: "Mapping[str, object]",
) -> None:
    """Draw this process's share of latents and show progress."""
    from ..data.latents import INDEX_NAME
    from ..machine.devices import default_device
    from ..machine.processes import share
    from ..sampling.taught import teach

    steps = teach(
        model.to(default_device()),
        config,
        folder,
        denoiser=denoiser,
        shape=shape,
        identity=identity,
        source=f"made by {name}",
        share=share(),
    )
    if fills("sample", steps, index=folder / INDEX_NAME):
        say(
            out,
            f"{config.num_images} latents: {folder}; name them in a recipe: data: {{name: latents, folder: {folder}}}",
        )


def _draw(drawing: "Drawing", model: "nn.Module", out_file: Path) -> None:
    """Draw this process's share and show progress; the main process then writes the samples file."""
    from ..machine.processes import is_main, share, world_size

    steps = drawing.draw(model, share())
    num_images, before, started = drawing.config.num_images, drawing.num_drawn, time.monotonic()
    if before:
        say(out, f"{before} of {num_images} images were already drawn")
    take("sample", chain(steps, drawing.wait()) if is_main() else steps)
    if not is_main():
        return
    seconds = time.monotonic() - started
    if not drawing.is_begun and drawing.matches(out_file):
        _say_drawn_before(drawing, out_file)  # by another command, meanwhile
        return
    drawing.write(out_file)
    places = [str(out_file), *_grid(out_file)]
    if drawing.pictures is not None:
        places.append(str(drawing.pictures.folder))
    rate = (num_images - before) / seconds
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    say(out, f"{num_images} images: {', '.join(places)} ({rate:.3g} images/s{processes})")


def _say_drawn_before(drawing: "Drawing", out_file: Path) -> None:
    """Do what a command that was killed has left to do."""
    from ..machine.files import clear_partial

    clear_partial(out_file)
    drawing.write_pictures_of(out_file)
    drawing.discard()
    _grid(out_file)
    say(out, f"{drawing.config.num_images} images: {out_file}, already drawn")


def _grid(out_file: Path) -> list[str]:
    """Write a picture of the first images beside their file, if they can be shown; its path."""
    from ..report import write_grid
    from ..sampling.files import open_samples

    path = out_file.with_suffix(".png")
    first = next(open_samples(out_file).images(100)).numpy()
    if first.ndim == 5:
        first = first[:, :, first.shape[2] // 2]  # of videos the frame in the middle
    if first.shape[1] not in (1, 3):
        return []
    return [str(write_grid(first, path, scale=2 if first.shape[-1] <= 64 else 1))]
