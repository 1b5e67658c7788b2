r"""The tensor operations of a run as a Python function: what is quick to write down, and quick to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["taped"]

aten = torch.ops.aten


def taped(step: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
    r"""Run ``step(*inputs)``, and return a function of the same signature that makes the same tensor operations.

    What is neither an input nor made from one stays as it is. Like `trace`, but a function and no graph to be changed,
    which takes a third of the time. A tensor is let go after its last use.

    Raises:
        RuntimeError: A Python number was taken from a tensor.
    """
    with _Tape(inputs) as tape:
        out = step(*inputs)
    return tape.function(out)


class _Tape(TorchDispatchMode):
    """Writes a line of Python per operation; tensors are known by identity, and kept meanwhile."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.count = 0
        self.inputs = [f"x{i}" for i in range(len(inputs))]
        self.names = {id(x): name for x, name in zip(inputs, self.inputs, strict=True)}
        self.kept: list[Tensor] = list(inputs)
        self.bound: dict[str, Any] = {}
        self.lines: list[tuple[str, list[str]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        func = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        used: list[str] = []
        parts = [self._text(x, used) for x in args]
        parts += [f"{name}={self._text(x, used)}" for name, x in (kwargs or {}).items()]
        out = func(*args, **(kwargs or {}))
        name = self._new("v")
        self.lines.append((f"{name} = {self._bind(func)}({', '.join(parts)})", used))
        if isinstance(out, Tensor):
            self._name(out, name)
        elif isinstance(out, tuple | list):
            for i, x in enumerate(out):
                if isinstance(x, Tensor):
                    each = self._new("v")
                    self.lines.append((f"{each} = {name}[{i}]", [name]))
                    self._name(x, each)
        elif out is not None:
            raise RuntimeError(f"{func} takes a number from a tensor of many rows")
        return out

    def _new(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def _name(self, x: Tensor, name: str) -> None:
        self.names[id(x)] = name
        self.kept.append(x)

    def _bind(self, x: Any) -> str:
        """Return a name for something that the function has from the beginning."""
        name = self._new("c")
        self.bound[name] = x
        return name

    def _text(self, x: Any, used: list[str]) -> str:
        if isinstance(x, Tensor):
            if id(x) not in self.names:
                self._name(x, self._bind(x))
            used.append(self.names[id(x)])
            return used[-1]
        if isinstance(x, list | tuple):
            return f"[{', '.join(self._text(part, used) for part in x)}]"
        return repr(x) if isinstance(x, int | bool | None) else self._bind(x)

    def function(self, out: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        """Return what was written down as a function."""
        results = [self._text(x, []) for x in out]
        seen, lines = {*results, *self.bound}, []
        for text, used in reversed(self.lines):
            name = text.split(" ", 1)[0]
            last = {name, *used} - seen
            seen |= last
            lines.append(f"  {text}" + (f"; del {', '.join(sorted(last))}" if last else ""))
        head = f"def run({', '.join(self.inputs)}):"
        source = "\n".join([head, *reversed(lines), f"  return ({', '.join(results)},)"])
        exec(compile(source, "<rows>", "exec"), self.bound)
        return self.bound["run"]
