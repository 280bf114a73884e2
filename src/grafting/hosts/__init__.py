"""The open set of hosts: a Python file or a spec (`specs/`) each, found by `_registry`. Add a file to add a host."""

from ._construct import constructed as constructed
from ._host import Host as Host
from ._host import LayoutTracker as LayoutTracker
from ._host import config_of as config_of
from ._host import evaluating as evaluating
from ._pipelines import Enough as Enough
from ._pipelines import call_of as call_of
from ._pipelines import call_pipeline as call_pipeline
from ._pipelines import process_of as process_of
from ._pipelines import process_of_scheduler as process_of_scheduler
from ._pipelines import stepping_by as stepping_by
from ._pipelines import transformer_of as transformer_of
from ._registry import host_of as host_of
from ._registry import hosts as hosts
from ._registry import load_spec as load_spec
from ._registry import unknown_class as unknown_class
from ._registry import use_spec as use_spec
from ._sdpa import SdpaHost as SdpaHost
from ._spec import BlockList as BlockList
from ._spec import Input as Input
from ._spec import LatentTokens as LatentTokens
from ._spec import PackedTokens as PackedTokens
from ._spec import SdpaSpec as SdpaSpec
from .tracing import Trace as Trace
from .tracing import trace as trace
