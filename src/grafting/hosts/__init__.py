"""The open set of hosts: one file each, found by `_registry`. Add a file to add a host."""

from ._host import Call as Call
from ._host import Host as Host
from ._host import LayoutTracker as LayoutTracker
from ._registry import host_of as host_of
from ._registry import hosts as hosts
