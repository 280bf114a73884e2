"""Features of images for ADM's suite, gathered as they come: a row an image of pooled ones, the statistics of spatial ones."""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from ..metrics.features import FeatureNetwork, Features, extract
from ..metrics.frechet import FeatureStatistics, Gaussian


class Gathered:
    """Rows of pooled features and logits, and the statistics of spatial features."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor]] = []
        self.spatial = FeatureStatistics.of(torch.empty(0, 0))
        self.count = 0

    @classmethod
    def of_state(cls, state: dict[str, Tensor]) -> "Gathered":
        gathered = cls()
        gathered._rows = [{name: state[name] for name in ("features", "logits", "labels") if name in state}]
        names = ("count", "mean", "scatter")
        gathered.spatial = FeatureStatistics.from_tensors({name: state[f"spatial.{name}"] for name in names})
        gathered.count = len(state["features"])
        return gathered

    def add(self, features: Features, labels: Tensor | None = None) -> None:
        assert features.logits is not None
        assert features.spatial is not None
        row = {"features": features.pooled, "logits": features.logits}
        self._rows.append(row if labels is None else row | {"labels": labels.cpu().long()})
        batch = FeatureStatistics.of(features.spatial)
        self.spatial = self.spatial.merge(batch) if self.count else batch
        self.count += len(features.pooled)

    def pooled(self) -> Tensor:
        return torch.cat([rows["features"] for rows in self._rows])

    def gaussians(self) -> tuple[Gaussian, Gaussian]:
        """Of pooled and of spatial features."""
        both = (FeatureStatistics.of_many(self.pooled()), self.spatial)
        pooled, spatial = (Gaussian(statistics.mean, statistics.covariance) for statistics in both)
        return pooled, spatial

    def state(self) -> dict[str, Tensor]:
        spatial = {f"spatial.{name}": tensor for name, tensor in self.spatial.to_tensors().items()}
        names = [name for name in self._rows[0] if all(name in rows for rows in self._rows)]
        return {name: torch.cat([rows[name] for rows in self._rows]) for name in names} | spatial


def spatial_features(network: FeatureNetwork, images: Tensor) -> Features:
    features = extract(network, images)
    if features.spatial is None or features.logits is None:
        raise DataError(
            f"feature network {network.name!r} gives no spatial features or no logits; ADM's suite needs both"
        )
    return features


def check_width(
    where: Path | str, network: FeatureNetwork, features: Tensor, given: Gaussian, name: str
) -> None:
    if features.shape[1] != len(given.mean):
        raise DataError(
            f"reference {where}: {name} is of {len(given.mean)} features, "
            f"feature network {network.name!r} gives {features.shape[1]}"
        )
