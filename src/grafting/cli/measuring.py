"""Commands that measure images: against the bundled testbed, or by ADM's suite against a reference of one's own."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..display import follow, say, show_evaluation
from ..errors import DataError
from ._shared import Json, err, out, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import AdmEvaluator, Evaluator
    from ..samples import SampleFile

    Batches = Iterable[tuple[Tensor, Tensor | None]]

app = typer.Typer()

Suite = Literal["testbed", "adm"]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images a call of the network.")]


@app.command()
def evaluate(
    samples: Annotated[
        Path, typer.Argument(help="An .npz (arr_0, labels), or a run's samples/ROW.safetensors.")
    ],
    suite: Annotated[
        Suite,
        typer.Option(
            help="[cyan]testbed[/]: the bundled network and reference. "
            "[cyan]adm[/]: FID, sFID, Inception score, precision, recall."
        ),
    ] = "testbed",
    reference: Annotated[
        Path | None,
        typer.Option(
            help="adm: an .npz such as VIRTUAL_imagenet256_labeled.npz, or of `grafting reference`."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="adm: Inception's, pt_inception-2015-12-05-6726825d.pth.")
    ] = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Measure samples: of the testbed with what is bundled, or of any images by ADM's suite.

    [dim]$ grafting evaluate samples.npz[/]
    [dim]$ grafting evaluate samples.npz --suite adm --reference VIRTUAL_imagenet256_labeled.npz \\
      --weights pt_inception-2015-12-05-6726825d.pth[/]
    """
    from ..evaluation import evaluate as measure
    from ..samples import open_samples

    given = open_samples(samples)
    with follow(err) as on_step:
        if suite == "adm":
            evaluator, batches = _adm(given, reference, weights, batch_size, on_step)
        else:
            evaluator, batches = _testbed(given, {"--reference": reference, "--weights": weights})
        for step in measure(batches, evaluator):
            on_step("evaluate", step)
    result = evaluator.result().model_dump(mode="json")
    if as_json:
        print_json(result)
    else:
        show_evaluation(out, result)


def _testbed(
    given: "SampleFile", unused: dict[str, Path | None]
) -> "tuple[Evaluator | AdmEvaluator, Batches]":
    """The evaluator with the bundled network, and what it measures."""
    from ..data.bundled import CLASSIFIER_NAME, bundled_classifier, bundled_reference_path
    from ..evaluation import Evaluator, Protocol, Reference
    from ..metrics.features import ModuleNetwork

    if named := [option for option, value in unused.items() if value is not None]:
        raise DataError(f"{' and '.join(named)} are for --suite adm; suite testbed has its own")
    if given.shape != (1, 32, 32):
        raise DataError(f"{given.path} holds {list(given.shape)}; the bundled network measures [1, 32, 32]")
    batches = given.batches(500)
    network = ModuleNetwork(bundled_classifier(), CLASSIFIER_NAME)
    reference = Reference.load(bundled_reference_path(), network)
    protocol = Protocol.of(network, reference, num_images=given.num_images, **given.origin)
    return Evaluator(network, reference, protocol), batches


def _adm(
    given: "SampleFile", reference: Path | None, weights: Path | None, batch_size: int, on_step: Any
) -> "tuple[Evaluator | AdmEvaluator, Batches]":
    """The evaluator of ADM's suite, and what it measures; a reference's images pass through the network first."""
    from ..evaluation import AdmConfig, AdmEvaluator, AdmSuite, Protocol

    if reference is None or weights is None:
        raise DataError(
            "--suite adm needs --reference, such as VIRTUAL_imagenet256_labeled.npz, and --weights, "
            "such as pt_inception-2015-12-05-6726825d.pth"
        )
    config = AdmConfig()
    if given.shape[0] != 3 or given.num_images < config.min_images:
        raise DataError(
            f"{given.path} holds {given.num_images} images of {given.shape[0]} channels; "
            f"ADM's suite measures {config.min_images} or more images of 3"
        )
    suite = AdmSuite(reference=str(reference), weights=str(weights), batch_size=batch_size)
    network, opened = suite.open(lambda step: on_step("reference", step))
    protocol = Protocol.of(network, opened, num_images=given.num_images, metrics=config, **given.origin)
    return AdmEvaluator(network, opened, protocol), ((images, None) for images in given.images(batch_size))


@app.command()
def reference(
    source: Annotated[Path, typer.Argument(help="An .npz with images (arr_0), ADM's statistics, or both.")],
    weights: Annotated[Path, typer.Option(help="Inception's, pt_inception-2015-12-05-6726825d.pth.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="By default the source's name, with .safetensors, here.")
    ] = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Pass a reference's images through Inception once, and keep what `evaluate --suite adm` needs of them.

    Where the file has statistics too, it says how far its own images lie from them: on the right network, about as far
    as as many real images do.

    [dim]$ grafting reference VIRTUAL_imagenet256_labeled.npz --weights pt_inception-2015-12-05-6726825d.pth[/]
    """
    from ..evaluation import AdmReference, inception_network

    started = time.monotonic()
    target = out_file or Path(f"{source.stem}.safetensors")
    if target.suffix != ".safetensors":
        raise DataError(f"--out names a .safetensors file, found {target}")
    network = inception_network(weights)
    with follow(err) as on_step:
        opened = AdmReference.of_npz(
            source, network, batch_size=batch_size, on_step=lambda step: on_step("reference", step)
        )
    opened.save(target)
    num_images = 0 if opened.features is None else len(opened.features)
    seconds, size = time.monotonic() - started, target.stat().st_size
    if as_json:
        facts = {"file": str(target), "num_images": num_images, "seconds": round(seconds, 1), "bytes": size}
        print_json(facts | opened.facts())
        return
    origin = "as the file has them" if opened.statistics == "given" else "of these images"
    say(out, f"{target}: {num_images} images, statistics {origin}, features of {network.name}")
    if opened.spread is not None:
        pooled, spatial = opened.spread
        say(out, f"Its own images lie {pooled:.4g} (pooled) and {spatial:.4g} (spatial) from its statistics")
    say(
        out,
        f"{seconds:.1f} s, {size / 2**20:.1f} MiB; what `evaluate --suite adm --reference {target}` need not do again",
    )
