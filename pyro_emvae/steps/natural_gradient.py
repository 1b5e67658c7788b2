r"""The E-step of a guide of free parameters by natural gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from .._checks import StepError, fail, number, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..posterior import GuidePosterior, Posterior
from .base import HalfStep, Info

__all__ = ["NaturalGradient"]

COUNT = "count"


class NaturalGradient(HalfStep):
    r"""Steps of `guides.AutoMeanField` by natural gradients: along the steepest ascent in KL, not in its parameters.

    $$\eta_s\leftarrow(1-\rho)\,\eta_s+\rho\,\hat\eta_s,\qquad
    \hat\eta_s=\nabla_{\mu_s}E_q[\log p_\theta(x,z)],$$

    with natural parameters $\eta_s$ and means $\mu_s=E_q[t_s(z_s)]$ of the statistics of $q(z_s)$. Sites are moved one
    after the other, in the order of the model, all elements of a site at once.

    The gradient of a continuous site is found from draws, with the derivative of the means of t by the same draws:

    $$\Big(\partial_\eta\tfrac1K\sum_kt(z_k)\Big)\hat\eta=\partial_\eta\tfrac1K\sum_k\log p_\theta(x,z_k).$$

    So $\hat\eta$ has no noise where the log joint is affine in t: on a model that is conjugate in the site given the
    others, a step with $\rho=1$ is the update of coordinate ascent, but for the noise of the others' draws. Elsewhere
    it is consistent in K. For a normal it is $\hat\lambda=-E_q[f'']$, $\hat\lambda\hat m=\hat\lambda m+E_q[f']$, by the
    theorems of Bonnet and Price. A discrete site is run at all its outcomes, with the draws of the others.

    | family | natural parameters of |
    |---|---|
    | `Normal`, `FullRankNormal` | the unconstrained value |
    | `LogNormal`, `Gamma`, `Beta`, `Dirichlet` | the value |
    | `Bernoulli`, `Categorical`, `OneHot` | the outcomes |

    When to use: free parameters per datum or per site, in few steps and without a learning rate to be tuned; latents
    that `MeanField` has no factor for, or a model that is not conjugate in them. Stochastic, for its draws. Cost: a run
    of K draws and its gradient per site, one per outcome and element of the event for a discrete one.

    With a plate that draws a minibatch only its rows move; all others stay bit for bit. The scale of a plate does not
    change the step of its rows. Where a step leads to no density, as where the log joint is not concave, it is halved
    until it does, row by row.

    Args:
        rate: $\rho$ of the first step, in (0, 1].
        num_steps: Sweeps over the sites per E-step.
        num_particles: K, draws per site; more where the family needs them. With fewer than ten, and other latents that
            are drawn, single steps can go far astray.
        delay, forgetting: Step t = 0, 1, ... has the rate $\rho\,(1+t/\text{delay})^{-\text{forgetting}}$: constant by
            default; above 0.5 and at most 1 it converges, draws and minibatches or not.

    The count of steps is ``state.steps["E"]``. No optimizer is needed, and the guide's is not used.

    Raises:
        StepError: The guide is no `AutoMeanField`; a family that is no exponential family; elements of a discrete site
            that meet in one site.
        NonFiniteError: The log density of a draw is not finite.

    After an error the guide is as before.

    Source: Hoffman et al. 2013, "Stochastic variational inference", section 2; Khan and Lin 2017,
        "Conjugate-computation variational inference". Differs: the derivative of the means is that of the draws, as in
        Salimans and Knowles 2013, "Fixed-form variational posterior approximation through stochastic linear
        regression".

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_emvae import EM, guides, steps
        >>> def model(x):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> guide = guides.AutoMeanField(model, "gamma")
        >>> em = EM(model, guide, e_step=NaturalGradient(rate=1.0), m_step=steps.Fixed())
        >>> _ = em.step(torch.tensor([3.0, 4.0, 2.0]))
        >>> q = em.posterior(torch.tensor([3.0, 4.0, 2.0])).marginal("rate")
        >>> round(float(q.concentration), 3), round(float(q.rate), 3)
        (11.0, 4.0)
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), needs_guide=True, free_guide=True, stateful=True)

    def __init__(
        self,
        rate: float = 0.5,
        num_steps: int = 1,
        num_particles: int = 20,
        *,
        delay: float = 1.0,
        forgetting: float = 0.0,
    ) -> None:
        name = "steps.NaturalGradient"
        self.rate = number(name, "rate", rate, "above 0 and at most 1", lambda x: 0 < x <= 1, 0.5)
        self.num_steps = positive_int(name, "num_steps", num_steps)
        self.num_particles = positive_int(name, "num_particles", num_particles)
        self.delay = number(name, "delay", delay, "above 0", lambda x: x > 0, 1.0)
        self.forgetting = number(name, "forgetting", forgetting, "from 0 to 1", lambda x: 0 <= x <= 1, 0.7)
        self._known: dict[Callable, tuple[bool, int | None]] = {}

    def __repr__(self) -> str:
        return f"NaturalGradient(rate={self.rate:g}, num_steps={self.num_steps}, num_particles={self.num_particles})"

    def gain(self, t: int) -> float:
        r"""Return the rate of step t = 0, 1, ...

        Example:
            >>> NaturalGradient(rate=0.8, forgetting=1.0).gain(3)
            0.2
        """
        return self.rate * (1 + t / self.delay) ** -self.forgetting

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        from ..guides import AutoMeanField, NaturalSteps  # imported when asked for, as by users

        guide, count = problem.guide, int(state.steps.get("E", {}).get(COUNT, 0))
        if not isinstance(guide, AutoMeanField):
            fail(
                StepError,
                "steps.NaturalGradient",
                "move the guide",
                got=type(guide).__name__ if isinstance(guide, torch.nn.Module) else repr(guide)[:60],
                because="natural parameters are free parameters per site and row",
                fix="Write EM(model, guides.AutoMeanField(model), ...), or e_step=steps.Gradient() for this guide.",
            )
        steps = NaturalSteps(
            "steps.NaturalGradient", problem.model, guide, args, kwargs, self.num_particles, self._known
        )
        try:
            for t in range(count, count + self.num_steps):
                loss = steps.sweep(self.gain(t))
        except BaseException:
            steps.restore()
            raise
        state = state.with_own("E", {COUNT: torch.tensor(count + self.num_steps)})
        return state, GuidePosterior(problem.model, guide, args, kwargs), Info(loss=loss)


register(
    "step",
    "natural_gradient",
    NaturalGradient,
    summary="natural gradients of a guide of free parameters",
    source="Hoffman et al. 2013; Khan & Lin 2017",
)
