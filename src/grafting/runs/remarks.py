"""What a person should know of a recipe before it runs, although nothing in it is wrong: a line each."""

from collections.abc import Iterable

from ..cost.count import count_parameters
from ..data import Prompts
from ..data.scenes import PRETRAINING, ScenesConfig
from ..editing.placed import Operators
from ..latents.prompting import PlannedPrompts
from .job import Job

LOSS_OF_DISTILLED = (
    "this model is distilled, and the loss of the process (`objective: process`, `diffusion_weight`) undoes that: leave it out, "
    "and stage 2 learns the teacher's outputs"
)
_FEW_PROMPTS, _MANY_STEPS = 32, 100
_MOST_READ = 10_000


def remarks(job: Job, operators: Operators) -> list[str]:
    """All that is to be said of a job, whose sites get these operators."""
    return [
        *([f"no pipeline draws with this graft: {fault}"] if (fault := job.host.pipeline_fault) else []),
        *seen_before(job),
        *_few_prompts(job),
        *_loss_of_distilled(job),
        *_not_measured(job),
        *_as_large(job, operators),
    ]


def seen_before(job: Job) -> list[str]:
    """That the source was pretrained on the recipe's data; of the one model whose data are known by their seeds."""
    data, source = job.recipe.data, job.recipe.source
    weights = source if isinstance(source, str) else source.weights
    if weights != "scenes" or not isinstance(data, ScenesConfig) or not job.recipe.trains:
        return []
    seen = range(max(data.span.start, PRETRAINING.start), min(data.span.stop, PRETRAINING.stop))
    if not seen:
        return []
    unseen = ScenesConfig().seeds
    return [
        f"data: {len(seen):,} of the {len(data.span):,} scenes were in the source's pretraining; `seeds: {unseen}` were not"
    ]


def _few_prompts(job: Job) -> list[str]:
    conditions, steps = job.denoiser.conditions, sum(phase.steps for phase in job.recipe.phases)
    if not isinstance(conditions, Prompts | PlannedPrompts) or not job.recipe.trains:
        return []
    words = (conditions.words(number) for number in range(min(len(conditions), _MOST_READ)))
    return [f"conditions: {remark}" for remark in few_prompts(words, steps=steps)]


def few_prompts(prompts: Iterable[str], *, steps: int) -> list[str]:
    """That so many steps of stage 2 would learn these prompts by heart, or that there is a single one."""
    different = len(set(prompts))  # repeated ones are no more, however many there are
    have = "have some hundreds, like those that the model will be asked"
    if different == 1:
        return [f"a single prompt, which the graft is fitted to alone: {have}"]
    if different >= _FEW_PROMPTS or steps < _MANY_STEPS:
        return []
    return [
        f"{different} different prompts for {steps:,} steps of stage 2, which learns them by heart: {have}"
    ]


def _loss_of_distilled(job: Job) -> list[str]:
    asked = any(phase.asks_for_process for phase in job.recipe.phases)
    return [f"finetune: {LOSS_OF_DISTILLED}"] if job.denoiser.distilled and asked else []


def _not_measured(job: Job) -> list[str]:
    recipe = job.recipe
    if recipe.sample is None or job.is_measured or job.decoder is None:
        return []
    suite, shape = recipe.suite, job.decoder.image_shape(recipe.sample.shape or job.shape)
    if suite.asked_by != recipe.asked:
        why = f"no bundled suite judges images of {recipe.asked}"
    else:
        why = suite.faults(recipe.sample.num_images, shape)[0]
    return [f"the images will not be measured: {why}; `evaluate` names another suite"]


def _as_large(job: Job, operators: Operators) -> list[str]:
    """MLPs of the host's own size."""
    same = [
        site.path
        for site in job.host.sites(job.model)
        if site.role == "mlp"
        and site.path in operators
        and count_parameters(operators[site.path]) == count_parameters(job.model.get_submodule(site.path))
    ]
    if not same:
        return []
    return [
        f"MLPs as large as those they replace change weights, and make the model neither smaller nor faster: {', '.join(same)}"
    ]
