r"""Many independent replicates of a recorded gradient in one vectorized run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..loss import States
from .data import tensors_of
from .recording import Recording
from .simplify import is_random, mutates
from .trace import Traced

__all__ = ["Replicator"]


class Replicator:
    """Many independent replicates of a recorded gradient in one vectorized run (`torch.vmap` over the graph).

    An in-place sampler needs a batched tensor to write into; each gets one by adding a batched zero.
    """

    def __init__(self, recording: Recording, args: tuple, kwargs: Mapping[str, Any], state: States) -> None:
        self.names = recording.reached
        self.inputs = [
            *recording.leaves.values(),
            *recording.buffers,
            *pytree.tree_leaves(state),
            *tensors_of(args, kwargs),
        ]
        self.module = _with_batched_samplers(recording.traced)
        self.bytes_each = max(1, recording.traced.bytes)

    def __call__(self, num_replicates: int) -> dict[str, Tensor]:
        """Return gradients by parameter name: ``(replicates, *shape)``."""
        run = torch.vmap(self.module, in_dims=(0,) + (None,) * len(self.inputs), randomness="different")
        with torch.no_grad():
            out = run(torch.zeros(num_replicates), *self.inputs)
        return dict(zip(self.names, out[1 : 1 + len(self.names)], strict=True))


def _with_batched_samplers(traced: Traced) -> fx.GraphModule:
    graph = fx.Graph()
    zero = graph.placeholder("replicate")
    graph.output(graph.graph_copy(traced.graph, {}))
    for node in list(graph.nodes):
        if node.op == "call_function" and mutates(node) and is_random(node):
            with graph.inserting_before(node):
                batched = graph.call_function(torch.ops.aten.add.Tensor, (node.args[0], zero))
            node.args = (batched, *node.args[1:])
    return fx.GraphModule(traced.constants, graph)
