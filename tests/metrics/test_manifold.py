import pytest
import torch
from prdc import compute_prdc

from grafting.metrics.manifold import density_coverage, neighbour_radii, neighbourhoods, precision_recall


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(("m", "n", "shift"), [(120, 120, 0.0), (150, 80, 0.4), (70, 130, 1.5)])
def test_equals_prdc(k, m, n, shift):
    real, generated = torch.randn(m, 6).double(), torch.randn(n, 6).double() + shift
    want = compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    found = precision_recall(real, generated, k=k), density_coverage(real, generated, k=k)
    got = {name: getattr(part, name) for part in found for name in part._fields[:2]}
    assert got == pytest.approx(want, abs=1e-12)
    for part in found:
        assert [float(rows.double().mean()) for rows in part[2:]] == pytest.approx(part[:2])


def test_chunks_do_not_matter():
    real, generated = torch.randn(53, 4), torch.randn(41, 4)
    for metric in (precision_recall, density_coverage):
        for a, b in zip(metric(real, generated, chunk_size=8), metric(real, generated), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_never_holds_all_pairs():
    real, generated = torch.randn(600, 2), torch.randn(500, 2)
    largest = 0
    original = torch.addmm

    def watched(norms, x, y, **options):
        nonlocal largest
        largest = max(largest, norms.numel())
        return original(norms, x, y, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "addmm", watched)
        precision_recall(real, generated, chunk_size=50)
        density_coverage(real, generated, chunk_size=50)
    assert largest == 50 * 600


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_float32_decides_as_float64(offset, spread):
    """Rows that lie far from the origin or close together, copies among them."""
    real = (torch.randn(200, 8) * spread + offset).float()
    generated = torch.cat([real[:20], (torch.randn(150, 8) * spread + offset).float()])
    want = compute_prdc(real.double().numpy(), generated.double().numpy(), nearest_k=3)
    radii = (real.double()[:, None] - real.double()).norm(dim=2).sort().values[:, 3]
    assert torch.equal(neighbour_radii(real, 3), radii)
    distances = (real.double()[:, None] - generated.double()).norm(dim=2)
    assert torch.equal(precision_recall(real, generated).precise, (distances < radii[:, None]).any(0))
    assert precision_recall(real, generated, radii=radii).precision == pytest.approx(want["precision"])


def test_radii_by_hand():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert neighbour_radii(line, 1).tolist() == [1, 1, 2, 4]
    assert neighbour_radii(line, 2).tolist() == [3, 2, 3, 6]


def test_far_apart_is_none_of_it():
    real, generated = torch.randn(50, 3), torch.randn(50, 3) + 100
    assert precision_recall(real, generated)[:2] == (0, 0)
    assert density_coverage(real, generated)[:2] == (0, 0)


def test_one_repeated_real_image_is_precise_and_recalls_nothing():
    real = torch.randn(60, 3)
    generated = real[:1].expand(60, 3)
    precision, recall, *_ = precision_recall(real, generated)
    assert precision == 1
    assert recall == 0


def test_refuses_too_few_rows():
    with pytest.raises(ValueError, match="k = 3 needs more than 3 feature rows; there are 3"):
        precision_recall(torch.randn(9, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="k = 5 needs more than 5 feature rows; there are 5"):
        density_coverage(torch.randn(5, 2), torch.randn(9, 2))


def test_neighbours_are_in_one_group():
    far_apart = torch.arange(4.0).repeat_interleave(50)[:, None] * 1000 + torch.rand(200, 1)
    groups = neighbourhoods(far_apart, count=20)
    assert len(groups.unique()) == 20
    for number in groups.unique():
        assert len((far_apart[groups == number] // 1000).unique()) == 1
