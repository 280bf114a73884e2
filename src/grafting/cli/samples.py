"""Command that samples images from a model."""

import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from ._shared import Model, open_model, out, parse_shape
from .display import follow, say

if TYPE_CHECKING:
    from torch import nn

    from ..sampling.drawing import Drawing

app = typer.Typer()


@app.command()
def sample(
    model: Model,
    out_file: Annotated[
        Path,
        typer.Option(
            "--out", help="Output .npz file; a .png grid of the first 100 images is written beside it."
        ),
    ] = Path("samples.npz"),
    num: Annotated[int, typer.Option("--num", "--num-images", help="Number of images.")] = 16,
    sampler: Annotated[
        str, typer.Option(help="Sampler: dpm-solver++, ddpm or ddim (predicted noise), euler or heun (flow).")
    ] = "dpm-solver++",
    steps: Annotated[int, typer.Option(help="Sampling steps per image.")] = 20,
    cfg_scale: Annotated[float, typer.Option(help="Guidance scale (1 = off).")] = 1.0,
    negative: Annotated[
        int | None, typer.Option(help="Index of the condition to guide away from. [dim]Default: none.[/]")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of encoded prompts, for text-conditioned models.")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Shift of flow steps towards noise. [dim]Default: the model's.[/]")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="C,H,W", help="Shape of one sample. [dim]Default: the model's native shape.[/]"),
    ] = None,
    guided_channels: Annotated[
        int | None, typer.Option(help="Number of leading channels to guide (3 of 4 in DiT's protocol).")
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option(
            "--clip/--no-clip",
            help="Clip the predicted clean image at each step. [dim]Default: on for pixel-space diffusion models.[/]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; image i depends on (seed, i) and its label.")] = 0,
    labels: Annotated[
        str, typer.Option(help="Labels: balanced, random, or a list of classes such as 3,5.")
    ] = "balanced",
    batch_size: Annotated[int, typer.Option(help="Images per batch and per shard.")] = 64,
    precision: Annotated[
        str,
        typer.Option(
            help="Precision of the model and the autoencoder: fp32, bf16 or auto (bf16 if faster on this device)."
        ),
    ] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Autoencoder that decodes latents: a diffusers AutoencoderKL folder, or owner/name on the Hub."
        ),
    ] = None,
    vae_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the autoencoder on the Hub.")
    ] = None,
    vae_batch_size: Annotated[int, typer.Option(help="Latents decoded per batch.")] = 16,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in tiles to save memory on large images.")
    ] = False,
    png_folder: Annotated[
        Path | None,
        typer.Option("--png", metavar="FOLDER", help="Also write each image as a PNG file to this folder."),
    ] = None,
) -> None:
    """Sample images from a model into one .npz file: arr_0 [N, H, W, C] (uint8) and labels.

    Several processes share the work; the images do not depend on their number. An interrupted command can be run again
    to resume: finished batches stay in a folder beside the file until it is complete.

    [dim]$ grafting sample runs/quickstart --num 40 --labels 7,9[/]

    [dim]$ torchrun --nproc-per-node 8 -m grafting sample DiT-XL-2 --vae stabilityai/sd-vae-ft-ema --num-images 50000
      --sampler ddpm --steps 250 --cfg-scale 1.5 --guided-channels 3 --batch-size 125[/]
    """
    from ..data import Prompts
    from ..diffusion import Diffusion, FlowConfig
    from ..hosts import host_of
    from ..latents.decoding import VaeConfig, load_decoder, makes_pixels
    from ..machine.devices import default_device
    from ..machine.processes import is_main
    from ..sampling.chain import SamplingConfig, check_sampling
    from ..sampling.drawing import Drawing, describe_model, settled_as_drawn
    from ..weights.portable import settings_of

    settings = {
        "sampler": sampler,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "negative": negative,
        "shape": None if shape is None else parse_shape(shape),
        "guided_channels": guided_channels,
        "num_images": num,
        "batch_size": batch_size,
        "seed": seed,
        "labels": _parse_labels(labels),
        "precision": precision,
        "compile": compiled,
    }
    config = settled_as_drawn(
        SamplingConfig.model_validate(settings), out_file.with_suffix(".shards"), out_file
    )
    vae_settings = {"revision": vae_revision, "batch_size": vae_batch_size, "tiling": vae_tiling}
    vae_config = vae and VaeConfig.model_validate(
        {"source": vae, "precision": config.precision, **vae_settings}
    )
    if out_file.suffix != ".npz":
        raise DataError(f"--out names an .npz file, found {out_file}")
    loaded, plan = open_model(model)
    host = host_of(loaded)
    process = None if shift is None else FlowConfig(shift=shift).build(scale=host.time_scale)
    denoiser = host.denoiser(loaded, Prompts(prompts) if prompts else None, process)
    sampled = config.shape or host.shape(loaded)
    if faults := host.shape_faults(loaded, sampled):
        raise DataError(f"--shape: {faults[0]}")
    decoder = load_decoder(sampled, vae_config or None)
    # latents have no range to be clipped to, and flow no clean image
    clips = makes_pixels(sampled) and isinstance(denoiser.process, Diffusion)
    config = config.model_copy(update={"clip": clips if clip is None else clip})
    check_sampling(config, denoiser=denoiser, channels=sampled[0])
    drawing = Drawing(
        out_file.with_suffix(".shards"),
        config,
        denoiser=denoiser,
        shape=sampled,
        decoder=decoder.to(default_device()),
        identity={
            **describe_model(loaded, settings=[settings_of(loaded), plan.model_dump(mode="json")]),
            "grafting": version("grafting"),
            "torch": version("torch"),
        },
        pictures=png_folder,
    )
    if drawing.matches(out_file):
        if is_main():
            drawing.write_pictures_of(out_file)
            drawing.discard()
            say(out, f"{num} images: {out_file}, already drawn")
        return
    _draw(drawing, loaded.to(default_device()), out_file)


def _draw(drawing: "Drawing", model: "nn.Module", out_file: Path) -> None:
    """Draw this process's share and show progress; the main process then writes the samples file."""
    from ..machine.processes import is_main, rank, world_size
    from ..report import write_grid
    from ..sampling.files import open_samples

    steps = drawing.draw(model, rank=rank(), world_size=world_size())
    if not is_main():
        for _ in steps:
            pass
        return
    num_images, before, started = drawing.config.num_images, drawing.num_drawn, time.monotonic()
    if before:
        say(out, f"{before} of {num_images} images were already drawn")
    with follow(out) as on_step:
        for step in chain(steps, drawing.wait()):
            on_step("sample", step)
    seconds = time.monotonic() - started
    drawing.write(out_file)
    first = next(open_samples(out_file).images(100)).numpy()
    if first.ndim == 5:
        first = first[:, :, first.shape[2] // 2]  # of videos the frame in the middle
    places = [str(out_file)]
    if first.shape[1] in (1, 3):
        scale = 2 if first.shape[-1] <= 64 else 1
        places.append(str(write_grid(first, out_file.with_suffix(".png"), scale=scale)))
    if drawing.pictures is not None:
        places.append(str(drawing.pictures.folder))
    rate = (num_images - before) / seconds
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    say(out, f"{num_images} images: {', '.join(places)} ({rate:.3g} images/s{processes})")


def _parse_labels(text: str) -> str | list[int]:
    if text in ("balanced", "random"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--labels is balanced, random, or classes such as 3,5; found {text!r}") from None
