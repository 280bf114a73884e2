"""`doctor` reports facts: here they are compared with what can be found out otherwise."""

import ast
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import grafting
from grafting.cli import doctor
from grafting.errors import DataError


@pytest.fixture(scope="module")
def found() -> doctor.Diagnosis:
    return doctor.examine()


def test_facts_are_those_of_this_process(found: doctor.Diagnosis):
    assert found.versions["torch"] == version("torch")
    assert found.threads == torch.get_num_threads() == 1
    assert found.cores >= 1
    assert 0 < found.memory_free_gib <= found.memory_gib
    assert found.device in ("cpu", "cuda:0", "cuda", "mps")


def test_matrix_products_are_measured_in_training_dtypes(found: doctor.Diagnosis):
    assert {"float32", "bfloat16"} <= found.gflops.keys()
    assert all(gflops > 0 for gflops in found.gflops.values())


def test_compile_is_not_tried_unless_asked(found: doctor.Diagnosis, monkeypatch: pytest.MonkeyPatch):
    assert ("not tried" in found.compile) == (found.compiler is not None)
    monkeypatch.setenv("PATH", "")
    assert doctor.find_compiler() is None


def test_missing_package_comes_with_the_line_that_installs_it(found: doctor.Diagnosis):
    present = doctor._look_for(doctor.Package("numpy", "numpy", "arrays", "pip install numpy"))
    absent = doctor._look_for(doctor.Package("no-such", "no_such_package", "nothing", "pip install no-such"))
    assert present.version == version("numpy")
    assert absent.version is None
    assert all(package.install.startswith("pip install ") for package in found.packages)


def test_extras_that_are_named_exist():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for package in doctor.OPTIONAL_PACKAGES:
        if "grafting[" in package.install:
            extra = package.install.partition("[")[2].partition("]")[0]
            line = next(line for line in extras.splitlines() if line.startswith(f"{extra} = "))
            assert package.name in line


def test_packages_are_those_that_the_library_imports():
    source = Path(grafting.__file__).parent
    imported = {name for path in source.rglob("*.py") if path.name != "doctor.py" for name in _imports(path)}
    assert {package.module for package in doctor.OPTIONAL_PACKAGES} <= imported


def test_damaged_asset_is_a_problem():
    def damaged() -> None:
        raise DataError("the bundled file x is damaged")

    assert doctor._state_of(damaged) == "the bundled file x is damaged"
    assert doctor._state_of(dict) == "intact"


def test_problems_are_assets_that_are_not_intact(found: doctor.Diagnosis):
    bad = [name for name, state in found.assets.items() if state != "intact"]
    assert [problem.partition(":")[0] for problem in found.problems] == bad


def test_diagnosis_is_json(found: doctor.Diagnosis):
    described = json.loads(json.dumps(found.to_json()))
    assert described["packages"][0]["name"] == "datasets"
    assert described["problems"] == found.problems


@pytest.mark.slow
def test_full_examination_compiles():
    if doctor.find_compiler() is not None:
        assert doctor.try_compile().startswith("works")


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {a.name.partition(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return plain | {
        n.module.removeprefix("torch.utils.").partition(".")[0]  # torch wraps tensorboard
        for n in nodes
        if isinstance(n, ast.ImportFrom) and n.module and not n.level
    }
