"""A set of images that any number of processes draw together, kept in shards until it is whole.

A shard is a batch: number b holds the images from b times the batch size on, whoever draws it, so the set does not depend on
the number of processes. Each process draws every world_size-th shard and asks nothing of the others; the main one writes
the samples file when all shards are there. Shards are whole or absent and carry their checksum: a process that is killed
loses the batch that it was at, and the same call resumes from there. This file does not know models or recipes.
"""

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxtyping import Int, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..contract import Denoiser, Step
from ..errors import DataError, FaultWarning, RunError
from ..latents.decoding import Decoder
from ..machine.devices import default_device
from ..machine.files import atomic_path, hash_json, is_empty, partial_folder, write_json
from ..machine.precision import settled, settled_as_begun
from ..metrics.features import tensors_sha256
from .chain import SamplingConfig, sample
from .files import open_samples, origin_of, write_samples

INDEX_NAME = "drawing.json"

_FORMAT = 1
_SECONDS_BETWEEN_LOOKS = 0.5

# a process that is at work writes a shard at least this often, in seconds or in times of the slowest shard so far
_PATIENCE_S, _PATIENCE_SHARDS = 900.0, 20

# settings of sampling that say how fast it runs, not what comes out
_CIRCUMSTANCES = frozenset({"batch_size", "compile"})


class Drawing:
    """The images that a config asks of a model, as far as they have been drawn into a folder of shards.

    Args:
        folder: of the shards; made when the first is drawn, of no use when the samples file is written.
        config: which images, and how.
        denoiser: how the model is called, its process and its conditions.
        shape: of a sample, as the model makes it; `config.shape` goes before it.
        decoder: makes pixels of it.
        identity: what else the images depend on, as JSON: the model, with `weights_dtype`, and versions.
        pictures: a folder in which each image also becomes a PNG file, named by its number; None for none.

    Raises:
        RunError: the folder holds other images (says each difference), or something else.
    """

    def __init__(
        self,
        folder: Path,
        config: SamplingConfig,
        *,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        decoder: Decoder,
        identity: Mapping[str, Any],
        pictures: Path | None = None,
    ):
        self.folder, self.pictures = folder, pictures
        self.config = config = settled(config, default_device())
        self._denoiser, self._sample_shape, self._decoder = denoiser, config.shape or shape, decoder
        sampling = {k: v for k, v in config.model_dump(mode="json").items() if k not in _CIRCUMSTANCES}
        self.description: dict[str, Any] = {
            "sampling": sampling,
            "vae": decoder.identity,
            **denoiser.identity,
            **identity,
        }
        self.shape = decoder.image_shape(self._sample_shape)
        # shards of another size hold other images under the same number
        self._index = {"format": _FORMAT, "batch_size": config.batch_size, "drawing": self.description}
        self._key = hash_json(self._index)
        self._slowest_s = 0.0
        self._check()

    @property
    def num_shards(self) -> int:
        return -(-self.config.num_images // self.config.batch_size)

    @property
    def num_drawn(self) -> int:
        """Images that are there, from whatever process."""
        return self.config.num_images - sum(len(self._numbers(shard)) for shard in self._missing())

    def matches(self, path: Path) -> bool:
        """True if a file of samples already holds these images.

        Raises:
            RunError: it holds others, which are not written over.
        """
        if not path.exists():
            return False
        try:
            found = open_samples(path).record
        except DataError as error:
            raise RunError(f"{path} exists and will not be overwritten: {error}") from error
        if found.get("drawing") != self.description:
            differences = _differences(found.get("drawing"), self.description)
            raise RunError(
                "\n  ".join(
                    [f"{path} exists and holds other images: name another file, or remove it", *differences]
                )
            )
        return True

    def draw(self, model: nn.Module, *, rank: int = 0, world_size: int = 1) -> Iterator[Step]:
        """Draw this process's share of what is missing, one step per shard; its `ms_per_image` is this process's own.

        Raises:
            ProtocolError: the model cannot be sampled in this way; raised before any work.
            RunError: a file cannot be written, or the disk is too small for shards and samples file.
        """
        mine = range(self.num_shards)[rank::world_size]
        self._check_space()
        write_json(self.folder / INDEX_NAME, self._index)
        todo, unpictured = [], self._without_pictures()
        for shard in mine:
            found = self._load(shard)
            if found is None:
                todo.append(shard)
            elif shard in unpictured:
                self._write_pictures(shard, found[0])
        batches = sample(
            model,
            self.config,
            denoiser=self._denoiser,
            shape=self._sample_shape,
            indices=[i for shard in todo for i in self._numbers(shard)],
        )
        started = time.perf_counter()
        for shard, batch in zip(todo, batches, strict=True):
            if not (self.folder / INDEX_NAME).is_file():
                return  # the main process has found all shards, and removed them
            images = self._decoder(batch.x)
            seconds = time.perf_counter() - started
            self._slowest_s = max(self._slowest_s, seconds)
            # pictures first: where there is a shard, there are its pictures
            self._write_pictures(shard, images)
            ms_per_image = round(1000 * seconds / len(images), 3)
            self._write(shard, images, batch.labels, ms_per_image=ms_per_image)
            yield self._step({"ms_per_image": ms_per_image})
            started = time.perf_counter()

    def drawn_before(self) -> Iterator[Step]:
        """The steps that led to the shards that are there."""
        done = 0
        for shard in sorted(set(range(self.num_shards)) - self._missing()):
            done += len(self._numbers(shard))
            with safe_open(self._path(shard), "pt") as file:
                ms_per_image = float(file.metadata()["ms_per_image"])
            yield Step(done=done, total=self.config.num_images, values={"ms_per_image": ms_per_image})

    def wait(self) -> Iterator[Step]:
        """Steps until every process has drawn its share.

        Raises:
            RunError: nothing has come for long, so that some process must have ended.
        """
        left, since = len(self._missing()), time.monotonic()
        while left:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            now_left = len(self._missing())
            if now_left < left:
                left, since = now_left, time.monotonic()
                yield self._step({})
            elif time.monotonic() - since > max(_PATIENCE_S, _PATIENCE_SHARDS * self._slowest_s):
                raise RunError(
                    f"{left} of {self.num_shards} shards in {self.folder} are missing, and none has come for "
                    f"{time.monotonic() - since:.0f} s: another process has ended. Run the same command again to resume"
                )

    def write(self, path: Path) -> None:
        """Write all images as one samples file, atomically, with what drew them; then remove the shards.

        Raises:
            RunError: a shard is missing or damaged, or the file cannot be written.
        """
        write_samples(
            path,
            self.batches(),
            num_images=self.config.num_images,
            shape=self.shape,
            origin=self.origin,
            record={"drawing": self.description, "vae": self._decoder.describe()},
        )
        self.discard()
        # what processes that were killed left of pictures
        for partial in self.pictures.glob(".*.partial") if self.pictures else ():
            partial.unlink(missing_ok=True)

    def write_pictures_of(self, path: Path) -> None:
        """Write the pictures, if they are wanted and not there, of a samples file that was written before."""
        unpictured = self._without_pictures()
        if unpictured:
            for shard, images in enumerate(open_samples(path).images(self.config.batch_size)):
                if shard in unpictured:
                    self._write_pictures(shard, images)

    @property
    def origin(self) -> dict[str, Any]:
        """Sampling part of the images' protocol."""
        dtype = self.description.get("weights_dtype", "float32")
        vae = self._decoder.identity
        return origin_of(self.config, weights_dtype=dtype, denoiser=self._denoiser, vae=vae)

    def batches(self) -> Iterator[tuple[UInt8[Tensor, "b c *size"], Int[Tensor, " b"]]]:
        """The images and labels of all shards, in their order.

        Raises:
            RunError: a shard is missing or damaged; one that is damaged is removed, so that the next call draws it.
        """
        for shard in range(self.num_shards):
            found = self._load(shard)
            if found is None:
                self._path(shard).unlink(missing_ok=True)
                raise RunError(
                    f"{self._path(shard)} is missing or damaged; run the same command again to redraw this shard only"
                )
            yield found

    def discard(self) -> None:
        """Remove the shards, all at once."""
        going = partial_folder(self.folder)
        shutil.rmtree(going, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def _check(self) -> None:
        if self.pictures is not None and self.shape[0] not in (1, 3):
            raise DataError(
                f"pictures are grey or in colour; these images have {self.shape[0]} channels: omit --png"
            )
        if self.pictures is not None and len(self.shape) != 3:
            raise DataError("pictures are of images; this model makes videos: omit --png")
        if not self.folder.exists():
            return
        path = self.folder / INDEX_NAME
        # looked at first: whoever makes the folder now writes the index before anything else
        empty = is_empty(self.folder)
        if not path.is_file():
            if not empty:
                raise RunError(f"{self.folder} exists and holds no shards of images: move it away")
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(
                f"{path} does not say which images are drawn: {error}. Remove {self.folder} to start over"
            ) from error
        if found != self._index:
            raise RunError(
                "\n  ".join(
                    [
                        f"{self.folder} holds part of a different set of images: use the settings they were drawn with, "
                        "or remove it to start over",
                        *_differences(found, self._index),
                    ]
                )
            )

    def _check_space(self) -> None:
        there = next(path for path in self.folder.absolute().parents if path.exists())
        bytes_an_image = math.prod(self.shape)
        needed = bytes_an_image * (2 * self.config.num_images - self.num_drawn)
        free = shutil.disk_usage(there).free
        if needed > free:
            raise RunError(
                f"{self.config.num_images} images of {list(self.shape)} need {needed / 1e9:.3g} GB in {there}, for shards "
                f"and then one file; {free / 1e9:.3g} GB are free"
            )

    def _numbers(self, shard: int) -> range:
        first = shard * self.config.batch_size
        return range(first, min(first + self.config.batch_size, self.config.num_images))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06}.safetensors"

    def _picture(self, number: int) -> Path:
        assert self.pictures is not None
        return self.pictures / f"{number:06}.png"

    def _missing(self) -> set[int]:
        """The shards that are not there yet, or have no pictures yet; does not read them."""
        names = {path.name for path in self.folder.glob("shard-*.safetensors")}
        absent = {shard for shard in range(self.num_shards) if self._path(shard).name not in names}
        return absent | self._without_pictures()

    def _without_pictures(self) -> set[int]:
        """The shards some of whose pictures, if they are wanted, are not there."""
        if self.pictures is None:
            return set()
        names = {path.stem for path in self.pictures.glob("*.png")}
        numbers = range(self.config.num_images)
        return {number // self.config.batch_size for number in numbers if f"{number:06}" not in names}

    def _step(self, values: dict[str, float]) -> Step:
        return Step(done=self.num_drawn, total=self.config.num_images, values=values)

    def _write(self, shard: int, images: Tensor, labels: Tensor, *, ms_per_image: float) -> None:
        tensors = {"images": images.contiguous(), "labels": labels.cpu()}
        words = {"sha256": tensors_sha256(tensors, self._key, str(shard)), "ms_per_image": str(ms_per_image)}
        with atomic_path(self._path(shard)) as temporary:
            save_file(tensors, temporary, metadata=words)

    def _load(self, shard: int) -> tuple[Tensor, Tensor] | None:
        """A shard's images and labels; None if it is not there, or not what was written of these images."""
        path = self._path(shard)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                recorded = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError):
            tensors, recorded = {}, None
        if recorded == tensors_sha256(tensors, self._key, str(shard)):
            return tensors["images"], tensors["labels"]
        warnings.warn(f"{path} is damaged and will be drawn again", FaultWarning, stacklevel=2)
        return None

    def _write_pictures(self, shard: int, images: UInt8[Tensor, "b c *size"]) -> None:
        if self.pictures is not None:
            write_pictures([self._picture(number) for number in self._numbers(shard)], images)


def settled_as_drawn(config: SamplingConfig, folder: Path, path: Path) -> SamplingConfig:
    """With the precision of images that are drawn already, into a file of samples or shards, where the config says `auto`.

    What is wrong with either is for `Drawing` to say.
    """
    begun, device = None, default_device()
    if path.exists():
        with suppress(DataError, LookupError, TypeError):
            begun = open_samples(path).record["drawing"]["sampling"]["precision"]
    if begun is not None and config.precision == "auto":
        return config.model_copy(update={"precision": begun})
    with suppress(OSError, ValueError, LookupError, TypeError):
        begun = json.loads((folder / INDEX_NAME).read_text())["drawing"]["sampling"]["precision"]
    return settled_as_begun(config, device, begun=begun, where=folder)


def write_pictures(paths: Sequence[Path], images: UInt8[Tensor, "b c h w"]) -> None:
    """Write images, grey or in colour, as PNG files, each atomically.

    Raises:
        RunError: a file cannot be written.
    """
    for path, image in zip(paths, images.permute(0, 2, 3, 1).numpy(), strict=True):
        with atomic_path(path) as temporary:
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="PNG")


def describe_model(model: nn.Module, *, settings: Any) -> dict[str, Any]:
    """Identity of a model by content, as JSON: its settings, tensors and their type.

    Args:
        settings: all that its tensors do not say, as JSON: arguments of its class, plan.
    """
    tensors = model.state_dict()
    return {
        "model": {"class": type(model).__name__, "sha256": tensors_sha256(tensors, hash_json(settings))},
        "weights_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _differences(found: Any, asked: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, with both values."""
    if not isinstance(found, Mapping):
        return ["what drew them is not recorded"]
    mine, its = _flat(asked), _flat(found)
    return [
        f"{name}: {its.get(name, 'nothing')} there, {mine.get(name, 'nothing')} asked"
        for name in {**its, **mine}
        if (name in its, its.get(name)) != (name in mine, mine.get(name))
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return flat
