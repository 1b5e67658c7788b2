r"""Which coordinates of which parameters are kept."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parameters import GUIDE, MODEL, SHARED, Parameters

__all__ = ["Coordinates", "choose"]


@dataclass(frozen=True)
class Coordinates:
    """The kept coordinates: by block, by parameter, an index into the flat parameter, or None for all of it."""

    keep: Mapping[str, Mapping[str, Tensor | None]]
    leaves: Mapping[str, Tensor]

    def pick(self, grads: Mapping[str, Tensor], block: str, rows: int) -> Tensor:
        """Flatten the kept coordinates of one block; a parameter without gradient has gradient 0."""
        parts = []
        for name, index in self.keep[block].items():
            g, leaf = grads.get(name), self.leaves[name]
            g = leaf.new_zeros(rows, leaf.numel()) if g is None else g.detach().reshape(rows, -1)
            parts.append((g if index is None else g[:, index.to(g.device)]).cpu())
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        return torch.cat([part.to(dtype) for part in parts], 1)

    def columns(self, names: Collection[str]) -> dict[str, Tensor | slice]:
        """Return the columns of each block that belong to the parameters `names`; blocks without any are left out."""
        found = {}
        for block, kept in self.keep.items():
            widths = [self.leaves[n].numel() if index is None else len(index) for n, index in kept.items()]
            inside = torch.cat([torch.full((w,), n in names) for n, w in zip(kept, widths, strict=True)])
            if bool(inside.any()):
                found[block] = slice(None) if bool(inside.all()) else inside.nonzero()[:, 0]
        return found


def choose(parameters: Parameters, limit: int) -> Coordinates:
    """Choose at random which coordinates are kept, at most `limit` per block."""
    keep: dict[str, dict[str, Tensor | None]] = {}
    for block in (GUIDE, MODEL, SHARED):
        leaves = parameters.leaves(block)
        total = sum(leaf.numel() for leaf in leaves.values())
        if not total:
            continue
        share = min(1.0, limit / total)
        keep[block] = {
            n: None if share == 1.0 else torch.randperm(p.numel())[: max(1, int(share * p.numel()))]
            for n, p in leaves.items()
        }
    return Coordinates(keep, parameters.leaves())
