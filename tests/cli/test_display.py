"""Progress of stages where the output is no terminal."""

import io

from rich.console import Console

from grafting.cli.display import follow
from grafting.contract import Step


def test_a_stage_has_a_line_at_its_start_and_one_at_its_end():
    written = io.StringIO()
    with follow(Console(file=written)) as on_step:
        for done in (0, 1, 2, 3, 3):  # the last of a stage's shards may add nothing
            on_step("prompts", Step(done=done, total=3))
    lines = written.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["prompts 0/3", "prompts 3/3"]


def test_what_was_done_before_has_one_line():
    written = io.StringIO()
    with follow(Console(file=written)) as on_step:
        on_step("prompts", Step(done=3, total=3))
        on_step("teach", Step(done=2, total=2))
    assert written.getvalue() == "prompts 3/3\nteach 2/2\n"
