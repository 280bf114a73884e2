"""Measures sampled images against a reference, and keeps beside each figure everything that it depends on.

`evaluate` consumes batches as sampling yields them, so images need not become files. A `Protocol` is that "everything";
figures measured under unlike protocols are refused by `ratio`. There are two suites: this library's own (`Evaluator`), for
any feature network, and ADM's (`AdmEvaluator`), which published tables of ImageNet follow. Figures of other feature
networks than Inception are not FID, KID or the Inception score, and are not called so.
"""

from .adm import INCEPTION_NAME as INCEPTION_NAME
from .adm import AdmEvaluator as AdmEvaluator
from .adm import AdmReference as AdmReference
from .adm import AdmSuite as AdmSuite
from .adm import inception_network as inception_network
from .adm import open_adm_reference as open_adm_reference
from .evaluator import Evaluator as Evaluator
from .evaluator import evaluate as evaluate
from .figures import AdmEvaluation as AdmEvaluation
from .figures import Evaluation as Evaluation
from .figures import ratio as ratio
from .protocol import AdmConfig as AdmConfig
from .protocol import Identity as Identity
from .protocol import MetricsConfig as MetricsConfig
from .protocol import Protocol as Protocol
from .reference import Reference as Reference
