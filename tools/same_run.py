"""Proves that two versions of the library train, sample and measure alike: runs one recipe with both, compares bit for bit.

    python tools/same_run.py                   # HEAD~ and the working tree, with what is not committed
    python tools/same_run.py main my-branch    # two commits
    python tools/same_run.py --recipe recipes/testbed/self_graft.yaml --keep runs/same

Each commit is checked out into a temporary worktree and runs its own recipe file, the quickstart by default, with fewer steps
and images, in fp32, on one thread, with this interpreter; what is installed beside the library is the same for both. Then
`compare_runs.py` compares the folders. Exit status 1 if they differ. About two minutes on one core.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from compare_runs import report_differences

ROOT = Path(__file__).resolve().parents[1]
WORKING_TREE = "."

CHANGES = {
    "distill": {"steps": 12, "cooldown_steps": 6, "holdout_every": 6, "precision": "fp32"},
    "finetune": {"steps": 12, "warmup_steps": 2, "cooldown_steps": 6, "precision": "fp32"},
    "sample": {"steps": 4, "num_images": 64, "batch_size": 32, "precision": "fp32"},
    "save_every": 5,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", nargs="?", default="HEAD~", metavar="A", help="a commit (default HEAD~)")
    parser.add_argument(
        "b", nargs="?", default=WORKING_TREE, metavar="B", help="another; . is the working tree (default)"
    )
    parser.add_argument(
        "--recipe", default="recipes/testbed/quickstart.yaml", help="its path in the repository"
    )
    parser.add_argument("--keep", type=Path, help="leave the runs' folders here, a and b; it must be new")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-run-") as temporary:
        folder = args.keep or Path(temporary) / "runs"
        folder.mkdir(parents=True)
        for side in ("a", "b"):
            with checkout(getattr(args, side), Path(temporary) / side) as tree:
                run_recipe(tree, tree / args.recipe, folder.resolve() / side)
        return int(report_differences(folder / "a", folder / "b") > 0)


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of a commit, in a worktree that is removed again; the working tree is where it is."""
    if commit == WORKING_TREE:
        print("Working tree", flush=True)
        yield ROOT
        return
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        print(f"{commit}: {git('log', '-1', '--format=%h %s', commit)}", flush=True)
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def run_recipe(tree: Path, recipe: Path, out: Path) -> None:
    """Carries out a tree's recipe, made shorter, with the library of that tree, in a process of its own."""
    source = tree / "src"
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import grafting; print(grafting.__file__)"],
        env=environment, cwd=tree, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    if not Path(found).is_relative_to(source):
        raise SystemExit(f"the library of {source} was to be used; Python imports {found}")
    shorter = out.with_suffix(".yaml")
    shorter.write_text(yaml.safe_dump({"base": str(recipe), **CHANGES}))
    started = time.monotonic()
    # a recipe's paths, if it has any, are relative to the repository
    subprocess.run(
        [sys.executable, "-m", "grafting", "run", str(shorter), "--out", str(out)],
        env=environment, cwd=tree, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
