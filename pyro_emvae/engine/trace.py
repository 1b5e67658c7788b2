r"""Write down the tensor operations of a run as a graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Place", "Traced", "Tracer", "place_of", "storage_of", "trace", "writing", "written"]

aten = torch.ops.aten


class Traced(NamedTuple):
    """A graph and the module that holds its constants.

    In ``node.meta`` are ``"bytes"``, the memory that an operation took, and, if asked for, ``"places"``, where its
    results lie; of an operation that writes in place also ``"writes"``, the storages, and ``"moved"``, whether one lies
    elsewhere afterwards.
    """

    graph: fx.Graph
    constants: nn.Module


class Place(NamedTuple):
    """Where a tensor lies: two of the same place are the same numbers in the same memory."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bits: tuple[bool, bool]
    offset: int


def place_of(x: Tensor) -> Place:
    """Return where a tensor lies; one that is not strided has no strides, and a place of its own."""
    if x.layout is not torch.strided:
        return Place(id(x), x.shape, (), x.dtype, x.device, (False, False), -1)
    storage, bits = x.untyped_storage()._cdata, (x.is_conj(), x.is_neg())
    return Place(storage, x.shape, x.stride(), x.dtype, x.device, bits, x.storage_offset())


def trace(step: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], places: bool = False) -> Traced:
    r"""Run ``step(*inputs)`` and return its tensor operations as a graph of the same signature.

    What is neither an input nor made from one stays as it is: a tensor becomes a constant, a Python number a number.

    Raises:
        RuntimeError: A Python number was taken from a tensor that depends on an input or on a random draw.

    Source: `torch.fx.experimental.proxy_tensor.make_fx`. Differs: it makes no fake tensor for each operation, which
    takes ten times as long as all the rest.
    """
    with Tracer(inputs) as tracer:
        out = step(*inputs)
    tracer.graph.output(tuple(map(tracer.node_of, out)))
    if places:
        tracer.locate()
    return Traced(tracer.graph, tracer.constants)


class Tracer(TorchDispatchMode):
    """Tensors are known by identity, and kept, so that no identity is given out again."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.graph, self.constants = fx.Graph(), nn.Module()
        self.kept: list[tuple[fx.Node, Tensor]] = []
        self.nodes: dict[int, fx.Node] = {}
        for i, x in enumerate(inputs):
            self._keep(x, self.graph.placeholder(f"input_{i}"))
        self.derived = set(map(storage_of, inputs))
        self.storages = set(self.derived)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        func, args, kwargs = _reading_less(func, args, kwargs or {})
        used: list[Tensor] = []
        arguments = _map(args, used, self.node_of), _map(kwargs, used, self.node_of)
        targets = list(written(func, args, kwargs)) if writing(func) else []
        before = [*map(place_of, targets)]
        out = func(*args, **kwargs)
        parts = out if isinstance(out, tuple | list) else [out]
        made = [x for x in parts if isinstance(x, Tensor)]
        derived = torch.Tag.nondeterministic_seeded in func.tags or any(storage_of(x) in self.derived for x in used)
        if not made and out is not None:
            if derived:
                raise RuntimeError(f"{func} takes a number from a tracing tensor")
            return out
        node = self._node(func, *arguments, made)
        if targets:
            after = [*map(place_of, targets)]
            node.meta["writes"] = {place.storage for place in before + after}
            node.meta["moved"] = before != after or any(x.layout is not torch.strided for x in targets)
        if isinstance(out, Tensor):
            self._keep(out, node)
        else:
            for i, x in enumerate(parts):
                if isinstance(x, Tensor):
                    self._keep(x, self.graph.call_function(operator.getitem, (node, i)))
        if derived:
            self.derived.update(map(storage_of, made + used if targets else made))
        return out

    def _node(self, func: Callable, args: tuple, kwargs: dict, made: list[Tensor]) -> fx.Node:
        """Write down an operation; arguments that are set afterwards, fx does not search for symbolic numbers."""
        node = self.graph.call_function(func, name=func.overloadpacket.__name__)
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta["bytes"] = sum(map(self._memory, made))
        return node

    def node_of(self, x: Tensor) -> fx.Node:
        """Return the node that stands for a tensor: a constant, if neither given nor made here."""
        if id(x) not in self.nodes:
            name = f"constant_{len(self.kept)}"
            self.constants.register_buffer(name, x, persistent=False)
            self._keep(x, self.graph.get_attr(name))
        return self.nodes[id(x)]

    def _memory(self, x: Tensor) -> int:
        """Return the bytes of a tensor; none if it is a view of one that was counted."""
        storage = storage_of(x)
        if storage in self.storages:
            return 0
        self.storages.add(storage)
        return x.numel() * x.element_size()

    def _keep(self, x: Tensor, node: fx.Node) -> None:
        self.kept.append((node, x))
        self.nodes[id(x)] = node

    def locate(self) -> None:
        """Note where results lie: those of an operation with several are taken from it one by one."""
        for node in self.graph.nodes:
            node.meta["places"] = ()
        for node, x in self.kept:
            node.meta["places"] = (place_of(x),)
            if node.target is operator.getitem:
                node.args[0].meta["places"] += node.meta["places"]


def _reading_less(func: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """Exchange two operations for equal ones that suit a graph better.

    The result of ``lift_fresh`` is written in place, which no constant may be. The one that backward starts from
    (``ones_like`` of the loss) is made without the loss.
    """
    if func is aten.lift_fresh.default:
        return aten.lift_fresh_copy.default, args, kwargs
    if func is aten.ones_like.default and args[0].dim() == 0:
        like = {"dtype": args[0].dtype, "layout": args[0].layout, "device": args[0].device}
        return aten.ones.default, ([],), {**like, **{k: v for k, v in kwargs.items() if k != "memory_format"}}
    return func, args, kwargs


@functools.cache
def writing(func: Any) -> tuple[tuple[int, str], ...]:
    """Return places and names of the arguments that an operation writes in place.

    Batch normalization moves its averages, which its schema does not say.
    """
    schema = getattr(func, "_schema", None)
    arguments = () if schema is None else enumerate(schema.arguments)
    return tuple((i, a.name) for i, a in arguments if _is_write(a) or a.name.startswith("running_"))


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operation writes in place."""
    for place, name in writing(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        yield from (x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor))


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _map(x: Any, used: list[Tensor], fn: Callable[[Tensor], Any]) -> Any:
    """Apply `fn` to the tensors in an operation's arguments, and add them to `used`."""
    if isinstance(x, Tensor):
        used.append(x)
        return fn(x)
    if isinstance(x, tuple | list):
        return type(x)([_map(part, used, fn) for part in x])
    return {k: _map(part, used, fn) for k, part in x.items()} if isinstance(x, dict) else x
