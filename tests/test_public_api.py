"""The public names: each is where the stub says, works, and importing the package alone is quick."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import grafting

STUB = ast.parse(Path(grafting.__file__).with_suffix(".pyi").read_text())
EXPORTS = [(f"grafting.{node.module}", a) for node in STUB.body[1:] for a in node.names]
NAMES = [alias.name for _, alias in EXPORTS]

# what the README, the notebook and people's scripts are written against: removing one is a breaking change
PROMISED = [
    "AttentionWeights",
    "BundledSubsetConfig",
    "CalibrateConfig",
    "CheckpointError",
    "DataError",
    "DiT",
    "Diffusion",
    "DistillConfig",
    "Drop",
    "Evaluation",
    "Evaluator",
    "FashionMnistConfig",
    "FinetuneConfig",
    "FreshModel",
    "Graft",
    "GraftingError",
    "Grid",
    "Host",
    "HostError",
    "ImageFolderConfig",
    "Kernel",
    "KernelConfig",
    "Locality",
    "Merge",
    "MissingBackend",
    "Mixer",
    "MixerConfig",
    "MlpWeights",
    "ModuleNetwork",
    "OperatorConfig",
    "Plan",
    "PlanError",
    "Protocol",
    "ProtocolError",
    "Recipe",
    "RecipeError",
    "Reference",
    "Replace",
    "RunError",
    "SamplingConfig",
    "SettingsError",
    "Site",
    "Step",
    "Sweep",
    "TaughtConfig",
    "TokenLayout",
    "TrainingError",
    "TrajectoriesConfig",
    "build_operators",
    "calibrate",
    "convert_weights",
    "distill",
    "evaluate",
    "finetune",
    "graft",
    "grafted",
    "host_of",
    "load",
    "load_model",
    "load_recipe",
    "load_sweep",
    "merge_delta",
    "noised_locality",
    "operator_configs",
    "place",
    "ratio",
    "run",
    "run_sweep",
    "sample",
    "save_delta",
    "save_model",
    "watching_locality",
    "write_grid",
    "write_report",
]


def test_stub_holds_nothing_but_explicit_reexports():
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in STUB.body[1:])
    assert all(alias.asname == alias.name for _, alias in EXPORTS)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(("module", "name"), [(module, alias.name) for module, alias in EXPORTS])
def test_name_is_what_its_module_defines(module: str, name: str):
    value = getattr(grafting, name)
    assert value is getattr(sys.modules[module], name)
    assert getattr(value, "__doc__", None), f"{name} says nothing about itself"


def test_promised_names_are_there():
    assert set(PROMISED) <= set(NAMES)
    assert set(NAMES) <= set(dir(grafting))


def test_no_public_name_hides_a_module():
    package = Path(grafting.__file__).parent
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(NAMES)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'grafting' has no attribute 'frobnicate'"):
        _ = grafting.frobnicate


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, grafting, grafting.cli; print([m for m in ('torch', 'diffusers', 'pydantic') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_data_and_what_measures_need_no_diffusers():
    code = (
        "import sys, grafting.data, grafting.evaluation, grafting.training; print('diffusers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_every_function_that_takes_a_path_takes_a_string():
    functions = [getattr(grafting, name) for name in NAMES]
    paths = {
        f"{function.__name__}({name})": parameter.annotation
        for function in functions
        if inspect.isfunction(function)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is Path or Path in get_args(parameter.annotation)
    }
    later = {"distill(cache_folder)", "finetune(state)"}  # folders of a run, which names them
    assert {name for name, annotation in paths.items() if str not in get_args(annotation)} == later
    assert len(paths) > 15
