"""`doctor` reports facts: here they are compared with what can be found out otherwise."""

import ast
import json
import shlex
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import grafting
from grafting.cli import doctor
from grafting.errors import DataError
from grafting.machine.packages import install_line


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


def test_missing_package_has_no_version():
    present = doctor._look_for(doctor.Package("numpy", "numpy", "arrays"))
    absent = doctor._look_for(doctor.Package("no-such", "no_such_package", "nothing"))
    assert present.version == version("numpy")
    assert absent.version is None


def test_line_that_installs_a_package_asks_for_what_an_extra_asks_for():
    """It does not name this package, which may have come from a clone."""
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    asked = [line for lines in settings["project"]["optional-dependencies"].values() for line in lines]
    for package in doctor.OPTIONAL_PACKAGES:
        program, command, requirement = shlex.split(install_line(package.name))
        assert (program, command) == ("pip", "install")
        assert requirement in asked
    assert install_line("ray", "no-such") == "pip install 'ray>=2.9' no-such"


def test_line_that_installs_a_package_without_an_installed_library(monkeypatch: pytest.MonkeyPatch):
    def missing(_: str) -> None:
        raise PackageNotFoundError

    monkeypatch.setattr("grafting.machine.packages.requires", missing)
    assert install_line("wandb", "trackio") == "pip install wandb trackio"


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
