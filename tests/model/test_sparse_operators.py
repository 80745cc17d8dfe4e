"""The operators that a sparse layer starts on a GPU. There the host is its limit, and each of them costs time."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.model import sparse_function
from megatron_tf.model.kernels import fused_passes, gathered_products, pair_sums
from megatron_tf.model.sparse_pattention import SparsePattention

ALLOCATIONS = ("empty", "empty_like", "new_empty")


class Operators(TorchDispatchMode):
    """Counts operators by name: `all`, and `kernels`, those that compute and do not only allocate memory or view it."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        computes = function._schema.is_mutable or not any(
            argument.alias_info for argument in function._schema.arguments
        )
        self.all[name] += 1
        if computes and name not in (*ALLOCATIONS, "promote_types"):
            self.kernels[name] += 1
        return function(*args, **(kwargs or {}))

    def launched(self, name: str) -> None:
        """A kernel of our own."""
        self.all[name] += 1
        self.kernels[name] += 1


# (dense tokens, whether the layer adds its losses and metrics): operators and kernels of the forward pass, those of the
# backward pass. These numbers may only fall.
MOST = {
    (0, False): ((46, 20), (42, 19)),
    (32, False): ((54, 25), (54, 26)),
    (0, True): ((66, 34), (46, 21)),
}


@pytest.mark.parametrize(("dense", "losses"), MOST)
def test_operators_of_one_step_on_a_gpu(dense, losses, monkeypatch):
    """Kernels of our own are counted, not run: results are not looked at here."""
    counted = Operators()
    monkeypatch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: True)
    monkeypatch.setattr(fused_passes, "usable", lambda scores: True)
    monkeypatch.setattr(fused_passes, "_run", lambda name, *arguments: counted.launched(name))
    monkeypatch.setattr(pair_sums, "_has_kernel", lambda *facts: True)
    monkeypatch.setattr(pair_sums, "_launch", lambda *arguments, add: counted.launched("sum_of_pairs"))
    monkeypatch.setattr(gathered_products, "can_run_triton", lambda device_type: True)
    monkeypatch.setattr(gathered_products, "_launch", lambda name, *arguments: counted.launched(f"gathered {name}"))
    torch.manual_seed(0)
    layer = SparsePattention(9 * 32 + dense, 96, 96, group_size=32, candidates=4, dense=dense).bfloat16()
    x, grad = torch.randn(2, 64, 96).bfloat16().unbind()
    x.requires_grad_()
    added = {}, {}
    with counted:
        out = layer.partial(x, *added if losses else ())
    forward, counted.all, counted.kernels = (counted.all, counted.kernels), Counter(), Counter()
    roots = {out: grad, **{loss: torch.ones(()) for loss in added[0].values()}}
    learning = [parameter for name, parameter in layer.named_parameters() if losses or name != "bank.balance"]
    with counted:
        torch.autograd.grad(list(roots), [x, *learning], list(roots.values()))
    for counts, most in zip((forward, (counted.all, counted.kernels)), MOST[dense, losses]):
        found = tuple(own.total() for own in counts)
        assert all(map(int.__le__, found, most)), f"{found} operators and kernels, {most} before: {counts}"


def test_compiled_passes_make_scores_of_dense_tokens_once(monkeypatch):
    """And their gradient, and weights. Rows of 141 are padded to 144."""
    monkeypatch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: True)
    layer = SparsePattention(2 * 32 + 141, 40, 40, group_size=32, candidates=2, dense=141).bfloat16()
    x = torch.randn(64, 40).bfloat16().requires_grad_()

    def both_passes():
        torch.compile(layer.partial, fullgraph=True)(x).sum().backward()

    torch.compiler.reset()
    _, codes = run_and_get_code(both_passes)
    assert len(codes) == 2
    for code in codes:
        assert re.findall(r"empty_strided_cpu\(\(64, (14[14])\)", code) == ["144"]


@pytest.mark.parametrize("dense", [0, 32])
def test_the_path_of_gpus_compiled_without_a_graph_break(dense, monkeypatch):
    monkeypatch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: True)
    torch.manual_seed(0)
    layer = SparsePattention(9 * 32 + dense, 96, 96, group_size=32, candidates=4, dense=dense).bfloat16()
    x = torch.randn(64, 96).bfloat16().requires_grad_()

    def outputs(x):
        losses = {}
        return layer.partial(x, losses, {}), losses["balance"]

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    leaves = [x, *layer.parameters()]
    for made in zip(compiled(x), outputs(x)):
        torch.testing.assert_close(*made)
    gradients = (
        torch.autograd.grad(out.float().square().sum() + loss, leaves) for out, loss in (compiled(x), outputs(x))
    )
    torch.testing.assert_close(*gradients)
