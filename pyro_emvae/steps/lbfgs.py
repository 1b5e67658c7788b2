r"""The M-step by L-BFGS with a line search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import EmvaeError, NonFiniteError, StepError, fail, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..parameters import MODEL
from ..particles import keep_buffers
from ..posterior import Posterior
from .base import HalfStep, Info

__all__ = ["LBFGS"]

FAILED = (ArithmeticError, ValueError, torch.linalg.LinAlgError)
EVALUATIONS = 25  # per iteration, at most: as many as one line search makes
LINE_SEARCHES = ("strong_wolfe", None)


class LBFGS(HalfStep):
    r"""Theta towards the maximum of the expected log joint, by L-BFGS in unconstrained space.

    $$\theta_{t+1}\approx\arg\max_\theta Q_t(\theta),\qquad
      Q_t(\theta)=\sum_n\sum_sw_{sn}\log p_\theta(x_n,z_{sn}),$$

    with the posterior's values and weights held, so that $Q_t$ is a function without noise: draws are made once, and
    kept for all evaluations. Theta ends at the best point met, so no step lowers $Q_t$.

    When to use: models without a closed form and with few enough parameters that whole data sets are evaluated, such
    as generalised linear mixed models. After an exact E-step the objective never falls (a generalised EM). It is not
    called exact, for it stops near the maximum. Cost: about one evaluation of $Q_t$ and its gradient per iteration.

    Curvature is not kept from one M-step to the next: the E-step between them makes another function of $Q_t$, and
    pairs of steps and gradient differences of two functions describe neither. So it has no state.

    Args:
        max_iter: Iterations of L-BFGS at most. A few suffice, for the next E-step changes Q anyway.
        line_search: ``"strong_wolfe"``, or None: unit steps, of which those that lead down are undone.
        history_size: Pairs of which the curvature is made.
        tol_grad: It ends where no element of the gradient is larger; nats per unit.
        tol_change: It ends where neither parameters nor Q change by more.
        num_particles: Draws, after an E-step that has to draw.

    Modules keep the mode that they are in, but their buffers are left alone.

    Raises:
        EmvaeError: An argument out of its range.
        StepError: The block has no parameters that are trained.
        NonFiniteError: Q or its gradient is not finite where it starts.

    Source: Liu and Nocedal 1989; Nocedal and Wright 2006, algorithms 3.5 and 7.5, as in `torch.optim.LBFGS`. Differs:
    the best point is returned, and a point that the model cannot take ends the search.

    Example:
        >>> LBFGS(max_iter=5)
        LBFGS(max_iter=5, line_search='strong_wolfe')
    """

    traits: ClassVar[Traits] = Traits(slots=("M",), deterministic=True, monotone=True)

    def __init__(
        self,
        max_iter: int = 5,
        line_search: str | None = "strong_wolfe",
        history_size: int = 10,
        tol_grad: float = 1e-7,
        tol_change: float = 1e-9,
        num_particles: int = 100,
    ) -> None:
        self.max_iter = positive_int("steps.LBFGS", "max_iter", max_iter)
        self.history_size = positive_int("steps.LBFGS", "history_size", history_size)
        self.num_particles = positive_int("steps.LBFGS", "num_particles", num_particles)
        if line_search not in LINE_SEARCHES:
            _refuse("line_search", line_search, "there is one line search, and none", 'line_search="strong_wolfe"')
        for name, value in (("tol_grad", tol_grad), ("tol_change", tol_change)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                _refuse(name, value, "a tolerance is a number that is not negative", f"{name}=1e-9")
        self.line_search, self.tol_grad, self.tol_change = line_search, float(tol_grad), float(tol_change)

    def __repr__(self) -> str:
        return f"LBFGS(max_iter={self.max_iter}, line_search={self.line_search!r})"

    @torch.enable_grad()
    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        leaves = [leaf for leaf in problem.parameters.leaves(MODEL).values() if leaf.numel()]
        if not leaves:
            fail(
                StepError,
                "steps.LBFGS",
                "make its step",
                got="a block without parameters",
                because="it has to have something to change",
                fix="Declare them in the model by pyro.param, or leave the phase out.",
            )
        with keep_buffers():
            search = _Search(leaves, posterior.held(self.num_particles))
            optimizer = torch.optim.LBFGS(
                leaves,
                max_iter=self.max_iter,
                max_eval=EVALUATIONS * self.max_iter,
                history_size=self.history_size,
                tolerance_grad=self.tol_grad,
                tolerance_change=self.tol_change,
                line_search_fn=self.line_search,
            )
            try:
                optimizer.step(search)
                search()
            except FAILED:
                if search.failed is None:
                    raise
            finally:
                search.finish()
        return state, Info()


class _Search:
    """The function that is minimised: it notes the best point, and ends the search at one that cannot be evaluated."""

    def __init__(self, leaves: list[Tensor], expected: Callable[[], Tensor]) -> None:
        self.leaves, self.expected = leaves, expected
        self.kept = [leaf.grad for leaf in leaves]
        self.best, self.point = math.inf, [leaf.detach().clone() for leaf in leaves]
        self.failed: Exception | None = None

    def __call__(self) -> Tensor:
        try:
            value = -self.expected()
            grads = torch.autograd.grad(value, self.leaves, allow_unused=True, materialize_grads=True)
            loss = value.detach()
            if not all(bool(torch.isfinite(x).all()) for x in (loss, *grads)):
                self._refuse_start(f"Q = {-float(loss)}")
        except FAILED as error:
            if math.isfinite(self.best):
                self.failed = error
            raise
        if float(loss) < self.best:
            self.best, self.point = float(loss), [leaf.detach().clone() for leaf in self.leaves]
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad
        return loss

    def _refuse_start(self, got: str) -> None:
        fail(
            NonFiniteError,
            "steps.LBFGS",
            "climb the expected log joint",
            got=f"{got}, or a gradient, that is not finite",
            because="every log density has to be finite where it starts",
            fix="Check the data and the initial values.",
        )

    def finish(self) -> None:
        """Go to the best point, and put the gradients back that were there before."""
        with torch.no_grad():
            for leaf, value, grad in zip(self.leaves, self.point, self.kept, strict=True):
                leaf.copy_(value)
                leaf.grad = grad


def _refuse(name: str, value: Any, because: str, fix: str) -> None:
    fail(EmvaeError, "steps.LBFGS", f"use {name}", got=repr(value), because=because, fix=f"Write {fix}.")


register(
    "step",
    "lbfgs",
    LBFGS,
    summary="theta by L-BFGS with a line search, the posterior held",
    source="Liu and Nocedal 1989",
)
