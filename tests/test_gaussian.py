r"""Gaussian and Laplace E-steps against dense linear algebra, closed forms and scikit-learn; their ready M-steps."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_emvae import EM, log_evidence, problems, steps
from pyro_emvae._checks import EmvaeError, StepError
from pyro_emvae.convergence import Deterministic
from pyro_emvae.parameters import MODEL
from pyro_emvae.particles import subsample_values
from pyro_emvae.posterior import Outer, PosteriorGuide, Support

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=F64)


def number(x: Any) -> Tensor:
    return torch.tensor(x, dtype=F64)


X, Y = normal(6, 4), normal(10)
COUNTY = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0, 0])

# Models of every arrangement of latents ---------------------------------------------------------------------------


def scale() -> Tensor:
    return pyro.param("scale", lambda: number(0.7), constraint=constraints.positive)


def global_only(y=Y):
    b = pyro.sample("b", dist.MultivariateNormal(number([0.0, 0.0]), number([[1.0, 0.3], [0.3, 2.0]])))
    with pyro.plate("n", 10):
        pyro.sample("y", dist.Normal(b[..., 0].reshape(b.shape[:-1]) + b[..., 1] * torch.arange(10), scale()), obs=y)


def varying_intercepts(y=Y):
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    with pyro.plate("county", 3):
        u = pyro.sample("u", dist.Normal(mu, scale()))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(u[..., COUNTY], 0.5), obs=y)


def two_global_and_local(x=X):
    a, b = (pyro.sample(name, dist.Normal(number(0.5), 1.0)) for name in "ab")
    with pyro.plate("group", 6, dim=-2):
        u = pyro.sample("u", dist.Normal(a, scale()))
        with pyro.plate("inside", 4, dim=-1):
            pyro.sample("x", dist.Normal(1.3 * u + b, 0.5), obs=x)


def nested(x=X):
    with pyro.plate("group", 6, dim=-2):
        u = pyro.sample("u", dist.Normal(number(0.3), scale()))
        with pyro.plate("inside", 4, dim=-1):
            v = pyro.sample("v", dist.Normal(u, 0.5))
            pyro.sample("x", dist.Normal(v, 0.6), obs=x)


def crossed(x=X):
    rows, columns = pyro.plate("rows", 6, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        u = pyro.sample("u", dist.Normal(number(0.3), scale()))
    with columns:
        v = pyro.sample("v", dist.Normal(number(0.0), 1.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(u + v, 0.5), obs=x)


def chain(y=Y):
    z = number(0.0)
    for t in pyro.markov(range(10)):
        z = pyro.sample(f"z_{t}", dist.Normal(z, scale()))
        pyro.sample(f"y_{t}", dist.Normal(z, 0.6), obs=y[t])


def chains_in_a_plate(x=X):
    step = number([[0.9, 0.2], [0.0, 0.8]])
    with pyro.plate("n", 6):
        z = torch.zeros(6, 2, dtype=F64)
        for t in pyro.markov(range(4)):
            z = pyro.sample(f"z_{t}", dist.Normal(z @ step, scale()).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z.sum(-1), 0.6), obs=x[:, t])


def walk_within_a_plate(y=Y):
    """The plate's elements depend on each other through what is observed."""
    with pyro.plate("t", 10):
        z = pyro.sample("z", dist.Normal(number(0.0), scale()))
        pyro.sample("y", dist.Normal(z.cumsum(-1), 0.5), obs=y)


def matrices(x=X):
    with pyro.plate("n", 6):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 2, dtype=F64), scale()).to_event(2))
        w = pyro.sample("w", dist.Normal(z[..., 0, 0], 1.0))
        loc = z.sum(-1) @ torch.ones(2, 4, dtype=F64) + w[..., None]
        pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)


MODELS = {
    model.__name__: model
    for model in (
        global_only,
        varying_intercepts,
        two_global_and_local,
        nested,
        crossed,
        chain,
        chains_in_a_plate,
        walk_within_a_plate,
        matrices,
    )
}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def by_dense_algebra(model) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """log p(x), differentiable by theta, and each latent's means and variances, from one dense Hessian."""
    trace = poutine.trace(model).get_trace()
    latents = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    latents = {n: v for n, v in latents.items() if n not in subsample_values(model, lambda: None, (), {})}
    sizes = [v.numel() for v in latents.values()]

    def f(flat: Tensor) -> Tensor:
        values = {n: part.reshape(v.shape) for (n, v), part in zip(latents.items(), flat.split(sizes), strict=True)}
        return poutine.trace(poutine.condition(model, data=values)).get_trace().log_prob_sum()

    zero = torch.zeros(sum(sizes), dtype=F64)
    covariance = torch.linalg.inv(-torch.autograd.functional.hessian(f, zero, create_graph=True))
    mean = covariance @ torch.autograd.functional.jacobian(f, zero, create_graph=True)
    evidence = f(mean) + 0.5 * torch.logdet(2 * math.pi * covariance)
    parts = [x.detach().split(sizes) for x in (mean, covariance.diagonal())]
    means, variances = (
        {n: p.reshape(v.shape) for (n, v), p in zip(latents.items(), part, strict=True)} for part in parts
    )
    return evidence, means, variances


def plain(q: Any) -> Any:
    """A matrix-valued marginal as its vector, which has moments."""
    return q.base_dist if isinstance(q, dist.TransformedDistribution) else q


NODES = steps.Laplace(num_nodes=2)


@models
@pytest.mark.parametrize("step", [steps.Gaussian(), steps.Laplace(), NODES], ids=repr)
def test_posterior_equals_dense_linear_algebra(model, step):
    evidence, means, variances = by_dense_algebra(model)
    posterior = step.infer(model, (), {})
    assert posterior.is_exact is isinstance(step, steps.Gaussian)
    assert posterior.log_evidence == pytest.approx(float(evidence.detach()), abs=1e-10)
    for name, mean in means.items():
        q = posterior.marginal(name)
        assert q.batch_shape + q.event_shape == mean.shape
        torch.testing.assert_close(plain(q).mean.flatten(), mean.flatten(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(plain(q).variance.flatten(), variances[name].flatten(), rtol=1e-10, atol=1e-10)


@models
@pytest.mark.parametrize("step", [steps.Gaussian(), NODES], ids=repr)
def test_expectations_and_fishers_identity(model, step):
    r"""$E[\log p(x,z)]+H=\log p(x)$, and their gradients by theta at fixed q are the same."""
    evidence, _, _ = by_dense_algebra(model)
    leaf = pyro.param("scale").unconstrained()
    (expected,) = torch.autograd.grad(evidence, leaf)
    posterior = step.infer(model, (), {})
    value = posterior.expected_log_joint(1)
    (found,) = torch.autograd.grad(value, leaf)
    assert float(value.detach()) + posterior.entropy == pytest.approx(float(evidence.detach()), abs=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@models
@pytest.mark.parametrize("step", [steps.Gaussian(), steps.Laplace()], ids=repr)
def test_draws_are_from_the_joint_posterior(model, step):
    """log p(x, z) - log q(z) is log p(x) for every draw, so all latents are drawn jointly and scored so."""
    guide = PosteriorGuide(lambda args, kwargs: step.infer(model, args, kwargs))
    evidence, _, _ = by_dense_algebra(model)
    estimate = log_evidence(model, guide, num_particles=7, seed=0)
    assert estimate.value == pytest.approx(float(evidence.detach()), abs=1e-9)
    assert estimate.standard_error < 1e-9
    posterior = step.infer(model, (), {})
    particles = posterior.particles(5)
    weights = particles.log_p - particles.log_q
    assert weights.shape == (5,)
    torch.testing.assert_close(weights, evidence.detach().expand(5), rtol=0, atol=1e-9)


def test_a_model_that_cannot_be_vectorized_is_run_node_by_node():
    def model():
        with pyro.plate("county", 3):
            u = pyro.sample("u", dist.Normal(number(0.2), scale()))
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Normal(u[COUNTY], 0.5), obs=Y)

    posterior = steps.Gaussian().infer(model, (), {})
    with pytest.warns(UserWarning, match="index 2 is out of bounds"):
        value = posterior.expected_log_joint(1)
    assert float(value.detach()) + posterior.entropy == pytest.approx(posterior.log_evidence, abs=1e-10)


def test_many_blocks_and_a_long_chain_keep_their_structure():
    def many():
        with pyro.plate("n", 20_000):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(20_000, dtype=F64))

    posterior = steps.Gaussian().infer(many, (), {})
    assert posterior.factor.local.shape == (1, 3, 3)
    assert posterior.log_evidence == pytest.approx(20_000 * -0.5 * math.log(2 * math.pi * 4), rel=1e-12)
    assert posterior.support().values["z"].shape == (6, 20_000, 3)

    def long():
        z = number(0.0)
        for t in pyro.markov(range(40)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=number(0.3))

    products = []
    joint = posterior.joint
    curve = type(joint).curve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(joint), "curve", lambda *args: products.append(1) or curve(*args))
        found = steps.Gaussian().infer(long, (), {})
    assert len(products) == 3
    time = torch.arange(1.0, 41.0, dtype=F64)
    covariance = torch.minimum(time[:, None], time) + torch.eye(40, dtype=F64)
    exact = dist.MultivariateNormal(torch.zeros(40, dtype=F64), covariance).log_prob(number(0.3).expand(40))
    assert found.log_evidence == pytest.approx(float(exact), abs=1e-10)


# Masks, scales, minibatches ---------------------------------------------------------------------------------------


def pca(x: Tensor, mask: Any = None, data_scale: Any = 1.0, size: int | None = None) -> None:
    weight = pyro.param("weight", lambda: number([[0.9, 0.2], [-0.4, 0.7], [0.5, -0.6], [0.1, 0.3]]).to(x.dtype))
    bias = pyro.param("bias", lambda: number([0.1, -0.3, 0.2, 0.0]).to(x.dtype))
    sigma = pyro.param("sigma", lambda: number(0.9).to(x.dtype), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample_size=len(x)), poutine.scale(scale=data_scale):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        likelihood = dist.Normal(z @ weight.T + bias, sigma)
        likelihood = likelihood if mask is None else likelihood.mask(mask)
        pyro.sample("x", likelihood.to_event(1), obs=x.nan_to_num())


def exact_rows(x: Tensor) -> Tensor:
    """log p(x_n) of probabilistic PCA at the param store's values; NaN is missing."""
    weight, bias, sigma = (pyro.param(name) for name in ("weight", "bias", "sigma"))
    covariance = weight @ weight.T + sigma**2 * torch.eye(4, dtype=x.dtype)
    rows = []
    for row in x:
        seen = ~row.isnan()
        if not bool(seen.any()):
            rows.append(row.new_zeros(()))
            continue
        q = dist.MultivariateNormal(bias[seen], covariance[seen][:, seen])
        rows.append(q.log_prob(row[seen]))
    return torch.stack(rows)


MISSING = X.clone()
MISSING[0, 1] = MISSING[2, :3] = MISSING[4] = math.nan
WEIGHTS = number([0.5, 1.0, 2.0, 3.0, 0.25, 1.5])


@pytest.mark.parametrize("step", [steps.Gaussian(), steps.Laplace()], ids=repr)
@pytest.mark.parametrize(
    ("x", "options", "factor"),
    [
        (MISSING, {"mask": ~MISSING.isnan()}, 1.0),
        (X, {"data_scale": 2.5}, 2.5),
        (X, {"data_scale": WEIGHTS}, WEIGHTS),
        (X, {"size": 60}, 10.0),
        (MISSING, {"size": 60, "data_scale": WEIGHTS, "mask": ~MISSING.isnan()}, 10 * WEIGHTS),
    ],
    ids=["mask", "scale", "weights", "subsample", "all"],
)
def test_masks_scales_and_minibatches(step, x, options, factor):
    posterior = step.infer(pca, (x,), options)
    expected = (factor * exact_rows(x)).sum()
    assert posterior.log_evidence == pytest.approx(float(expected.detach()), abs=1e-10)
    value = posterior.expected_log_joint(1)
    assert float(value.detach()) + posterior.entropy == pytest.approx(posterior.log_evidence, abs=1e-10)
    leaves = [pyro.param(name).unconstrained() for name in ("weight", "bias", "sigma")]
    for one, two in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_data_that_are_masked_altogether_count_for_nothing():
    keep = torch.tensor([True, False, True, True, False, True])

    def model(x):
        with poutine.mask(mask=keep):
            pca(x)

    posterior = steps.Gaussian().infer(model, (X,), {})
    assert posterior.log_evidence == pytest.approx(float(exact_rows(X)[keep].sum().detach()), abs=1e-10)
    assert posterior.marginal("z").mean[1].abs().max() < 1e-12
    value = posterior.expected_log_joint(1)
    assert float(value.detach()) + posterior.entropy == pytest.approx(posterior.log_evidence, abs=1e-10)
    total = posterior.support().total(lambda values: torch.ones_like(values["z"][..., 0]))
    assert float(total) == pytest.approx(4.0)


def test_a_model_that_draws_its_minibatch_keeps_it():
    problem = problems.linear_gaussian(subsample_size=5)
    posterior = steps.Gaussian().infer(problem.model, problem.args, {})
    (rows,) = posterior.batch.values()
    full = problems.linear_gaussian()
    inside = full.posterior()["z"].mean[rows]
    torch.testing.assert_close(posterior.marginal("z").mean, inside, rtol=1e-10, atol=1e-10)
    value = float(posterior.expected_log_joint(1).detach())
    assert value + posterior.entropy == pytest.approx(posterior.log_evidence, abs=1e-10)


@pytest.mark.parametrize("step", [steps.Gaussian(), steps.Laplace()], ids=repr)
def test_a_minibatch_that_the_caller_gave_is_kept(step):
    rows = torch.tensor([4, 1])

    def model(x, rows):
        with pyro.plate("data", len(X), subsample=rows):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(x.shape), 1.0).to_event(1), obs=x)

    posterior = step.infer(model, (X[rows], rows), {})
    with pyro.poutine.trace() as drawn:
        values = posterior.sample()
    assert torch.equal(posterior.batch["data"], rows) and posterior.drawn == ()
    assert values["z"].shape == (2, 2) and drawn.trace.nodes["z"]["scale"] == len(X) / 2
    problem = problems.linear_gaussian(subsample_size=5)
    assert step.infer(problem.model, problem.args, {}).drawn == ("data",)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float64, 1e-9)])
def test_data_far_from_zero_do_not_make_it_any_less_quadratic(dtype, tolerance):
    """At the prior's draws the density is e^(-10^7) of what it is at the mode: differences there are rounding alone."""
    x = 1000.0 + torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.mean(), 0.2))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), x.new_ones(3)).to_event(1), obs=x)

    posterior, x = steps.Gaussian().infer(model, (x,), {}), x.double()
    covariance = torch.eye(3, dtype=torch.float64) + 0.2**2
    expected = float(dist.MultivariateNormal(x.mean().expand(3), covariance).log_prob(x).sum())
    assert posterior.log_evidence == pytest.approx(expected, abs=tolerance)
    means = (x.sum(-1) + x.mean() / 0.2**2) / (3 + 1 / 0.2**2)
    torch.testing.assert_close(posterior.marginal("z").mean.double(), means, rtol=tolerance / 1000, atol=0)


@pytest.mark.parametrize("step", [steps.Gaussian(), steps.Laplace()], ids=repr)
def test_float32(step):
    x = X.float() + 100.0
    posterior = step.infer(pca, (x,), {})
    assert posterior.marginal("z").mean.dtype == torch.float32
    exact = float(exact_rows(x).sum().detach())
    assert posterior.log_evidence == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True, False, True])])
@pytest.mark.parametrize("factor", [1.0, 2.5, WEIGHTS])
@pytest.mark.parametrize("nodes", ["one weight", "a weight per datum"])
def test_sums_of_outer_products_form_none_per_datum(nodes, factor, mask):
    z, x = normal(5, 6, 2), normal(1, 6, 3)
    log_weights = normal(5, 6 if nodes == "a weight per datum" else 1).log_softmax(0)
    support = Support({"z": z}, log_weights, 1, factor, mask)
    for left, right in ((z, z), (x, z), (z, x), (x, x)):
        outer = Outer(left, right)
        found, expected = support.total(lambda _, o=outer: o), support.total(lambda _, o=outer: o.product)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    row = support.expect(lambda values: {"zz": Outer(values["z"], values["z"])})["zz"][2]
    weights = log_weights.exp().expand(5, 6)[:, 2]
    torch.testing.assert_close(row, (z[:, 2] * weights[:, None]).mT @ z[:, 2], rtol=1e-12, atol=1e-12)


def test_plates_are_stated_once_around_many_sites():
    def mixture(x=X):
        with pyro.plate("n", 6):
            k = pyro.sample("k", dist.Bernoulli(number(0.3)))
            m = pyro.sample("m", dist.Bernoulli(0.2 + 0.5 * k))
            pyro.sample("x", dist.Normal(k + 2 * m, 1.0), obs=x[:, 0])

    posterior = steps.Enumerated().infer(mixture, (), {})
    guide = PosteriorGuide(lambda args, kwargs: steps.Enumerated().infer(mixture, args, kwargs))
    estimate = log_evidence(mixture, guide, num_particles=1, seed=0)
    assert estimate.value == pytest.approx(posterior.log_evidence, abs=1e-10)


# EM ---------------------------------------------------------------------------------------------------------------


def test_em_with_an_exact_e_step_rises_to_the_maximum_likelihood():
    problem = problems.linear_gaussian()
    em = EM(problem.model, e_step="gaussian", m_step=steps.linear_gaussian())
    data = len(problem.args[0])
    fit = em.run(*problem.args, max_iter=2)
    first = fit.history["objective"].values
    assert first[0] / data == pytest.approx(float(problem.log_evidence()) / data, abs=1e-10)
    theta = {name: fit.params[name] for name in problem.model_params}
    assert em.step(*problem.args) / data == pytest.approx(-float(problem.log_evidence(theta)) / data, abs=1e-10)
    trace = em.run(*problem.args, max_iter=250).history["objective"].values
    assert (trace[1:] - trace[:-1]).min() >= -1e-10 and trace[0] > first[1] > first[0] + 1.0
    assert trace[-1] == pytest.approx(float(problem.log_evidence(problem.maximum())), abs=1e-4)


def test_closed_form_equals_the_m_step_written_by_hand():
    problem = problems.linear_gaussian()
    (x,) = problem.args
    q = problem.posterior()["z"]
    z = torch.cat([q.mean, torch.ones_like(q.mean[:, :1])], -1)
    second = z.T @ z
    second[:2, :2] += len(x) * q.covariance_matrix.reshape(-1, 2, 2)[0]
    both = torch.linalg.solve(second, z.T @ x).T
    left = (x - z @ both.T).square().sum(0) + len(x) * (
        both[:, :2] @ q.covariance_matrix.reshape(-1, 2, 2)[0] @ both[:, :2].T
    ).diagonal()
    expected = {"weight": both[:, :2], "bias": both[:, 2], "sigma": (left.sum() / x.numel()).sqrt()}
    em = EM(problem.model, e_step="gaussian", m_step=steps.linear_gaussian())
    em.step(x)
    for name, value in em.blocks.constrained().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


def test_missing_values_are_left_out_of_the_m_step():
    """Its value is a stationary point of the expected log joint under the mask."""
    em = EM(pca, e_step="gaussian", m_step=steps.linear_gaussian())
    kept = {"mask": ~MISSING.isnan()}
    posterior = steps.Gaussian().infer(pca, (MISSING,), kept)
    em.engine.setup((MISSING,), kept)
    em.m_step.maximise(em.engine, em.engine.state, posterior, MISSING, **kept)
    leaves = [pyro.param(name).unconstrained() for name in ("weight", "bias", "sigma")]
    for grad in torch.autograd.grad(posterior.expected_log_joint(1), leaves):
        assert grad.abs().max() < 1e-10


def factor_model(x: Tensor, num_factors: int, noise: Tensor):
    """PCA's directions at the wrong lengths, as initial weights."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    start = vectors[:, -num_factors:] * values[-num_factors:].sqrt() * 0.8

    def model(x):
        weight = pyro.param("weight", start.clone)
        bias = pyro.param("bias", lambda: x.mean(0))
        sigma = pyro.param("sigma", noise.clone, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(num_factors), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + bias, sigma).to_event(1), obs=x)

    return model


@pytest.fixture(scope="module")
def iris() -> Tensor:
    datasets = pytest.importorskip("sklearn.datasets")
    return torch.tensor(datasets.load_iris().data)


def test_probabilistic_pca_on_iris(iris):
    em = EM(factor_model(iris, 2, number(0.2)), e_step="gaussian", m_step=steps.linear_gaussian())
    trace = em.run(iris, max_iter=350, stop=None).history["objective"].values
    assert (trace[1:] - trace[:-1]).min() >= -1e-9
    assert trace[-1] == pytest.approx(-404.962780, abs=5e-6)
    assert float(pyro.param("sigma").detach()) ** 2 == pytest.approx(0.05068215, abs=1e-6)


def test_factor_analysis_on_iris_equals_scikit_learn(iris):
    decomposition = pytest.importorskip("sklearn.decomposition")
    sklearn = decomposition.FactorAnalysis(1, tol=1e-3, svd_method="lapack").fit(iris.numpy())
    model = factor_model(iris, 1, number([0.3] * 4))
    em = EM(model, e_step="gaussian", m_step=steps.linear_gaussian(noise_form="diagonal"))
    trace = em.run(iris, max_iter=60, stop=None).history["objective"].values
    best = 150 * sklearn.score(iris.numpy())
    assert (trace[1:] - trace[:-1]).min() >= -1e-9
    assert best - 5.0 < trace[-1] < best
    with torch.no_grad():
        pyro.param("weight").copy_(torch.tensor(sklearn.components_.T))
        pyro.param("sigma").unconstrained().copy_(torch.tensor(sklearn.noise_variance_).sqrt().log())
    assert em.posterior(iris).log_evidence / 150 == pytest.approx(best / 150, abs=1e-10)
    gain = -em.step(iris) - best, -em.step(iris) - best
    assert gain[0] == pytest.approx(0.0, abs=1e-8) and 0.0 <= gain[1] < 1e-2


RUNS = [
    {"max_iter": 150},
    {"max_iter": 150, "stop": Deterministic(tol=1e-3)},
    {"max_iter": 50, "accelerate": "squarem"},
]


@pytest.mark.parametrize("options", RUNS)
def test_a_heywood_case_creeps_and_is_not_called_converged(iris, options):
    """With one factor a noise variance of iris goes to zero; the likelihood's supremum is -422.3776, and never had."""
    em = EM(
        factor_model(iris, 1, number([0.3] * 4)), e_step="gaussian", m_step=steps.linear_gaussian(noise_form="diagonal")
    )
    fit = em.run(iris, **options)
    found = {name: value.detach() for name, value in em.blocks.constrained().items()}
    covariance = found["weight"] @ found["weight"].T + found["sigma"].square().diag()
    exact = dist.MultivariateNormal(found["bias"], covariance).log_prob(iris).sum()
    assert float(fit.objective) / 150 == pytest.approx(float(exact) / 150, abs=1e-10)
    assert fit.status in ("MAX_ITER", "SLOW") and -425.0 < float(fit.objective) < -422.3776
    assert float(found["sigma"].min()) < 0.15


def series(y):
    level = pyro.param("level_scale", lambda: number(0.5), constraint=constraints.positive)
    noise = pyro.param("noise_scale", lambda: number(1.5), constraint=constraints.positive)
    z = pyro.sample("level_0", dist.Normal(number(0.0), 2.0))
    for t in pyro.markov(range(len(y))):
        z = z if t == 0 else pyro.sample(f"level_{t}", dist.Normal(z, level))
        seen = ~y[t].isnan()
        pyro.sample(f"y_{t}", dist.Normal(z, noise).mask(seen), obs=y[t].nan_to_num())


@pytest.mark.parametrize("missing", [False, True])
def test_local_level(missing):
    torch.manual_seed(0)
    y = torch.randn(12, dtype=F64).cumsum(0) + 0.7 * torch.randn(12, dtype=F64)
    if missing:
        y[[3, 7]] = math.nan
    seen = ~y.isnan()
    em = EM(series, e_step="gaussian", m_step=steps.local_level())

    def exact(level: Tensor, noise: Tensor) -> Tensor:
        time = torch.arange(12, dtype=F64)
        covariance = 4.0 + level**2 * torch.minimum(time[:, None], time) + noise**2 * torch.eye(12, dtype=F64)
        return dist.MultivariateNormal(torch.zeros_like(y)[seen], covariance[seen][:, seen]).log_prob(y[seen])

    trace = em.run(y, max_iter=30).history["objective"].values
    assert trace[0] == pytest.approx(float(exact(number(0.5), number(1.5))), abs=1e-10)
    assert (trace[1:] - trace[:-1]).min() >= -1e-10
    posterior = em.posterior(y)
    em.m_step.maximise(em.engine, em.engine.state, posterior, y)
    leaves = [pyro.param(name).unconstrained() for name in ("level_scale", "noise_scale")]
    assert all(g.abs() < 1e-10 for g in torch.autograd.grad(posterior.expected_log_joint(1), leaves))


def test_gradient_m_step_climbs_the_evidence():
    problem = problems.linear_gaussian()
    em = EM(problem.model, optim=pyro.optim.Adam({"lr": 0.05}), e_step=steps.Gaussian(), m_step=steps.Gradient())
    before = float(problem.log_evidence())
    fit = em.run(*problem.args, max_iter=40)
    after = float(problem.log_evidence({n: fit.params[n] for n in problem.model_params}))
    assert after > before + 5.0
    assert fit.history["objective"].values[0] == pytest.approx(before, abs=1e-9)
    elbo = fit.history["elbo"].values
    assert elbo[0] == pytest.approx(before, abs=1e-9)


def test_the_posterior_on_new_data_and_the_guide():
    problem = problems.linear_gaussian()
    (x,) = problem.args
    em = EM(problem.model, e_step="gaussian", m_step=steps.linear_gaussian())
    em.run(x, max_iter=3)
    theta = em.blocks.constrained()
    generator = torch.get_rng_state()
    posterior = em.posterior(x[:3] + 1.0)
    assert torch.equal(generator, torch.get_rng_state())
    q = problem.posterior(theta)["z"]
    covariance = q.covariance_matrix.reshape(-1, 2, 2)[0]
    mean = (x[:3] + 1.0 - theta["bias"]) @ theta["weight"] @ covariance / theta["sigma"] ** 2
    torch.testing.assert_close(posterior.marginal("z").mean, mean, rtol=1e-10, atol=1e-10)
    estimate = log_evidence(problem.model, em.guide, x, num_particles=10, seed=0)
    assert estimate.value == pytest.approx(float(problem.log_evidence(theta)), abs=1e-9)
    assert estimate.standard_error < 1e-9
    average = posterior.expect(lambda values: values["z"])
    torch.testing.assert_close(average, mean, rtol=1e-10, atol=1e-10)
    with pytest.raises(StepError, match=r"'zz'.*'z'"):
        posterior.marginal("zz")


class Decoder(nn.Module):
    """A linear decoder that counts its calls and draws random numbers, to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def decode(self, z):
        self.calls.add_(1.0)
        return self.linear(z)


@pytest.mark.parametrize("step", ["gaussian", "laplace", NODES], ids=str)
def test_an_e_step_leaves_theta_buffers_and_generator_alone(step):
    model = Decoder()
    em = EM(model, optim=pyro.optim.Adam({"lr": 0.1}), e_step=step)
    em.step(X)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    state, posterior, info = em.e_step.expect(em.engine, em.engine.state, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert info.gradients == () and info.loss == -posterior.log_evidence
    assert all(p.grad is None for p in model.parameters())
    em.engine.steps = state.steps
    em.m_step.maximise(em.engine, em.engine.state, posterior, X)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"linear.weight", "linear.bias"} <= moved
    assert set(em.blocks.leaves(MODEL)) == {"linear.weight", "linear.bias"}


# Laplace ----------------------------------------------------------------------------------------------------------

COUNTS = number([0.0, 3.0, 1.0, 12.0, 0.0, 5.0])


def poisson(y=COUNTS):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(number(0.5), scale()))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y)


def gamma(y=COUNTS):
    with pyro.plate("n", len(y)):
        rate = pyro.sample("rate", dist.Gamma(number(3.0), number(2.0)))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def logistic(y=COUNTS):
    b = pyro.sample("b", dist.Normal(number([0.0, 0.0]), 3.0).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=b[..., :1] + b[..., 1:] * torch.arange(len(y))), obs=(y > 2).double())


def test_mode_and_curvature_per_datum():
    posterior = steps.Laplace().infer(poisson, (), {})
    q = posterior.marginal("z")
    residual = COUNTS - q.mean.exp() - (q.mean - 0.5) / 0.49
    assert residual.abs().max() < 1e-9
    torch.testing.assert_close(q.variance, 1 / (q.mean.exp() + 1 / 0.49), rtol=1e-6, atol=0)
    log_joint = dist.Normal(0.5, 0.7).log_prob(q.mean) + dist.Poisson(q.mean.exp()).log_prob(COUNTS)
    expected = (log_joint + 0.5 * (2 * math.pi * q.variance).log()).sum()
    assert posterior.log_evidence == pytest.approx(float(expected), abs=1e-6)
    nodes = torch.linspace(-6.0, 6.0, 20_001, dtype=F64)[:, None]
    exact = (dist.Normal(0.5, 0.7).log_prob(nodes) + dist.Poisson(nodes.exp()).log_prob(COUNTS)).logsumexp(0)
    assert posterior.log_evidence == pytest.approx(float((exact + math.log(12 / 20_000)).sum()), abs=0.1)
    assert not posterior.is_exact and posterior.kind == "laplace"


def test_the_curvature_of_a_binomial_whose_mode_is_at_a_logit_of_zero():
    def model(y):
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
            pyro.sample("y", dist.Binomial(10, logits=z), obs=y)

    q = steps.Laplace().infer(model, (number([5.0, 2.0, 8.0]),), {}).marginal("z")
    p = q.mean.sigmoid()
    assert q.mean[0] == 0.0
    torch.testing.assert_close(q.variance, 1 / (1 + 10 * p * (1 - p)), rtol=1e-6, atol=0)


def test_a_constrained_latent_is_approximated_in_its_logarithm():
    posterior = steps.Laplace().infer(gamma, (), {})
    q = posterior.marginal("rate")
    torch.testing.assert_close(q.base_dist.loc.exp(), (COUNTS + 3) / 3, rtol=1e-7, atol=0)
    torch.testing.assert_close(q.base_dist.scale, (COUNTS + 3).rsqrt(), rtol=1e-7, atol=0)
    normalized = torch.lgamma(COUNTS + 3) - (COUNTS + 3) * ((COUNTS + 3).log() - 1) + 0.5 * (COUNTS + 3).log()
    evidence = -posterior.log_evidence + sum(
        float(dist.GammaPoisson(number(3.0), number(2.0)).log_prob(y)) for y in COUNTS
    )
    assert evidence == pytest.approx(float((normalized - 0.5 * math.log(2 * math.pi)).sum()), abs=1e-6)
    guide = PosteriorGuide(lambda args, kwargs: steps.Laplace().infer(gamma, args, kwargs))
    estimate = log_evidence(gamma, guide, num_particles=4000, seed=0)
    exact = float(dist.GammaPoisson(number(3.0), number(2.0)).log_prob(COUNTS).sum())
    assert abs(estimate.value - exact) < 5 * estimate.standard_error < 0.1
    exact_entropy = (q.base_dist.entropy() + q.base_dist.loc).sum()
    assert posterior.entropy == pytest.approx(float(exact_entropy), abs=1e-8)


def test_newton_steps_start_where_the_last_ended_on_the_same_data():
    em = EM(poisson, optim=pyro.optim.SGD({"lr": 1e-6}), e_step=steps.Laplace())
    runs = []

    def counted(y):
        runs.append(1)
        poisson(y)

    em = EM(counted, optim=pyro.optim.SGD({"lr": 1e-6}), e_step=steps.Laplace())
    em.step(COUNTS)

    def count(y):
        runs.clear()
        state, _, _ = em.e_step.expect(em.engine, em.engine.state, y)
        em.engine.steps = state.steps
        return len(runs)

    assert count(COUNTS) == 2 < count(COUNTS + 1.0)
    assert count(COUNTS + 1.0) == 2
    assert set(em.engine.state.steps["E"]) == {"data", "z"}
    assert count(COUNTS[:3]) > 2


def test_newton_steps_never_lower_the_log_joint():
    """A Student-t likelihood with a far datum: the Hessian at zero is not negative definite."""

    def model(y):
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Normal(number(0.0), 10.0))
            pyro.sample("y", dist.StudentT(number(2.0), z, 0.1), obs=y)

    y = number([0.0, 0.5, 5.0, -9.0])
    q = steps.Laplace().infer(model, (y,), {}).marginal("z")
    assert (q.mean - y).abs().max() < 0.01
    with pytest.raises(StepError, match=r"'z'.*eigenvalue -"):
        steps.Gaussian().infer(model, (y,), {})


def test_too_few_newton_steps_say_what_is_left():
    with pytest.warns(UserWarning, match=r"max_iter=1 steps.*tol=1e-10"):
        steps.Laplace(max_iter=1).infer(poisson, (), {})


# Bad input --------------------------------------------------------------------------------------------------------


def upward(y=COUNTS):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
        pyro.factor("more", z.square())


def discrete(y=COUNTS):
    with pyro.plate("n", len(y)):
        k = pyro.sample("k", dist.Bernoulli(number(0.5)))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def without_latents(y=COUNTS):
    pyro.sample("y", dist.Normal(number(0.0), 1.0).expand([6]).to_event(1), obs=y)


def two_scales(y=COUNTS):
    mu = pyro.sample("mu", dist.Normal(number(0.0), 1.0))
    with pyro.plate("n", 60, subsample_size=6):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def not_finite(y=COUNTS):
    z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
    pyro.factor("f", (z * 0.0).log())


REFUSED = {
    "logistic": (logistic, "Gaussian", r"gradient misses a quadratic by [\d.]+ per.*steps.Laplace"),
    "poisson": (poisson, "Gaussian", r"misses a quadratic by.*steps.Laplace"),
    "positive": (gamma, "Gaussian", r"'rate'.*Gamma\(6,\).*steps.Laplace"),
    "upward": (upward, "Gaussian", r"'z'.*eigenvalue -1 of block"),
    "upward mode": (upward, "Laplace", r"'z'.*eigenvalue -1 of block"),
    "discrete": (discrete, "Gaussian", r"'k'.*Bernoulli\(6,\).*Enumerated"),
    "discrete mode": (discrete, "Laplace", r"'k'.*Bernoulli\(6,\).*Enumerated"),
    "no latents": (without_latents, "Gaussian", "without latents"),
    "scales": (two_scales, "Gaussian", r"1\.0, 10\.0"),
    "not finite": (not_finite, "Gaussian", "'f'"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_models_that_do_not_fit_are_refused(key):
    model, step, observed = REFUSED[key]
    with pytest.raises(EmvaeError, match=observed), pytest.MonkeyPatch.context():
        getattr(steps, step)().infer(model, (), {})


def test_a_logistic_model_is_taken_by_laplace():
    posterior = steps.Laplace().infer(logistic, (), {})
    b = posterior.marginal("b").mean.requires_grad_()
    log_joint = poutine.trace(poutine.condition(logistic, data={"b": b})).get_trace().log_prob_sum()
    assert torch.autograd.grad(log_joint, b)[0].abs().max() < 1e-8


def test_a_refused_e_step_changes_nothing():
    em = EM(poisson, optim=pyro.optim.Adam({"lr": 0.1}), e_step="laplace")
    em.step(COUNTS)
    before = em.blocks.constrained()
    em.e_step = steps.Gaussian()
    with pytest.raises(StepError, match="misses a quadratic"):
        em.step(COUNTS)
    assert all(torch.equal(v, before[n]) for n, v in em.blocks.constrained().items())


def test_arguments_that_make_no_sense():
    for options, observed in (({"max_iter": 0}, "0"), ({"tol": -1.0}, "-1"), ({"tol": "a"}, "'a'")):
        with pytest.raises(EmvaeError, match=observed):
            steps.Laplace(**options)
    with pytest.raises(EmvaeError, match=r"'diagnal'.*'diagonal'"):
        steps.linear_gaussian(noise_form="diagnal")
    problem = problems.linear_gaussian()
    for pair, observed in ((steps.linear_gaussian("w"), r"'w'.*'z'"), (steps.local_level(), r"'level_0'.*'z'")):
        pyro.clear_param_store()
        em = EM(problem.model, e_step="gaussian", m_step=pair)
        with pytest.raises(StepError, match=observed):
            em.step(*problem.args)
    em = EM(global_only, e_step="gaussian", m_step=steps.linear_gaussian("b"))
    with pytest.raises(StepError, match=r"\(4, 1, 2\).*\(10,\)"):
        em.step(Y)


def test_too_many_coordinates_in_one_block():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2001), 1.0).to_event(1))

    with pytest.raises(StepError, match="2001"):
        steps.Gaussian().infer(model, (), {})


def test_the_checks_find_planted_defects():
    """A cubic term of the size of the rounding of other checks, and a block that looks at another, are both seen."""

    def cubic(size):
        def model():
            with pyro.plate("n", 50):
                z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
                pyro.factor("f", size * z**3)

        return model

    with pytest.raises(StepError, match=r"misses a quadratic by [\d.]+e-0[56]"):
        steps.Gaussian().infer(cubic(1e-7), (), {})
    steps.Gaussian().infer(cubic(0.0), (), {})
    posterior = steps.Gaussian().infer(walk_within_a_plate, (), {})
    assert posterior.factor.local.shape == (1, 10, 10)
