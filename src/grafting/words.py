"""Rows and figures that are shown to people: what each is called and how it is written.

Reports, cards, sweeps and the command line look figures up here. A suite of `evaluation/` adds its figures as rows.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NotRequired, TypeGuard

from typing_extensions import TypedDict

INCEPTION_NAME = "inception-2015-12-05"
"""Network of features whose distances are called FID: TensorFlow's, with the published weights."""

RowName = Literal["pretrained", "random", "inherited", "distilled", "finetuned"]
"""A row of a run: a model that is sampled and measured; `runs/rows.py` says how each is made."""

PRETRAINED: RowName = "pretrained"
DISTILLED: RowName = "distilled"
FINETUNED: RowName = "finetuned"

ROW_TITLES: dict[RowName, str] = {
    PRETRAINED: "pretrained",
    "random": "operators at random",
    "inherited": "inherited",
    DISTILLED: "after stage 1",
    FINETUNED: "after stage 2",
}
"""The rows in the order in which they are measured, with what heads them."""

ROW_MEANINGS: dict[RowName, str] = {
    PRETRAINED: "the model as it was",
    "random": "operators put in at random",
    "inherited": "operators started from its weights",
    DISTILLED: ROW_TITLES[DISTILLED],
    FINETUNED: ROW_TITLES[FINETUNED],
}

TRIAL = "A trial: too few steps and images for its figures to mean anything"

# what makes a cell, a link or a picture of a text in Markdown
_ACTIVE = re.compile(r"[\\|]|(?<=\])(?=\()")

ABSENT = "\u2013"
MINUS, TIMES, THIN_SPACE = "\u2212", "\u00d7", "\u202f"


class Row(TypedDict):
    """A row of metrics.json: its name, and figures of many names."""

    name: str
    protocol: NotRequired[dict[str, object] | None]
    paired: NotRequired[dict[str, object] | None]


Row.__pydantic_config__ = {"extra": "allow"}  # type: ignore[attr-defined]  # what pydantic reads


Measured = Mapping[str, Any]
"""A row of metrics.json, an evaluation as JSON, or a line of a sweep's table."""


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number: what JSON says may be null, NaN or missing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, *, digits: int = 3) -> str:
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
            return f"{number(value / factor)}\u00a0{prefix}"
    return f"{value:g}"


def count(value: Any) -> str:
    """A count with all its digits: 50 000."""
    return f"{value:,.15g}".replace(",", THIN_SPACE) if is_number(value) else ABSENT


def percent(value: Any) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}\u00a0%".replace("-", MINUS) if is_number(value) else ABSENT


def _points(value: float) -> str:
    """A difference of shares in hundredths, which are no percent of anything."""
    return f"{round(100 * value, 1) + 0.0:.1f}".replace("-", MINUS)


def change(value: Any, base: Any) -> str:
    """Difference between `value` and `base`, in percent with a sign; empty if that says nothing."""
    if not (is_number(value) and is_number(base)) or base == 0:
        return ""
    relative = 100 * (value / base - 1)
    if value == base:
        return "same"
    text = f"{relative:+.1f}" if abs(relative) < 100 else f"{relative:+.0f}"
    return text.replace("-", MINUS) + "\u00a0%"


def multiple(value: float, base: float) -> str:
    """A multiple: 1.11×, 132×."""
    times = value / base
    return (f"{times:.2f}" if times < 10 else number(times)) + TIMES


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


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure, as all who show it call it and write it.

    Args:
        key: its name in metrics.json, in logs and in a sweep's table; `key_low` and `key_high` are its interval.
        title: heads its column.
        brief: its name in a line of text or a narrow table; the title if left out.
        published: its name where Inception with the published weights made the features.
        of: the images, the model that made them, or the run.
        better: which values are; None of what is only counted.
        write: its values as text.
        bounds: the least and the most that it can be.
        ratio: a multiple of the pretrained model's says something.
        shown: beside those tables that show every figure: `main`, the first table of a run; `sweep`, a line of a sweep;
            `progress`, while a stage runs; `curve`, a chart of stage 2.
        help: what it is, as the end of a sentence.
    """

    key: str
    title: str
    brief: str = ""
    published: str = ""
    of: Literal["images", "model", "run"]
    better: Literal["low", "high"] | None = None
    write: Callable[[Any], str] = number
    bounds: tuple[float, float] = (-math.inf, math.inf)
    ratio: bool = False
    shown: tuple[str, ...] = ()
    help: str = ""

    @property
    def inline(self) -> str:
        return self.brief or self.title

    @property
    def judges(self) -> bool:
        """True of figures that say how good images are."""
        return self.of == "images" and self.better is not None

    def name(self, rows: Sequence[Measured]) -> str:
        """Title in a table of these rows: FID where the features are those of its published network."""
        networks = {(row.get("protocol") or {}).get("feature_network", {}).get("name") for row in rows}
        return self.published or self.title if networks == {INCEPTION_NAME} else self.title

    def limits(self, row: Measured) -> tuple[float, float] | None:
        """A row's interval of this figure, if it has one."""
        low, high = (row.get(f"{self.key}_{end}") for end in ("low", "high"))
        return (low, high) if is_number(low) and is_number(high) else None

    def interval(self, row: Measured) -> str:
        """A row's interval as text: 4.80–5.40; empty if it has none."""
        limits = self.limits(row)
        return "\u2013".join(map(self.write, limits)) if limits else ""

    def paired(self, row: Measured) -> str:
        """A row's figure against the pretrained model's, image by image: 1.11× (1.05–1.17), or +0.3 points (−0.1 to 0.7) of a share.

        Empty if they were not compared so; see `evaluation/comparison.py`.
        """
        parts = (row.get("paired") or {}).get(self.key) or {}
        if "ratio" in parts:
            value, low, high = (parts["ratio"][end] for end in ("value", "low", "high"))
            decimals = min(max(1 - math.floor(math.log10(max(high - low, 1e-9))), 2), 4)
            return f"{value:.{decimals}f}{TIMES} ({low:.{decimals}f}\u2013{high:.{decimals}f})"
        if "difference" in parts:
            value, low, high = (parts["difference"][end] for end in ("value", "low", "high"))
            write, unit = (_points, " points") if self.write is percent else (self.write, "")
            return f"{'+' * (value > 0)}{write(value)}{unit} ({write(low)} to {write(high)})"
        return ""


_score = partial(Figure, of="images", better="high")
_share = partial(_score, write=percent, bounds=(0.0, 1.0))
_cost = partial(Figure, of="model", better="low", write=amount)
# in the order in which tables show them; the first that judges images and was measured is a table's main one
_ROWS = (
    Figure(
        key="frechet", title="Fréchet distance", published="FID", of="images", better="low", ratio=True,
        bounds=(0.0, math.inf), shown=("sweep",), help="the distance between Gaussians of features of these images and of the reference",
    ),
    _share(
        key="agreement", title="Agreement", brief="agreement", shown=("main", "sweep"),
        help="the share of images whose most likely class, by the feature network, is the label they were sampled with",
    ),
    Figure(
        key="spatial_frechet", title="Spatial Fréchet distance", published="sFID", of="images", better="low",
        ratio=True, help="the Fréchet distance of features that have positions",
    ),
    Figure(
        key="kid", title="Kernel distance", published="KID", of="images", better="low",
        help="the squared maximum mean discrepancy of features, with a cubic kernel",
    ),
    _score(
        key="precision", title="Precision", bounds=(0.0, 1.0), shown=("sweep",),
        help="the share of images that lie among those of the reference",
    ),
    _score(
        key="recall", title="Recall", bounds=(0.0, 1.0), shown=("sweep",),
        help="the share of the reference that lies among these images",
    ),
    _score(
        key="density", title="Density",
        help="how many neighbourhoods of the reference an image lies in, over the number of neighbours",
    ),
    _score(
        key="coverage", title="Coverage", bounds=(0.0, 1.0),
        help="the share of the reference with an image in its neighbourhood",
    ),
    _score(
        key="inception_score", title="Inception score's formula", published="Inception score",
        help="how sure the classes of images are, and how many there are",
    ),
    _share(
        key="exact", title="Exact", shown=("main", "sweep"),
        help="the share of scenes that are what the caption says, with one pair of twins and nothing else",
    ),
    _share(
        key="true", title="True captions", brief="true", shown=("main", "sweep"),
        help="the share of images of which the caption is true, mean over the six tasks",
    ),
    *(
        _share(
            key=f"true_{task}", title=f"True: {task}",
            help=f"the share of images of the task {task} of which the caption is true",
        )
        for task in ("single", "two", "counting", "colour", "position", "binding")
    ),
    _share(
        key="twins", title="Twins", brief="twins", shown=("main", "sweep"),
        help="the share of unsaid objects whose twin stands at the mirrored cell",
    ),
    *(
        _share(
            key=f"twins_{name}", title=f"Twins, {name}",
            help=f"the same of objects {cells} from the mirrored cell",
        )
        for name, cells in (
            ("near", "one row and one column"),
            ("apart", "three rows or three columns"),
            ("far", "three rows and three columns"),
        )
    ),
    Figure(
        key="background", title="Background", brief="background", of="images", better="low",
        bounds=(0.0, math.inf), shown=("main", "sweep"), help="the distance of the background from the nearest grating, in levels of 256 (rms)",
    ),
    _share(
        key="geneval", title="GenEval (transformers' Mask2Former)", brief="GenEval", shown=("main", "sweep"),
        help="the share of images that show what their prompts ask for, mean over the six tasks",
    ),
    *(
        _share(
            key=f"geneval_{tag}", title=f"GenEval: {task}",
            help=f"the share of images of {task} that show what their prompts ask for",
        )
        for tag, task in (
            ("single_object", "one object"),
            ("two_object", "two objects"),
            ("counting", "counting"),
            ("colors", "colours"),
            ("position", "position"),
            ("color_attr", "colours of two objects"),
        )
    ),
    Figure(
        key="image_distance", title="Distance to the pretrained image", brief="distance to the pretrained image",
        of="images", write=percent, bounds=(0.0, 1.0), shown=("sweep",),
        help="the root mean square difference of pixels from the pretrained model's image of the same seed, over their range",
    ),
    Figure(
        key="feature_distance", title="The same in features", brief="the same in features", of="images",
        help="the root mean square difference of features from those of the pretrained model's image of the same seed",
    ),
    _cost(key="params", title="Parameters", brief="params", shown=("main",)),
    _cost(key="flops", title="FLOPs"),
    _cost(key="flops_op", title="Operator FLOPs as in Table 4", brief="operator FLOPs as in Table 4"),
    _cost(
        key="flops_ft", title="Projection and featurizer FLOPs as in Table 4",
        brief="projection and featurizer FLOPs as in Table 4",
    ),
    _cost(
        key="attention_flops", title="Attention FLOPs", brief="attention FLOPs", shown=("main",),
        help="those of all attention operators in one forward pass of one image",
    ),
    _cost(
        key="attention_mixing_flops", title="Mixing FLOPs", brief="mixing FLOPs",
        help="those of all attention operators without their projections",
    ),
    _cost(
        key="mlp_flops", title="MLP FLOPs", brief="MLP FLOPs", shown=("main",),
        help="those of all MLPs in one forward pass of one image, where the plan edits some",
    ),
    _cost(key="saved_bytes", title="Bytes kept for the backward pass", brief="bytes kept"),
    Figure(key="loss", title="Loss", brief="loss", of="run", better="low", shown=("progress", "curve")),
    Figure(key="diffusion", title="Diffusion loss", of="run", better="low", shown=("curve",)),
    Figure(
        key="output", title="Distance to the output of the teacher", of="run", better="low",
        shown=("curve",),
    ),
    Figure(key="phase", title="Phase", brief="phase", of="run", write=count, shown=("progress",)),
    Figure(key="r2", title="R² on held-out images", brief="held-out R²", of="run", better="high", shown=("progress",)),
    Figure(key="fit_r2", title="R² of the fit", of="run", better="high", shown=("progress",)),
    Figure(key="lr", title="Learning rate", of="run", shown=("curve",)),
    Figure(key="grad_norm", title="Gradient norm before clipping", of="run", shown=("curve",)),
    Figure(
        key="ms_per_image", title="ms per image", brief="ms/image", of="model", better="low",
        shown=("main", "progress"),
    ),
    Figure(
        key="images_per_s", title="Images per second", brief="images/s", of="run", better="high",
        shown=("progress", "curve"),
    ),
    Figure(
        key="mfu", title="Share of the peak of the device (MFU)", brief="MFU", of="run", better="high",
        write=percent, shown=("progress", "curve"),
    ),
    Figure(
        key="data_wait", title="Waiting for data", brief="waiting for data", of="run", better="low",
        write=percent, shown=("progress",),
    ),
    Figure(key="num_images", title="Images", brief="images", of="run", write=count),
)  # fmt: skip
FIGURES = {figure.key: figure for figure in _ROWS}

# what an evaluation says of a figure beside its value
_PARTS = {
    "low": "lower limit",
    "high": "upper limit",
    "bias": "bias",
    "error": "standard error",
    "ratio": "ratio to the pretrained model",
    "difference": "difference from the pretrained model",
}


def shown_in(place: str) -> list[Figure]:
    """The figures of one place, such as `main`; see `Figure.shown`."""
    return [figure for figure in FIGURES.values() if place in figure.shown]


def headline(rows: Sequence[Measured]) -> Figure:
    """The figure that these rows are compared by: the first that judges images and that any row has."""
    measured = (f for f in FIGURES.values() if f.judges and any(is_number(row.get(f.key)) for row in rows))
    return next(measured, FIGURES["frechet"])


def verdict(row: Measured, base: Measured) -> str:
    """A sentence on whether a row is better than the one that it is paired with; empty if the two are not paired."""
    figure = headline([row, base])
    if not (written := figure.paired(row)):
        return ""
    part = row["paired"][figure.key]
    none, estimate = (1.0, part["ratio"]) if "ratio" in part else (0.0, part["difference"])
    name = figure.name([row, base])
    if estimate["low"] <= none <= estimate["high"]:
        return f"{row['name']} and {base['name']} cannot be told apart by {name}: {written}"
    found = "better" if (estimate["value"] < none) == (figure.better == "low") else "worse"
    return f"{row['name']} is {found} than {base['name']}: {name} {written}"


def name_of(key: str, rows: Sequence[Measured]) -> str:
    """Name of a figure, or of what is said of one: `frechet_bias` is `Fréchet distance, bias`."""
    if key in FIGURES:
        return FIGURES[key].name(rows)
    whole, _, part = key.rpartition("_")
    return f"{name_of(whole, rows)}, {_PARTS[part]}"


def bounds_of(key: str) -> tuple[float, float]:
    """The least and the most that a figure can be, or that two rows can differ in it: of `exact_difference` -1 and 1."""
    figure = FIGURES.get(key.removesuffix("_difference"))
    low, high = figure.bounds if figure else (-math.inf, math.inf)
    return (low, high) if key in FIGURES else (low - high, high - low)


def without_empty(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are empty in all rows."""
    kept = [i for i in range(len(head)) if any(row[i] not in ("", ABSENT) for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose cells hold text and nothing else."""
    lines = [
        "| " + " | ".join(map(in_markdown, head)) + " |",
        "| " + " | ".join(["---"] * len(head)) + " |",
        *("| " + " | ".join(map(in_markdown, row)) + " |" for row in rows),
    ]
    return "\n".join(lines)


def in_markdown(text: str) -> str:
    """A stranger's text on one line of Markdown: no cell, tag, link or picture begins or ends in it."""
    return _ACTIVE.sub(r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def fenced(text: str, language: str = "") -> str:
    """Text as a block of code, which nothing in it ends."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"
