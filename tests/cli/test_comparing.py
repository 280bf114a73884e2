"""The sentence that ends a comparison: whether two rows can be told apart, and which is better."""

import pytest

from grafting.cli.comparing import _verdict


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("key", "part", "said"),
    [
        ("frechet", {"ratio": estimate(1.05, 0.99, 1.11)}, "the two cannot be told apart"),
        ("frechet", {"ratio": estimate(1.20, 1.10, 1.31)}, "the first is worse"),
        ("frechet", {"ratio": estimate(0.80, 0.70, 0.91)}, "the first is better"),
        ("exact", {"difference": estimate(0.02, -0.01, 0.05)}, "the two cannot be told apart"),
        ("exact", {"difference": estimate(0.20, 0.10, 0.30)}, "the first is better"),
        ("exact", {"difference": estimate(-0.20, -0.30, -0.10)}, "the first is worse"),
        ("exact", {"difference": estimate(0.0, 0.0, 0.0)}, "the two cannot be told apart"),
    ],
)
def test_the_verdict(key, part, said):
    rows = [{key: 0.5, "num_images": 600}] * 2
    assert _verdict({key: part}, rows).endswith(f"of 600 images {said}")


def test_without_a_comparison_there_is_none():
    assert _verdict({"reason": "x"}, [{"frechet": 0.5, "num_images": 600}] * 2) is None
