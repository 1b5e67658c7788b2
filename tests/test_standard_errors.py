"""Standard errors against closed forms and Hessians of likelihoods written by hand."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.autograd.functional import hessian as hessian_of
from torch.autograd.functional import jacobian
from torch.distributions import transform_to
from torch.nn.functional import one_hot

import pyro_emvae as emvae
from pyro_emvae import EM, EmvaeError, StepError, problems, standard_errors, steps
from pyro_emvae.parameters import assign
from pyro_emvae.posterior import CompleteData
from pyro_emvae.uncertainty import information
from pyro_emvae.uncertainty.coordinates import coordinates
from pyro_emvae.uncertainty.information import Problem

F64 = torch.float64
COUNT = 20
X = torch.randn(COUNT, generator=torch.Generator().manual_seed(1), dtype=F64) * 2**0.5 + 3.0


def mean_model(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros((), dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mean_em(model: Any = mean_model, e_step: Any = None) -> EM:
    m_step = steps.ClosedForm(
        lambda v, x: {"z": v["z"], "n": torch.ones_like(x)[None]}, lambda s, _: {"loc": s["z"] / s["n"]}
    )
    return EM(model, e_step=e_step or steps.Gaussian(), m_step=m_step)


def mean_fit(x: Tensor = X, **options: Any) -> Any:
    return mean_em(**options).run(x, max_iter=60, stop=None)


# A mixture of two normals ---------------------------------------------------------------------------------------------

G = torch.Generator().manual_seed(0)
MIX = torch.cat([torch.randn(40, generator=G, dtype=F64) - 2, 0.8 * torch.randn(60, generator=G, dtype=F64) + 1.5])
NAMES = ("weights", "loc", "scale")
SUPPORTS = {"weights": constraints.simplex, "loc": constraints.real, "scale": constraints.positive}


def mixture(x: Tensor, mask: Tensor | None = None) -> None:
    weights, loc, scale = (pyro.param(n, maximum()[n].to(x.dtype).clone(), constraint=SUPPORTS[n]) for n in NAMES)
    with pyro.plate("data", len(x)), poutine.mask(mask=True if mask is None else mask):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def statistics(values: dict[str, Tensor], x: Tensor, *_: Any) -> dict[str, Tensor]:
    r = one_hot(values["z"], 2).to(x)
    return {"n": r, "x": r * x[:, None], "xx": r * x[:, None] ** 2}


def update(s: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    loc = s["x"] / s["n"]
    return {"weights": s["n"] / s["n"].sum(), "loc": loc, "scale": (s["xx"] / s["n"] - loc**2).sqrt()}


def mixture_em(e_step: Any = None) -> EM:
    return EM(mixture, e_step=e_step or steps.Enumerated(), m_step=steps.ClosedForm(statistics, update))


def mixture_log_p(theta: Tensor, x: Tensor) -> Tensor:
    """log p(x_n) at theta = (first weight, two means, two scales): (N,)."""
    weights = torch.stack([theta[0], 1 - theta[0]])
    return (weights.log() + dist.Normal(theta[1:3], theta[3:5]).log_prob(x[:, None])).logsumexp(-1)


@functools.cache
def maximum() -> dict[str, Tensor]:
    """The maximum of the likelihood, by Newton's method."""
    theta = torch.tensor([0.4, -1.9, 1.5, 0.95, 0.8], dtype=F64)
    for _ in range(12):
        gradient, hessian = (f(lambda t: mixture_log_p(t, MIX).sum(), theta) for f in (jacobian, hessian_of))
        theta = theta - torch.linalg.solve(hessian, gradient)
    return {"weights": torch.stack([theta[0], 1 - theta[0]]), "loc": theta[1:3], "scale": theta[3:]}


def mixture_theta(fit: Any) -> Tensor:
    return torch.cat([fit.params["weights"][:1], fit.params["loc"], fit.params["scale"]])


def free(errors: Any) -> Tensor:
    """The standard errors of theta; both weights have the same."""
    torch.testing.assert_close(errors["weights"][0], errors["weights"][1])
    return torch.cat([errors["weights"][:1], errors["loc"], errors["scale"]])


@pytest.fixture
def mixed() -> Any:
    return mixture_em().run(MIX, max_iter=1, stop=None)


def information_by_hand(fit: Any) -> Tensor:
    return -hessian_of(lambda t: mixture_log_p(t, MIX).sum(), mixture_theta(fit))


def scores_by_hand(fit: Any) -> Tensor:
    return jacobian(lambda t: mixture_log_p(t, MIX), mixture_theta(fit))


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hessian", "louis", None])
def test_a_normal_mean(method):
    errors = standard_errors(mean_fit(), X, method=method)
    assert errors.kind == "exact" and errors.status == ("",) and errors.note == ""
    torch.testing.assert_close(errors["loc"], torch.tensor(math.sqrt(2 / COUNT), dtype=F64), rtol=1e-9, atol=0)


def test_a_normal_mean_by_outer_products_and_in_a_sandwich():
    fit = mean_fit()
    squares = ((X - fit.params["loc"]) / 2).square().sum()
    opg = standard_errors(fit, X, method="opg")
    torch.testing.assert_close(opg["loc"], squares.rsqrt(), rtol=1e-10, atol=0)
    for method in ("hessian", "louis"):
        found = standard_errors(fit, X, method=method, sandwich=True)
        torch.testing.assert_close(found["loc"], squares.sqrt() * 2 / COUNT, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["hessian", "louis"])
def test_a_mixture_against_its_likelihood(mixed, method):
    covariance = torch.linalg.inv(information_by_hand(mixed))
    errors = standard_errors(mixed, MIX, method=method)
    torch.testing.assert_close(free(errors), covariance.diagonal().sqrt(), rtol=1e-8, atol=0)
    places = [0, 2, 3, 4, 5]
    torch.testing.assert_close(errors.covariance[places][:, places], covariance, rtol=1e-7, atol=1e-10)


def test_a_mixture_by_outer_products_and_in_a_sandwich(mixed):
    outer, bread = scores_by_hand(mixed).mT @ scores_by_hand(mixed), torch.linalg.inv(information_by_hand(mixed))
    found = free(standard_errors(mixed, MIX, method="opg"))
    torch.testing.assert_close(found, torch.linalg.inv(outer).diagonal().sqrt(), rtol=1e-8, atol=0)
    found = free(standard_errors(mixed, MIX, method="hessian", sandwich=True))
    torch.testing.assert_close(found, (bread @ outer @ bread).diagonal().sqrt(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("method", ["hessian", "louis", "opg"])
def test_a_scale_counts_every_datum_that_often(mixed, factor, method):
    plain = standard_errors(mixed, MIX, method=method)
    scaled = EM(poutine.scale(mixture, scale=factor), e_step=steps.Enumerated(), m_step=mixture_em().m_step)
    again = standard_errors(scaled.run(MIX, max_iter=1, stop=None), MIX, method=method)
    torch.testing.assert_close(free(again), free(plain) / factor**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["hessian", "louis", "opg"])
def test_masked_data_do_not_count(mixed, method):
    plain = standard_errors(mixed, MIX, method=method)
    x, mask = torch.cat([MIX, torch.tensor([50.0, -9.0], dtype=F64)]), torch.ones(102, dtype=torch.bool)
    mask[100:] = False
    masked = standard_errors(mixture_em().run(x, mask, max_iter=1, stop=None), x, mask, method=method)
    torch.testing.assert_close(free(masked), free(plain), rtol=1e-6, atol=0)


# Probabilistic PCA ----------------------------------------------------------------------------------------------------


def pca_fit(problem: Any) -> Any:
    with torch.no_grad():
        problem.model(*problem.args)
    em = EM(
        problem.model, e_step=steps.Gaussian(), m_step=steps.ClosedForm(lambda v, x: {"n": x[None]}, lambda s, p: p)
    )
    em.run(*problem.args, max_iter=1, stop=None)
    assign(em.engine.parameters, problem.maximum())
    return em.run(*problem.args, max_iter=1, stop=None)


def pca_covariance(problem: Any, fit: Any) -> Tensor:
    """Of bias and sigma, by the Hessian of the exact evidence; the weights' rotation is projected out."""
    names = ("weight", "bias", "sigma")
    sizes = [fit.params[n].numel() for n in names]

    def log_p(flat: Tensor) -> Tensor:
        parts = [p.reshape(fit.params[n].shape) for n, p in zip(names, flat.split(sizes), strict=True)]
        return problem.log_evidence(dict(zip(names, parts, strict=True)))

    flat = torch.cat([fit.params[n].flatten() for n in names])
    return torch.linalg.pinv(-hessian_of(log_p, flat), rtol=1e-9, hermitian=True)


@pytest.mark.parametrize("method", ["hessian", "louis"])
def test_pca_against_the_exact_evidence(method):
    problem = problems.linear_gaussian()
    fit = pca_fit(problem)
    errors = standard_errors(fit, *problem.args, method=method)
    found = torch.cat([errors["bias"], errors["sigma"].reshape(1)])
    expected = pca_covariance(problem, fit).diagonal()[6:].sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert errors["weight"].isnan().all()
    assert {status for (name, _), status in zip(errors.places, errors.status, strict=True) if name == "weight"} == {
        "undefined: not identified, the information is singular"
    }
    assert errors.covariance[-4:, -4:].isfinite().all() and errors.covariance[:6].isnan().all()


def test_louis_equals_the_hessian_where_both_are_exact(mixed):
    problem = problems.linear_gaussian()
    for fit, args in ((mixed, (MIX,)), (pca_fit(problem), problem.args)):
        pair = [standard_errors(fit, *args, method=m).covariance for m in ("hessian", "louis")]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(
    "e_step", [steps.Conjugate(), steps.MeanField(), steps.Laplace(), steps.Laplace(num_nodes=3)], ids=str
)
def test_nodes_are_no_draws(e_step):
    """Where these E-steps are exact too, so is Louis's formula on their nodes: no correction for a number of draws."""
    found = standard_errors(mean_fit(e_step=e_step), X, method="louis")
    assert float(found["loc"]) == pytest.approx((2 / COUNT) ** 0.5, rel=1e-8)
    assert found.monte_carlo_error.isnan().all()


def test_louis_after_mean_field_on_a_mixture_is_that_of_the_exact_posterior(mixed):
    """One latent per datum: the best product is the posterior."""
    pyro.clear_param_store()
    fit = mixture_em(steps.MeanField()).run(MIX, max_iter=1, stop=None)
    pair = [standard_errors(f, MIX, method="louis").covariance for f in (fit, mixed)]
    torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 6])
def test_products_of_scores_are_exact_in_any_number_of_dims(width):
    """From five coordinates on, some weights of the cubature are negative."""
    generator = torch.Generator().manual_seed(width)
    loading = torch.randn(7, width, generator=generator, dtype=F64)
    x = torch.randn(30, width, generator=generator, dtype=F64) @ loading.T
    x = x + torch.randn(30, 7, generator=generator, dtype=F64)

    def model(x: Tensor) -> None:
        size = pyro.param("size", torch.ones((), dtype=F64), constraint=constraints.positive)
        noise = pyro.param("noise", torch.ones(7, dtype=F64), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(width), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(size * (z @ loading.T), noise).to_event(1), obs=x)

    def log_p(u: Tensor) -> Tensor:
        covariance = u[0].exp() ** 2 * loading @ loading.T + torch.diag((2 * u[1:]).exp())
        return dist.MultivariateNormal(x.new_zeros(7), covariance).log_prob(x).sum()

    em = EM(model, e_step=steps.Gaussian(), m_step=steps.ClosedForm(lambda v, x: {"n": x[None]}, lambda s, p: p))
    fit = em.run(x, max_iter=1, stop=None)
    problem = Problem(coordinates(fit), em.posterior, (x,), {}, 1, 0)
    posterior = problem.posterior()
    found = problem.complete(posterior).louis()[0]
    order = [row.name for row in problem.coordinates.rows]
    assert order == ["size", "noise"] or order == ["noise", "size"]
    place = [0, *range(1, 8)] if order[0] == "size" else [7, *range(7)]
    expected = -hessian_of(log_p, x.new_zeros(8))
    torch.testing.assert_close(found[place][:, place], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(problem.hessian(posterior), found, rtol=1e-6, atol=1e-6)


# Random effects -------------------------------------------------------------------------------------------------------

GROUPS, SIZE = 40, 5
EFFECTS = ("mu", "beta", "tau", "sigma")


def mixed_data(seed: int, tau: float = 0.8) -> tuple[Tensor, Tensor]:
    """Responses and covariates of groups that share an intercept."""
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, GROUPS, SIZE, generator=g, dtype=F64)
    return 1.0 + tau * torch.randn(GROUPS, 1, generator=g, dtype=F64) - 0.5 * x + noise, x


def random_intercept(y: Tensor, x: Tensor) -> None:
    mu, beta = (pyro.param(n, torch.zeros((), dtype=F64)) for n in EFFECTS[:2])
    tau, sigma = (pyro.param(n, torch.ones((), dtype=F64), constraint=constraints.positive) for n in EFFECTS[2:])
    with pyro.plate("groups", len(y)):
        u = pyro.sample("u", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(u[..., None] + beta * x, sigma).to_event(1), obs=y)


def effect_statistics(values: dict[str, Tensor], y: Tensor, x: Tensor) -> dict[str, Tensor]:
    u = values["u"]
    drawn = {"u": u, "uu": u * u, "ux": u * x.sum(-1), "uy": u * y.sum(-1)}
    fixed = {"xx": x.square().sum(-1), "xy": (x * y).sum(-1), "yy": y.square().sum(-1), "n": torch.ones(len(x)).to(x)}
    return drawn | {name: value[None] for name, value in fixed.items()}


def effect_update(s: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    mu, beta = s["u"] / s["n"], (s["xy"] - s["ux"]) / s["xx"]
    rest = s["yy"] + SIZE * s["uu"] + beta**2 * s["xx"] - 2 * s["uy"] - 2 * beta * (s["xy"] - s["ux"])
    variances = s["uu"] / s["n"] - mu**2, rest / (SIZE * s["n"])
    return dict(zip(EFFECTS, (mu, beta, *(v.sqrt() for v in variances)), strict=True))


def effects_em() -> EM:
    return EM(random_intercept, e_step=steps.Gaussian(), m_step=steps.ClosedForm(effect_statistics, effect_update))


def effects_log_p(theta: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """log p(y) at theta = (mu, beta, tau, sigma), normal with a covariance per group: (G,)."""
    mu, beta, tau, sigma = theta
    covariance = sigma**2 * torch.eye(y.shape[-1], dtype=F64) + tau**2
    return dist.MultivariateNormal(mu + beta * x, covariance).log_prob(y)


def of_effects(errors: Any) -> Tensor:
    return torch.stack([errors[name] for name in EFFECTS])


@pytest.mark.parametrize("method", ["hessian", "louis", "opg"])
def test_random_intercepts_against_their_marginal_likelihood(method):
    data = mixed_data(0)
    fit = effects_em().run(*data, max_iter=400, stop=emvae.convergence.Deterministic(tol=1e-12, change_tol=1e-8))
    theta = torch.stack([fit.params[name] for name in EFFECTS])
    assert fit.status == "CONVERGED"
    assert float(jacobian(lambda t: effects_log_p(t, *data).sum(), theta).abs().max()) < 1e-4
    if method == "opg":
        scores = jacobian(lambda t: effects_log_p(t, *data), theta)
        information = scores.mT @ scores
    else:
        information = -hessian_of(lambda t: effects_log_p(t, *data).sum(), theta)
    errors = standard_errors(fit, *data, method=method)
    expected = torch.linalg.inv(information).diagonal().sqrt()
    torch.testing.assert_close(of_effects(errors), expected, rtol=1e-6, atol=0)
    assert errors.kind == "exact" and errors.note == ""


def test_an_effect_that_does_not_vary_has_no_standard_error():
    """Groups closer to each other than chance allows: the likelihood is highest at a variance of zero, and falls."""
    y, x = mixed_data(1, tau=0.0)
    y = y - 0.9 * (y - y.mean()).mean(-1, keepdim=True)
    idle = EM(random_intercept, e_step=steps.Gaussian(), m_step=steps.ClosedForm(effect_statistics, lambda s, p: {}))
    idle.run(y, x, max_iter=1, stop=None)
    flat = y.flatten() - y.mean(), x.flatten() - x.mean()
    beta = (flat[0] @ flat[1]) / (flat[1] @ flat[1])
    mu, sigma = y.mean() - beta * x.mean(), (flat[0] - beta * flat[1]).square().mean().sqrt()
    assign(idle.engine.parameters, {"mu": mu, "beta": beta, "tau": torch.tensor(1e-3), "sigma": sigma})
    theta = torch.stack([mu, beta, torch.tensor(1e-3, dtype=F64), sigma])
    assert float(jacobian(lambda t: effects_log_p(t, y, x).sum(), theta)[2]) < 0
    errors = standard_errors(idle.run(y, x, max_iter=1, stop=None), y, x)
    assert errors["tau"].isnan() and errors.note == "given tau at the boundary"
    assert errors.rows["tau"][0]["status"] == "undefined: at the boundary of its constraint"
    kept = [0, 1, 3]
    information = -hessian_of(lambda t: effects_log_p(t, y, x).sum(), theta)[kept][:, kept]
    torch.testing.assert_close(
        of_effects(errors)[kept], torch.linalg.inv(information).diagonal().sqrt(), rtol=1e-4, atol=0
    )


def logit_normal(y: Tensor) -> None:
    """Ones of 12 trials per group."""
    loc = pyro.param("mu", torch.zeros((), dtype=F64))
    scale = pyro.param("tau", torch.ones((), dtype=F64), constraint=constraints.positive)
    with pyro.plate("groups", len(y)):
        pyro.sample("y", dist.Binomial(12, logits=pyro.sample("u", dist.Normal(loc, scale))), obs=y)


def logit_normal_log_p(theta: Tensor, y: Tensor) -> Tensor:
    """By the trapezoid rule."""
    z = torch.linspace(-9.0, 9.0, 361, dtype=F64)
    joint = dist.Binomial(12, logits=theta[0] + theta[1] * z).log_prob(y[:, None]) + dist.Normal(0.0, 1.0).log_prob(z)
    return joint.logsumexp(-1).sum() + len(y) * math.log(0.05)


@pytest.mark.parametrize(
    "e_step",
    [steps.MonteCarlo("prior", 5000), steps.MonteCarlo("hmc", 500, num_leapfrog=1, num_moves=4)],
    ids=lambda step: step.sampler.name,
)
def test_louis_by_draws_on_a_logit_normal_model(e_step):
    """Against the Hessian of the likelihood by quadrature, within 3 of the errors that it states, which are small."""
    g = torch.Generator().manual_seed(2)
    u = 0.3 + 0.8 * torch.randn(30, generator=g, dtype=F64)
    y = (torch.rand(30, 12, generator=g, dtype=F64) < u.sigmoid()[:, None]).to(F64).sum(-1)
    theta = torch.tensor([0.3, 0.8], dtype=F64)
    for _ in range(10):
        gradient, hessian = (f(lambda t: logit_normal_log_p(t, y), theta) for f in (jacobian, hessian_of))
        theta = theta - torch.linalg.solve(hessian, gradient)
    em = EM(logit_normal, e_step=e_step, m_step=steps.ClosedForm(lambda v, y: {"u": v["u"]}, lambda s, p: {}))
    em.run(y, max_iter=1, stop=None, seed=0)
    assign(em.engine.parameters, {"mu": theta[0], "tau": theta[1]})
    errors = standard_errors(em.run(y, max_iter=1, stop=None, seed=0), y)
    found = torch.stack([errors["mu"], errors["tau"]])
    names = [name for name, _ in errors.places]
    stated = torch.stack([errors.monte_carlo_error[names.index(name)] for name in ("mu", "tau")])
    expected = torch.linalg.inv(-hessian).diagonal().sqrt()
    assert (errors.method, errors.kind) == ("louis", "monte carlo")
    assert bool(((found - expected).abs() < 3 * stated).all()) and bool((stated < 0.1 * expected).all())


@pytest.mark.slow
def test_intervals_of_random_intercepts_cover(record_result):
    """The 95 % intervals of the four parameters, over 1,000 simulated data sets: a two-sided binomial test each."""
    truth, hits = torch.tensor([1.0, -0.5, 0.8, 1.0], dtype=F64), torch.zeros(4, dtype=F64)
    for seed in range(1000):
        pyro.clear_param_store()
        data = mixed_data(seed)
        fit = effects_em().run(*data, max_iter=300, progress_bar=False)
        assert fit.status == "CONVERGED"
        estimate = torch.stack([fit.params[name] for name in EFFECTS])
        hits += (estimate - truth).abs() <= 1.959964 * of_effects(standard_errors(fit, *data))
    half = NormalDist().inv_cdf(1 - 0.5e-6) * math.sqrt(0.95 * 0.05 / 1000)
    shares = ", ".join(f"{name} {share:.3f}" for name, share in zip(EFFECTS, (hits / 1000).tolist(), strict=True))
    record_result("95 % intervals of standard_errors, random intercepts, 1,000 data sets", f"coverage {shares}")
    assert bool(((hits / 1000 - 0.95).abs() <= half).all())


# Draws ----------------------------------------------------------------------------------------------------------------


def test_louis_by_draws_states_its_monte_carlo_error():
    fit = mean_fit(e_step=steps.MonteCarlo("prior", num_particles=4000))
    errors = standard_errors(fit, X)
    assert (errors.method, errors.kind) == ("louis", "monte carlo")
    miss = float((errors["loc"] - math.sqrt(2 / COUNT)).abs())
    stated = float(errors.monte_carlo_error)
    assert 0 < stated < 0.03 and miss < 4 * stated


def test_few_draws_do_not_underestimate_the_missing_information():
    """The variance about the draws' own mean is divided by S - 1: from three draws of z with score z - u."""
    z, u = torch.randn(3, 50, dtype=F64), torch.zeros(1, dtype=F64, requires_grad=True)
    log_p, weights = -0.5 * (z - u).square(), torch.full_like(z, 1 / 3)
    data = CompleteData(log_p, weights, torch.ones(50, dtype=F64), torch.zeros((), dtype=F64), drawn=True)
    found = information._louis(data, z[..., None], weights, u)
    torch.testing.assert_close(found[0, 0], 50 - z.var(0).sum())


def test_the_error_of_draws_is_that_of_repeated_draws():
    fit = mean_fit(e_step=steps.MonteCarlo("prior", num_particles=400))
    found = []
    for seed in range(40):
        x = torch.cat([X, X])[seed % COUNT :][:COUNT].clone()  # other rows, other draws for each
        errors = standard_errors(fit, x, method="louis")
        found.append((float(errors["loc"]), float(errors.monte_carlo_error)))
    values, stated = map(torch.tensor, zip(*found, strict=True))
    assert 0.5 < float(values.std() / stated.mean()) < 2.0


def test_a_guide_is_approximate():
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + pyro.param("phi", torch.tensor(1.5, dtype=F64)), 0.5**0.5))

    fit = EM(mean_model, guide, pyro.optim.Adam({"lr": 0.2})).run(X, max_iter=150, seed=0)
    errors = standard_errors(fit, X, num_particles=2000)
    assert errors.kind == "approximate" and "phi" not in {name for name, _ in errors.places}
    assert float(errors["loc"]) == pytest.approx(math.sqrt(2 / COUNT), rel=0.05)
    with pytest.raises(EmvaeError, match="posterior of kind 'amortized'"):
        standard_errors(fit, X, method="hessian")


# Bootstrap ------------------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_is_that_of_the_rows():
    fit = mean_fit()
    before = {n: p.clone() for n, p in pyro.get_param_store().items()}
    errors = standard_errors(fit, X, method="bootstrap", n_boot=25, seed=3)
    generator = torch.Generator().manual_seed(3)
    means = torch.stack([X[torch.randint(COUNT, (COUNT,), generator=generator)].mean() for _ in range(25)])
    torch.testing.assert_close(errors["loc"], means.std(), rtol=2e-3, atol=0)
    assert all(torch.equal(before[n], p) for n, p in pyro.get_param_store().items())


# What has none --------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_no_step_uses_does_not_keep_the_bootstrap_from_it():
    plain = mean_em()
    fits = [plain.run(X, max_iter=60, stop=None)]
    pyro.clear_param_store()
    em = EM(mean_model, optim=pyro.optim.Adam({"lr": 0.1}), e_step=plain.e_step, m_step=plain.m_step)
    fits.append(em.run(X, max_iter=60, stop=None))
    pair = [standard_errors(fit, X, method="bootstrap", n_boot=5)["loc"] for fit in fits]
    assert float(pair[0]) == pytest.approx(float(pair[1]), rel=1e-12)


def test_a_variance_at_zero_is_undefined():
    """Data that vary less than the noise of the model: the latent's variance goes to zero."""

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros((), dtype=F64))
        tau = pyro.param("tau", torch.ones((), dtype=F64), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(loc + tau * z, 1.0), obs=x)

    x = 0.3 * (X - X.mean())
    em = EM(model, e_step=steps.Gaussian(), m_step=steps.ClosedForm(lambda v, x: {"n": x[None]}, lambda s, p: p))
    em.run(x, max_iter=1, stop=None)
    assign(em.engine.parameters, {"tau": torch.tensor(1e-4), "loc": x.mean()})
    fit = em.run(x, max_iter=1, stop=None)
    for method in ("hessian", "louis"):
        errors = standard_errors(fit, x, method=method)
        assert errors["tau"].isnan() and errors.status[1] == "undefined: at the boundary of its constraint"
        torch.testing.assert_close(errors["loc"], torch.tensor(COUNT**-0.5, dtype=F64), rtol=1e-6, atol=0)
        assert errors.note == "given tau at the boundary"
    assert "undefined" in repr(errors) and "nan" in repr(errors)


def test_a_weight_at_zero_is_undefined():
    pyro.clear_param_store()
    em = mixture_em()
    em.run(MIX, max_iter=1, stop=None)
    weights = torch.tensor([1e-9, 1 - 1e-9], dtype=F64)
    values = {"weights": weights, "loc": [-2.0, MIX.mean()], "scale": [1.0, MIX.std(correction=0)]}
    assign(em.engine.parameters, {n: torch.as_tensor(v, dtype=F64) for n, v in values.items()})
    idle = EM(mixture, e_step=steps.Enumerated(), m_step=steps.ClosedForm(statistics, lambda s, p: p))
    errors = standard_errors(idle.run(MIX, max_iter=1, stop=None), MIX)
    assert errors["weights"][0].isnan() and errors["scale"][0].isnan() and errors["loc"][0] > 1000
    assert errors.note.startswith("given scale, weights at the boundary")
    expected = torch.tensor([1 / 100**0.5, 1 / 200**0.5], dtype=F64) * MIX.std(correction=0)
    found = torch.stack([errors["loc"][1], errors["scale"][1]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_fit_far_from_its_maximum_says_so():
    fit = mean_em().run(X, max_iter=1, stop=None)
    errors = standard_errors(fit, X)
    away = float((X.mean() - fit.params["loc"]).abs() / math.sqrt(2 / COUNT))
    assert f"about {away:.2g} standard errors from the maximum" in errors.note


def test_float32():
    fit = mixture_em().run(MIX.float(), max_iter=1, stop=None)
    errors = standard_errors(fit, MIX.float())
    expected = torch.linalg.inv(information_by_hand(fit)).diagonal().sqrt()
    torch.testing.assert_close(free(errors).double(), expected.double(), rtol=5e-3, atol=0)


def test_the_fits_values_count_and_nothing_is_changed(mixed):
    before = standard_errors(mixed, MIX, method="louis")
    assign(mixed.inference.engine.parameters, {"loc": torch.tensor([9.0, 9.5])})
    state, leaves = torch.get_rng_state(), {n: p.clone() for n, p in pyro.get_param_store().items()}
    after = [standard_errors(mixed, MIX, method=m) for m in ("louis", "hessian")]
    standard_errors(mixed, MIX, method="bootstrap", n_boot=2)
    torch.testing.assert_close(after[0].standard_error, before.standard_error, rtol=1e-9, atol=0)
    torch.testing.assert_close(after[1].standard_error, before.standard_error, rtol=1e-7, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(leaves[n], p) for n, p in pyro.get_param_store().items())
    assert all(p.unconstrained().grad is None for p in pyro.get_param_store().values())


def test_parameters_of_modules():
    class Mean(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = Mean()
    leaf = model.loc
    fit = mean_fit(model=model)
    for method in ("hessian", "louis"):
        errors = standard_errors(fit, X, method=method)
        assert float(errors["loc"]) == pytest.approx(math.sqrt(2 / COUNT), rel=1e-8)
    assert model._parameters["loc"] is leaf and leaf.grad is None


def test_a_chain_has_a_hessian():
    """Two states, three times: the likelihood by enumeration of the eight paths."""
    x = torch.tensor([0.3, -0.2, 1.4, 1.1, 0.9, -0.5], dtype=F64)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.0, 1.2], dtype=F64))
        z = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=F64)[z]))
            pyro.sample(f"x_{t}", dist.Normal(loc[z], 1.0), obs=x[t])

    def log_p(loc: Tensor) -> Tensor:
        move, alpha = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=F64).log(), torch.tensor([0.8, 0.2], dtype=F64).log()
        alpha = alpha + dist.Normal(loc, 1.0).log_prob(x[0])
        for t in range(1, len(x)):
            alpha = (alpha[:, None] + move).logsumexp(0) + dist.Normal(loc, 1.0).log_prob(x[t])
        return alpha.logsumexp(0)

    fit = EM(model, e_step=steps.Enumerated(), m_step=steps.Gradient(), optim=pyro.optim.Adam({"lr": 0.05}))
    fit = fit.run(x, max_iter=40)
    expected = torch.linalg.inv(-hessian_of(log_p, fit.params["loc"])).diagonal().sqrt()
    torch.testing.assert_close(standard_errors(fit, x)["loc"], expected, rtol=1e-8, atol=0)
    with pytest.raises(EmvaeError, match="1 independent datum"):
        standard_errors(fit, x, method="opg")


def test_latents_that_all_data_share_need_the_hessian():
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros((), dtype=F64))
        g = pyro.sample("g", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    m_step = steps.ClosedForm(lambda v, x: {"g": v["g"]}, lambda s, _: {"loc": s["g"].mean() / COUNT})
    fit = EM(model, e_step=steps.Gaussian(), m_step=m_step).run(X, max_iter=1, stop=None)
    found = standard_errors(fit, X)["loc"]
    torch.testing.assert_close(found, torch.tensor((1 + 2 / COUNT) ** 0.5, dtype=F64), rtol=1e-8, atol=0)
    with pytest.raises(StepError, match="depend on each other across the data"):
        standard_errors(fit, X, method="louis")


# Tables ---------------------------------------------------------------------------------------------------------------


def test_tables(mixed):
    errors = standard_errors(mixed, MIX)
    assert "scale[1]" in repr(errors) and repr(errors).endswith("method hessian, exact")
    assert list(errors.table.columns) == [
        "parameter", "index", "estimate", "standard_error", "status", "monte_carlo_error",
    ]  # fmt: skip
    table = mixed.summary(errors)
    assert list(table.columns) == ["parameter", "index", "block", "shape", "estimate", "standard_error", "status"]
    assert table["parameter"].tolist() == [name for name, _ in errors.places] and len(table) == 6
    assert table["standard_error"].tolist() == errors.standard_error.tolist()
    assert set(table["status"]) == {mixed.status}
    assert mixed.summary()["standard_error"].isna().all()


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"method": "lewis"}, "'lewis'"),
        ({"method": "opg", "sandwich": True}, "'opg' with sandwich=True"),
        ({"num_particles": 0}, "num_particles: got 0"),
        ({"method": "bootstrap", "n_boot": 1}, "n_boot=1"),
    ],
)
def test_bad_options(options, observed):
    with pytest.raises(EmvaeError, match=observed):
        standard_errors(mean_fit(), X, **options)


def test_bad_fits_and_data():
    fit = mean_fit()
    with pytest.raises(EmvaeError, match="EM"):
        standard_errors(fit.inference, X)
    with pytest.raises(EmvaeError, match=r"\(0,\)"):
        standard_errors(fit, X[:0])
    with pytest.raises(EmvaeError, match=r"'loc'.*\[\]"):
        standard_errors(emvae.driver.Fit(**{**vars(fit), "inference": None}), X)


def test_rows_of_different_numbers_have_no_bootstrap(mixed):
    with pytest.raises(EmvaeError, match=r"\[2, 100\]"):
        standard_errors(mixed, MIX, torch.ones(2, dtype=torch.bool), method="bootstrap")


def test_gradient_steps_have_no_bootstrap():
    m_step = steps.Gradient(optim=pyro.optim.SGD({"lr": 0.01}))
    fit = EM(mean_model, e_step=steps.Gaussian(), m_step=m_step).run(X, max_iter=2)
    with pytest.raises(EmvaeError, match="EM with gradient steps"):
        standard_errors(fit, X, method="bootstrap")


def test_a_minibatch_is_refused():
    problem = problems.linear_gaussian(subsample_size=4)
    em = EM(problem.model, e_step=steps.Gaussian(), m_step=steps.Gradient(optim=pyro.optim.SGD({"lr": 0.01})))
    with pytest.raises(EmvaeError, match="subsampled"):
        standard_errors(em.run(*problem.args, max_iter=1), *problem.args)


def test_transforms_of_the_fit_are_the_stores(mixed):
    for name in NAMES:
        u = pyro.param(name).unconstrained()
        torch.testing.assert_close(transform_to(SUPPORTS[name])(u), mixed.params[name])
