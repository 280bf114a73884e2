"""Locality of each attention: the share of its map near the diagonal, and the most and least local blocks.

A kernel that gives what softmax attention gives, bit for bit, and adds up its map by distance, stands at every attention
for as long as one watches; then the model is what it was. It is measured on whatever runs meanwhile: noised images
(`noised_locality`), or, as the paper has it, a sampling chain. Maps exist a few rows at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..contract import (
    ANY_CALL,
    Denoiser,
    Grid,
    Kernel,
    KernelConfig,
    Kwargs,
    Site,
    TokenLayout,
    TrainingData,
    softmax_attention_flops,
)
from ..editing.placed import KernelAttention, Placed
from ..editing.plan import Plan, Replace
from ..editing.surgery import build_operators, grafted, leaving_no_hook
from ..errors import HostError
from ..functional.softmax import softmax_attention
from ..hosts import Host, host_of
from ..machine.randomness import sample_noise
from ..training.supply import shuffled

_CHUNK_SCORES = 2**22  # scores held at a time: 16 MiB


@dataclass(frozen=True)
class SiteLocality:
    """An attention's map, averaged over heads and images and added up by the distance of query and key.

    `raster[d]` is the share at distance d on the raster index, `chebyshev[d]` that at d rows or columns, whichever is
    more, in the same frame.
    """

    block: int
    path: str
    raster: tuple[float, ...]
    chebyshev: tuple[float, ...]

    def band(self, k: int) -> float:
        """The share within k tokens on either side in raster order: L_k, arXiv:2506.05340 Eq. 3."""
        return sum(self.raster[: k + 1])

    def window(self, radius: int) -> float:
        """The share within a square of side 2 * radius + 1 around each token, cut at the image's edge."""
        return sum(self.chebyshev[: radius + 1])


@dataclass(frozen=True)
class Locality:
    """Each site's locality, in the order of blocks, as the mean of `num_maps` maps (images x passes) per site."""

    grid: Grid
    num_maps: int
    sites: tuple[SiteLocality, ...]

    @property
    def default_bands(self) -> tuple[int, ...]:
        """A 32nd, a 16th and an eighth of the tokens; the paper's choice is the last: 32 of 256."""
        return tuple(max(1, self.grid.num_tokens // part) for part in (32, 16, 8))

    def top_local(self, num: int, *, band: int) -> list[int]:
        """The `num` blocks with the most attention inside the band, by number; of equals, those that come first."""
        return self._first(num, lambda site: (-site.band(band), site.block))

    def low_local(self, num: int, *, band: int) -> list[int]:
        """The `num` blocks with the least attention inside the band, by number; of equals, those that come first."""
        return self._first(num, lambda site: (site.band(band), site.block))

    def to_json(self, *, bands: tuple[int, ...] | None = None, radii: tuple[int, ...] = (1,)) -> Kwargs:
        """Shares inside these bands and squares, of every site and, to compare, of attention that is uniform."""
        bands, grid = bands or self.default_bands, self.grid
        image = (grid.rows, grid.cols)
        return {
            "grid": list(image),
            "num_maps": self.num_maps,
            "uniform": {
                "bands": {k: uniform_share(grid.num_tokens, k) for k in bands},
                "windows": {
                    r: uniform_share(grid.rows, r) * uniform_share(grid.cols, r) / grid.frames for r in radii
                },
            },
            "sites": [
                {
                    "block": site.block,
                    "path": site.path,
                    "bands": {k: site.band(k) for k in bands},
                    "windows": {r: site.window(r) for r in radii},
                }
                for site in self.sites
            ],
        }

    def _first(self, num: int, key: Callable[[SiteLocality], tuple[float, int]]) -> list[int]:
        return sorted(site.block for site in sorted(self.sites, key=key)[:num])


def uniform_share(size: int, distance: int) -> float:
    """The share of all pairs of places 0..size - 1 that lie at most `distance` apart."""
    reach = min(distance, size - 1)
    return (size * (2 * reach + 1) - reach * (reach + 1)) / size**2


@contextmanager
def watching_locality(model: nn.Module, *, host: Host | None = None) -> Iterator[Callable[[], Locality]]:
    """While the block runs, every pass of the model is measured; what is yielded gives the result so far, or afterwards.

    The model gives what it gave, and its modules are its own again when the block ends. Sites that hold an operator are
    left out. Where attention is joint, text is left out too: the map is that of image tokens over image tokens, as if
    there were no others.

    The paper's protocol is a chain: `for _ in sample(model, SamplingConfig(sampler="ddim", steps=50, cfg_scale=1.5,
    num_images=250), ...): pass`. With guidance, maps with and without the label count alike.

    Args:
        host: how to read the model, where it is of no known class or its host has settings.

    Raises:
        HostError: no attention of the model's own is left to watch; at the result, that nothing ran.
        PlanError: the model has merged or dropped blocks.
    """
    host = host or host_of(model)
    sites = {site.path: site for site in host.sites(model) if site.role == "attention"}
    with leaving_no_hook(model):
        operators = build_operators(model, _watch_all(model, sites), host=host)
        kernels = {
            sites[path]: cast(_Recording, cast(KernelAttention, operator).kernel)
            for path, operator in operators.items()
        }
        with grafted(model, operators):
            yield lambda: _result(kernels)


@torch.no_grad()
def noised_locality(
    model: nn.Module,
    data: TrainingData,
    *,
    denoiser: Denoiser | None = None,
    host: Host | None = None,
    samples: int = 250,
    batch_size: int = 50,
    seed: int = 0,
) -> Locality:
    """The locality of a model's attention on noised images, one pass each, with steps evenly spread over all.

    The paper measures sampling chains with guidance instead (`watching_locality`); this needs a pass an image, not 100.
    Image i, its noise and its place in the data depend on (seed, i). The model is unchanged, and runs in the mode it is in.

    Raises: as `watching_locality`.
    """
    denoiser = denoiser or (host or host_of(model)).denoiser(model)
    device = next(model.parameters()).device
    order = shuffled(len(data), seed)
    with watching_locality(model, host=host) as result:
        for numbers in torch.arange(samples).split(batch_size):
            x, asked = data.batch(order[numbers % len(order)])
            noise = sample_noise(seed, numbers.tolist(), tuple(x.shape[1:]))
            # at the middles of equal parts
            t = denoiser.process.steps_at((2 * numbers + 1).double() / (2 * samples))
            x, noise, t = (a.to(device) for a in (x, noise, t))
            denoiser(model, denoiser.process.add_noise(x, noise, t), t, asked)
    return result()


def _watch_all(model: nn.Module, sites: Mapping[str, Site]) -> Plan:
    """A recording kernel at every attention that is the model's own."""
    standing = dict(model.named_modules())
    own = [site.block for path, site in sites.items() if not isinstance(standing.get(path), Placed)]
    if not own:
        raise HostError("no attention of the model's own is left to watch: every site holds an operator")
    return Plan(edits=(Replace(role="attention", blocks=tuple(own), operator=_RecordingConfig()),))


class _RecordingConfig(KernelConfig):
    """Softmax attention that keeps account of its map; never part of a recipe."""

    name: Literal["recording-softmax"] = "recording-softmax"
    honours = ANY_CALL

    def build(self, site: Site) -> "_Recording":
        return _Recording()

    def mixing_flops(self, site: Site) -> int:
        return softmax_attention_flops(site, site.num_tokens**2)


class _Recording(Kernel):
    """softmax(scale q k^T) v, and sums of the map by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.grid: Grid | None = None
        self.num_maps = 0
        self.raster = self.chebyshev = torch.zeros(0, dtype=torch.float64)

    def forward(
        self,
        q: Float[Tensor, "b heads m k"],
        k: Float[Tensor, "b heads l k"],
        v: Float[Tensor, "b heads l v"],
        layout: TokenLayout,
        *,
        scale: float | None = None,
    ) -> Float[Tensor, "b heads m v"]:
        image_q, image_k = q[:, :, layout.of_queries.image_slice], k[:, :, layout.image_slice]
        self._record(image_q.detach(), image_k.detach(), layout.grid, scale)
        return softmax_attention(q, k, v, key_mask=layout.key_mask, scale=scale)

    @torch.no_grad()
    def _record(self, q: Tensor, k: Tensor, grid: Grid, scale: float | None) -> None:
        batch, heads, num_tokens, dim = q.shape
        if self.grid is None:
            self.grid = grid
            self.raster = torch.zeros(num_tokens, dtype=torch.float64)
            self.chebyshev = torch.zeros(_far(grid), dtype=torch.float64)
        if grid != self.grid:
            raise HostError(f"locality is measured on one grid: passes had {self.grid} and {grid}")
        q, k, scale = q.float(), k.float(), dim**-0.5 if scale is None else scale
        sums = q.new_zeros(num_tokens), q.new_zeros(_far(grid) + 1)
        rows = max(1, _CHUNK_SCORES // (batch * heads * num_tokens))
        with torch.autocast(q.device.type, enabled=False):
            for queries in torch.arange(num_tokens, device=q.device).split(rows):
                attention = (scale * q[:, :, queries] @ k.mT).softmax(-1).mean(1).sum(0)  # [rows, L]
                for total, distance in zip(sums, _distances(queries, grid), strict=True):
                    total.index_add_(0, distance.flatten(), attention.flatten())
        # not every device has float64
        self.raster += sums[0].cpu().double()
        self.chebyshev += sums[1][:-1].cpu().double()
        self.num_maps += batch


def _far(grid: Grid) -> int:
    """A distance beyond all in one frame, that of tokens in other frames."""
    return max(grid.rows, grid.cols)


def _distances(
    queries: Int[Tensor, " rows"], grid: Grid
) -> tuple[Int[Tensor, "rows l"], Int[Tensor, "rows l"]]:
    """From each of these tokens to every token: on the raster index, and in rows or columns, whichever is more."""
    keys = torch.arange(grid.num_tokens, device=queries.device)

    def apart(place: Callable[[Tensor], Tensor]) -> Tensor:
        return (place(queries)[:, None] - place(keys)).abs()

    rows, cols = apart(lambda i: i // grid.cols % grid.rows), apart(lambda i: i % grid.cols)
    other_frame = apart(lambda i: i // (grid.rows * grid.cols)) > 0
    return apart(lambda i: i), torch.maximum(rows, cols).masked_fill(other_frame, _far(grid))


def _result(kernels: Mapping[Site, _Recording]) -> Locality:
    first = next(iter(kernels.values()))
    if first.grid is None or not all(kernel.num_maps for kernel in kernels.values()):
        raise HostError("locality was watched, but the model did not run")
    return Locality(
        grid=first.grid,
        num_maps=first.num_maps,
        sites=tuple(
            SiteLocality(
                block=site.block,
                path=site.path,
                raster=_shares(kernel.raster, kernel),
                chebyshev=_shares(kernel.chebyshev, kernel),
            )
            for site, kernel in kernels.items()
        ),
    )


def _shares(sums: Tensor, kernel: _Recording) -> tuple[float, ...]:
    assert kernel.grid is not None
    return tuple((sums / (kernel.num_maps * kernel.grid.num_tokens)).tolist())
