r"""The evidence by importance sampling with the guide as proposal."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._checks import NonFiniteError, fail
from .._registry import register
from .estimate import Estimate, PerDatum
from .layout import Request
from .moments import Moments
from .weights import Weights, collect, require_bound

__all__ = ["EvidenceMethod", "Importance"]


class EvidenceMethod(ABC):
    """A way to estimate or bound the log evidence. Add one with ``register("evidence", name, cls)``."""

    name: ClassVar[str]
    bounds: ClassVar[str]

    @abstractmethod
    def estimate(self, request: Request) -> Estimate:
        """Return the estimate, leaving generators, parameters, buffers and modes as they were."""


@dataclass(frozen=True)
class Importance(EvidenceMethod):
    r"""Importance sampling with the guide as proposal.

    $$\log\hat p(x)=\sum_n\frac NB\log\frac1K\sum_k w_{nk},\qquad w_{nk}=p(x_n,z_{nk})/q(z_{nk}),\ z_{nk}\sim q.$$

    Its expectation is a lower bound of log p(x) that grows with K; K = 1 is the ELBO.

    When to use: a guide that covers the posterior; see ``khat``. With weights per datum, which it takes where every
    latent site lies in a plate, it works for any number of data; one joint weight, for instance with a global latent,
    is hopeless beyond some tens of latent dimensions.

    Shape: weights (particles, *plates that all latent sites share). Cost: K model and guide runs, in chunks.

    Raises:
        EmvaeError: One joint weight would cover a minibatch; or the guide is a point mass at every latent.
        NonFiniteError: A log weight is NaN or +inf, or all weights of a datum are zero.

    Source: Rubin 1988; Burda et al. 2016, "Importance weighted autoencoders", for the bound. Differs: the scale of
    subsampled plates is applied after the logarithm, so that the expectation over minibatches stays below log p(x).

    Example:
        >>> from pyro_emvae.evidence import Importance, log_evidence
        >>> from pyro_emvae.problems import linear_gaussian
        >>> problem = linear_gaussian()
        >>> estimate = log_evidence(problem.model, problem.guide, *problem.args, method=Importance(), seed=0)
        >>> bool(abs(estimate.value - problem.log_evidence()) < 4 * estimate.standard_error)
        True
    """

    name: ClassVar[str] = "importance"
    bounds: ClassVar[str] = "lower"

    def estimate(self, request: Request) -> Estimate:
        return importance_estimate(request, collect(request))


def importance_estimate(request: Request, weights: Weights) -> Estimate:
    """Return the estimate of weights that have been collected."""
    require_bound(request, weights)
    by_datum, layout = weights.by_datum, weights.layout
    moments = weights.per_datum if by_datum else weights.joint
    _require_positive(request.obj, moments)
    scale, constant = (layout.scale, weights.constant) if by_datum else (1.0, 0.0)
    variance, tail = moments.log_mean_exp_variance, moments.tail_index()
    worst = None if tail is None else int(tail.khat.argmax())
    return Estimate(
        value=constant + scale * float(moments.log_mean_exp.sum()),
        standard_error=scale * math.sqrt(float(variance.sum())),
        kind="exact" if layout.shared is None else "lower",
        num_particles=weights.num_particles,
        ess=float(moments.ess.min()),
        khat=None if worst is None else float(tail.khat.flatten()[worst]),
        khat_se=None if worst is None else float(tail.khat_se.flatten()[worst]),
        bias=-0.5 * scale * float(variance.sum()),
        per_datum=per_datum(weights, moments.log_mean_exp, variance, moments.ess, tail.khat if tail else None),
        given=layout.given,
        note=weights.together,
    )


def per_datum(
    weights: Weights, value: Tensor, variance: Tensor, ess: Tensor | None = None, khat: Tensor | None = None
) -> PerDatum | None:
    """Return numbers per datum together with what their plates are, or None if the data share one weight."""
    if not weights.by_datum:
        return None
    layout = weights.layout
    plates = tuple(frame.name for frame in layout.shared)
    return PerDatum(plates, layout.scale, value, variance.sqrt(), ess, khat, weights.constant)


def _require_positive(obj: str, moments: Moments) -> None:
    bad = moments.shift.isneginf()
    if bool(bad.any()):
        where = f" of datum {tuple(bad.nonzero()[0].tolist())}" if moments.shape else ""
        fail(
            NonFiniteError,
            obj,
            "average the weights",
            got=f"{moments.count} weights{where} that are all zero",
            because="log p(x, z) was -inf at every draw",
            fix="Let the guide draw where the model has mass, or raise num_particles.",
        )


register(
    "evidence",
    "importance",
    Importance,
    aliases=("importance_sampling", "iwae"),
    summary="importance sampling with the guide as proposal, per datum where plates allow",
    source="Rubin 1988; Burda et al. 2016",
)
