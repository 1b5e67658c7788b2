r"""A deterministic map of parameters, recorded once and run for many parameter values at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .._checks import RecordingError, fail
from ..particles import listen, quiet
from .recording import difference_of
from .simplify import is_random, needed_for
from .tape import taped
from .trace import Traced, Tracer, storage_of, written

__all__ = ["BatchedMap", "RecordedMap", "record_map"]

aten = torch.ops.aten


class _MapTracer(Tracer):
    """Writes down a map: a boolean that Python reads becomes a guard, other numbers are noted."""

    def __init__(self, inputs: tuple[Tensor, ...], largest: float) -> None:
        super().__init__(inputs)
        self.left = largest
        self.guards: list[tuple[fx.Node, bool]] = []
        self.numbers: list[Tensor] = []
        self.written: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._linalg_check_errors.default:
            func(*args, **kwargs)
            return self._guard(self.graph.call_function(aten.any.default, (self.node_of(args[0]),)), False)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return self._read(func, args)
        if func is aten.index_put_.default and _is_fill(*args, **kwargs):
            filled = self.__torch_dispatch__(aten.where.self, types, (args[1][0], args[2], args[0]))
            func, args = aten.copy_.default, (args[0], filled)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._note(args, kwargs)
        if func._schema.is_mutable:
            self.written.update(map(storage_of, written(func, args, kwargs)))
        elif kwargs.get("generator") is not None and isinstance(out, Tensor):
            self.derived.discard(storage_of(out))  # a constant, which has to be the same when it is recorded again
        return out

    def _note(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Note in which version an operation on the inputs saw what does not depend on them."""
        used = list(_tensors((*args, *kwargs.values())))
        fixed = [x for x in used if storage_of(x) not in self.derived]
        if len(fixed) < len(used):
            for x in fixed:
                self.node_of(x).meta.setdefault("seen", x._version)

    def _read(self, func: Any, args: tuple) -> Any:
        """Let a number be read; one that depends on the map's inputs is noted."""
        out = func(*args)
        if not any(storage_of(x) in self.derived for x in args if isinstance(x, Tensor)):
            return out
        if func is aten.equal.default:
            same = self.graph.call_function(aten.eq.Tensor, tuple(map(self.node_of, args)))
            self._guard(self.graph.call_function(aten.all.default, (same,)), out)
        elif args[0].dtype == torch.bool:
            self._guard(self.node_of(args[0]), out)
        else:
            self.numbers.append(args[0])
        return out

    def _guard(self, node: fx.Node, found: bool) -> None:
        self.guards.append((node, found))

    def _memory(self, x: Tensor) -> int:
        """Return the bytes of a tensor, all of which are held while recording: not too many."""
        size = super()._memory(x)
        self.left -= size
        if self.left < 0:
            _refuse("an iteration that takes too much memory to be recorded")
        return size

    def _keep(self, x: Tensor, node: fx.Node) -> None:
        super()._keep(x, node)
        node.meta["value"] = x


def _tensors(x: Any) -> Iterator[Tensor]:
    """Yield the tensors among an operation's arguments."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)


def _is_fill(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> bool:
    """Whether an assignment by index is one number where a mask of the same shape is true."""
    mask = indices[0]
    full = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape
    return len(indices) == 1 and full and not values.dim() and values.dtype == x.dtype and not accumulate


@dataclass(frozen=True)
class RecordedMap:
    r"""One run of a map as a graph: from its inputs to their new values, a number, and the branches it took.

    Args:
        traced: The graph; what does not depend on the inputs is folded into constants.
        value: What the run reported.
        guards: The booleans that Python read, and what they were.
        moving: Operations that make a tensor which is written in place later.
        start, outcome: The inputs before and after the run.
    """

    traced: Traced = field(repr=False)
    value: fx.Node = field(repr=False)
    guards: list[tuple[fx.Node, bool]] = field(repr=False)
    moving: frozenset[fx.Node] = field(repr=False)
    start: list[Tensor] = field(repr=False)
    outcome: list[Tensor] = field(repr=False)

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The operations that are needed, in their order."""
        nodes = [node for node in self.traced.graph.nodes if "fixed" not in node.meta]
        return needed_for(nodes, [self.value, *(node for node, _ in self.guards)])

    @property
    def bytes(self) -> int:
        """Memory of all its operations together."""
        return sum(node.meta.get("bytes", 0) for node in self.nodes)

    def __call__(self, zero: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on inputs, which are written in place; return value, whether all branches agree, and inputs.

        `zero` makes what will be written in place a tensor of this run's own.
        """
        values: dict[fx.Node, Any] = {}
        left = iter(inputs)
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = next(left)
            elif node.op == "get_attr":
                values[node] = getattr(self.traced.constants, node.target)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                found = node.target(*args, **kwargs)
                values[node] = found + zero.to(found) if node in self.moving else found
        agree = [values[node] if found else ~values[node] for node, found in self.guards]
        ok = torch.stack([x.reshape(()) for x in agree]).all() if agree else zero == 0
        return values[self.value].double() + zero, ok, *inputs


def record_map(
    step: Callable[[], float],
    inputs: Sequence[Tensor],
    starts: Sequence[Sequence[Tensor]],
    largest: float = math.inf,
) -> RecordedMap:
    r"""Record ``step``, which changes `inputs` in place and returns minus the one number that it reports.

    It is run from each of two starts, and refused if the two runs differ in an operation, a number or a branch.
    Afterwards inputs and generators are as before.

    Args:
        step, inputs: What is recorded.
        starts: Two starts: values of the inputs.
        largest: Bytes that the operations of a run may take together, for all of them are held while recording.

    Raises:
        RecordingError: The step takes too much memory, it draws, it takes a number from a tensor that is neither a
            boolean nor reported, or the two runs differ.

    Example:
        >>> from pyro_emvae.particles import report
        >>> x = torch.tensor(2.0)
        >>> def newton():  # for the square root of 2
        ...     value = (x * x - 2).abs()
        ...     x.copy_((x + 2 / x) / 2)
        ...     return -report(value)
        >>> recorded = record_map(newton, [x], [[torch.tensor(1.0)], [torch.tensor(2.0)]])
        >>> (new,), value, kept = BatchedMap(recorded, 3)([torch.tensor([1.0, 2.0, 4.0])])
        >>> new, value, x
        (tensor([1.5000, 1.5000, 2.2500]), tensor([ 1.,  2., 14.], dtype=torch.float64), tensor(2.))
    """
    before = [x.detach().clone() for x in inputs]
    try:
        first, second = (_record(step, inputs, start, largest) for start in starts)
    finally:
        _write(inputs, before)
    difference = difference_of(first.traced, second.traced)
    if difference or [found for _, found in first.guards] != [found for _, found in second.guards]:
        _refuse(difference or "a branch that two starts take differently")
    return first


def _write(inputs: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for live, value in zip(inputs, values, strict=True):
            live.copy_(value)


def _record(
    step: Callable[[], float], inputs: Sequence[Tensor], start: Sequence[Tensor], largest: float
) -> RecordedMap:
    _write(inputs, start)
    with quiet(validate=False), listen() as told, _MapTracer(tuple(inputs), largest) as tracer:
        loss = step()
    silent = {storage_of(x) for x, _ in told}
    if any(storage_of(x) not in silent for x in tracer.numbers):
        _refuse("a Python number taken from a tensor that depends on the parameters")
    if len(told) != 1 or loss != -told[0][1]:
        _refuse(f"{len(told)} reported numbers, and a loss of {loss}")
    value = tracer.node_of(told[0][0])
    tracer.graph.output((value,))
    moving = _fold(tracer)
    graph, outcome = Traced(tracer.graph, tracer.constants), [x.detach().clone() for x in inputs]
    found = RecordedMap(graph, value, tracer.guards, moving, [x.clone() for x in start], outcome)
    needed = set(found.nodes)
    for node in reversed(list(tracer.graph.nodes)):
        if node.op != "output" and node not in needed:
            tracer.graph.erase_node(node)
    if any(is_random(node) for node in found.nodes if node.op == "call_function"):
        _refuse("random draws")
    return found


def _fold(tracer: _MapTracer) -> frozenset[fx.Node]:
    """Make constants of what does not depend on the inputs; return the operations whose results are written later."""
    nodes = [(node, node.meta["value"]) for node in tracer.graph.nodes if "value" in node.meta]
    early = {storage_of(x) for node, x in nodes if node.meta.get("seen", x._version) != x._version}
    fixed = {storage_of(x) for _, x in nodes} - tracer.derived - early
    moving, known = set(), set()
    for node, value in nodes:
        storage = storage_of(value)
        if storage in fixed and node.op == "call_function":
            name = f"folded_{node.name}"
            tracer.constants.register_buffer(name, value, persistent=False)
            with tracer.graph.inserting_before(node):
                node.replace_all_uses_with(tracer.graph.get_attr(name))
            node.meta["fixed"] = True
        elif storage in tracer.written:
            if node.op == "get_attr":
                _refuse("a tensor from outside that is written in place")
            if node.op == "call_function" and storage not in known:
                moving.add(node)
            known.add(storage)
    for node, _ in nodes:
        del node.meta["value"]
    return frozenset(moving)


def _refuse(got: str) -> None:
    fail(
        RecordingError,
        "restarts",
        "run an iteration for many starts at a time",
        got=got,
        because="it is recorded once as tensor operations",
        fix="Nothing has to be done: the starts are run one by one.",
    )


class BatchedMap:
    r"""A recorded map for a fixed number of rows of inputs, as plain batched operations.

    `torch.vmap` over the graph is recorded once more, so that a run costs no more than its operations. The result of a
    row depends on its place and its values alone, not on the other rows.

    Args:
        recorded: The map.
        rows: Their number.

    Raises:
        RecordingError: It does not give what the recorded run gave.
    """

    def __init__(self, recorded: RecordedMap, rows: int) -> None:
        inputs = [x.expand(rows, *x.shape).clone() for x in recorded.start]
        zero = torch.zeros(rows, dtype=torch.float64, device=inputs[0].device)

        def run(*stacks: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return torch.vmap(recorded)(zero, *[x.clone() for x in stacks])

        self.run = taped(run, tuple(inputs))
        for one, many in zip(recorded.outcome, self(inputs)[0], strict=True):
            near = torch.finfo(one.dtype).eps ** 0.5
            if not torch.allclose(many, one.expand_as(many), near, near * float(one.abs().max() if one.numel() else 0)):
                _refuse("other values than those of one start alone")

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the new inputs, the value of each row in nats, and whether its branches are the recorded ones."""
        with torch.no_grad():
            value, ok, *new = self.run(*inputs)
        return new, value, ok
