"""Stage 2 lowers the loss, resumes exactly, trains only what it is told to, and stops at NaN."""

import copy
import threading
from dataclasses import replace

import pytest
import torch

from grafting.data.latents import LatentsConfig, write_latents
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.errors import DataError, TrainingError
from grafting.hosts import hosts
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.training.phases import with_objectives
from plainprocess import in_a_plain_process
from toydata import denoiser, noise_images

HOST = hosts()["dit"]
BASE = {"steps": 6, "batch_size": 8, "lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9}


def _run(model, *, state=None, teacher=None, new_parameters=frozenset(), data=None, blocks=(), **settings):
    return finetune(
        model,
        data or noise_images(32, size=16),
        FinetuneConfig(**BASE | settings),
        denoiser=denoiser(),
        blocks=blocks,
        teacher=teacher,
        new_parameters=new_parameters,
        state=state,
    )


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_loss_falls():
    model = HOST.tiny()
    losses = [s.values["loss"] for s in _run(model, steps=60, batch_size=16, lr=3e-3)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"gradient_checkpointing": True}])
def test_resumed_equals_uninterrupted(settings):
    start = HOST.tiny()
    whole, part, resumed = (copy.deepcopy(start) for _ in range(3))
    list(_run(whole, **settings))
    state = next(copy.deepcopy(s.state()) for s in _run(part, **settings) if s.done == 3)
    assert [s.done for s in _run(resumed, state=state, **settings)] == [4, 5, 6]
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


def test_ends_with_averaged_weights():
    model = HOST.tiny()
    steps = list(_run(model))
    assert not model.training
    shadow = steps[-1].state()["ema"]["shadow_params"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(shadow, trained, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_nothing(precision):
    start = HOST.tiny()
    plain, checkpointed = copy.deepcopy(start), copy.deepcopy(start)
    list(_run(plain, steps=2, precision=precision))
    list(_run(checkpointed, steps=2, gradient_checkpointing=True, precision=precision))
    for name, tensor in plain.state_dict().items():
        # in bf16 attention is rounded too where it is computed again
        atol = 1e-6 if precision == "fp32" else 5e-3
        assert torch.allclose(tensor, checkpointed.state_dict()[name], atol=atol), name


def test_averages_on_the_cpu_are_the_same():
    start = HOST.tiny()
    here, there = copy.deepcopy(start), copy.deepcopy(start)
    list(_run(here))
    [*_, last] = _run(there, ema_device="cpu")
    assert all(shadow.device.type == "cpu" for shadow in last.state()["ema"]["shadow_params"])
    assert all(torch.equal(t, there.state_dict()[n]) for n, t in here.state_dict().items())


@pytest.mark.slow
def test_compiled_blocks_change_nothing():
    in_a_plain_process(check_compiled_blocks)


def check_compiled_blocks():
    """Block by block: one compiled block serves all of its kind, and the model is as it was when training ends."""
    start = HOST.tiny()
    plan = Plan(
        edits=(Replace(role="attention", blocks=[1], operator={"name": "hyena-x", "kernel_size": 3}),)
    )
    graft(start, plan)
    plain, compiled = copy.deepcopy(start), copy.deepcopy(start)
    want = [s.values for s in _run(plain)]
    got = [s.values for s in _run(compiled, compile=True, blocks=[f"blocks.{i}" for i in range(3)])]
    for values, wanted in zip(got, want, strict=True):
        assert values == pytest.approx(wanted, rel=1e-3)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert not any("forward" in vars(block) for block in compiled.blocks)


def test_trains_only_new_operators():
    model = HOST.tiny()
    record = graft(
        model, Plan(edits=(Replace(role="attention", blocks=[1], operator="softmax"),)).randomised()
    )
    before = _weights(model)
    list(_run(model, trainable="new", new_parameters=record.new_parameters))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == record.new_parameters


def test_trains_only_named_parameters():
    model = HOST.tiny()
    before = _weights(model)
    list(_run(model, trainable=("blocks.*.mlp.fc1.weight",)))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"blocks.{i}.mlp.fc1.weight" for i in range(3)}


def test_output_distillation_reaches_the_teacher():
    teacher = HOST.tiny().eval()
    student = copy.deepcopy(teacher)
    graft(student, Plan(edits=(Replace(role="attention", operator="softmax"),)).randomised())
    settings = {"diffusion_weight": 0.0, "output_weight": 1.0, "steps": 60, "lr": 3e-3, "batch_size": 16}
    losses = [s.values["output"] for s in _run(student, teacher=teacher, **settings)]
    assert losses[-1] < 0.5 * losses[0]


def test_equal_models_have_no_output_loss():
    """The teacher sees the student's own dropped labels, so only operators can make a difference."""
    teacher = HOST.tiny().eval()
    settings = {"diffusion_weight": 0.0, "output_weight": 1.0, "steps": 1, "batch_size": 32}
    [step] = _run(copy.deepcopy(teacher), teacher=teacher, **settings)
    assert step.values["output"] == 0.0


def test_nan_stops_before_the_weights_are_touched():
    model = HOST.tiny()
    model.blocks[1].mlp.fc1.bias.data[0] = float("nan")
    before = _weights(model)
    with pytest.raises(
        TrainingError, match="stage 2: the model's own weights are not finite: blocks.1.mlp.fc1.bias, row 0"
    ):
        list(_run(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diffusion_weight": 0.0}, "no objective"),
        ({"output_weight": 1.0}, "there is no teacher"),
        ({"trainable": ("nothing.*",)}, "selects none of the model's"),
        ({"trainable": "new"}, "selects none"),
        ({"compile": True}, "to compile block by block, but no blocks"),
        ({"accumulate": 3}, "batch_size 8 counts all processes; it must be a multiple of"),
    ],
)
def test_faults_are_found_before_any_work(settings, message):
    with pytest.raises(TrainingError, match=message):
        next(iter(_run(HOST.tiny(), **settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": -1},
        {"lr": 0},
        {"batch_size": 0},
        {"ema_decay": 1.0},
        {"stepz": 1},
        {"ema_device": "cpu", "shard": True},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FinetuneConfig(**settings)


def _readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("grafting-loader")}


def test_threads_that_read_end_when_the_loop_is_left():
    of_others = _readers()
    steps = _run(HOST.tiny())
    assert next(steps).seconds_waited > 0
    assert _readers() - of_others
    steps.close()
    assert not _readers() - of_others


def test_a_shard_lost_while_training_ends_it_with_its_name(tmp_path):
    images, labels = noise_images(32, size=16).batch(torch.arange(32))
    facts = {"source": "toy", "vae": "none", "scale": 1.0, "num_classes": 10, "shard_size": 16}
    write_latents(tmp_path, [(images, labels)], **facts)
    data = LatentsConfig(folder=tmp_path).load()
    done, of_others = [], _readers()
    with pytest.raises(DataError, match=r"latents-00001.safetensors is missing"):
        for step in _run(HOST.tiny(), data=data, steps=12):
            done.append(step.done)
            (tmp_path / "latents-00001.safetensors").unlink(missing_ok=True)
    # what was read ahead is still trained on
    assert done == list(range(1, len(done) + 1))
    assert 1 <= len(done) <= 5
    assert not _readers() - of_others


def test_half_precision_weights_are_not_trained():
    model = HOST.tiny().bfloat16()
    before = _weights(model)
    with pytest.raises(TrainingError, match="the weights to train are bfloat16, .* call model.float"):
        list(_run(model, precision="bf16"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({}, (0.0, 1.0)),
        ({"output_weight": 0.5}, (0.0, 0.5)),
        ({"diffusion_weight": 1.0}, (1.0, 0.0)),
        ({"diffusion_weight": 0.2, "output_weight": 0.5}, (0.2, 0.5)),
    ],
)
def test_a_distilled_model_is_trained_on_its_teachers_output(settings, objective):
    """The process's loss is used where it is named."""
    config = FinetuneConfig(**settings)
    (found,) = with_objectives((config,), by_output=True)
    assert (found.diffusion_weight, found.output_weight) == objective
    assert with_objectives((config,), by_output=False) == (config,)
    assert with_objectives((found,), by_output=True) == (found,)


def test_a_distilled_model_needs_its_teacher():
    config, distilled = FinetuneConfig(**BASE), replace(denoiser(), distilled=True)
    with pytest.raises(TrainingError, match="there is no teacher"):
        next(finetune(HOST.tiny(), noise_images(32, size=16), config, denoiser=distilled))
