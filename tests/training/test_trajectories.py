"""States along a teacher's trajectories: those of its sampler, each once, the same wherever a stage began."""

import copy

import pytest
import torch

from closeness import assert_close
from grafting.diffusion import Diffusion, FlowMatching
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators, graft
from grafting.errors import TrainingError
from grafting.hosts import hosts
from grafting.machine import processes
from grafting.machine.randomness import generator
from grafting.sampling.trajectories import Trajectories, TrajectoriesConfig
from grafting.training.calibration import CalibrateConfig, calibrate
from grafting.training.dealing import Dealt, Walked
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from processes import run_in_processes
from toydata import denoiser, noise_images

HOST = hosts()["dit"]
SHAPE = (1, 16, 16)
FINETUNE = {
    "steps": 8,
    "batch_size": 4,
    "warmup_steps": 0,
    "lr": 1e-3,
    "ema_decay": 0.9,
    "objective": "output",
}
HYENA = Plan(edits=(Replace(role="attention", blocks=[1], operator={"name": "hyena-x", "kernel_size": 3}),))


@pytest.fixture(scope="module")
def teacher():
    return HOST.tiny().eval().requires_grad_(False)


def trajectories(**settings):
    return Trajectories(TrajectoriesConfig(**{"sampler": "ddim", "steps": 4} | settings), shape=SHAPE)


def dealt(teacher, how, *, settings=None, end=8, **more):
    walked = Walked(trajectories(**settings or {}), teacher, how, "fp32")
    return Dealt(walked, **{"batch_size": 6, "end": end, "entropy": (3,)} | more)


def finetuned(teacher, student, *, state=None, data=None, how=None, **settings):
    return finetune(
        student,
        data or trajectories(),
        FinetuneConfig(**FINETUNE | settings),
        denoiser=how or denoiser(dropout=0.2),
        teacher=teacher,
        state=state,
    )


def student_of(teacher):
    student = copy.deepcopy(teacher).requires_grad_()
    torch.manual_seed(0)
    graft(student, HYENA)
    return student


@pytest.mark.parametrize(
    ("process", "sampler", "scale"),
    [
        (Diffusion(), "ddim", 1.0),
        (Diffusion(), "ddpm", 1.0),
        (Diffusion(), "dpm-solver++", 3.0),
        (FlowMatching(scale=1000.0, shift=3.0), "euler", 2.0),
        (FlowMatching(scale=1000.0), "heun", 1.0),
    ],
    ids=lambda value: str(value) if not hasattr(value, "identity") else value.identity["name"],
)
def test_states_are_the_samplers_each_once_with_the_models_own_output(teacher, process, sampler, scale):
    how = denoiser(process=process, dropout=0.5)
    settings = {"sampler": sampler, "steps": 3, "cfg_scale": scale}
    num_states = 5 if sampler == "heun" else 3
    feed = dealt(teacher, how, settings=settings, end=num_states)
    batches = [feed.at(number) for number in range(num_states)]
    numbers = batches[0].numbers
    assert (numbers == 10).any()
    assert (numbers < 10).any()
    for row in range(6):
        stream = generator(3, 0, row, 4)
        x = torch.randn(1, *SHAPE, generator=stream)
        y, found = numbers[row : row + 1], {}
        for batch in batches:
            assert batch.numbers[row] == y
            found.setdefault(batch.t[row].item(), []).append((batch.x_t[row], batch.target[row]))
        chain = process.chain(sampler, steps=3, clip=False, streams=[stream])
        for step, update in chain:
            t = torch.full((1,), step)
            own, null = teacher(x, t, y), teacher(x, t, torch.full_like(y, 10))
            # heun calls twice at the same step, at states which a shuffled deal gives in either order
            known = found[t.item()]
            x_t, target = min(known, key=lambda state: (state[0] - x[0]).abs().max())
            assert_close("x_t", x_t, x[0], 1e-4)
            assert_close("target", target, own[0], 1e-4)
            guided = own.clone()
            guided[:, :1] = null[:, :1] + scale * (own - null)[:, :1]
            x = update(guided, x)
        assert sum(map(len, found.values())) == num_states
    # batches mix steps: the chance that none does is (1/3)^5 for each
    assert any(batch.t.unique().numel() > 1 for batch in batches)


def test_a_batch_is_the_same_wherever_it_is_begun_and_its_parts_make_up_the_whole(teacher):
    how = denoiser(dropout=0.3)
    feed = dealt(teacher, how)
    whole = [feed.at(number) for number in range(8)]
    for number in (5, 2, 3, 7):
        again = dealt(teacher, how).at(number)
        for name in ("x_t", "t", "numbers", "target"):
            assert torch.equal(getattr(again, name), getattr(whole[number], name)), name
    for rank in range(2):
        share = dealt(teacher, how, share=slice(rank, None, 2), parts=3).at(6)
        for name in ("t", "numbers"):
            assert torch.equal(getattr(share, name), getattr(whole[6], name)[rank::2]), name
        for name in ("x_t", "target"):
            assert_close(name, getattr(share, name), getattr(whole[6], name)[rank::2], 1e-5)
    assert not torch.equal(whole[0].x_t, whole[4].x_t)


def test_fixed_states_are_as_many_as_are_asked_for(teacher):
    feed = dealt(teacher, denoiser(), end=3, count=14, entropy=(3, 1, 1))
    sizes = [len(feed.at(number).t) for number in range(3)]
    assert sizes == [6, 6, 2]


def test_a_state_costs_one_pass_of_the_teacher_and_its_target_none(teacher):
    rows = {"teacher": 0, "student": 0}

    def predict(model, x, t, y):
        rows["teacher" if model is teacher else "student"] += len(x)
        return HOST.predict(model, x, t, y)

    list(finetuned(teacher, student_of(teacher), how=denoiser(predict), steps=8))
    assert rows == {"teacher": 8 * 4, "student": 8 * 4}


def test_stage_2_resumes_bit_for_bit_from_any_step_and_has_the_output_as_its_objective(teacher):
    whole = student_of(teacher)
    steps, states = [], {}
    for step in finetuned(teacher, whole):
        steps.append(step.values)
        states[step.done] = copy.deepcopy(step.state())
    assert all(values["loss"] == values["output"] > 0 for values in steps)
    for done in (1, 4, 7):
        resumed = student_of(teacher)
        values = [step.values for step in finetuned(teacher, resumed, state=states[done])]
        assert values == steps[done:]
        assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


def test_the_output_is_learnt(teacher):
    losses = [
        step.values["output"]
        for step in finetuned(teacher, student_of(teacher), steps=24, lr=3e-3, batch_size=8)
    ]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_equal_models_have_no_loss(teacher):
    (step,) = finetuned(teacher, copy.deepcopy(teacher).requires_grad_(), steps=1, batch_size=16)
    assert step.values["output"] < 1e-9


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"cache_samples": 8}])
def test_stage_1_fits_on_them_and_resumes_on_the_same_held_out_states(teacher, settings, tmp_path):
    config = DistillConfig(
        steps=8, batch_size=4, holdout=10, holdout_every=8, lr=3e-3, precision="fp32", **settings
    )

    def distilled(state=None):
        operators = build_operators(teacher, HYENA, seed=1)
        how = {"denoiser": denoiser(dropout=0.2), "cache_folder": tmp_path}
        yield from distill(teacher, operators, trajectories(), config, state=state, **how)

    steps, states = [], {}
    for step in distilled():
        steps.append(step.values)
        states[step.done] = copy.deepcopy(step.state())
    (path,) = (name.removeprefix("r2/") for name in steps[0] if name.startswith("r2/"))
    assert steps[-1][f"holdout_loss/{path}"] < steps[0][f"holdout_loss/{path}"]
    assert [step.values for step in distilled(states[5])] == steps[6:]


def test_calibration_takes_them(teacher):
    operators = build_operators(teacher, HYENA, seed=1)
    config = CalibrateConfig(samples=32, batch_size=8, precision="fp32")
    *_, last = calibrate(teacher, operators, trajectories(), config, denoiser=denoiser())
    (r2,) = (value for name, value in last.values.items() if name.startswith("fit_r2/"))
    (before,) = (value for name, value in last.values.items() if name.startswith("fit_r2_before/"))
    assert r2 > before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "process"},
            "have no clean image, and so no loss of the process: set objective: output",
        ),
        ({"objective": {"process": 1, "output": 0.5}}, "no clean image"),
    ],
)
def test_a_loss_of_the_process_is_refused(teacher, settings, message):
    with pytest.raises(TrainingError, match=message):
        next(finetuned(teacher, student_of(teacher), **settings))


def test_the_objective_is_the_output_where_none_is_named(teacher):
    config = FinetuneConfig(steps=1, batch_size=4, warmup_steps=0)
    (step,) = finetune(student_of(teacher), trajectories(), config, denoiser=denoiser(), teacher=teacher)
    assert step.values["loss"] == step.values["output"]
    (step,) = finetune(
        student_of(teacher), noise_images(8, size=16), config, denoiser=denoiser(), teacher=teacher
    )
    assert step.values["loss"] == step.values["diffusion"]


def test_what_cannot_be_is_told_before_any_work(teacher):
    with pytest.raises(TrainingError, match="no teacher to take outputs from"):
        next(finetuned(None, student_of(teacher)))
    config = DistillConfig(steps=1, batch_size=4, images=8)
    with pytest.raises(TrainingError, match="drawn anew at every step: leave `distill.images` out"):
        next(distill(teacher, build_operators(teacher, HYENA), trajectories(), config, denoiser=denoiser()))


def test_trajectories_that_leave_the_numbers_are_an_error(teacher):
    def predict(model, x, t, y):
        return HOST.predict(model, x, t, y) / (t.view(-1, 1, 1, 1) > 500)

    with pytest.raises(TrainingError, match="own trajectories are not finite at step 333"):
        next(finetuned(teacher, student_of(teacher), how=denoiser(predict)))


def _curve(teacher, **settings):
    """Losses of a little stage 2, by as many processes as there are."""
    with processes.together():
        steps = finetuned(teacher, student_of(teacher), precision="fp32", **settings)
        return [step.values["loss"] for step in steps]


def test_two_processes_and_micro_batches_train_as_one(teacher):
    want = _curve(teacher)
    assert _curve(teacher, accumulate=2) == pytest.approx(want, rel=1e-3)
    first, second = run_in_processes(_curve, teacher)
    assert first == second == pytest.approx(want, rel=1e-3)
