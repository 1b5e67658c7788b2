r"""The exact E-step of latents with conjugate priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .._checks import EmvaeError, fail
from .._registry import Traits, register
from ..engine import Engine, State
from ..particles import keep_buffers, quiet
from ..posterior import Posterior, solve_conjugate
from .base import HalfStep, Info

__all__ = ["Conjugate"]


class Conjugate(HalfStep):
    r"""The exact posterior of latents with conjugate priors: Beta, Gamma, Normal, Dirichlet and Normal-Gamma.

    | latent | prior, for instance | observed, for instance | posterior |
    |---|---|---|---|
    | probability | Beta, Uniform(0, 1) | Bernoulli, Binomial, Geometric | Beta |
    | positive | Gamma, Exponential | Poisson, Exponential, Gamma's rate, Normal's precision | Gamma |
    | real | Normal | Normal, known scale | Normal |
    | simplex | Dirichlet | Categorical, Multinomial | Dirichlet |
    | precision and mean | Gamma, Normal given it | Normal | Normal-Gamma |

    The table is not looked up. A family has the log density $\eta\cdot t(z)+c$, and a model that is conjugate to it has
    a log joint of that form, so that derivatives of the log joint at a few z give $\eta$, for pooled data, exposures,
    indexed groups and inner plates alike. That it has this form is verified in every step, by the derivatives at random
    points per latent, and by $\log p(x,z)-\log q(z)$, the log evidence, which has to be the same at three of them.

    When to use: Beta-Binomial, Gamma-Poisson and other models whose latents are independent given the data. No guide is
    needed. Cost: twelve runs of the model. Joint Gaussian latents: `Gaussian`. Discrete ones: `Enumerated`.

    Args:
        posterior: ``posterior(params, *args, **kwargs) -> {site: distribution}``, your own formula, with the model's
            parameters by name, constrained; one distribution for each latent, in its plates. It is verified likewise.

    Raises:
        StepError: Prior and likelihood are not conjugate, or the user's posterior is not the model's (says by how
            much); a latent with `.to_event()` or of another support; factors with different scales.

    Source: Raiffa and Schlaifer 1961; Bernardo and Smith 1994, appendix A. Differs: the posterior is found from
    derivatives of the model that is given.

    Example:
        >>> Conjugate()
        Conjugate()
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), latents="conjugate", exact=True)

    def __init__(self, posterior: Callable[..., Mapping[str, Any]] | None = None) -> None:
        if posterior is not None and not callable(posterior):
            fail(
                EmvaeError,
                "steps.Conjugate",
                "use posterior=",
                got=f"{posterior!r:.60}",
                because="it is called with the model's parameters and the data",
                fix="Pass a function that returns a dict from site to distribution.",
            )
        self.posterior = posterior
        self._vectorize: dict[Callable, bool] = {}

    def __repr__(self) -> str:
        return "Conjugate()" if self.posterior is None else f"Conjugate({getattr(self.posterior, '__name__', '...')})"

    def infer(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
        with quiet():
            return solve_conjugate(type(self).__name__, model, args, kwargs, self.posterior, self._vectorize)

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        with keep_buffers():
            found = solve_conjugate(type(self).__name__, problem.model, args, kwargs, self.posterior, self._vectorize)
        return state, found, Info(loss=-found.log_evidence)


register(
    "step",
    "conjugate",
    Conjugate,
    summary="exact posterior of latents with conjugate priors",
    source="Raiffa and Schlaifer 1961; Bernardo and Smith 1994, appendix A",
)
