"""Stage 1 recovers what can be recovered, resumes exactly, and keeps one site's graph at a time."""

import copy

import pytest
import torch

from closeness import assert_close
from grafting.editing.plan import Drop, Merge, Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.errors import CheckpointError, SettingsError, TrainingError
from grafting.functional.losses import regression_loss
from grafting.hosts import hosts
from grafting.training.distillation import DistillConfig, distill
from plainprocess import in_a_plain_process
from toydata import denoiser, noise_images

HOST = hosts()["dit"]


def _setup(operator, role="attention", blocks="all"):
    teacher = HOST.tiny().eval()
    plan = Plan(edits=(Replace(role=role, blocks=blocks, operator=operator),))
    return teacher, build_operators(teacher, plan)


def _run(teacher, operators, *, state=None, cache_folder=None, **settings):
    config = DistillConfig(**{"steps": 6, "batch_size": 8, "holdout": 16, "holdout_every": 3} | settings)
    return distill(
        teacher,
        operators,
        noise_images(64, size=16),
        config,
        denoiser=denoiser(),
        cache_folder=cache_folder,
        state=state,
    )


def test_kept_softmax_is_fitted_from_the_start():
    teacher, operators = _setup("softmax")
    first = next(iter(_run(teacher, operators)))
    assert first.values["r2/blocks.0.attn"] == 1.0
    assert first.values["holdout_loss/blocks.2.attn"] == 0.0


def test_random_attention_recovers():
    teacher, operators = _setup({"name": "softmax", "projections": "random"}, blocks=[1])
    steps = list(_run(teacher, operators, steps=150, batch_size=32, lr=1e-2, holdout_every=150))
    before, after = steps[0].values["r2/blocks.1.attn"], steps[-1].values["r2/blocks.1.attn"]
    assert before < 0.2
    assert after > 0.6


def test_teacher_is_unchanged_and_all_sites_learn():
    teacher, operators = _setup({"name": "softmax", "projections": "random"})
    weights = {n: t.clone() for n, t in teacher.state_dict().items()}
    initial = copy.deepcopy(operators)
    list(_run(teacher, operators))
    assert all(torch.equal(weights[n], t) for n, t in teacher.state_dict().items())
    for path, operator in operators.items():
        for (name, new), old in zip(operator.named_parameters(), initial[path].parameters(), strict=True):
            assert not torch.equal(new, old), f"{path}.{name}"


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_resumed_equals_uninterrupted(inputs):
    def fresh():
        torch.manual_seed(3)
        return _setup({"name": "softmax", "projections": "random"})

    teacher, whole = fresh()
    list(_run(teacher, whole, inputs=inputs))
    teacher, part = fresh()
    state = next(copy.deepcopy(s.state()) for s in _run(teacher, part, inputs=inputs) if s.done == 4)
    teacher, resumed = fresh()
    steps = list(_run(teacher, resumed, inputs=inputs, state=state))
    assert [s.done for s in steps] == [5, 6]
    for path in whole:
        for a, b in zip(whole[path].parameters(), resumed[path].parameters(), strict=True):
            assert torch.equal(a, b)


def test_student_inputs_hold_the_errors_of_earlier_grafts():
    teacher, operators = _setup({"name": "softmax", "projections": "random"})
    by_teacher = next(iter(_run(teacher, operators, inputs="teacher"))).values
    by_student = next(iter(_run(teacher, operators, inputs="student"))).values
    first, last = "holdout_loss/blocks.0.attn", "holdout_loss/blocks.2.attn"
    assert by_teacher[first] == pytest.approx(by_student[first], rel=1e-5)
    assert by_teacher[last] != pytest.approx(by_student[last], rel=1e-5)


def test_fixed_samples_on_disk(tmp_path):
    """The recorded activations are the teacher's; a second process goes on with the first one's files."""
    settings = {"cache_samples": 12, "steps": 4, "batch_size": 6}

    def fresh():
        torch.manual_seed(3)
        return _setup({"name": "softmax", "projections": "random"})

    teacher, whole = fresh()
    list(_run(teacher, whole, cache_folder=tmp_path / "a", **settings))
    files = {p.name: p.stat().st_size for p in (tmp_path / "a").glob("*.bin")}
    assert files == {f"blocks.{i}.attn.{j}.bin": 12 * 64 * 32 * 4 for i in range(3) for j in range(2)}
    teacher, part = fresh()
    steps = _run(teacher, part, cache_folder=tmp_path / "b", **settings)
    state = next(copy.deepcopy(s.state()) for s in steps if s.done == 2)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("*.bin")}
    teacher, resumed = fresh()
    list(_run(teacher, resumed, cache_folder=tmp_path / "b", state=state, **settings))
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("*.bin")}
    for path in whole:
        for a, b in zip(whole[path].parameters(), resumed[path].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_compute_in_bf16_on_activations_from_disk_too(dtype, tmp_path):
    teacher, operators = _setup({"name": "softmax", "projections": "random"})
    computed = []
    for operator in operators.values():
        operator.attention.qkv.register_forward_hook(lambda _m, _x, y: computed.append(y.dtype))
    settings = {"precision": "bf16", "steps": 2, "cache_samples": 8, "cache_folder": tmp_path}
    *_, last = _run(teacher.to(dtype), operators, **settings)
    assert set(computed) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for o in operators.values() for p in o.parameters())
    assert 0 < last.values["loss/blocks.0.attn"] < 1


MERGED = Plan(
    edits=(
        Merge(blocks="1-2"),
        Replace(role="attention", blocks=[0, 2], operator={"name": "softmax", "projections": "random"}),
    )
)


def _merged(plan=MERGED):
    torch.manual_seed(3)
    teacher = HOST.tiny().eval()
    return teacher, build_operators(teacher, plan)


def _run_merged(teacher, operators, **settings):
    config = DistillConfig(**{"steps": 6, "batch_size": 8, "holdout": 16, "holdout_every": 3} | settings)
    return distill(
        teacher,
        operators,
        noise_images(64, size=16),
        config,
        denoiser=denoiser(),
    )


def test_a_merged_pair_is_fitted_to_what_its_blocks_gave_in_sequence():
    """Measured by hand: the teacher's second output for the first one's input."""
    teacher, operators = _merged(Plan(edits=(Merge(blocks="1-2", start="sum"),)))
    seen = []
    handles = [
        teacher.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args)),
        teacher.blocks[2].register_forward_hook(lambda _, args, output: seen.append(output)),
    ]
    values = next(_run_merged(teacher, operators, batch_size=16)).values
    for handle in handles:
        handle.remove()
    assert values.keys() == {"holdout_loss/blocks.1", "r2/blocks.1"}
    (args, want) = seen
    with torch.no_grad():
        got = operators["blocks.1"](*args)
    assert_close("loss", torch.tensor(values["holdout_loss/blocks.1"]), (got - want).abs().mean(), 1e-5)
    error = (got - want).double().square().sum()
    variance = (want - want.mean((0, 1))).double().square().sum()
    assert values["r2/blocks.1"] == pytest.approx(1 - (error / variance).item(), abs=1e-5)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_pairs_and_single_sites_learn_together(inputs):
    teacher, operators = _merged()
    weights = {n: t.clone() for n, t in teacher.state_dict().items()}
    initial = copy.deepcopy(operators)
    steps = list(_run_merged(teacher, operators, inputs=inputs, steps=40, lr=3e-3, holdout_every=40))
    assert all(torch.equal(weights[n], t) for n, t in teacher.state_dict().items())
    assert steps[1].values.keys() == {"loss/blocks.0.attn", "loss/blocks.1"}
    for path in ("blocks.0.attn", "blocks.1"):
        name = f"holdout_loss/{path}"
        assert steps[-1].values[name] < 0.9 * steps[0].values[name]
        for (name, new), old in zip(
            operators[path].named_parameters(), initial[path].parameters(), strict=True
        ):
            assert not torch.equal(new, old), f"{path}.{name}"
    assert type(teacher.blocks[2]).__name__ == "DiTBlock"


def test_a_students_pair_gets_the_students_input():
    teacher, operators = _merged()
    losses = [
        next(_run_merged(teacher, operators, inputs=inputs)).values["holdout_loss/blocks.1"]
        for inputs in ("teacher", "student")
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_dropped_blocks_have_nothing_to_fit():
    plan = Plan(edits=(Drop(blocks=[1]), *MERGED.edits[1:]))
    teacher, operators = _merged(plan)
    steps = list(_run_merged(teacher, operators, inputs="student", steps=1))
    assert steps[0].values.keys() == {
        f"{value}/blocks.{i}.attn" for value in ("holdout_loss", "r2") for i in (0, 2)
    }


def test_merged_pairs_resume_and_replay_exactly(tmp_path):
    def steps(operators, teacher, folder, **more):
        config = DistillConfig(steps=4, batch_size=6, holdout=16, cache_samples=12)
        return distill(
            teacher,
            operators,
            noise_images(64, size=16),
            config,
            denoiser=denoiser(),
            cache_folder=tmp_path / folder,
            **more,
        )

    plan = Plan(edits=MERGED.edits[:1])
    teacher, whole = _merged(plan)
    list(steps(whole, teacher, "a"))
    # tokens, condition and the second block's output
    assert sorted(p.name for p in (tmp_path / "a").glob("*.bin")) == [f"blocks.1.{i}.bin" for i in range(3)]
    teacher, part = _merged(plan)
    state = next(copy.deepcopy(s.state()) for s in steps(part, teacher, "b") if s.done == 2)
    teacher, resumed = _merged(plan)
    list(steps(resumed, teacher, "b", state=state))
    for a, b in zip(whole["blocks.1"].parameters(), resumed["blocks.1"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_fixed_samples_need_the_teachers_inputs():
    with pytest.raises(ValueError, match="cache_samples requires inputs: teacher"):
        DistillConfig(cache_samples=8, inputs="student")


class _Saved:
    """A tensor that a graph keeps for its backward pass; counts how many are alive."""

    alive = 0

    def __init__(self, tensor):
        self.tensor = tensor
        _Saved.alive += 1

    def __del__(self):
        _Saved.alive -= 1


def test_one_sites_graph_at_a_time():
    """When a site's operator runs, nothing is kept for the backward pass of an earlier one."""
    teacher, operators = _setup({"name": "softmax", "projections": "random"})
    alive_before, alive_after = [], []

    def watched(forward):
        def run(*args, **kwargs):
            if torch.is_grad_enabled():
                alive_before.append(_Saved.alive)
            output = forward(*args, **kwargs)
            if torch.is_grad_enabled():
                alive_after.append(_Saved.alive)
            return output

        return run

    for operator in operators.values():
        operator.forward = watched(operator.forward)
    with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.tensor):
        list(_run(teacher, operators, steps=2))
    assert alive_before == [0] * 6
    assert min(alive_after) > 0


def test_nan_is_an_error_that_names_step_and_site():
    teacher, operators = _setup({"name": "softmax", "projections": "random"})
    operators["blocks.1.attn"].attention.qkv.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"stage 1, step 0, blocks\.1\.attn: the loss is nan"):
        list(_run(teacher, operators))


def test_too_few_images():
    teacher, operators = _setup("softmax")
    with pytest.raises(TrainingError, match="holds out 64 images, but the data has 64"):
        list(_run(teacher, operators, holdout=64))


def test_losses():
    prediction, target = torch.tensor([1.0, 2.0, 103.0]), torch.tensor([0.0, 4.0, 100.0])
    assert regression_loss(prediction, target, "l1").item() == 2.0
    assert_close("l2", regression_loss(prediction, target, "l2"), torch.tensor(14 / 3), 1e-6)
    assert_close("huber", regression_loss(prediction, target, "huber"), torch.tensor(4.5 / 3), 1e-6)
    normalised = regression_loss(prediction, target, "l1", normalised=True)
    assert_close("normalised", normalised, torch.tensor(6 / 104), 1e-6)
    masked = regression_loss(prediction, target, "l1", outlier_threshold=1.5)
    assert masked.item() == 1.5


@pytest.mark.slow
def test_compiled_operators_learn_the_same():
    in_a_plain_process(check_compiled_operators)


def check_compiled_operators():
    curves = []
    for compiled in (False, True):
        torch.manual_seed(3)
        teacher, operators = _setup({"name": "hyena-x", "kernel_size": 3})
        curves.append([s.values for s in _run(teacher, operators, compile=compiled)])
    for values, wanted in zip(*curves, strict=True):
        assert values == pytest.approx(wanted, rel=1e-4)


def test_a_state_of_an_earlier_version_is_an_error():
    teacher, operators = _setup({"name": "softmax", "projections": "random"})
    state = {"step": 3, "operators": {}, "optimizer": {}}
    with pytest.raises(CheckpointError, match="by an earlier version of grafting.*restart the stage"):
        next(_run(teacher, operators, state=state))


def test_spread_sites_need_the_teachers_inputs():
    with pytest.raises(ValueError, match="spread: sites requires inputs: teacher"):
        DistillConfig(spread="sites", inputs="student")


def test_trains_on_as_many_images_as_asked():
    """The images seen over some epochs, told by their labels' places in a set where each image is its own class."""
    teacher, operators = _setup({"name": "softmax", "projections": "random"}, blocks=[0])
    seen = set()

    class Recorded:
        num_classes = 10

        def __len__(self):
            return 64

        def batch(self, indices):
            seen.update(indices.tolist())
            return noise_images(64, size=16).batch(indices)

    config = DistillConfig(steps=8, batch_size=8, images=24, holdout=16, holdout_every=100)
    list(distill(teacher, operators, Recorded(), config, denoiser=denoiser()))
    assert len(seen) == 24 + 16
    with pytest.raises(TrainingError, match="train on 49 images, but the data has 64.*48 are left"):
        list(_run(teacher, operators, images=49))


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize(
    "operator",
    [{"name": "window-1d", "window": 2}, "hyena-x", "ttt", {"name": "linear", "conv": 3}, "mamba2"],
)
def test_operators_of_a_bf16_teacher_are_trained_in_fp32(operator, inputs):
    teacher, _ = _setup(operator)
    teacher.bfloat16()
    operators = build_operators(
        teacher, Plan(edits=(Replace(role="attention", blocks=[1], operator=operator),))
    )
    list(_run(teacher, operators, inputs=inputs, precision="bf16", steps=2))
    assert {p.dtype for o in operators.values() for p in o.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_a_bf16_teacher_in_fp32_is_refused():
    teacher, operators = _setup("hyena-x")
    with pytest.raises(TrainingError, match="the model's weights are bfloat16, and precision is fp32"):
        next(iter(_run(teacher.bfloat16(), operators)))


def test_a_frozen_teacher_has_operators_that_learn():
    teacher, _ = _setup("softmax")
    teacher.requires_grad_(False)
    edits = (Replace(role="attention", blocks=[1], operator={"name": "softmax", "projections": "random"}),)
    operators = build_operators(teacher, Plan(edits=edits))
    steps = list(_run(teacher, operators, steps=40, batch_size=32, lr=1e-2, holdout_every=40))
    assert steps[-1].values["r2/blocks.1.attn"] > steps[0].values["r2/blocks.1.attn"] + 0.2


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_teacher_held_in_bf16_teaches_the_same_and_comes_back(inputs):
    found = []
    for frozen in ("fp32", "bf16"):
        torch.manual_seed(5)
        teacher, operators = _setup("hyena-x", blocks=[0, 2])
        before = copy.deepcopy(teacher.state_dict())
        steps = _run(teacher, operators, precision="bf16", frozen=frozen, inputs=inputs)
        values = [next(steps).values]
        linear = teacher.blocks[1].attn.qkv.weight
        assert linear.dtype == (torch.bfloat16 if frozen == "bf16" else torch.float32)
        values += [step.values for step in steps]
        assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
        assert {p.dtype for o in operators.values() for p in o.parameters()} == {torch.float32}
        found.append((values, [t for o in operators.values() for t in o.state_dict().values()]))
    (want, tensors), (got, others) = found
    assert got == want
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize(
    "operator", ["softmax", {"name": "window-2d", "radius": 1}, {"name": "mlp", "ratio": 2}]
)
def test_operators_of_a_teacher_held_in_bf16_learn_in_fp32(operator):
    role = "mlp" if isinstance(operator, dict) and operator["name"] == "mlp" else "attention"
    teacher, operators = _setup(operator, role=role)
    *_, last = _run(teacher, operators, precision="bf16", frozen="bf16")
    assert {
        t.dtype
        for t in last.state()["operators"]["blocks.0." + ("mlp" if role == "mlp" else "attn")].values()
    } == {torch.float32}


def test_holding_in_bf16_needs_a_pass_in_bf16(monkeypatch):
    with pytest.raises(SettingsError, match="frozen: bf16 requires precision: bf16"):
        DistillConfig(frozen="bf16", precision="fp32")
    monkeypatch.setattr("grafting.machine.precision.resolve_precision", lambda *_: "fp32")
    with pytest.raises(
        TrainingError, match="stage 1: frozen: bf16 requires precision: bf16, and auto is fp32"
    ):
        list(_run(*_setup("hyena-x"), frozen="bf16", precision="auto"))
