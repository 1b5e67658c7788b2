r"""Fewer iterations of a deterministic EM: extrapolation along the path of its iterates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .driver import Record
from .engine import Engine

__all__ = ["Squarem", "extrapolate"]


def extrapolate(start: Tensor, first: Tensor, second: Tensor, longest: float = math.inf) -> tuple[Tensor, float]:
    r"""Return the point of squared extrapolation from three successive iterates, and its step length.

    $$\theta'=\theta_0-2\alpha r+\alpha^2v,\qquad r=\theta_1-\theta_0,\quad v=(\theta_2-\theta_1)-r,\quad
      \alpha=-\frac{\|r\|}{\|v\|}.$$

    With $\alpha=-1$ it is $\theta_2$, which is the shortest step that is made.

    Args:
        start, first, second: Iterates, one flat tensor each.
        longest: Bound of $-\alpha$.

    Source: Varadhan and Roland 2008, scheme S3 (eqs. 7 and 8).

    Example:
        >>> path = [torch.tensor([0.9**k], dtype=torch.float64) for k in range(3)]  # its limit is 0
        >>> extrapolate(*path)[1], bool(extrapolate(*path)[0].abs() < 1e-12)
        (9.99..., True)
    """
    r = first - start
    v = second - first - r
    length = float(r.norm() / v.norm()) if bool(v.any()) else 1.0
    length = min(max(length, 1.0), longest)
    return start + 2 * length * r + length**2 * v, length


class Squarem:
    r"""One iteration is a cycle: two EM iterations, an extrapolation from the three iterates, and a third EM iteration.

    The extrapolated point is kept only if its objective, which its E-step finds, is no lower than that of the second
    iterate; else the cycle ends at the plain EM point. So the objective never goes down, as in EM itself. The bound of
    the step length starts at 1, grows by a factor of 4 when a step of that length was kept, and is a quarter of a step
    that was not.

    Three evaluations of the EM map per cycle, one point of all unconstrained parameters of the model.

    Args:
        engine: What the iterations change.
        iterate: One EM iteration.

    Source: Varadhan and Roland 2008, scheme S3 with their globalisation. Differs: the fallback costs no evaluation.
    """

    factor = 4.0

    def __init__(self, engine: Engine, iterate: Callable[[tuple, Mapping[str, Any]], Record]) -> None:
        self.engine, self.iterate, self.longest = engine, iterate, 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the bound of the step length."""
        return {"longest": self.longest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the bound of a run that was cut."""
        self.longest = state["longest"]

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> Record:
        start = self._read()
        before = self.iterate(args, kwargs)
        first = self._read()
        middle = self.iterate(args, kwargs)
        second, steps = self._read(), self.engine.steps
        point, length = extrapolate(start, first, second, self.longest)
        kept = self._try(point, middle.loss, args, kwargs)
        if not kept:
            self._write(second)
            self.engine.steps = steps
        self._adapt(length, kept)
        return Record(before.loss, [], evaluations=3)

    def _try(self, point: Tensor, loss: float, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Iterate from the extrapolated point; return whether its objective was high enough."""
        self._write(point)
        try:
            return self.iterate(args, kwargs).loss <= loss
        except (ArithmeticError, RuntimeError, ValueError):  # a point outside of what model or update can take
            return False

    def _adapt(self, length: float, kept: bool) -> None:
        if not kept:
            self.longest = max(1.0, length / self.factor)
        elif length == self.longest:
            self.longest *= self.factor

    def _theta(self) -> dict[str, Tensor]:
        return self.engine.parameters.leaves(*self.engine.parameters.theta)

    def _read(self) -> Tensor:
        leaves = self._theta().values()
        return torch.cat([leaf.detach().flatten() for leaf in leaves])

    def _write(self, point: Tensor) -> None:
        leaves = list(self._theta().values())
        with torch.no_grad():
            for leaf, part in zip(leaves, point.split([leaf.numel() for leaf in leaves]), strict=True):
                leaf.copy_(part.reshape(leaf.shape))
