"""Mixed precision: what runs in which dtype, and that attention answered by a kernel is left to it."""

import pytest
import torch
import torch.nn.functional as F

from closeness import assert_close
from grafting.editing.plan import Plan, Replace
from grafting.editing.surgery import graft
from grafting.hosts import hosts
from grafting.machine.devices import mixed_precision

CPU = torch.device("cpu")


def inputs(num_tokens=8):
    return [torch.randn(2, 3, num_tokens, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def graph_dtype(y):
    """The dtype in which the attention of a graph keeps its queries."""
    node = y.grad_fn
    while "Attention" not in node.name():
        node = node.next_functions[0][0]
    return node._saved_query.dtype


@pytest.mark.parametrize("form", ["positional", "keywords"])
def test_attention_over_few_tokens_is_differentiated_in_float32(form):
    q, k, v = inputs()
    plain = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    with mixed_precision(CPU, "bf16"):
        if form == "positional":
            y = F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.3)
        else:
            y = F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.3)
    assert y.dtype == torch.bfloat16
    assert (graph_dtype(plain), graph_dtype(y)) == (torch.bfloat16, torch.float32)
    assert_close("output", y.float(), plain.float(), 1e-2)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(y.sum(), (q, k, v)))


@pytest.mark.parametrize(("precision", "num_tokens"), [("fp32", 8), ("bf16", 600)])
def test_elsewhere_it_runs_as_it_is(precision, num_tokens):
    q, k, v = inputs(num_tokens)
    with mixed_precision(CPU, precision):
        y = F.scaled_dot_product_attention(q, k, v)
    assert graph_dtype(y) == torch.bfloat16
    with mixed_precision(CPU, precision), torch.no_grad():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), y)


def test_linears_are_autocast():
    linear = torch.nn.Linear(3, 3)
    with mixed_precision(CPU, "bf16"):
        assert linear(torch.randn(2, 3)).dtype == torch.bfloat16
    assert linear(torch.randn(2, 3)).dtype == torch.float32


def test_kernels_still_answer_attention():
    host = hosts()["dit"]
    model = host.tiny().eval()
    example = host.example(model, rows=4, cols=4, batch_size=2)
    with mixed_precision(CPU, "bf16"):
        before = model(**example)
        record = graft(model, Plan(edits=[Replace(role="attention", operator="window-1d")]))
        windowed = model(**example)
        record.undo()
        graft(model, Plan(edits=[Replace(role="attention", operator="softmax")]))
        softmax = model(**example)
    assert torch.equal(softmax, before)
    assert not torch.allclose(windowed, before, rtol=1e-2)
