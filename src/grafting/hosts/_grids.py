"""The grid of image tokens of a call, read from the model's arguments by a spec's rule, and the arguments of a grid.

What a rule reads it also makes: `packed`, `positions` and `sizes` are the arguments that give the grid back.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..contract import Grid, Kwargs
from ..errors import HostError
from ._spec import Fact, LatentTokens, PackedTokens

Image: TypeAlias = LatentTokens | PackedTokens

_AXES = {4: "b c h w", 5: "b c f h w"}


def fact(model: nn.Module, value: Fact) -> Any:
    """A number, or the one that the model keeps there, or the quotient of two, or a square root.

    Raises:
        AttributeError, KeyError, IndexError: the model keeps nothing there.
    """
    if not isinstance(value, str):
        return value
    if value.endswith(" ** 0.5"):
        return math.isqrt(fact(model, value.removesuffix(" ** 0.5")))
    first, *others = (_kept(model, part.strip()) for part in value.split("/"))
    return first // others[0] if others else first


def _kept(model: nn.Module, place: str) -> Any:
    found: Any = model
    for name in place.split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    return found


def patch_sizes(model: nn.Module, image: Image) -> tuple[int, int, int]:
    """Sides of a patch along frames, rows and columns; 1 along frames where the model says nothing."""
    if isinstance(image, PackedTokens):
        return 1, image.patch, image.patch
    size = image.patch_size
    found = [fact(model, part) for part in size] if isinstance(size, tuple) else fact(model, size)
    sides = [found, found] if isinstance(found, int) else list(found)
    frames, rows, cols = [1, *sides][-3:]
    return frames or 1, rows, cols


def grid_of_images(model: nn.Module, image: Image, x: Tensor) -> Grid:
    """The image tokens of images [B, C, H, W] or videos [B, C, F, H, W]."""
    sides = patch_sizes(model, image)
    *frames, rows, cols = x.shape[2:]
    return Grid(rows // sides[1], cols // sides[2], *(n // sides[0] for n in frames))


def latent_grid(model: nn.Module, image: LatentTokens, latent: Tensor | Sequence[Tensor]) -> Grid:
    """The grid of a latent, or of a list of them, one a sample.

    Raises:
        HostError: samples of one list have several sizes, or the axes are not those of the spec.
    """
    if not isinstance(latent, Tensor):
        if len({x.shape for x in latent}) > 1:
            raise HostError(
                f"{image.argument} has images of {len({x.shape for x in latent})} sizes: the operators of a graft take those of "
                "one size in a batch"
            )
        latent = latent[0]
    axes = (image.axes or _AXES.get(latent.ndim, "")).split()
    if len(axes) != latent.ndim:
        raise HostError(
            f"{image.argument} has {latent.ndim} axes, {list(latent.shape)}; its spec says {' '.join(axes) or '4 or 5'}"
        )
    size = dict(zip(axes, latent.shape, strict=True))
    sides = zip("fhw", patch_sizes(model, image), strict=True)
    frames, rows, cols = (size.get(axis, 1) // side or 1 for axis, side in sides)
    return Grid(rows, cols, frames)


def packed_grid(image: PackedTokens, arguments: Mapping[str, Any]) -> Grid:
    """The grid of packed tokens, from their positions or from sizes."""
    if image.positions is not None:
        num_tokens = arguments[image.argument].shape[1]
        start = sum(arguments[name].shape[1] for name in image.after)
        positions = arguments[image.positions]
        rows = positions.reshape(-1, positions.shape[-1])[start : start + num_tokens]
        return _grid_of_positions(rows, num_tokens, image)
    assert image.sizes is not None
    if isinstance(image.sizes, str):
        sizes = arguments[image.sizes]
        while isinstance(sizes[0], Sequence):
            sizes = sizes[0]
    else:
        sizes = [arguments[name] for name in image.sizes]
    frames, rows, cols = [1, *map(int, sizes)][-3:]
    return Grid(rows, cols, frames)


def _grid_of_positions(positions: Tensor, num_tokens: int, image: PackedTokens) -> Grid:
    """The grid that positions [L, n] form, in raster order."""
    columns = [*image.columns]
    places = positions[:, columns].round().long().cpu()  # [L, 2 or 3]; waits for the device once
    sizes = (places.amax(0) - places.amin(0) + 1).tolist()
    is_whole = math.prod(sizes) == num_tokens
    raster = torch.cartesian_prod(*map(torch.arange, sizes)) if is_whole else None
    if raster is None or not torch.equal(places - places.amin(0), raster):
        *frames, rows, cols = sizes
        of_frames = f"{frames[0]} frames, " if frames else ""
        raise HostError(
            f"{image.positions} is not one grid in raster order: {num_tokens} image tokens, {of_frames}{rows} rows and "
            f"{cols} columns"
        )
    *frames, rows, cols = sizes
    return Grid(rows, cols, *frames)


def pack(x: Tensor, side: int) -> Tensor:
    """Patches as tokens, channels the slowest: [B, C, (F,) H, W] -> [B, L, C side^2]."""
    *lead, rows, cols = x.shape
    x = x.reshape(*lead, rows // side, side, cols // side, side)
    x = x.movedim((-3, -1), (2, 3)).flatten(1, 3)  # [B, C side^2, (F,) rows, cols]
    return x.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: Grid, side: int, *, is_video: bool) -> Tensor:
    """Undo `pack`."""
    x = tokens.transpose(1, 2).unflatten(2, (grid.frames, grid.rows, grid.cols))
    x = x.unflatten(1, (-1, side, side)).permute(0, 1, 4, 5, 2, 6, 3).flatten(5).flatten(3, 4)
    return x if is_video else x.squeeze(2)


def image_arguments(image: Image, x: Tensor, grid: Grid, beside: Any = None) -> Kwargs:
    """Images as the model takes them, and what says their grid.

    Args:
        beside: what stands behind their channels, as the model takes it.
    """
    if isinstance(image, LatentTokens):
        latent = as_argument(x, image.axes)
        if image.beside:
            if beside is None or not isinstance(latent, Tensor):
                raise HostError(
                    f"{image.argument} holds {image.beside} channels behind the image's: a condition gives them under its name"
                )
            latent = torch.cat([latent, beside.to(latent)], dim=channel_axis(image, latent))
        return {image.argument: latent}
    places = {image.positions: positions_of(image, grid).to(x)} if image.positions else {}
    tokens = pack(x, image.patch)
    tokens = tokens.unflatten(2, (-1, 1, image.patch, image.patch)) if image.whole else tokens
    return {image.argument: tokens, **places, **sizes_of(image, grid, len(x))}


def images_of(
    image: Image,
    output: Tensor | Sequence[Tensor],
    grid: Grid,
    *,
    is_video: bool,
    order: Sequence[str] = ("image",),
) -> Tensor:
    """The images, or videos, in what the model returns for image tokens of this grid.

    Args:
        order: of the tokens of all kinds, all of which some models return.

    Raises:
        HostError: others stand on both sides of the image's.
    """
    if isinstance(image, LatentTokens):
        return as_images(output, image.axes, is_video=is_video)
    assert isinstance(output, Tensor)
    count = output.shape[1]
    if count != grid.num_tokens and "image" not in (order[0], order[-1]):
        raise HostError(
            f"the model returns {count} tokens, and which {grid.num_tokens} are the image's is not known"
        )
    start = count - grid.num_tokens if order[-1] == "image" else 0
    own = output[:, start : start + grid.num_tokens]
    return unpack(own.flatten(2), grid, image.patch, is_video=is_video)


def sizes_of(image: PackedTokens, grid: Grid, batch_size: int) -> Kwargs:
    """The arguments that say the grid by numbers."""
    numbers = (grid.frames, grid.rows, grid.cols)
    if isinstance(image.sizes, str):
        return {image.sizes: [[numbers]] * batch_size}
    names = image.sizes or ()
    return dict(zip(names, numbers[-len(names) :], strict=True)) if names else {}


def positions_of(image: PackedTokens, grid: Grid) -> Tensor:
    """A place for every token of a grid, [L, n]: zero but for the frame, the row and the column."""
    places = torch.cartesian_prod(torch.arange(grid.frames), torch.arange(grid.rows), torch.arange(grid.cols))
    ids = torch.zeros(len(places), image.width)
    ids[:, list(image.columns)] = places[:, -len(image.columns) :].float()
    return ids


def as_argument(x: Tensor, axes: str | None) -> Tensor | list[Tensor]:
    """Images [B, C, H, W] or videos [B, C, F, H, W] with these axes; without `b`, a list; without `h`, the first row."""
    if axes is None:
        return x
    have, wanted = _AXES[x.ndim].split(), axes.replace("n", "f").split()
    if len({*wanted}) < len(wanted) or not {*wanted} <= {*_AXES[5].split()}:
        raise HostError(
            f"images and videos have no axes {axes}: kernels can be grafted, but stages have no such inputs"
        )
    if "f" in wanted and "f" not in have:
        x, have = x.unsqueeze(2), _AXES[5].split()
    if "h" not in wanted:
        x, have = x.select(have.index("h"), 0), [axis for axis in have if axis != "h"]
    permuted = x.permute([have.index(axis) for axis in (wanted if "b" in wanted else ["b", *wanted])])
    return permuted if "b" in wanted else list(permuted.unbind())


def channel_axis(image: LatentTokens, latent: Tensor) -> int:
    return (image.axes or _AXES[latent.ndim]).split().index("c")


def as_images(x: Tensor | Sequence[Tensor], axes: str | None, *, is_video: bool) -> Tensor:
    """Undo `as_argument`."""
    stacked = x if isinstance(x, Tensor) else torch.stack(list(x))
    if axes is None:
        return stacked
    found = axes.replace("n", "f").split()
    found = found if "b" in found else ["b", *found]
    images = stacked.permute([found.index(axis) for axis in _AXES[5].split() if axis in found])
    images = images if "h" in found else images.unsqueeze(-2)
    return images if is_video or images.ndim == 4 else images.squeeze(2)
