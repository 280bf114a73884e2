"""Images to latents: the posterior of an autoencoder for every image of a stream, in shards that any process can resume.

Kept are means and log variances; the sample is drawn when training reads them (`data.latents`). Images are decoded in
threads while the autoencoder works. With `mirrored`, each image is encoded a second time from right to left, as an item of
its own: DiT mirrors half of its images at random, and an epoch over these items is two over the images, each seen both ways.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field, JsonValue, PositiveInt
from torch import Tensor

from ..contract import Step
from ..data.latentfolder import FORMAT, WORK_NAME, Dtype, LatentFolder
from ..data.sources import ImageStream
from ..errors import DataError
from ..machine.precision import Precision, recorded_precision, settled_as_begun
from ..machine.processes import ALL
from ..machine.reading import JsonObject, read_json
from ..machine.settings import Settings
from .autoencoder import Autoencoder

# batches that are decoded while one is encoded
_BATCHES_AHEAD = 3


class EncodingConfig(Settings):
    """Encoding of images into latents. The defaults are DiT's for 256x256, without the mirrored half."""

    size: PositiveInt = 256
    """Side of the central crop, in pixels."""
    mirrored: bool = False
    """Also encode each image mirrored, as a separate item after it."""
    dtype: Dtype = "fp16"
    """Dtype of the stored means and log variances: fp16, bf16 or fp32."""
    shard_size: PositiveInt = 2048
    """Images per shard; a killed process loses at most one shard."""
    batch_size: PositiveInt = 32
    """Images per batch; changes latents by float rounding, so resumed work keeps it."""
    precision: Precision = "auto"
    """Precision of the encoder's forward pass: fp32, bf16 (by autocast) or auto (bf16 where it is faster). Resumed work keeps
    its precision."""
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Maximum share of unreadable images; they are left out and listed."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Amount of work, estimated from a first batch; times are for this process alone."""

    num_images: int
    num_items: int
    num_shards: int
    bytes_left: int  # still to be written
    bytes_free: int
    images_left: int
    decode_seconds: float  # an image, with all workers
    encode_seconds: float  # an image

    @property
    def seconds_an_image(self) -> float:
        """One after the other; where an accelerator encodes, images are decoded meanwhile."""
        return self.decode_seconds + self.encode_seconds


def encode(
    stream: ImageStream,
    vae: Autoencoder,
    config: EncodingConfig,
    folder: Path,
    *,
    workers: int = 2,
    share: slice = ALL,
) -> Iterator[Step]:
    """Fill `folder` with the latents of this process's share of shards; a step is a batch.

    The process that finds all shards done writes the index. Whatever was done before is not done again, but for shards with
    images that could not be read then and can now; and the files come out the same whoever did which shard.

    Args:
        workers: threads that decode images.

    Raises:
        DataError: no images, a size that the autoencoder cannot take, too many unreadable images, or latents that are not
            finite. RunError: the folder holds something else, or the disk has not the space. What can be known before
            any work is raised at the call.
    """
    config = _settled(config, vae, folder)
    target = _target(stream, vae, config, folder)
    target.check()
    allowed = int(config.max_unreadable * len(stream))

    def steps() -> Iterator[Step]:
        with target.working(share) as missing:
            own = range(target.num_shards)[share]
            mended = [n for n in own if n not in missing and _is_mended(stream, target, n, size=config.size)]
            yield from filling(sorted([*missing, *mended]))
        target.finish(_index_facts(stream, vae, config), max_unreadable=allowed)

    def filling(shards: list[int]) -> Iterator[Step]:
        step = target.start(shards, share)
        done = first = before = step.done
        unreadable, started = 0, time.monotonic()
        yield step
        cuts = [part for number in shards for part in _cut(target.images_of(number), config.batch_size)]
        with closing(_decoded(stream, cuts, config, workers)) as batches:
            for number in shards:
                contents = _Contents()
                while contents.num_images < len(target.images_of(number)):
                    contents.add(next(batches), stream, vae, config)
                    target.check_unreadable(contents.unreadable, allowed - unreadable)
                    done = before + contents.num_images
                    if contents.num_images == len(target.images_of(number)):
                        # so that the last batch's step is told when its shard is on disk
                        contents.write(target, number)
                    rate = (done - first) / max(time.monotonic() - started, 1e-9)
                    yield replace(step, done=done, values={"images_per_second": rate})
                unreadable += len(contents.unreadable)
                before = done

    return steps()


def forecast(
    stream: ImageStream, vae: Autoencoder, config: EncodingConfig, folder: Path, *, workers: int = 2
) -> Forecast:
    """Estimate the work of `encode` by timing a first batch; writes nothing. Raises as `encode`."""
    config = _settled(config, vae, folder)
    target = _target(stream, vae, config, folder)
    bytes_left, bytes_free = target.check()
    started = time.monotonic()
    batch = next(_decoded(stream, [range(min(config.batch_size, len(stream)))], config, workers))
    decoded = time.monotonic()
    count = max(len(batch.numbers), 1)
    if len(batch.numbers):
        vae.encode(batch.images[:1], precision=config.precision)  # what is slow only once
        begun = time.monotonic()
        vae.encode(batch.images, precision=config.precision)
    else:
        begun = time.monotonic()
    return Forecast(
        num_images=len(stream),
        num_items=len(stream) * target.items_per_image,
        num_shards=target.num_shards,
        bytes_left=bytes_left,
        bytes_free=bytes_free,
        images_left=bytes_left // target.image_bytes,
        decode_seconds=(decoded - started) / count,
        encode_seconds=(time.monotonic() - begun) / count,
    )


def _settled(config: EncodingConfig, vae: Autoencoder, folder: Path) -> EncodingConfig:
    """With the precision that the folder's latents were begun in; `LatentFolder.check` says what is wrong with its record."""
    begun = None
    with suppress(DataError):
        begun = recorded_precision(read_json(folder / WORK_NAME, JsonObject, error=DataError), "encoding")
    return settled_as_begun(config, vae.device, begun=begun, where=folder)


def _target(stream: ImageStream, vae: Autoencoder, config: EncodingConfig, folder: Path) -> LatentFolder:
    if not len(stream):
        raise DataError(f"{stream.name} has no images")
    if config.size % vae.factor:
        raise DataError(
            f"images of {config.size} pixels per side cannot be encoded: {vae.name} takes multiples of {vae.factor}"
        )
    side = config.size // vae.factor
    return LatentFolder(
        folder=folder,
        facts={
            "format": FORMAT,
            "source": {
                "name": stream.name,
                "revision": stream.revision,
                "images": len(stream),
                "sha256": stream.sha256,
            },
            "vae": vae.describe(),
            "encoding": config.model_dump(mode="json", exclude={"max_unreadable"}),
        },
        num_images=len(stream),
        per_shard=config.shard_size,
        shape=(2 * vae.channels, side, side),
        dtype=config.dtype,
        num_classes=stream.num_classes,
        items_per_image=2 if config.mirrored else 1,
    )


def _index_facts(stream: ImageStream, vae: Autoencoder, config: EncodingConfig) -> dict[str, JsonValue]:
    return {
        "source": stream.name,
        "source_revision": stream.revision,
        "source_sha256": stream.sha256,
        "vae": vae.name,
        "vae_revision": vae.revision,
        "vae_sha256": vae.sha256,
        "scale": vae.scale,
        "shift": vae.shift,
        "stored": "moments",
        "crop_size": config.size,
    }


@dataclass(frozen=True)
class _Batch:
    """Images, mirrored ones after their originals; the numbers of those that could be read; the others and why."""

    numbers: list[int]
    images: UInt8[Tensor, "b 3 h w"]
    unreadable: dict[str, str]


class _Contents:
    """Expected contents of a shard."""

    def __init__(self) -> None:
        self.num_images = 0
        self._moments: list[Tensor] = []
        self.labels: list[int] = []
        self.names: list[str] = []
        self.unreadable: dict[str, str] = {}

    def add(self, batch: _Batch, stream: ImageStream, vae: Autoencoder, config: EncodingConfig) -> None:
        self.num_images += len(batch.numbers) + len(batch.unreadable)
        self.unreadable |= batch.unreadable
        if not batch.numbers:
            return
        self._moments.append(vae.encode(batch.images, precision=config.precision))
        endings = ("", " mirrored") if config.mirrored else ("",)
        for number in batch.numbers:
            self.labels += [int(stream.labels[number])] * len(endings)
            self.names += [stream.ids[number] + ending for ending in endings]

    def write(self, target: LatentFolder, number: int) -> None:
        latents = torch.cat(self._moments) if self._moments else torch.empty(0, *target.shape)
        target.write(number, latents, self.labels, names=self.names, unreadable=self.unreadable)


def _is_mended(stream: ImageStream, target: LatentFolder, number: int, *, size: int) -> bool:
    """True if an image that a finished shard left out can be read now."""
    left_out = target.unreadable_of(number)
    for image in target.images_of(number) if left_out else ():
        if stream.ids[image] in left_out:
            try:
                stream.crop(image, size=size)
                return True
            except DataError:
                pass
    return False


def _cut(numbers: range, size: int) -> list[range]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _decoded(
    stream: ImageStream, batches: Iterable[range], config: EncodingConfig, workers: int
) -> Generator[_Batch, None, None]:
    """The images of each range of numbers, cropped, while some batches to come are decoded in threads."""
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        coming = iter(batches)
        waiting: deque[tuple[range, list[Future[np.ndarray]]]] = deque()

        def submit(count: int) -> None:
            for numbers in islice(coming, count):
                crops = [pool.submit(stream.crop, number, size=config.size) for number in numbers]
                waiting.append((numbers, crops))

        try:
            submit(1 + _BATCHES_AHEAD)
            while waiting:
                numbers, crops = waiting.popleft()
                batch = _collect(stream, numbers, crops, config)
                submit(1)
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collect(
    stream: ImageStream, numbers: range, crops: list[Future[np.ndarray]], config: EncodingConfig
) -> _Batch:
    found: dict[int, np.ndarray] = {}
    unreadable: dict[str, str] = {}
    for number, crop in zip(numbers, crops, strict=True):
        try:
            found[number] = crop.result()
        except DataError as error:
            unreadable[stream.ids[number]] = str(error)
    images = torch.empty(0, 3, config.size, config.size, dtype=torch.uint8)
    if found:
        images = torch.from_numpy(np.stack(list(found.values()))).permute(0, 3, 1, 2).contiguous()
    if config.mirrored:
        images = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
    return _Batch(list(found), images, unreadable)
