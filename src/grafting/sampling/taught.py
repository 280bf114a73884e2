"""Latents that a model makes itself, as data to train its grafts on: no image is decoded, and none is needed.

Latent i depends on (seed, i) and its condition alone, so any number of processes fill the folder, and a killed one resumes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ..contract import Denoiser, Step
from ..data.latentfolder import FORMAT, Dtype, LatentFolder
from ..data.latents import LatentsConfig, LatentSet
from ..machine.devices import default_device
from ..machine.files import hash_json
from ..machine.precision import settled
from ..machine.processes import ALL
from ..machine.reading import JsonObject
from .chain import CIRCUMSTANCES, SamplingConfig, sample


class TaughtConfig(SamplingConfig):
    """Latents that the source makes itself, once, before it is edited: for grafts without data."""

    name: Literal["teacher"] = "teacher"
    num_images: PositiveInt = 1000
    """Number of latents to make."""
    sampler: Literal["ddpm", "ddim", "dpm-solver++", "euler", "heun"] = "dpm-solver++"
    """Sampler, as of `sample`."""
    steps: Annotated[PositiveInt, Field(le=1000)] = 20
    """Steps per latent."""
    cfg_scale: float = 1.0
    """Guidance scale. 1 = off: latents are then what the source takes the data to be."""
    batch_size: PositiveInt = 16
    """Latents per batch."""

    @property
    def passes(self) -> int:
        """Passes through the model per latent."""
        return self.calls * (1 if self.cfg_scale == 1 else 2)

    def pinned(self) -> "TaughtConfig":
        """This config: it names no file."""
        return self

    def describe(self) -> JsonObject:
        """Identity of the data in a run's manifest, beside the source's."""
        return self.model_dump(mode="json", exclude=set(CIRCUMSTANCES))


class Taught:
    """Training data that are made before they are first asked for: latents in `folder`, once `teach` has filled it."""

    def __init__(self, config: TaughtConfig, *, shape: tuple[int, ...], num_classes: int):
        self.config, self.num_classes = config, num_classes
        self.shape = config.shape or shape
        self.folder: Path | None = None

    def __len__(self) -> int:
        return self.config.num_images

    def __str__(self) -> str:
        return "the source's own latents"

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._latents.batch(indices)

    @cached_property
    def _latents(self) -> LatentSet:
        assert self.folder is not None
        return LatentsConfig(folder=self.folder).load()


def teach(
    model: nn.Module,
    config: SamplingConfig,
    folder: Path,
    *,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    identity: Mapping[str, Any],
    source: str,
    dtype: Dtype = "fp16",
    per_shard: int = 256,
    share: slice = ALL,
) -> Iterator[Step]:
    """Fill `folder` with this process's share of `config.num_images` latents; a step is a batch.

    The folder is an ordinary one of latents, bound to the prompts that they were made for. Whatever was done before is not done again.

    Args:
        shape: of a sample; `config.shape` goes before it.
        identity: what the latents depend on beside the config, as JSON: the model, and versions.
        source: names the model in the index.
        dtype: of the stored latents.

    Raises:
        RunError: the folder holds something else, or the disk has not the space; at the call, before any work.
        DataError: latents that are not finite.
    """
    config = settled(config, default_device())
    shape = config.shape or shape
    asked = config.model_dump(mode="json", exclude=set(CIRCUMSTANCES))
    facts = {"format": FORMAT, "made_by": dict(identity), "sampling": asked, **denoiser.identity}
    target = LatentFolder(
        folder=folder,
        facts={**facts, "dtype": dtype},
        num_images=config.num_images,
        per_shard=per_shard,
        shape=shape,
        dtype=dtype,
        num_classes=len(denoiser.conditions),
    )
    target.check()

    def steps() -> Iterator[Step]:
        with target.working(share) as missing:
            step = target.start(missing, share)
            yield step
            for number in missing:
                made, labels = [], []
                for batch in sample(
                    model, config, denoiser=denoiser, shape=shape, indices=target.images_of(number)
                ):
                    made.append(batch.x)
                    labels += batch.labels.tolist()
                    step = replace(step, done=step.done + len(batch.x))
                    if len(labels) == len(target.images_of(number)):
                        names = [str(i) for i in target.images_of(number)]
                        target.write(number, torch.cat(made), labels, names=names, unreadable={})
                    yield step
        target.finish(
            {
                "source": source,
                "source_sha256": hash_json(facts),
                "vae": "none: the model made them",
                "scale": 1.0,
                "stored": "samples",
                "conditions_sha256": getattr(denoiser.conditions, "sha256", None),
            },
            max_unreadable=0,
        )

    return steps()
