"""A pipeline grafted and trained in memory, in one call."""

import re

import diffusers
import pytest
import torch

import grafting
from grafting.errors import DataError, HostError, PlanError, SettingsError, TrainingError
from grafting.runs import adapting
from grafting.sampling.taught import TaughtConfig
from grafting.sampling.trajectories import TrajectoriesConfig
from grafting.training.distillation import DistillConfig
from grafting.training.phases import FinetuneConfig
from latents.textpipelines import flux, pixart, sd3

WORDS = ["a red cat", "a blue dog on the mat", "three trees beside the sea"]
MADE = TaughtConfig(num_images=16, steps=2, shape=(4, 8, 8))
WALKED = TrajectoriesConfig(sampler="euler", steps=3, shape=(4, 8, 8))
DISTILL = DistillConfig(steps=30, batch_size=4, holdout=8, holdout_every=30, precision="fp32", lr=3e-3)
FINETUNE = FinetuneConfig(
    steps=4,
    batch_size=4,
    warmup_steps=0,
    trainable="new",
    objective="output",
    precision="fp32",
    ema_decay=0.0,
)


def plan_of(name, **settings):
    return grafting.Plan(
        edits=(grafting.Replace(role="attention", blocks=[1], operator={"name": name, **settings}),)
    )


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    bins = {"use_resolution_binning": False} if isinstance(pipe, diffusers.PixArtSigmaPipeline) else {}
    return pipe("a red cat", generator=torch.Generator().manual_seed(1), **size, **bins).images


@pytest.mark.parametrize(
    ("make", "operator", "data"),
    [(pixart, {"name": "hyena-x", "kernel_size": 3}, MADE), (flux, {"name": "gated-conv-x"}, WALKED)],
)
def test_a_pipeline_is_trained_on_prompts_alone_and_saved_with_its_graft(make, operator, data, tmp_path):
    torch.manual_seed(0)
    pipe, told = make(), {}
    blocks = [1] if make is pixart else [0]
    plan = grafting.Plan(edits=(grafting.Replace(role="attention", blocks=blocks, operator=operator),))
    before = drawn(pipe)
    frozen = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    record = grafting.adapt(
        pipe,
        plan,
        prompts=WORDS,
        data=data,
        distill_config=DISTILL,
        finetune_config=FINETUNE,
        on_step=lambda name, step: told.setdefault(name, []).append(step),
    )
    assert list(told) == ["prompts", *(["teach"] if data is MADE else []), "distill", "finetune"]
    path = next(iter(record.operators))
    r2 = [step.values[f"r2/{path}"] for step in told["distill"] if f"r2/{path}" in step.values]
    assert r2[-1] > r2[0]
    new = record.new_parameters
    assert all(
        torch.equal(p, frozen[n])
        for n, p in pipe.transformer.named_parameters()
        if n in frozen and n not in new
    )
    after = drawn(pipe)
    assert not torch.equal(before, after)
    pipe.save_pretrained(tmp_path / "pipe")
    again = type(pipe).from_pretrained(tmp_path / "pipe")
    torch.testing.assert_close(drawn(again), after)
    record.undo()
    assert torch.equal(drawn(pipe), before)


def test_what_was_trained_of_the_model_itself_is_undone_too(monkeypatch):
    torch.manual_seed(0)
    pipe = pixart()
    before, weights = drawn(pipe), {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    all_of_it = FINETUNE.model_copy(update={"trainable": "all", "lr": 1e-2})
    settings = {"prompts": WORDS, "data": MADE, "distill_config": None, "finetune_config": all_of_it}
    record = grafting.adapt(pipe, plan_of("window-1d", window=2), **settings)
    beside = set(dict(pipe.transformer.named_parameters())) - record.new_parameters
    assert any(not torch.equal(pipe.transformer.get_parameter(n), weights[n]) for n in beside)
    record.undo()
    assert torch.equal(drawn(pipe), before)
    # so it is where training fails
    steps = adapting._finetune

    def failing(*args, **kwargs):
        yield from list(steps(*args, **kwargs))[:3]
        raise grafting.TrainingError("enough")

    monkeypatch.setattr(adapting, "_finetune", failing)
    with pytest.raises(grafting.TrainingError, match="enough"):
        grafting.adapt(pipe, plan_of("window-1d", window=2), **settings)
    assert torch.equal(drawn(pipe), before)


def test_a_kept_folder_is_used_again(tmp_path):
    pipe = pixart()
    for _ in range(2):
        told = []
        record = grafting.adapt(
            pipe,
            plan_of("window-1d", window=2),
            prompts=WORDS,
            data=MADE,
            distill_config=DISTILL.model_copy(update={"steps": 1}),
            finetune_config=None,
            folder=tmp_path,
            on_step=lambda name, step, told=told: told.append((name, step.done)),
        )
        record.undo()
    assert told[:2] == [("prompts", 3), ("teach", 16)]


def test_a_plan_that_does_not_fit_is_refused_before_any_work(tmp_path):
    with pytest.raises(grafting.PlanError, match="radius 9"):
        grafting.adapt(pixart(), plan_of("window-2d", radius=9), prompts=WORDS, folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("prompts", "found"), [("a red cat", "one string"), ([], "none"), ("", "none")])
def test_prompts_are_a_list(prompts, found, tmp_path):
    with pytest.raises(DataError, match=f"a list of them is needed, a hundred or more; found {found}"):
        grafting.adapt(pixart(), plan_of("softmax"), prompts=prompts, folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_pipeline_without_text_encoders_is_refused_before_any_work(tmp_path):
    pipe = pixart()
    pipe.text_encoder = None
    with pytest.raises(
        grafting.HostError, match="is to encode prompts, and its text_encoder is None: load it whole"
    ):
        grafting.adapt(pipe, plan_of("softmax"), prompts=WORDS, folder=tmp_path / "x")
    pipe.tokenizer = None
    with pytest.raises(grafting.HostError, match="its text_encoder and tokenizer are None"):
        grafting.adapt(pipe, plan_of("softmax"), prompts=WORDS, folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_small_model_is_taught_in_its_own_size():
    """An SD3 of 16 x 16 latents, not of the published 128 x 128, which its positions do not reach to."""
    torch.manual_seed(0)
    pipe, made = sd3(), {}
    config = TaughtConfig(num_images=4, steps=1, batch_size=4)
    short = DISTILL.model_copy(update={"steps": 1, "batch_size": 2, "holdout": 2, "holdout_every": 1})
    grafting.adapt(
        pipe,
        grafting.Plan(edits=[grafting.Replace(role="attention", blocks=0, operator="window-2d")]),
        prompts=WORDS,
        data=config,
        distill_config=short,
        finetune_config=None,
        on_step=lambda name, step: made.setdefault(name, step),
    )
    assert made.keys() == {"prompts", "teach", "distill"}
    assert grafting.host_of(pipe.transformer).shape(pipe.transformer) == (4, 16, 16)


@pytest.mark.parametrize(
    ("asked", "error", "told"),
    [
        ({"prompts": ["a red cat", " "]}, DataError, "prompts: 1 is ' '; each is"),
        ({"distill_config": None, "finetune_config": None}, TrainingError, "grafting.graft` edits without"),
        (
            {"data": TaughtConfig(num_images=6, shape=(4, 15, 15))},
            DataError,
            r"data.shape: .* patches of 2 x 2, which 15 x 15 are not a multiple of",
        ),
        (
            {"distill_config": DistillConfig(steps=1, holdout=20)},
            TrainingError,
            "holds out 20 images, but the data has 16: set `holdout` to at most 15",
        ),
        (
            {"distill_config": DistillConfig(steps=1)},
            TrainingError,
            "holds out 16 images, but the data has 16: set `holdout` to at most 15",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused_before_any_work(asked, error, told, monkeypatch):
    monkeypatch.setattr(adapting, "Prompting", None)  # the first of the work
    with pytest.raises(error, match=told):
        grafting.adapt(sd3(), plan_of("gated-conv-x"), **{"prompts": WORDS, "data": MADE} | asked)


def test_a_pipeline_is_grafted_once(monkeypatch):
    monkeypatch.setattr(adapting, "Prompting", None)
    pipe, plan = sd3(), plan_of("gated-conv-x")
    with pytest.raises(HostError, match=r"a diffusers pipeline is needed .* found a SD3Transformer2DModel"):
        grafting.adapt(pipe.transformer, plan, prompts=WORDS)
    grafting.graft(pipe, plan)
    with pytest.raises(PlanError, match="already holds an operator; undo that graft first"):
        grafting.adapt(pipe, plan, prompts=WORDS, data=MADE, distill_config=DISTILL)


def test_a_single_prompt_is_warned_of_before_any_work(tmp_path):
    """Warnings are errors in these tests, so nothing is done after it."""
    with pytest.raises(UserWarning, match="prompts: a single prompt, which the graft is fitted to alone"):
        grafting.adapt(pixart(), plan_of("softmax"), prompts=["a red cat"], folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_undone_pipeline_is_traced_as_one_that_was_never_grafted():
    pipe = pixart()
    settings = {"prompts": WORDS, "data": MADE, "distill_config": DISTILL.model_copy(update={"steps": 1})}
    grafting.adapt(pipe, plan_of("softmax"), finetune_config=None, **settings).undo()
    call = {"prompt": "a red cat", "height": 16, "width": 16}
    assert grafting.trace(pipe, **call).spec == grafting.trace(pixart(), **call).spec


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"distill_config": {"steps": 3}},
            "distill_config: a DistillConfig is needed, or None; found {'steps': 3}",
        ),
        (
            {"finetune_config": [FINETUNE, "twice"]},
            "finetune_config: a FinetuneConfig is needed, or None; found 'twice'",
        ),
        ({"data": 100}, "data: a TaughtConfig or a TrajectoriesConfig is needed, or None; found 100"),
    ],
)
def test_settings_of_another_class_are_refused_before_any_work(asked, told):
    with pytest.raises(SettingsError, match=re.escape(told)):
        adapting._check_kinds(**asked)  # annotations are checked in these tests, and would speak first


def test_the_loss_of_the_process_on_a_distilled_model_is_warned_of():
    config = FINETUNE.model_copy(update={"objective": None})
    by_process = FinetuneConfig(
        **config.model_dump(exclude={"objective", "diffusion_weight"}), diffusion_weight=1.0
    )
    pipe = flux()
    assert grafting.hosts.host_of(pipe.transformer).distilled
    plan = grafting.Plan(edits=(grafting.Replace(role="attention", blocks=[0], operator="softmax"),))
    with pytest.raises(
        UserWarning, match="finetune_config: this model is distilled, and the loss of the process"
    ):
        grafting.adapt(pipe, plan, prompts=WORDS, finetune_config=by_process)
