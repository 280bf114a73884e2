"""Reads mutated files of every kind, and says how many did not end as they should: all of these figures are to be 0.

    python benchmarks/fuzz.py --inputs 20000

The last line is JSON: `inputs`, `tracebacks`, `hangs`, `written`. Each fault is told as it is found, with its number, by which
`--first N --inputs 1` reads it again. The mutations are those of `tests/mutations.py`.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from mutations import targets_in, trials


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        targets = targets_in(Path(folder))
        numbers = range(asked.first, asked.first + asked.inputs)
        for name, number, outcome in trials(targets, Path(folder), numbers=numbers, seed=asked.seed):
            found[outcome.fault] += 1
            if outcome.fault:
                print(f"{name} {number}: {outcome.fault}: {outcome.said}", flush=True)
    told = {"tracebacks": found["traceback"], "hangs": found["hang"], "written": found["written"]}
    print(json.dumps({"inputs": asked.inputs, **told}))


if __name__ == "__main__":
    main()
