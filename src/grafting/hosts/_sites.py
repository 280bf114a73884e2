"""The sites of a model and their facts, as its spec names them."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from ..contract import BlockCall, Grid, Role, Site
from ..errors import HostError
from ..machine.reading import cut
from ._grids import fact
from ._host import as_linear
from ._spec import BlockList, PackedTokens, SdpaSpec, Time


def native_grid(spec: SdpaSpec, model: nn.Module) -> Grid:
    """The image tokens that the model was trained for: as its config says, where the spec knows that, and no more than it has
    positions for. Raises as `sites_of`."""
    grid = spec.native_grid
    if spec.own_grid is not None:
        *frames, rows, cols = (fact(model, side) for side in spec.own_grid)
        grid = Grid(rows, cols, *frames)
    most = _most(spec, model, grid)
    return Grid(min(grid.rows, most[1]), min(grid.cols, most[2]), min(grid.frames, most[0]))


def grid_faults(spec: SdpaSpec, model: nn.Module, grid: Grid) -> list[str]:
    """Why the model has no positions for a grid; empty if it has. Raises as `sites_of`."""
    asked, most = (grid.frames, grid.rows, grid.cols), _most(spec, model, grid)
    if all(size <= limit for size, limit in zip(asked, most, strict=True)):
        return []
    sides = slice(0 if spec.native_grid.frames > 1 else 1, 3)
    found, allowed = (" x ".join(str(size) for size in list(sizes)[sides]) for sizes in (asked, most))
    return [f"{found} tokens; this {type(model).__name__} has positions for {allowed}"]


def _most(spec: SdpaSpec, model: nn.Module, grid: Grid) -> tuple[int, int, int]:
    """The most frames, rows and columns that the model has positions for; the grid's own where that is not limited."""
    *frames, rows, cols = (fact(model, side) for side in spec.most or (grid.rows, grid.cols))
    return frames[0] if frames else grid.frames, rows, cols


def sites_of(spec: SdpaSpec, model: nn.Module, grid: Grid) -> Iterator[Site]:
    """Every attention and MLP, block by block.

    Raises:
        AttributeError, KeyError, IndexError, TypeError: the model has no such module or fact. HostError: it has no blocks.
    """
    paths = [*_block_paths(spec, model)]
    if not paths:
        lists = ", ".join(blocks.path for blocks in spec.blocks)
        raise HostError(
            f"this {type(model).__name__} has no blocks, in {lists}: there is nothing that could be replaced"
        )
    for number, (path, blocks) in enumerate(paths):
        site, attention = partial(_site, spec, model, number, blocks, grid), blocks.attention_of(path)
        block = model.get_submodule(path)
        if blocks.attention:
            part_of(block, blocks.attention, "attention")
        num_heads = fact(model, blocks.num_heads or spec.num_heads)
        yield site(role="attention", path=attention, num_heads=num_heads, module=blocks.mixers)
        if blocks.mlp is not None:
            mlp = f"{path}.{blocks.mlp}"
            module = part_of(block, blocks.mlp, "mlp")
            sizes = _sizes_of_mlp(spec, module, num_heads * fact(model, spec.head_dim))
            yield site(role="mlp", path=mlp, module=blocks.mlp_call, **sizes)


def blocks_of(spec: SdpaSpec, model: nn.Module, grid: Grid) -> Iterator[Site]:
    """Blocks of the lists whose calls the spec describes."""
    first: dict[str, int] = {}
    for number, (path, blocks) in enumerate(_block_paths(spec, model)):
        place = number - first.setdefault(blocks.path, number)
        count = len(model.get_submodule(blocks.path))  # type: ignore[arg-type]  # a ModuleList
        fixed = blocks.fixed.get(place, blocks.fixed.get(place - count, ""))
        apart = blocks.apart.get(place, "")
        if blocks.returns:
            call = BlockCall(blocks.arguments, blocks.returns, apart)
            yield _site(spec, model, number, blocks, grid, role="block", path=path, call=call, fixed=fixed)


def _block_paths(spec: SdpaSpec, model: nn.Module) -> Iterator[tuple[str, BlockList]]:
    for blocks in spec.blocks:
        for i, _ in enumerate(part_of(model, blocks.path, "path").children()):
            yield f"{blocks.path}.{i}", blocks


def _site(
    spec: SdpaSpec, model: nn.Module, number: int, blocks: BlockList, grid: Grid, *, role: Role, **facts: Any
) -> Site:
    """A site in or of this block."""
    return Site(
        role=role,
        block=number,
        dim=fact(model, blocks.num_heads or spec.num_heads) * fact(model, spec.head_dim),
        grid=grid,
        num_text=0 if role in blocks.image_alone else spec.native_num_text,
        attention=blocks.call(spec.order),
        **facts,
    )


def _sizes_of_mlp(spec: SdpaSpec, mlp: nn.Module, dim: int) -> dict[str, int]:
    placed = getattr(mlp, "site", None)  # where an operator stands already, it knows its site
    if isinstance(placed, Site):
        return {"hidden_dim": placed.hidden_dim, "num_weights": placed.num_weights}
    if spec.mlp is None:
        return {"hidden_dim": 4 * dim}
    part_of(mlp, spec.mlp.up, "mlp.up")
    down = part_of(mlp, spec.mlp.down, "mlp.down")
    linears = [m for name, m in mlp.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    return {
        # an adapter's own layer has another class
        "hidden_dim": as_linear(getattr(down, "base_layer", down)).in_features,
        "num_weights": sum(linear.in_features * linear.out_features for linear in linears),
    }


def part_of(module: nn.Module, path: str, key: str) -> nn.Module:
    """The part of a module that a key of the spec names.

    Raises:
        AttributeError: there is no such part; names the key and the parts that there are.
    """
    whole, names = module, path.split(".")
    for i, name in enumerate(names):
        part = getattr(whole, name, None)
        if not isinstance(part, nn.Module):
            where = (
                f"{'.'.join(names[:i])} is a {type(whole).__name__}, which"
                if i
                else f"a {type(whole).__name__}"
            )
            has = ", ".join(dict(whole.named_children())) or "no parts"
            raise AttributeError(f"{key} says {path!r}, and {where} has {cut(has)}")
        whole = part
    return whole


def check_arguments(spec: SdpaSpec, model: nn.Module) -> None:
    """Raise an AttributeError where the spec's image or time is an argument that the model's forward does not take."""
    takes = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    image = spec.image
    said = [("image.argument", image.argument)]
    if spec.time.argument != Time().argument:  # what stands where nothing is known of it
        said.append(("time.argument", spec.time.argument))
    if isinstance(image, PackedTokens):
        sizes = (image.sizes,) if isinstance(image.sizes, str) else image.sizes or ()
        said += [("image.positions", image.positions)] if image.positions else []
        said += [("image.after", name) for name in image.after]
        said += [("image.sizes", name) for name in sizes]
    for key, name in said:
        if name not in takes:
            raise AttributeError(f"{key} says {name!r}, and its forward takes {', '.join(takes)}")
