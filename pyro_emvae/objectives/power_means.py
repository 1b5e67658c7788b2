r"""Objectives that are power means of the weights: IWAE, Renyi's, CUBO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import EmvaeError, fail, number, positive_int
from .._registry import Traits, register
from .base import Objective
from .multi_sample import MultiSample

__all__ = ["IWAE", "Chi2", "Renyi"]


class _PowerMean:
    r"""$h=\tfrac s\beta\log\tfrac1K\sum_ke^{\beta\ell_k}$, s its sign; the mean of $\ell$ for $\beta=0$.

    Its derivatives are $s\,v_k$ with $v=\mathrm{softmax}(\beta\ell)$, and $\partial_k^2h=s\,\beta\,v_k(1-v_k)$.
    """

    power: float
    sign: float
    num_local_particles: int | None

    def value(self, log_weight: Tensor) -> Tensor:
        if self.power == 0.0:
            return self.sign * log_weight.mean(0, keepdim=True)
        x = self.power * log_weight
        mean = _log_mean_exp(x) if abs(self.power) < 0.1 else x.logsumexp(0, keepdim=True) - math.log(len(x))
        return self.sign / self.power * mean

    def slopes(self, log_weight: Tensor) -> Tensor:
        return self.sign * (self.power * log_weight).softmax(0)

    def doubly(self, log_weight: Tensor) -> Tensor:
        v = (self.power * log_weight).softmax(0)
        return self.sign * ((1 - self.power) * v + self.power * v**2)

    def without(self, log_weight: Tensor, mean: str) -> Tensor:
        count = len(log_weight)
        others = (log_weight.sum(0, keepdim=True) - log_weight) / (count - 1)
        if self.power == 0.0:
            return self.sign * others
        total, size = _log_sum_of_others(self.power * log_weight), count - 1
        if mean == "geometric":
            total, size = torch.logaddexp(total, self.power * others), count
        return self.sign / self.power * (total - math.log(size))

    def __post_init__(self) -> None:
        if self.num_local_particles is not None:
            positive_int(type(self).__name__, "num_local_particles", self.num_local_particles)


def _log_mean_exp(x: Tensor) -> Tensor:
    """Return log mean exp over the first dim; to a relative precision also for small numbers."""
    top = x.detach().max(0, keepdim=True).values
    return top + (x - top).expm1().mean(0, keepdim=True).log1p()


def _log_sum_of_others(x: Tensor) -> Tensor:
    """Return log sum exp over all rows but each: by subtraction, but for the largest, where that would cancel."""
    top, place = x.max(0, keepdim=True)
    weight = (x - top).exp()
    rest = top + (weight.sum(0, keepdim=True) - weight).log()
    largest = torch.arange(len(x), device=x.device).reshape(-1, *(1,) * (x.dim() - 1)) == place
    return torch.where(largest, x.masked_fill(largest, -math.inf).logsumexp(0, keepdim=True), rest)


@dataclass(frozen=True)
class IWAE(_PowerMean, MultiSample):
    r"""The importance-weighted bound

    $$L_K=\sum_n c_n\,\log\tfrac1K\sum_k e^{\ell_{kn}}\le\log p(x),$$

    the ELBO for K = 1, which rises to log p(x) with K. See `MultiSample` for n and c.

    Args:
        num_local_particles: L: the mean over K/L groups of $L_L$, in which global latents have one draw per group.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8.

    Example:
        >>> IWAE().value(torch.tensor([0.0, 0.0]))
        tensor([0.])
    """

    num_local_particles: int | None = None
    name: ClassVar[str] = "iwae"
    bounds: ClassVar[str] = "lower"
    power: ClassVar[float] = 1.0


@dataclass(frozen=True)
class Renyi(_PowerMean, MultiSample):
    r"""The variational Renyi bound, of a finite number of particles,

    $$L_{\alpha,K}=\sum_nc_n\,\frac1{1-\alpha}\log\tfrac1K\sum_ke^{(1-\alpha)\ell_{kn}}.$$

    For $\alpha\ge0$ a lower bound of log p(x): `IWAE` for 0, the ELBO for 1 (the limit), and tighter the smaller alpha
    is. For $\alpha<0$ it is neither, and above log p(x) in the limit (see `Chi2`).

    Args:
        alpha: The order.
        num_local_particles: See `IWAE`.

    The gradient is that of this very objective, at the K at hand: with sites that are not reparameterised

    $$\nabla_\phi E[h]=E\Big[\sum_k(h-v_k)\nabla_\phi\log q_\phi(z_k)\Big],\qquad v=\mathrm{softmax}((1-\alpha)\ell).$$

    Source: Li and Turner 2016, "Renyi divergence variational inference". Differs from Pyro's
    `RenyiELBO`: its surrogate, $\alpha/(1-\alpha)\log q$, has the gradient of infinitely many particles at sites that
    are not reparameterised, and none at all for $\alpha=0$; its scale N/B is inside the logarithm.

    Example:
        >>> Renyi(0.5).bounds
        'lower'
    """

    alpha: float
    num_local_particles: int | None = None
    name: ClassVar[str] = "renyi"

    def __post_init__(self) -> None:
        number("Renyi", "alpha", self.alpha, "that is finite", math.isfinite, 0.5)
        super().__post_init__()

    @property
    def bounds(self) -> str:  # type: ignore[override]
        return "lower" if self.alpha >= 0 else "neither"

    @property
    def power(self) -> float:  # type: ignore[override]
        return 1.0 - self.alpha


@dataclass(frozen=True)
class Chi2(_PowerMean, MultiSample):
    r"""The chi-square upper bound, which is *minimised* over the guide: the objective is minus it,

    $$-\mathrm{CUBO}_K=-\sum_nc_n\,\tfrac12\log\tfrac1K\sum_ke^{2\ell_{kn}}.$$

    In the limit of K it is $\log p(x)+\tfrac12\log(1+\chi^2(p(z|x)\|q))$, an upper bound of log p(x). For a finite K
    its mean lies below that (for K = 1 it is the ELBO), and may lie below log p(x): ``bounds`` says so. Guides then
    cover the posterior, for importance sampling; with small K and a poor guide the mean is no measure of the fit.

    To minimise an upper bound of log p(x) over theta would lower the evidence. So theta, whatever log p depends on
    directly, climbs the importance-weighted bound of the same draws, with weights $\mathrm{softmax}(\ell)$, as that of
    `IWAE` does. Parameters that guide and model share get both.

    Args:
        num_local_particles: See `IWAE`; local latents only, since a global one has no such bound.

    Raises:
        EmvaeError: A global latent, with ``num_local_particles``.

    Source: Dieng, Tran, Ranganath, Paisley and Blei 2017, "Variational inference via chi upper bound minimization".
    Differs: the logarithm is kept (theirs is the gradient of its exponential), weights are per datum, theta.

    Example:
        >>> Chi2().bounds
        'upper in the limit'
    """

    num_local_particles: int | None = None
    name: ClassVar[str] = "chi2"
    bounds: ClassVar[str] = "upper in the limit"
    power: ClassVar[float] = 2.0
    sign: ClassVar[float] = -1.0
    splits_paths: ClassVar[bool] = True

    def model_slopes(self, log_weight: Tensor) -> Tensor:
        return log_weight.softmax(0)

    def is_above(self, frames) -> bool:
        if super().is_above(frames):
            fail(
                EmvaeError,
                "Chi2",
                "draw a global latent",
                got=f"num_local_particles={self.num_local_particles} and a latent outside every plate",
                because="an upper bound given the global latent bounds nothing once averaged over its draws",
                fix="Write objective=IWAE(num_local_particles=...), or give whole data to Chi2().",
            )
        return False


def _add(name: str, factory: type[Objective], summary: str, source: str, **options) -> None:
    register("objective", name, factory, summary=summary, source=source, **options)


_add("iwae", IWAE, "importance-weighted bound, weights per datum", "Burda et al. 2016, eq. 8")
_add(
    "renyi",
    Renyi,
    "variational Renyi bound of order alpha",
    "Li & Turner 2016",
    traits=Traits(arguments=("alpha",)),
)
_add("chi2", Chi2, "minus the chi-square upper bound", "Dieng et al. 2017", aliases=("cubo",))
