r"""Which densities depend on which draws: the flow of data through one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .quiet import quiet
from .run import run_pair

__all__ = ["Dependence", "dependence", "index_unread"]


class Dependence(dict):
    """By guide site, the ``(side, name)`` of all sites whose log density its draw may move, its own included."""

    def moves(self, name: str, side: str, other: str) -> bool:
        """Whether the draw of guide site `name` may move the density of site `other` of ``"guide"`` or ``"model"``."""
        return name not in self or (side, other) in self[name]

    def upstream(self, name: str) -> tuple[str, ...]:
        """Return the guide's other sites whose draws may move the distribution of `name`."""
        return tuple(site for site in self if site != name and self.moves(site, "guide", name))


def dependence(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Dependence:
    r"""Run one particle and follow each draw of the guide to the densities that it reaches.

    Storages are followed, not tensors, so that what is written into a view counts for the whole. A draw that Python
    has looked at (a branch, ``.item()``, numpy) may move everything. Nothing is changed.

    Source: the provenance tracking of Pyro's `TraceGraph_ELBO` (Schulman et al. 2015). Differs: a number taken from a
    draw is not lost.
    """
    flow = _Flow()

    def treat(msg: dict) -> str:
        flow.add([msg["value"]], {msg["name"]})
        return "attach"

    with quiet(validate=False), torch.no_grad(), _Reads(flow), flow:
        particles = run_pair(model, guide, args, kwargs, 1, None, treat, None)
    sites = [(side, site) for side in ("guide", "model") for site in getattr(particles, side).values()]
    drawn = [site for side, site in sites if side == "guide" and not site.is_observed]
    found = Dependence()
    for draw in drawn:
        after = sites[next(i for i, (_, site) in enumerate(sites) if site is draw) :]  # nothing moves what came before
        every = draw.name in flow.read
        found[draw.name] = frozenset(
            (side, site.name)
            for side, site in after
            if every or site is draw or draw.name in flow.of([site.log_prob, site.scale, site.mask])
        )
    return found


class _Flow(TorchDispatchMode):
    """By storage, the draws that it was made from."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, set[str]] = {}
        self.kept: list[Any] = []
        self.read: set[str] = set()

    def add(self, tensors: Iterable[Any], names: set[str]) -> None:
        for x in tensors:
            if isinstance(x, Tensor):
                self.kept.append(x)
                self.sources.setdefault(_storage(x), set()).update(names)

    def of(self, tensors: Iterable[Any]) -> set[str]:
        return set().union(*(self.sources.get(_storage(x), ()) for x in tensors if isinstance(x, Tensor)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        used = list(_tensors((args, kwargs)))
        names = self.of(used)
        if names:
            made = list(_tensors(out))
            if not made and out is not None:
                self.read |= names
            self.add(made + used if func._schema.is_mutable else made, names)
        return out


class _Reads(TorchFunctionMode):
    """Note what Python takes from a tensor without an operation."""

    READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__)

    def __init__(self, flow: _Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            self.flow.read |= self.flow.of(args[:1])
        if func is Tensor.__getitem__:
            return index_unread(*args)
        return func(*args, **(kwargs or {}))


def index_unread(x: Tensor, index: Any) -> Tensor:
    """Return ``x[index]``, of which torch makes Python numbers if it has integer tensors without dims, without that."""
    parts = index if isinstance(index, tuple) else (index,)
    scalars = [isinstance(i, Tensor) and i.dim() == 0 and i.dtype == torch.long for i in parts]
    count = sum(scalars)
    if count and all(scalars[:count]) and not any(isinstance(i, Tensor | list) for i in parts[count:]):
        return x[tuple(i.unsqueeze(0) for i in parts[:count]) + parts[count:]].squeeze(0)
    return x[index]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _tensors(x: Any) -> Iterable[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        yield from _tensors(list(x.values()))
    elif isinstance(x, tuple | list):
        for part in x:
            yield from _tensors(part)
