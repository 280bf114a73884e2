"""The sites of a model and their facts, as its spec names them."""

from collections.abc import Iterator
from functools import partial

from torch import nn

from ..contract import BlockCall, Grid, Site
from ._grids import fact
from ._host import as_linear
from ._spec import BlockList, SdpaSpec


def sites_of(spec: SdpaSpec, model: nn.Module, grid: Grid) -> Iterator[Site]:
    """Every attention and MLP, block by block.

    Raises:
        AttributeError, KeyError, IndexError, TypeError: the model has no such module or fact.
    """
    for number, (path, blocks) in enumerate(_block_paths(spec, model)):
        site, attention = _site(spec, model, number, blocks, grid), f"{path}.{blocks.attention}"
        model.get_submodule(attention)
        num_heads = fact(model, blocks.num_heads or spec.num_heads)
        yield site(role="attention", path=attention, num_heads=num_heads, module=blocks.mixers)
        if blocks.mlp is not None:
            mlp = f"{path}.{blocks.mlp}"
            width = _hidden_width(spec, model.get_submodule(mlp), num_heads * fact(model, spec.head_dim))
            yield site(role="mlp", path=mlp, hidden_dim=width, module=blocks.mlp_call)


def blocks_of(spec: SdpaSpec, model: nn.Module, grid: Grid) -> Iterator[Site]:
    """Blocks of the lists whose calls the spec describes."""
    first: dict[str, int] = {}
    for number, (path, blocks) in enumerate(_block_paths(spec, model)):
        place = number - first.setdefault(blocks.path, number)
        count = len(model.get_submodule(blocks.path))  # type: ignore[arg-type]  # a ModuleList
        fixed = blocks.fixed.get(place, blocks.fixed.get(place - count, ""))
        site, call = _site(spec, model, number, blocks, grid), BlockCall(blocks.arguments, blocks.returns)
        if blocks.returns:
            yield site(role="block", path=path, call=call, fixed=fixed)


def _block_paths(spec: SdpaSpec, model: nn.Module) -> Iterator[tuple[str, BlockList]]:
    for blocks in spec.blocks:
        for i, _ in enumerate(model.get_submodule(blocks.path).children()):
            yield f"{blocks.path}.{i}", blocks


def _site(spec: SdpaSpec, model: nn.Module, number: int, blocks: BlockList, grid: Grid) -> "partial[Site]":
    """A site in this block, which still wants a role and a place."""
    return partial(
        Site,
        block=number,
        dim=fact(model, blocks.num_heads or spec.num_heads) * fact(model, spec.head_dim),
        grid=grid,
        num_text=spec.native_num_text,
        attention=blocks.call(spec.order),
    )


def _hidden_width(spec: SdpaSpec, mlp: nn.Module, dim: int) -> int:
    placed = getattr(mlp, "site", None)  # where an operator stands already, it knows its site
    if isinstance(placed, Site):
        return placed.hidden_dim
    if spec.mlp is None:
        return 4 * dim
    down = mlp.get_submodule(spec.mlp.down)
    return as_linear(
        getattr(down, "base_layer", down)
    ).in_features  # an adapter's own layer has another class
