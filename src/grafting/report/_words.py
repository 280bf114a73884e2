"""A run's facts as a person reads them: what was replaced by what, and the run in one sentence."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..words import FINETUNED, PRETRAINED, ROW_MEANINGS, Figure, count, headline, is_number, multiple, number


def operator_label(operator: Mapping[str, Any]) -> str:
    """An operator with its settings: hyena-x (kernel_size 4, geometry centred)."""
    settings = [f"{key} {value}" for key, value in operator.items() if key != "name"]
    return f"{operator['name']} ({', '.join(settings)})" if settings else str(operator["name"])


def replaced(sites: Sequence[Mapping[str, Any]]) -> str:
    """Summary of the replacements: 4 of 8 attention operators replaced by hyena-x."""
    roles = dict.fromkeys(site["role"] for site in sites)
    phrases = []
    for role in roles:
        of_role = [site["operator"] for site in sites if site["role"] == role]
        names = Counter(str(operator["name"]) for operator in of_role if operator)
        if names:
            phrases.append(_replaced_of_role(role, names, len(of_role)))
    return " and ".join(phrases) if phrases else "no operator replaced"


def _replaced_of_role(role: str, names: Counter[str], num_sites: int) -> str:
    if role == "block":
        done = {"merge": "merged in pairs", "drop": "dropped"}
        return " and ".join(f"{count} of {num_sites} blocks {done[name]}" for name, count in names.items())
    chosen = f"{names.total()} of {num_sites} {role} operators replaced by "
    if len(names) == 1:
        return chosen + next(iter(names))
    if len(names) > 3:
        return f"{chosen}{len(names)} kinds of operator"
    return chosen + ", ".join(f"{name} ({count})" for name, count in names.items())


def summary(sites: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, alike: bool) -> str:
    """The run in one sentence; `alike` says whether the two figures in it may be compared."""
    edits = replaced(sites) if sites else "the plan is not known"
    return f"{edits[:1].upper()}{edits[1:]}; {_outcome(rows, alike=alike)}."


def _outcome(rows: Sequence[Mapping[str, Any]], *, alike: bool) -> str:
    figure = headline(rows)
    measured = {row["name"]: row for row in rows if is_number(row.get(figure.key))}
    base = measured.get(PRETRAINED)
    last = last_measured(rows)
    if last is None and rows and not any("protocol" in row for row in rows) and "params" in rows[0]:
        return "no suite has measured its images"
    if last is None:
        return (
            "not measured yet"
            if base is None
            else f"so far only the pretrained model is measured: {_of(figure, base)}"
        )
    when = (
        "" if last["name"] == FINETUNED else f" ({last['name']}: {ROW_MEANINGS.get(last['name'], 'so far')})"
    )
    outcome = f"{figure.name(rows)} {_of(figure, last)}{when}"
    if base is None:
        return outcome
    outcome += f" against {_of(figure, base)} pretrained"
    if not alike:
        return f"{outcome}, measured differently"
    times = ratio(figure, last, base)
    return f"{outcome}: {times}" if times else outcome


def caveat(rows: Sequence[Mapping[str, Any]]) -> str:
    """What to know before comparing the summary's figure with another; empty if there is nothing."""
    last, figure = last_measured(rows), headline(rows)
    if last is None:
        return ""
    said = [f"{count(last['num_images'])} images of each model"] if is_number(last.get("num_images")) else []
    if figure.published and figure.name(rows) != figure.published:
        network = ((last.get("protocol") or {}).get("feature_network") or {}).get("name", "another network")
        said.append(f"features of {network}, so this is no {figure.published} and compares with none")
    if is_number(bias := last.get(f"{figure.key}_bias")):
        said.append(f"about {number(bias)} too high, as of finitely many images")
    return "; ".join([*said, "intervals are over images, not over trainings: this is one training"]) + "."


def last_measured(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the furthest stage that was measured, other than the pretrained model's."""
    key = headline(rows).key
    return next((r for r in reversed(rows) if r["name"] != PRETRAINED and is_number(r.get(key))), None)


def ratio(figure: Figure, row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """A row's figure as a multiple of the pretrained one's, with its interval where images are paired; empty if that says nothing."""
    if figure.ratio and (paired := figure.paired(row)):
        return paired
    value, other = row.get(figure.key), base.get(figure.key)
    if not (figure.ratio and is_number(value) and is_number(other) and other > 0):
        return ""
    return multiple(value, other)


def _of(figure: Figure, row: Mapping[str, Any]) -> str:
    limits = figure.interval(row)
    return figure.write(row[figure.key]) + (f" ({limits})" if limits else "")
