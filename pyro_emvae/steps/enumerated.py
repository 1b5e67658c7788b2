r"""The exact E-step of discrete latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .._checks import NonFiniteError, fail
from .._registry import Traits, register
from ..engine import Engine, State
from ..particles import keep_buffers, quiet
from ..posterior import EnumeratedPosterior, Posterior, plate_nesting
from .base import HalfStep, Info

__all__ = ["Enumerated"]


class Enumerated(HalfStep):
    r"""The exact posterior of all discrete latents, $q(z)=p_\theta(z|x)$: the E-step of textbook EM.

    Every latent is summed out by Pyro's enumeration, so the ELBO after it is $\log p_\theta(x)$. On a chain
    (`pyro.markov`) that is the forward-backward algorithm, at a cost linear in its length.

    When to use: mixtures, hidden Markov models, any model whose latents are discrete. No guide is needed.

    Args:
        max_plate_nesting: Number of plate dims of the model; found by a run if None.

    Raises:
        StepError: A latent is continuous, or there is none.

    Source: Dempster, Laird and Rubin 1977; Baum et al. 1970 for chains.

    Example:
        >>> Enumerated()
        Enumerated()
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), latents="discrete", exact=True)

    def __init__(self, max_plate_nesting: int | None = None) -> None:
        self.max_plate_nesting = max_plate_nesting
        self._nesting: dict[Callable, int] = {}

    def __repr__(self) -> str:
        return "Enumerated()" if self.max_plate_nesting is None else f"Enumerated({self.max_plate_nesting})"

    def infer(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior:
        with quiet():
            return self._infer(model, args, kwargs)

    def _infer(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> EnumeratedPosterior:
        nesting = self.max_plate_nesting
        if nesting is None and model not in self._nesting:
            self._nesting = {model: plate_nesting(model, args, kwargs)}
        nesting = self._nesting[model] if nesting is None else nesting
        return EnumeratedPosterior(model, args, kwargs, nesting)

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        with keep_buffers():
            posterior = self._infer(problem.model, args, kwargs)
        if not math.isfinite(posterior.log_evidence):
            fail(
                NonFiniteError,
                "Enumerated",
                "go on with this posterior",
                got=f"log p(x) = {posterior.log_evidence}",
                because="no outcome of the latents gives the data a density, or one that is a number",
                fix="Leave missing values out by poutine.mask, with any number in their place; check supports.",
            )
        return state, posterior, Info(loss=-posterior.log_evidence)


register(
    "step",
    "enumerated",
    Enumerated,
    summary="exact posterior of discrete latents",
    source="Dempster, Laird and Rubin 1977; Baum et al. 1970",
)
