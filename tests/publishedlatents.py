"""Seven latents as the authors' script wrote them into tars; random, 4x4x4."""

import io

import torch

LATENTS = torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = [5, 0, 999, 5, 1, 2, 3]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def item(number: int) -> dict[str, bytes]:
    """An item's members, as the authors' script wrote them."""
    return {
        f"{number:08}.class_name": b"n01440764",
        f"{number:08}.human_readable_class_name": b"tench",
        f"{number:08}.image_path": f"/data/n01440764/{number}.JPEG".encode(),
        f"{number:08}.label.pth": saved(torch.tensor(LABELS[number])),
        f"{number:08}.latent.pth": saved(LATENTS[number].clone()),
    }


def members(numbers: range) -> dict[str, bytes]:
    return {name: content for number in numbers for name, content in item(number).items()}
