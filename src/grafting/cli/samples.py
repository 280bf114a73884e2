"""Commands for images: draw them from a model, and measure them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..display import follow, say, show_evaluation
from ..errors import DataError, HostError
from ._shared import Json, Model, err, open_model, out, print_json

if TYPE_CHECKING:
    from torch import Tensor, nn

app = typer.Typer()


@app.command()
def sample(
    model: Model,
    out_file: Annotated[
        Path, typer.Option("--out", help="An .npz file; a .png of all lies beside it.")
    ] = Path("samples.npz"),
    num: Annotated[int, typer.Option(help="Images to draw.")] = 16,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim or dpm-solver++.")] = "dpm-solver++",
    steps: Annotated[int, typer.Option(help="Calls of the model an image.")] = 20,
    cfg_scale: Annotated[float, typer.Option(help="Guidance; 1 is none.")] = 1.0,
    clip: Annotated[bool, typer.Option(help="Clip the predicted clean image at each step.")] = True,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) and its label.")] = 0,
    labels: Annotated[str, typer.Option(help="balanced, random, or classes such as 3,5.")] = "balanced",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
) -> None:
    """Draw images from a model of pixels: arr_0 [N, H, W, C] of 8 bits and labels, in one .npz file.

    [dim]$ grafting sample runs/quickstart --num 40 --labels 7,9[/]
    """
    import torch

    from ..devices import default_device
    from ..hosts import host_of
    from ..report import write_grid
    from ..samples import origin_of, write_samples
    from ..sampling import SamplingConfig

    config = SamplingConfig.model_validate(
        {
            "sampler": sampler,
            "steps": steps,
            "cfg_scale": cfg_scale,
            "clip": clip,
            "num_images": num,
            "batch_size": batch_size,
            "seed": seed,
            "labels": _parse_labels(labels),
        }
    )
    if out_file.suffix != ".npz":
        raise DataError(f"--out names an .npz file, found {out_file}")
    loaded, _ = open_model(model)
    host = host_of(loaded)
    facts = host.class_conditional(loaded)
    if facts is None or facts.shape[0] not in (1, 3):
        made = "nothing from class labels" if facts is None else f"latents of {facts.shape[0]} channels"
        raise HostError(
            f"{model} makes {made}; `grafting sample` draws from class-conditional models of pixels"
        )
    batches = list(_draw(loaded.to(default_device()), config, host.predict, facts))
    images, labels_drawn = (torch.cat(part) for part in zip(*batches, strict=True))
    write_samples(
        out_file, [(images, labels_drawn)], num_images=num, shape=images.shape[1:], origin=origin_of(config)
    )
    scale = 2 if images.shape[-1] <= 64 else 1
    sheet = write_grid(images.numpy(), out_file.with_suffix(".png"), scale=scale)
    say(out, f"{len(images)} images: {out_file}, {sheet}")


def _parse_labels(text: str) -> str | list[int]:
    if text in ("balanced", "random"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--labels is balanced, random, or classes such as 3,5; found {text!r}") from None


def _draw(model: "nn.Module", config: Any, predict: Any, facts: Any) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Images of 8 bits [B, C, H, W] and labels, with progress shown."""
    from ..contract import Step
    from ..sampling import sample as draw

    done = 0
    with follow(out) as on_step:
        for batch in draw(model, config, predict=predict, **facts._asdict()):
            done += len(batch.labels)
            on_step("sample", Step(done=done, total=config.num_images))
            yield batch.images(), batch.labels


@app.command()
def evaluate(
    samples: Annotated[
        Path, typer.Argument(help="An .npz (arr_0, labels), or a run's samples/ROW.safetensors.")
    ],
    as_json: Json = False,
) -> None:
    """Measure samples of the testbed with the bundled feature network and reference.

    [dim]$ grafting evaluate samples.npz[/]
    """
    from ..data.bundled import CLASSIFIER_NAME, bundled_classifier, bundled_reference_path
    from ..evaluation import Evaluator, Protocol, Reference
    from ..evaluation import evaluate as measure
    from ..metrics.features import ModuleNetwork
    from ..samples import read_samples

    given = read_samples(samples)
    if given.images.shape[1:] != (1, 32, 32):
        raise DataError(
            f"{samples} holds {list(given.images.shape[1:])}; the bundled network measures [1, 32, 32]"
        )
    network = ModuleNetwork(bundled_classifier(), CLASSIFIER_NAME)
    reference = Reference.load(bundled_reference_path(), network)
    protocol = Protocol.of(network, reference, num_images=len(given.images), **given.origin)
    evaluator = Evaluator(network, reference, protocol)
    with follow(err) as on_step:
        for step in measure(zip(given.images.split(500), given.labels.split(500), strict=True), evaluator):
            on_step("evaluate", step)
    result = evaluator.result().model_dump(mode="json")
    if as_json:
        print_json(result)
    else:
        show_evaluation(out, result)
