r"""Tensor operations as a Python function: what is quick to write down, and quick to run."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from .trace import Traced

__all__ = ["QUICK", "function_of", "taped"]

aten = torch.ops.aten

METHODS = """add.Tensor addmm bmm clamp detach div.Tensor dot exp expand gather index_select log log1p logsumexp mm
mul.Tensor neg permute pow.Tensor_Scalar repeat select.int sigmoid sqrt squeeze.dim sub.Tensor sum sum.dim_IntList t
tanh transpose.int unbind.int unsqueeze view"""
FUNCTIONS = "cat split.Tensor stack"


def _quick() -> dict[Any, Callable]:
    """Return torch's own bindings of frequent operations: the same operation in half of the time of `torch.ops`."""
    found = {}
    for names, home in ((METHODS, torch._C.TensorBase), (FUNCTIONS, torch._C._VariableFunctions)):
        for name, _, overload in (each.partition(".") for each in names.split()):
            found[getattr(getattr(aten, name), overload or "default")] = getattr(home, name)
    return found


QUICK = _quick()
SPREAD = (aten.view.default, aten.expand.default)


def function_of(traced: Traced) -> Callable[..., tuple[Tensor, ...]]:
    """Return a graph as a Python function: constants are the tensors themselves, all else goes after its last use."""
    lines = _Lines()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            lines.take(node)
        elif node.op == "get_attr":
            lines.names[id(node)] = lines.bind(getattr(traced.constants, node.target))
        elif node.op == "call_function":
            if node.target is operator.getitem:
                lines.names[id(node)] = lines.item(lines.names[id(node.args[0])], node.args[1])
            else:
                lines.names[id(node)] = lines.call(node.target, node.args, node.kwargs)
    return lines.function(node.args[0])


def taped(step: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
    r"""Run ``step(*inputs)``, and return a function of the same signature that makes the same tensor operations.

    What is neither an input nor made from one stays as it is. Like `trace`, but a function and no graph to be changed,
    which takes a third of the time. A tensor is let go after its last use.

    Raises:
        RuntimeError: A Python number was taken from a tensor.
    """
    with _Tape(inputs) as tape:
        out = step(*inputs)
    return tape.lines.function(out)


class _Lines:
    """A line of Python per operation; tensors, or the nodes that stand for them, are known by identity."""

    def __init__(self) -> None:
        self.count = 0
        self.inputs: list[str] = []
        self.names: dict[int, str] = {}
        self.bound: dict[str, Any] = {}
        self.operations: dict[Any, str] = {}
        self.lines: list[tuple[str, str, list[str]]] = []

    def take(self, x: Tensor | fx.Node) -> None:
        """Add an input."""
        self.names[id(x)] = self._new("x")
        self.inputs.append(self.names[id(x)])

    def bind(self, x: Any) -> str:
        """Return a name for something that the function has from the beginning."""
        name = self._new("c")
        self.bound[name] = x
        return name

    def call(self, func: Any, args: Iterable, kwargs: Mapping[str, Any]) -> str:
        """Write down an operation, and return the name of its result."""
        args, used = tuple(args), []
        if func in SPREAD and len(args) == 2 and args[1] and not kwargs:
            args = (args[0], *args[1])
        parts = [self._text(x, used) for x in args]
        parts += [f"{name}={self._text(x, used)}" for name, x in kwargs.items()]
        quick = bool(args) and isinstance(args[0], Tensor | fx.Node | list | tuple)
        return self._line(f"{self._operation(func, quick)}({', '.join(parts)})", used)

    def item(self, several: str, place: int) -> str:
        """Write down that one of several results is taken, and return its name."""
        return self._line(f"{several}[{place}]", [several])

    def _operation(self, func: Any, quick: bool) -> str:
        found = QUICK.get(func) if quick else None
        found = getattr(func, "_op", func) if found is None else found
        if found not in self.operations:
            self.operations[found] = self.bind(found)
        return self.operations[found]

    def _line(self, text: str, used: list[str]) -> str:
        name = self._new("v")
        self.lines.append((name, text, used))
        return name

    def _new(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def _text(self, x: Any, used: list[str]) -> str:
        if isinstance(x, Tensor | fx.Node):
            if id(x) not in self.names:
                self.names[id(x)] = self.bind(x)
            used.append(self.names[id(x)])
            return used[-1]
        if isinstance(x, list | tuple):
            return f"[{', '.join(self._text(part, used) for part in x)}]"
        is_plain = type(x) in (int, bool, type(None)) or (type(x) is float and math.isfinite(x))
        return repr(x) if is_plain else self.bind(x)

    def function(self, out: Iterable[Tensor | fx.Node]) -> Callable[..., tuple[Tensor, ...]]:
        """Return what was written down as a function."""
        results = [self._text(x, []) for x in out]
        seen, lines = {*results, *self.bound}, []
        for name, text, used in reversed(self.lines):
            last = {name, *used} - seen
            seen |= last
            lines.append(f"  {name} = {text}" + (f"; del {', '.join(sorted(last))}" if last else ""))
        head = f"def run({', '.join(self.inputs)}):"
        source = "\n".join([head, *reversed(lines), f"  return ({', '.join(results)},)"])
        exec(compile(source, "<operations>", "exec"), self.bound)
        return self.bound.pop("run")


class _Tape(TorchDispatchMode):
    """Writes down operations; all tensors are kept meanwhile."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.lines = _Lines()
        self.kept: list[Any] = list(inputs)
        for x in inputs:
            self.lines.take(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        func = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        name = self.lines.call(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        if isinstance(out, Tensor):
            self.lines.names[id(out)] = name
        elif isinstance(out, tuple | list):
            for i, x in enumerate(out):
                if isinstance(x, Tensor):
                    self.lines.names[id(x)] = self.lines.item(name, i)
        elif out is not None:
            raise RuntimeError(f"{func} takes a number from a tensor of many rows")
        return out
