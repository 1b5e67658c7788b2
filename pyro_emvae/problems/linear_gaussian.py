r"""Probabilistic PCA with an amortized guide: diagonal, and one that contains the posterior."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace as Params
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import lower_cholesky, positive
from torch.nn.functional import linear

from ._math import expected_normal, kl
from ._problem import Initial, Maker, Problem, ProblemTraits, data_plate, problem

__all__ = ["linear_gaussian", "linear_gaussian_full"]


def linear_gaussian(
    *, subsample_size: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Problem:
    r"""Probabilistic PCA: $z_n\sim N(0,I_2)$, $x_n\sim N(Wz_n+b,\sigma^2I_3)$, twelve data.

    The guide is amortized and diagonal, $N(Ax_n+c,\mathrm{diag}(s^2))$, so the ELBO stays below the evidence.

    Args:
        subsample_size: Draw a minibatch of this size inside model and guide.
        seed: Of the data.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Source: Tipping and Bishop 1999, eqs. 4, 7 and 8 (evidence; weights and noise of maximum likelihood).

    Example:
        >>> from pyro_emvae.problems import linear_gaussian
        >>> problem = linear_gaussian()
        >>> bool(problem.log_evidence(problem.maximum()) > problem.log_evidence() > problem.elbo())
        True
    """

    def family(initial: Initial, loc: Tensor) -> Any:
        return dist.Normal(loc, initial("scale")).to_event(1)

    scale = {"scale": ([0.5, 0.8], positive)}
    make = Maker(seed, dtype, device)
    return _build("linear_gaussian", make, scale, family, lambda p: torch.diag(p.scale), subsample_size)


def linear_gaussian_full(
    *, subsample_size: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Problem:
    r"""`linear_gaussian` with the guide $N(Ax_n+c,LL^\top)$, which contains the posterior. Args as there.

    Example:
        >>> from pyro_emvae.problems import linear_gaussian_full
        >>> problem = linear_gaussian_full()
        >>> abs(float(problem.elbo(problem.exact_guide()) - problem.log_evidence())) < 1e-10
        True
    """

    def family(initial: Initial, loc: Tensor) -> Any:
        return dist.MultivariateNormal(loc, scale_tril=initial("scale_tril"))

    scale = {"scale_tril": ([[0.5, 0.0], [-0.2, 0.8]], lower_cholesky)}
    make = Maker(seed, dtype, device)
    return _build("linear_gaussian_full", make, scale, family, lambda p: p.scale_tril, subsample_size)


def _build(
    name: str,
    make: Maker,
    scale: dict[str, Any],
    family: Callable[[Initial, Tensor], Any],
    scale_tril: Callable[[Params], Tensor],
    subsample_size: int | None,
) -> Problem:
    true_weight = torch.tensor([[1.4, -0.5], [0.3, 1.1], [-0.9, 0.6]], dtype=torch.float64)
    offset = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = make(make.noise(12, 2) @ true_weight.T + offset + 0.6 * make.noise(12, 3))
    zero, one = make([0.0, 0.0]), make([1.0, 1.0])
    initial = make.initial(
        theta={"weight": [[0.9, 0.2], [-0.4, 0.7], [0.5, -0.6]], "bias": [0.1, -0.3, 1.2], "sigma": (0.9, positive)},
        phi={"encoder_weight": [[0.3, -0.2, 0.1], [0.05, 0.4, -0.3]], "encoder_bias": [0.2, -0.4], **scale},
    )

    def model(x: Tensor) -> None:
        weight, bias, sigma = initial("weight"), initial("bias"), initial("sigma")
        with data_plate(x, subsample_size):
            z = pyro.sample("z", dist.Normal(zero, one).to_event(1))
            x = pyro.subsample(x, event_dim=1)
            pyro.sample("x", dist.Normal(linear(z, weight, bias), sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        weight, bias = initial("encoder_weight"), initial("encoder_bias")
        with data_plate(x, subsample_size):
            x = pyro.subsample(x, event_dim=1)
            pyro.sample("z", family(initial, linear(x, weight, bias)))

    def log_evidence(p: Params) -> Tensor:
        covariance = p.weight @ p.weight.T + p.sigma**2 * torch.eye(3).to(x)
        return dist.MultivariateNormal(p.bias, covariance).log_prob(x).sum()

    def elbo(p: Params) -> Tensor:
        tril = scale_tril(p)
        loc = linear(x, p.encoder_weight, p.encoder_bias)
        variance = (p.weight @ tril).square().sum(-1)
        likelihood = expected_normal(x - linear(loc, p.weight, p.bias), variance, p.sigma).sum()
        prior = dist.MultivariateNormal(zero, scale_tril=torch.diag(one))
        return likelihood - kl(dist.MultivariateNormal(loc, scale_tril=tril), prior)

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        covariance = _posterior_covariance(p)
        mean = (x - p.bias) @ p.weight @ covariance / p.sigma**2
        return {"z": dist.MultivariateNormal(mean, covariance)}

    def exact_guide(p: Params) -> dict[str, Tensor]:
        covariance = _posterior_covariance(p)
        weight = covariance @ p.weight.T / p.sigma**2
        tril = torch.linalg.cholesky(covariance)
        return {"encoder_weight": weight, "encoder_bias": -weight @ p.bias, "scale_tril": tril}

    def maximum() -> dict[str, Tensor]:
        values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
        weight = vectors[:, 1:] * (values[1:] - values[0]).sqrt()
        return {"weight": weight, "bias": x.mean(0), "sigma": values[0].sqrt()}

    exact = {"exact_guide": exact_guide} if "scale_tril" in scale else {}
    traits = ProblemTraits(
        local=True, subsampled=subsample_size is not None, exact_posterior_in_family="scale_tril" in scale
    )
    return problem(
        name,
        model,
        guide,
        (x,),
        ("z",),
        initial,
        traits,
        log_evidence=log_evidence,
        elbo=elbo,
        posterior=posterior,
        maximum=maximum,
        **exact,
    )


def _posterior_covariance(p: Params) -> Tensor:
    precision = p.weight.T @ p.weight / p.sigma**2
    return torch.linalg.inv(precision + torch.eye(2).to(precision))
