r"""From an information matrix to standard errors, and what cannot have one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .coordinates import Coordinates

__all__ = ["Delta", "StandardErrors"]

LIMIT = 10.0
MAX_SLACK = 0.02


@dataclass(frozen=True, eq=False)
class StandardErrors:
    r"""Standard errors of a model's parameters; prints as a table.

    Args:
        method: How they were found.
        kind: ``"exact"`` (the information of the exact likelihood), ``"monte carlo"`` (from draws of the posterior),
            ``"quadrature"`` (from nodes, three or more per coordinate), ``"approximate"`` (from another distribution
            than the posterior, such as a guide), ``"bootstrap"``.
        places: Parameter and index of each element.
        estimate: The fit's values: ``(C,)``.
        standard_error: NaN where it is undefined: ``(C,)``, units of the parameter.
        status: ``""``, or why it is undefined.
        covariance: Of the elements: ``(C, C)``; NaN where undefined.
        monte_carlo_error: Standard error of the standard error from the finite number of draws; NaN if exact.
        note: What else limits them.
    """

    method: str
    kind: str
    places: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)
    estimate: Tensor = field(repr=False)
    standard_error: Tensor = field(repr=False)
    status: tuple[str, ...] = field(repr=False)
    covariance: Tensor = field(repr=False)
    monte_carlo_error: Tensor = field(repr=False)
    note: str = ""

    def __getitem__(self, name: str) -> Tensor:
        """Return one parameter's standard errors, in its shape."""
        mine = [(place, index) for place, (n, index) in enumerate(self.places) if n == name]
        if not mine:
            raise KeyError(name)
        shape = tuple(1 + max(index[d] for _, index in mine) for d in range(len(mine[0][1])))
        return self.standard_error[[place for place, _ in mine]].reshape(shape)

    @property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The table by parameter: index, estimate, standard error, status."""
        found: dict[str, list[dict[str, Any]]] = {}
        for place, (name, index) in enumerate(self.places):
            estimate, error = float(self.estimate[place]), float(self.standard_error[place])
            row = {"index": index, "estimate": estimate, "standard_error": error, "status": self.status[place]}
            found.setdefault(name, []).append(row)
        return found

    @property
    def table(self) -> Any:
        """A `pandas.DataFrame`: parameter, index, estimate, standard error, Monte Carlo error of that, status."""
        import pandas as pd

        errors = iter(self.monte_carlo_error.tolist())
        return pd.DataFrame(
            [
                {"parameter": name} | row | {"monte_carlo_error": next(errors), "status": row["status"] or "defined"}
                for name, rows in self.rows.items()
                for row in rows
            ]
        )

    def __repr__(self) -> str:
        lines = [f"{'parameter':<20} {'estimate':>12} {'std. error':>12}  status"]
        for name, rows in self.rows.items():
            for row in rows:
                label = name + (str(list(row["index"])) if row["index"] else "")
                numbers = f"{row['estimate']:>12.5g} {row['standard_error']:>12.4g}"
                lines.append(f"{label:<20} {numbers}  {row['status'] or 'defined'}")
        lines.append(f"method {self.method}, {self.kind}" + (f"; {self.note}" if self.note else ""))
        return "\n".join(lines)


class Delta:
    r"""The delta method, $\mathrm{Cov}(\hat\theta)=J\,\mathcal I^+J^\top$ with $J=\partial\theta/\partial u$.

    The information $\mathcal I$ of the unconstrained coordinates u is scaled to a unit diagonal, and inverted where it
    is positive. A coordinate that goes to infinity at a boundary, as the logarithm of a scale does, and whose own
    standard error is above 10 counts as there: it is held fixed, and what it moves has no standard error. Nor has what
    moves along a null direction (not identified) or a negative one (no maximum). A null direction that moves nothing,
    such as a common shift of softmax weights, does no harm.

    Args:
        coordinates: Where.
        information: $\mathcal I$: ``(P, P)``.
        score: The gradient of log p(x) there, ``(P,)``: it says how far the maximum is.
    """

    def __init__(self, coordinates: Coordinates, information: Tensor, score: Tensor) -> None:
        jacobian, diagonal = coordinates.jacobian(), information.diagonal()
        used = (jacobian != 0).any(0) & torch.isfinite(diagonal)
        self.at_boundary = used & coordinates.bounded() & (diagonal.abs() <= 1 / LIMIT**2)
        self.kept = used & ~self.at_boundary
        self.jacobian, self.places = jacobian, coordinates.places
        spread = diagonal[self.kept].abs().sqrt()
        self.spread = torch.where(spread > 0, spread, 1.0)
        self.values, self.vectors = torch.linalg.eigh(self.scaled(information))
        self.score = score[self.kept] / self.spread
        largest = self.values.abs().max() if len(self.values) else information.new_zeros(())
        rounding = 10 * torch.finfo(information.dtype).eps ** 0.5 * largest
        # along an orbit of equal likelihood the curvature is of the order of the score, which is not quite zero
        slack = rounding + (self.score.abs().max().clamp_max(MAX_SLACK) if len(self.score) else 0.0)
        self.null = self.values.abs() <= slack
        self.negative = self.values < -slack
        self.positive = self.values > slack

    def scaled(self, matrix: Tensor) -> Tensor:
        """Return a matrix of u in the scaled coordinates that are kept."""
        mine = matrix[self.kept][:, self.kept] / self.spread[:, None] / self.spread
        return 0.5 * (mine + mine.mT)

    @property
    def inverse(self) -> Tensor:
        """The inverse on the positive directions, in scaled coordinates."""
        vectors = self.vectors[:, self.positive]
        return (vectors / self.values[self.positive]) @ vectors.mT

    def covariance(self, middle: Tensor | None = None) -> Tensor:
        r"""Return $J\mathcal I^+J^\top$, or $J\mathcal I^+B\,\mathcal I^+J^\top$ NaN if undefined."""
        rows = self.jacobian[:, self.kept] / self.spread
        inverse = self.inverse
        inner = inverse if middle is None else inverse @ self.scaled(middle) @ inverse
        found = rows @ inner @ rows.mT
        bad = torch.tensor([bool(reason) for reason in self.reasons()], device=found.device)
        found[bad] = math.nan
        found[:, bad] = math.nan
        return found

    def reasons(self) -> tuple[str, ...]:
        """Return for each element why it has no standard error, or an empty string."""
        scaled = self.jacobian[:, self.kept] / self.spread
        size = scaled.norm(dim=1).clamp_min(torch.finfo(scaled.dtype).tiny)
        null = (scaled @ self.vectors[:, self.null]).norm(dim=1) / size
        negative = (scaled @ self.vectors[:, self.negative]).norm(dim=1) / size
        whole = self.jacobian.norm(dim=1)
        edge = self.jacobian[:, self.at_boundary].norm(dim=1)
        return tuple(map(self._reason, edge.tolist(), whole.tolist(), null.tolist(), negative.tolist()))

    def _reason(self, edge: float, whole: float, null: float, negative: float) -> str:
        if whole == 0 or edge > 1e-3 * whole:
            return "undefined: at the boundary of its constraint"
        if not math.isfinite(null + negative):
            return "undefined: the information is not finite"
        if negative > 1e-3:
            worst = float(self.values.min())
            return f"undefined: no maximum, the scaled information has an eigenvalue {worst:.2g}"
        if null > 1e-3:
            return "undefined: not identified, the information is singular"
        return ""

    @property
    def note(self) -> str:
        """What limits the errors: parameters held at a boundary, and a fit that is not at its maximum."""
        held = sorted({self.places[i][0] for i in torch.where((self.jacobian[:, self.at_boundary] != 0).any(1))[0]})
        notes = [f"given {', '.join(held)} at the boundary"] if held else []
        away = float((self.score @ self.inverse @ self.score).clamp_min(0).sqrt())
        if away > 0.1:
            notes.append(f"the fit is about {away:.2g} standard errors from the maximum: run it longer")
        return "; ".join(notes)
