"""Commands on data: encoded prompts, latents of images, and subsets."""

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import DataError
from ._shared import Json, out, parse_setting, print_json
from .display import fills, plain_table, say
from .options import Options, command

if TYPE_CHECKING:
    from ..contract import Step
    from ..data.sources import ImageStream
    from ..latents.encoding import EncodingConfig
    from ..latents.prompting import PromptingConfig

_STORED = frozenset({"dtype", "shard_size"})
"""Settings of an encoding that published latents have as well."""

app = typer.Typer(
    no_args_is_help=True,
    help="Encode prompts, and images to latents; draw subsets.",
    rich_markup_mode="rich",
)


@app.callback()
def _data() -> None:
    """Encode prompts, and images to latents; draw subsets."""


def _prompting() -> Options:
    from ..latents.prompting import PromptingConfig

    return Options(config=PromptingConfig, title="Encoding")


@command(app, config=_prompting)
def prompts(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder for the encoded prompts.")],
    config: "PromptingConfig",
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="Text file, a prompt a line; JSONL; or a folder with captions (.txt) beside its images.",
        ),
    ],
    pipeline: Annotated[
        str, typer.Option(metavar="NAME", help="Pipeline of diffusers: a folder, or owner/name on the Hub.")
    ],
    revision: Annotated[str | None, typer.Option(help="Commit of the pipeline on the Hub.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of its weights, such as fp16.")] = None,
    column: Annotated[str | None, typer.Option(help="Key of the prompt in each line of JSONL.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of the text encoders. [dim]Default: the accelerator.[/]")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(
            help="Weights of the text encoders: fp32, bf16 or fp16. [dim]Default: bf16 on an accelerator, else fp32.[/]"
        ),
    ] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Further argument of the pipeline; may be given again."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time and disk space; write nothing.")
    ] = False,
) -> None:
    """Encode prompts by the text encoders of a pipeline.

    They are stored as the pipeline passes them to its transformer, whose weights are not needed. Finished shards are skipped, and several processes share the work.

    [dim]$ grafting data prompts prompts/train --prompts captions.txt \\
      --pipeline PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --dry-run[/]
    """
    import torch

    from ..data.prompts import INDEX_NAME
    from ..latents.prompting import Prompting, open_encoders, read_words
    from ..machine.devices import default_device
    from ..machine.processes import is_main, share, world_size

    words = read_words(prompts, column=column)
    place = torch.device(device) if device else default_device()
    opened = open_encoders(pipeline, revision=revision, variant=variant, device=place, dtype=dtype)
    work = Prompting(
        opened,
        words,
        folder,
        config,
        source=f"{prompts.name}, {pipeline}",
        call=dict(map(parse_setting, call or [])),
    )
    needed, free = work.target.check()
    if is_main():
        null = "a null" if work.target.nulls else "no null"
        columns = ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in work.longest.tensors.items())
        say(out, f"{len(words):,} prompts and {null}, a long one {columns}")
        seconds = datetime.timedelta(seconds=round(work.seconds_a_prompt * len(words) / world_size()))
        say(
            out,
            f"{needed / 1e9:.3g} GB in {work.target.num_shards:,} shards, {free / 1e9:.3g} GB are free; "
            f"a prompt took {work.seconds_a_prompt:.3g} s on {place}: about {seconds}",
        )
    if dry_run:
        return
    if fills("prompts", work.steps(share()), index=folder / INDEX_NAME):
        say(out, f"Prompts: {folder}; name them in a recipe: conditions: {{name: prompts, folder: {folder}}}")


def _encoding() -> Options:
    from ..latents.encoding import EncodingConfig

    return Options(config=EncodingConfig, title="Encoding", own={"mirrored": {"names": ("--flip",)}})


@command(app, encoding=_encoding)
def latents(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder for the latents.")],
    encoding: "EncodingConfig",
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Image folder with one subfolder per class, like ImageNet's."),
    ] = None,
    tars: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="WebDataset tar of images, or a folder of tars."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Image dataset for Hugging Face `datasets`: owner/name, or a folder."
        ),
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Latents published by the paper's authors: tars or unpacked."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --dataset.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Commit of --dataset on the Hub.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the data. [dim]Default: last two parts of the path.[/]")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes. [dim]Default: highest label plus one.[/]")
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Autoencoder: a folder, or owner/name on the Hub. [dim]Default: stabilityai/sd-vae-ft-ema.[/]"
        ),
    ] = None,
    vae_revision: Annotated[str | None, typer.Option(help="Commit of the autoencoder on the Hub.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of image-decoding threads.")] = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time and disk space; write nothing.")
    ] = False,
) -> None:
    """Encode images with an autoencoder into shards for training.

    Finished shards are skipped, and several processes share the work.

    [dim]$ grafting data latents latents/train --images imagenet/train --dry-run[/]

    [dim]$ torchrun --nproc-per-node 8 -m grafting data latents latents/train \\
      --images imagenet/train[/]
    """
    given = {"--images": images, "--tars": tars, "--dataset": dataset, "--published": published}
    asked = [option for option, value in given.items() if value is not None]
    if len(asked) != 1:
        raise DataError(
            f"give one source of {', '.join(given)}; found {' and '.join(asked) if asked else 'none'}"
        )
    if published is not None:
        given = {"--vae": vae, "--vae-revision": vae_revision, "--name": name}
        refused = [option for option, value in given.items() if value is not None]
        refused += [_encoding().options[field].names[0] for field in encoding.model_fields_set - _STORED]
        if refused:
            raise DataError(
                f"published latents are already encoded: --published cannot be combined with {', '.join(sorted(refused))}"
            )
        stored = encoding.model_dump(include=set(_STORED))
        _import(published, folder, stored, num_classes=num_classes, dry_run=dry_run)
        return
    from ..data.sources import image_dataset, image_folder, image_tars

    if images is not None and num_classes is not None:
        raise DataError("--num-classes does not go with --images, whose subfolders are the classes")
    if images is not None:
        stream = image_folder(images, name=name)
    elif tars is not None:
        stream = image_tars(tars, num_classes=num_classes, name=name)
    else:
        assert dataset is not None
        stream = image_dataset(dataset, split=split, revision=revision, num_classes=num_classes, name=name)
    autoencoder = vae or "stabilityai/sd-vae-ft-ema", vae_revision
    _encode(stream, folder, encoding, autoencoder, workers=workers, dry_run=dry_run)


@app.command()
def subset(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Latents folder, image folder with one subfolder per class, "
            "[cyan]testbed[/] or [cyan]fashion-mnist[/].",
        ),
    ],
    out_file: Annotated[Path, typer.Argument(metavar="OUT", help="Output file (.json).")],
    per_class: Annotated[int | None, typer.Option(min=1, help="Items per class.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of each class instead, such as 0.1.")] = None,
    paths: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Take these paths instead: one per line, or the paper's published .pkl."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw a subset with an equal part of every class.

    Also plots its histogram. A recipe names the subset file and its hash; a run refuses a file with another hash.

    [dim]$ grafting data subset imagenet/train imagenet-128.json --per-class 128[/]
    """
    from ..data import list_data
    from ..data.subset import read_paths, write_subset
    from ..report import class_range, write_class_histogram

    if out_file.suffix != ".json":
        raise DataError(f"a subset's file ends in .json, found {out_file}")
    listing = list_data(source)
    if paths is None:
        drawn = listing.draw(per_class=per_class, fraction=fraction, seed=seed)
    elif per_class is not None or fraction is not None:
        raise DataError("--paths says which items: it goes without --per-class and --fraction")
    else:
        drawn = listing.pick(read_paths(paths), drawn=f"paths of {paths.name}")
    _check_replaceable(out_file, drawn.sha256)
    chosen = listing.labels[listing.places(drawn)[:: listing.copies] // listing.copies]
    counts = {
        "all": listing.class_counts.tolist(),
        "subset": chosen.bincount(minlength=listing.num_classes).tolist(),
    }
    title = f"{drawn.source}: {drawn.drawn}"
    picture = write_class_histogram(
        out_file.with_suffix(".svg"), title=title, counts=counts["all"], chosen=counts["subset"]
    )
    write_subset(out_file, drawn)
    rows = [[name, sum(each), *class_range(each)] for name, each in counts.items()]
    headings = ("", "items", "min per class", "median", "max")
    if as_json:
        facts = {"file": str(out_file), "sha256": drawn.sha256, "source": drawn.source, "drawn": drawn.drawn}
        figures = {row[0]: dict(zip(("items", "min", "median", "max"), row[1:], strict=True)) for row in rows}
        print_json({**facts, "num_classes": drawn.num_classes, **figures, "picture": str(picture)})
        return
    say(out, f"{title}, {drawn.num_classes:,} classes")
    out.print(plain_table(headings, rows))
    say(out, f"Subset: {out_file} (its classes: {picture})\n")
    say(out, f"data: {{..., subset: {out_file}, subset_sha256: {drawn.sha256}}}")


def _check_replaceable(path: Path, sha256: str) -> None:
    """Raise a DataError if the file holds another subset, which a run may refer to."""
    from ..data.subset import read_subset

    if path.exists():
        found = read_subset(path).sha256
        if found != sha256:
            raise DataError(f"{path} is another subset, with sha256 {found}, not {sha256}: name another file")


def _encode(
    stream: "ImageStream",
    folder: Path,
    config: "EncodingConfig",
    autoencoder: tuple[str, str | None],
    *,
    workers: int,
    dry_run: bool,
) -> None:
    from ..latents.autoencoder import load_autoencoder
    from ..latents.encoding import encode, forecast
    from ..machine.devices import default_device
    from ..machine.processes import is_main, share, world_size

    source, revision = autoencoder
    encoder = load_autoencoder(source, revision=revision, device=default_device())
    if is_main():
        found = forecast(stream, encoder, config, folder, workers=workers)
        _say_amount(
            f"{found.num_images:,} images of {stream.num_classes:,} classes, of {stream.name}",
            items=found.num_items,
            shards=found.num_shards,
            images_left=found.images_left,
            needed=found.bytes_left,
            free=found.bytes_free,
        )
        seconds = found.images_left * found.seconds_an_image / world_size()
        duration = datetime.timedelta(seconds=round(seconds))
        say(
            out,
            f"A first batch took {found.seconds_an_image:.3g} s per image (decoding {found.decode_seconds:.3g} with "
            f"{workers} threads, encoding {found.encode_seconds:.3g} on {encoder.device}): at most about {duration} with "
            f"{world_size()} process{'' if world_size() == 1 else 'es'}",
        )
    if not dry_run:
        _fill(folder, encode(stream, encoder, config, folder, workers=workers, share=share()))


def _import(
    source: Path, folder: Path, stored: Mapping[str, Any], *, num_classes: int | None, dry_run: bool
) -> None:
    from ..data.published import ImportConfig, import_published, import_target, open_published
    from ..machine.processes import is_main, share

    classes = {} if num_classes is None else {"num_classes": num_classes}
    config = ImportConfig.model_validate({**stored, **classes})
    found = open_published(source)
    if is_main():
        target = import_target(found, folder, config)
        needed, free = target.check()
        _say_amount(
            f"{len(found):,} published latents, of {found.name}",
            items=len(found),
            shards=target.num_shards,
            images_left=needed // target.image_bytes,
            needed=needed,
            free=free,
        )
    if not dry_run:
        _fill(folder, import_published(found, folder, config, share=share()))


def _say_amount(what: str, *, items: int, shards: int, images_left: int, needed: int, free: int) -> None:
    say(out, what)
    say(
        out,
        f"{items:,} items in {shards:,} shards; {images_left:,} images left to encode, {needed / 1e9:.3g} GB, "
        f"{free / 1e9:.3g} GB are free",
    )


def _fill(folder: Path, steps: "Iterable[Step]") -> None:
    """Do this process's share of the work; the main process shows progress."""
    from ..data.latents import INDEX_NAME, read_index

    if fills("latents", steps, index=folder / INDEX_NAME):
        index = read_index(folder)
        missing = (
            f"; {index.unreadable} unreadable images are listed in unreadable.txt" if index.unreadable else ""
        )
        say(out, f"Latents: {folder}, {index.count:,} items in {len(index.shards):,} shards{missing}")
