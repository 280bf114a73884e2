"""The open set of hosts: one file each, found by `_registry`. Add a file to add a host."""

from ._construct import constructed as constructed
from ._host import Call as Call
from ._host import Host as Host
from ._host import LayoutTracker as LayoutTracker
from ._host import config_of as config_of
from ._registry import host_of as host_of
from ._registry import hosts as hosts
from ._sdpa import BlockList as BlockList
from ._sdpa import LatentTokens as LatentTokens
from ._sdpa import PackedTokens as PackedTokens
from ._sdpa import SdpaHost as SdpaHost
from ._sdpa import SdpaSpec as SdpaSpec
