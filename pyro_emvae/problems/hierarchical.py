r"""Global and local latents, and guides in which one site depends on another."""

from __future__ import annotations

from types import SimpleNamespace as Params

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import positive

from ._math import bits, expected_normal, kl, log_evidence_of_shared_mean
from ._problem import Maker, Problem, ProblemTraits, data_plate, problem

__all__ = ["local_global", "local_global_subsampled", "mixed_two_level", "two_level"]


def local_global(
    *, subsample_size: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Problem:
    r"""One global and six local latents: $\mu\sim N(\theta,0.7)$, $z_n\sim N(\mu,1)$, $x_n\sim N(z_n,\sigma)$.

    The guide is factorised, $N(m,s)\prod_nN(m_n,s_n)$, with local parameters declared inside the plate.

    Args:
        subsample_size: Draw a minibatch of this size inside model and guide.
        seed: Of the data.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Example:
        >>> from pyro_emvae.problems import local_global
        >>> problem = local_global()
        >>> bool(problem.log_evidence(problem.maximum()) > problem.log_evidence() > problem.elbo())
        True
    """
    make = Maker(seed, dtype, device)
    noise = torch.tensor([-1.3, 0.4, 1.9, -0.6, 1.1, -1.7], dtype=torch.float64)
    x = make(1.2 + 1.3 * noise + 0.3 * make.noise(6))
    prior_scale, one = make(0.7), make(1.0)
    initial = make.initial(
        theta={"prior_mean": -0.3, "sigma": (0.6, positive)},
        phi={
            "loc": 0.5,
            "scale": (0.9, positive),
            "local_loc": 0.5 * make.noise(6),
            "local_scale": ((0.3 * make.noise(6)).exp(), positive),
        },
    )

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(initial("prior_mean"), prior_scale))
        sigma = initial("sigma")
        with data_plate(x, subsample_size):
            z = pyro.sample("z", dist.Normal(mu, one))
            pyro.sample("x", dist.Normal(z, sigma), obs=pyro.subsample(x, event_dim=0))

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(initial("loc"), initial("scale")))
        with data_plate(x, subsample_size):
            loc, scale = initial("local_loc", event_dim=0), initial("local_scale", event_dim=0)
            pyro.sample("z", dist.Normal(loc, scale))

    def log_evidence(p: Params) -> Tensor:
        return log_evidence_of_shared_mean(x, p.prior_mean, 1 + p.sigma**2, prior_scale**2)

    def elbo(p: Params) -> Tensor:
        top = kl(dist.Normal(p.loc, p.scale), dist.Normal(p.prior_mean, prior_scale))
        local = expected_normal(p.local_loc - p.loc, p.local_scale**2 + p.scale**2, one)
        likelihood = expected_normal(x - p.local_loc, p.local_scale**2, p.sigma)
        return (likelihood + local + dist.Normal(p.local_loc, p.local_scale).entropy()).sum() - top

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        precision = prior_scale**-2 + len(x) / (1 + p.sigma**2)
        mean = (p.prior_mean * prior_scale**-2 + x.sum() / (1 + p.sigma**2)) / precision
        local_precision = 1 + p.sigma**-2
        local_mean = (mean + x * p.sigma**-2) / local_precision
        local_variance = 1 / local_precision + 1 / (precision * local_precision**2)
        return {"mu": dist.Normal(mean, precision.rsqrt()), "z": dist.Normal(local_mean, local_variance.sqrt())}

    def maximum() -> dict[str, Tensor]:
        n, shared = len(x), len(x) * prior_scale**2
        squares = (x - x.mean()).square().sum()
        b = (n - 1) * shared - squares
        variance = (-b + (b**2 + 4 * n * squares * shared).sqrt()) / (2 * n)
        return {"prior_mean": x.mean(), "sigma": (variance - 1).sqrt()}

    return problem(
        "local_global" if subsample_size is None else "local_global_subsampled",
        model,
        guide,
        (x,),
        ("mu", "z"),
        initial,
        ProblemTraits(subsampled=subsample_size is not None),
        log_evidence=log_evidence,
        elbo=elbo,
        posterior=posterior,
        maximum=maximum,
    )


def local_global_subsampled(
    *, subsample_size: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Problem:
    """`local_global` with a plate that draws two of the six data: local parameters under minibatches.

    Example:
        >>> from pyro_emvae.problems import local_global, local_global_subsampled
        >>> bool(local_global_subsampled().elbo() == local_global().elbo())
        True
    """
    return local_global(subsample_size=subsample_size, seed=seed, dtype=dtype, device=device)


def two_level(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""A chain without plates: $z_1\sim N(\theta,1)$, $z_2\sim N(wz_1,1)$, $x\sim N(z_2,\sigma)$.

    The guide is $z_1\sim N(m,s_1)$, $z_2\mid z_1\sim N(az_1+b,s_2)$, which contains the posterior.

    Args:
        seed: Of the data.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Example:
        >>> from pyro_emvae.problems import two_level
        >>> problem = two_level()
        >>> abs(float(problem.elbo(problem.exact_guide()) - problem.log_evidence())) < 1e-12
        True
    """
    make = Maker(seed, dtype, device)
    x = make(1.7 + 0.3 * make.noise())
    one = make(1.0)
    initial = make.initial(
        theta={"prior_mean": 0.4, "weight": -0.6, "sigma": (0.8, positive)},
        phi={"loc": -0.3, "scale": (0.7, positive), "slope": 0.5, "intercept": 0.9, "inner_scale": (0.6, positive)},
    )

    def model(x: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(initial("prior_mean"), one))
        second = pyro.sample("second", dist.Normal(initial("weight") * first, one))
        pyro.sample("x", dist.Normal(second, initial("sigma")), obs=x)

    def guide(x: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(initial("loc"), initial("scale")))
        pyro.sample("second", dist.Normal(initial("slope") * first + initial("intercept"), initial("inner_scale")))

    def log_evidence(p: Params) -> Tensor:
        return expected_normal(x - p.weight * p.prior_mean, 0.0, (p.weight**2 + 1 + p.sigma**2).sqrt())

    def elbo(p: Params) -> Tensor:
        mean = p.slope * p.loc + p.intercept
        residual_variance = (p.slope - p.weight) ** 2 * p.scale**2 + p.inner_scale**2
        second = expected_normal(mean - p.weight * p.loc, residual_variance, one)
        likelihood = expected_normal(x - mean, p.slope**2 * p.scale**2 + p.inner_scale**2, p.sigma)
        entropy = dist.Normal(mean, p.inner_scale).entropy()
        return likelihood + second + entropy - kl(dist.Normal(p.loc, p.scale), dist.Normal(p.prior_mean, one))

    def exact_guide(p: Params) -> dict[str, Tensor]:
        precision = 1 + p.weight**2 / (1 + p.sigma**2)
        inner_precision = 1 + p.sigma**-2
        return {
            "loc": (p.prior_mean + p.weight * x / (1 + p.sigma**2)) / precision,
            "scale": precision.rsqrt(),
            "slope": p.weight / inner_precision,
            "intercept": x * p.sigma**-2 / inner_precision,
            "inner_scale": inner_precision.rsqrt(),
        }

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        q = Params(**exact_guide(p))
        variance = q.slope**2 * q.scale**2 + q.inner_scale**2
        return {
            "first": dist.Normal(q.loc, q.scale),
            "second": dist.Normal(q.slope * q.loc + q.intercept, variance.sqrt()),
        }

    return problem(
        "two_level",
        model,
        guide,
        (x,),
        ("first", "second"),
        initial,
        ProblemTraits(two_level=True, exact_posterior_in_family=True),
        max_plate_nesting=0,
        log_evidence=log_evidence,
        elbo=elbo,
        posterior=posterior,
        exact_guide=exact_guide,
    )


def mixed_two_level(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""A discrete latent, then a continuous one: $k\sim\mathrm{Bern}$, $z\sim N(\mu_k,\tau_k)$, $x_n\sim N(z,\sigma)$.

    The guide is Bernoulli, then Normal with its own location and scale for each k, which contains the posterior. Its
    k has no reparameterised sampler, its z has. Args as for `two_level`.

    Example:
        >>> from pyro_emvae.problems import mixed_two_level
        >>> problem = mixed_two_level()
        >>> abs(float(problem.elbo(problem.exact_guide()) - problem.log_evidence())) < 1e-12
        True
    """
    make = Maker(seed, dtype, device)
    x = make(0.6 + 0.9 * make.noise(3))
    initial = make.initial(
        theta={"prior_logit": -0.5, "means": [-0.8, 1.6], "scales": ([0.7, 1.3], positive), "sigma": (0.9, positive)},
        phi={"logit": 0.7, "locs": [0.1, 0.9], "guide_scales": ([0.5, 0.8], positive)},
    )

    def model(x: Tensor) -> None:
        means, scales = initial("means"), initial("scales")
        k = pyro.sample("k", dist.Bernoulli(logits=initial("prior_logit"))).long()
        z = pyro.sample("z", dist.Normal(means[k], scales[k]))
        with data_plate(x):
            pyro.sample("x", dist.Normal(z, initial("sigma")), obs=x)

    def guide(x: Tensor) -> None:
        locs, scales = initial("locs"), initial("guide_scales")
        k = pyro.sample("k", dist.Bernoulli(logits=initial("logit"))).long()
        pyro.sample("z", dist.Normal(locs[k], scales[k]))

    def log_joint(p: Params) -> Tensor:
        """log p(k, x) for both values of k."""
        values = [log_evidence_of_shared_mean(x, p.means[k], p.sigma**2, p.scales[k] ** 2) for k in range(2)]
        return dist.Bernoulli(logits=p.prior_logit).log_prob(bits(1, like=x)) + torch.stack(values)

    def elbo(p: Params) -> Tensor:
        bit = bits(1, like=x)
        log_q = dist.Bernoulli(logits=p.logit).log_prob(bit)
        log_p = dist.Bernoulli(logits=p.prior_logit).log_prob(bit)
        likelihood = expected_normal(x - p.locs.unsqueeze(-1), p.guide_scales.unsqueeze(-1) ** 2, p.sigma).sum(-1)
        prior = expected_normal(p.locs - p.means, p.guide_scales**2, p.scales)
        inner = likelihood + prior + dist.Normal(p.locs, p.guide_scales).entropy()
        return (log_q.exp() * (log_p - log_q + inner)).sum()

    def exact_guide(p: Params) -> dict[str, Tensor]:
        log_p = log_joint(p)
        precision = p.scales**-2 + len(x) * p.sigma**-2
        locs = (p.means * p.scales**-2 + x.sum() * p.sigma**-2) / precision
        return {"logit": log_p[1] - log_p[0], "locs": locs, "guide_scales": precision.rsqrt()}

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        q = Params(**exact_guide(p))
        k = dist.Categorical(logits=torch.stack([torch.zeros_like(q.logit), q.logit]))
        z = dist.MixtureSameFamily(k, dist.Normal(q.locs, q.guide_scales))
        return {"k": dist.Bernoulli(logits=q.logit), "z": z}

    return problem(
        "mixed_two_level",
        model,
        guide,
        (x,),
        ("k", "z"),
        initial,
        ProblemTraits(support="mixed", reparameterised=False, two_level=True, exact_posterior_in_family=True),
        log_evidence=lambda p: log_joint(p).logsumexp(-1),
        elbo=elbo,
        posterior=posterior,
        exact_guide=exact_guide,
    )
