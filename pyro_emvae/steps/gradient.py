r"""A half-step of gradient updates, for either slot."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from .._checks import positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..parameters import GUIDE, MODEL
from ..posterior import GuidePosterior, Posterior
from .base import HalfStep, Info

__all__ = ["Gradient"]


class Gradient(HalfStep):
    r"""A fixed number of gradient updates of one block.

    As the E-step it raises $L(\phi,\theta)$ over phi, each update on fresh draws; as the M-step over theta, on draws
    from the q of the E-step. Only the block's parameters, optimizer and buffers change.

    Args:
        num_steps: Updates per half-step.
        optim: An optimizer of its own; by default that of `EM`.
        loss: A loss of its own, such as a `MonteCarloELBO` with more particles; by default that of `EM`.
        num_particles: As the M-step after an E-step that is no guide: draws of its posterior, where it has to draw.

    After such an E-step, theta climbs $E[\log p_\theta(x,z)]$ with the posterior held.

    Example:
        >>> Gradient(num_steps=5)
        Gradient(num_steps=5)
    """

    traits: ClassVar[Traits] = Traits(slots=("E", "M"))

    def __init__(self, num_steps: int = 1, optim: Any = None, loss: Any = None, num_particles: int = 100) -> None:
        self.num_steps = positive_int("steps.Gradient", "num_steps", num_steps)
        self.num_particles = positive_int("steps.Gradient", "num_particles", num_particles)
        self.optim, self.loss = optim, loss

    def __repr__(self) -> str:
        own = "".join(f", {k}={v!r}" for k, v in (("optim", self.optim), ("loss", self.loss)) if v is not None)
        return f"Gradient(num_steps={self.num_steps}{own})"

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        info = self._climb(problem, GUIDE, args, kwargs, self.loss)
        return state, GuidePosterior(problem.model, problem.guide, args, kwargs), info

    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        loss = self.loss if isinstance(posterior, GuidePosterior) else _Expected(posterior, self.num_particles)
        return state, self._climb(problem, MODEL, args, kwargs, loss)

    def _climb(self, problem: Engine, block: str, args: tuple, kwargs: dict, loss: Any) -> Info:
        steps = [problem.step(block, args, kwargs, loss=loss) for _ in range(self.num_steps)]
        return Info(tuple(step for step in steps if step is not None))


class _Expected:
    r"""The loss of an M-step with the posterior held: $-E[\log p_\theta(x,z)]-H(q)$, or without H if it is unknown."""

    is_host = True
    holds_posterior = True

    def __init__(self, posterior: Posterior, num_particles: int) -> None:
        self.posterior, self.num_particles = posterior, num_particles

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = -self.posterior.expected_log_joint(self.num_particles)
        loss.backward()
        entropy = self.posterior.entropy
        return float(loss.detach()) - (0.0 if math.isnan(entropy) else entropy)


register(
    "step",
    "gradient",
    Gradient,
    summary="a fixed number of gradient updates of one block",
    source="Neal & Hinton 1998 (incremental EM); Kingma & Welling 2013",
)
