"""The Triton kernels compile for cards that are not at hand, and fit them: memory and registers. Without a GPU, and slow.

pip install 'triton>=3.7'    # of torch's builds only those for CUDA come with it
pytest tests/functional/test_fused_builds.py -m slow
"""

import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedcases import GATED, WINDOWS, filters, leaves
from grafting.contract import Grid, TokenLayout
from grafting.functional import _triton
from grafting.functional.gated_conv import gated_channels, gated_conv, silu_conv
from grafting.functional.gated_norm import gated_norm
from grafting.functional.linear import linear_attention
from grafting.functional.modulated_norm import modulated_norm
from grafting.functional.ssd import ssd

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or _triton.INTERPRETED,
        reason="needs triton (pip install 'triton>=3.7'), without TRITON_INTERPRET",
    ),
]


@dataclass(frozen=True)
class Card:
    """Compute capability, and the shared memory that a program may take (CUDA C++ Programming Guide, technical specifications)."""

    capability: tuple[int, int]
    shared: int  # bytes

    @property
    def name(self) -> str:
        return "sm_{}{}".format(*self.capability)

    @property
    def is_roomy(self) -> bool:
        return self.shared > 160 << 10


CARDS = [
    Card((8, 0), 163 << 10),  # A100
    Card((8, 9), 99 << 10),  # L4, L40, GeForce RTX 4090; as 8.6 has it: A10, A40, RTX 3090
    Card((9, 0), 227 << 10),  # H100, H200
    Card((10, 0), 227 << 10),  # B200
    Card((12, 0), 99 << 10),  # GeForce RTX 5090
]
MOST_SPILLED = 1300
"""Bytes of memory that a thread takes for want of registers. Beyond some 2,000 the assembler puts all it has there."""


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel takes of a card; bytes of a thread's memory, and of a program's."""

    name: str
    registers: int
    spilled: int
    shared: int


class Driver:
    """What Triton asks a card."""

    def __init__(self, card: Card):
        from triton.backends.compiler import GPUTarget

        major, minor = card.capability
        self.target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 10 * self.target.arch  # kernels are kept by it

    def get_current_stream(self, device: object = None) -> int:
        return 0


@pytest.fixture(params=CARDS, ids=lambda card: card.name)
def card(request) -> Card:
    return request.param


@pytest.fixture
def built(card, tmp_path, monkeypatch) -> Iterator[list[Kernel]]:
    """Kernels that are launched are compiled for the card, and not run; these they are."""
    import triton
    from triton.runtime.jit import JITFunction

    from grafting.functional._triton import linear, ssd

    found: list[Kernel] = []

    def launching(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            compiled = kernel.warmup(*arguments, grid=grid, **constants)
            (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
            used = resources(tmp_path / "kernel.cubin")
            found.append(Kernel(kernel.__name__, used["REG"], used["STACK"], compiled.metadata.shared))

        return launch

    monkeypatch.setattr(JITFunction, "__getitem__", launching)
    monkeypatch.setattr(_triton, "INTERPRETED", True)  # tensors of the CPU go to the kernels
    monkeypatch.setattr(linear, "_is_roomy", lambda device: card.is_roomy)
    for launches in (linear, ssd):
        monkeypatch.setattr(launches, "has_wide_products", lambda device: card.capability[0] in (9, 10))
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(Driver(card))
    yield found
    vars(triton.runtime.driver).update(before)


def resources(cubin: Path) -> dict[str, int]:
    """Counts of a kernel's registers and bytes: REG, STACK, SHARED, LOCAL."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def run(output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Launch the kernels of the gradients too."""
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


def check(built: list[Kernel], card: Card, *names: str) -> None:
    assert {kernel.name for kernel in built} == set(names)
    for kernel in built:
        assert kernel.shared <= card.shared, kernel
        assert kernel.spilled <= MOST_SPILLED, kernel


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@DTYPES
@pytest.mark.parametrize("name", GATED)
def test_gated_convolutions_fit_a_card(name, dtype, card, built):
    short, inner = filters(name, 1152, "cpu")
    x = zeros(64, 256, 3 * 1152, dtype=dtype)
    run(gated_conv(x, short, inner, TokenLayout(Grid(16, 16))), leaves(x, short, inner))
    backward = [f"{part}_backward_kernel" for part, own in (("short", short), ("inner", inner)) if own]
    check(built, card, "gate_kernel", "gate_backward_kernel", *backward)
    if max(GATED[name][0] or 0, GATED[name][1] or 0) <= 4:  # those that are used
        assert max(kernel.spilled for kernel in built) <= 64


@DTYPES
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_fit_a_card(name, dim, dtype, card, built):
    layout = (
        TokenLayout(Grid(8, 8, frames=4)) if name.startswith("3d") else TokenLayout(Grid(16, 16), after=77)
    )
    window, _, settings = WINDOWS[name]
    q, k, v = (zeros(2, 2, layout.num_tokens, dim, dtype=dtype) for _ in "qkv")
    run(window(q, k, v, layout, **settings), (q, k, v))
    check(built, card, "forward_kernel", "query_backward_kernel", "key_backward_kernel")


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
def test_linear_attention_fits_a_card(feature_map, dim, card, built):
    q, k, v = (zeros(2, 2, 4096, dim, dtype=torch.bfloat16) for _ in "qkv")
    run(linear_attention(q, k, v, feature_map=feature_map), (q, k, v))
    check(built, card, "key_kernel", "query_kernel", "query_backward_kernel", "key_backward_kernel")


@pytest.mark.parametrize(
    ("state", "head", "dtype"),
    [(64, 16, torch.bfloat16), (64, 16, torch.float32), (128, 64, torch.bfloat16), (64, 64, torch.float32)],
)
def test_scans_fit_a_card(state, head, dtype, card, built):
    """Of the sizes that Mamba-2 has here by default, and of its own: heads of 64, states of 128."""
    heads = 2304 // head
    x, dt, A = zeros(2, 256, heads, head, dtype=dtype), zeros(2, 256, heads), zeros(heads)
    B, C = (zeros(2, 256, state, dtype=dtype) for _ in "BC")
    D = zeros(heads)
    run(ssd(x, dt, A, B, C, D), (x, dt, A, B, C, D))
    check(built, card, "chunk_kernel", "pass_kernel", "output_kernel", "backward_kernel")


@DTYPES
@pytest.mark.parametrize("dim", [1152, 4096])
def test_modulated_norms_fit_a_card(dim, dtype, card, built):
    x, made = zeros(4, 256, dim, dtype=dtype), zeros(4, 1, 6 * dim, dtype=torch.bfloat16)
    run(modulated_norm(x, *made.chunk(6, -1)[:2], 1e-6), (x, made))
    check(built, card, "norm_kernel", "norm_backward_kernel")
    assert max(kernel.spilled for kernel in built) <= 64


@DTYPES
def test_the_other_kernels_fit_a_card(dtype, card, built):
    x, gate, weight = zeros(2, 256, 2304, dtype=dtype), zeros(2, 256, 2304, dtype=dtype), zeros(2304)
    run(gated_norm(x, None, gate, weight.to(dtype), 1e-5), (x, gate))
    own = zeros(2304, 1, 4), zeros(2304)
    run(silu_conv(x, *own, before=3), (x, *own))
    qkv, of_channels = zeros(2, 256, 3 * 2304, dtype=dtype), (zeros(1, 1, 4), zeros(1))
    run(gated_channels(qkv, *of_channels), (qkv, *of_channels))
    norm, silu = ("norm_kernel", "norm_backward_kernel"), ("silu_kernel", "short_backward_kernel")
    channels = ("product_kernel", "product_backward_kernel", "filter_backward_kernel")
    check(built, card, *norm, *silu, *channels)
