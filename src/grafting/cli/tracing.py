"""`grafting sites --trace`: the proposed spec of a transformer, as a table, as JSON, and in a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, HostError
from ..machine.reading import JsonObject, cut, failure_of, read_json
from ._shared import out, parse_setting, print_json
from .display import plain_table, say

if TYPE_CHECKING:
    from ..hosts import Trace


def trace_sites(name: str, *, to: Path | None, call: list[str], example: Path | None, as_json: bool) -> None:
    """Trace a pipeline or a model, show what was seen, and write the spec."""
    traced = _traced(name, call, example)
    exact = _is_exact(traced)
    if to is not None:
        traced.save(to)
    if as_json:
        print_json(_facts(traced, exact))
        return
    out.print(
        plain_table(
            ["attention", "calls", "kind", "tokens", "mask"],
            [[row.path, row.count, row.kind, row.tokens, row.mask] for row in traced.seen],
        )
    )
    for line in str(traced).splitlines():
        if not line.startswith(" "):
            say(out, line)
    if exact is not None:
        found = "the same output, bit for bit" if exact else "ANOTHER output: do not use this spec"
        say(out, f"Softmax kernels in all of them give {found}.")
    say(
        out,
        f"Spec: {to}; pass it with --spec {to}"
        if to
        else "Write it with --out FILE; other commands take it with --spec FILE.",
    )


def _traced(name: str, call: list[str], example: Path | None) -> "Trace":
    """The trace of what a name stands for: a pipeline, or a model of diffusers with its example."""
    from ..hosts import trace
    from ..weights.tensors import load_tensors

    given = dict(map(parse_setting, call))
    tensors: Mapping[str, Any] = {**load_tensors(example)} if example else {}
    index = Path(name) / "model_index.json"
    if index.is_file() or not Path(name).exists():
        return trace(_load("DiffusionPipeline", name, **_left_out(index)), **tensors, **given)
    _check_model(Path(name))
    if not tensors:
        raise HostError(
            f"{name} is a model alone, which says nothing of its inputs: give --example FILE.safetensors, the keyword arguments of a "
            "forward pass by name, or trace its pipeline"
        )
    return trace(_load("AutoModel", name), example={**tensors, **given})


def _check_model(folder: Path) -> None:
    """Raise where there is no model, or one that grafting does not edit, before anything is asked of it."""
    from ..hosts import unknown_class

    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"there is no model in {folder}: it has neither model_index.json, as a pipeline's folder has, nor config.json, "
            "as a model's"
        )
    name = str(read_json(config, JsonObject).get("_class_name"))
    if "UNet" in name:
        raise HostError(f"{folder} holds a {cut(name)}; {unknown_class(cut(name))}")


def _left_out(index: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without, such as text encoders; diffusers wants them named."""
    parts = read_json(index, JsonObject) if index.is_file() else {}
    return {name: None for name, part in parts.items() if part == [None, None]}


def _load(loader: str, name: str, **parts: Any) -> Any:
    import diffusers

    try:
        return getattr(diffusers, loader).from_pretrained(name, **parts)
    except Exception as error:
        advice = "name the folder of a whole one, as save_pretrained writes it"
        raise CheckpointError(
            f"{name} cannot be read as a {loader} of diffusers: {failure_of(error, advice)}"
        ) from error


def _is_exact(traced: "Trace") -> bool | None:
    """Whether the model gives the same output with softmax kernels in all its sites; None if none can stand there."""
    import torch

    from ..editing.plan import Plan, Replace
    from ..editing.surgery import graft

    if not traced.blocks:
        return None
    before = traced.outputs()
    plan = Plan(
        edits=(Replace.model_validate({"role": "attention", "blocks": traced.blocks, "operator": "softmax"}),)
    )
    record = graft(traced.model, plan, host=traced.host)
    try:
        after = traced.outputs()
    finally:
        record.undo()
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _facts(traced: "Trace", exact: bool | None) -> dict[str, object]:
    return {
        "class": type(traced.model).__name__,
        "seen": [vars(row) for row in traced.seen],
        "grid": vars(traced.grid),
        "num_forwards": traced.num_forwards,
        "exact": exact,
        "questions": list(traced.questions),
        "spec": traced.spec.model_dump(mode="json", exclude_defaults=True),
    }
