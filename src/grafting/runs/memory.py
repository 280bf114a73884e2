"""Memory on a process's device and disk that a recipe's stages take, in bytes, each by what it holds."""

from ..machine.precision import Precision
from ..training.distillation import DistillConfig
from ..training.phases import FinetuneConfig
from .shapes import BF16, FP32, PhaseShapes, Shapes
from .states import NUM_STATES

_ADAM = 8  # bytes: both moments of a parameter


def weights(shapes: Shapes) -> dict[str, int]:
    """Of the pretrained model and the operators beside it."""
    return {"pretrained model": FP32 * shapes.cost.before.params, "operators": FP32 * shapes.new_params}


def copies(precision: Precision, params: int) -> dict[str, int]:
    """Of weight copies that autocast keeps during a pass."""
    return {"bf16 copies of weights": BF16 * params} if precision == "bf16" else {}


def distill_memory(config: DistillConfig, shapes: Shapes, processes: int) -> dict[str, int]:
    """Memory of stage 1: the teacher keeps no graph, so one block's activations and the graph of the largest operator, or where
    they are stacked those of all."""
    spreads_sites = config.spread == "sites"
    sharing = processes if spreads_sites else 1
    own = shapes.new_params // sharing
    batch = config.batch_size // (1 if spreads_sites else processes) // config.accumulate
    block = shapes.saved // shapes.num_blocks
    held = shapes.linears if config.frozen == "bf16" else 0
    graphs = [site.saved_bytes for site in shapes.cost.after.sites if site.operator] or [block]
    graph = sum(graphs) // sharing if config.stacked else max(graphs)
    stacks = {"stacked operators and gradients": 2 * FP32 * own} if config.stacked else {}
    return {
        "pretrained model": FP32 * shapes.cost.before.params - (FP32 - BF16) * held,
        "operators": FP32 * shapes.new_params,
        "gradients and moments": (FP32 + _ADAM) * own,
        **stacks,
        **copies(config.precision, shapes.cost.before.params + shapes.new_params - held),
        f"activations of {batch} images": batch * (block + graph),
    }


def distill_disk(config: DistillConfig, shapes: Shapes) -> dict[str, int]:
    state = (FP32 + _ADAM) * shapes.new_params
    return {
        f"states ({NUM_STATES} kept, one being written)": (NUM_STATES + 1) * state,
        "operators": FP32 * shapes.new_params,
        "activations": kept_activations(config, shapes),
    }


def kept_activations(config: DistillConfig, shapes: Shapes) -> int:
    element = BF16 if config.precision == "bf16" else FP32
    return shapes.dump_bytes(config.cache_samples or 0) * element // BF16


def phase_memory(
    config: FinetuneConfig, phase: PhaseShapes, shapes: Shapes, processes: int
) -> dict[str, int]:
    """Memory of a phase of stage 2: what it does not train lies in the pretrained model, which is the teacher too."""
    shards = processes if config.shard else 1
    held = phase.held if config.frozen == "bf16" else 0
    batch = _batch(config, processes)
    average = {"moving average": FP32 * phase.trained // shards} if config.ema_device == "model" else {}
    how = ", checkpointed" if config.gradient_checkpointing else ""
    return {
        "pretrained model": FP32 * shapes.cost.before.params
        - (FP32 - BF16) * (shapes.linears if held else 0),
        **_own_weights(phase, shapes, shards),
        "gradients": FP32 * phase.trained // shards,
        "moments": _ADAM * phase.trained // shards,
        **average,
        **copies(config.precision, (shapes.cost.after.params - held) // shards),
        f"activations of {batch} images{how}": activations(config, phase, shapes, processes),
    }


def _own_weights(phase: PhaseShapes, shapes: Shapes, shards: int) -> dict[str, int]:
    adapters = {"adapters": FP32 * phase.adapters // shards} if phase.adapters else {}
    if shards > 1:
        # what is spread over processes shares no memory
        return {"weights": FP32 * shapes.cost.after.params // shards, **adapters}
    return {
        "operators": FP32 * shapes.new_params,
        **({"copies of trained weights": FP32 * phase.copies} if phase.copies else {}),
        **adapters,
    }


def activations(
    config: FinetuneConfig,
    phase: PhaseShapes,
    shapes: Shapes,
    processes: int,
    *,
    checkpointed: bool | None = None,
) -> int:
    """Bytes of activations kept for the backward pass of a micro-batch; as the config says, or the other way."""
    image = phase.saved
    if config.gradient_checkpointing if checkpointed is None else checkpointed:
        # what stands between blocks, and one block at a time
        image = image // shapes.num_blocks + shapes.num_blocks * shapes.sequence_bytes
    return _batch(config, processes) * image


def _batch(config: FinetuneConfig, processes: int) -> int:
    return config.batch_size // processes // config.accumulate


def phase_disk(config: FinetuneConfig, phase: PhaseShapes, shapes: Shapes) -> dict[str, int]:
    """A state holds what is trained: its weights, their average and its moments."""
    state = (2 * FP32 + _ADAM) * phase.trained
    return {
        f"states ({NUM_STATES} kept, one being written)": (NUM_STATES + 1) * state,
        "model": FP32 * shapes.cost.after.params,
    }
