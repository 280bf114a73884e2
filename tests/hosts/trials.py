"""What each transformer class of diffusers can do once it is traced: the checks behind docs/hosts.md.

`make hosts` (`PYTHONPATH=tests python -m hosts.trials`) runs all of them on the tiny instances of `zoo.py`, and writes `results/hosts.json` and the table of
`docs/hosts.md`; with names of classes, it measures these anew. A class is true in a column if the check ran and passed; `reason` is what the first that did not said.
"""

import copy
import itertools
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from grafting.contract import Denoiser, Site
from grafting.editing.plan import Drop, Edit, Merge, Plan, Replace
from grafting.editing.surgery import build_operators, graft, place
from grafting.errors import GraftingError
from grafting.hosts import LatentTokens, PackedTokens, SdpaHost, Trace, trace
from grafting.hosts._grids import channel_axis
from grafting.training.distillation import DistillConfig, distill
from grafting.training.finetuning import FinetuneConfig, finetune
from grafting.weights.folder import load, save
from hosts import zoo
from hosts.zoo import Specimen, transformer_classes

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "results" / "hosts.json", ROOT / "docs" / "hosts.md"


class Absent(Exception):
    """The class has nothing that this check is about."""


@dataclass
class Fixed:
    """Conditions that are the other arguments of an example, for its batch alone."""

    given: dict[str, Any]
    dropout: float = 0.0

    def __len__(self) -> int:
        return 1

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "fixed"}

    def nulls(self, numbers: Tensor) -> None:
        return None

    def at(self, numbers: Tensor, **_: Any) -> dict[str, Any]:
        return self.given

    def words(self, number: int) -> str:
        return ""


@dataclass
class Noise:
    """Images of one shape, as training data."""

    shape: tuple[int, ...]
    num_classes: int = 1

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(3)
        return torch.randn(len(indices), *self.shape, generator=draw), torch.zeros(
            len(indices), dtype=torch.long
        )


@dataclass
class Trial:
    """A class in trial: its tiny instance, traced once; each check begins with a fresh copy."""

    specimen: Specimen
    traced: Trace = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.specimen.model()
        self.traced = trace(self.original, example=self.specimen.example())

    @property
    def host(self) -> SdpaHost:
        return self.traced.host

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Its attentions and MLPs, but those that no kernel can answer."""
        return tuple(site for site in self.host.sites(self.original) if site.path not in self.traced.partial)

    def model(self) -> nn.Module:
        return copy.deepcopy(self.original)

    def blocks(self, role: str, *, mixers: bool = False) -> list[int]:
        """Those where an operator may stand: of attentions a kernel, or a mixer."""
        needs_call = role == "attention" and not mixers
        return [
            s.block
            for s in self.sites
            if s.role == role and (s.attention.turn if needs_call else s.module is not None)
        ]

    def run(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(2)
        return tensors(model(**self.specimen.example()))

    def both_ways(self, *edits: Edit) -> None:
        """Forward and backward with these edits: all is finite, and the output has changed."""
        model = self.model()
        with torch.no_grad():
            before = self.run(model)
        record = graft(model, Plan(edits=edits), host=self.host)
        output = self.run(model)
        assert any(not torch.equal(a, b) for a, b in zip(before, output, strict=True)), (
            "the output is the same"
        )
        sum(t.square().mean() for t in output).backward()
        gradients = [p.grad for n, p in model.named_parameters() if p.grad is not None]
        assert gradients, "no gradient"
        assert all(t.isfinite().all() for t in (*output, *gradients)), "not finite"
        for path, operator in record.operators.items():
            parts = list(operator.parameters())
            assert not parts or any(p.grad is not None for p in parts), f"{path} got no gradient"

    def used(self) -> list[str]:
        """Parameters that the example's output depends on."""
        model = self.model()
        sum(t.square().mean() for t in self.run(model)).backward()
        return [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]

    def window(self, *, first: bool = False) -> Replace:
        """A window that hides something on this grid; where no kernel can stand, a mixer."""
        grid, blocks = self.traced.grid, self.blocks("attention")
        if not blocks:
            return self.hyena()
        operator = (
            {"name": "window-2d", "radius": 1}
            if min(grid.rows, grid.cols) > 2
            else {"name": "window-1d", "window": 2}
        )
        return Replace(role="attention", blocks=blocks[:1] if first else blocks, operator=operator)

    def hyena(self) -> Replace:
        """Hyena-X in the place of whole attentions."""
        blocks = self.blocks("attention", mixers=True)
        if not blocks:
            raise Absent("no attention takes and returns its tokens as one tensor without a mask")
        init = "inherit" if self.host.spec.projections else "random"
        return Replace(role="attention", blocks=blocks, operator={"name": "hyena-x", "init": init})

    def denoiser(self) -> Denoiser:
        """The host's own, with the example's other arguments as the one condition."""
        image, time = self.host.spec.image, self.host.spec.time
        own = {image.argument, time.argument}
        if isinstance(image, PackedTokens):
            own |= {
                None if image.after else image.positions,
                *([image.sizes] if isinstance(image.sizes, str) else image.sizes or ()),
            }
        given = {name: value for name, value in self.specimen.example().items() if name not in own}
        if isinstance(image, LatentTokens) and image.beside:
            latent = self.specimen.example()[image.argument]
            axis = channel_axis(image, latent)
            given[image.argument] = latent.narrow(axis, latent.shape[axis] - image.beside, image.beside)
        return self.host.denoiser(self.original, Fixed(given))  # type: ignore[arg-type]  # nulls are None

    def data(self) -> tuple[Noise, int]:
        example = self.specimen.example()[self.host.spec.image.argument]
        return Noise(self.host.at_grid(self.traced.grid).shape(self.original)), len(example)


def tensors(output: Any) -> list[Tensor]:
    """Every tensor that a model returned."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in tensors(part)]


def kernels(trial: Trial) -> list[int]:
    """Blocks where kernels can stand."""
    if found := trial.blocks("attention"):
        return found
    raise Absent("its attention makes no call of scaled_dot_product_attention")


def identity(trial: Trial) -> None:
    """With softmax kernels everywhere the output is the same, bit for bit."""
    model = trial.model()
    with torch.no_grad():
        before = trial.run(model)
        softmax = Replace(role="attention", blocks=kernels(trial), operator="softmax")
        graft(model, Plan(edits=(softmax,)), host=trial.host)
        after = trial.run(model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the output has changed"


def kernel(trial: Trial) -> None:
    """Windows everywhere, forward and backward."""
    kernels(trial)
    trial.both_ways(trial.window())


def mixer(trial: Trial) -> None:
    """Hyena-X in the place of whole attentions."""
    trial.both_ways(trial.hyena())


def mlp(trial: Trial) -> None:
    """Narrower MLPs."""
    blocks = trial.blocks("mlp")
    if not blocks:
        raise Absent("no MLP that takes and returns the image's tokens alone")
    layers = trial.host.spec.mlp
    init = "inherit" if layers and not layers.gated else "random"
    trial.both_ways(Replace(role="mlp", blocks=blocks, operator={"name": "mlp", "ratio": 0.5, "init": init}))


def drop(trial: Trial) -> None:
    """A block left out."""
    free = [site.block for site in trial.host.blocks(trial.original) if not site.fixed]
    if not free:
        raise Absent("no block takes and returns its tokens alone")
    trial.both_ways(Drop(blocks=free[-1:]))


def merge(trial: Trial) -> None:
    """Two blocks merged, and one left out."""
    drop(trial)
    for pair in mergeable(trial):
        return trial.both_ways(Merge(blocks=pair))
    raise Absent("no two blocks in a row that return one tensor of tokens and are called alike")


def mergeable(trial: Trial) -> Iterator[list[int]]:
    sites = [s for s in trial.host.blocks(trial.original) if not s.fixed and s.call and s.call.merges]
    lists = [site.path.rpartition(".")[0] for site in sites]
    for i, (first, second) in enumerate(itertools.pairwise(sites)):
        if second.block == first.block + 1 and lists[i] == lists[i + 1]:
            yield [first.block, second.block]


def stage1(trial: Trial) -> None:
    """Two steps that fit operators to what they replace."""
    edits = [trial.window()]
    if mixers := trial.blocks("attention", mixers=True):
        edits = [
            Replace(role="attention", blocks=mixers[-1:], operator={"name": "hyena-x", "init": "random"})
        ]
    data, batch_size = trial.data()
    model = trial.model()
    operators = build_operators(model, Plan(edits=edits), host=trial.host)
    config = DistillConfig(steps=2, batch_size=batch_size, holdout=batch_size, precision="fp32")
    steps = list(distill(model, operators, data, config, denoiser=trial.denoiser()))
    losses = [value for step in steps for name, value in step.values.items() if "loss/" in name]
    assert losses, "no loss"
    assert all(torch.tensor(losses).isfinite()), "a loss is not finite"
    place(model, operators)
    with torch.no_grad():
        trial.run(model)


def stage2(trial: Trial) -> None:
    """Two steps of training end to end."""
    data, batch_size = trial.data()
    model = trial.model()
    graft(model, Plan(edits=(trial.window(),)), host=trial.host)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = FinetuneConfig(steps=2, batch_size=batch_size, warmup_steps=0, precision="fp32", ema_decay=0.5)
    for step in finetune(model, data, config, denoiser=trial.denoiser(), teacher=trial.model()):
        assert all(torch.tensor(list(step.values.values())).isfinite()), "a value is not finite"
    moved = sum(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert moved > len(trial.used()) // 2, "few parameters moved"


def saved(trial: Trial) -> None:
    """Saved and loaded, a graft is the same, with nothing said of its host."""
    model = trial.model()
    graft(model, Plan(edits=(trial.window(first=True),)), host=trial.host)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = trial.run(model)
        save(model, folder)
        after = trial.run(load(folder))
    # weights that lie in a mapped file begin at another place in memory, and products may be summed in another order
    same = (torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(before, after, strict=True))
    assert all(same), "the output has changed"


def pipeline(trial: Trial) -> None:
    """Traced through its pipeline: the same sites, and the pipeline draws the same with softmax kernels, saved and loaded too."""
    from hosts import pipelines

    made = pipelines.PIPELINES.get(trial.specimen.name)
    if made is None:
        raise Absent("its pipeline is not in the trials")
    pipe, call = made()
    traced = trace(pipe, **call)
    told = {"masked", "mixers"}  # one prompt alone is never padded
    blocks = [[b.model_dump(exclude=told) for b in t.spec.blocks] for t in (traced, trial.traced)]
    assert blocks[0] == blocks[1], "other blocks"
    assert traced.spec.order == trial.traced.spec.order, "another order"
    assert traced.spec.image.argument == trial.traced.spec.image.argument, "another image"
    draw = {"num_inference_steps": 2, "output_type": "latent", **call}
    before = pipe(**draw, generator=torch.Generator().manual_seed(0))[0]
    graft(
        traced.model,
        Plan(edits=(Replace(role="attention", blocks="all", operator="softmax"),)),
        host=traced.host,
    )
    after = pipe(**draw, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(before, after), "softmax kernels draw another image"
    with tempfile.TemporaryDirectory() as folder:
        save(traced.model, folder)
        pipe.transformer = load(folder)
    again = pipe(**draw, generator=torch.Generator().manual_seed(0))[0]
    assert torch.allclose(again, before, rtol=1e-4, atol=1e-4), "the saved graft draws another image"


CHECKS: dict[str, Callable[[Trial], None]] = {
    "identity": identity,
    "kernel": kernel,
    "mixer": mixer,
    "mlp": mlp,
    "merge": merge,
    "stage1": stage1,
    "stage2": stage2,
    "saved": saved,
    "pipeline": pipeline,
}
COLUMNS = ("traced", *CHECKS)


def passed(check: Callable[[Trial], None], trial: Trial) -> str:
    """Why a check did not pass; empty if it did."""
    try:
        check(trial)
    except Absent as why:
        return str(why)
    except AssertionError as error:
        return str(error) or "an assertion failed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def row(specimen: Specimen) -> dict[str, Any]:
    """What a class can do."""
    try:
        trial = Trial(specimen)
        frames, rows, cols = specimen.grid if len(specimen.grid) == 3 else (1, 1, *specimen.grid)
        found = (trial.traced.grid.frames, trial.traced.grid.rows, trial.traced.grid.cols)
        assert found == (frames, rows, cols), f"grid {found}, not {(frames, rows, cols)}"
    except (GraftingError, AssertionError) as error:
        return {
            "class": specimen.name,
            **dict.fromkeys(COLUMNS, False),
            "reason": f"traced: {_short(str(error))}",
        }
    reasons = {name: passed(check, trial) for name, check in CHECKS.items()}
    said = [f"{name}: {_short(reason)}" for name, reason in reasons.items() if reason and name != "pipeline"]
    return {
        "class": specimen.name,
        "traced": True,
        **{name: not reason for name, reason in reasons.items()},
        "reason": "; ".join(said),
    }


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:200]


def table(names: list[str]) -> list[dict[str, Any]]:
    """A row for every transformer class of diffusers: of these names anew, of all others as they were measured."""
    known = (
        {row["class"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() and names else {}
    )
    tried = {specimen.name: specimen for specimen in zoo.specimens()}
    for name in transformer_classes():
        if name not in tried:
            reason = zoo.NOT_TRIED.get(name, "no tiny instance of it in the trials")
            known[name] = {"class": name, **dict.fromkeys(COLUMNS, False), "reason": f"not tried: {reason}"}
        elif not names or name in names:
            known[name] = row(tried[name])
            print(name, *(column for column in COLUMNS if known[name][column]), flush=True)
    return [known[name] for name in sorted(known)]


def page(rows: list[dict[str, Any]], version: str) -> str:
    """docs/hosts.md, as measured with this version of diffusers."""
    counts = {column: sum(row[column] for row in rows) for column in COLUMNS}
    lines = [
        "# Which transformers can be grafted",
        "",
        f"Measured on tiny random instances of every transformer class of diffusers {version}, traced from example inputs "
        "with `grafting.trace` ([your own pipeline](my-pipeline.md)). Made by `make hosts`; the figures are in "
        "`results/hosts.json`.",
        "",
        "A yes is of prompts without padding, and of the blocks that take it, which may be few: of Lumina 2's attentions those of the "
        "image's refiner take mixers, and its layers kernels alone. `grafting sites MODEL` lists them, `grafting.trace` says it of a class.",
        "",
        *(f"- **{column}**: {WORDS[column]}" for column in COLUMNS),
        "",
        f"| class ({len(rows)}) | {' | '.join(f'{column} ({counts[column]})' for column in COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {r['class']} | {' | '.join('yes' if r[c] else '' for c in COLUMNS)} |" for r in rows),
        "",
        "## Why not",
        "",
        *(f"- **{r['class']}**: {r['reason'].replace('|', '/')}" for r in rows if r["reason"]),
        "",
    ]
    return "\n".join(lines)


WORDS = {
    "traced": "attentions, order of tokens and grid are found, and a spec proposed",
    "identity": "with softmax kernels in all attentions, outputs are equal bit for bit",
    "kernel": "windows in all of them: forward and backward",
    "mixer": "Hyena-X in the place of those attentions that take and return one tensor of tokens, forward and backward",
    "mlp": "narrower MLPs where they are of the image's tokens alone, forward and backward",
    "merge": "two blocks merged, one dropped, forward and backward",
    "stage1": "operators are fitted to what they replace",
    "stage2": "the graft is trained end to end",
    "saved": "saved and loaded, outputs are equal bit for bit, and the host is known",
    "pipeline": "traced through its pipeline, which draws the same with softmax kernels, and with the saved graft (tried for some)",
}


def main() -> None:
    warnings.simplefilter("ignore")
    rows = table(sys.argv[1:])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows, diffusers.__version__))
    print({column: sum(row[column] for row in rows) for column in COLUMNS})


if __name__ == "__main__":
    main()
