"""Commands that evaluate images with a suite from `evaluation/`: the testbed's, or one with a custom reference."""

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError, listed
from ._shared import Json, err, out, parse_setting, print_json
from .display import follow, say, show_evaluation

if TYPE_CHECKING:
    from ..evaluation import Suite, SuiteEvaluator
    from ..sampling.files import SampleFile

app = typer.Typer()

SuiteName = Annotated[
    str,
    typer.Option(
        "--suite",
        metavar="NAME",
        help="Evaluation suite, such as [cyan]testbed[/], [cyan]scenes[/] or [cyan]adm[/]; an unknown name lists them all.",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Weights of the suite's feature network.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Images per batch of the feature network.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a suite setting; repeatable.")
]


@app.command()
def evaluate(
    samples: Annotated[
        Path,
        typer.Argument(
            help=".npz file (arr_0, labels), a run's samples/ROW.safetensors, or a folder in GenEval's layout."
        ),
    ],
    suite: SuiteName = "testbed",
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Reference: an .npz such as VIRTUAL_imagenet256_labeled.npz, or a file from `grafting reference`."
        ),
    ] = None,
    weights: Weights = None,
    batch_size: BatchSize = None,
    settings: Settings = None,
    details: Annotated[
        Path | None,
        typer.Option(help="Also write a line for each image, such as GenEval's results.jsonl."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate samples with a suite: the testbed's, or ADM's (FID).

    [dim]$ grafting evaluate samples.npz[/]
    [dim]$ grafting evaluate samples.npz --suite geneval \\
      --set prompts=evaluation_metadata.jsonl[/]
    [dim]$ grafting evaluate samples.npz --suite adm \\
      --reference VIRTUAL_imagenet256_labeled.npz \\
      --weights pt_inception-2015-12-05-6726825d.pth[/]
    """
    from ..evaluation import evaluate as measure
    from ..evaluation.geneval_folder import open_folder
    from ..sampling.files import open_samples

    given = open_folder(samples) if samples.is_dir() else open_samples(samples)
    chosen = _suite(suite, settings, reference=reference, weights=weights, batch_size=batch_size)
    if details is not None and not chosen.has_details:
        raise DataError(f"--details: suite {suite} has no lines for each image; geneval does")
    if faults := chosen.faults(given.num_images, given.shape):
        raise DataError("\n".join(f"{given.path} holds {fault}" for fault in faults))
    batches = (
        given.batches(chosen.batch_size)
        if chosen.uses_labels
        else ((images, None) for images in given.images(chosen.batch_size))
    )
    origin = {**given.origin, "num_images": given.num_images}
    with follow(err) as on_step:
        evaluator = chosen.open(origin, on_step=lambda step: on_step("reference", step))()
        for step in measure(batches, evaluator):
            on_step("evaluate", step)
    result = evaluator.result().model_dump(mode="json")
    if details is not None:
        _write_details(details, evaluator, given)
    if as_json:
        print_json(result)
    else:
        show_evaluation(out, result)


@app.command()
def geneval(
    samples: Annotated[
        Path, typer.Argument(help=".npz file, or a run's samples/ROW.safetensors, of GenEval's prompts.")
    ],
    folder: Annotated[Path, typer.Argument(help="Output folder; new.")],
    prompts: Annotated[Path, typer.Option(help="GenEval's evaluation_metadata.jsonl.")],
) -> None:
    """Write samples as GenEval's own scorer reads them.

    The folder holds 00000/metadata.jsonl, 00000/samples/0000.png, ...

    [dim]$ grafting geneval samples.npz images --prompts evaluation_metadata.jsonl[/]
    """
    from ..evaluation.geneval_folder import write_folder
    from ..evaluation.geneval_rules import PromptFile
    from ..sampling.files import open_samples

    given = open_samples(samples)
    write_folder(folder, given, PromptFile.read(prompts))
    say(out, f"{folder}: {given.num_images} images; GenEval's evaluate_images.py reads them")


@app.command()
def reference(
    source: Annotated[Path, typer.Argument(help=".npz file with images (arr_0), ADM statistics, or both.")],
    weights: Weights = None,
    suite: SuiteName = "adm",
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Output file. [dim]Default: SOURCE's name with .safetensors, in this folder.[/]"
        ),
    ] = None,
    batch_size: BatchSize = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Precompute a reference's statistics for `evaluate`.

    If the file has statistics as well as images, print the distance between the two: with the right network, it is
    about that of equally many real images.

    [dim]$ grafting reference VIRTUAL_imagenet256_labeled.npz \\
      --weights pt_inception-2015-12-05-6726825d.pth[/]
    """
    started = time.monotonic()
    target = out_file or Path(f"{source.stem}.safetensors")
    if target.suffix != ".safetensors":
        raise DataError(f"--out names a .safetensors file, found {target}")
    chosen = _suite(suite, settings, reference=source, weights=weights, batch_size=batch_size)
    with follow(err) as on_step:
        kept = chosen.keep_reference(target, on_step=lambda step: on_step("reference", step))
    seconds, size = time.monotonic() - started, target.stat().st_size
    if as_json:
        facts = {"file": str(target), "num_images": kept.facts["num_images"]}
        print_json(facts | {"seconds": round(seconds, 1), "bytes": size} | kept.facts)
        return
    first, *others = kept.words
    say(out, f"{target}: {first}")
    for line in others:
        say(out, line)
    again = f"`evaluate --suite {suite} --reference {target}` will not repeat this work"
    say(out, f"{seconds:.1f} s, {size / 2**20:.1f} MiB; {again}")


def _write_details(path: Path, evaluator: "SuiteEvaluator", samples: "SampleFile") -> None:
    from ..evaluation.geneval_folder import names_of
    from ..machine.files import atomic_path

    found = evaluator.details() or []
    lines = [
        json.dumps({"filename": name} | line) for name, line in zip(names_of(samples), found, strict=True)
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def _suite(name: str, settings: list[str] | None, **options: Path | int | None) -> "Suite":
    """Build the suite of this name with the settings from the command line.

    Raises:
        DataError: there is no such suite, or its settings have faults.
    """
    from pydantic import ValidationError

    from ..editing.plan import fault_list
    from ..evaluation import SUITES
    from ..runs.file import faults_of
    from ..runs.paths import with_paths

    if name not in SUITES:
        lines = [f"{known}: {(suite.__doc__ or '').splitlines()[0]}" for known, suite in SUITES.items()]
        raise DataError(listed(f"no suite {name!r}; there are", lines))
    written = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    written |= with_paths(dict(map(parse_setting, settings or ())))
    _check_options(name, written)
    try:
        return SUITES[name].model_validate(written)
    except ValidationError as error:
        raise DataError(fault_list(faults_of(error), f"the settings of suite {name}")) from error


def _check_options(name: str, written: Collection[str]) -> None:
    """Raise a DataError if a setting is unknown to the suite, or a required one is missing."""
    from ..evaluation import SUITES

    fields = SUITES[name].model_fields
    if foreign := [key for key in written if key not in fields]:
        takers = [known for known, suite in SUITES.items() if set(foreign) <= suite.model_fields.keys()]
        fitting = f"; --suite {' or '.join(takers)} does" if takers else ""
        raise DataError(f"suite {name} takes no {' and no '.join(map(_option, foreign))}{fitting}")
    missing = {key: field for key, field in fields.items() if field.is_required() and key not in written}
    if missing:
        needs = (
            _option(key) + "".join(f", such as {example}" for example in field.examples or ())
            for key, field in missing.items()
        )
        raise DataError(f"--suite {name} needs {', and '.join(needs)}")


def _option(key: str) -> str:
    is_option = key in ("reference", "weights", "batch_size")
    return f"--{key.replace('_', '-')}" if is_option else f"--set {key}=..."
