r"""Laplace's E-step with nodes about the mode: against trapezoidal sums, closed forms, and the same without nodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from pyro_emvae import EM, log_evidence, problems, standard_errors, steps
from pyro_emvae._checks import EmvaeError, NonFiniteError, StepError
from pyro_emvae.convergence import Deterministic
from pyro_emvae.posterior import QuadraturePosterior
from pyro_emvae.testing import check_step

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(3)
GROUPS, TRIALS = 30, 10.0
W = torch.linspace(-1.0, 1.0, GROUPS, dtype=F64)
U = 0.4 + 0.8 * W + 0.9 * torch.randn(GROUPS, generator=GENERATOR, dtype=F64)
Y = torch.binomial(torch.full_like(U, TRIALS), U.sigmoid(), generator=GENERATOR)
LINE = torch.linspace(-8.0, 8.0, 321, dtype=F64)  # the trapezoidal rule, for densities that vanish at both ends


def number(x: Any) -> Tensor:
    return torch.tensor(x, dtype=F64)


def theta() -> tuple[Tensor, Tensor, Tensor]:
    tau = pyro.param("tau", lambda: number(1.0), constraint=constraints.positive)
    return pyro.param("mu", lambda: number(0.0)), pyro.param("beta", lambda: number(0.0)), tau


def logit_normal(y: Tensor = Y, w: Tensor = W, seen: Any = None) -> None:
    mu, beta, tau = theta()
    with pyro.plate("groups", len(y)):
        u = pyro.sample("u", dist.Normal(mu + beta * w, tau))
        fn = dist.Binomial(number(TRIALS), logits=u)
        pyro.sample("y", fn if seen is None else fn.mask(seen), obs=y)


def subsampled(y: Tensor, w: Tensor, rows: Tensor) -> None:
    """The groups in `rows`, standing for all."""
    mu, beta, tau = theta()
    with pyro.plate("groups", GROUPS, subsample=rows) as i:
        u = pyro.sample("u", dist.Normal(mu + beta * w[i], tau))
        pyro.sample("y", dist.Binomial(number(TRIALS), logits=u), obs=y[i])


def per_group(values: Tensor, y: Tensor = Y, w: Tensor = W) -> Tensor:
    """log p(y) of each group, by the trapezoidal rule."""
    mu, beta, tau = values
    u = (mu + beta * w)[:, None] + tau * LINE
    log_p = dist.Binomial(number(TRIALS), logits=u).log_prob(y[:, None]) - 0.5 * LINE**2
    return log_p.logsumexp(-1) + math.log(0.05) - 0.5 * math.log(2 * math.pi)


def statistics(values: dict[str, Tensor], y: Tensor, w: Tensor, rows: Any = slice(None)) -> dict[str, Tensor]:
    u, w = values["u"], w[rows]
    fixed = {"n": torch.ones_like(w)[None], "w": w[None], "ww": w[None] ** 2}
    return fixed | {"u": u, "uw": u * w, "uu": u * u}


def update(s: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    beta = (s["n"] * s["uw"] - s["w"] * s["u"]) / (s["n"] * s["ww"] - s["w"] ** 2)
    mu = (s["u"] - beta * s["w"]) / s["n"]
    return {"mu": mu, "beta": beta, "tau": ((s["uu"] - mu * s["u"] - beta * s["uw"]) / s["n"]).sqrt()}


def em_on(num_nodes: int, m_step: Any = None, model: Any = logit_normal) -> EM:
    m_step = steps.ClosedForm(statistics, update) if m_step is None else m_step
    return EM(model, e_step=steps.Laplace(num_nodes=num_nodes), m_step=m_step)


@pytest.fixture(scope="module")
def maximum() -> tuple[Tensor, Tensor]:
    """The maximum of the likelihood and its Hessian there, by Newton's method on the trapezoidal rule."""
    values = number([0.4, 0.8, 0.9])
    for _ in range(20):
        curvature = hessian(lambda v: per_group(v).sum(), values)
        values = values - torch.linalg.solve(curvature, jacobian(lambda v: per_group(v).sum(), values))
    return values, curvature


def values_of(fit: Any) -> Tensor:
    return torch.stack([fit.params[name] for name in ("mu", "beta", "tau")])


# The integral ---------------------------------------------------------------------------------------------------------


def test_check_step_finds_nothing():
    check_step(steps.Laplace(num_nodes=3), "E")
    check_step(steps.Laplace(num_nodes=2), "E", problem=problems.normal_normal())


def test_the_error_falls_geometrically_in_the_number_of_nodes():
    r"""ELBO after E, $E[\log p]+H$, is the log evidence for every n, and its gap to log p(x) dies out."""
    exact = float(per_group(number([0.0, 0.0, 1.0])).sum())
    gaps = []
    for n in (1, 3, 5, 7, 9, 11, 13):
        posterior = steps.Laplace(num_nodes=n).infer(logit_normal, (), {})
        bound = float(posterior.expected_log_joint(1).detach()) + posterior.entropy
        assert n == 1 or bound == pytest.approx(posterior.log_evidence, abs=1e-10)
        gaps.append(abs(posterior.log_evidence - exact))
    assert gaps[0] > 0.3 and gaps[-1] < 1e-6
    assert all(after < 0.3 * before for before, after in itertools.pairwise(gaps))


def test_the_error_falls_with_the_observations_of_a_latent_at_the_known_order():
    r"""Of the order $m^{-k}$ with $k=\lfloor(n+2)/3\rfloor$: from m = 320 to 1,280 observations by $4^k$."""

    def evidence(m: float, n: int) -> float:
        def model():
            u = pyro.sample("u", dist.Normal(number(0.0), 1.0))
            pyro.sample("y", dist.Binomial(number(m), logits=u), obs=number(0.3 * m))

        return steps.Laplace(num_nodes=n).infer(model, (), {}).log_evidence

    for n in (1, 3, 4, 6, 7):
        few, many = (abs(evidence(m, n) - evidence(m, 25)) for m in (320.0, 1280.0))
        assert math.log(few / many) / math.log(4) == pytest.approx((n + 2) // 3, abs=0.15)


def test_expectations_are_those_of_the_posterior():
    posterior = steps.Laplace(num_nodes=20).infer(logit_normal, (), {})
    log_p = dist.Binomial(number(TRIALS), logits=LINE[:, None]).log_prob(Y) - 0.5 * LINE[:, None] ** 2
    weights = log_p.softmax(0)
    for power in (1, 2, 3, 4):
        expected = (weights * LINE[:, None] ** power).sum(0)
        found = posterior.expect(lambda values, p=power: values["u"] ** p)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert posterior.support(1).log_weights.shape == (20, GROUPS) and not posterior.support(1).sampled
    assert not posterior.is_exact and posterior.kind == "quadrature"
    at_mode = steps.Laplace().infer(logit_normal, (), {})
    torch.testing.assert_close(posterior.marginal("u").mean, at_mode.marginal("u").mean)


def test_a_constrained_latent_by_its_logarithm():
    counts = number([0.0, 3.0, 1.0, 12.0, 0.0, 5.0])

    def gamma():
        with pyro.plate("n", 6):
            rate = pyro.sample("rate", dist.Gamma(number(3.0), number(2.0)))
            pyro.sample("y", dist.Poisson(rate), obs=counts)

    posterior = steps.Laplace(num_nodes=20).infer(gamma, (), {})
    exact = dist.GammaPoisson(number(3.0), number(2.0)).log_prob(counts).sum()
    assert posterior.log_evidence == pytest.approx(float(exact), abs=1e-5)
    torch.testing.assert_close(posterior.expect(lambda v: v["rate"]), (counts + 3) / 3, rtol=1e-5, atol=0)
    bound = float(posterior.expected_log_joint(1)) + posterior.entropy
    assert bound == pytest.approx(posterior.log_evidence, abs=1e-10)


def slopes(y: Tensor = Y) -> None:
    """Two correlated coordinates per group, and observations in a plate inside."""
    x = torch.linspace(-1.0, 1.0, 6, dtype=F64)
    ones = (y[:, None] > torch.arange(6) + 2).to(F64)
    with pyro.plate("groups", len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(theta()[0], 1.0))
        b = pyro.sample("b", dist.Normal(0.5 * a, 0.7))
        with pyro.plate("inside", 6, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=ones)


def test_a_grid_of_two_coordinates_in_nested_plates():
    found = [steps.Laplace(num_nodes=n).infer(slopes, (), {}) for n in (7, 15)]
    exact = log_evidence(slopes, None, method="quadrature", num_particles=200, seed=0).value
    assert found[1].log_evidence == pytest.approx(exact, abs=1e-3)
    assert abs(found[0].log_evidence - found[1].log_evidence) < 1e-3
    support = found[0].support(1)
    assert support.log_weights.shape == (49, GROUPS, 1) and support.values["b"].shape == (49, GROUPS, 1)
    assert support.total(lambda v: torch.ones_like(v["a"])) == pytest.approx(GROUPS, abs=1e-10)


def common(y: Tensor = Y[:3]) -> None:
    """A latent that all groups share, so that all is one block of four coordinates."""
    shift = pyro.sample("shift", dist.Normal(theta()[0], 0.5))
    with pyro.plate("groups", 3):
        u = pyro.sample("u", dist.Normal(shift, 1.0))
        pyro.sample("y", dist.Binomial(number(TRIALS), logits=u), obs=y)


def test_latents_that_depend_on_each_other_are_one_grid():
    posterior = steps.Laplace(num_nodes=9).infer(common, (), {})
    outer = torch.linspace(-4.0, 4.0, 161, dtype=F64)  # shift, with its three groups integrated by the rule above
    inner = torch.stack([per_group(number([s, 0.0, 1.0]), Y[:3], W[:3]).sum() for s in outer])
    exact = (inner + dist.Normal(0.0, 0.5).log_prob(outer)).logsumexp(0) + math.log(0.05)
    assert posterior.log_evidence == pytest.approx(float(exact), abs=1e-5)
    assert posterior.support(1).log_weights.shape == (9**4, 1)


def test_nodes_one_by_one_where_the_model_takes_no_more():
    def model(y):
        with pyro.plate("groups", 3):
            u = pyro.sample("u", dist.Normal(theta()[0], 1.0))
        pyro.sample("y", dist.Bernoulli(logits=u.sum(-1)), obs=y)  # of a batch of values too, adds up a plate

    with pytest.warns(UserWarning, match="one by one"):
        posterior = steps.Laplace(num_nodes=9).infer(model, (number(1.0),), {})
    assert posterior.log_evidence == pytest.approx(math.log(0.5), abs=1e-6)
    bound = posterior.expected_log_joint(1)
    (slope,) = torch.autograd.grad(bound, [pyro.param("mu").unconstrained()])
    assert float(bound.detach()) + posterior.entropy == pytest.approx(math.log(0.5), abs=1e-6)
    u = 3**0.5 * LINE
    exact = 3 * (torch.softmax(-0.5 * LINE**2, 0) * u.sigmoid() * (1 - u.sigmoid())).sum() / 0.5
    assert float(slope) == pytest.approx(float(exact), abs=1e-5)


# Parts of the data ----------------------------------------------------------------------------------------------------


def test_missing_values_by_masks():
    seen = torch.arange(GROUPS) % 3 != 0
    posterior = steps.Laplace(num_nodes=15).infer(logit_normal, (torch.where(seen, Y, 0.0), W, seen), {})
    exact = per_group(number([0.0, 0.0, 1.0]))[seen].sum()
    assert posterior.log_evidence == pytest.approx(float(exact), abs=1e-6)
    second = posterior.expect(lambda v: v["u"] ** 2)[~seen]
    torch.testing.assert_close(second, torch.ones_like(second), rtol=1e-10, atol=0)  # the prior's


def test_a_minibatch_stands_for_all_data():
    rows = torch.tensor([4, 17, 8, 20, 3])
    batch = steps.Laplace(num_nodes=7).infer(subsampled, (Y, W, rows), {})
    alone = steps.Laplace(num_nodes=7).infer(logit_normal, (Y[rows], W[rows]), {})
    assert batch.log_evidence == pytest.approx(6 * alone.log_evidence, abs=1e-9)
    assert batch.entropy == pytest.approx(6 * alone.entropy, abs=1e-9)
    pairs = [p.support(1).total(lambda v: {"u": v["u"], "uu": v["u"] ** 2}) for p in (batch, alone)]
    for name, total in pairs[0].items():
        assert float(total) == pytest.approx(6 * float(pairs[1][name]), rel=1e-10)


def test_a_weight_per_datum_multiplies_its_evidence():
    weights = torch.linspace(0.5, 3.0, GROUPS, dtype=F64)
    posterior = steps.Laplace(num_nodes=15).infer(poutine.scale(logit_normal, scale=weights), (), {})
    exact = (weights * per_group(number([0.0, 0.0, 1.0]))).sum()
    assert posterior.log_evidence == pytest.approx(float(exact), abs=1e-6)
    bound = float(posterior.expected_log_joint(1).detach()) + posterior.entropy
    assert bound == pytest.approx(posterior.log_evidence, abs=1e-10)


def test_averaged_statistics_of_minibatches_come_near_the_maximum(maximum):
    def halves() -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            for rows in torch.randperm(GROUPS, generator=generator).split(GROUPS // 2):
                yield Y, W, rows

    m_step = steps.Averaged(steps.ClosedForm(statistics, update), rate=0.7)
    fit = em_on(7, m_step, subsampled).run(data=halves(), stop=None, progress_bar=False)
    best, curvature = maximum
    spread = torch.linalg.inv(-curvature).diagonal().sqrt()
    assert ((values_of(fit) - best).abs() / spread).max() < 0.05


# EM -------------------------------------------------------------------------------------------------------------------


def test_em_rises_to_the_maximum_of_the_likelihood(maximum):
    """With one node it falls, and ends elsewhere."""
    best, curvature = maximum
    spread = torch.linalg.inv(-curvature).diagonal().sqrt()
    fit = em_on(15).run(Y, W, max_iter=100, stop=None, progress_bar=False)
    trace = fit.history["objective"].values
    assert (trace[1:] - trace[:-1]).min() >= -1e-11 and trace[-1] > trace[0] + 1.0
    assert trace[-1] == pytest.approx(float(per_group(best).sum()), abs=1e-6)
    assert ((values_of(fit) - best).abs() / spread).max() < 1e-5
    pyro.clear_param_store()
    fit = em_on(1).run(Y, W, max_iter=40, stop=None, progress_bar=False)
    trace = fit.history["objective"].values
    assert (trace[1:] - trace[:-1]).min() < -1e-4
    assert ((values_of(fit) - best).abs() / spread).max() > 0.1


def test_the_run_ends_by_the_rule_for_runs_without_noise(maximum):
    fit = em_on(9).run(Y, W, max_iter=500, stop=Deterministic(tol=1e-8), history="full", progress_bar=False)
    assert fit.status == "CONVERGED"
    torch.testing.assert_close(values_of(fit), maximum[0], rtol=0, atol=1e-3)
    gains = fit.history["m_gain"].values
    assert (gains >= -1e-9).all()


def test_an_m_step_by_gradients_climbs_the_same_likelihood(maximum):
    fit = em_on(9, steps.LBFGS()).run(Y, W, max_iter=30, stop=None, progress_bar=False)
    torch.testing.assert_close(values_of(fit), maximum[0], rtol=0, atol=2e-3)


# Cases of pleuropneumonia among the animals of 15 herds in four periods, of Lesnoff et al. 2004: data `cbpp` of lme4.
ILL = """2 3 4 0  3 1 1 0  8 2 0 2  2 0 2 0  5 0 0 1  3 0 0 1  8 1 3 0  12 0 0 0
    2 0 0 0  1 1 0 2  0 5 3 1  2 1 0 0  1 2 0 0  11 0 0 0  1 1 1 0"""
HERDS = """14 12 9 5  22 18 21 0  22 16 16 20  10 10 9 6  18 25 24 4  17 17 18 20  16 10 9 5  34 0 0 0
    9 6 8 6  22 22 18 22  25 27 22 22  10 8 6 5  21 24 19 23  19 2 3 2  19 15 15 15"""


def herds(ill: Tensor, animals: Tensor) -> None:
    b = pyro.param("b", lambda: torch.zeros(4, dtype=F64))
    tau = pyro.param("tau", lambda: number(1.0), constraint=constraints.positive)
    with pyro.plate("herds", len(ill), dim=-2):
        u = pyro.sample("u", dist.Normal(number(0.0), 1.0))
        with pyro.plate("periods", 4, dim=-1):
            logits = b[0] + b * number([0.0, 1.0, 1.0, 1.0]) + tau * u
            pyro.sample("y", dist.Binomial(animals, logits=logits).mask(animals > 0), obs=ill)


PUBLISHED = {  # coefficients and deviance: glmmML, and lme4, as in the tests of lme4
    10: ([-1.39924138019006, -0.991381753243723, -1.12782730029348, -1.57948092000465], 100.010029977086),
    25: ([-1.39922533406847, -0.991407294757321, -1.12782184600404, -1.57946627431248], 100.010030538022),
}


@pytest.mark.parametrize("num_nodes", PUBLISHED)
def test_a_mixed_model_of_herds_equals_published_fits(num_nodes):
    ill, animals = (number([float(x) for x in text.split()]).reshape(15, 4) for text in (ILL, HERDS))
    em = EM(herds, e_step=steps.Laplace(num_nodes=num_nodes), m_step=steps.LBFGS())
    fit = em.run(ill, animals, max_iter=40, stop=None, progress_bar=False)
    coefficients, deviance = PUBLISHED[num_nodes]
    seen = animals > 0
    saturated = dist.Binomial(animals[seen], probs=(ill / animals)[seen]).log_prob(ill[seen]).sum()
    found = -2 * (em.posterior(ill, animals).log_evidence - float(saturated))
    assert found == pytest.approx(deviance, abs=2e-8)
    torch.testing.assert_close(fit.params["b"], number(coefficients), rtol=0, atol=5e-5)


# After a fit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fit() -> Any:
    pyro.clear_param_store()
    return em_on(15).run(Y, W, max_iter=120, stop=None, progress_bar=False)


@pytest.mark.parametrize("method", [None, "louis", "hessian"])
def test_standard_errors_are_those_of_the_likelihood(fit, maximum, method):
    _, curvature = maximum
    found = standard_errors(fit, Y, W, method=method)
    expected = torch.linalg.inv(-curvature)
    order = [[name for name, _ in found.places].index(name) for name in ("mu", "beta", "tau")]
    torch.testing.assert_close(found.covariance[order][:, order], expected, rtol=1e-4, atol=1e-6)
    assert found.kind == "quadrature" and found.method == (method or "louis")
    table = fit.summary(found)
    spread = dict(zip(table["parameter"], table["standard_error"], strict=True))
    assert spread["tau"] == pytest.approx(float(expected[2, 2] ** 0.5), rel=1e-4)
    assert found.monte_carlo_error.isnan().all()


def test_scores_per_datum_are_those_of_the_likelihood(fit, maximum):
    scores = jacobian(per_group, maximum[0])
    expected = torch.linalg.inv(scores.mT @ scores)
    found = standard_errors(fit, Y, W, method="opg")
    assert float(found["beta"]) == pytest.approx(float(expected[1, 1] ** 0.5), rel=1e-4)


def test_the_hessian_serves_where_latents_are_one_grid():
    m_step = steps.ClosedForm(lambda v, y: {"mu": v["shift"]}, lambda s, _: {"mu": s["mu"]})
    fit = em_on(5, m_step, common).run(Y[:3], max_iter=60, stop=None, progress_bar=False)
    outer = torch.linspace(-4.0, 4.0, 161, dtype=F64)
    inner = torch.stack([per_group(number([s, 0.0, 1.0]), Y[:3], W[:3]).sum() for s in outer])

    def evidence(mu: Tensor) -> Tensor:
        return (inner + dist.Normal(mu, 0.5).log_prob(outer)).logsumexp(0)

    found = standard_errors(fit, Y[:3], method="hessian")
    exact = (-hessian(evidence, fit.params["mu"])).rsqrt()
    assert float(found["mu"]) == pytest.approx(float(exact), rel=1e-4)


def test_the_guide_draws_from_the_gaussian_at_the_mode():
    em = em_on(15)
    em.step(Y, W)
    posterior = em.posterior(Y, W)
    assert isinstance(posterior, QuadraturePosterior)
    weighted = log_evidence(em.model, em.guide, Y, W, num_particles=2000, seed=0)
    assert abs(weighted.value - posterior.log_evidence) < 5 * weighted.standard_error + 0.01
    lattice = log_evidence(em.model, em.guide, Y, W, method="quadrature", seed=0)
    assert lattice.value == pytest.approx(posterior.log_evidence, abs=lattice.standard_error)
    draws = posterior.particles(4)
    q = posterior.marginal("u")
    torch.testing.assert_close(draws.log_q, q.log_prob(draws.latents["u"].value).sum(-1))


def test_new_data():
    em = em_on(15)
    fit = em.run(Y, W, max_iter=3, progress_bar=False)
    new = em.posterior(Y[:4], W[:4])
    assert new.log_evidence == pytest.approx(float(per_group(values_of(fit), Y[:4], W[:4]).sum()), abs=1e-6)


def test_single_precision():
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    x = torch.tensor([0.0, 2.0, 5.0])
    found = [steps.Laplace(num_nodes=9).infer(model, (x.to(kind),), {}) for kind in (torch.float32, F64)]
    assert found[0].support(1).log_weights.dtype == torch.float32
    assert found[0].log_evidence == pytest.approx(found[1].log_evidence, abs=1e-5)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "9", 101])
def test_numbers_of_nodes_that_make_no_sense(value):
    with pytest.raises(EmvaeError, match=rf"num_nodes.*got {value!r}\."):
        steps.Laplace(num_nodes=value)


def test_a_grid_that_is_too_large_says_how_large():
    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 6), 1.0).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=z.sum(-1)), obs=torch.ones(2))

    with pytest.raises(StepError, match=r"'z'.*9\*\*6 = 531441 nodes.*num_nodes=4.*MonteCarlo\(\"importance\"\)"):
        steps.Laplace(num_nodes=9).infer(model, (), {})
    assert math.isfinite(steps.Laplace(num_nodes=4).infer(model, (), {}).log_evidence)
    for width, size in ((20, "1048576"), (1500, "1e452")):
        wide = dist.Normal(torch.zeros(width), 1.0).to_event(1)
        with pytest.raises(StepError, match=rf"2\*\*{width} = {size} nodes.*num_nodes=1,"):
            steps.Laplace(num_nodes=2).infer(lambda fn=wide: pyro.sample("z", fn), (), {})


def test_a_refused_e_step_changes_nothing():
    em = em_on(9)
    em.step(Y, W)
    before, own = em.blocks.constrained(), em.engine.state.steps["E"]
    em.e_step.num_nodes = 20_000
    with pytest.raises(StepError, match=r"20000\*\*1 = 20000 nodes"):
        em.step(Y, W)
    assert all(torch.equal(v, before[n]) for n, v in em.blocks.constrained().items())
    assert em.engine.state.steps["E"] is own


def test_a_density_that_is_not_finite_at_a_node():
    def model():
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0))
            pyro.factor("f", -0.1 * (number([90.0, 2.0, 90.0]) - z.square()).clamp(min=0.0).log())

    with pytest.raises(NonFiniteError, match=r"'z'.*inf at node \d of block 1"):
        steps.Laplace(num_nodes=5).infer(model, (), {})


def test_two_nodes_are_too_few_for_products_of_scores():
    fit = em_on(2).run(Y, W, max_iter=3, stop=None, progress_bar=False)
    for method in ("louis", "hessian", "opg"):
        with pytest.raises(StepError, match=r"num_nodes=2.*num_nodes=3"):
            standard_errors(fit, Y, W, method=method)


def test_data_that_depend_on_each_other_have_no_scores_of_their_own():
    m_step = steps.ClosedForm(lambda v, y: {"mu": v["shift"]}, lambda s, _: {"mu": s["mu"]})
    fit = em_on(3, m_step, common).run(Y[:3], max_iter=2, stop=None, progress_bar=False)
    with pytest.raises(StepError, match=r'depend on each other.*method="hessian"'):
        standard_errors(fit, Y[:3], method="louis")


def test_a_discrete_latent_is_refused():
    def model():
        pyro.sample("k", dist.Bernoulli(number(0.5)))

    with pytest.raises(StepError, match=r"'k'.*Bernoulli\(\)"):
        steps.Laplace(num_nodes=5).infer(model, (), {})
