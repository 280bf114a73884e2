"""The curves of both stages, and how well each operator learned its site."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from ..training.phases import FinetuneConfig
from ..words import ABSENT, MINUS, is_number, number, percent, short, shown_in
from ._charts import Curve, change_mark, smooth, step_chart
from ._record import WrittenLocality
from ._svg import Scale, spans_decade

FAILED_R2 = 0.3

# the loss of inputs that are from so many to so many percent of the way from clean to noise
_LEVEL = re.compile(r"loss_at_noise/(\d{1,3})-(\d{1,3})")

_SMALL, _LARGE = (300.0, 150.0), (380.0, 200.0)


class Fit(NamedTuple):
    """A site's held-out loss and R^2, as they are written, at the start and at the end."""

    name: str
    operator: str
    loss: list[str]
    r2: list[str]
    plot: Markup | str
    failed: bool
    """True if the operator explains less than 0.3 of the variance of what it replaced."""
    local: str


class SiteChart(NamedTuple):
    """A site's losses over the steps of stage 1."""

    title: str
    operator: str
    picture: Markup


class Stage1(NamedTuple):
    """A chart and a table line for each site, up to the step `last`."""

    charts: list[SiteChart]
    logarithmic: bool
    fits: list[Fit]
    last: int | None
    band: str | None
    """Width in tokens of the band that `Fit.local` is the share of; None where locality is not known."""

    @property
    def failed(self) -> list[str]:
        return [fit.name for fit in self.fits if fit.failed]

    @property
    def table(self) -> list[list[str]]:
        head = ["site", "operator", "loss at start", "loss", "r2 at start", "r2", f"share within {self.band}"]
        lines = [[fit.name, fit.operator, *fit.loss, *fit.r2, fit.local] for fit in self.fits]
        return [head, *lines] if self.band else [line[:-1] for line in (head, *lines)]


class Curves(NamedTuple):
    """One value over the steps of stage 2, and the last that it came to."""

    title: str
    logarithmic: bool
    last: str
    picture: Markup


class Phase(NamedTuple):
    """First and last step of a phase of stage 2, and what it trains."""

    number: int
    first: int
    last: int
    trained: str


class Stage2(NamedTuple):
    """A chart for each value, up to the step `last`."""

    charts: list[Curves]
    last: int | None
    phases: list[Phase]
    levels: list[Curves]
    """The loss at each noise level that the log speaks of, all on one axis."""
    level_table: list[list[str]]


def stage_1(
    log: Sequence[Mapping[str, Any]],
    sites: Sequence[Mapping[str, Any]],
    locality: WrittenLocality | None = None,
) -> Stage1 | None:
    """A table line and a chart for each site that the log speaks of, all charts on one axis; None if it is empty."""
    paths = _logged_paths(log)
    if not paths:
        return None
    names = {site["path"]: _site_name(site) for site in sites}
    operators = {site["path"]: (site["operator"] or {}).get("name", "") for site in sites}
    training = {path: _series(log, f"loss/{path}") for path in paths}
    held_out = {path: _series(log, f"holdout_loss/{path}") for path in paths}
    everything = np.concatenate([values for _, values in (*training.values(), *held_out.values())])
    log_axis = spans_decade(everything.tolist())
    bands = {site["path"]: site["bands"] for site in (locality or {"sites": []})["sites"]}
    band = max((k for shares in bands.values() for k in shares), key=lambda k: int(k), default=None)
    fits = [
        _fit(log, path, names.get(path, path), operators.get(path, ""), bands.get(path, {}).get(band or ""))
        for path in paths
    ]
    charts = [
        SiteChart(
            title=names.get(path, path),
            operator=operators.get(path, ""),
            picture=step_chart(
                [*_raw_and_smooth(*training[path]), Curve(*held_out[path], "points")],
                label=f"Loss of {names.get(path, path)} over the steps of stage 1",
                log=log_axis,
                values=everything.tolist(),
                size=_SMALL,
            ),
        )
        for path in paths
    ]
    return Stage1(charts, log_axis, fits, log[-1].get("step"), band)


def _site_name(site: Mapping[str, Any]) -> str:
    if site["role"] == "block":
        return f"blocks {site['block']} and {site['block'] + 1}, merged"
    return f"block {site['block']}, {site['role']}"


def _logged_paths(log: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for step in log for key in step)
    return list(dict.fromkeys(k.split("/", 1)[1] for k in keys if k.startswith(("loss/", "holdout_loss/"))))


def _fit(log: Sequence[Mapping[str, Any]], path: str, name: str, operator: str, local: float | None) -> Fit:
    _, loss = _series(log, f"holdout_loss/{path}")
    _, r2 = _series(log, f"r2/{path}")
    scale = Scale(0.0, 1.0, 8.0, 192.0)
    label = f"R² of {name} from {number(r2[0])} to {number(r2[-1])}" if len(r2) else ""
    return Fit(
        name=name,
        operator=operator,
        loss=[number(float(v)) for v in (loss[0], loss[-1])] if len(loss) else [ABSENT, ABSENT],
        r2=[f"{v:.3f}".replace("-", MINUS) for v in (r2[0], r2[-1])] if len(r2) else [ABSENT, ABSENT],
        plot=change_mark(float(r2[0]), float(r2[-1]), scale=scale, label=label) if len(r2) else "",
        failed=bool(len(r2)) and bool(r2[-1] < FAILED_R2),
        local=percent(local),
    )


def stage_2(log: Sequence[Mapping[str, Any]], settings: Any = None) -> Stage2 | None:
    """A chart for each value that the log speaks of; None if it is empty.

    Args:
        settings: of stage 2, as the recipe has them: a list where there are phases.
    """
    phases = _phases(log, settings)
    charts: list[Curves] = []
    drawn: list[np.ndarray] = []
    for figure in shown_in("curve"):
        key, title = figure.key, figure.title
        steps, values = _series(log, key)
        if not len(steps):
            continue
        # a loss of one part is that part
        same = next((i for i, other in enumerate(drawn) if np.array_equal(other, values)), None)
        if same is not None:
            charts[same] = charts[same]._replace(title=f"{charts[same].title}, the same as {title.lower()}")
            continue
        drawn.append(values)
        in_view = values.tolist() if key != "lr" else [0.0, *values.tolist()]
        curves = _raw_and_smooth(steps, values) if key != "lr" else [Curve(steps, values, "smooth")]
        ends = [float(phase.last) for phase in phases[:-1]]
        charts.append(_curves(title, curves, in_view, label=title, size=_LARGE, ends=ends))
    levels = _levels(log)
    return Stage2(charts, log[-1].get("step"), phases, levels, _level_table(log)) if charts else None


def _curves(
    title: str, curves: Sequence[Curve], in_view: Sequence[float], *, label: str, **how: Any
) -> Curves:
    logarithmic = spans_decade(in_view)
    picture = step_chart(curves, label=f"{label} over steps", log=logarithmic, values=in_view, **how)
    return Curves(title, logarithmic, short(float(f"{smooth(curves[0].values)[-1]:.3g}")), picture)


def _levels(log: Sequence[Mapping[str, Any]]) -> list[Curves]:
    found = {name: _raw_and_smooth(*_series(log, key)) for key, name in _level_names(log).items()}
    everything = [value for raw, _ in found.values() for value in raw.values.tolist()]
    return [
        _curves(f"{name} noise", curves, everything, label=f"Loss {name} from clean to noise", size=_SMALL)
        for name, curves in found.items()
    ]


def _level_table(log: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Mean losses over at most 100 stretches of steps, each told by its last."""
    names = _level_names(log)
    stretches = np.array_split(np.arange(len(log)), min(len(log), 100))
    lines = [
        [str(log[part[-1]].get("step", part[-1])), *(_mean_of([log[i] for i in part], key) for key in names)]
        for part in stretches
    ]
    return [["step", *names.values()], *lines]


def _mean_of(log: Sequence[Mapping[str, Any]], key: str) -> str:
    _, values = _series(log, key)
    return f"{values.mean():.6g}" if len(values) else ""


def _level_names(log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The log's keys of the loss by noise level, least noise first, with their labels, such as 0\u201320 %."""
    said = dict.fromkeys(key for line in log for key, value in line.items() if is_number(value))
    found = {key: match for key in said if (match := _LEVEL.fullmatch(key))}
    in_order = sorted(found.items(), key=lambda item: int(item[1][1]))
    return {key: f"{match[1]}\u2013{match[2]}\u00a0%" for key, match in in_order}


def _phases(log: Sequence[Mapping[str, Any]], settings: Any) -> list[Phase]:
    """Every phase that the log speaks of; empty where there are none."""
    of_phase: dict[int, list[int]] = {}
    for line in log:
        if is_number(line.get("phase")) and is_number(line.get("step")):
            of_phase.setdefault(int(line["phase"]), []).append(line["step"])
    return [
        Phase(number, min(steps), max(steps), _trained(settings, number))
        for number, steps in sorted(of_phase.items())
    ]


def _trained(settings: Any, number: int) -> str:
    """What the recipe says that a phase trains; empty if it does not say."""
    try:
        return FinetuneConfig.model_validate(settings[number - 1]).trained_in_words
    except (TypeError, LookupError, ValueError):
        return ""


def _raw_and_smooth(steps: np.ndarray, values: np.ndarray) -> list[Curve]:
    return [Curve(steps, values, "raw"), Curve(steps, smooth(values), "smooth")] if len(steps) else []


def _series(log: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what a log says of `key`, without steps where it says nothing or nothing finite."""
    said = [(place, step) for place, step in enumerate(log) if is_number(step.get(key))]
    steps = np.array([step.get("step", place) for place, step in said], np.float64)
    return steps, np.array([step[key] for _, step in said], np.float64)
