"""The page: what each section of the report shows, made from a run's parts, and rendered by `report.html.j2`.

No asset outside the file, and no script but `report.js`, which the page's policy names by its hash. The same record always
gives the same bytes.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from ..machine.files import flatten
from ..machine.sheets import csv_text
from ..words import TRIAL, duration
from ._gallery import gallery
from ._plan_picture import OperatorKey, operator_keys, plan_picture, plan_width
from ._protocols import alike, protocol_table
from ._record import PlannedSite, RunRecord
from ._results import baseline, figure_table, further, notes, results, trade_off
from ._training import stage_1, stage_2
from ._words import caveat, last_measured, replaced, summary


def report_page(run: RunRecord) -> str:
    """The report of a run, as HTML."""
    rows, recipe = run.rows or [], run.recipe or {}
    base = baseline(rows)
    return rendered(
        "report.html.j2",
        run=run,
        recipe=recipe,
        trial=TRIAL if recipe.get("trial") else "",
        summary=_summary(run),
        caveat=caveat(rows),
        results=results(rows, base),
        further=further(rows),
        trade_off=trade_off(rows),
        figure_table=figure_table(rows),
        notes=notes(rows, base),
        gallery=gallery(run.samples, asked=asked_by(recipe)),
        plan=plan_part(sites_of(run)),
        stage_1=stage_1(run.distill_log or [], sites_of(run), run.locality),
        stage_2=stage_2(run.finetune_log or [], recipe.get("finetune")),
        protocol=protocol_table(rows),
        stages=_stages(run),
        stage_table=[["stage", "state", "time"], *(list(stage.values()) for stage in _stages(run))],
        machine=flatten((run.manifest or {}).get("machine") or {}),
        library=_library(run),
    )


def rendered(template: str, **parts: Any) -> str:
    """A page with the style and the script that all have."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csv_uri"] = _csv_uri
    script = environment.get_template("report.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # the script is our own file
    return environment.get_template(template).render(parts, script=Markup(script), script_hash=digest)


def asked_by(recipe: Mapping[str, Any]) -> str:
    """What images are asked for by: class, or prompt."""
    return "prompt" if recipe.get("conditions") else "class"


def _csv_uri(rows: Iterable[Sequence[object]]) -> str:
    """A table as a file of CSV in a link."""
    return "data:text/csv;charset=utf-8," + quote(csv_text([str(cell) for cell in row] for row in rows))


def sites_of(run: RunRecord) -> list[PlannedSite]:
    """What a run puts where; empty where its plan is not known."""
    return run.plan["sites"] if run.plan else []


def _summary(run: RunRecord) -> str:
    rows = run.rows or []
    base, last = baseline(rows), last_measured(rows)
    return summary(sites_of(run), rows, alike=bool(base and last and alike(base, last)))


class PlanPart(NamedTuple):
    """What is shown of the plan; `own` counts the sites that stay as they are."""

    picture: Markup
    width: float
    keys: list[OperatorKey]
    own: int
    sentence: str


def plan_part(sites: Sequence[Mapping[str, Any]]) -> PlanPart | None:
    if not sites:
        return None
    return PlanPart(
        picture=plan_picture(sites),
        width=plan_width(sites),
        keys=list(operator_keys(sites).values()),
        own=sum(site["operator"] is None for site in sites),
        sentence=replaced(sites),
    )


def _stages(run: RunRecord) -> list[dict[str, str]]:
    entries = (run.manifest or {}).get("stages") or {}
    return [
        {
            "name": str(name),
            "state": _state(entry),
            "time": duration(entry.get("seconds")),
        }
        for name, entry in entries.items()
    ]


def _state(entry: Mapping[str, Any]) -> str:
    if entry.get("stale"):
        return "of an earlier recipe, left out"
    return "done" if entry.get("done") else "not finished"


def _library(run: RunRecord) -> str | None:
    """The library's version, from the manifest or else from what the figures' protocols recorded."""
    rows: Sequence[Mapping[str, Any]] = run.rows or []
    recorded = [(row.get("protocol") or {}).get("recorded") or {} for row in rows]
    versions = [(run.manifest or {}).get("library"), *(r.get("grafting") for r in recorded)]
    return next((str(version) for version in versions if version), None)
