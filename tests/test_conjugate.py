"""The conjugate E-step against textbook posteriors and evidences."""

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
from torch import Tensor
from torch.distributions import constraints

from pyro_emvae import EM, log_evidence, steps
from pyro_emvae._checks import EmvaeError, StepError

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
N, M = 5, 3


def number(x: Any) -> Tensor:
    return torch.tensor(x, dtype=F64)


def param(name: str, value: Any, constraint: Any = constraints.positive) -> Tensor:
    return pyro.param(name, lambda: number(value), constraint=constraint)


def counts(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=GENERATOR).to(F64)


NORMAL = torch.randn(M, N, generator=GENERATOR, dtype=F64)
EXPONENTIAL = torch.rand(M, N, generator=GENERATOR, dtype=F64) + 0.1
BINARY, COUNTS = counts(2, M, N), counts(9, M, N)
EXPOSURE = number([0.5, 1.0, 2.0])[:, None]
LABELS = torch.randint(3, (M, N), generator=GENERATOR)
MULTI = counts(4, M, N, 3)


# Models: a latent per element of "n", M observations of each in an inner plate ------------------------------------


def within(latent: Callable[[], Tensor], observed: Callable[[Tensor], Any], x: Tensor, mask: Any, scale: Any) -> None:
    with poutine.scale(scale=scale), pyro.plate("n", x.shape[1], dim=-1):
        z = latent()
        with pyro.plate("m", M, dim=-2), poutine.mask(mask=True if mask is None else mask):
            pyro.sample("x", observed(z), obs=x)


def beta(name: str = "z") -> Tensor:
    return pyro.sample(name, dist.Beta(param("a", 2.0), param("b", 3.0)))


def gamma(name: str = "z") -> Tensor:
    return pyro.sample(name, dist.Gamma(param("a", 2.0), param("b", 3.0)))


def normal() -> Tensor:
    return pyro.sample("z", dist.Normal(param("loc", 0.4, constraints.real), param("scale", 1.3)))


def simplex() -> Tensor:
    return pyro.sample("z", dist.Dirichlet(param("alpha", [0.5, 1.5, 3.0])))


def lbeta(a: Tensor, b: Tensor) -> Tensor:
    return a.lgamma() + b.lgamma() - (a + b).lgamma()


def kept(x: Tensor, mask: Any) -> Tensor:
    """Return a statistic summed over the inner plate, where the mask is true."""
    return (x if mask is None else torch.where(mask, x, 0.0)).sum(0)


def bernoulli_posterior(x, mask):
    a, b = pyro.param("a"), pyro.param("b")
    a1, b1 = a + kept(x, mask), b + kept(1 - x, mask)
    return dist.Beta(a1, b1), lbeta(a1, b1) - lbeta(a, b)


def binomial_posterior(x, mask):
    a, b, n = pyro.param("a"), pyro.param("b"), number(8.0)
    a1, b1 = a + kept(x, mask), b + kept(8 - x, mask)
    choose = (n + 1).lgamma() - (x + 1).lgamma() - (n - x + 1).lgamma()
    return dist.Beta(a1, b1), lbeta(a1, b1) - lbeta(a, b) + kept(choose, mask)


def gamma_evidence(a1, b1):
    a, b = pyro.param("a"), pyro.param("b")
    return a * b.log() - a.lgamma() + a1.lgamma() - a1 * b1.log()


def poisson_posterior(x, mask):
    t = EXPOSURE.expand_as(x)
    a1, b1 = pyro.param("a") + kept(x, mask), pyro.param("b") + kept(t, mask)
    return dist.Gamma(a1, b1), gamma_evidence(a1, b1) + kept(x * t.log() - (x + 1).lgamma(), mask)


def exponential_posterior(x, mask):
    a1, b1 = pyro.param("a") + kept(torch.ones_like(x), mask), pyro.param("b") + kept(x, mask)
    return dist.Gamma(a1, b1), gamma_evidence(a1, b1)


def precision_posterior(x, mask):
    ones = torch.ones_like(x)
    a1, b1 = pyro.param("a") + kept(ones, mask) / 2, pyro.param("b") + kept(x**2, mask) / 2
    return dist.Gamma(a1, b1), gamma_evidence(a1, b1) - 0.5 * math.log(2 * math.pi) * kept(ones, mask)


def normal_posterior(x, mask):
    loc, scale, known = pyro.param("loc"), pyro.param("scale"), 0.7
    precision = scale**-2 + kept(torch.ones_like(x), mask) / known**2
    mean = (loc / scale**2 + kept(x, mask) / known**2) / precision
    q = dist.Normal(mean, precision.rsqrt())
    like = kept(dist.Normal(mean, known).log_prob(x), mask)
    return q, dist.Normal(loc, scale).log_prob(mean) + like - q.log_prob(mean)


def dirichlet_posterior(x, mask):
    alpha = pyro.param("alpha")
    x = torch.nn.functional.one_hot(x, 3).to(F64) if x.dtype == torch.long else x
    a1 = alpha + kept(x, None if mask is None else mask[..., None])
    extra = kept((x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1), mask)
    evidence = alpha.sum().lgamma() - alpha.lgamma().sum() + a1.lgamma().sum(-1) - a1.sum(-1).lgamma()
    return dist.Dirichlet(a1), evidence + extra


ROWS = {
    "bernoulli": (beta, lambda z: dist.Bernoulli(z), BINARY, bernoulli_posterior),
    "binomial": (beta, lambda z: dist.Binomial(8, z), counts(9, M, N), binomial_posterior),
    "poisson": (gamma, lambda z: dist.Poisson(z * EXPOSURE), COUNTS, poisson_posterior),
    "exponential": (gamma, lambda z: dist.Exponential(z), EXPONENTIAL, exponential_posterior),
    "precision": (gamma, lambda z: dist.Normal(0.0, z.rsqrt()), NORMAL, precision_posterior),
    "normal": (normal, lambda z: dist.Normal(z, 0.7), NORMAL, normal_posterior),
    "categorical": (simplex, lambda z: dist.Categorical(z), LABELS, dirichlet_posterior),
    "multinomial": (simplex, lambda z: dist.Multinomial(probs=z, validate_args=False), MULTI, dirichlet_posterior),
}
MASK = torch.rand(M, N, generator=GENERATOR) < 0.6
rows = pytest.mark.parametrize("row", ROWS)


def solved(row: str, mask: Any = None, scale: Any = 1.0) -> tuple[Any, Any, Tensor]:
    latent, observed, x, textbook = ROWS[row]
    posterior = steps.Conjugate().infer(lambda: within(latent, observed, x, mask, scale), (), {})
    expected, evidence = textbook(x, mask)
    return posterior, expected, evidence


def same(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    assert type(found) is type(expected)
    for name in expected.arg_constraints:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name).detach(), rtol=rtol, atol=1e-12)


@rows
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_textbook_posterior_and_evidence(row, mask, scale):
    posterior, expected, evidence = solved(row, mask, scale)
    same(posterior.marginal("z"), expected)
    assert posterior.is_exact
    assert posterior.log_evidence == pytest.approx(scale * float(evidence.detach().sum()), rel=1e-10, abs=1e-10)
    assert posterior.entropy == pytest.approx(scale * float(expected.entropy().detach().sum()), rel=1e-10)
    found = float(posterior.expected_log_joint(1).detach()) + posterior.entropy
    assert found == pytest.approx(posterior.log_evidence, rel=1e-10, abs=1e-10)


@rows
def test_the_derivative_of_the_expected_log_joint_is_that_of_the_evidence(row):
    """Fisher's identity, at the theta of the E-step, for every hyperparameter."""
    posterior, _, evidence = solved(row, MASK, 2.5)
    leaves = [leaf for _, leaf in pyro.get_param_store()._params.items()]
    expected = torch.autograd.grad(2.5 * evidence.sum(), leaves)
    found = torch.autograd.grad(posterior.expected_log_joint(1), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_a_scale_per_element():
    scale = number([1.0, 2.0, 0.5, 3.0, 1.5])
    posterior, expected, evidence = solved("poisson", None, scale)
    same(posterior.marginal("z"), expected)
    assert posterior.log_evidence == pytest.approx(float((scale * evidence.detach()).sum()), rel=1e-10)


@rows
def test_support_is_exact_for_polynomials_and_logarithms(row):
    posterior, q, _ = solved(row)
    found = posterior.expect(lambda v: {"mean": v["z"], "square": v["z"] ** 2})
    first = [x.reshape(q.mean.shape) for x in (found["mean"], found["square"])]
    torch.testing.assert_close(first[0], q.mean.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first[1], (q.variance + q.mean**2).detach(), rtol=1e-10, atol=1e-12)
    if not isinstance(q, dist.Normal):
        log = posterior.expect(lambda v: v["z"].log()).reshape(q.mean.shape)
        torch.testing.assert_close(log, expected_log(q).detach(), rtol=1e-8, atol=1e-10)


def expected_log(q: Any) -> Tensor:
    if isinstance(q, dist.Gamma):
        return torch.digamma(q.concentration) - q.rate.log()
    if isinstance(q, dist.Beta):
        return torch.digamma(q.concentration1) - torch.digamma(q.concentration1 + q.concentration0)
    return torch.digamma(q.concentration) - torch.digamma(q.concentration.sum(-1, keepdim=True))


@pytest.mark.parametrize("a", [0.1, 0.3, 1.0, 30.0, 1e6])
def test_nodes_of_sparse_and_of_sharp_posteriors(a):
    def model():
        pyro.sample("z", dist.Gamma(number(a), number(2.0)))
        pyro.sample("p", dist.Beta(number(a), number(0.7)))

    found = steps.Conjugate().infer(model, (), {}).expect(lambda v: {"z": v["z"].log(), "p": (v["p"]).log()})
    expected = {"z": torch.digamma(number(a)) - math.log(2), "p": expected_log(dist.Beta(number(a), number(0.7)))}
    torch.testing.assert_close(found, expected, rtol=1e-6 if a < 0.3 else 1e-8, atol=1e-9)


# Arrangements -------------------------------------------------------------------------------------------------------


def normal_gamma(x: Tensor) -> None:
    with pyro.plate("n", N, dim=-1):
        tau = pyro.sample("tau", dist.Gamma(param("a", 2.0), param("b", 3.0)))
        mu = pyro.sample("mu", dist.Normal(param("loc", 0.3, constraints.real), (param("count", 0.5) * tau).rsqrt()))
        with pyro.plate("m", M, dim=-2):
            pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)


def test_normal_gamma():
    posterior = steps.Conjugate().infer(normal_gamma, (NORMAL,), {})
    a, b, loc, count = (pyro.param(name) for name in ("a", "b", "loc", "count"))
    mean, n = NORMAL.mean(0), M
    a1, count1 = a + n / 2, count + n
    b1 = b + 0.5 * ((NORMAL - mean) ** 2).sum(0) + 0.5 * count * n / count1 * (mean - loc) ** 2
    same(posterior.marginal("tau"), dist.Gamma(a1.expand(N), b1))
    t = dist.StudentT((2 * a1).expand(N), (count * loc + n * mean) / count1, (b1 / (a1 * count1)).sqrt())
    same(posterior.marginal("mu"), t)
    evidence = a1.lgamma() - a.lgamma() + a * b.log() - a1 * b1.log() + 0.5 * (count / count1).log()
    evidence = (evidence - n / 2 * math.log(2 * math.pi)).sum()
    assert posterior.log_evidence == pytest.approx(float(evidence.detach()), rel=1e-10)
    leaves = [leaf for _, leaf in pyro.get_param_store()._params.items()]
    expected = torch.autograd.grad(evidence, leaves)
    torch.testing.assert_close(
        torch.autograd.grad(posterior.expected_log_joint(1), leaves), expected, rtol=1e-8, atol=1e-9
    )
    value = float(posterior.expected_log_joint(1).detach()) + posterior.entropy
    assert value == pytest.approx(posterior.log_evidence, rel=1e-10)
    second = posterior.expect(lambda v: v["tau"] * v["mu"] ** 2).flatten()
    torch.testing.assert_close(second, (1 / count1 + a1 / b1 * t.loc**2).detach(), rtol=1e-10, atol=0)


def test_a_batch_of_the_data_counts_for_all():
    index = torch.tensor([0, 3])

    def model(x):
        with pyro.plate("n", N, subsample=index):
            pyro.sample("x", dist.Poisson(gamma()), obs=x)

    x = COUNTS[0, index]
    posterior = steps.Conjugate().infer(model, (x,), {})
    a1, b1 = pyro.param("a") + x, pyro.param("b") + torch.ones_like(x)
    same(posterior.marginal("z"), dist.Gamma(a1, b1))
    evidence = (gamma_evidence(a1, b1) - (x + 1).lgamma()).sum() * N / 2
    assert posterior.log_evidence == pytest.approx(float(evidence.detach()), rel=1e-10)
    total = posterior.support(1).total(lambda v: v["z"])
    torch.testing.assert_close(total, ((a1 / b1).sum() * N / 2).detach(), rtol=1e-10, atol=0)


def test_global_latents_groups_by_index_and_pooled_sites():
    """One global probability, rates by group that counts and waiting times share, and masked groups."""
    group, keep = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([True, True, False])

    def model():
        p = beta("p")
        with pyro.plate("group", 3), poutine.mask(mask=keep):
            rate = pyro.sample("rate", dist.Exponential(param("r", 0.8)))
        with pyro.plate("data", N), poutine.mask(mask=keep[group]):
            pyro.sample("count", dist.Poisson(2 * rate[..., group]), obs=COUNTS[0])
            pyro.sample("wait", dist.Exponential(rate[..., group]), obs=EXPONENTIAL[0])
            pyro.sample("coin", dist.Bernoulli(p), obs=BINARY[0])

    posterior = steps.Conjugate().infer(model, (), {})
    kept_ = keep[group].to(F64)
    sums = [torch.zeros(3, dtype=F64).index_add(0, group, kept_ * x) for x in (COUNTS[0] + 1, 2 + EXPONENTIAL[0])]
    r = pyro.param("r")
    same(posterior.marginal("rate"), dist.Gamma(1 + sums[0], r + sums[1]))
    coins = (kept_ * BINARY[0]).sum(), (kept_ * (1 - BINARY[0])).sum()
    same(posterior.marginal("p"), dist.Beta(pyro.param("a") + coins[0], pyro.param("b") + coins[1]))
    found = float(posterior.expected_log_joint(1).detach()) + posterior.entropy
    assert found == pytest.approx(posterior.log_evidence, rel=1e-10)
    a, b = pyro.param("a"), pyro.param("b")
    evidence = lbeta(a + coins[0], b + coins[1]) - lbeta(a, b)
    evidence = evidence + (r.log() + (1 + sums[0]).lgamma() - (1 + sums[0]) * (r + sums[1]).log())[keep].sum()
    evidence = evidence + (kept_ * (COUNTS[0] * math.log(2) - (COUNTS[0] + 1).lgamma())).sum()
    assert posterior.log_evidence == pytest.approx(float(evidence.detach()), rel=1e-10)
    leaves = [leaf for _, leaf in pyro.get_param_store()._params.items()]
    expected = torch.autograd.grad(evidence, leaves)
    torch.testing.assert_close(
        torch.autograd.grad(posterior.expected_log_joint(1), leaves), expected, rtol=1e-8, atol=1e-9
    )


def test_single_precision_and_many_data():
    x = torch.bernoulli(torch.full((10_000,), 0.3), generator=GENERATOR)

    def model(x):
        z = pyro.sample("z", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Bernoulli(z), obs=x)

    for dtype, rtol in ((torch.float32, 1e-4), (F64, 1e-10)):
        q = steps.Conjugate().infer(model, (x.to(dtype),), {}).marginal("z")
        same(q, dist.Beta((1 + x.sum()).to(dtype), (1 + (1 - x).sum()).to(dtype)), rtol)


# As a step ----------------------------------------------------------------------------------------------------------


def beta_binomial(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Binomial(8, beta()), obs=x)


def test_empirical_bayes_climbs_the_marginal_likelihood():
    x = number([1.0, 2.0, 5.0, 8.0, 7.0, 3.0, 0.0])
    em = EM(beta_binomial, None, pyro.optim.SGD({"lr": 0.02}), e_step="conjugate", m_step=steps.Gradient(5))
    losses = [em.step(x) for _ in range(40)]
    assert all(later <= sooner + 1e-10 for sooner, later in itertools.pairwise(losses))
    evidence = binomial_posterior(x[None], None)[1].sum()
    posterior = em.posterior(x)
    assert posterior.log_evidence == pytest.approx(float(evidence.detach()), rel=1e-10)
    estimate = log_evidence(beta_binomial, em.guide, x, num_particles=20, seed=0)
    assert estimate.value == pytest.approx(posterior.log_evidence, rel=1e-8) and estimate.standard_error < 1e-8


def test_closed_form_finds_the_maximum():
    x = number([3.0, 5.0, 1.0])

    def model(x):
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Poisson(pyro.sample("z", dist.Exponential(param("r", 2.0)))), obs=x)

    m_step = steps.ClosedForm(
        lambda v, x: {"n": torch.ones_like(x)[None], "z": v["z"]}, lambda s, params: {"r": s["n"] / s["z"]}
    )
    em = EM(model, e_step="conjugate", m_step=m_step)
    fit = em.run(x, max_iter=200)
    assert float(pyro.param("r").detach()) == pytest.approx(1 / float(x.mean()), rel=1e-4)
    assert fit.verdict is not None


def test_contract():
    def model(x):
        with pyro.plate("n", len(x)):
            pyro.sample(
                "x", dist.Normal(pyro.sample("z", dist.Normal(param("m", 0.0, constraints.real), 1.0)), 1.0), obs=x
            )

    em = EM(model, e_step=steps.Conjugate(), m_step=steps.Gradient(), optim=pyro.optim.Adam({"lr": 0.1}))
    before = torch.get_rng_state()
    em.step(number([1.0, 2.0]))
    assert torch.equal(torch.get_rng_state(), before)
    m = pyro.param("m").detach().clone()
    em.e_step.expect(em.engine, em.engine.state, number([1.0, 2.0]))
    assert torch.equal(pyro.param("m"), m)


# The user's formula -------------------------------------------------------------------------------------------------


def formula(params: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
    return {"z": dist.Beta(params["a"] + x, params["b"] + 8 - x)}


def test_the_users_posterior():
    x = counts(9, 4)
    found, expected = (steps.Conjugate(p).infer(beta_binomial, (x,), {}) for p in (formula, None))
    same(found.marginal("z"), expected.marginal("z"))
    assert found.log_evidence == pytest.approx(expected.log_evidence, rel=1e-12)


def test_the_users_posterior_of_another_family():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def posterior(params, x):
        return {"z": dist.MultivariateNormal(x / 2, torch.eye(2, dtype=F64) / 2)}

    x = NORMAL[:, :2]
    found = steps.Conjugate(posterior).infer(model, (x,), {})
    expected = dist.Normal(number(0.0), 2**0.5).log_prob(x).sum()
    assert found.log_evidence == pytest.approx(float(expected), rel=1e-12) and not found.is_exact
    assert found.support(7).values["z"].shape == (7, 3, 2)


@pytest.mark.parametrize(
    ("wrong", "observed"),
    [
        (lambda params, x: {"z": dist.Beta(params["a"] + x, params["b"] + 9 - x)}, r"varies by \d.* nats.*MonteCarlo"),
        (lambda params, x: {"y": dist.Beta(x, x)}, r"distributions for \['y'\]"),
        (lambda params, x: {"z": dist.Dirichlet(torch.ones(3))}, r"Dirichlet of shape \(3,\)"),
    ],
)
def test_a_wrong_formula_is_refused(wrong, observed):
    with pytest.raises(StepError, match=observed):
        steps.Conjugate(wrong).infer(beta_binomial, (number([1.0, 4.0]),), {})


def test_a_formula_has_to_be_callable():
    with pytest.raises(EmvaeError, match="got 3"):
        steps.Conjugate(3)


# Refusals -----------------------------------------------------------------------------------------------------------


def logit_normal():
    pyro.sample("x", dist.Bernoulli(logits=pyro.sample("z", dist.Normal(number(0.0), 1.0))), obs=number(1.0))


def log_normal():
    pyro.sample("x", dist.Poisson(pyro.sample("z", dist.LogNormal(number(0.0), 1.0))), obs=number(3.0))


def nearly():
    z = gamma()
    pyro.sample("x", dist.Poisson(z), obs=number(3.0))
    pyro.factor("f", 1e-3 * z.sqrt())


def interaction():
    pyro.sample("x", dist.Poisson(gamma("z") * gamma("y")), obs=number(3.0))


def elements_together():
    with pyro.plate("n", 3):
        z = gamma()
    pyro.sample("x", dist.Poisson(z.sum(-1)), obs=number(3.0))


def pareto():
    pyro.sample("z", dist.Pareto(1.0, 2.0))


def to_event():
    pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))


def discrete():
    pyro.sample("z", dist.Bernoulli(0.5))


def scales():
    z = beta()
    with pyro.plate("n", N, subsample=torch.tensor([0, 1])):
        pyro.sample("x", dist.Bernoulli(z), obs=number([0.0, 1.0]))


def nothing():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("model", "observed"),
    [
        (logit_normal, r"Normal.*(Laplace|MonteCarlo)"),
        (log_normal, r"Gamma.*(Laplace|MonteCarlo)"),
        (nearly, r"varies by \d.* nats"),
        (interaction, r"'z', 'y'"),
        (elements_together, r"Gamma"),
        (to_event, r"got Independent\(2,\)"),
        (pareto, r"got Pareto\(\)"),
        (discrete, r"got Bernoulli\(\)"),
        (scales, r"got scales 1, 2.5"),
        (nothing, "a model without latents"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refusals(model, observed):
    with pytest.raises(StepError, match=observed):
        steps.Conjugate().infer(model, (), {})


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
def test_a_batch_is_the_same_in_posterior_and_draws(drawn):
    index = None if drawn else torch.tensor([4, 1])

    def model():
        with pyro.plate("n", N, subsample_size=2, subsample=index) as rows:
            pyro.sample("x", dist.Poisson(gamma()), obs=COUNTS[0, rows])

    posterior = steps.Conjugate().infer(model, (), {})
    value = float(posterior.expected_log_joint(1).detach()) + posterior.entropy
    assert value == pytest.approx(posterior.log_evidence, rel=1e-10)
    particles = posterior.particles(3)
    weights = (particles.log_p - particles.log_q).detach()
    torch.testing.assert_close(weights, torch.full_like(weights, posterior.log_evidence), rtol=1e-10, atol=0)
    assert posterior.support(1).drawn == (("n",) if drawn else ())


def test_draws_of_the_mean_and_precision_have_the_posteriors_density():
    posterior = steps.Conjugate().infer(normal_gamma, (NORMAL,), {})
    particles = posterior.particles(4)
    weights = (particles.log_p - particles.log_q).detach()
    torch.testing.assert_close(weights, torch.full_like(weights, posterior.log_evidence), rtol=1e-10, atol=0)


def test_many_categories_are_drawn_and_their_evidence_is_exact():
    def model():
        z = pyro.sample("z", dist.Dirichlet(torch.full((7,), 0.5, dtype=F64)))
        pyro.sample("x", dist.Multinomial(probs=z, validate_args=False), obs=number([3.0, 0, 1, 0, 2, 5, 0]))

    posterior = steps.Conjugate().infer(model, (), {})
    assert not posterior.is_exact and posterior.support(9).values["z"].shape == (9, 7)
    value = float(posterior.expected_log_joint(1)) + posterior.entropy
    assert value == pytest.approx(posterior.log_evidence, rel=1e-10)


def test_a_marginal_of_no_latent_is_refused():
    with pytest.raises(StepError, match="'w'"):
        steps.Conjugate().infer(beta_binomial, (number([1.0]),), {}).marginal("w")


def test_a_refusal_leaves_everything_as_it_was():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Gamma(param("a", 2.0), 1.0))
            pyro.sample("x", dist.Poisson(z**power), obs=x)

    power, x = 1.0, number([1.0, 2.0])
    em = EM(model, e_step="conjugate", m_step=steps.Gradient(), optim=pyro.optim.Adam({"lr": 0.1}))
    em.step(x)
    power, before, generator = 2.0, pyro.param("a").detach().clone(), torch.get_rng_state()
    with pytest.raises(StepError, match=r"miss by .*\d"):
        em.step(x)
    assert torch.equal(pyro.param("a"), before) and torch.equal(torch.get_rng_state(), generator)


def test_an_e_step_leaves_modules_alone():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1), torch.nn.Dropout(0.5)
            ).double()

        def forward(self, features: Tensor, x: Tensor) -> None:
            rate = self.net(features).squeeze(-1).exp()
            with pyro.plate("n", len(x)):
                pyro.sample("x", dist.Poisson(rate * pyro.sample("z", dist.Gamma(number(2.0), 1.0))), obs=x)

    model, data = Model(), (NORMAL[:, :2], COUNTS[:, 0])
    em = EM(model, e_step="conjugate", m_step=steps.Gradient(), optim=pyro.optim.Adam({"lr": 0.1}))
    em.step(*data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    em.e_step.expect(em.engine, em.engine.state, *data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
