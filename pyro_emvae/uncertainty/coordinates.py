r"""The model's parameters as one vector of unconstrained coordinates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from .._checks import EmvaeError, fail
from ..driver import Fit
from ..parameters import Parameters, Row, substitute
from ..particles import quiet

__all__ = ["MAX_COORDINATES", "Coordinates", "coordinates"]

MAX_COORDINATES = 2000


@dataclass(frozen=True)
class Coordinates:
    r"""Unconstrained coordinates u of the model's parameters, at a fit's values.

    Args:
        parameters: All parameters, as the fit's loop found them.
        rows: Those of the model, in order.
        others: Unconstrained values of the rest, at the fit's.
        start: u of the fit: ``(P,)``.
        estimate: The fit's values, flat: ``(C,)``.
        places: For each of the C elements, the parameter's name and the index in it.
    """

    parameters: Parameters = field(repr=False)
    rows: tuple[Row, ...]
    others: dict[str, Tensor] = field(repr=False)
    start: Tensor
    estimate: Tensor
    places: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Return the unconstrained tensors by name; differentiable."""
        parts = u.split([row.leaf.numel() for row in self.rows])
        return {row.name: p.reshape(row.leaf.shape).to(row.leaf) for row, p in zip(self.rows, parts, strict=True)}

    @contextlib.contextmanager
    def at(self, u: Tensor) -> Iterator[None]:
        """Run model and guide with these coordinates, in evaluation mode; nothing of the user's is changed."""
        with quiet(train=False), torch.enable_grad(), substitute(self.parameters, self.others | self.split(u)):
            yield

    def jacobian(self) -> Tensor:
        """Return the derivative of the constrained values by u: ``(C, P)``."""
        blocks = []
        for row, u in zip(self.rows, self.split(self.start).values(), strict=True):
            if row.constraint is None:
                blocks.append(torch.eye(u.numel()).to(self.start))
                continue
            transform = transform_to(row.constraint)
            found = torch.autograd.functional.jacobian(transform, u)
            blocks.append(found.reshape(-1, u.numel()).to(self.start))
        return torch.block_diag(*blocks)

    def bounded(self) -> Tensor:
        """Return which coordinates go to infinity at a boundary, as the logarithm of a scale does: ``(P,)``."""
        return torch.cat([_bounded(row).flatten() for row in self.rows]).to(self.start.device)


def coordinates(fit: Fit) -> Coordinates:
    """Return the coordinates of a fit's model parameters.

    Raises:
        EmvaeError: There are none, or too many for a matrix, or the fit's loop has forgotten them.
    """
    parameters = getattr(getattr(fit.inference, "engine", None), "parameters", None)
    names = [] if parameters is None else [row.name for row in parameters.rows]
    if not set(fit.params) <= set(names) or not fit.params:
        _refuse(
            "find the fit's parameters",
            f"parameters {sorted(fit.params)[:5]}, and {sorted(names)[:5]} in its loop",
            "the E-step is run at the fit's values",
            "Pass what em.run(...) returned, before the same EM is used with another model or other parameters.",
        )
    rows = tuple(row for row in parameters.rows if fit.blocks.get(row.name) in parameters.theta)
    number = sum(row.leaf.numel() for row in rows)
    if not 1 <= number <= MAX_COORDINATES:
        _refuse(
            "make the information matrix",
            f"{number} coordinates of model parameters",
            f"it is dense, and has at least one row and at most {MAX_COORDINATES}",
            "Fix what needs no standard error, such as a network's weights, as tensors in place of parameters.",
        )
    values = {row.name: _unconstrain(row, fit.params[row.name]) for row in parameters.rows if row.name in fit.params}
    others = {name: u for name, u in values.items() if fit.blocks.get(name) not in parameters.theta}
    start = torch.cat([values[row.name].flatten() for row in rows])
    estimate = torch.cat([fit.params[row.name].detach().flatten() for row in rows]).to(start)
    places = tuple((row.name, index) for row in rows for index in _indices(fit.params[row.name]))
    return Coordinates(parameters, rows, others, start, estimate, places)


def _refuse(act: str, got: str, because: str, fix: str) -> None:
    fail(EmvaeError, "standard_errors", act, got=got, because=because, fix=fix)


def _unconstrain(row: Row, value: Tensor) -> Tensor:
    """Return the leaf where it still has the fit's value, else the inverse; at a boundary the nearest usable number."""
    if torch.equal(row.value.detach(), value):
        return row.leaf.detach().clone()
    if row.constraint is None:
        return value.detach().clone()
    u = transform_to(row.constraint).inv(value).detach()
    limit = -2 * torch.log(torch.tensor(torch.finfo(u.dtype).eps)).item()
    return u.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)


def _indices(value: Tensor) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in index) for index in torch.ones(value.shape).nonzero()] if value.dim() else [()]


def _bounded(row: Row) -> Tensor:
    shape, name = row.leaf.shape, str(row.constraint)
    identity = row.constraint is None or _is_identity(row)
    everywhere = torch.zeros(shape, dtype=torch.bool) if identity else torch.ones(shape, dtype=torch.bool)
    if any(kind in name for kind in ("LowerCholesky", "PositiveDefinite", "PositiveSemidefinite")):
        return everywhere & torch.eye(shape[-1], dtype=torch.bool)
    if "OrderedVector" in name:
        everywhere[..., 0] = False
    return everywhere


def _is_identity(row: Row) -> bool:
    u: Mapping[str, Any] | Tensor = torch.randn(row.leaf.shape, generator=torch.Generator().manual_seed(0)).to(row.leaf)
    value = transform_to(row.constraint)(u)
    return value.shape == u.shape and torch.equal(value, u)
