r"""Particles whose noise is drawn together: each alone has the distribution of the site; together they vary less."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal

from pyro_emvae import EstimatorError, MonteCarloELBO, compare_gradients, problems
from pyro_emvae.estimators import AdaptiveSticking, Analytic, Antithetic, Pathwise, Sobol
from pyro_emvae.estimators.draws import from_noise
from pyro_emvae.particles import quiet

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")


def some_normals() -> list:
    loc, scale = torch.tensor([[0.3], [1.0]], dtype=torch.float64), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    tril = torch.tensor([[1.0, 0.0], [0.7, 0.4]], dtype=torch.float64)
    return [
        dist.Normal(loc, scale).expand([8, 2, 3]),
        dist.Normal(loc, scale).expand([8, 2, 3]).to_event(1),
        dist.LogNormal(loc, scale).expand([8, 2, 3]).to_event(1),
        dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), scale_tril=tril).expand([8, 2]),
    ]


@pytest.mark.parametrize("draws", [Antithetic(), Sobol()], ids=repr)
@pytest.mark.parametrize("fn", some_normals(), ids=lambda fn: type(fn).__name__)
def test_each_particle_has_the_distribution_of_the_site(draws, fn):
    """The noise is standard normal at every place, by a Kolmogorov distance that is exceeded once in 10,000."""
    with quiet(seed=0):
        noise = torch.stack([draws.noise(fn, 8) for _ in range(4000)])
        value = draws(fn, 8).value
    assert value.shape == fn.shape() and value.dtype == torch.float64
    assert bool(torch.isfinite(fn.log_prob(value)).all())
    u = Normal(0.0, 1.0).cdf(noise).reshape(4000, -1).sort(0).values
    grid = torch.arange(1, 4001, dtype=torch.float64)[:, None] / 4000
    distance = (u - grid).abs().max()
    assert float(distance) < 2.8 / 4000**0.5  # 2 exp(-2 2.8^2) x 48 places < 1e-4


@pytest.mark.parametrize("draws", [Antithetic(), Sobol()], ids=repr)
@pytest.mark.parametrize("fn", some_normals()[:2], ids=["plates", "event"])
def test_places_are_independent(draws, fn):
    with quiet(seed=0):
        noise = torch.stack([draws.noise(fn, 8) for _ in range(4000)])[:, 0].reshape(4000, -1)
    correlation = torch.corrcoef(noise.T) - torch.eye(noise.shape[1], dtype=noise.dtype)
    assert float(correlation.abs().max()) < 0.08  # 5 standard errors


def test_values_have_their_path():
    loc = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[1.0, -2.0, 0.0]], dtype=torch.float64)
    value = from_noise(dist.LogNormal(loc, torch.ones(3, dtype=torch.float64)).expand([1, 3]), noise)
    (gradient,) = torch.autograd.grad(value.sum(), loc)
    torch.testing.assert_close(gradient, noise[0].exp())


def quadratic(power: int):
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.factor("f", (z**power).sum(-1))

    def guide() -> None:
        loc = pyro.param("loc", lambda: torch.full((2,), 0.5, dtype=torch.float64))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    return model, guide


def test_mirrored_noise_cancels_what_is_odd():
    """The gradient by loc of a linear-quadratic ELBO is linear in the noise: pairs have none left."""
    table = compare_gradients(
        *quadratic(1),
        estimators=["pathwise", "antithetic", "quasi_monte_carlo", "analytic_kl"],
        num_particles=8,
        num_replicates=400,
        seed=0,
    ).dataset.variance_mean.sel(block="guide")
    variance = {name: float(table.sel(estimator=name)) for name in table.estimator.values}
    assert variance["pathwise"] > 0.05
    assert variance["antithetic"] < 1e-20 and variance["analytic_kl"] < 1e-20
    assert variance["quasi_monte_carlo"] < variance["pathwise"] / 3


@pytest.mark.parametrize("estimator", ["antithetic", "quasi_monte_carlo"])
def test_a_sampler_without_normal_noise_is_refused(estimator):
    def model() -> None:
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Gamma(pyro.param("a", torch.tensor(2.0)), 1.0))

    with pytest.raises(EstimatorError, match=r"noise of normal distributions.*Use estimator=\"pathwise\""):
        MonteCarloELBO(2, estimator=estimator).loss(model, guide)
    with pytest.raises(EstimatorError, match="num_particles=1"):
        MonteCarloELBO(1, estimator=estimator).loss(model, guide)


def test_a_pair_without_closed_form_is_refused():
    def model() -> None:
        pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(EstimatorError, match="Normal in the guide and StudentT in the model"):
        MonteCarloELBO(1, estimator="analytic_kl").loss_and_grads(model, guide)


def test_particles_run_one_by_one_cannot_share_their_noise():
    problem = problems.two_level()
    loss = MonteCarloELBO(4, estimator="antithetic", vectorize_particles=False)
    with pytest.raises(EstimatorError, match="particles that are run one by one"):
        loss.loss(problem.model, problem.guide, *problem.args)


def test_the_decay_of_adaptive_sticking():
    with pytest.raises(EstimatorError, match=r"decay=1\.5"):
        AdaptiveSticking(decay=1.5)


def gaussian(loc: float, scale: float, rho: float, dim: int = 10):
    r"""A normal target of correlation `rho` and a mean-field guide: the study of adaptive coefficients."""
    covariance = torch.full((dim, dim), rho, dtype=torch.float64).fill_diagonal_(1.0)

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(dim, dtype=torch.float64), covariance))

    def guide() -> None:
        m = pyro.param("m", lambda: torch.full((dim,), loc, dtype=torch.float64))
        s = pyro.param("s", lambda: torch.full((dim,), scale, dtype=torch.float64).log())
        pyro.sample("z", dist.Normal(m, s.exp()).to_event(1))

    return model, guide


OPTIMUM = (1 / (1 / 0.1 * (1 - 0.9 / 9.1))) ** 0.5  # of rho = 0.9, dim = 10: one over the root of the precision


@pytest.mark.parametrize(
    ("loc", "scale", "rho"), [(1.0, 0.1, 0.9), (0.0, 1.0, 0.9), (0.0, OPTIMUM, 0.9), (1.0, 0.1, 0.0), (0.0, 1.0, 0.0)]
)
def test_adaptive_sticking_is_never_much_worse_than_the_better_of_the_two(loc, scale, rho):
    names = ["pathwise", "sticking_the_landing", "adaptive_sticking"]
    pyro.clear_param_store()
    table = compare_gradients(
        *gaussian(loc, scale, rho), estimators=names, num_particles=1, num_replicates=2000, seed=0
    ).dataset
    variance = dict(zip(names, table.variance_mean.sel(block="guide").values.tolist(), strict=True))
    assert variance["adaptive_sticking"] <= 1.15 * min(variance["pathwise"], variance["sticking_the_landing"]) + 1e-3


def test_composition_says_what_it_is():
    both = Pathwise(entropy=AdaptiveSticking(), draws=Antithetic())
    assert both.traits.draws == "noise" and both.traits.controls and both.traits.min_particles == 2
    assert Pathwise(entropy=Analytic()).integrates and not Pathwise().integrates
