"""A set of images that any number of processes draw together, kept in shards until it is whole.

The set does not depend on the number of processes. Each process draws its share of the shards and asks nothing of the
others; the main one writes the samples file when all shards are there. A process that is killed loses the batch that it was
at, and the same call resumes from there. This file does not know recipes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor, nn

from ..contract import Denoiser, Step
from ..errors import GraftingError, RunError, listed
from ..latents.decoding import Decoder
from ..machine.devices import default_device
from ..machine.files import disk_of, hash_json
from ..machine.precision import recorded_precision, settled, settled_as_begun
from ..machine.processes import ALL
from ..machine.reading import JsonObject, read_json
from ..metrics.features import tensors_sha256
from .chain import CIRCUMSTANCES, SamplingConfig, sample
from .files import Origin, open_samples, origin_of, write_samples
from .pictures import Pictures
from .shards import INDEX_NAME, Shards, differences

_SECONDS_BETWEEN_LOOKS = 0.5

# from one look of a process at work to the next, in times of what a look takes
_LOOKS_APART = 100

# a process that is at work writes a shard at least this often, in seconds or in times of the slowest shard so far
_PATIENCE_S, _PATIENCE_SHARDS = 900.0, 20


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
        self.config = config = settled(config, default_device())
        self._denoiser, self._sample_shape, self._decoder = denoiser, config.shape or shape, decoder
        self.description: JsonObject = {
            "sampling": config.model_dump(mode="json", exclude=set(CIRCUMSTANCES)),
            "vae": decoder.identity,
            **denoiser.identity,
            **identity,
        }
        self.shape = decoder.image_shape(self._sample_shape)
        self.pictures = None if pictures is None else Pictures(pictures, shape=self.shape)
        _check_disk(folder, self.shape, num_images=config.num_images)
        self._shards = Shards(
            folder,
            num_images=config.num_images,
            batch_size=config.batch_size,
            drawing=self.description,
        )
        self._told, self._slowest_s = 0, 0.0

    @property
    def num_drawn(self) -> int:
        """Images that are there, from whatever process."""
        return self.config.num_images - self._num_in(self._missing())

    def matches(self, path: Path) -> bool:
        """True if a file of samples already holds these images.

        Raises:
            RunError: it holds others, which are not written over.
        """
        if not path.exists():
            return False
        try:
            found = open_samples(path).record
        except GraftingError as error:
            raise RunError(f"{path} exists and will not be overwritten: {error}") from error
        if found.get("drawing") != self.description:
            head = f"{path} exists and holds other images: name another file, or remove it"
            raise RunError(listed(head, differences(found.get("drawing"), self.description)))
        return True

    @property
    def is_begun(self) -> bool:
        """True until somebody has found all shards, written the samples file and removed them."""
        return self._shards.is_begun

    def draw(self, model: nn.Module, share: slice = ALL) -> Iterator[Step]:
        """Draw this process's share of what is missing, one step per shard; its `ms_per_image` is this process's own."""
        mine = range(len(self._shards))[share]
        folder, num_images = self._shards.folder, self.config.num_images
        _check_space(folder, self.shape, num_images=num_images, num_drawn=self.num_drawn)
        self._shards.begin()
        todo, unpictured = [], self._without_pictures()
        for shard in mine:
            found = self._shards.load(shard)
            if found is None:
                todo.append(shard)
            elif shard in unpictured:
                self._write_pictures(shard, found[0])
        batches = sample(
            model,
            self.config,
            denoiser=self._denoiser,
            shape=self._sample_shape,
            indices=[i for shard in todo for i in self._shards.images_of(shard)],
        )
        # of those that are damaged there is nothing yet
        num_there = num_images - self._num_in(self._missing().union(todo))
        tally = _Tally(num_there, look=lambda: self.num_drawn, alone=share == ALL)
        started = time.perf_counter()
        for shard, batch in zip(todo, batches, strict=True):
            images = self._decoder(batch.x)
            if not self.is_begun:
                return
            seconds = time.perf_counter() - started
            self._slowest_s = max(self._slowest_s, seconds)
            # pictures first: where there is a shard, there are its pictures
            self._write_pictures(shard, images)
            ms_per_image = round(1000 * seconds / len(images), 3)
            self._shards.write(shard, images, batch.labels, ms_per_image=ms_per_image)
            done = min(tally.more(len(images)), num_images)
            yield self._step(done, {"ms_per_image": ms_per_image})
            started = time.perf_counter()

    def drawn_before(self) -> Iterator[Step]:
        """The steps that led to the shards that are there."""
        done = 0
        for shard in sorted(set(range(len(self._shards))) - self._missing()):
            done += len(self._shards.images_of(shard))
            values = {"ms_per_image": self._shards.ms_per_image(shard)}
            yield Step(done=done, total=self.config.num_images, values=values)

    def wait(self) -> Iterator[Step]:
        """Steps until every process has drawn its share, or another command has written the samples file.

        Raises:
            RunError: nothing has come for long, so that some process must have ended.
        """
        left, since = len(self._missing()), time.monotonic()
        while left and self.is_begun:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            now_left = len(self._missing())
            if now_left < left:
                left, since = now_left, time.monotonic()
                yield self._step(self.num_drawn, {})
            elif time.monotonic() - since > max(_PATIENCE_S, _PATIENCE_SHARDS * self._slowest_s):
                raise RunError(
                    f"{left} of {len(self._shards)} shards in {self._shards.folder} are missing, and none has come for "
                    f"{time.monotonic() - since:.0f} s: another process has ended. Run the same command again to resume"
                )
        if self._told < (done := self.num_drawn):  # others' last, which came between two looks
            yield self._step(done, {})

    def write(self, path: Path) -> None:
        """Write all images as one samples file, atomically, with what drew them; then remove the shards."""
        write_samples(
            path,
            self._shards.batches(),
            num_images=self.config.num_images,
            shape=self.shape,
            origin=self.origin,
            record={"drawing": self.description, "vae": self._decoder.describe()},
        )
        self.discard()

    def discard(self) -> None:
        """Remove the shards, all at once."""
        self._shards.discard()

    def write_pictures_of(self, path: Path) -> None:
        """Write the pictures, if they are wanted and not there, of a samples file that was written before."""
        unpictured = self._without_pictures()
        if unpictured:
            for shard, images in enumerate(open_samples(path).images(self.config.batch_size)):
                if shard in unpictured:
                    self._write_pictures(shard, images)

    @property
    def origin(self) -> Origin:
        """Sampling part of the images' protocol."""
        dtype = str(self.description.get("weights_dtype", "float32"))
        vae = self._decoder.identity
        return origin_of(self.config, weights_dtype=dtype, denoiser=self._denoiser, vae=vae)

    def _missing(self) -> set[int]:
        """The shards that are not there yet, or have no pictures yet; does not read them."""
        return self._shards.missing() | self._without_pictures()

    def _without_pictures(self) -> set[int]:
        """The shards some of whose pictures, if they are wanted, are not there."""
        if self.pictures is None:
            return set()
        return {n // self.config.batch_size for n in self.pictures.missing(range(self.config.num_images))}

    def _num_in(self, shards: set[int]) -> int:
        return sum(len(self._shards.images_of(shard)) for shard in shards)

    def _step(self, done: int, values: dict[str, float]) -> Step:
        self._told = done
        return Step(done=done, total=self.config.num_images, values=values)

    def _write_pictures(self, shard: int, images: UInt8[Tensor, "b c *size"]) -> None:
        if self.pictures is not None:
            self.pictures.write(self._shards.images_of(shard), images)


class _Tally:
    """The number of images that are there: those of this process as it draws them, those of others as they are looked for.

    A look takes longer the more images there are, so the next comes the later the longer one took.
    """

    def __init__(self, count: int, *, look: Callable[[], int], alone: bool):
        self._count, self._look = count, look
        self._next = math.inf if alone else time.monotonic()

    def more(self, num_images: int) -> int:
        """How many there are once this process has drawn more of them."""
        self._count += num_images
        if (began := time.monotonic()) >= self._next:
            self._count = self._look()
            took = time.monotonic() - began
            self._next = began + max(_SECONDS_BETWEEN_LOOKS, _LOOKS_APART * took)
        return self._count


def _check_space(folder: Path, shape: tuple[int, ...], *, num_images: int, num_drawn: int) -> None:
    there, disk = disk_of(folder.absolute().parent)
    needed = math.prod(shape) * (2 * num_images - num_drawn)
    if needed > disk.free:
        raise RunError(
            f"{num_images} images of {list(shape)} need {needed / 1e9:.3g} GB in {there}, for shards "
            f"and then one file; {disk.free / 1e9:.3g} GB are free"
        )


def _check_disk(folder: Path, shape: tuple[int, ...], *, num_images: int) -> None:
    """Refuses more images than the whole disk holds, before they are counted one by one."""
    there, disk = disk_of(folder.absolute().parent)
    needed = math.prod(shape) * num_images
    if needed > disk.total:
        raise RunError(
            f"{num_images} images of {list(shape)} need {needed / 1e9:.3g} GB, and the disk of {there} has {disk.total / 1e9:.3g} GB"
        )


def settled_as_drawn(config: SamplingConfig, folder: Path, path: Path) -> SamplingConfig:
    """With the precision of images that are drawn already, into a file of samples or shards, where the config says `auto`.

    What is wrong with either is for `Drawing` to say.
    """
    begun, device = None, default_device()
    if path.exists():
        with suppress(GraftingError):
            begun = recorded_precision(open_samples(path).record, "drawing", "sampling")
    if begun is not None and config.precision == "auto":
        return config.model_copy(update={"precision": begun})
    with suppress(GraftingError):
        begun = recorded_precision(read_json(folder / INDEX_NAME, JsonObject), "drawing", "sampling")
    return settled_as_begun(config, device, begun=begun, where=folder)


def describe_model(model: nn.Module, *, settings: Any) -> JsonObject:
    """Identity of a model by content, as JSON: its settings, tensors and their type.

    Args:
        settings: all that its tensors do not say, as JSON: arguments of its class, plan.
    """
    tensors = model.state_dict()
    return {
        "model": {"class": type(model).__name__, "sha256": tensors_sha256(tensors, hash_json(settings))},
        "weights_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
