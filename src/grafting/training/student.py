"""A model as stage 2 trains it: compiled block by block, by several processes, and what is not trained in half precision."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..contract import Denoiser
from ..editing.adapters import adapters_of
from ..editing.placed import Placed
from ..machine import processes
from ..machine.devices import default_device
from ..machine.sharding import copy_whole, shard
from .batches import NoisedBatch
from .phases import FinetuneConfig

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin


class Student:
    """The model as it is trained: compiled block by block, and by several processes, together or each a part of it."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], config: FinetuneConfig, denoiser: Denoiser):
        self.model = self.result = model
        device = default_device()
        if config.shard and processes.connect():
            # the copy is spread; what it was copied from waits for the result
            self.model = copy.deepcopy(model).to(device)
            model.to("cpu")
        self.model.to(device).train()
        self.checkpoints = config.gradient_checkpointing
        if self.checkpoints:
            cast("ModelMixin", self.model).enable_gradient_checkpointing()
        modules = {path: self.model.get_submodule(path) for path in blocks}
        self.regions = modules if config.compile else {}
        """What is to run compiled, by path."""
        self.call: nn.Module = _Call(self.model, denoiser)
        if self.model is not model:
            shard(self.call, list(modules.values()), device)
        elif processes.connect():
            # every process begins with the main one's weights
            devices = None if device.type == "cpu" else [device]
            self.call = DistributedDataParallel(self.call, device_ids=devices)

    def __call__(self, batch: NoisedBatch) -> Tensor:
        return self.call(batch.x_t, batch.t, batch.numbers)

    def gradients_averaged(self, averaged: bool) -> AbstractContextManager:
        """Inside, whether a backward pass averages gradients over processes; those that do not are added up here."""
        if isinstance(self.call, DistributedDataParallel) and not averaged:
            return self.call.no_sync()
        return nullcontext()

    def finish(self) -> None:
        """Leave the weights in the model that was given."""
        if self.checkpoints:
            cast("ModelMixin", self.model).disable_gradient_checkpointing()
        if self.model is not self.result:
            copy_whole(self.model, self.result.to(default_device()))
        self.result.eval()


class _Call(nn.Module):
    """A model as its host calls it, so that what averages gradients over processes stands outside of that call."""

    def __init__(self, model: nn.Module, denoiser: Denoiser):
        super().__init__()
        self.model, self.denoiser = model, denoiser

    def forward(self, x_t: Tensor, t: Tensor, numbers: Tensor) -> Tensor:
        prediction = self.denoiser(self.model, x_t, t, numbers)
        # FSDP wants no view as the result: an operation in place on it would lose its hook
        return prediction.clone() if prediction._is_view() else prediction


@contextmanager
def held_in_bf16(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, these are in bf16, and their fp32 values wait on the CPU. What shares memory goes on sharing it."""
    full: dict[int, Tensor] = {}
    half: dict[int, Tensor] = {}
    places = [(parameter, parameter.data_ptr()) for parameter in parameters]
    for parameter, place in places:
        if place not in full:
            full[place] = parameter.data.cpu()
            half[place] = parameter.data.bfloat16()
        parameter.data = half[place]
    half.clear()
    try:
        yield
    finally:
        # the model may have been moved meanwhile
        back = {place: full[place].to(parameter.device) for parameter, place in places}
        for parameter, place in places:
            parameter.data = back[place]


def block_linears(model: nn.Module, blocks: Sequence[str]) -> list[nn.Parameter]:
    """Weights and biases of the linear layers in these blocks: autocast computes with them in bf16 whatever they are held in.

    Those of operators, which may compute in another way, are left out.
    """
    operators = {
        part for module in model.modules() if isinstance(module, Placed) for part in module.modules()
    }
    linears = {
        module: None
        for path in blocks
        for module in model.get_submodule(path).modules()
        if isinstance(module, nn.Linear) and module not in operators
    }
    adapters = {id(p) for adapter in adapters_of(model).values() for p in (adapter.a, adapter.b)}
    found = [parameter for module in linears for parameter in module.parameters(recurse=False)]
    return [parameter for parameter in found if id(parameter) not in adapters]
