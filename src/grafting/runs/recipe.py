"""A recipe: a complete run as data.

pretrained model + plan --distill--> operators --finetune--> model --sample--> images --evaluate--> metrics --> report
"""

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    JsonValue,
    PositiveInt,
    PrivateAttr,
    StringConstraints,
    Tag,
    field_validator,
)

from ..data import ConditionsConfig, DataConfig
from ..diffusion import ProcessConfig
from ..editing.plan import Edit, Plan
from ..evaluation import Suite, SuiteConfig, suite_of
from ..latents.decoding import VaeConfig
from ..latents.prompting import WordsConfig
from ..machine.settings import Settings
from ..sampling.chain import SamplingConfig
from ..sampling.taught import TaughtConfig
from ..sampling.trajectories import TrajectoriesConfig
from ..training.calibration import CalibrateConfig
from ..training.distillation import DistillConfig
from ..training.phases import (
    FinetuneConfig,
    Phases,
    clean_faults,
    phase_faults,
    phases_of,
    with_objectives,
)
from ..words import ROW_TITLES, RowName
from .paths import WrittenPaths
from .states import Every

Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]*[\w-][\w.-]*$", max_length=200)]
"""Name of a run's folder: not one that leads elsewhere, `..`, nor too long for one."""


class FreshModel(Settings):
    """A model described by its config: with the weights of a folder, or at random for pretraining and for trials."""

    host: str
    config: dict[str, JsonValue]
    """Constructor arguments of the host's model class."""
    weights: str | None = None
    """A model folder of this config, from which the weights come; left out, they are random."""
    seed: int = Field(default=0, ge=0)
    """Of random weights."""


def _kind_of_finetune(value: Any) -> str:
    return "<phases>" if isinstance(value, list | tuple) else "<phase>"


_Finetune = Annotated[
    Annotated[FinetuneConfig, Tag("<phase>")] | Annotated[Phases, Tag("<phases>")],
    Discriminator(_kind_of_finetune),
]


def _check_rows(rows: tuple[RowName, ...]) -> tuple[RowName, ...]:
    if not rows or len(set(rows)) < len(rows):
        raise ValueError("name at least one row, and none twice")
    return rows


_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"([1-9][0-9]{0,5}) ?(s|min|h)")

# kinds are told apart by their look, so that a fault is told of that kind alone
_SaveEvery = Annotated[
    Annotated[PositiveInt, Tag("<steps>")]
    | Annotated[str, Field(pattern=f"^{_TIME.pattern}$"), Tag("<time>")],
    Discriminator(lambda value: "<time>" if isinstance(value, str) and not value.isdigit() else "<steps>"),
]

_LONGEST_UNSAVED_S = 600.0


class Recipe(Settings):
    """A complete run as data."""

    name: Name
    """Names the run's folder."""
    description: str = ""
    trial: bool = False
    """Whether it is run to see that everything fits together, with too few steps and images for its figures to mean
    anything; the report says so."""
    source: str | FreshModel = "testbed"
    """The pretrained model: `testbed`, `scenes`, a model folder, or a fresh model of a host."""
    spec: str | None = None
    """File that describes the model's class, where grafting does not know it."""
    plan: tuple[Edit, ...] = ()
    """The edits; none trains the model as it is."""
    data: Annotated[DataConfig | TaughtConfig | TrajectoriesConfig, Field(discriminator="name")] = (
        TaughtConfig()
    )
    """Data for stages 1 and 2; if omitted, latents that the source makes itself."""
    conditions: Annotated[ConditionsConfig | WordsConfig, Field(discriminator="name")] | None = None
    """What the model is asked for, if it does not define that itself, as classes are: a folder of encoded prompts, words to
    encode, or the captions of `scenes`; if omitted, what is recorded of the source."""
    process: ProcessConfig | None = None
    """Noising of inputs; if omitted, what is recorded of the source (bundled models, runs), else that of the host's family."""
    calibrate: CalibrateConfig | None = None
    """Fit in closed form, before stage 1, what of the operators can be; left out, they start as they are built."""
    distill: DistillConfig | None = None
    """Stage 1; left out, operators go to stage 2 as they are built."""
    finetune: _Finetune | None = None
    """Stage 2: one phase, or a list of phases that run one after another; left out, the distilled model is the result."""
    sample: SamplingConfig | None = None
    """Sampling of images, the same for every row; if omitted, no images are sampled."""
    vae: VaeConfig | None = None
    """Autoencoder that decodes samples, if the model makes latents."""
    evaluate: SuiteConfig | None = None
    """The suite that measures samples; left out, that of the bundled testbed which fits them, if one does."""
    rows: Annotated[tuple[RowName, ...], AfterValidator(_check_rows)] = tuple(ROW_TITLES)
    """Models to sample and measure."""
    seed: int = Field(default=0, ge=0)
    """Of the operators' random weights."""
    save_every: _SaveEvery = 100
    """Steps of stage 1 and 2 between saved states, which are no more than ten minutes apart in any case; or a time alone, such
    as `30 min`."""
    _written: WrittenPaths = PrivateAttr(default_factory=WrittenPaths)

    @property
    def written(self) -> WrittenPaths:
        """How the recipe's files write its paths, by what they resolve to."""
        return self._written

    @field_validator("finetune")
    @classmethod
    def _check_phases(
        cls, finetune: FinetuneConfig | Phases | None, info: Any
    ) -> FinetuneConfig | Phases | None:
        """The phases, which follow each other and have an objective on these data; a list of one is that one."""
        if finetune is None:
            return None
        phases, faults = phases_of(finetune), list[str]()
        if not phases:
            raise ValueError("a list of phases has at least one; leave `finetune` out for no stage 2")
        if isinstance(info.data.get("data"), TrajectoriesConfig):
            phases = with_objectives(phases, by_output=True)
            faults = clean_faults(phases)
        if faults := phase_faults(phases) + faults:
            raise ValueError("; ".join(faults))
        return phases if len(phases) > 1 else phases[0]

    @property
    def saving(self) -> Every:
        """When states are saved."""
        if isinstance(self.save_every, int):
            return Every(self.save_every, _LONGEST_UNSAVED_S)
        found = _TIME.fullmatch(self.save_every)
        assert found is not None
        return Every(None, int(found[1]) * _UNITS[found[2]])

    @property
    def phases(self) -> Phases:
        """The phases of stage 2; none where there is no stage 2."""
        return phases_of(self.finetune)

    @property
    def trains(self) -> bool:
        """Whether any stage needs data."""
        return any((self.calibrate, self.distill, self.finetune))

    @property
    def edits(self) -> Plan:
        return Plan(edits=self.plan)

    @property
    def suite(self) -> Suite:
        """The suite that is named, else that of the testbed whose conditions these are."""
        return self.evaluate or suite_of(self.asked)

    @property
    def asked(self) -> str:
        """Name of the conditions."""
        return self.conditions.name if self.conditions else "classes"
