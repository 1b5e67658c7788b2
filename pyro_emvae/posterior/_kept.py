r"""Factors kept from batch to batch: rows of the data that a batch holds, put back where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import StepError, fail
from ._factored import FactoredJoint
from ._factors import tensors, with_tensors
from ._families import Factor

__all__ = ["gather_factors", "is_local", "scatter_factors"]


def gather_factors(
    own: Mapping[str, Tensor], joint: FactoredJoint, factors: Sequence[Factor], index: Any = None
) -> list[Factor]:
    r"""Return factors with the parameters that were kept; those of data that were not met yet as they are.

    Args:
        own: What `scatter_factors` returned.
        joint: The model on this batch.
        factors: Where new data start.
        index: Row numbers of the batch, where the plate itself does not say.
    """
    found = []
    for factor in factors:
        places, new = _places(joint, factor, index), {}
        for field, x in tensors(factor).items():
            kept = own.get(_key(factor, field))
            if kept is not None:
                for dim, rows, _ in places:
                    kept = _grown(kept, _dim(x, joint, factor, dim), int(rows.max()) + 1)
                    kept = kept.index_select(_dim(x, joint, factor, dim), rows.to(kept.device))
                if kept.shape == x.shape:
                    x = torch.where(torch.isnan(kept), x, kept)
            new[field] = x
        found.append(with_tensors(factor, new) if new else factor)
    return found


def scatter_factors(
    own: Mapping[str, Tensor], joint: FactoredJoint, factors: Sequence[Factor], index: Any = None
) -> dict[str, Tensor]:
    """Return a step's own tensors with the parameters of a batch's factors replaced, in new tensors."""
    new = {}
    for factor in factors:
        places = _places(joint, factor, index)
        for field, x in tensors(factor).items():
            key = _key(factor, field)
            new[key] = _written(own.get(key), x, [(_dim(x, joint, factor, d), r, n) for d, r, n in places])
    return new


def is_local(joint: FactoredJoint, factor: Factor) -> bool:
    """Whether a factor has elements in a plate that a minibatch is drawn from."""
    return any(frame.name in joint.batch for frame in joint.latents[factor.names[0]].frames)


def _places(joint: FactoredJoint, factor: Factor, index: Any) -> list[tuple[int, Tensor, int]]:
    """Return the dims of a factor that hold a part of the data, with the rows and the number of all."""
    found = []
    for frame in joint.latents[factor.names[0]].frames:
        rows = joint.batch.get(frame.name)
        if rows is not None:
            found.append((frame.dim, torch.as_tensor(rows), int(frame.full_size or frame.size)))
    if index is None or found:
        return found
    rows = torch.as_tensor(index).long().flatten()
    frames = [frame for frame in joint.latents[factor.names[0]].frames if frame.size == len(rows)]
    if len(frames) > 1:
        fail(
            StepError,
            joint.obj,
            f"tell which data {factor.names[0]!r} belongs to",
            got=f"index= of {len(rows)} rows and plates {[frame.name for frame in frames]} of that size",
            because="index= is one row number per datum of one plate",
            fix="Let the plate subsample: pyro.plate(..., subsample=index).",
        )
    return [(frame.dim, rows, int(rows.max()) + 1) for frame in frames]


def _key(factor: Factor, field: str) -> str:
    return f"{'+'.join(factor.names)}:{field}"


def _dim(x: Tensor, joint: FactoredJoint, factor: Factor, dim: int) -> int:
    """Return a plate's dim in a parameter, which may have event dims to the right."""
    return dim - (x.dim() - len(joint.shape(factor.names[0])))


def _grown(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    if missing <= 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, torch.nan)], dim)


def _written(old: Tensor | None, x: Tensor, places: Sequence[tuple[int, Tensor, int]]) -> Tensor:
    if not places:
        return x
    shape = list(x.shape)
    for dim, _, size in places:
        shape[dim] = max(size, old.shape[dim] if old is not None else 0)
    new = x.new_full(shape, torch.nan)
    if old is not None:
        new[tuple(slice(0, n) for n in old.shape)] = old
    at = [torch.arange(n, device=x.device) for n in x.shape]
    for dim, rows, _ in places:
        at[dim] = rows.to(x.device)
    new[torch.meshgrid(*at, indexing="ij")] = x
    return new
