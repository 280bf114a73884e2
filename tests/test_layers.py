"""Who may import whom: a module imports lower layers alone, or files of its own folder, and in an open set only those
that begin with an underscore. So an operator knows no host and no other operator, and stages do not know each other.
"""

import ast
import re
from pathlib import Path

import pytest

import grafting

ROOT = Path(grafting.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"

# from the ground up: a room sees all rooms above it in this list, and none of its own line
LAYERS = (
    {"errors", "words", "portable"},
    {"machine", "tokens"},
    {"contract"},
    {"conditions", "samplers"},
    {"functional", "diffusion"},
    {"models"},
    {"operators", "hosts", "metrics", "data"},
    {"editing"},
    {"weights"},
    {"cost"},
    {"latents"},
    {"sampling"},
    {"training", "evaluation"},
    {"analysis", "report"},
    {"runs"},
    {"cli"},
    {"__main__", "__init__"},
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# open sets, whose files are added and removed one by one
INDEPENDENT = {"operators", "hosts", "metrics"}

# stages, which do not know each other
STAGES = {"calibration", "distillation", "finetuning"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> set[tuple[str, ...]]:
    """Every module or name of this package that a file imports, as parts below the package."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {tuple(name[1:]) for name in names if name[0] == "grafting"}
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                parts = (*package[: len(package) + 1 - node.level], *parts)
            elif parts[:1] != ("grafting",):
                continue
            else:
                parts = parts[1:]
            found |= {(*parts, alias.name) for alias in node.names}
    return found


def faults(path: Path) -> list[str]:
    own = path.relative_to(ROOT).with_suffix("").parts
    return [
        f"{'.'.join(own)} imports {'.'.join(other)}" for other in imported(path) if not _allowed(own, other)
    ]


def _allowed(own: tuple[str, ...], other: tuple[str, ...]) -> bool:
    home, target = own[0], other[0]
    if home != target:
        return LAYER[target] < LAYER[home]
    if home == "training" and own[-1] in STAGES and other[1] in STAGES:
        return False
    return home not in INDEPENDENT or own[-1] == "__init__" or other[1].startswith("_")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_what_is_below_it(path):
    assert path.relative_to(ROOT).with_suffix("").parts[0] in LAYER, "give this module a layer"
    assert not faults(path)


def test_the_rule_sees_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for room in ("operators", "training", "weights"):
        (tmp_path / room).mkdir()
    forbidden = {
        "operators/hyena.py": "from ..hosts import host_of",
        "operators/mha.py": "from .softmax import Softmax",
        "contract.py": "import grafting.runs",
        "training/distillation.py": "def f():\n    from .finetuning import finetune",
        "training/batches.py": "from ..evaluation import evaluate",
        "weights/folder.py": "from grafting.cost.plan import plan_cost",
    }
    for name, text in forbidden.items():
        (tmp_path / name).write_text(text)
        assert len(faults(tmp_path / name)) == 1, name
    allowed = {
        "operators/hyena.py": "from ._registry import x\nfrom ..contract import Kernel",
        "cli.py": "from .runs.run import run\nimport torch",
    }
    for name, text in allowed.items():
        (tmp_path / name).write_text(text)
        assert not faults(tmp_path / name), name


def test_the_table_for_contributors_is_this_order():
    rows = re.findall(r"^\| ((?:`\w+/?` )+)\|", CONTRIBUTING.read_text(), re.MULTILINE)
    rooms = [re.findall(r"`(\w+/?)`", row) for row in rows]
    assert tuple({room.rstrip("/") for room in row} for row in rooms) == LAYERS[:-1]
    assert all((ROOT / room).is_dir() == room.endswith("/") for row in rooms for room in row)
