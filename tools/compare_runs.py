"""Compares what two runs made, bit for bit: weights, samples, logged losses, figures.

    python tools/compare_runs.py runs/a runs/b

Tensors are those of every safetensors file in the runs' folders, by their names: operators, models, images and labels. Of
`metrics.json` and the logs everything counts but what a clock or the machine says. Prints a line a file and one more for each
difference; exit status 1 if there is any, 2 if a folder holds no run. Imports nothing of the library, so that it compares what
any two versions of it made.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# what depends on when and where a run was made: times, rates, memory; and versions, which a protocol keeps for the record
MEASURED = {
    "ms_per_image", "seconds", "images_per_s", "tokens_per_s", "memory_gib", "mfu", "data_wait", "recorded",
}  # fmt: skip
STAGES = ("calibrate", "distill", "finetune", "model", "samples")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A", help="the folder of a run")
    parser.add_argument("b", type=Path, metavar="B", help="the folder of another")
    args = parser.parse_args()
    for folder in (args.a, args.b):
        if not results_in(folder):
            parser.error(f"{folder} holds no weights, samples or figures of a run")
    return int(report_differences(args.a, args.b) > 0)


def report_differences(a: Path, b: Path) -> int:
    """Prints how the results of two runs differ; returns in how many files they do."""
    names = sorted(results_in(a) | results_in(b))
    different = 0
    for name in names:
        found = list(differences(a / name, b / name))
        different += bool(found)
        print(f"{'DIFFERENT' if found else 'equal':9}  {name}")
        for line in found:
            print(f"           {line}")
    print(f"{different} of {len(names)} files differ" if different else f"{len(names)} files are equal")
    return different


def results_in(folder: Path) -> set[str]:
    """The files in a run's folder that hold results, saved states and shards left out."""
    found = [path for stage in STAGES for path in (folder / stage).rglob("*.safetensors")]
    found += [path for stage in STAGES for path in (folder / stage).rglob("log.jsonl")]
    found += (folder / "metrics.json",)
    names = {path.relative_to(folder) for path in found if path.is_file()}
    return {str(name) for name in names if not {"states", "shards"} & set(name.parts)}


def differences(a: Path, b: Path) -> Iterator[str]:
    """Each difference between two files of results, in words."""
    missing = [path for path in (a, b) if not path.is_file()]
    if missing:
        yield f"there is no {missing[0]}"
    elif a.suffix == ".safetensors":
        yield from tensor_differences(load_file(a), load_file(b))
    else:
        yield from value_differences(read_values(a), read_values(b))


def tensor_differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            yield f"{name}: in {'A' if name in a else 'B'} alone"
        elif (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            described = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (a[name], b[name]))
            yield f"{name}: {' and '.join(described)}"
        else:
            differ = differing_elements(a[name], b[name])
            if differ.any():
                distance = (a[name].flatten()[differ].double() - b[name].flatten()[differ].double()).abs()
                yield f"{name}: {int(differ.sum()):,} of {differ.numel():,} elements, by {distance.max():.3g} at most"


def differing_elements(a: Tensor, b: Tensor) -> Tensor:
    """Which elements, flattened, have other bits: a NaN equals itself, 0 is not -0."""
    bits = [
        tensor.contiguous().flatten().view(torch.uint8).view(-1, tensor.element_size()) for tensor in (a, b)
    ]
    return (bits[0] != bits[1]).any(dim=1)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a JSON or JSON-lines file by their paths in it, without measured ones."""
    text = path.read_text()
    return flat(
        [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    )


def flat(value: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, item in items:
        if key not in MEASURED:
            found |= flat(item, f"{place}.{key}" if place else str(key))
    return found


def value_differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    for place in dict.fromkeys([*a, *b]):
        values = [json.dumps(found[place]) if place in found else "nothing" for found in (a, b)]
        if values[0] != values[1]:
            by = ""
            if all(isinstance(found.get(place), float) for found in (a, b)):
                by = f" ({abs(a[place] - b[place]):.3g} apart)"
            yield f"{place}: {values[0]} and {values[1]}{by}"


if __name__ == "__main__":
    raise SystemExit(main())
