r"""Reweighted wake-sleep, with a weight per datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar

import torch

from .._checks import EmvaeError, fail, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..loss import Evaluation, States
from ..particles import check_match, held, hold_batch
from ..posterior import Posterior, SamplesPosterior
from .base import HalfStep, Info
from .monte_carlo import MonteCarlo
from .samplers import Target, check_weights, per_unit
from .sleep import Dream, climb

__all__ = ["WakeSleep"]


class WakeSleep(HalfStep):
    r"""The E-step of reweighted wake-sleep: the guide climbs toward the weighted draws that it proposes.

    $$\phi\leftarrow\arg\text{raise}_\phi\;\;\lambda\,\frac NB\sum_n\sum_k\bar w_{kn}\log q_\phi(z_{kn}|x_n)
      +(1-\lambda)\,E_{p_\theta(x,z)}[\log q_\phi(z|x)],\qquad
      \bar w_{kn}\propto_k\frac{p_\theta(x_n,z_{kn})}{q_\phi(z_{kn}|x_n)},\ z_{kn}\sim q_\phi(\cdot|x_n),$$

    with draws and weights held. It lowers $\mathrm{KL}(p_\theta(z|x)\,\|\,q_\phi)$ on the data (wake) and on dreams
    (sleep). What it hands on are K fresh draws of the updated guide with their normalised weights, so that
    `steps.Gradient` after it climbs $\frac NB\sum_n\sum_k\bar w_{kn}\log p_\theta(x_n,z_{kn})$ (wake-theta): its
    gradient is that of the importance-weighted bound $\frac NB\sum_n\log\frac1K\sum_kw_{kn}$, whose estimate is
    ``-Info.loss``.

    Every datum has weights of its own, and a minibatch is scaled by N/B outside of them. (`ReweightedWakeSleep` of Pyro
    has one weight for the whole batch, whose effective number of draws falls to one as the batch grows.)

    When to use: discrete latents, without score-function noise; guides that should cover the posterior, for importance
    sampling. The wake gradient is biased at a finite K, toward that of the ELBO's draws, with bias of order 1/K.

    Args:
        num_particles: K, draws per datum.
        insomnia: $\lambda$ in [0, 1], the share of wake: 1 is wake-wake, 0 is `Sleep` with a weighted M-step.
        num_steps: Updates per E-step, each on new draws.
        simulate: As for `Sleep`; used if `insomnia` is below 1.
        optim: An optimizer of its own; by default that of `EM`.

    Units that have weights are the elements of the plates that all latents share, as in `MonteCarlo`; with a latent
    outside of them there is one. The model is run in evaluation mode; its parameters and buffers stay bit for bit.
    `infer`, that is `EM.posterior`, gives weighted draws of the guide at present.

    With ``backend="graph"`` this step itself is run eagerly.

    Raises:
        EmvaeError: An argument out of its range.
        StepError: As `MonteCarlo` and, with insomnia below 1, `Sleep`.
        NonFiniteError: A weight is not finite, or all of a datum's are zero.

    Source: Bornschein and Bengio 2015, "Reweighted wake-sleep", eq. 6 to 10; Le, Kosiorek, Siddharth, Teh and Wood
    2019, "Revisiting reweighted wake-sleep", for wake against sleep; `insomnia` is Pyro's name. Differs: theta's draws
    are fresh ones of the updated guide.

    Example:
        >>> WakeSleep(num_particles=5, insomnia=0.5)
        WakeSleep(num_particles=5, insomnia=0.5, num_steps=1)
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), needs_guide=True)

    def __init__(
        self,
        num_particles: int = 10,
        insomnia: float = 1.0,
        num_steps: int = 1,
        simulate: Callable | None = None,
        optim: Any = None,
    ) -> None:
        self.num_particles = positive_int("steps.WakeSleep", "num_particles", num_particles)
        self.num_steps = positive_int("steps.WakeSleep", "num_steps", num_steps)
        self.insomnia = _share(insomnia)
        self.importance = MonteCarlo("importance", num_particles)
        self.dream, self.optim = Dream(simulate, 1), optim

    def __repr__(self) -> str:
        return f"WakeSleep(num_particles={self.num_particles}, insomnia={self.insomnia:g}, num_steps={self.num_steps})"

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        target = self.importance.look(problem.model, args, kwargs, problem.guide)
        loss = Wake(target, self.num_particles, self.insomnia, self.dream)
        with hold_batch(target.batch):
            climbed = climb(problem, loss, self.num_steps, args, kwargs)
            state, posterior, info = self.importance.expect(problem, state, *args, **kwargs)
        return state, posterior, info._replace(gradients=climbed.gradients)

    def infer(
        self, model: Callable, args: tuple, kwargs: Mapping[str, Any], guide: Callable | None = None
    ) -> SamplesPosterior:
        return self.importance.infer(model, args, kwargs, guide)


class Wake:
    r"""The objective of `WakeSleep` on one batch, as a loss of the engine.

    Args:
        target: The posterior of the batch's latents, and its units.
        num_particles: K.
        insomnia: The share of wake.
        dream: The objective of sleep.
    """

    is_host = True

    def __init__(self, target: Target, num_particles: int, insomnia: float, dream: Dream) -> None:
        self.target = replace(target, model=held(target.model))
        self.num_particles, self.insomnia, self.dream = num_particles, insomnia, dream
        self.state: States = {}

    def evaluate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], state: Any = None
    ) -> Evaluation:
        objective, particles = 0.0, None
        if self.insomnia > 0:
            wake, particles = self._wake(guide)
            objective = self.insomnia * wake
        if self.insomnia < 1:
            asleep = self.dream.evaluate(model, guide, args, kwargs)
            objective = objective + (1 - self.insomnia) * asleep.objective
            particles = asleep.particles if particles is None else particles
        return Evaluation(objective, objective, particles, {})

    def _wake(self, guide: Callable) -> tuple[Any, Any]:
        target = self.target
        particles = target.draw(guide, self.num_particles, treat=lambda msg: "detach")
        check_match(particles)
        log_p, log_q = (per_unit(target, particles, side)[0] for side in ("model", "guide"))
        log_weights = (log_p - log_q).detach()
        check_weights(log_weights, particles)
        weights = torch.softmax(log_weights, 0)
        return target.scale * torch.where(weights > 0, weights * log_q, 0.0).sum(), particles


def _share(insomnia: Any) -> float:
    if isinstance(insomnia, bool) or not isinstance(insomnia, Real) or not 0 <= insomnia <= 1:
        fail(
            EmvaeError,
            "steps.WakeSleep",
            "use insomnia",
            got=repr(insomnia),
            because="insomnia is the share of wake in the guide's gradient, a number from 0 to 1",
            fix="Write insomnia=0.5.",
        )
    return float(insomnia)


register(
    "step",
    "wake_sleep",
    WakeSleep,
    summary="the guide fitted to its own draws, weighted per datum, and to dreams",
    source="Bornschein and Bengio 2015; Le et al. 2019",
)
