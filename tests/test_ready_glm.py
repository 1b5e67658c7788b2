"""Ready M-steps of generalized linear mixed models: against linear algebra and the likelihood's own derivative."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_emvae import EM, steps
from pyro_emvae._checks import DegenerateError, EmvaeError, StepError
from pyro_emvae.posterior import Support
from pyro_emvae.steps import combined, glm_intercepts, linear_mixed, random_effects
from pyro_emvae.steps.closed_form import total

F64 = torch.float64
NODES = torch.tensor([-1.2, -0.3, 0.4, 1.5], dtype=F64)
LEVEL = torch.tensor([0, 1, 2]).repeat(8)
EXPOSED = torch.linspace(-0.5, 0.7, 24, dtype=F64)


def responses(family: str) -> Tensor:
    torch.manual_seed(0)
    o = NODES[torch.randint(4, (24,))] + EXPOSED + torch.tensor([-0.7, 0.2, 0.9], dtype=F64)[LEVEL]
    draw = {"normal": lambda: torch.normal(o, 0.5), "poisson": lambda: torch.poisson(o.exp())}
    return draw.get(family, lambda: torch.bernoulli(o.sigmoid()))()


def likelihood(family: str, eta: Tensor, sigma: Tensor) -> Any:
    if family == "normal":
        return dist.Normal(eta, sigma)
    return dist.Poisson(eta.exp()) if family == "poisson" else dist.Bernoulli(logits=eta)


def discrete_effects(family: str, num_levels: int):
    """A model whose random effects have four values: its likelihood is a finite sum."""

    def model(y: Tensor, level: Tensor) -> None:
        start = torch.zeros(num_levels, dtype=F64) if num_levels > 1 else torch.tensor(0.0, dtype=F64)
        intercept = pyro.param("intercept", start)
        one = torch.tensor(1.0, dtype=F64)
        sigma = pyro.param("sigma", one, constraint=constraints.positive) if family == "normal" else one
        beta = intercept[level] if num_levels > 1 else intercept
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(4, dtype=F64)))
            eta = beta + NODES[z] + EXPOSED
            pyro.sample("y", likelihood(family, eta, sigma).mask(~y.isnan()), obs=y.nan_to_num())

    def log_likelihood(y: Tensor, intercept: Tensor, sigma: Tensor) -> Tensor:
        beta = intercept[LEVEL] if num_levels > 1 else intercept
        eta = beta + NODES[:, None] + EXPOSED
        terms = likelihood(family, eta, sigma).log_prob(y.nan_to_num()).logsumexp(0) - NODES.new_tensor(4.0).log()
        return terms[~y.isnan()].sum()

    return model, log_likelihood


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("family", ["normal", "poisson", "bernoulli"])
def test_intercepts_rise_to_the_maximum_of_the_likelihood(family, num_levels, missing):
    model, log_likelihood = discrete_effects(family, num_levels)
    y = responses(family)
    if missing:
        y[[1, 5, 6]] = torch.nan
    m_step = glm_intercepts(
        family,
        levels=1 if num_levels > 1 else None,
        num_levels=num_levels,
        offset=lambda values, y, level: NODES[values["z"]] + EXPOSED,
    )
    em = EM(model, e_step="enumerated", m_step=m_step)
    losses = [em.step(y, LEVEL) for _ in range(10)]
    assert all(b <= a + 1e-11 * abs(a) for a, b in itertools.pairwise(losses))
    em.run(y, LEVEL, max_iter=20, stop=None, accelerate="squarem")
    found = {"sigma": torch.tensor(1.0, dtype=F64)} | em.blocks.constrained()
    leaves = [found[name].detach().clone().requires_grad_() for name in ("intercept", "sigma")]
    value = log_likelihood(y, *leaves)
    assert -em.step(y, LEVEL) == pytest.approx(float(value.detach()), rel=1e-10)
    slopes = torch.autograd.grad(value, leaves if family == "normal" else leaves[:1])
    for slope in slopes:
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)


def test_a_bernoullis_intercept_solves_its_likelihood_equation():
    """One update, against the root of the sum over draws, by Newton's method in float64."""
    torch.manual_seed(1)
    offsets, y = 3 * torch.randn(50, 400, dtype=F64), torch.bernoulli(torch.full((400,), 0.83, dtype=F64))
    m_step = glm_intercepts("bernoulli")
    stats = m_step.statistics({"b": offsets}, y)["sums"].product.mean(0).sum(0)
    found = m_step.update({"sums": stats}, {"intercept": torch.tensor(0.0)})["intercept"]
    beta = torch.tensor(0.0, dtype=F64)
    for _ in range(50):
        p = (beta + offsets).sigmoid()
        beta = beta + (y.sum() - p.mean(0).sum()) / (p * (1 - p)).mean(0).sum()
    torch.testing.assert_close(found, beta, rtol=0, atol=1e-9)


# Linear mixed models ------------------------------------------------------------------------------------------------

GROUP = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 3, 3, 4, 4, 4, 0, 2, 1, 4, 3])


def mixed_data(slopes: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.stack([torch.ones(20), torch.randn(20)], -1).to(F64)
    b = torch.randn(5, 2, dtype=F64) * torch.tensor([1.0, 0.6])
    o = (b[GROUP] * x).sum(-1) if slopes else b[GROUP, 0]
    return x @ torch.tensor([0.5, -1.0], dtype=F64) + o + 0.4 * torch.randn(20, dtype=F64), x, GROUP


def mixed(slopes: bool):
    def model(y: Tensor, x: Tensor, group: Tensor) -> None:
        beta = pyro.param("beta", torch.zeros(2, dtype=F64))
        sigma = pyro.param("sigma", torch.tensor(1.0, dtype=F64), constraint=constraints.positive)
        tau = pyro.param("tau", torch.ones(2 if slopes else (), dtype=F64), constraint=constraints.positive)
        with pyro.plate("groups", 5):
            b = pyro.sample("b", dist.Normal(torch.zeros_like(tau), tau).to_event(int(slopes)))
        o = (b[..., group, :] * x).sum(-1) if slopes else b[..., group]
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ beta + o, sigma), obs=y)

    return model


def marginal(slopes: bool, y: Tensor, x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Return the log likelihood with the random effects integrated out, by one dense covariance."""
    member = torch.nn.functional.one_hot(GROUP, 5).to(F64)
    columns = [member * x[:, k : k + 1] for k in range(2 if slopes else 1)]
    taus = params["tau"].unbind() if slopes else [params["tau"]]
    noise = params["sigma"].square() * torch.eye(20, dtype=F64)
    covariance = sum((tau.square() * z @ z.T for tau, z in zip(taus, columns, strict=True)), noise)
    return dist.MultivariateNormal(x @ params["beta"], covariance).log_prob(y)


@pytest.mark.parametrize("slopes", [False, True])
def test_a_linear_mixed_model_rises_to_the_maximum_likelihood(slopes):
    y, x, group = mixed_data(slopes)
    offset = (lambda values, y, x, group: (values["b"][:, group] * x).sum(-1)) if slopes else None
    em = EM(mixed(slopes), e_step="gaussian", m_step=linear_mixed(offset=offset))
    fit = em.run(y, x, group, max_iter=40, stop=None, accelerate="squarem")
    params = {name: value.detach().clone().requires_grad_() for name, value in em.blocks.constrained().items()}
    value = marginal(slopes, y, x, params)
    assert float(fit.objective) == pytest.approx(float(value.detach()), rel=1e-10)
    for slope in torch.autograd.grad(value, list(params.values())):
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5)


def test_one_step_of_a_linear_mixed_model_by_linear_algebra():
    y, x, group = mixed_data(False)
    em = EM(mixed(False), e_step="gaussian", m_step=linear_mixed())
    em.step(y, x, group)
    z = torch.nn.functional.one_hot(GROUP, 5).to(F64)
    covariance = torch.linalg.inv(z.T @ z + torch.eye(5, dtype=F64))  # sigma = tau = 1, beta = 0
    mean = covariance @ z.T @ y
    beta = torch.linalg.lstsq(x, (y - z @ mean)[:, None]).solution[:, 0]
    sigma = ((y - x @ beta - z @ mean).square().sum() + torch.trace(z @ covariance @ z.T)) / 20
    tau = (mean.square().sum() + torch.trace(covariance)) / 5
    found = em.blocks.constrained()
    for name, expected in {"beta": beta, "sigma": sigma.sqrt(), "tau": tau.sqrt()}.items():
        torch.testing.assert_close(found[name].detach(), expected, rtol=1e-10, atol=1e-10)


def test_draws_with_weights_per_group_give_the_same_step():
    """The statistics are sums over groups, so the draws of each group may have weights of their own."""
    y, x, group = mixed_data(False)
    members = torch.nn.functional.one_hot(GROUP, 5).to(F64)
    params = {"beta": torch.zeros(2, dtype=F64), "sigma": torch.tensor(1.0), "tau": torch.tensor(1.0)}
    torch.manual_seed(0)
    draws, weights = torch.randn(7, 5, dtype=F64), torch.randn(7, 5, dtype=F64).log_softmax(0)
    m_step = linear_mixed()
    each = m_step.update(total(m_step.statistics, Support({"b": draws}, weights, 1), y, x, group), params)
    mean, square = ((weights.exp() * draws**k).sum(0) for k in (1, 2))
    beta = torch.linalg.lstsq(x, (y - members @ mean)[:, None]).solution[:, 0]
    residual = y - x @ beta
    sigma = (residual.square() - 2 * residual * (members @ mean) + members @ square).mean().sqrt()
    for name, expected in {"beta": beta, "sigma": sigma, "tau": square.mean().sqrt()}.items():
        torch.testing.assert_close(each[name], expected, rtol=1e-10, atol=1e-12)


def test_random_effects_with_a_mean():
    y = torch.tensor([0.5, 1.5, -2.0, 4.0], dtype=F64)

    def model(y: Tensor) -> None:
        mean = pyro.param("mean", torch.tensor(0.0, dtype=F64))
        tau = pyro.param("tau", torch.tensor(1.0, dtype=F64), constraint=constraints.positive)
        with pyro.plate("groups", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("b", dist.Normal(mean, tau)), 0.5), obs=y)

    em = EM(model, e_step="gaussian", m_step=random_effects(loc="mean"))
    em.run(y, max_iter=300, stop=None)
    found = em.blocks.constrained()
    torch.testing.assert_close(found["mean"].detach(), y.mean())
    torch.testing.assert_close(found["tau"].detach(), (y.var(correction=0) - 0.25).sqrt())


# Combination and refusals -------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    with pytest.raises(EmvaeError, match="gamma"):
        glm_intercepts("gamma")
    with pytest.raises(StepError, match="'b'"):
        glm_intercepts("poisson").statistics({"c": NODES}, NODES)
    chain = steps.hidden_markov(steps.poisson_mixture(2))
    with pytest.raises(StepError, match="chain_statistics"):
        combined(chain, random_effects())
    twice = combined(random_effects(), random_effects())
    sums = {name: torch.tensor(2.0) for name in ("0.n", "0.first", "0.second", "1.n", "1.first", "1.second")}
    with pytest.raises(StepError, match="'tau'"):
        twice.update(sums, {"tau": torch.tensor(1.0)})


@pytest.mark.parametrize(("family", "y"), [("poisson", 0.0), ("bernoulli", 0.0), ("bernoulli", 1.0)])
def test_an_infinite_intercept_is_refused_and_nothing_moves(family, y):
    model, _ = discrete_effects(family, 1)
    em = EM(
        model,
        e_step="enumerated",
        m_step=glm_intercepts(family, offset=lambda values, y, level: NODES[values["z"]] + EXPOSED),
    )
    data = torch.full((24,), y, dtype=F64)
    with pytest.raises(DegenerateError, match="event"):
        em.step(data, LEVEL)
    assert float(pyro.param("intercept").detach()) == 0.0
