r"""Normal means: the smallest problem, the same under minibatches, and one with masks in nested plates."""

from __future__ import annotations

from types import SimpleNamespace as Params

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import positive

from ._math import expected_normal, kl, log_evidence_of_shared_mean
from ._problem import Maker, Problem, ProblemTraits, data_plate, problem

__all__ = ["masked", "normal_normal", "subsampled"]


def normal_normal(
    *, subsample_size: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Problem:
    r"""The smallest problem: $z\sim N(\theta,1.5)$, $x_n\sim N(z,0.8)$, five data, guide $N(m,s)$.

    Args:
        subsample_size: Draw a minibatch of this size inside the model.
        seed: Of the data.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Example:
        >>> from pyro_emvae.problems import normal_normal
        >>> problem = normal_normal()
        >>> tight = problem.exact_guide()
        >>> abs(float(problem.elbo(tight) - problem.log_evidence())) < 1e-12
        True
    """
    make = Maker(seed, dtype, device)
    x = make(1.9 + 0.8 * make.noise(5))
    prior_scale, noise = make(1.5), make(0.8)
    initial = make.initial(theta={"prior_mean": -0.7}, phi={"loc": 0.4, "scale": (0.6, positive)})

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(initial("prior_mean"), prior_scale))
        with data_plate(x, subsample_size):
            pyro.sample("x", dist.Normal(z, noise), obs=pyro.subsample(x, event_dim=0))

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(initial("loc"), initial("scale")))

    def log_evidence(p: Params) -> Tensor:
        return log_evidence_of_shared_mean(x, p.prior_mean, noise**2, prior_scale**2)

    def elbo(p: Params) -> Tensor:
        likelihood = expected_normal(x - p.loc, p.scale**2, noise).sum()
        return likelihood - kl(dist.Normal(p.loc, p.scale), dist.Normal(p.prior_mean, prior_scale))

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        precision = prior_scale**-2 + len(x) * noise**-2
        mean = (p.prior_mean * prior_scale**-2 + x.sum() * noise**-2) / precision
        return {"z": dist.Normal(mean, precision.rsqrt())}

    def exact_guide(p: Params) -> dict[str, Tensor]:
        z = posterior(p)["z"]
        return {"loc": z.mean, "scale": z.stddev}

    name = "normal_normal" if subsample_size is None else "subsampled"
    traits = ProblemTraits(subsampled=subsample_size is not None, exact_posterior_in_family=True)
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
        exact_guide=exact_guide,
        maximum=lambda: {"prior_mean": x.mean()},
    )


def subsampled(
    *, subsample_size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Problem:
    """`normal_normal` with a plate of size 5 that draws two data: a global latent under minibatches.

    Example:
        >>> from pyro_emvae.problems import normal_normal, subsampled
        >>> bool(subsampled().elbo() == normal_normal().elbo()), subsampled().traits.subsampled
        (True, True)
    """
    return normal_normal(subsample_size=subsample_size, seed=seed, dtype=dtype, device=device)


def masked(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""Three series of unequal length with missing values: $z_{ts}\sim N(\theta,1)$, $x_{ts}\sim N(z_{ts},\sigma)$.

    Two nested plates, ``time`` (dim -2) and ``series`` (dim -1). Beyond a series' end both the latent and the datum are
    masked, in model and guide; where a datum is missing inside a series, only the datum is. Masked data hold the number
    9, so that a forgotten mask is loud. The guide is amortized, $N(ax_{ts}+c,s)$.

    Args:
        seed: Of the data.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Example:
        >>> from pyro_emvae.problems import masked
        >>> x, valid, observed = masked().args
        >>> tuple(x.shape), int(valid.sum()), int((valid & observed).sum())
        ((4, 3), 9, 7)
    """
    make = Maker(seed, dtype, device)
    valid = (torch.arange(4).unsqueeze(-1) < torch.tensor([4, 2, 3])).to(device)
    observed = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool, device=device)
    seen = valid & observed
    x = make(torch.where(seen.cpu(), 1.3 + 1.8 * make.noise(4, 3), 9.0))
    one = make(1.0)
    initial = make.initial(
        theta={"mean": 0.3, "sigma": (0.7, positive)},
        phi={"slope": 0.4, "intercept": -0.2, "scale": (0.8, positive)},
    )

    def model(x: Tensor, valid: Tensor, observed: Tensor) -> None:
        mean, sigma = initial("mean"), initial("sigma")
        with pyro.plate("time", x.shape[0], dim=-2), pyro.plate("series", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(mean, one).mask(valid))
            pyro.sample("x", dist.Normal(z, sigma).mask(valid & observed), obs=x)

    def guide(x: Tensor, valid: Tensor, observed: Tensor) -> None:
        loc, scale = initial("slope") * x + initial("intercept"), initial("scale")
        with pyro.plate("time", x.shape[0], dim=-2), pyro.plate("series", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).mask(valid))

    def log_evidence(p: Params) -> Tensor:
        return expected_normal(x - p.mean, 0.0, (1 + p.sigma**2).sqrt())[seen].sum()

    def elbo(p: Params) -> Tensor:
        loc = p.slope * x + p.intercept
        likelihood = expected_normal(x - loc, p.scale**2, p.sigma)[seen].sum()
        return likelihood - kl(dist.Normal(loc[valid], p.scale), dist.Normal(p.mean, one))

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        precision = 1 + seen / p.sigma**2
        mean = (p.mean + torch.where(seen, x, 0.0) / p.sigma**2) / precision
        return {"z": dist.Normal(mean, precision.rsqrt())}

    def maximum() -> dict[str, Tensor]:
        return {"mean": x[seen].mean(), "sigma": (x[seen].var(correction=0) - 1).sqrt()}

    return problem(
        "masked",
        model,
        guide,
        (x, valid, observed),
        ("z",),
        initial,
        ProblemTraits(local=True, masked=True),
        max_plate_nesting=2,
        log_evidence=log_evidence,
        elbo=elbo,
        posterior=posterior,
        maximum=maximum,
    )
