"""The mean-field E-step against updates written by hand, closed forms, scikit-learn and direct optimisation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_emvae import steps
from pyro_emvae.posterior import Ascent, FactoredJoint, MeanFieldPosterior, first_ascent

F64 = torch.float64


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ascent(model: Callable, *args: Any, **options: Any) -> Ascent:
    return first_ascent(FactoredJoint("MeanField", model, args, {}), **options)


def factor(found: Any, name: str) -> Any:
    return next(f for f in found.factors if name in f.names)


def infer(model: Callable, *args: Any, **options: Any) -> MeanFieldPosterior:
    return steps.MeanField(**{"tol": 1e-12, "num_sweeps": 2000} | options).infer(model, args, {})


def close(found: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected.expand(found.shape), rtol=tol, atol=tol)


# Mixture of Gaussians ---------------------------------------------------------------------------------------------

X = torch.cat([normal(12) - 2.0, 0.5 * normal(8, seed=1) + 2.0])
PRIOR = {"alpha": 0.7, "m0": 0.3, "beta0": 0.1, "a0": 2.0, "b0": 1.5}


def one_datum_each(mu: Tensor, z: Tensor) -> Tensor:
    """Takes one outcome per datum, or the outcomes that Pyro enumerates, and nothing else."""
    if z.dim() > 1 and z.shape[-1] > 1:
        raise ValueError("more than one outcome per datum")
    return mu[z]


INDEXING = {
    "all": lambda mu, z: Vindex(mu.unsqueeze(-2))[..., z],
    "discrete": lambda mu, z: mu[z],
    "none": one_datum_each,
}


def mixture(how: str, keep: Tensor | None = None, scale: float = 1.0) -> Callable:
    take = INDEXING[how]

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.full((3,), PRIOR["alpha"], dtype=F64)))
        with pyro.plate("components", 3):
            tau = pyro.sample("tau", dist.Gamma(tensor(PRIOR["a0"]), PRIOR["b0"]))
            mu = pyro.sample("mu", dist.Normal(tensor(PRIOR["m0"]), (PRIOR["beta0"] * tau).rsqrt()))
        with pyro.plate("data", len(x)), poutine.scale(scale=scale), poutine.mask(mask=True if keep is None else keep):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(take(mu, z), take(tau, z).rsqrt()), obs=x)

    return model


def mixture_sweep(x: Tensor, r: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Update w, the Normal-Gammas and then z by hand; ``weight`` counts each datum."""
    rw = r * weight[:, None]
    n, sx, sxx = rw.sum(0), rw.T @ x, rw.T @ x**2
    p = PRIOR
    count = p["beta0"] + n
    m = (p["beta0"] * p["m0"] + sx) / count
    a = p["a0"] + n / 2
    b = p["b0"] + 0.5 * (sxx + p["beta0"] * p["m0"] ** 2 - count * m**2)
    alpha = p["alpha"] + n
    log_w = torch.digamma(alpha) - torch.digamma(alpha.sum())
    log_tau = torch.digamma(a) - b.log()
    quadratic = a / b * (x[:, None] - m) ** 2 + 1 / count
    logits = log_w + 0.5 * log_tau - 0.5 * math.log(2 * math.pi) - 0.5 * quadratic
    return {"alpha": alpha, "a": a, "b": b, "m": m, "count": count}, logits.softmax(-1)


@pytest.mark.parametrize("how", INDEXING)
def test_a_sweep_over_a_mixture_is_the_update_by_hand(how):
    r = normal(20, 3, seed=2).softmax(-1)
    found = ascent(mixture(how), X, init={"z": dist.Categorical(r)})
    assert found.joint.at_once == how
    for _ in range(2):
        found.sweep(twice=True)
        expected, r = mixture_sweep(X, r, torch.ones_like(X))
        close(factor(found, "w").a, expected["alpha"])
        for name in ("a", "b", "m", "count"):
            close(getattr(factor(found, "mu"), name), expected[name])
        close(factor(found, "z").logits.softmax(-1), r)


def test_masks_and_scales_count_data():
    keep, r = torch.arange(20) % 3 > 0, normal(20, 3, seed=2).softmax(-1)
    found = ascent(mixture("all", keep, scale=2.5), X, init={"z": dist.Categorical(r)})
    found.sweep(twice=True)
    expected, r = mixture_sweep(X, r, 2.5 * keep)
    close(factor(found, "mu").b, expected["b"])
    close(factor(found, "z").logits.softmax(-1)[keep], r[keep])
    prior = torch.softmax(torch.digamma(expected["alpha"]), -1)
    close(factor(found, "z").logits.softmax(-1)[~keep], prior)
    kept = ascent(mixture("all", scale=2.5), X[keep], init={"z": dist.Categorical(r[keep])})
    kept.factors[:2] = found.factors[:2]
    assert kept.elbo()[0] == pytest.approx(found.elbo()[0], rel=1e-12)


def test_no_update_lowers_the_bound_and_the_bound_is_that_of_the_formula():
    found = ascent(mixture("all"), X)
    bounds = [found.elbo()[0]]
    for _ in range(5):
        for place in range(len(found.factors)):
            found.move(place, twice=True)
            bounds.append(found.elbo()[0])
    assert all(b >= a - 1e-10 for a, b in itertools.pairwise(bounds)) and bounds[-1] > bounds[0] + 10
    assert bounds[-1] == pytest.approx(mixture_bound(found, X), rel=1e-12)


def mixture_bound(found: Ascent, x: Tensor) -> float:
    """The bound of Bishop 2006, eq. 10.70, for one dimension."""
    w, ng, r = factor(found, "w"), factor(found, "mu"), factor(found, "z").logits.softmax(-1)
    log_w = torch.digamma(w.a) - torch.digamma(w.a.sum())
    tau, log_tau = ng.a / ng.b, torch.digamma(ng.a) - ng.b.log()
    half = 0.5 * math.log(2 * math.pi)
    likelihood = 0.5 * log_tau - half - 0.5 * (tau * (x[:, None] - ng.m) ** 2 + 1 / ng.count)
    total = (r * (likelihood + log_w - r.clamp(min=1e-300).log())).sum()
    p, alpha = PRIOR, torch.full((3,), PRIOR["alpha"], dtype=F64)
    total = total + torch.lgamma(alpha.sum()) - torch.lgamma(alpha).sum() + ((alpha - 1) * log_w).sum()
    total = total + dist.Dirichlet(w.a).entropy()
    gamma = p["a0"] * math.log(p["b0"]) - math.lgamma(p["a0"]) + (p["a0"] - 1) * log_tau - p["b0"] * tau
    mean = 0.5 * (math.log(p["beta0"]) + log_tau) - half
    mean = mean - 0.5 * p["beta0"] * (tau * (ng.m - p["m0"]) ** 2 + 1 / ng.count)
    entropy = dist.Gamma(ng.a, ng.b).entropy() + half + 0.5 - 0.5 * (ng.count.log() + log_tau)
    return float(total + (gamma + mean + entropy).sum())


# Unknown mean and precision, causes, topics -----------------------------------------------------------------------


def unknown(x: Tensor) -> None:
    tau = pyro.sample("tau", dist.Gamma(tensor(1.5), 0.8))
    mu = pyro.sample("mu", dist.Normal(tensor(0.5), (0.4 * tau).rsqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)


def test_unknown_mean_and_precision():
    """Bishop 2006, eqs. 10.26 to 10.30; as one factor the pair is the exact posterior."""
    found = ascent(unknown, X, pairs=None)
    mean = factor(found, "mu")
    for _ in range(3):
        found.sweep(twice=True)
        second = mean.scale**2 + mean.loc**2
        sums = (X**2).sum() - 2 * mean.loc * X.sum() + len(X) * second
        b = 0.8 + 0.5 * (sums + 0.4 * (second - 2 * mean.loc * 0.5 + 0.25))
        a = tensor(1.5 + (len(X) + 1) / 2)
        tau = factor(found, "tau")
        close(torch.stack([tau.a, tau.b]), torch.stack([a, b]))
        mean = factor(found, "mu")
        close(mean.loc, (0.4 * 0.5 + X.sum()) / (0.4 + len(X)))
        close(mean.scale, ((0.4 + len(X)) * a / b).rsqrt())
    exact = steps.Conjugate().infer(unknown, (X,), {})
    pair = infer(unknown, X)
    assert pair.elbo == pytest.approx(exact.log_evidence, rel=1e-12) and pair.num_sweeps == 1
    assert found.elbo()[0] < exact.log_evidence - 1e-3


S = tensor([[2.0, 0.3], [0.3, 1.0]])


def causes(x: Tensor) -> None:
    """Two binary causes per datum, each with an unknown effect: effects and causes meet in x."""
    data = pyro.plate("data", len(x), dim=-1)
    with pyro.plate("causes", 2, dim=-2):
        effect = pyro.sample("effect", dist.Normal(tensor(0.0), 2.0))
        with data:
            on = pyro.sample("on", dist.Bernoulli(tensor(0.3)))
    with data:
        mean = (effect * on).sum(-2, keepdim=True)
        pyro.sample("x", dist.Normal(mean, 0.7), obs=x)


def test_two_causes_are_moved_one_after_the_other():
    x = tensor([0.2, 3.1, -1.4, 1.9, 0.1, 2.8, -1.7])
    start = torch.rand(2, 7, generator=torch.Generator().manual_seed(3), dtype=F64)
    found = ascent(causes, x, init={"on": dist.Bernoulli(start)})
    assert found.dims == [(-2,), (-2,)]
    p, m, v = start.clone(), factor(found, "effect").loc[:, 0].clone(), factor(found, "effect").scale[:, 0] ** 2
    for _ in range(2):
        found.sweep(twice=True)
        for k in range(2):
            rest = p[1 - k] * m[1 - k]
            precision = 0.25 + p[k].sum() / 0.49
            m[k], v[k] = (p[k] * (x - rest)).sum() / 0.49 / precision, 1 / precision
        for k in range(2):
            rest = p[1 - k] * m[1 - k]
            p[k] = torch.sigmoid(math.log(0.3 / 0.7) + (m[k] * (x - rest) - 0.5 * (m[k] ** 2 + v[k])) / 0.49)
        close(factor(found, "effect").loc[:, 0], m)
        close(factor(found, "effect").scale[:, 0] ** 2, v)
        close(factor(found, "on").logits.softmax(-1)[..., 1], p)
    bound = dist.Bernoulli(p).entropy().sum() + (p * math.log(0.3) + (1 - p) * math.log(0.7)).sum()
    prior = -0.5 * math.log(2 * math.pi * 4.0) - (m**2 + v) / 8 + 0.5 * (2 * math.pi * math.e * v).log()
    residual = (x - m @ p) ** 2 + (p * (m**2 + v)[:, None] - (p * m[:, None]) ** 2).sum(0)
    bound = bound + prior.sum() - (residual / 0.98 + 0.5 * math.log(2 * math.pi * 0.49)).sum()
    assert found.elbo()[0] == pytest.approx(float(bound), rel=1e-12)


def topics(words: Tensor) -> None:
    with pyro.plate("topics", 2):
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((4,), 0.5, dtype=F64)))
    with pyro.plate("documents", words.shape[1], dim=-1):
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((2,), 0.8, dtype=F64)))
        with pyro.plate("words", words.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(theta))
            pyro.sample("w", dist.Categorical(phi[z]), obs=words)


def test_latent_dirichlet_allocation():
    words = torch.tensor([[0, 1, 0], [1, 1, 3], [2, 0, 3], [3, 2, 2], [0, 0, 3]])
    r = normal(5, 3, 2, seed=4).softmax(-1)
    found = ascent(topics, words, init={"z": dist.Categorical(r)})
    onehot = torch.nn.functional.one_hot(words, 4).to(F64)
    for _ in range(2):
        found.sweep(twice=True)
        phi = 0.5 + torch.einsum("wdk,wdv->kv", r, onehot)
        theta = 0.8 + r.sum(0)
        log_phi = torch.digamma(phi) - torch.digamma(phi.sum(-1, keepdim=True))
        r = (torch.digamma(theta) + log_phi.T[words]).softmax(-1)
        close(factor(found, "phi").a, phi)
        close(factor(found, "theta").a, theta)
        close(factor(found, "z").logits.softmax(-1), r)


# Gaussian latents -------------------------------------------------------------------------------------------------

DESIGN = normal(9, 4) + 0.7 * normal(9, 1, seed=6)
Y = DESIGN @ tensor([1.0, -0.5, 0.3, 0.8]) + 0.5 * normal(9, seed=5)


def regression(design: Tensor, y: Tensor) -> None:
    with pyro.plate("features", design.shape[1]):
        w = pyro.sample("w", dist.Normal(tensor(0.0), 1.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((w[..., None, :] * design).sum(-1), 0.5), obs=y)


def test_variances_are_those_of_the_diagonal_of_the_precision():
    found = infer(regression, DESIGN, Y)
    precision = DESIGN.T @ DESIGN / 0.25 + torch.eye(4, dtype=F64) / 2.25
    covariance = precision.inverse()
    close(found.marginal("w").mean, covariance @ DESIGN.T @ Y / 0.25, 1e-5)
    close(found.marginal("w").variance, 1 / precision.diagonal())
    assert bool((found.marginal("w").variance < covariance.diagonal()).all())
    evidence = dist.MultivariateNormal(
        torch.zeros(9, dtype=F64), 2.25 * DESIGN @ DESIGN.T + 0.25 * torch.eye(9, dtype=F64)
    ).log_prob(Y)
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert found.elbo == pytest.approx(float(evidence - gap), rel=1e-8)


def test_support_has_quadratic_forms_of_elements_that_meet():
    found = infer(regression, DESIGN, Y)
    w = found.marginal("w")
    expected = torch.outer(w.mean, w.mean) + torch.diag(w.variance)
    close(found.support().expect(lambda v: v["w"][..., :, None] * v["w"][..., None, :]), expected)
