r"""Write down the tensor operations of a run as a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traced", "trace"]


class Traced(NamedTuple):
    """A graph, the module that holds its constants, and the bytes of all tensors that the run made."""

    graph: fx.Graph
    constants: nn.Module
    bytes: int


def trace(step: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Traced:
    r"""Run ``step(*inputs)`` and return its tensor operations as a graph of the same signature.

    What is neither an input nor made from one stays as it is: a tensor becomes a constant, a Python number a number.

    Raises:
        RuntimeError: A Python number was taken from a tensor that depends on an input or on a random draw.

    Source: `torch.fx.experimental.proxy_tensor.make_fx`. Differs: it makes no fake tensor for each operation, which
    takes ten times as long as all the rest.
    """
    with _Tracer(inputs) as tracer:
        out = step(*inputs)
    tracer.graph.output(tuple(map(tracer.node_of, out)))
    return Traced(tracer.graph, tracer.constants, tracer.bytes)


class _Tracer(TorchDispatchMode):
    """Tensors are known by identity, and kept, so that no identity is given out again."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.graph, self.constants, self.bytes = fx.Graph(), nn.Module(), 0
        self.kept = list(inputs)
        self.nodes = {id(x): self.graph.placeholder(f"input_{i}") for i, x in enumerate(inputs)}
        self.derived = set(map(_storage, inputs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default:  # its result is written in place, which no constant may be
            func = torch.ops.aten.lift_fresh_copy.default
        used: list[Tensor] = []
        nodes = _map((args, kwargs), lambda x: used.append(x) or self.node_of(x))
        out = func(*args, **kwargs)
        derived = torch.Tag.nondeterministic_seeded in func.tags or any(_storage(x) in self.derived for x in used)
        made: list[Tensor] = []
        _map(out, made.append)
        if not made and out is not None:
            if derived:
                raise RuntimeError(f"{func} takes a number from a tracing tensor")
            return out
        node = self.graph.call_function(func, *nodes)
        parts = [(out, node)] if isinstance(out, Tensor) else list(self._parts(out, node))
        for x, part in parts:
            self._keep(x, part)
        if derived:
            self.derived.update(map(_storage, made + used if func._schema.is_mutable else made))
        return out

    def _parts(self, out: Any, node: fx.Node):
        for i, x in enumerate(out or ()):
            if isinstance(x, Tensor):
                yield x, self.graph.call_function(operator.getitem, (node, i))

    def node_of(self, x: Tensor) -> fx.Node:
        """Return the node that stands for a tensor: a constant, if neither given nor made here."""
        if id(x) not in self.nodes:
            name = f"constant_{len(self.kept)}"
            self.constants.register_buffer(name, x, persistent=False)
            self._keep(x, self.graph.get_attr(name))
        return self.nodes[id(x)]

    def _keep(self, x: Tensor, node: fx.Node) -> None:
        self.bytes += x.numel() * x.element_size()
        self.kept.append(x)
        self.nodes[id(x)] = node


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _map(x: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Apply `fn` to the tensors in an operation's arguments or results."""
    if isinstance(x, Tensor):
        return fn(x)
    if isinstance(x, tuple | list):
        return type(x)([_map(part, fn) for part in x])
    return {k: _map(part, fn) for k, part in x.items()} if isinstance(x, dict) else x
