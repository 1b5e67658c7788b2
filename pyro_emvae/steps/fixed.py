r"""The M-step of a model whose unknowns are all latent."""

from __future__ import annotations

from typing import Any, ClassVar

from .._registry import Traits
from ..engine import Engine, State
from ..posterior import Posterior
from .base import HalfStep, Info

__all__ = ["Fixed"]


class Fixed(HalfStep):
    r"""Theta stays as it is.

    $$\theta_{t+1}=\theta_t.$$

    When to use: variational Bayes, where all unknowns are latent and the model has no parameters, in minibatches for
    instance: ``EM(model, e_step=steps.MeanField(), m_step=steps.Fixed())``; or to let an E-step with a state of its own
    settle at a given theta. It is not registered: it maximises nothing.

    Source: none.

    Example:
        >>> Fixed().traits.slots
        ('M',)
    """

    traits: ClassVar[Traits] = Traits(slots=("M",), exact=True)

    def __repr__(self) -> str:
        return "Fixed()"

    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        return state, Info()
