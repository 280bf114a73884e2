"""Phases of stage 2 run one after another, resume anywhere, and train in memory of their own only what they say."""

import copy

import pytest
import torch

from grafting.editing.adapters import adapters_of
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft, sharing_copy
from grafting.errors import CheckpointError, TrainingError
from grafting.hosts import hosts
from grafting.training.finetuning import finetune
from grafting.training.phases import FinetuneConfig
from toydata import denoiser, noise_images

HOST = hosts()["dit"]
PLAN = Plan(edits=(Replace(role="attention", blocks=[1], operator={"name": "hyena-x", "kernel_size": 3}),))
BASE = {"steps": 2, "batch_size": 4, "lr": 1e-2, "warmup_steps": 0, "ema_decay": 0.5, "precision": "fp32"}
BLOCKS = [f"blocks.{i}" for i in range(3)]
LORA = {"lora": {"rank": 2, "alpha": 4}}
GUARD = {"policy": "rollback", "window": 2}
PHASES = {
    "operators, then all": [{"trainable": "new"}, {"batch_size": 8}],
    "operators, then adapters": [{"trainable": "new"}, {"trainable": LORA, "steps": 3}],
    "adapters twice, then operators": [
        {"trainable": LORA, "guard": GUARD},
        {"trainable": {"lora": {"rank": 1, "targets": ["blocks.*.mlp.fc1"]}}},
        {"trainable": ["new"], "guard": GUARD},
    ],
    "a phase of no steps": [{"trainable": "new"}, {"trainable": LORA, "steps": 0}, {"trainable": "all"}],
    "held in bf16": [
        {"trainable": ["blocks.0.*"], "precision": "bf16"},
        {"trainable": ["new", LORA], "precision": "bf16", "frozen": "bf16", "output_weight": 1.0},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher():
    return HOST.tiny().eval()


def student_of(teacher):
    student = sharing_copy(teacher)
    graft(student, PLAN)
    return student


def run(teacher, phases, *, student=None, state=None, **arguments):
    if any("lora" in str(phase) for phase in phases):
        pytest.importorskip("peft")
    configs = [FinetuneConfig(**BASE | phase) for phase in phases]
    student = student_of(teacher) if student is None else student
    options = {"denoiser": denoiser(), "blocks": BLOCKS, "teacher": teacher, "state": state}
    steps = finetune(student, noise_images(32, size=16), configs, **options | arguments)
    return student, steps


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("name", PHASES)
def test_resumed_in_any_step_equals_undisturbed(teacher, name):
    before = weights(teacher)
    whole, steps = run(teacher, PHASES[name])
    states = {step.done: copy.deepcopy(step.state()) for step in steps}
    want = weights(whole)
    assert list(states) == list(range(1, len(states) + 1))
    for done, state in states.items():
        resumed, rest = run(teacher, PHASES[name], state=state)
        assert [step.done for step in rest] == list(range(done + 1, len(states) + 1))
        assert_equal(weights(resumed), want)
    assert_equal(weights(teacher), before)
    assert want.keys() == weights(student_of(teacher)).keys()
    assert all(p.dtype == torch.float32 for p in whole.parameters())


def test_steps_count_on_and_say_their_phase(teacher):
    _, steps = run(teacher, [{"trainable": "new", "steps": 3}, {"lr": 1e-3, "warmup_steps": 2}])
    told = [(s.done, s.total, s.values["phase"], s.values["lr"]) for s in steps]
    # each phase has a schedule of its own
    assert told == [(1, 5, 1, 1e-2), (2, 5, 1, 1e-2), (3, 5, 1, 1e-2), (4, 5, 2, 5e-4), (5, 5, 2, 1e-3)]


def test_a_phase_begins_with_the_averages_of_the_one_before(teacher):
    one, steps = run(teacher, [{"trainable": "new"}])
    list(steps)
    both, steps = run(teacher, [{"trainable": "new"}, {"trainable": "all", "steps": 0}])
    list(steps)
    assert_equal(weights(both), weights(one))


def test_one_phase_in_a_list_is_that_phase(teacher):
    alone, listed = (copy.deepcopy(student_of(teacher)) for _ in range(2))
    data, options = noise_images(32, size=16), {"denoiser": denoiser()}
    config = FinetuneConfig(**BASE)
    values = [[s.values for s in finetune(alone, data, config, **options)]]
    values += [[s.values for s in finetune(listed, data, [config], **options)]]
    assert values[0] == values[1]
    assert "phase" not in values[0][0]
    assert_equal(weights(alone), weights(listed))


def test_phases_do_not_see_the_same_batches(teacher):
    """The learning rate is next to nothing, so the losses tell the batches apart."""
    phases = [{"lr": 1e-12, "steps": 2}, {"lr": 1e-12, "steps": 2}]
    _, twice = run(teacher, phases)
    _, once = run(teacher, [{"lr": 1e-12, "steps": 4}])
    assert [s.values["loss"] for s in twice] == pytest.approx([s.values["loss"] for s in once], rel=1e-5)


def storages(model):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


@pytest.mark.parametrize(
    ("trainable", "own"),
    [
        ("new", ["new"]),
        (LORA, ["lora"]),
        (["new", LORA], ["new", "lora"]),
        (["blocks.0.mlp.*"], ["blocks.0.mlp"]),
    ],
)
def test_what_is_not_trained_lies_in_the_memory_of_the_teacher(teacher, trainable, own):
    student, steps = run(teacher, [{"trainable": trainable}])
    operators = {name for name, _ in student.named_parameters() if name.startswith("blocks.1.attn.")}
    next(steps)
    of_teacher = storages(teacher)
    apart = {n for n, p in student.named_parameters() if p.untyped_storage().data_ptr() not in of_teacher}
    want = set(operators)  # built apart, trained or not
    want |= {n for n, _ in student.named_parameters() if ".lora_" in n and "lora" in own}
    want |= {
        n for n, _ in student.named_parameters() if n.startswith("blocks.0.mlp.") and "blocks.0.mlp" in own
    }
    assert apart == want
    # in bytes: beside the teacher there is what is trained, and no more
    both = storages(student) | of_teacher
    assert sum(both.values()) == sum(of_teacher.values()) + sum(
        p.untyped_storage().nbytes() for n, p in student.named_parameters() if n in want
    )
    list(steps)


@pytest.mark.parametrize("trainable", ["new", LORA, ["blocks.0.mlp.*"]])
def test_a_state_holds_what_is_trained_alone(teacher, trainable):
    student, steps = run(teacher, [{"trainable": trainable}])
    state = next(steps).state()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert state["model"].keys() == trained
    assert len(state["ema"]["shadow_params"]) == len(trained) < len(list(student.parameters()))
    list(steps)
    assert all(p.requires_grad for n, p in student.named_parameters() if n != "pos_embed")


def test_a_state_of_the_whole_model_is_read(teacher):
    whole, steps = run(teacher, [{"trainable": "new"}])
    states = [copy.deepcopy(s.state()) for s in steps]
    full = weights(student_of(teacher)) | states[0]["model"]
    resumed, rest = run(teacher, [{"trainable": "new"}], state=states[0] | {"model": full})
    assert [s.done for s in rest] == [2]
    assert_equal(weights(resumed), weights(whole))
    lacking = dict(list(full.items())[:5])
    with pytest.raises(CheckpointError, match=r"state is of another model\n  missing tensor blocks.1.attn"):
        list(run(teacher, [{"trainable": "new"}], state=states[0] | {"model": lacking})[1])


def test_linear_layers_held_in_bf16_compute_the_same_and_come_back(teacher):
    settings = {"trainable": ["new", LORA], "precision": "bf16", "output_weight": 1.0}
    full, steps = run(teacher, [settings])
    want = [s.values["loss"] for s in steps]
    held, steps = run(teacher, [settings | {"frozen": "bf16"}])
    got = [next(steps).values["loss"]]
    linear, of_teacher = held.blocks[0].attn.qkv.base_layer.weight, teacher.blocks[0].attn.qkv.weight
    assert linear.dtype == of_teacher.dtype == torch.bfloat16
    assert linear.data_ptr() == of_teacher.data_ptr()
    assert {p.dtype for p in held.blocks[1].attn.parameters()} == {torch.float32}
    got += [s.values["loss"] for s in steps]
    assert got == want
    assert_equal(weights(held), weights(full))
    assert teacher.blocks[0].attn.qkv.weight.dtype == torch.float32
    assert held.final_layer.linear.weight.data_ptr() == teacher.final_layer.linear.weight.data_ptr()


def test_weights_in_bf16_take_adapters_in_fp32(teacher):
    pytest.importorskip("peft")
    model = copy.deepcopy(teacher).bfloat16()
    config = FinetuneConfig(**BASE | {"precision": "bf16"})
    steps = finetune(model, noise_images(32, size=16), config, trainable=LORA, denoiser=denoiser())
    losses = [next(steps).values["loss"]]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert losses + [s.values["loss"] for s in steps]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    changed = [
        n for n, t in model.state_dict().items() if not torch.equal(t, teacher.state_dict()[n].bfloat16())
    ]
    assert changed
    assert all(".attn." in n or ".mlp." in n for n in changed)


def test_adapters_stay_where_they_are_to_be_saved(teacher):
    kept, steps = run(teacher, [{"trainable": {"lora": {"rank": 2, "adapter": "saved"}}}])
    list(steps)
    merged, steps = run(teacher, [{"trainable": {"lora": {"rank": 2}}}])
    list(steps)
    paths = {f"blocks.{i}.{m}" for i in range(3) for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert adapters_of(kept).keys() == paths - {"blocks.1.attn.qkv", "blocks.1.attn.proj"}
    with pytest.raises(TrainingError, match=r"the model holds adapters .* merge_adapters\(model\) first"):
        next(run(teacher, [{}], student=kept)[1])
    for path, adapter in adapters_of(kept).items():
        assert torch.equal(adapter.merged(), merged.get_parameter(f"{path}.weight"))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "no phases"),
        ([{"trainable": "new"}, {"trainable": ["nothing.*"]}], r"trainable: nothing\.\* selects none of the model's"),
        ([{}, {"trainable": {"lora": {"targets": ["*.to_q"]}}}], r"'\*\.to_q' names none of the model's \d+ linear"),
        ([{"trainable": ["*", LORA]}], "names no linear layer that is not trained itself: leave lora out"),
        ([{"trainable": {"lora": {"adapter": "saved"}}}, {}], "phase 1: lora.adapter: saved is for the last phase"),
        ([{"frozen": "bf16", "precision": "auto"}], "requires precision: bf16, and auto is fp32 on this device"),
        ([{}, {"batch_size": 5, "accumulate": 2}], "stage 2, phase 2: batch_size 5 counts all processes"),
    ],
)  # fmt: skip
def test_faults_of_any_phase_are_found_before_the_first(teacher, phases, message, monkeypatch):
    monkeypatch.setenv("GRAFTING_PRECISION", "fp32")
    student = student_of(teacher)
    before = weights(student)
    with pytest.raises(TrainingError, match=message):
        next(run(teacher, phases, student=student)[1])
    assert_equal(weights(student), before)


def test_peft_is_asked_for_where_it_is_missing(teacher, monkeypatch):
    from grafting.editing import surgery
    from grafting.errors import MissingBackend

    monkeypatch.setattr(surgery, "find_spec", lambda name: None)
    config = FinetuneConfig(**BASE | {"trainable": LORA})
    with pytest.raises(MissingBackend, match=r"lora needs peft: pip install 'peft>=0.17'"):
        next(finetune(student_of(teacher), noise_images(32, size=16), config, denoiser=denoiser()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "outputs"}, "objective is process, output or their weights, found outputs"),
        ({"objective": {"process": 1, "other": 2}}, "found other"),
        ({"objective": "output", "output_weight": 1.0}, "would say again: give one"),
        ({"trainable": [LORA, LORA]}, "one lora at most"),
        ({"trainable": ["all", LORA]}, "all stands alone"),
        ({"trainable": {"lora": {"rank": 0}}}, "greater than 0"),
        ({"trainable": {"lore": {}}}, "lore"),
        ({"frozen": "bf16", "precision": "fp32"}, "requires precision: bf16"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**settings)


def test_an_objective_is_its_weights():
    assert FinetuneConfig(objective="output") == FinetuneConfig(diffusion_weight=0.0, output_weight=1.0)
    assert FinetuneConfig(objective="process") == FinetuneConfig()
    both = FinetuneConfig(objective={"process": 1, "output": 0.5})
    assert (both.diffusion_weight, both.output_weight) == (1.0, 0.5)
    assert FinetuneConfig(**both.model_dump()) == both
