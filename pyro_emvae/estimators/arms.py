r"""Bernoulli sites whose particles are drawn together so that they disagree: `Arms`, and pairs, `Disarm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._registry import Traits, register
from .base import Draw, Estimator, SiteTerms, Situation, State
from .bernoulli import by_element, dirichlet, disagreement, element_logits, lift, logits_of, subset_log_prob, summed

__all__ = ["Arms", "Disarm", "in_pairs", "odd"]


@dataclass(frozen=True)
class Arms(Estimator):
    r"""Score function over K Bernoulli draws that repel each other (ARMS, by a Dirichlet copula).

    $$\hat g=\tfrac1{K-1}\sum_k (f_k-\bar f)\,\frac{\nabla_\phi\log q(b_k)}{1-\rho},\qquad
      1-\rho=\frac{P(b_1=1,b_2=0)}{p(1-p)},$$

    element by element, with $\rho\le0$ the correlation of two draws. With $m=\min(p,1-p)$,
    $P(b_1=1,b_2=0)=m-(2m^{1/(K-1)}-1)_+^{K-1}$.

    When to use: Bernoulli sites with any number of particles from two on; measured never worse than `LeaveOneOut` or
    `Disarm` at the same number of model evaluations. Unbiased. Cost: K model and guide runs, one backward.

    The elements of an event or a plate are independent of each other; several sites may be coupled.

    Raises:
        EstimatorError: If fewer than two particles are given, the site is not Bernoulli, its logits depend on another
            draw (particles then have different distributions), or particles are run one by one.

    Source: Dimitriev and Zhou 2021, "ARMS: antithetic-REINFORCE-multi-sample gradient for binary variables", eq. 8
    and the Dirichlet copula of section 4. Differs: the copula is applied to the rarer outcome, so that both ends of
    p are alike, and in logarithms.

    Example:
        >>> Arms().traits.draws, Arms().traits.min_particles
        ('coupled', 2)
    """

    traits: ClassVar[Traits] = Traits(support="binary", draws="coupled", min_particles=2)

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        return Draw(dirichlet(logits_of(fn).detach()))

    def joint(self, fn: Any, value: Tensor) -> Tensor | None:
        return summed(subset_log_prob(logits_of(fn).detach(), value), fn)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        logits = element_logits(site)
        factor = disagreement(logits.detach(), rows) * (rows / (rows - 1))
        term = lift(signal - signal.mean(0, keepdim=True), site.fn) * factor * by_element(site, logits)
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class Disarm(Estimator):
    r"""Score function over antithetic pairs of Bernoulli draws (DisARM, also called U2G).

    $$\hat g=\tfrac12\big(f(b)-f(\tilde b)\big)(-1)^{\tilde b}\,1[b\ne\tilde b]\,\sigma(|\varphi|)$$

    by the logit $\varphi$ of each element, with $b=1[u<p]$, $\tilde b=1[1-u<p]$, averaged over K/2 pairs of particles
    (k, k + K/2).

    When to use: Bernoulli sites with two particles. From four on `Arms`, which uses all of them as one group, has the
    smaller variance, and `LeaveOneOut` too. Unbiased; zero variance for one element with p = 1/2. Cost: K model and
    guide runs, one backward.

    Raises:
        EstimatorError: If the number of particles is odd, and as `Arms`.

    Source: Dong, Mnih and Tucker 2020, "DisARM: an antithetic gradient estimator for binary latent variables", eq. 5;
    Yin et al. 2020 (U2G).

    Example:
        >>> Disarm().traits.support
        'binary'
    """

    traits: ClassVar[Traits] = Traits(support="binary", draws="coupled", min_particles=2)

    def fits(self, at: Situation) -> str | None:
        return odd(at)

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        probability = logits_of(fn).detach().sigmoid()
        u = torch.rand_like(in_pairs(probability)[0])
        return Draw(torch.cat([u, 1 - u]).lt(probability).to(probability.dtype))

    def joint(self, fn: Any, value: Tensor) -> Tensor | None:
        logits, pairs = logits_of(fn).detach(), in_pairs(value)
        parts = [subset_log_prob(logits[:2], pairs[:, i]) for i in range(pairs.shape[1])]
        return summed(torch.stack(parts).sum(0), fn)

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        logits = element_logits(site)
        pairs = in_pairs(signal)
        centred = 2 * (pairs - pairs.mean(0, keepdim=True)).reshape(signal.shape)
        term = lift(centred, site.fn) * disagreement(logits.detach(), 2) * by_element(site, logits)
        return {"value": term, "guide": term}


def odd(at: Situation) -> str | None:
    """Return what stands against pairs of particles, as a clause, or None."""
    return "its particles come in pairs, and their number is odd" if at.num_particles % 2 else None


def in_pairs(rows: Tensor) -> Tensor:
    """Return rows ``(K, ...)`` as ``(2, K/2, ...)``: row k beside row k + K/2."""
    return rows.reshape(2, len(rows) // 2, *rows.shape[1:])


register(
    "estimator",
    "arms",
    Arms,
    summary="Bernoulli draws that repel each other by a Dirichlet copula",
    source="Dimitriev & Zhou 2021",
)
register(
    "estimator",
    "disarm",
    Disarm,
    aliases=("u2g",),
    summary="antithetic pairs of Bernoulli draws",
    source="Dong et al. 2020, eq. 5",
)
