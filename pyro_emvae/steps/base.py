r"""The contract of a half-step of EM."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._checks import StepError, fail
from .._registry import Traits
from ..engine import Engine, Gradient, State
from ..posterior import Posterior

__all__ = ["HalfStep", "Info"]

SUMMARIES = {"ess": ("min", "median"), "acceptance": ("min", "mean"), "khat": ("median", "max")}


class Info(NamedTuple):
    """What a half-step did: the gradient steps that it took, in order (empty for an exact step).

    ``loss`` is minus the objective after E and before M (nats), from a step that knows it without a gradient, as an
    exact E-step does; from one that weighs draws, its estimate. ``kind`` is what the objective is (`history.KINDS`):
    of draws without log q it is ``"Q"``, the mean of log p alone. Diagnostics of drawn posteriors, per datum: ``ess``,
    the effective number of draws, ``acceptance``, the chains' mean acceptance probability, and ``khat``, the tail index
    of importance weights; and ``num_particles``, the draws per datum.
    """

    gradients: tuple[Gradient, ...] = ()
    loss: float = float("nan")
    ess: Tensor | float = float("nan")
    acceptance: Tensor | float = float("nan")
    khat: Tensor | float = float("nan")
    kind: str = "elbo"
    num_particles: float = float("nan")

    @property
    def first_loss(self) -> float:
        """The loss (nats) before the half-step, from its first draws; NaN if it was not computed."""
        return self.gradients[0].loss if self.gradients else float("nan")

    @property
    def facts(self) -> dict[str, float]:
        """The diagnostics, summarised over the data: what is good by its least, what is bad by its largest value."""
        found = {"num_particles": float(self.num_particles)}
        for name, summaries in SUMMARIES.items():
            values = torch.as_tensor(getattr(self, name), dtype=torch.float64).flatten()
            found |= {f"{name}_{summary}": float(getattr(values, summary)()) for summary in summaries}
        return {name: value for name, value in found.items() if not math.isnan(value)}


class HalfStep(ABC):
    r"""One half of an EM iteration.

    An E-step implements `expect`, an M-step `maximise`; one that fits either slot implements both. It may change the
    block of its slot only, parameters *and* buffers, and does so in place. ``problem`` is the engine: its ``model``,
    ``guide``, ``parameters`` (blocks) and ``step`` (one gradient update). Tensors of its own are
    ``state.steps["E"]`` or ``state.steps["M"]``, and it returns new ones by ``state.with_own``.
    """

    traits: ClassVar[Traits]

    def init(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the step's own state before the first iteration: a dict of tensors."""
        return {}

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        r"""E: bring q closer to the posterior at the present theta, and hand it on."""
        self._refuse("E")

    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        r"""M: raise the objective over theta with the posterior held."""
        self._refuse("M")

    def infer(
        self, model: Callable, args: tuple, kwargs: Mapping[str, Any], guide: Callable | None = None
    ) -> Posterior | None:
        """Return an E-step's posterior on given data at the present theta, changing nothing.

        None: the posterior is the guide's. A step whose trait ``needs_guide`` is true is given the guide.
        """
        return None

    def propose(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Posterior | None:
        """Return what the guide of an EM without one draws from, on given data: by default what `infer` returns."""
        return self.infer(model, args, kwargs)

    def _refuse(self, slot: str) -> None:
        fail(
            StepError,
            type(self).__name__,
            f"be the {slot}-step",
            got=f"a step for slots {self.traits.slots}",
            because=f"it has no {'expect' if slot == 'E' else 'maximise'}",
            fix="Give it as the other step, or use steps.Gradient().",
        )
