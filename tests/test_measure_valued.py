r"""`MeasureValued` against exact derivatives by distribution, and against the variances of Mohamed et al. 2020."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_emvae import EstimatorError, MonteCarloELBO, compare_gradients
from pyro_emvae.estimators import measure_valued
from pyro_emvae.testing import assert_mean

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")
ONE = torch.tensor(1.0, dtype=torch.float64)


def constant(value: float):
    return lambda: torch.tensor(value, dtype=torch.float64)


def problem(name: str, f):
    r"""A guide of one site and a model of log density $f(z)+\log q(z)$, at the start: the signal is f."""
    start = {
        "normal": lambda: dist.Normal(ONE, ONE),
        "gamma": lambda: dist.Gamma(2.5 * ONE, 1.5 * ONE),
        "poisson": lambda: dist.Poisson(2.0 * ONE),
        "bernoulli": lambda: dist.Bernoulli(logits=0.4 * ONE),
        "categorical": lambda: dist.Categorical(logits=torch.tensor([0.1, -0.5, 0.7], dtype=torch.float64)),
    }[name]

    def model() -> None:
        z = pyro.sample("z", start())
        pyro.factor("f", f(z))

    def guide() -> None:
        if name == "normal":
            fn = dist.Normal(pyro.param("a", constant(1.0)), pyro.param("b", constant(1.0)))
        elif name == "gamma":
            fn = dist.Gamma(pyro.param("a", constant(2.5)), pyro.param("b", constant(1.5)))
        elif name == "poisson":
            fn = dist.Poisson(pyro.param("a", constant(2.0)))
        elif name == "bernoulli":
            fn = dist.Bernoulli(logits=pyro.param("a", constant(0.4)))
        else:
            fn = dist.Categorical(logits=pyro.param("a", lambda: torch.tensor([0.1, -0.5, 0.7], dtype=torch.float64)))
        pyro.sample("z", fn)

    return model, guide, start


def exact(name: str, f) -> dict[str, torch.Tensor]:
    """The derivative of E[f] by the parameters, by quadrature or summation."""
    a = {"normal": 1.0, "gamma": 2.5, "poisson": 2.0, "bernoulli": 0.4, "categorical": [0.1, -0.5, 0.7]}[name]
    params = {"a": torch.tensor(a, dtype=torch.float64, requires_grad=True)}
    if name in ("normal", "gamma"):
        b = 1.0 if name == "normal" else 1.5
        params["b"] = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    p = params.values()
    if name == "normal":
        z, log_q = torch.linspace(-11, 13, 60_001, dtype=torch.float64), dist.Normal(*p)
        mean = (log_q.log_prob(z).exp() * f(z)).sum() * (24 / 60_000)
    elif name == "gamma":
        z, log_q = torch.linspace(1e-6, 40, 400_001, dtype=torch.float64), dist.Gamma(*p)
        mean = (log_q.log_prob(z).exp() * f(z)).sum() * (40 / 400_000)
    else:
        made = {"poisson": dist.Poisson, "bernoulli": lambda x: dist.Bernoulli(logits=x)}
        fn = made.get(name, lambda x: dist.Categorical(logits=x))(*p)
        z = torch.arange({"poisson": 60, "bernoulli": 2, "categorical": 3}[name]).double()
        mean = (fn.log_prob(z).exp() * f(z)).sum()
    return dict(zip(params, torch.autograd.grad(mean, list(p)), strict=True))


def draws(name: str, f, num: int) -> dict[str, torch.Tensor]:
    """40 independent gradients by the parameters, of `num` particles each."""
    pyro.clear_param_store()
    model, guide, _ = problem(name, f)
    loss = MonteCarloELBO(num, estimator="measure_valued", vectorize_particles=True, max_plate_nesting=0)
    pyro.set_rng_seed(0)
    rows = []
    for _ in range(40):
        loss.loss_and_grads(model, guide)
        leaves = {n: pyro.param(n).unconstrained() for n in pyro.get_param_store()}
        rows.append({n: -leaf.grad.clone() for n, leaf in leaves.items()})
        for leaf in leaves.values():
            leaf.grad = None
    return {n: torch.stack([row[n] for row in rows]) for n in rows[0]}


@pytest.mark.parametrize("name", ["normal", "gamma", "poisson", "bernoulli", "categorical"])
def test_the_mean_is_the_derivative(name):
    """Of an integrand with a kink and a jump, which has no pathwise gradient."""

    def f(z):
        return (z.double() - 1.3).abs() + (z > 2.0).double()

    expected = exact(name, f)
    for parameter, samples in draws(name, f, 4000).items():
        detect = 0.05 * max(0.2, float(expected[parameter].abs().max()))
        assert_mean(samples, expected[parameter], detect=detect, what=f"{name}: by {parameter}")


class Held(MonteCarloELBO):
    """A loss whose guide has the given draws."""

    given: ClassVar[dict] = {}

    def _draw(self, *args, **options):
        held = {name: (value, None) for name, value in self.given.items()}
        return super()._draw(*args, **options | {"values": held})


class Repeated:
    """Torch, with the same random numbers for the same shapes each time."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def rand_like(self, like):
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(1), dtype=like.dtype)

    def randn_like(self, like):
        return self.randn(like.shape, dtype=like.dtype)

    def randn(self, shape, dtype, device=None):
        return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


LOCAL = {
    "normal": lambda x: dist.Normal(x, (0.3 * x).exp()),
    "gamma": lambda x: dist.Gamma((0.5 * x).exp(), (0.4 - 0.2 * x).exp()),
    "poisson": lambda x: dist.Poisson((0.6 * x).exp()),
    "bernoulli": lambda x: dist.Bernoulli(logits=x),
    "bits": lambda x: dist.Bernoulli(logits=torch.stack([x, -0.5 * x], -1)).to_event(1),
    "categorical": lambda x: dist.Categorical(logits=torch.stack([x, -x, 0.3 * x], -1)),
    "one_hot": lambda x: dist.OneHotCategorical(logits=torch.stack([x, -x, 0.3 * x], -1)),
}


@pytest.mark.parametrize("name", LOCAL)
def test_particles_run_one_by_one_have_distributions_of_their_own(monkeypatch, name):
    """That depend on an upstream bit: the same draws and noise give the gradient of vectorized particles."""
    monkeypatch.setattr(measure_valued, "torch", Repeated())
    made = LOCAL[name]

    def f(z):
        return (0.7 * z.double() - 0.4).sin().reshape(*z.shape[: z.dim() - made(ONE).event_dim], -1).sum(-1)

    def model() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.4 * ONE))
        with pyro.plate("two", 2):
            pyro.factor("f", f(pyro.sample("z", made(0.2 * ONE.expand(2)))) * (1 + a))

    def guide() -> None:
        a = pyro.sample("a", dist.Bernoulli(logits=pyro.param("a_logit", constant(0.3))))
        with pyro.plate("two", 2):
            pyro.sample("z", made(pyro.param("x", lambda: torch.tensor([0.4, -0.7]).double()) * (1 + 1.5 * a)))

    found, given = [], {}
    pyro.set_rng_seed(4)
    for vectorize in (False, True):
        loss = Held(8, 1, vectorize_particles=vectorize, estimator={"a": "score", "z": "measure_valued"})
        loss.given = given
        evaluation = loss.evaluate(model, guide, (), {})
        given = {n: evaluation.particles.guide[n].value.detach() for n in ("a", "z")}
        leaves = [pyro.param(n).unconstrained() for n in ("a_logit", "x")]
        found.append(torch.autograd.grad(evaluation.surrogate, leaves))
    assert 0 < float(given["a"].sum()) < 8
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_particles_run_one_by_one_have_minibatches_of_their_own():
    """The sum over outcomes, by hand, on the data that each run has seen."""
    x, logits = torch.tensor([0.3, -1.0, 2.0, 0.7]).double(), torch.tensor([0.5, -0.2, 0.8, -1.1]).double()

    def model() -> None:
        with pyro.plate("data", 4, subsample_size=2) as index:
            b = pyro.sample("b", dist.Bernoulli(0.4 * ONE))
            pyro.sample("x", dist.Normal(2 * b, ONE), obs=x[index])

    def guide() -> None:
        with pyro.plate("data", 4, subsample_size=2) as index:
            pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits", logits.clone)[index]))

    pyro.set_rng_seed(0)
    loss = MonteCarloELBO(5, 1, vectorize_particles=False, estimator="measure_valued")
    evaluation = loss.evaluate(model, guide, (), {})
    (found,) = torch.autograd.grad(evaluation.surrogate, pyro.param("logits").unconstrained())
    q, p = dist.Bernoulli(logits=logits), dist.Bernoulli(0.4 * ONE)
    one, zero = (dist.Normal(2 * b, ONE).log_prob(x) + p.log_prob(b) - q.log_prob(b) for b in (ONE, 0 * ONE))
    runs = [run.fn.logits.detach() for run in evaluation.particles.guide["b"].runs]
    seen = sum((logits[:, None] == run).any(-1).double() for run in runs)
    assert len(set(seen.tolist())) > 1
    right = seen / 5 * 2 * (one - zero) * q.probs * (1 - q.probs)
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


# Square and cosine of Mohamed et al. 2020, figures 2 and 3: mu and sigma, z ~ N(1, 1), one sample.
INTEGRANDS = {
    "square": lambda z, k: (z - k) ** 2,
    "cos": lambda z, k: (k * z).cos(),
}
VARIANCES = {("square", 3.0): (4.372, 20.0), ("cos", 1.0): (0.028, 0.2026)}  # all of them: test_exact_variances.py


@pytest.mark.parametrize("case", VARIANCES, ids=str)
def test_variances_of_mohamed_et_al(case):
    """Within 6 standard errors of a variance of 40,000 draws (about 4 % for these integrands), most within 1 %."""
    kind, k = case
    model, guide, _ = problem("normal", lambda z: INTEGRANDS[kind](z, k))
    pyro.clear_param_store()
    table = compare_gradients(
        model, guide, estimators=["measure_valued"], num_particles=1, num_replicates=40_000, seed=0
    ).dataset
    found = float(table.variance_mean.sel(estimator="measure_valued", block="guide"))
    assert found == pytest.approx(sum(VARIANCES[case]) / 2, rel=0.05)


def test_discrete_outcomes_have_no_variance():
    pyro.clear_param_store()
    model, guide, _ = problem("categorical", lambda z: (z - 1.0) ** 2)
    table = compare_gradients(model, guide, estimators=["measure_valued"], num_particles=2, num_replicates=50, seed=0)
    assert float(table.dataset.variance_max.max()) < 1e-20
    assert float(table.dataset.evaluations[0]) in (2.0, 8.0)  # 2 x (1 + 3)


def test_a_distribution_without_a_pair():
    def model() -> None:
        pyro.sample("z", dist.Beta(2.0, 2.0))

    def guide() -> None:
        pyro.sample("z", dist.Beta(pyro.param("a", torch.tensor(2.0)), 2.0))

    with pytest.raises(EstimatorError, match="no pair of measures is known for Beta"):
        MonteCarloELBO(1, estimator="measure_valued").loss(model, guide)
