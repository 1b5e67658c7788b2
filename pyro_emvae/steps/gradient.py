r"""A half-step of gradient updates, for either slot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from .._checks import StepError, fail, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..history import kind_of
from ..parameters import GUIDE, MODEL
from ..posterior import GuidePosterior, Posterior
from .base import HalfStep, Info
from .until import Criterion, batches, check_source, check_until, improves

__all__ = ["Gradient"]


class Gradient(HalfStep):
    r"""Gradient updates of one block: a fixed number, or as many as an inner loop takes.

    As the E-step it raises $L(\phi,\theta)$ over phi, each update on fresh draws; as the M-step over theta, on draws
    from the q of the E-step. Only the block's parameters, optimizer and buffers change.

    Args:
        num_steps: Updates per half-step.
        optim: An optimizer of its own; by default that of `EM`.
        loss: A loss of its own, such as a `MonteCarloELBO` with more particles; by default that of `EM`.
        num_particles: As the M-step after an E-step that is no guide: draws of its posterior, where it has to draw.
        until: As the E-step, aggressive training: `steps.MutualInformation(x_valid)` or `steps.HeldOut(x_valid)`. Each
            E-step goes on until the mean objective of a window of updates is no better than that of the one before,
            until the criterion no longer rises; from then on it makes `num_steps` updates.
        batches: Fresh batches for the inner loop after its first update, which is on the E-step's own batch, as is the
            M-step: a list, from which each is drawn at random, or a shuffling loader of batches of one size, begun
            anew in each E-step. By default the own batch throughout, fresh each time where a plate subsamples.

    After an E-step that is no guide, theta climbs $E[\log p_\theta(x,z)]$ with the posterior held.

    The state of `until` (whether it is over, the best value, and counts) is ``state.steps["E"]``.

    Raises:
        EmvaeError: `until` is no criterion, `batches` without it, or numbers out of range.
        DataError: `batches` that come in the same order each time, or none.
        StepError: `until` in an M-step.

    Source: He, Spokoyny, Neubig and Berg-Kirkpatrick 2019, algorithm 1, for `until`.

    Example:
        >>> Gradient(num_steps=5)
        Gradient(num_steps=5)
    """

    traits: ClassVar[Traits] = Traits(slots=("E", "M"), needs_guide=True)

    def __init__(
        self,
        num_steps: int = 1,
        optim: Any = None,
        loss: Any = None,
        num_particles: int = 100,
        *,
        until: Criterion | None = None,
        batches: Iterable | None = None,
    ) -> None:
        self.num_steps = positive_int("steps.Gradient", "num_steps", num_steps)
        self.num_particles = positive_int("steps.Gradient", "num_particles", num_particles)
        self.optim, self.loss = optim, loss
        self.until, self.batches = check_until(until, batches), check_source(batches)

    def __repr__(self) -> str:
        given = (("optim", self.optim), ("loss", self.loss), ("until", self.until))
        own = "".join(f", {k}={v!r}" for k, v in given if v is not None)
        return f"Gradient(num_steps={self.num_steps}{own})"

    def init(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {} if self.until is None else self.until.init()

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        own = {} if self.until is None else state.steps.get("E") or self.until.init()
        if own and bool(own["aggressive"]):
            info = self._climb_until(problem, args, kwargs)
            state = state.with_own("E", self.until.after(own, problem.model, problem.guide))
        else:
            info = self._climb(problem, GUIDE, args, kwargs, self.loss)
        return state, GuidePosterior(problem.model, problem.guide, args, kwargs), info

    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        if self.until is not None:
            fail(
                StepError,
                "steps.Gradient",
                "be the M-step",
                got=f"until={self.until!r}",
                because="an inner loop lets the guide catch up with the model, not the model with the guide",
                fix="Give it as e_step=.",
            )
        loss = self.loss if isinstance(posterior, GuidePosterior) else _Expected(posterior, self.num_particles)
        return state, self._climb(problem, MODEL, args, kwargs, loss)

    def _climb(self, problem: Engine, block: str, args: tuple, kwargs: Mapping[str, Any], loss: Any) -> Info:
        steps = [problem.step(block, args, kwargs, loss=loss) for _ in range(self.num_steps)]
        return self._info(steps, problem, loss)

    def _info(self, steps: list, problem: Engine, loss: Any) -> Info:
        kind = kind_of(problem.loss if loss is None else loss)
        return Info(tuple(step for step in steps if step is not None), kind=kind)

    def _climb_until(self, problem: Engine, args: tuple, kwargs: Mapping[str, Any]) -> Info:
        """Update the guide until a window of updates is no better than the one before."""
        steps, data = [], batches(self.batches, args, kwargs)
        for _ in range(self.until.max_steps):
            steps.append(problem.step(GUIDE, *next(data), loss=self.loss))
            losses = [math.nan if step is None else step.loss for step in steps]
            if not improves(losses, self.until.window):
                break
        return self._info(steps, problem, self.loss)


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
    summary="gradient updates of one block: a fixed number, or an inner loop",
    source="Neal & Hinton 1998 (incremental EM); Kingma & Welling 2013; He et al. 2019",
)
