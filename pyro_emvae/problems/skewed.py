r"""A positive latent with a skewed posterior: Gamma prior, Poisson counts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace as Params
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import positive

from ._problem import Maker, Problem, ProblemTraits, data_plate, problem

__all__ = ["skewed", "skewed_gamma"]


def skewed(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""$\lambda\sim\Gamma(1.5,\theta)$, $x_n\sim\mathrm{Poisson}(\lambda)$, guide $\mathrm{LogNormal}(m,s)$.

    The counts are 2, 0 and 1. The posterior, $\Gamma(4.5,\theta+3)$ with skewness 0.94, is not in the guide's family.

    Args:
        seed: Accepted as by all problems; there is nothing random here.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Example:
        >>> from pyro_emvae.problems import skewed
        >>> problem = skewed()
        >>> rate = problem.posterior()["rate"]
        >>> bool(problem.elbo() < problem.log_evidence()), round(float(2 / rate.concentration.sqrt()), 2)
        (True, 0.94)
    """
    return _build(
        "skewed",
        Maker(seed, dtype, device),
        {"loc": 0.5, "scale": (0.4, positive)},
        lambda p: dist.LogNormal(p("loc"), p("scale")),
        lambda p: ((p("loc") + 0.5 * p("scale") ** 2).exp(), p("loc")),
    )


def skewed_gamma(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""`skewed` with a Gamma guide, which contains the posterior and is reparameterised implicitly. Args as there.

    Example:
        >>> from pyro_emvae.problems import skewed_gamma
        >>> problem = skewed_gamma()
        >>> abs(float(problem.elbo(problem.exact_guide()) - problem.log_evidence())) < 1e-12
        True
    """
    return _build(
        "skewed_gamma",
        Maker(seed, dtype, device),
        {"concentration": (2.5, positive), "rate_param": (1.7, positive)},
        lambda p: dist.Gamma(p("concentration"), p("rate_param")),
        lambda p: (p("concentration") / p("rate_param"), p("concentration").digamma() - p("rate_param").log()),
    )


def _build(
    name: str,
    make: Maker,
    phi: dict[str, Any],
    family: Callable[[Callable[[str], Tensor]], Any],
    moments: Callable[[Callable[[str], Tensor]], tuple[Tensor, Tensor]],
) -> Problem:
    """Build either variant; `family` and `moments` (of the rate and its logarithm) read parameters by name."""
    shape = make(1.5)
    counts = make([2.0, 0.0, 1.0])
    initial = make.initial(theta={"prior_rate": (0.8, positive)}, phi=phi)

    def model(counts: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(shape, initial("prior_rate")))
        with data_plate(counts):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    def guide(counts: Tensor) -> None:
        pyro.sample("rate", family(initial))

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        return {"rate": dist.Gamma(shape + counts.sum(), p.prior_rate + len(counts))}

    def log_evidence(p: Params) -> Tensor:
        rate = posterior(p)["rate"]
        prior = shape * p.prior_rate.log() - shape.lgamma()
        return prior - rate.concentration * rate.rate.log() + rate.concentration.lgamma() - (counts + 1).lgamma().sum()

    def elbo(p: Params) -> Tensor:
        read = vars(p).__getitem__
        mean, log_mean = moments(read)
        prior = shape * p.prior_rate.log() - shape.lgamma() + (shape - 1) * log_mean - p.prior_rate * mean
        likelihood = counts.sum() * log_mean - len(counts) * mean - (counts + 1).lgamma().sum()
        return prior + likelihood + family(read).entropy()

    def exact_guide(p: Params) -> dict[str, Tensor]:
        rate = posterior(p)["rate"]
        return {"concentration": rate.concentration, "rate_param": rate.rate}

    in_family = "concentration" in phi
    return problem(
        name,
        model,
        guide,
        (counts,),
        ("rate",),
        initial,
        ProblemTraits(exact_posterior_in_family=in_family),
        log_evidence=log_evidence,
        elbo=elbo,
        posterior=posterior,
        maximum=lambda: {"prior_rate": shape * len(counts) / counts.sum()},
        **({"exact_guide": exact_guide} if in_family else {}),
    )
