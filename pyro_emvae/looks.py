r"""The objective before, between and after the phases of an iteration, on common random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .engine import Engine
from .history import Record
from .loss import MonteCarloELBO
from .particles import quiet
from .posterior import GuidePosterior, Posterior, PosteriorGuide

__all__ = ["FullHistory", "Look"]


class Look:
    r"""The loss of a posterior at the present parameters, on common random numbers; changes nothing.

    Of draws without a log density it is minus Q: what an M-step gains is known then, what an E-step gains is not.
    """

    def __init__(self, engine: Engine, num_particles: int = 100) -> None:
        self.engine, self.num_particles = engine, num_particles
        self.last = math.nan

    def before(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """Return the loss before E: of the guide as it stands, or what the last iteration left."""
        if isinstance(self.engine.guide, PosteriorGuide):
            return self.last
        return self(GuidePosterior(self.engine.model, self.engine.guide, args, kwargs))

    def __call__(self, posterior: Posterior) -> float:
        with quiet(seed=0), torch.no_grad():
            if isinstance(posterior, GuidePosterior):
                loss = self.engine.loss if hasattr(self.engine.loss, "loss") else MonteCarloELBO()
                self.last = float(loss.loss(self.engine.model, self.engine.guide, *posterior.args, **posterior.kwargs))
                return self.last
            value, unknown = -float(posterior.expected_log_joint(self.num_particles)), math.isnan(posterior.entropy)
        self.last = math.nan if unknown else value - posterior.entropy
        return value if unknown else self.last


class FullHistory:
    """Iterations with the objective before and after each phase."""

    def __init__(self, engine: Engine, iterate: Callable[..., Record]) -> None:
        self.iterate, self.look = iterate, Look(engine)

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> Record:
        return self.iterate(args, kwargs, look=self.look)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss that the last iteration left."""
        return {"last": self.look.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the loss that the last iteration of a run that was cut left."""
        self.look.last = state["last"]
