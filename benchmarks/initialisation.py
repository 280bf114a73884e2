"""What an operator's start is worth: error before stage 1 and after a little of it, by operator and initialisation.

    python benchmarks/initialisation.py [build/initialisation.json] [--markdown] [--steps 100] [--batch-size 16]

The bundled testbed, every site of a role replaced. `random` takes nothing from the host, `inherit` is what a plan builds by
default, `calibrate` refits that in closed form on 256 noised images. Loss (L1 for attention, L2 for MLPs) and R^2 are means
over the sites, on held-out images. Rows are written as they finish; those that the file holds already are not run again.
About 0.15 s a step, 48 rows, on one core: ten to fifteen minutes.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from grafting.data.bundled import bundled_subset, testbed_model_folder
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import build_operators
from grafting.machine.files import write_json
from grafting.models.dit import DiT
from grafting.training.calibration import CalibrateConfig, calibrate
from grafting.training.distillation import DistillConfig, distill

ATTENTION: tuple[dict[str, Any], ...] = (
    {"name": "hyena-se"},
    {"name": "hyena-x"},
    {"name": "hyena-y"},
    {"name": "hyena-se", "geometry": "2d", "kernel_size": 3},
    {"name": "hyena-x", "geometry": "2d", "kernel_size": 3},
    {"name": "hyena-y", "geometry": "2d", "kernel_size": 3},
    {"name": "window-1d"},
    {"name": "window-2d", "radius": 2},
    {"name": "linear"},
    {"name": "linear", "conv": 3},
    {"name": "ttt"},
    {"name": "hybrid", "first": {"name": "window-2d", "radius": 2}, "second": "linear"},
    {"name": "mamba2"},
)
MLP: tuple[dict[str, Any], ...] = (
    {"name": "mlp", "ratio": 3},
    {"name": "mlp", "ratio": 6},
    {"name": "mlp-hyena-x"},
)
STARTS = ("random", "inherit", "calibrate")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = Path("build/initialisation.json")
    parser.add_argument(
        "path", nargs="?", type=Path, default=path, help=f"the JSON file of the rows ({path})"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print these settings' rows as a table, run nothing"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    args.path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.path.read_text()) if args.path.exists() else []
    if args.markdown:
        print(table(rows))
        return
    torch.set_num_threads(1)
    settings = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "holdout": 128,
        "holdout_every": args.steps,
    }
    bench = Bench(DistillConfig(**settings, precision="fp32"))
    for role, operators in (("mlp", MLP), ("attention", ATTENTION)):
        for operator in operators:
            for start in STARTS:
                facts = {"operator": operator, "role": role, "start": start, "stage_1": settings}
                if not any(row.items() >= facts.items() for row in rows):
                    rows.append(facts | bench.measure(operator, role, start))
                    write_json(args.path, rows)
                    print(json.dumps(rows[-1]), flush=True)


class Bench:
    """The testbed, and what is measured on it."""

    def __init__(self, config: DistillConfig):
        self.teacher, self.data = DiT.from_pretrained(testbed_model_folder()).eval(), bundled_subset()
        self.config = config

    def measure(self, operator: dict[str, Any], role: str, start: str) -> dict[str, Any]:
        """Means over the sites before and after stage 1, R^2 by site before it, and seconds."""
        started = time.perf_counter()
        plan = Plan(edits=(Replace(role=role, blocks="all", operator=operator),))
        operators = build_operators(self.teacher, plan.randomised() if start == "random" else plan)
        if start == "calibrate":
            config = CalibrateConfig(samples=256, precision="fp32")
            for _ in calibrate(self.teacher, operators, self.data, config):
                pass
        calibrated = time.perf_counter()
        steps = distill(self.teacher, operators, self.data, self.config)
        before, *_, after = (step.values for step in steps)
        return {
            "loss_before": _mean(before, "holdout_loss"),
            "loss_after": _mean(after, "holdout_loss"),
            "r2_before": _mean(before, "r2"),
            "r2_after": _mean(after, "r2"),
            "r2_before_by_site": [round(v, 4) for name, v in before.items() if name.startswith("r2/")],
            "start_seconds": round(calibrated - started, 1),
            "seconds": round(time.perf_counter() - started, 1),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, an operator a line."""
    lines = ["| operator | measure | " + " | ".join(STARTS) + " |", "|---|---|" + "---|" * len(STARTS)]
    operators = list({json.dumps(row["operator"]): row["operator"] for row in rows}.values())
    for operator in operators:
        own = {row["start"]: row for row in rows if row["operator"] == operator}
        for measure in ("loss", "r2"):
            cells = [
                f"{own[s][f'{measure}_before']:.4f} → {own[s][f'{measure}_after']:.4f}" if s in own else ""
                for s in STARTS
            ]
            lines.append(f"| {_described(operator)} | {measure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _described(operator: dict[str, Any]) -> str:
    settings = [f"{key} {_short(value)}" for key, value in operator.items() if key != "name"]
    return ", ".join([operator["name"], *settings])


def _short(value: Any) -> str:
    return _described(value) if isinstance(value, dict) else str(value)


def _mean(values: dict[str, float], kind: str) -> float:
    sites = [value for name, value in values.items() if name.startswith(f"{kind}/")]
    return round(sum(sites) / len(sites), 5)


if __name__ == "__main__":
    main()
