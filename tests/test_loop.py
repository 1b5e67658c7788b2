r"""The loop of EM: published sequences and maxima, stopping, acceleration, and what is no convergence."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from sklearn.datasets import load_iris
from torch import Tensor

from pyro_emvae import EM, SVI, convergence, problems, steps
from pyro_emvae._checks import EmvaeError, StepError
from pyro_emvae._registry import Traits
from pyro_emvae.acceleration import extrapolate
from pyro_emvae.convergence import Deterministic, Windowed
from pyro_emvae.engine import State
from pyro_emvae.parameters import assign
from pyro_emvae.steps import HalfStep, Info

IRIS = torch.tensor(load_iris().data)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Moments(HalfStep):
    """An exact E-step from a function: params, data -> (moments, log p(x))."""

    traits = Traits(slots=("E",), exact=True)

    def __init__(self, function: Any) -> None:
        self.function = function

    def expect(self, problem: Any, state: State, *args: Any) -> tuple[State, Any, Info]:
        moments, evidence = self.function(problem.parameters.constrained(), *args)
        return state, moments, Info(loss=-float(evidence))


class Update(HalfStep):
    """An exact M-step from a function: moments, data -> new values."""

    traits = Traits(slots=("M",), exact=True)

    def __init__(self, function: Any) -> None:
        self.function = function

    def maximise(self, problem: Any, state: State, posterior: Any, *args: Any) -> tuple[State, Info]:
        assign(problem.parameters, self.function(posterior, *args))
        return state, Info()


# The linkage data ---------------------------------------------------------------------------------------------------

LINKAGE = f64(125, 18, 20, 34)
SEQUENCE = [0.5, 0.608247423, 0.624321050, 0.626488879, 0.626777322, 0.626815632, 0.626820719, 0.626821394, 0.626821484]


def linkage(dtype: torch.dtype = torch.float64) -> Any:
    def model(x: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor(0.5, dtype=dtype), constraint=constraints.unit_interval)
        split = theta / 4 / (0.5 + theta / 4)
        pyro.sample("z", dist.Binomial(125, split))
        cells = torch.stack([0.5 + theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])
        pyro.sample("x", dist.Multinomial(197, probs=cells), obs=x)

    return model


def linked(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    z = values["z"]
    return {"recombined": z + x[3], "all": z + x[1] + x[2] + x[3]}


def linkage_em(update: Any = None, dtype: torch.dtype = torch.float64) -> EM:
    update = update or (lambda s, params: {"theta": s["recombined"] / s["all"]})
    return EM(linkage(dtype), e_step=steps.Enumerated(), m_step=steps.ClosedForm(linked, update))


def test_the_linkage_sequence_of_dempster_laird_and_rubin():
    fit = linkage_em().run(LINKAGE, max_iter=30, stop=None, track="theta")
    theta = fit.history["param_theta"].values
    assert theta[:9] == pytest.approx(SEQUENCE, abs=5e-10)
    assert theta[-1] == pytest.approx(0.626821498, abs=5e-10)
    assert theta.shape == (31,) and fit.history["iterate"].values.tolist() == list(range(31))
    assert fit.status == "MAX_ITER" and theta[-1] == float(fit.params["theta"])


def test_the_linkage_run_stops_by_itself():
    fit = linkage_em().run(LINKAGE)
    assert fit.status == "CONVERGED" and fit.num_iterations < 12
    assert float(fit.params["theta"]) == pytest.approx(0.626821498, abs=1e-6)
    assert 0.01 < fit.verdict.rate < 0.03  # the square of 0.1328
    objective = fit.history["objective"].values
    assert (np.diff(objective) >= -1e-12).all() and fit.objective >= objective[-1] - 1e-12


def test_reaching_max_iter_is_no_convergence_and_the_verdict_tells():
    fit = linkage_em().run(LINKAGE, max_iter=3)
    assert fit.status == "MAX_ITER" and fit.verdict.remaining > 1e-6


# Eight schools: tau creeps to zero ----------------------------------------------------------------------------------

SCHOOLS, ERRORS = f64(28, 8, -3, 7, -1, 1, 18, 12), f64(15, 10, 16, 11, 9, 11, 10, 18)


def schools(y: Tensor) -> None:
    mu = pyro.param("mu", f64(0.0)[0])
    tau = pyro.param("tau", f64(10.0)[0], constraint=constraints.positive)
    with pyro.plate("schools", 8):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), ERRORS), obs=y)


def schools_guide(y: Tensor) -> None:
    with pyro.plate("schools", 8):
        pyro.sample("theta", dist.Normal(y, ERRORS))


def schools_em() -> EM:
    def moments(p: dict[str, Tensor], y: Tensor) -> tuple[Any, Tensor]:
        variance = 1 / (1 / p["tau"] ** 2 + 1 / ERRORS**2)
        mean = variance * (p["mu"] / p["tau"] ** 2 + y / ERRORS**2)
        return (mean, variance), dist.Normal(p["mu"], (p["tau"] ** 2 + ERRORS**2).sqrt()).log_prob(y).sum()

    def update(q: Any, y: Tensor) -> dict[str, Tensor]:
        mean, variance = q
        return {"mu": mean.mean(), "tau": ((mean - mean.mean()) ** 2 + variance).mean().sqrt()}

    return EM(schools, schools_guide, None, e_step=Moments(moments), m_step=Update(update))


@pytest.fixture(scope="module")
def creeping() -> Any:
    pyro.clear_param_store()
    return schools_em().run(SCHOOLS, max_iter=3000, stop=None, track="tau").history


def test_eight_schools_creep(creeping):
    tau = creeping["param_tau"].values
    assert tau[[10, 100, 1000]] == pytest.approx([4.62, 1.72, 0.56], abs=0.005)


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
def test_eight_schools_are_never_called_converged(creeping, tol):
    """The last gain falls below every tol; after each of the first 3000 iterations the answer is None or SLOW."""
    objectives, changes = creeping["objective"].values.tolist(), creeping["change"].values.tolist()
    statuses = [Deterministic(tol).judge(objectives[:k], changes[:k], num_data=8).status for k in range(1, 3001)]
    assert set(statuses) <= {None, "SLOW"}
    naive = np.diff(objectives) / 8 < tol
    assert naive.any() or tol < 1e-7


def test_a_run_on_eight_schools_ends_slow():
    fit = schools_em().run(SCHOOLS, max_iter=300, stop=Deterministic(tol=1e-3))
    assert fit.status == "SLOW" and fit.verdict.rate > 0.99 and fit.num_iterations < 300


@pytest.mark.parametrize("tol", [1e-3, 1e-8])
def test_nor_does_acceleration_make_them_converged(tol):
    fit = schools_em().run(SCHOOLS, max_iter=100, stop=Deterministic(tol), accelerate="squarem")
    assert fit.status in ("MAX_ITER", "SLOW", "STALLED")


def test_squarem_on_eight_schools():
    """The evidence at tau = 0 is reached within 1e-3 nats."""
    fit = schools_em().run(SCHOOLS, max_iter=25, stop=None, accelerate="squarem")
    assert fit.objective == pytest.approx(-29.674244, abs=1e-3)
    assert fit.history.attrs["map_evaluations"] == 75


# Probabilistic PCA: acceleration ------------------------------------------------------------------------------------


def pca(x: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = pyro.param("weight", torch.randn(4, 2, dtype=x.dtype, generator=generator))
    variance = pyro.param("variance", f64(1.0)[0], constraint=constraints.positive)
    mean = pyro.param("mean", x.mean(0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T + mean, variance.sqrt()).to_event(1), obs=x)


def pca_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def pca_em() -> EM:
    def moments(p: dict[str, Tensor], x: Tensor) -> tuple[Any, Tensor]:
        weight, variance = p["weight"], p["variance"]
        inverse = torch.linalg.inv(weight.T @ weight + variance * torch.eye(2).to(x))
        covariance = weight @ weight.T + variance * torch.eye(4).to(x)
        evidence = dist.MultivariateNormal(p["mean"], covariance).log_prob(x).sum()
        return ((x - p["mean"]) @ weight @ inverse, variance * inverse), evidence

    def update(q: Any, x: Tensor) -> dict[str, Tensor]:
        mean, covariance = q
        second, centred = mean.T @ mean + len(x) * covariance, x - x.mean(0)
        weight = torch.linalg.solve(second, mean.T @ centred).T
        rest = centred.square().sum() - 2 * (centred * (mean @ weight.T)).sum() + (weight @ second @ weight.T).trace()
        return {"weight": weight, "variance": rest / x.numel(), "mean": x.mean(0)}

    return EM(pca, pca_guide, None, e_step=Moments(moments), m_step=Update(update))


PCA_MAXIMUM = -404.962780


@functools.cache
def pca_runs() -> dict[str | None, Any]:
    runs = {}
    for accelerate in (None, "squarem"):
        pyro.clear_param_store()
        runs[accelerate] = pca_em().run(IRIS, accelerate=accelerate)
    return runs


def test_ppca_on_iris_converges_to_the_maximum():
    for fit in pca_runs().values():
        assert fit.status == "CONVERGED"
        left = PCA_MAXIMUM - fit.objective
        assert -1e-6 < left < 150 * 1e-6
        assert (np.diff(fit.history["objective"].values) > -1e-9).all()
    assert float(pca_runs()["squarem"].params["variance"]) == pytest.approx(0.05068215, rel=1e-4)


def test_squarem_takes_a_third_of_the_map_evaluations():
    reached = {}
    for key, fit in pca_runs().items():
        per = fit.history.attrs["map_evaluations"] / fit.num_iterations
        reached[key] = per * int(np.argmax(fit.history["objective"].values > PCA_MAXIMUM - 1e-3))
    assert reached["squarem"] * 3 < reached[None]
    total = {key: fit.history.attrs["map_evaluations"] for key, fit in pca_runs().items()}
    assert total["squarem"] * 3 < total[None]


@pytest.mark.parametrize("factor", [-30.0, math.nan, 1e300])
def test_squarem_falls_back_to_plain_em(monkeypatch, factor):
    """Extrapolated points that are bad, NaN or infinite: two plain iterations per cycle are left, bit for bit."""
    plain = pca_em().run(IRIS, max_iter=10, stop=None)
    pyro.clear_param_store()

    def bad(start: Tensor, first: Tensor, second: Tensor, longest: float) -> tuple[Tensor, float]:
        return second * factor, 2.0

    monkeypatch.setattr("pyro_emvae.acceleration.extrapolate", bad)
    with pyro.validation_enabled(False):
        fit = pca_em().run(IRIS, max_iter=5, stop=None, accelerate="squarem")
    assert all(torch.equal(fit.params[n], plain.params[n]) for n in plain.params)
    assert fit.history["objective"].values.tolist() == plain.history["objective"].values[::2].tolist()


def test_extrapolation_is_exact_on_a_line_and_never_shorter_than_a_plain_step():
    limit, rate = f64(1.0, -2.0), 0.97
    path = [limit + rate**k * f64(3.0, 1.0) for k in range(3)]
    point, length = extrapolate(*path)
    torch.testing.assert_close(point, limit, rtol=1e-10, atol=1e-10)
    assert length == pytest.approx(1 / (1 - rate))
    point, length = extrapolate(*[limit + (-2.0) ** k * f64(3.0, 1.0) for k in range(3)])
    torch.testing.assert_close(point, limit + 4 * f64(3.0, 1.0))
    assert length == 1.0 and torch.equal(extrapolate(*[limit] * 3)[0], limit)


# Mixtures -----------------------------------------------------------------------------------------------------------

KINDS = {
    "full": constraints.lower_cholesky,
    "tied": constraints.lower_cholesky,
    "diagonal": constraints.positive,
    "spherical": constraints.positive,
}


def gaussians(number: int, kind: str, data: Tensor = IRIS, mask: Any = None) -> Any:
    initial = steps.gaussian_mixture(number, kind).start(1, {}, data)

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", initial["weights"], constraint=constraints.simplex)
        means = pyro.param("means", initial["means"])
        scales = pyro.param("scales", initial["scales"], constraint=KINDS[kind])
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=True if mask is None else mask):
            z = pyro.sample("z", dist.Categorical(weights))
            if kind in ("full", "tied"):
                normal = dist.MultivariateNormal(means[z], scale_tril=scales[z] if kind == "full" else scales)
            else:
                normal = dist.Normal(means[z], scales[z] if kind == "diagonal" else scales[z][..., None]).to_event(1)
            pyro.sample("x", normal, obs=x)

    return model


def mixture_em(number: int, kind: str, **options: Any) -> EM:
    return EM(gaussians(number, kind), e_step="enumerated", m_step=steps.gaussian_mixture(number, kind, **options))


def test_the_diagonal_mixture_from_k_means_ends_at_a_lower_maximum():
    from sklearn.cluster import KMeans

    labels = torch.tensor(KMeans(3, n_init=5, random_state=0).fit_predict(IRIS.numpy())).long()
    r = torch.nn.functional.one_hot(labels).double()
    means = r.T @ IRIS / r.sum(0)[:, None]
    scales = (r.T @ IRIS.square() / r.sum(0)[:, None] - means.square()).sqrt()

    def init(seed: int) -> dict[str, Tensor]:
        return {"weights": r.mean(0), "means": means, "scales": scales}

    fit = mixture_em(3, "diagonal").run(IRIS, init=init, stop=Deterministic(1e-8))
    assert fit.objective == pytest.approx(-307.1776, abs=1e-4)


def test_acceleration_wants_exact_half_steps():
    problem = problems.normal_normal()
    em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.01}))
    with pytest.raises(StepError, match="accelerate"):
        em.run(*problem.args, max_iter=2, accelerate="squarem")
    with pytest.raises(StepError, match="accelerate"):
        linkage_em().run(data=[LINKAGE], accelerate="squarem")


def test_an_update_at_the_boundary_is_degenerate():
    update = Update(lambda q, y: {"mu": y.mean(), "tau": y.mean() * 0})
    em = EM(schools, schools_guide, None, e_step=schools_em().e_step, m_step=update)
    fit = em.run(SCHOOLS)
    assert fit.status == "DEGENERATE" and "boundary" in fit.verdict.reason
    assert float(fit.params["tau"]) == pytest.approx(10.0) and float(fit.params["mu"]) == 0.0


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_an_update_outside_the_constraint_is_an_error(value):
    em = linkage_em(lambda s, params: {"theta": torch.full_like(params["theta"], value)})
    with pytest.raises(EmvaeError, match=r"outside|finite"):
        em.run(LINKAGE)
    assert float(em.blocks.constrained()["theta"]) == 0.5


def test_a_singular_matrix_in_the_update_is_degenerate():
    em = linkage_em(lambda s, params: {"theta": torch.linalg.cholesky(torch.zeros(1, 1))[0, 0]})
    assert em.run(LINKAGE).status == "DEGENERATE"


@pytest.mark.parametrize("kind", KINDS)
def test_the_gaussian_m_step_is_the_maximum(kind):
    """With the posterior held, the gradient of E[log p] is zero after it."""
    assert_maximum(mixture_em(3, kind), IRIS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mask_hides_counts_for_nothing(kind):
    kept = torch.arange(150) % 5 != 0
    subset = EM(gaussians(3, kind, IRIS[kept]), e_step="enumerated", m_step=steps.gaussian_mixture(3, kind))
    expected = subset.run(IRIS[kept], max_iter=3, stop=None)
    pyro.clear_param_store()
    x = torch.where(kept[:, None], IRIS, 1e6)
    em = EM(gaussians(3, kind, IRIS[kept], kept), e_step="enumerated", m_step=steps.gaussian_mixture(3, kind))
    fit = em.run(x, max_iter=3, stop=None)
    assert fit.objective == pytest.approx(expected.objective, rel=1e-12)
    for name, value in expected.params.items():
        torch.testing.assert_close(fit.params[name], value, rtol=1e-9, atol=1e-12)


DISCRETE = {
    "bernoulli": (steps.bernoulli_mixture(2, weights="w", probs="p"), dist.Bernoulli, constraints.unit_interval, (6,)),
    "poisson": (steps.poisson_mixture(2, weights="w", rates="p"), dist.Poisson, constraints.positive, (6,)),
    "categorical": (
        steps.categorical_mixture(2, 4, weights="w", probs="p"),
        dist.Categorical,
        constraints.simplex,
        (6, 4),
    ),
}


def discrete(kind: str) -> tuple[EM, Tensor]:
    step, family, constraint, shape = DISCRETE[kind]
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(2 if kind == "bernoulli" else 4, (40, 6), generator=generator).double()
    initial = torch.rand((2, *shape), generator=generator, dtype=torch.float64) + 0.1
    initial = initial / initial.sum(-1, keepdim=True)

    def model(x: Tensor) -> None:
        weights = pyro.param("w", f64(0.4, 0.6), constraint=constraints.simplex)
        p = pyro.param("p", initial, constraint=constraint)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", family(p[z]).to_event(1), obs=x)

    return EM(model, e_step="enumerated", m_step=step), x


@pytest.mark.parametrize("kind", DISCRETE)
def test_the_discrete_m_steps_are_maxima(kind):
    assert_maximum(*discrete(kind))


def assert_maximum(em: EM, x: Tensor) -> None:
    em.engine.setup((x,), {})
    state, posterior, _ = em.e_step.expect(em.engine, em.engine.state, x)
    before = float(posterior.expected_log_joint(1).detach())
    em.m_step.maximise(em.engine, state, posterior, x)
    expected = posterior.expected_log_joint(1)
    assert float(expected.detach()) > before
    leaves = em.blocks.leaves("model")
    for name, grad in zip(leaves, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("order", ["first", "squares", "products"])
def test_sums_of_responsibilities_equal_sums_of_statistics(order):
    """With scale, mask and, in place of all outcomes, draws of unequal weights."""
    from pyro_emvae.posterior import Support
    from pyro_emvae.steps.ready_mixtures import MixtureStatistics

    statistics = MixtureStatistics(3, "z", "x", lambda x: x - 1.0, order)
    x, mask = IRIS[:20], torch.arange(20) % 3 != 0
    weights = torch.log_softmax(torch.randn(5, 20, dtype=torch.float64), 0)
    draws = {"z": torch.randint(3, (5, 20))}
    outcomes = {"z": torch.arange(3)[:, None]}
    for values, log_weights in ((draws, weights), (outcomes, weights[:3].log_softmax(0))):
        support = Support(values, log_weights, 1, 2.5, mask)
        direct, slow = statistics.total(support, x=x), support.total(lambda v: statistics(v, x=x))
        assert direct.keys() == slow.keys()
        for name in direct:
            torch.testing.assert_close(direct[name], slow[name].to(direct[name]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"n_init": 3, "seed": 0}, {"accelerate": "squarem"}])
def test_a_mixture_of_numbers_is_that_of_vectors_of_one(options):
    x = IRIS[:, 2]

    def numbers(x: Tensor) -> None:
        weights = pyro.param("weights", f64(0.5, 0.5), constraint=constraints.simplex)
        means = pyro.param("means", f64(2.0, 5.0))
        scales = pyro.param("scales", f64(1.0, 1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[z], scales[z]), obs=x)

    def vectors(x: Tensor) -> None:
        weights = pyro.param("weights", f64(0.5, 0.5), constraint=constraints.simplex)
        means = pyro.param("means", f64(2.0, 5.0)[:, None])
        scales = pyro.param("scales", f64(1.0, 1.0)[:, None], constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[z], scales[z]).to_event(1), obs=x)

    fits = []
    for model, data in ((numbers, x), (vectors, x[:, None])):
        pyro.clear_param_store()
        em = EM(model, e_step="enumerated", m_step=steps.gaussian_mixture(2, "diagonal"))
        fits.append(em.run(data, max_iter=60, stop=None, **options))
    one, two = fits
    assert one.objective == pytest.approx(two.objective, rel=1e-12)
    for name, value in one.params.items():
        assert value.shape == (2,)
        torch.testing.assert_close(value, two.params[name].reshape(2), rtol=1e-9, atol=0)


def test_mixtures_refuse_what_they_cannot_do():
    with pytest.raises(StepError, match=r"'diag'.*'diagonal'"):
        steps.gaussian_mixture(3, "diag")
    with pytest.raises(EmvaeError, match="got 0"):
        steps.gaussian_mixture(0)
    with pytest.raises(StepError, match=r"'component'.*'z'"):
        mixture_em(2, "tied", latent="component").step(IRIS)


# An objective that goes down ----------------------------------------------------------------------------------------


def worse(after: int) -> Any:
    """An update that moves away from the maximum from its nth call on."""
    calls = []

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        best = s["recombined"] / s["all"]
        return {"theta": best if len(calls) <= after else 0.9 * params["theta"]}

    return update


@pytest.mark.parametrize("max_iter", [3, 10])
def test_a_decrease_is_an_error_and_the_parameters_are_those_before(max_iter):
    """With three iterations, the third one lowers the objective, which only the value at the end shows."""
    em = linkage_em(worse(2))
    with pytest.raises(StepError, match=r"cannot raise the objective.*on_decrease"):
        em.run(LINKAGE, max_iter=max_iter)
    assert float(em.blocks.constrained()["theta"]) == pytest.approx(SEQUENCE[2], abs=1e-9)


@pytest.mark.parametrize("max_iter", [3, 10])
def test_a_decrease_is_reverted(max_iter):
    fit = linkage_em(worse(2)).run(LINKAGE, max_iter=max_iter, on_decrease="revert")
    assert fit.status == "REVERTED" and "after" in fit.verdict.reason
    assert float(fit.params["theta"]) == pytest.approx(SEQUENCE[2], abs=1e-9)
    assert fit.objective == pytest.approx(fit.history["objective"].values.max(), abs=1e-12)


def test_a_decrease_is_a_warning():
    with pytest.warns(UserWarning, match="cannot raise the objective"):
        fit = linkage_em(worse(2)).run(LINKAGE, max_iter=6, on_decrease="warn")
    assert fit.status == "DECREASED" and fit.num_iterations == 6


def test_in_float32_it_is_a_warning_by_default():
    x = LINKAGE.float()
    with pytest.warns(UserWarning, match="cannot raise the objective"):
        assert linkage_em(worse(2), torch.float32).run(x, max_iter=6).status == "DECREASED"
    pyro.clear_param_store()
    assert linkage_em(dtype=torch.float32).run(x).status == "CONVERGED"


def test_gradient_steps_and_loaders_may_go_down():
    em = linkage_em(worse(2))
    assert em.run(data=[LINKAGE], num_epochs=6).status == "MAX_ITER"
    em = EM(linkage(), optim=pyro.optim.SGD({"lr": 0.5}), e_step="enumerated")
    assert em.run(LINKAGE, max_iter=4).status == "MAX_ITER"


def test_a_subsampled_model_is_not_exact():
    """Each iteration sees another batch, so its objective goes up and down."""

    def model(x: Tensor) -> None:
        rate = pyro.param("rate", f64(1.0, 3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x), subsample=torch.randperm(len(x))[:5]) as index:
            z = pyro.sample("z", dist.Bernoulli(f64(0.5)[0])).long()
            pyro.sample("x", dist.Poisson(rate[z]), obs=x[index])

    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        z = values["z"]
        return {"n": torch.stack([1 - z, z], -1)}

    em = EM(model, e_step="enumerated", m_step=steps.ClosedForm(statistics, lambda s, params: {}))
    fit = em.run(torch.poisson(torch.full((50,), 2.0)).double(), max_iter=30, seed=0)
    assert em.blocks.subsampled and em.blocks.num_data == 50
    assert fit.status == "MAX_ITER" and (np.diff(fit.history["objective"].values) < 0).any()
    with pytest.raises(StepError, match="accelerate"):
        em.run(torch.ones(50, dtype=torch.float64), accelerate="squarem")


# History ------------------------------------------------------------------------------------------------------------


def test_objective_and_parameters_of_the_same_number_belong_together():
    fit = linkage_em().run(LINKAGE, max_iter=4, stop=None, track=["theta"])
    theta, history = fit.history["param_theta"].values, fit.history
    for k in range(4):
        cells = f64(0.5 + theta[k] / 4, (1 - theta[k]) / 4, (1 - theta[k]) / 4, theta[k] / 4)
        expected = float(dist.Multinomial(197, probs=cells).log_prob(LINKAGE))
        assert history["objective"].values[k] == pytest.approx(expected, rel=1e-12)
    logits = np.log(theta / (1 - theta))
    assert history["change"].values == pytest.approx(np.abs(np.diff(logits)) / np.maximum(1, np.abs(logits[:-1])))
    assert history.attrs["map_evaluations"] == 4


def test_full_history_has_all_gains_and_changes_nothing():
    light = mixture_em(2, "full").run(IRIS, max_iter=5, stop=None)
    pyro.clear_param_store()
    full = mixture_em(2, "full").run(IRIS, max_iter=5, stop=None, history="full")
    assert all(torch.equal(light.params[n], full.params[n]) for n in light.params)
    history = full.history
    assert history["objective"].values == pytest.approx(light.history["objective"].values, rel=1e-12)
    e_gain, m_gain = history["e_gain"].values, history["m_gain"].values
    assert math.isnan(e_gain[0]) and (e_gain[1:] > 0).all() and (m_gain > 0).all()
    assert e_gain[1:] + m_gain[:-1] == pytest.approx(np.diff(history["objective"].values), rel=1e-6)
    assert np.isnan(light.history["m_gain"].values).all()


def test_full_history_of_gradient_steps_is_on_common_random_numbers():
    problem = problems.linear_gaussian()
    fits = {}
    for kind in ("light", "full"):
        pyro.clear_param_store()
        em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 1e-3}))
        fits[kind] = em.run(*problem.args, max_iter=4, seed=0, history=kind)
    assert all(torch.equal(v, fits["full"].params[n]) for n, v in fits["light"].params.items())
    history = fits["full"].history
    gains = history["e_gain"].values[1:] + history["m_gain"].values[:-1]
    assert np.isfinite(gains).all()
    assert gains == pytest.approx(np.diff(history["objective"].values), rel=1e-6, abs=1e-9)


def test_a_tracked_parameter_that_is_made_by_the_first_step_has_its_initial_value():
    problem = problems.normal_normal()
    runs = []
    for track in ((), problem.guide_params):
        pyro.clear_param_store()
        fresh = problems.normal_normal()
        svi = SVI(fresh.model, fresh.guide, pyro.optim.Adam({"lr": 0.1}))
        runs.append(svi.run(3, *fresh.args, seed=0, track=track))
    assert all(torch.equal(v, runs[1].params[n]) for n, v in runs[0].params.items())
    for name in problem.guide_params:
        values = runs[1].history[f"param_{name}"].values
        assert len(values) == 4 and values[-1] == pytest.approx(runs[1].params[name].numpy())
        assert values[0] == pytest.approx(problem.params[name].detach().numpy())


# Stochastic runs ----------------------------------------------------------------------------------------------------


def stochastic(lr: float, cls: type = SVI) -> Any:
    problem = problems.normal_normal()
    svi = cls(problem.model, problem.guide, pyro.optim.Adam({"lr": lr}))
    return svi, problem.args


def test_no_rule_stops_a_stochastic_run_unless_asked():
    svi, args = stochastic(0.0)
    assert svi.run(300, *args).status == "MAX_ITER"


@pytest.mark.parametrize("lr", [0.0, 0.02])
def test_a_windowed_rule_stops_a_run_that_drifts_no_more(lr):
    svi, args = stochastic(lr)
    fit = svi.run(5000, *args, seed=0, stop=Windowed(tol=2.0, window=40, patience=3))
    assert fit.status == "CONVERGED" and 160 <= fit.num_iterations < 5000
    assert fit.verdict.error > 0


def test_a_windowed_rule_waits_for_the_warm_up_and_for_a_moving_run():
    svi, args = stochastic(0.0)
    rule = Windowed(tol=2.0, window=40, patience=3, warm_up=400)
    assert svi.run(5000, *args, seed=0, stop=rule).num_iterations >= 560
    pyro.clear_param_store()
    svi, args = stochastic(1e-3)
    assert svi.run(200, *args, seed=0, stop=Windowed(tol=1e-3, window=20, patience=3)).status in ("MAX_ITER", "STALLED")


def test_with_a_loader_a_rule_is_asked_per_epoch():
    svi, (x,) = stochastic(0.0)
    fit = svi.run(data=[x, x], num_epochs=100, seed=0, stop=Windowed(tol=5.0, window=4, patience=2))
    assert fit.status == "CONVERGED" and fit.num_iterations % 8 == 0 and fit.num_iterations < 200


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"stop": 1e-6}, "float"),
        ({"stop": "always"}, "str"),
        ({"on_decrease": "ignore"}, "'ignore'"),
        ({"accelerate": "anderson"}, "'anderson'"),
        ({"history": "long"}, "'long'"),
    ],
)
def test_options_of_the_loop_are_checked(options, observed):
    em = linkage_em()
    with pytest.raises(EmvaeError, match=rf"^`(EM\.)?run` .*{observed}"):
        em.run(LINKAGE, **options)
    assert em.run(LINKAGE).status == "CONVERGED"


def test_the_statuses_are_documented():
    assert all(text for text in convergence.STATUSES.values())
