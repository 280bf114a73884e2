"""Figures and facts as a person reads them: numbers with few digits, durations, and the run in one sentence."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

MEANINGS = {
    "pretrained": "the model as it was",
    "random": "operators put in at random",
    "inherited": "operators started from its weights",
    "distilled": "after stage 1",
    "finetuned": "after stage 2",
}
ABSENT = "\u2013"
MINUS, TIMES, THIN_SPACE = "\u2212", "\u00d7", "\u202f"


def figure(value: Any, *, digits: int = 3) -> str:
    """A number with `digits` significant digits and no exponent where it can be helped; a dash if there is none."""
    if not is_number(value):
        return ABSENT
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{decimals}f}".replace("-", MINUS).replace(",", THIN_SPACE)
    return short(value)


def short(value: float) -> str:
    """A number for an axis."""
    written = f"{value:e}" if 0 < abs(value) < 1e-3 else f"{value:g}"
    mantissa, _, exponent = written.partition("e")
    if exponent:
        mantissa = f"{float(mantissa):.3g}"
    return (mantissa + (f"e{int(exponent)}" if exponent else "")).replace("-", MINUS)


def amount(value: Any) -> str:
    """A large count with an SI prefix: 2.63 M."""
    if not is_number(value):
        return ABSENT
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{figure(value / factor)}\u00a0{prefix}"
    return f"{value:g}"


def percent(value: Any) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}\u00a0%" if is_number(value) else ABSENT


def change(value: Any, base: Any) -> str:
    """How much `value` differs from `base`, in percent with a sign; empty if that says nothing."""
    if not (is_number(value) and is_number(base)) or base == 0:
        return ""
    relative = 100 * (value / base - 1)
    if value == base:
        return "same"
    text = f"{relative:+.1f}" if abs(relative) < 100 else f"{relative:+.0f}"
    return text.replace("-", MINUS) + "\u00a0%"


def interval(row: Mapping[str, Any]) -> str:
    """A row's interval: 4.80–5.40; empty if it has none."""
    low, high = row.get("frechet_low"), row.get("frechet_high")
    return f"{figure(low)}\u2013{figure(high)}" if is_number(low) and is_number(high) else ""


def duration(seconds: Any) -> str:
    """Seconds as a person says them."""
    if not is_number(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a finite number: what JSON says may be null, NaN or missing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def operator_label(operator: Mapping[str, Any]) -> str:
    """An operator with its settings: hyena-x (kernel_size 4, geometry centred)."""
    settings = [f"{key} {value}" for key, value in operator.items() if key != "name"]
    return f"{operator['name']} ({', '.join(settings)})" if settings else str(operator["name"])


def replaced(sites: Sequence[Mapping[str, Any]]) -> str:
    """What was replaced by what: 4 of 8 attention operators replaced by hyena-x."""
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
    measured = {row["name"]: row for row in rows if is_number(row.get("frechet"))}
    base = measured.get("pretrained")
    last = last_measured(rows)
    if last is None:
        return (
            "not measured yet"
            if base is None
            else f"so far only the pretrained model is measured: {_of(base)}"
        )
    when = "" if last["name"] == "finetuned" else f" ({last['name']}: {MEANINGS.get(last['name'], 'so far')})"
    outcome = f"{distance_title(rows)} {_of(last)}{when}"
    if base is None:
        return outcome
    outcome += f" against {_of(base)} pretrained"
    if not alike:
        return f"{outcome}, measured differently"
    return f"{outcome}: {ratio(last['frechet'], base['frechet'])}" if base["frechet"] > 0 else outcome


def distance_title(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the distance of these rows is called: FID where the features are those of its published network."""
    networks = {(row.get("protocol") or {}).get("feature_network", {}).get("name") for row in rows}
    return "FID" if networks == {"inception-2015-12-05"} else "Fréchet distance"


def last_measured(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the furthest stage that has a Fréchet distance, other than the pretrained model's."""
    return next(
        (r for r in reversed(rows) if r["name"] != "pretrained" and is_number(r.get("frechet"))), None
    )


def ratio(value: float, base: float) -> str:
    """A multiple: 1.11×, 132×."""
    multiple = value / base
    return (f"{multiple:.2f}" if multiple < 10 else figure(multiple)) + TIMES


def _of(row: Mapping[str, Any]) -> str:
    limits = interval(row)
    return figure(row["frechet"]) + (f" ({limits})" if limits else "")
