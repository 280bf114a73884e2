"""Classes as a table of conditions, and a denoiser that asks for them by number."""

import pytest
import torch

from grafting.conditions import ClassLabels
from grafting.contract import Conditions
from grafting.errors import DataError, HostError
from grafting.hosts import hosts

CPU = {"shape": (1, 16, 16), "device": torch.device("cpu"), "dtype": torch.float32}


def test_a_label_is_its_own_condition():
    classes = ClassLabels(3, null_label=3, dropout=0.1, names=("cat", "dog", "owl"))
    assert isinstance(classes, Conditions)
    numbers = torch.tensor([2, 0])
    assert torch.equal(classes.at(numbers, **CPU), numbers)
    assert classes.nulls(numbers).tolist() == [3, 3]
    assert (len(classes), classes.words(1), ClassLabels(3).words(1)) == (3, "dog", "class 1")
    assert ClassLabels(3).nulls(numbers) is None
    assert classes.identity == {"name": "classes", "count": 3, "null_label": 3, "dropout": 0.1}


def test_labels_cannot_be_dropped_without_a_null():
    with pytest.raises(DataError, match="dropped in a share of 0.1, but no label stands for no class"):
        ClassLabels(3, dropout=0.1)


def test_a_dit_knows_its_classes_and_shape():
    host = hosts()["dit"]
    model = host.tiny()
    denoiser = host.denoiser(model)
    assert (len(denoiser.conditions), denoiser.conditions.dropout) == (10, 0.1)
    assert host.shape(model) == (1, 16, 16)
    assert host.shape_faults(model, (1, 16, 16)) == []
    assert host.shape_faults(model, (1, 32, 32)) == [
        "dit makes inputs of [1, 16, 16] alone; found [1, 32, 32]"
    ]
    assert denoiser.identity == {}
    x, t, numbers = torch.randn(2, 1, 16, 16), torch.tensor([3, 700]), torch.tensor([9, 10])
    with torch.no_grad():
        assert torch.equal(denoiser(model, x, t, numbers), model(x, t, numbers))


@pytest.mark.parametrize(
    ("name", "shape", "process"),
    [
        ("pixart", (4, 16, 16), {"name": "diffusion"}),
        ("sd3", (4, 16, 16), {"name": "flow", "scale": 1000.0, "shift": 3.0}),
        ("flux", (4, 128, 128), {"name": "flow", "scale": 1.0, "shift": 3.16, "spacing": "even"}),
        ("wan", (4, 16, 32, 32), {"name": "flow", "scale": 1000.0, "shift": 3.0}),
    ],
)
def test_other_hosts_say_what_they_take_and_ask_for_prompts(name, shape, process):
    host = hosts()[name]
    model = host.tiny()
    assert host.shape(model) == shape
    assert host.shape_faults(model, (shape[0], *(side // 2 for side in shape[1:]))) == []
    assert host.shape_faults(model, (3, *shape[1:]))[0].startswith(
        f"{name} takes inputs such as {list(shape)}"
    )
    with pytest.raises(HostError, match="is asked for what prompts say, and none are given"):
        host.denoiser(model)
    denoiser = host.denoiser(model, ClassLabels(2))
    assert denoiser.process.identity == process
    assert denoiser.distilled == (name == "flux")
