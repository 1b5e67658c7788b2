r"""The exact E-step of Gaussian latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from .._registry import Traits, register
from ..engine import Engine, State
from ..particles import keep_buffers, quiet
from ..posterior import GaussianPosterior, Posterior, solve_quadratic
from .base import HalfStep, Info

__all__ = ["Gaussian"]


class Gaussian(HalfStep):
    r"""The exact posterior of latents in which the log joint is quadratic: the E-step of linear-Gaussian models.

    With $f(z)=\log p_\theta(x,z)$, from any $z_0$:

    $$\Lambda=-\nabla^2 f,\qquad\bar z=z_0+\Lambda^{-1}\nabla f(z_0),\qquad
      \log p(x)=f(\bar z)-\tfrac12\log|\Lambda/2\pi|.$$

    That f is quadratic is verified by value and gradient at a random point per datum, two posterior standard deviations
    off, in every step. Of slices of the data (``EM.run(..., batch_size=...)``) all are verified in the first iteration
    and at the end, and a quarter of them, in turn, in the iterations between.

    When to use: probabilistic PCA, factor analysis, linear mixed models, linear-Gaussian state spaces. No guide is
    needed. Latents in a plate are one block per datum, at a cost linear in their number; latents that all data share
    are integrated out by the Schur complement. Latents that depend on each other across a plate's elements, or in a
    chain, make one dense block. Missing values: what is masked, by `poutine.mask` or ``.mask()``, counts for nothing,
    and a latent that is masked with all that depends on it has its prior as its posterior.

    Raises:
        StepError: The log joint is not quadratic (says by how much), or a prior is improper; a latent is discrete or
            not on all real numbers; factors with different scales; a latent is masked, and a site that depends on it
            is not.

    Source: Tipping and Bishop 1999, eq. 12, for PCA; Lindley and Smith 1972 for the general case. Differs: precision
    and mean are found from derivatives of the model that is given.

    Example:
        >>> Gaussian()
        Gaussian()
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), latents="continuous", exact=True)

    def __init__(self) -> None:
        self._vectorize: dict[Callable, bool] = {}
        self._trusting = self._coupled = False

    def __repr__(self) -> str:
        return "Gaussian()"

    def infer(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
        with quiet():
            return self._solve(model, args, kwargs)

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        with keep_buffers():
            posterior = self._solve(problem.model, args, kwargs, not self._trusting or self._coupled)
        self._coupled |= posterior.joint.single
        return state, posterior, Info(loss=-posterior.log_evidence)

    @contextlib.contextmanager
    def trusting(self) -> Iterator[None]:
        """Leave the verification out, unless it is what finds latents that depend on each other across a plate."""
        self._trusting = True
        try:
            yield
        finally:
            self._trusting = False

    def _solve(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], verify: bool = True) -> GaussianPosterior:
        return solve_quadratic(type(self).__name__, model, args, kwargs, self._vectorize, verify)


register(
    "step",
    "gaussian",
    Gaussian,
    summary="exact posterior where the log joint is quadratic",
    source="Tipping and Bishop 1999, eq. 12; Lindley and Smith 1972",
)
