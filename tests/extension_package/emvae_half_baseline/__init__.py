r"""A gradient estimator that lives outside `pyro_emvae`; importing this package registers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pyro_emvae import Traits, register
from pyro_emvae.estimators import Estimator, SiteTerms

__all__ = ["HalfBaseline"]


@dataclass(frozen=True)
class HalfBaseline(Estimator):
    r"""Score-function gradient with a fixed number as its baseline, for Bernoulli sites.

    $$\hat g=\tfrac1K\sum_k (f_k-c)\,\nabla_\phi\log q_\phi(z_k).$$

    Args:
        constant: c, in nats.

    Example:
        >>> HalfBaseline(constant=-1.0)
        HalfBaseline(constant=-1.0)
    """

    constant: float = -0.5
    traits: ClassVar[Traits] = Traits(support="binary", auto=25)

    def surrogate(self, site: SiteTerms, signal: Tensor, rows: int, state: dict) -> dict[str, Tensor]:
        term = (signal - self.constant) * site.log_q
        return {"value": term, "guide": term}


register("estimator", "half_baseline", HalfBaseline, summary="score function minus a fixed number", source="")
