r"""The evidence by quadrature: against closed forms, a product rule, and importance sampling; and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_emvae._checks import EmvaeError, NonFiniteError, StepError
from pyro_emvae._registry import entries
from pyro_emvae.evidence import Quadrature, log_evidence
from pyro_emvae.evidence.lattice import Frame, Spread, ball, integrate
from pyro_emvae.testing import assert_mean

DOUBLE = torch.float64
X = torch.tensor([0.3, -1.2, 2.1, 0.8, -0.4, 1.5], dtype=DOUBLE)
FINE = Quadrature(tol=1e-9)


def put(problem, params=None):
    for name, value in problem.unconstrained(params).items():
        moved = problem.constrained({name: value.detach()})[name]
        pyro.param(name, moved, constraint=problem.constraints[name])


# Every registered problem whose evidence is known, that is continuous and small enough --------------------------------

SMALL = ("normal_normal", "linear_gaussian", "linear_gaussian_full", "skewed", "skewed_gamma", "two_level", "masked")
BUILT = {e.name: e.factory() for e in entries("problem")}


@pytest.mark.parametrize("name", SMALL)
def test_equals_closed_forms(name):
    problem = BUILT[name]
    put(problem)
    found = log_evidence(problem.model, None, *problem.args, method=FINE, num_particles=500, seed=0)
    assert found.value == pytest.approx(float(problem.log_evidence()), abs=1e-8)
    assert found.standard_error < 1e-8 and found.kind == "exact"
    assert (found.per_datum is not None) == problem.traits.local


def gaussian(x, loadings, mean, noise, power=1.0, index=None):
    rows = torch.arange(len(x)) if index is None else index
    with poutine.scale(scale=power), pyro.plate("data", len(x), subsample=rows):
        z = pyro.sample("z", dist.Normal(x.new_zeros(loadings.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(mean + z @ loadings.T, noise).to_event(1), obs=x[rows])


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_linear_gaussian_of_each_dimension(dims):
    torch.manual_seed(dims)
    loadings, mean = torch.randn(5, dims, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    x = 2.0 * torch.randn(7, 5, dtype=DOUBLE)
    method, off, noise = (FINE, 1e-8, 0.3) if dims < 4 else (Quadrature(tol=3e-3), 3e-4, 1.0)
    found = log_evidence(gaussian, None, x, loadings, mean, noise, method=method, num_particles=500, seed=0)
    covariance = loadings @ loadings.T + noise**2 * torch.eye(5, dtype=DOUBLE)
    marginal = torch.distributions.MultivariateNormal(mean, covariance)
    torch.testing.assert_close(found.per_datum.value, marginal.log_prob(x), rtol=0, atol=off)
    assert found.per_datum.plates == ("data",) and float(found.per_datum.standard_error.mean()) <= method.tol


def test_float32_and_scale_after_the_logarithm():
    torch.manual_seed(0)
    loadings, x = torch.randn(3, 2), torch.randn(6, 3)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(3), loadings @ loadings.T + 0.25 * torch.eye(3))
    rows = torch.tensor([4, 1, 2])
    how = {"method": "quadrature", "num_particles": 500, "seed": 0}
    found = log_evidence(gaussian, None, x, loadings, 0.0, 0.5, 1.0, rows, **how)
    assert found.value == pytest.approx(2 * float(marginal.log_prob(x[rows]).sum()), abs=1e-3)
    assert found.per_datum.scale == 2.0 and float(found.per_datum.value.dtype == DOUBLE)


def test_users_scale_stays_outside_the_logarithm():
    """A scale around the plate multiplies log p(x_n), as an annealed evidence would not."""
    found = log_evidence(one, None, X, 0.4, method=FINE, num_particles=200, seed=0)
    exact = dist.Normal(X.new_tensor(0.2), math.sqrt(1 + 0.49)).log_prob(X)
    assert found.value == pytest.approx(0.4 * float(exact.sum()), abs=1e-8)


def one(x, power=1.0):
    with poutine.scale(scale=power), pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.2), 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def constrained(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.5))
        share = pyro.sample("share", dist.Beta(x.new_tensor(2.0), 3.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)
        pyro.sample("y", dist.Binomial(5, share), obs=x.clamp(max=5))


def test_constrained_latents_count_their_jacobian():
    x = torch.tensor([0.0, 3.0, 7.0], dtype=DOUBLE)
    found = log_evidence(constrained, None, x, method=FINE, num_particles=1000, seed=0)
    exact = dist.GammaPoisson(x.new_tensor(2.0), 1.5).log_prob(x)
    exact = exact + dist.BetaBinomial(x.new_tensor(2.0), 3.0, total_count=5).log_prob(x.clamp(max=5))
    torch.testing.assert_close(found.per_datum.value, exact, rtol=0, atol=1e-8)


def curved(x, scale):
    """Two modes, or a ring: the location depends on z by its squares."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] ** 2 + 0.5 * z[..., 1] ** 2, scale), obs=x)


@pytest.mark.parametrize(("scale", "tol"), [(0.5, 1e-5), (0.1, 1e-2)])
def test_several_modes_and_ridges(scale, tol):
    x = torch.tensor([-0.5, 0.4, 2.0, 4.0], dtype=DOUBLE)
    found = log_evidence(curved, None, x, scale, method=Quadrature(tol=tol), num_particles=2000, seed=0)
    t = torch.linspace(-6, 6, 1201, dtype=DOUBLE)
    prior = dist.Normal(x.new_zeros(()), 1.0).log_prob(t)
    for value, datum in zip(found.per_datum.value, x, strict=True):
        f = prior[:, None] + prior + dist.Normal(t[:, None] ** 2 + 0.5 * t**2, scale).log_prob(datum)
        assert float(value) == pytest.approx(float(f.flatten().logsumexp(0)) + 2 * math.log(12 / 1200), abs=2 * tol)


def test_the_loop_over_nodes_is_the_plate_of_nodes():
    how = {"method": Quadrature(tol=1e-4), "num_particles": 50, "seed": 0}
    one_run, loop = (log_evidence(one, None, X, vectorize_particles=v, **how) for v in (True, False))
    torch.testing.assert_close(loop.per_datum.value, one_run.per_datum.value, rtol=0, atol=1e-4)
    small = log_evidence(one, None, X, chunk_size=3, **how)
    torch.testing.assert_close(small.per_datum.value, one_run.per_datum.value, rtol=0, atol=1e-4)


def nested(x):
    with pyro.plate("group", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("item", 4, dim=-2):
            pyro.sample("x", dist.Normal(a, 0.5), obs=x)


def test_plates_inside_and_terms_without_latents():
    def model(x):
        nested(x)
        pyro.factor("penalty", x.new_tensor(-3.25))

    x = torch.randn(4, 3, dtype=DOUBLE)
    found = log_evidence(model, None, x, method=FINE, num_particles=500, seed=0)
    covariance = 0.25 * torch.eye(4, dtype=DOUBLE) + 1.0
    exact = torch.distributions.MultivariateNormal(x.new_zeros(4), covariance).log_prob(x.T)
    torch.testing.assert_close(found.per_datum.value.flatten(), exact, rtol=0, atol=1e-8)
    assert found.per_datum.plates == ("group",) and found.per_datum.constant == pytest.approx(-3.25)
    assert found.value == pytest.approx(float(exact.sum()) - 3.25, abs=1e-7)


def coupled(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)


def test_data_that_depend_on_each_others_latents_are_one_block():
    x = X[:3]
    found = log_evidence(coupled, None, x, method=FINE, num_particles=500, seed=0)
    center = torch.eye(3, dtype=DOUBLE) - 1 / 3
    marginal = torch.distributions.MultivariateNormal(x.new_zeros(3), center @ center.T + torch.eye(3, dtype=DOUBLE))
    assert found.value == pytest.approx(float(marginal.log_prob(x)), abs=1e-8)
    assert found.per_datum is None
    with pytest.raises(EmvaeError, match=r"got 6 coordinates .* site 'x' of one datum"):
        log_evidence(coupled, None, X, method=FINE, num_particles=50)


def test_leaves_everything_as_it_was():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = log_evidence(one, None, X, method="quadrature", num_particles=100, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = log_evidence(one, None, X, method="quadrature", num_particles=100, seed=1)
    assert again.value == first.value and "log p(x)" in repr(first)


# What it refuses ------------------------------------------------------------------------------------------------------


def five(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def common(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def narrow(x):
    """A second mode, a thousandth wide, of a thousand times the mass."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        spike = dist.Normal(1.0, 1e-3).log_prob(z) + math.log(1e3)
        wide = dist.Normal(z, 1.0).log_prob(x)
        pyro.factor("x", torch.logaddexp(wide, spike))


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (five, EmvaeError, "5 coordinates"),
        (discrete, StepError, r"Bernoulli\(6,\)"),
        (common, EmvaeError, "subsampled plate 'data'"),
        (
            lambda x: pyro.sample("x", dist.Normal(0.0, 1.0).expand([6]).to_event(1), obs=x),
            EmvaeError,
            "without latents",
        ),
    ],
)
def test_refuses_what_it_cannot_integrate(model, error, match):
    with pytest.raises(error, match=match):
        log_evidence(model, None, X, method="quadrature", num_particles=20, seed=0)


def test_says_so_when_lattices_do_not_agree():
    with pytest.raises(EmvaeError, match=r"differ by \d.* nats per datum, and \d+ nodes"):
        log_evidence(curved, None, X, 0.2, method=Quadrature(tol=1e-6, max_nodes=3000), num_particles=500, seed=0)


def test_says_so_when_draws_from_the_prior_contradict_it(monkeypatch):
    """The spike is met by one draw in a thousand; a lattice that starts elsewhere must not pass for the integral."""
    from pyro_emvae.evidence import quadrature

    def elsewhere(density, frame, known, **how):
        return integrate(lambda u: density(u) - 30.0 * (u[..., 0] - 1.0).abs().lt(0.02), frame, known, **how)

    monkeypatch.setattr(quadrature, "integrate", elsewhere)
    with pytest.raises(EmvaeError, match=r"draws from the prior give"):
        log_evidence(narrow, None, X[:2], method=Quadrature(tol=1e-2), num_particles=100_000, seed=0)


def test_not_finite():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.factor("x", torch.where(z > 0.5, math.nan, z))

    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match="log density of nan"):
        log_evidence(model, None, X, method="quadrature", num_particles=50, seed=0)

    def never(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.factor("x", torch.where(z > 50, z, -math.inf))

    with pytest.raises(NonFiniteError, match="50 draws from the prior of likelihood zero at block 0"):
        log_evidence(never, None, X, method="quadrature", num_particles=50, seed=0)


@pytest.mark.parametrize("tol", [0.0, -1.0, 2.0, "fine"])
def test_tolerances(tol):
    with pytest.raises(EmvaeError, match=f"got {tol!r}"):
        Quadrature(tol=tol)


# Parts ----------------------------------------------------------------------------------------------------------------


def test_spread_by_chunks_is_that_of_all():
    torch.manual_seed(0)
    log_weights, points = 3 * torch.randn(40, 2, dtype=DOUBLE), torch.randn(40, 2, 3, dtype=DOUBLE)
    spread = Spread()
    for chunk in (slice(0, 1), slice(1, 25), slice(25, 40)):
        spread.update(log_weights[chunk], points[chunk])
    for n in range(2):
        mean = np.average(points[:, n], axis=0, weights=log_weights[:, n].exp())
        covariance = np.cov(points[:, n].T, aweights=log_weights[:, n].exp(), ddof=0)
        np.testing.assert_allclose(spread.mean[n], mean, rtol=1e-12)
        np.testing.assert_allclose(spread.covariance[n], covariance, rtol=1e-12)
    torch.testing.assert_close(spread.log_sum, log_weights.logsumexp(0))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_ball(dims):
    points = ball(dims, 0.5, 2.0, torch.zeros((), dtype=DOUBLE))
    assert bool((points.square().sum(-1) <= 16).all()) and len(points) == len(points.unique(dim=0))
    assert len(points) == {1: 9, 2: 49, 3: 257, 4: 1281}[dims]


def test_error_bounds_the_error():
    """Where the rule converges slowly, what it says of itself is of the size of what it misses."""
    frame = Frame(torch.zeros(3, 1, dtype=DOUBLE), torch.ones(3, 1, 1, dtype=DOUBLE))
    power = torch.tensor([1.0, 1.5, 4.0], dtype=DOUBLE)
    lattice, errors = integrate(lambda u: -(u[..., 0].abs() ** power), frame, tol=1e-3, chunk=1000, max_nodes=100_000)
    exact = torch.tensor([math.log(2 * math.gamma(1 + 1 / p)) for p in power.tolist()], dtype=DOUBLE)
    assert bool(((lattice.log_integral - exact).abs() <= 2 * errors).all()) and float(errors.mean()) <= 1e-3


def test_agrees_with_importance_sampling_on_a_network():
    torch.manual_seed(0)
    weights = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    for p in weights.parameters():
        p.requires_grad_(False).mul_(3.0)
    x = torch.bernoulli(torch.full((6, 5), 0.5, dtype=DOUBLE))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=weights(z)).to_event(1), obs=x)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    found = log_evidence(model, None, x, method=Quadrature(tol=1e-6), num_particles=1000, seed=0)
    draws = torch.randn(200_000, 2, dtype=DOUBLE)
    log_p = dist.Bernoulli(logits=weights(draws)[:, None]).log_prob(x).sum(-1)
    for n in range(len(x)):
        assert_mean((log_p[:, n] - found.per_datum.value[n]).exp(), 1.0, detect=0.05)
    sampled = log_evidence(model, prior, x, num_particles=20_000, seed=1)
    assert abs(sampled.value - found.value) < 4 * sampled.standard_error
