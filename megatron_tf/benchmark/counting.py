"""Counts of what PyTorch really does, to check estimates: bytes alive, read, written and sent, and kernels."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tf.architectures.work import Kind

COLLECTIVES: dict[str, Kind] = {
    "c10d.allreduce_.default": "all_reduce",
    "c10d._allgather_base_.default": "all_gather",
    "c10d.allgather_into_tensor_coalesced_.default": "all_gather",
    "c10d.allgather_.default": "all_gather",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
    "c10d.send.default": "send",
    "c10d.alltoall_base_.default": "all_to_all",
}
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "_scaled_mm_v2", "_grouped_mm", "_linear_pointwise")
# Operators without real memory traffic.
FREE = (
    "empty_like",
    "empty",
    "new_empty",
    "new_empty_strided",
    "scalar_tensor",
    "detach",
    "zeros_like",
    "gather",
    "scatter_add_",
)


class Counting(TorchDispatchMode):
    """Counts every operator that runs in this thread inside the block, on the CPU, those of the backward pass included.

    `peak`: largest number of bytes alive of tensors made meanwhile. `traffic`: bytes that kernels other than matrix
    products and attention read and wrote, `kernels` their number with those. `sent`: (kind, bytes of the whole tensor)
    of collectives over more than one rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.traffic = self.kernels = 0
        self.sent: Counter[tuple[Kind, int]] = Counter()
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self._count_sent(str(function), args)
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        for tensor in made:
            self._count_alive(tensor)
        name = function.overloadpacket.__name__
        if (made or function._schema.is_mutable) and name not in FREE:
            self.kernels += 1
            if name not in PRODUCTS and "attention" not in name:
                inputs = inputs[1:] if name == "copy_" else inputs
                self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in inputs + outputs)
        return out

    def _count_alive(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._alive.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)

    def _count_sent(self, name: str, args: tuple) -> None:
        if name not in COLLECTIVES:
            return
        kind = COLLECTIVES[name]
        groups = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)]
        group = next(g for g in groups if "ProcessGroup" in str(g._type()))
        if dist.ProcessGroup.unbox(group).size() == 1:
            return
        tensors = [
            leaf for leaf in tree_leaves(args[1] if kind == "reduce_scatter" else args[0]) if torch.is_tensor(leaf)
        ]
        self.sent[kind, sum(tensor.numel() * tensor.element_size() for tensor in tensors)] += 1


def saved_bytes(call, inputs=()) -> int:
    """Bytes that autograd keeps of `call()` for the backward pass, each storage once, without parameters, their views
    and the tensors `inputs`."""
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_parameter = isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter)
        if not is_parameter and storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    size = sum(storage.nbytes() for storage in kept.values())
    del out
    return size
