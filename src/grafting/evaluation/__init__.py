"""Measures sampled images against a reference, and keeps beside each figure everything that it depends on.

`evaluate` consumes batches as sampling yields them, so images need not become files. A `Protocol` is that "everything";
figures measured under unlike protocols are refused by `ratio`. A suite is one file here (see `suite.py`) and one line of
`SuiteConfig`: the testbed's, which measures by `Evaluator`, as any feature network can, and ADM's (`AdmEvaluator`), which
published tables of ImageNet follow. Figures of other feature networks than Inception are not FID, KID or the Inception
score, and are not called so.
"""

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from ..words import INCEPTION_NAME as INCEPTION_NAME
from .adm import AdmSuite as AdmSuite
from .adm import inception_network as inception_network
from .adm_evaluator import AdmConfig as AdmConfig
from .adm_evaluator import AdmEvaluation as AdmEvaluation
from .adm_evaluator import AdmEvaluator as AdmEvaluator
from .adm_reference import AdmReference as AdmReference
from .adm_reference import open_adm_reference as open_adm_reference
from .evaluator import Evaluator as Evaluator
from .evaluator import evaluate as evaluate
from .figures import Evaluation as Evaluation
from .figures import ratio as ratio
from .geneval import GenevalSuite as GenevalSuite
from .per_image import PerImage as PerImage
from .protocol import Identity as Identity
from .protocol import Metrics as Metrics
from .protocol import MetricsConfig as MetricsConfig
from .protocol import Protocol as Protocol
from .reference import Reference as Reference
from .scenes import ScenesEvaluation as ScenesEvaluation
from .scenes import ScenesSuite as ScenesSuite
from .suite import Remark as Remark
from .suite import Suite as Suite
from .suite import SuiteEvaluator as SuiteEvaluator
from .testbed import TestbedSuite as TestbedSuite


def _named(value: Any) -> Any:
    """A suite's settings with its name: a recipe of before says `suite: adm`, or nothing."""
    if not isinstance(value, dict) or "name" in value:
        return value
    return {"name": value.get("suite", "adm")} | {key: v for key, v in value.items() if key != "suite"}


SuiteConfig = Annotated[
    TestbedSuite | AdmSuite | ScenesSuite | GenevalSuite,
    Field(discriminator="name"),
    BeforeValidator(_named),
]

SUITES: dict[str, type[Suite]] = {
    suite.model_fields["name"].default: suite for suite in get_args(get_args(SuiteConfig)[0])
}


def suite_of(conditions: str) -> Suite:
    """The bundled suite that judges images by conditions of this name; the testbed's if none does."""
    testbeds: tuple[Suite, ...] = (TestbedSuite(), ScenesSuite())
    return next((suite for suite in testbeds if suite.asked_by == conditions), testbeds[0])
