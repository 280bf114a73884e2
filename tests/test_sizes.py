"""How large files, classes, functions and folders may grow before they are to be split."""

import ast
from pathlib import Path
from statistics import median, quantiles

import grafting

ROOT = Path(grafting.__file__).parent
MAX_FILE, MAX_CLASS = 450, 200
MAX_MEDIAN, MAX_TENTH = 6, 20
"""Lines of a function without its docstring: the median, and what nine in ten keep to."""
MAX_FOLDERS, MAX_MODULES = 19, 10
MAX_UNTYPED = 60
"""Lines with a mapping of which its type says nothing."""


def nodes(kinds: type | tuple[type, ...]) -> list[tuple[Path, ast.AST]]:
    files = [(path, ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py"))]
    return [(path, node) for path, tree in files for node in ast.walk(tree) if isinstance(node, kinds)]


def num_lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def num_own_lines(function: ast.AST) -> int:
    has_docstring = ast.get_docstring(function, clean=False) is not None
    return num_lines(function) - (num_lines(function.body[0]) if has_docstring else 0)


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE}


def test_classes_are_short():
    found = nodes(ast.ClassDef)
    assert len(found) > 100
    assert not {
        (path.name, node.name): num_lines(node) for path, node in found if num_lines(node) > MAX_CLASS
    }


def test_most_functions_are_short():
    lengths = [num_own_lines(node) for _, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef))]
    assert median(lengths) <= MAX_MEDIAN
    assert quantiles(lengths, n=10)[-1] <= MAX_TENTH


def test_the_package_is_one_screen_of_folders():
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("__")]
    assert len(folders) <= MAX_FOLDERS
    assert len(list(ROOT.glob("*.py"))) <= MAX_MODULES


def test_few_mappings_are_untyped():
    text = "\n".join(path.read_text() for path in ROOT.rglob("*.py"))
    assert sum("dict[str, Any]" in line for line in text.splitlines()) <= MAX_UNTYPED
