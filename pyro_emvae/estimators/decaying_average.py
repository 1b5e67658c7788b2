r"""The score-function gradient with a decaying average of past signals as its baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import EstimatorError, fail
from .._registry import Traits, register
from .base import SiteTerms, State
from .score import ScoreFunction

__all__ = ["DecayingAverage"]


@dataclass(frozen=True)
class DecayingAverage(ScoreFunction):
    r"""Score-function gradient with a decaying-average baseline.

    $$\hat g=\tfrac1K\sum_k (f_k-b_t)\,\nabla_\phi\log q_\phi(z_k),\qquad
      b_t=\frac{m_t}{w_t},\quad m_{t+1}=\beta m_t+(1-\beta)\bar f_t,\quad w_{t+1}=\beta w_t+(1-\beta).$$

    The baseline of a step holds only earlier steps, so it is independent of the step's draws and the gradient is
    unbiased (a baseline that includes the present step is not). $\bar f$ is the mean over particles and the site's
    plates. When to use: one particle and a site without ``rsample``. Cost: as `Score`.

    Args:
        beta: Decay, in [0, 1).

    Source: Mnih and Gregor 2014, section 2.3 (NVIL); Pyro's ``use_decaying_avg_baseline``. Differs: the average is
    corrected for its start at zero ($w_t$), and kept in the loss, one number per site.

    Example:
        >>> DecayingAverage(beta=0.95).beta
        0.95
    """

    beta: float = 0.9
    traits: ClassVar[Traits] = Traits(stateful=True, auto=30, objectives=("any",), higher_order=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 1.0:
            fail(
                EstimatorError,
                "DecayingAverage",
                "average past signals",
                got=f"beta={self.beta}",
                because="the decay lies in [0, 1)",
                fix="Write beta=0.9.",
            )

    def init(self, site: SiteTerms, signal: Tensor | None) -> State:
        return {"average": torch.zeros_like(signal.sum()), "weight": torch.zeros_like(signal.sum())}

    def advantage(self, site: SiteTerms, signal: Tensor, rows: int, state: State) -> Tensor:
        return signal - state["average"] / state["weight"].clamp(min=1.0 - self.beta)

    def update(self, site: SiteTerms, signal: Tensor | None, state: State) -> State:
        return {
            "average": self.beta * state["average"] + (1.0 - self.beta) * signal.mean(),
            "weight": self.beta * state["weight"] + (1.0 - self.beta),
        }


register(
    "estimator",
    "decaying_average",
    DecayingAverage,
    summary="score function minus an average of earlier signals",
    source="Mnih & Gregor 2014",
)
