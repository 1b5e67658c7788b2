r"""Many independent replicates of a recorded gradient in one vectorized run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..loss import States
from .data import tensors_of
from .recording import Recording
from .simplify import is_random, mutates, needed_for

__all__ = ["Replicator"]

aten = torch.ops.aten


class Replicator:
    """Many independent replicates of a recorded gradient in one vectorized run (`torch.vmap` over the graph).

    Only what the gradients need is run: not the objective's value, nor the estimators' next state. A tensor is let go
    after its last use. `bytes_each` is what all tensors of one replicate would take together.
    """

    def __init__(self, recording: Recording, args: tuple, kwargs: Mapping[str, Any], state: States) -> None:
        self.names = recording.reached
        self.inputs = [
            *recording.leaves.values(),
            *recording.buffers,
            *pytree.tree_leaves(state),
            *tensors_of(args, kwargs),
        ]
        self.constants = recording.traced.constants
        *nodes, output = recording.traced.graph.nodes
        self.outputs = output.args[0][1 : 1 + len(self.names)]
        self.nodes = needed_for(nodes, self.outputs)
        self.bytes_each = max(1, sum(node.meta.get("bytes", 0) for node in self.nodes))
        self.last_uses = _last_uses(self.nodes, self.outputs)

    def __call__(self, num_replicates: int) -> dict[str, Tensor]:
        """Return gradients by parameter name: ``(replicates, *shape)``."""
        run = torch.vmap(self._run, in_dims=(0,) + (None,) * len(self.inputs), randomness="different")
        _claim(num_replicates * self.bytes_each)
        with torch.no_grad():
            out = run(torch.zeros(num_replicates), *self.inputs)
        return dict(zip(self.names, out, strict=True))

    def _run(self, zero: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one replicate; an in-place sampler is given a batched tensor to write into by adding a batched zero."""
        values: dict[fx.Node, Any] = {}
        left = iter(inputs)
        for node, uses in zip(self.nodes, self.last_uses, strict=True):
            if node.op == "placeholder":
                values[node] = next(left)
            elif node.op == "get_attr":
                values[node] = getattr(self.constants, node.target)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if mutates(node) and is_random(node):
                    args = (args[0] + zero.to(args[0]), *args[1:])
                values[node] = BATCHED.get(node.target, node.target)(*args, **kwargs)
            for used in uses:
                del values[used]
        return tuple(values[node] for node in self.outputs)


def _cross_entropy(logits: Tensor, target: Tensor, weight: Any = None, pos_weight: Any = None, reduction: int = 1):
    """Return `binary_cross_entropy_with_logits` to the bit; `torch.vmap` takes another formula and three times as long.

    Source: the CPU kernel of torch.
    """
    if reduction or weight is not None or pos_weight is not None:
        return aten.binary_cross_entropy_with_logits.default(logits, target, weight, pos_weight, reduction)
    return (1 - target) * logits - aten.log_sigmoid_forward.default(logits)[0]


class _Elementwise(torch.autograd.Function):
    """A function of elements for which `torch.vmap` has no rule: it would loop over replicates, and say so."""

    @staticmethod
    def forward(op: Any, *tensors: Tensor) -> Tensor:
        return op(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: Any, *tensors: Tensor) -> tuple[Tensor, int]:
        most = max(x.dim() - (dim is not None) for x, dim in zip(tensors, in_dims[1:], strict=True))
        moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims[1:], strict=True)]
        moved = [
            x if dim is None else x.reshape(len(x), *(1,) * (most + 1 - x.dim()), *x.shape[1:])
            for x, dim in zip(moved, in_dims[1:], strict=True)
        ]
        return _Elementwise.apply(op, *torch.broadcast_tensors(*moved)), 0


def _clamp_(x: Tensor, *bounds: Any, **named: Any) -> Tensor:
    return x.copy_(x.clamp(*bounds, **named))


ELEMENTWISE = (aten._standard_gamma_grad.default, aten._dirichlet_grad.default)
BATCHED = {
    aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    **{op: functools.partial(_Elementwise.apply, op) for op in ELEMENTWISE},
    aten.clamp_.default: _clamp_,
}


def _claim(size: int) -> None:
    """Take one block of memory and let it go, so that the allocator keeps what the operations let go.

    glibc hands memory back to the system beyond twice the largest block that was ever let go (of those up to 32 MiB),
    and memory handed back costs a page fault per 4 KiB when it is used next: half of the time of a run.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    torch.empty(min(size, 31 * 2**20), dtype=torch.uint8)


def _last_uses(nodes: list[fx.Node], outputs: tuple[fx.Node, ...]) -> list[list[fx.Node]]:
    """Return, by node, the values that no later node nor any output uses."""
    seen, result = set(outputs), []
    for node in reversed(nodes):
        uses = {node, *node.all_input_nodes} - seen
        seen |= uses
        result.append(list(uses))
    return result[::-1]
