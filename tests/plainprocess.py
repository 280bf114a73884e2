"""Runs a check of a test's file in a process without the checks of shapes, which torch.compile cannot read."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def in_a_plain_process(check: Callable[[], None]) -> None:
    """Fails with what `check`, a function of a test's file, printed when it failed."""
    code = f"import runpy; runpy.run_path({check.__code__.co_filename!r})[{check.__name__!r}]()"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
