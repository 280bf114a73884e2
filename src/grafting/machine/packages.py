"""Optional packages: the line that installs one, wherever this library itself was installed from."""

import re
import shlex
from importlib.metadata import PackageNotFoundError, requires


def install_line(*names: str) -> str:
    """The command that installs packages in the versions that this library asks for: `pip install 'peft>=0.17'`."""
    return " ".join(["pip install", *(shlex.quote(_requirement(name)) for name in names)])


def _requirement(name: str) -> str:
    try:
        known = requires("grafting") or []
    except PackageNotFoundError:  # used from its sources, without being installed
        known = []
    asked = (line.partition(";")[0].strip() for line in known)
    return next((line for line in asked if re.match(rf"{re.escape(name)}\b(?![-.])", line)), name)
