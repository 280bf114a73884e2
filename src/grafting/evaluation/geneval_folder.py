"""Images in GenEval's folders, as its own scorer reads them: `00000/metadata.jsonl` and `00000/samples/0000.png`, by prompt.

Source: djghosh13/geneval, `README.md`, `evaluation/evaluate_images.py`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from ..machine.files import atomic_folder, hash_json, sha256_of
from ..machine.reading import picture_size, read_picture
from ..sampling.files import SampleFile
from .geneval_rules import PromptFile


def write_folder(folder: Path, samples: SampleFile, prompts: PromptFile, *, batch_size: int = 64) -> None:
    """Write samples [N, 3, H, W], whose labels are numbers of prompts, as GenEval's folders, atomically.

    Raises:
        DataError: the folder exists, the images have no labels or are not of 3 channels, or a label is no prompt's number.
    """
    if folder.exists():
        raise DataError(f"{folder} exists: name a new folder")
    if len(samples.shape) != 3 or samples.shape[0] != 3:
        raise DataError(
            f"{samples.path} holds images of {list(samples.shape)}; GenEval's are colour images [3, H, W]"
        )
    if samples.labels is not None and not bool(
        ((samples.labels >= 0) & (samples.labels < len(prompts.prompts))).all()
    ):
        raise DataError(
            f"{samples.path} has labels {int(samples.labels.min())} to {int(samples.labels.max())}; "
            f"{prompts.path} has prompts 0 to {len(prompts.prompts) - 1}"
        )
    done: Counter[int] = Counter()
    with atomic_folder(folder) as made:
        for images, labels in samples.batches(batch_size):
            for image, number in zip(images, labels.tolist(), strict=True):
                place = made / f"{number:05}" / "samples"
                if not done[number]:
                    place.mkdir(parents=True)
                    (place.parent / "metadata.jsonl").write_text(prompts.prompts[number].line() + "\n")
                pixels = np.ascontiguousarray(image.movedim(0, -1).numpy())
                Image.fromarray(pixels).save(place / f"{done[number]:04}.png")
                done[number] += 1


def open_folder(folder: Path) -> SampleFile:
    """Images in GenEval's folders, by prompt; their labels are the numbers of the folders.

    Raises:
        DataError: no image there, or images of unlike sizes.
    """
    found = [
        (int(place.name), image)
        for place in sorted(p for p in folder.iterdir() if p.name.isdigit() and p.is_dir())
        for image in sorted((place / "samples").glob("*.png"))
    ]
    if not found:
        raise DataError(
            f"no samples file {folder}: it is a folder; a run's samples are its samples/ROW.safetensors, and images in GenEval's "
            "layout are 00000/samples/0000.png"
        )
    paths = [path for _, path in found]
    sizes = Counter(picture_size(path) for path in paths)
    if len(sizes) > 1:
        (first, many), (other, few) = sizes.most_common(2)
        raise DataError(f"{folder} has images of unlike sizes: {many} of {first}, {few} of {other} ...")
    width, height = next(iter(sizes))
    content = {str(path.relative_to(folder)): sha256_of(path) for path in paths}
    return SampleFile(
        path=folder,
        num_images=len(found),
        shape=(3, height, width),
        labels=torch.tensor([number for number, _ in found]),
        origin={
            "sampling": {"source": "folder", "sha256": hash_json(content)},
            "labels": "as in the folder",
            "weights_dtype": "unknown",
        },
        record={"files": [str(path) for path in paths]},
        read=lambda size: _read(paths, size),
    )


def names_of(samples: SampleFile) -> list[str]:
    """A name for each image: its file, or the file of all with its number."""
    files = samples.record.get("files")
    if isinstance(files, list) and len(files) == samples.num_images:
        return list(map(str, files))
    return [f"{samples.path}:{number}" for number in range(samples.num_images)]


def _read(paths: list[Path], size: int) -> Iterator[Tensor]:
    for first in range(0, len(paths), size):
        pictures = [read_picture(path) for path in paths[first : first + size]]
        yield torch.stack([torch.from_numpy(np.asarray(p).copy()).movedim(-1, 0) for p in pictures])
