"""Every figure in the tables of README and docs/ comes from a committed file of `results/`.

Tables of runs are compared cell by cell with the rows that they are of. Figures of one run whose files were not kept stand in
`recorded.json`, with the command that measures them, and the authors' in `published.json`.
"""

import importlib.util
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grafting.cli.display import metrics_table
from grafting.runs.file import load_recipe

ROOT = Path(__file__).parents[1]
TESTBED = ROOT / "results/testbed"
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PAGES.pop("operators.md")  # compared with the code by test_docs.py
# pages whose tables may hold what the authors published
WITH_PUBLISHED = {"paper.md", "plans.md", "results.md"}
_NUMBER = re.compile(r"(?<![\w.,])(?:(?<!\d)-)?\d[\d,]*\.\d+(?=x\b|\b)(?!\.\d)")


def read(name: str) -> Any:
    return json.loads((ROOT / "results" / name).read_text())


def tables(page: str) -> list[list[list[str]]]:
    """Tables of a page as rows of cells, without the line under the heading; code and links' addresses are left out."""
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]*`", "", text))
    found = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    return [
        [
            [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
            for line in table.splitlines()
            if "---" not in line
        ]
        for table in found
    ]


def table_with(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose heading holds these words."""
    return next(rows[1:] for rows in tables(page) if heading in " | ".join(rows[0]))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def is_among(text: str, known: Iterable[float]) -> bool:
    """Whether a written number is one of these, at its number of digits; a file may hold one digit more, rounded."""
    digits = len(text.partition(".")[2])
    written = text.replace(",", "")
    return any(f"{value:.{digits}f}" == written for value in known)


def test_the_rule_sees_a_changed_figure():
    assert is_among("0.277", [0.27749, 3])
    assert not is_among("0.278", [0.27749, 3])
    assert _NUMBER.findall("1.41 (1.35-1.48), 30.3x, 2605.02772, v0.1.2, 12, -0.70") == [
        "1.41", "1.35", "1.48", "30.3", "2605.02772", "-0.70",
    ]  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "quickstart.md"])
def test_the_printed_table_is_that_of_the_quickstart(page: str):
    printed = io.StringIO()
    drawn = load_recipe(ROOT / "recipes/testbed/quickstart.yaml").rows
    rows = [row for row in read("testbed/quickstart.json") if row["name"] in drawn]
    Console(file=printed, width=120, color_system=None).print(metrics_table(rows))
    blocks = re.findall(r"\n\n```\n(.*?)```", PAGES[page], flags=re.DOTALL)
    (shown,) = (block for block in blocks if "after stage 2" in block)
    lines = [line.rstrip() for line in printed.getvalue().replace("\xa0", " ").splitlines()]
    assert shown.splitlines() == [*lines, "Report: runs/quickstart/report.html"]
    assert re.match(r"After stage 2 (is \w+ than|and) pretrained", shown)


def _row(rows: list[dict[str, Any]], **labels: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if row.items() >= labels.items()]
    return found


def interval(row: dict[str, Any]) -> str:
    digits = [
        f"{row[key]:.2f}" if row["frechet"] >= 1 and row["frechet_high"] >= 1.2 else f"{row[key]:.3f}"
        for key in ("frechet", "frechet_low", "frechet_high")
    ]
    return f"{digits[0]} ({digits[1]}-{digits[2]})"


def paired_ratio(row: dict[str, Any]) -> str:
    ratio = row["paired"]["frechet"]["ratio"]
    return f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


RUNS = {1: "self_graft", 2: "hyena_x_50", 3: "attention_100", 4: "depth_to_width", 6: "quickstart"}


@pytest.mark.parametrize("number", RUNS)
def test_each_run_on_the_testbed(number: int):
    cells = table_with("results.md", "| replaced | images")
    rows = read(f"testbed/{RUNS[number]}.json")
    before, after = (_row(rows, name=name) for name in ("pretrained", "finetuned"))
    is_paired = "paired" in after
    ratio = paired_ratio(after) if is_paired else f"{after['frechet'] / before['frechet']:.2f}"
    assert cells[number][2:5] == [f"{after['num_images']:,}", interval(after), ratio]
    if is_paired:
        unedited = next(cells[i] for i in range(number, -1, -1) if cells[i][1].startswith("nothing"))
        assert unedited[2:4] == [f"{before['num_images']:,}", interval(before)]


# rows of the table, and the designs that they are of
DESIGNS = {
    "nothing": "none", "itself, redrawn": "self-graft", "nine tokens": "swa", "Hyena-X: causal": "hyena-x",
    "Hyena-SE": "hyena-se", "Hyena-Y": "hyena-y", "Mamba-2": "mamba2", "r = 3": "mlp-r3", "r = 6": "mlp-r6",
    "Hyena-X: random; filter": "mlp-hyena-x", "linear with": "linear", "3 x 3 window + linear": "hybrid", "TTT": "ttt",
    "stage 2 alone": "none",
}  # fmt: skip


def design_of(words: str) -> str:
    return next(design for start, design in DESIGNS.items() if words.startswith(start))


def both(values: list[str]) -> str:
    """As `paper; ours` is written: once where both are the same."""
    return "; ".join(dict.fromkeys(values))


@pytest.mark.parametrize(
    "cells", table_with("results.md", "by: paper; ours"), ids=lambda cells: cells[1][:20]
)
def test_each_design_of_table4(cells: list[str]):
    rows, design = read("testbed/table4.json"), design_of(cells[1])
    found = {
        (row["recipe"], row["ratio"]): row
        for row in rows
        if (row["design"], row["stage"]) == (design, "finetuned")
    }
    ratios = [50, 75, 0 if design == "none" else 100]
    wanted = [found.get((recipe, ratio)) for ratio in ratios for recipe in ("paper", "best")]
    assert cells[2:8] == ["" if row is None else f"{row['frechet']:.3f}" for row in wanted]
    whole = [row for row in wanted[4:] if row]
    base = _row(rows, stage="pretrained", recipe="paper")
    assert cells[8] == both([f"{row['params'] / base['params']:.2f}" for row in whole])
    assert cells[9] == both([f"{row['model_flops'] / base['model_flops']:.2f}" for row in whole])
    assert cells[10] == both([f"{100 * row['compute_share']:.1f} %" for row in whole])


BEFORE = {
    "attention: itself": ["self-graft"], "attention: nine": ["swa"], "attention: Hyena-X": ["hyena-x", "hyena-se", "hyena-y"],
    "attention: Mamba-2": ["mamba2"], "attention: linear": ["linear", "hybrid", "ttt"], "MLP: r = 3": ["mlp-r3", "mlp-r6"],
    "MLP: Hyena-X": ["mlp-hyena-x"],
}  # fmt: skip


@pytest.mark.parametrize("cells", table_with("results.md", "at the start"), ids=lambda cells: cells[0][:20])
def test_each_design_before_stage_2(cells: list[str]):
    rows = [row for row in read("testbed/table4.json") if row["ratio"] == 100]
    designs = next(names for start, names in BEFORE.items() if cells[0].startswith(start))
    columns = (("paper", "random"), ("best", "inherited"), ("paper", "distilled"), ("best", "distilled"))
    for cell, (recipe, stage) in zip(cells[1:5], columns, strict=True):
        of = {
            row["design"]: row["frechet"] for row in rows if (row["recipe"], row["stage"]) == (recipe, stage)
        }
        assert cell == ", ".join(f"{of[design]:#.3g}" for design in designs if design in of)


def test_the_smaller_studies():
    losses, scaling, layers = table_with("results.md", "study")
    by_loss = {(row["operator"], row["loss"]): row["frechet"] for row in read("testbed/losses.json")}
    for role, part in zip(("attention", "mlp"), losses[1].split("; "), strict=True):
        assert _NUMBER.findall(part) == [f"{by_loss[role, loss]:.3f}" for loss in ("l1", "huber", "l2")]
    by_count = {row["per_class"]: row["frechet"] for row in read("testbed/data_scaling.json")}
    assert _NUMBER.findall(scaling[1]) == [f"{by_count[count]:.3f}" for count in (60, 300, 600)]
    by_choice = {
        row["blocks"]: row["frechet"]
        for row in read("testbed/layer_choice.json")
        if row["stage"] == "finetuned"
    }
    order = ("interleaved", "top-local", "low-local", "deep", "shallow")
    own = [text for text in _NUMBER.findall(layers[1]) if text != "0.336"]  # the same design in table4
    assert own == [f"{by_choice[choice]:.3f}" for choice in order]


def test_starts_are_those_of_the_benchmark():
    spec = importlib.util.spec_from_file_location("initialisation", ROOT / "benchmarks/initialisation.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.table(read("testbed/initialisation.json")) in PAGES["initialisation.md"]


def derived() -> Iterator[float]:
    """Ratios to the pretrained model that sentences and tables speak of."""
    rows = read("testbed/table4.json")
    pretrained = _row(rows, stage="pretrained", recipe="paper")["frechet"]
    yield from (row["frechet"] / pretrained for row in rows if row["stage"] == "finetuned")


def pool(page: str) -> list[float]:
    known = [
        value
        for entry in read("recorded.json")
        if page in entry["pages"]
        for value in numbers(entry["figures"])
    ]
    if page in WITH_PUBLISHED:
        known += numbers(read("published.json"))
    if page == "gpu.md":
        known += numbers([read(f"{name}.json") for name in ("h100", "h100_kernels", "h200")])
    if page == "scenes.md":
        known += numbers([read(f"scenes/{path.name}") for path in (ROOT / "results/scenes").glob("*.json")])
    if page == "README.md":
        text_to_image = read("scenes/table5.json")
        known += [row["true"] for row in text_to_image]
        points = [f"true_difference{end}" for end in ("", "_low", "_high")]
        known += [100 * abs(row[key]) for row in text_to_image for key in points if key in row]
    if page in ("README.md", "results.md"):
        bench = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["rows"]
        known += [row["ratio"] for row in bench]
    if page == "initialisation.md":
        known += numbers(read("testbed/initialisation.json"))
    if page in ("README.md", "plans.md"):
        known += [*derived(), *numbers([row["frechet"] for row in read("testbed/table4.json")])]
    if page == "plans.md":
        known += numbers(read("testbed/depth_to_width.json"))
    return known


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_other_tables_are_recorded_or_published(page: str):
    checked_by_row = ("| replaced | images", "by: paper; ours", "at the start", "study")
    known = pool(page)
    for rows in tables(page):
        heading = " | ".join(rows[0])
        if page == "results.md" and any(words in heading for words in checked_by_row):
            continue
        for cells in rows[1:]:
            found = [number for cell in cells for number in _NUMBER.findall(cell)]
            unknown = [number for number in found if not is_among(number, known)]
            assert not unknown, f"{page}: {unknown} of {cells} are in no file of results/"


def test_published_columns_of_the_studies():
    known = list(numbers(read("published.json")))
    for cells in table_with("results.md", "study"):
        figures = [text for text in _NUMBER.findall(cells[2]) if text not in ("0.63",)]
        assert all(is_among(text, known) for text in figures)


def test_figures_of_readme_s_list_are_in_files():
    section = PAGES["README.md"].partition("## What is measured")[2].partition("\n## ")[0]
    lines = [line for line in re.sub(r"\]\([^)]*\)", "]", section).splitlines() if not line.startswith("![")]
    found = [number for line in lines for number in _NUMBER.findall(line)]
    assert len(found) >= 6
    assert not [number for number in found if not is_among(number, pool("README.md"))]
    assert is_among("79.0", pool("README.md"))
    assert is_among("200.0", pool("README.md"))
