r"""The biased estimators: their means, enumerated or integrated, against theory; where they are exact; bad input.

The bias is recorded as a number that theory gives, so that neither more nor less of it goes unnoticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_emvae.estimators.gumbel_rao as gumbel_rao
from pyro_emvae import EmvaeError, EstimatorError, MonteCarloELBO, compare_gradients, problems
from pyro_emvae._registry import Traits, entries
from pyro_emvae.diagnostics import explain
from pyro_emvae.estimators import Draw, GumbelRao, GumbelSoftmax, ReinMax, StraightThrough, auto_table
from pyro_emvae.estimators.relaxed import held, log_mass, perturbed, squashed
from pyro_emvae.particles import dependence, hold_batch, quiet
from pyro_emvae.problems import Problem, exact_gradients
from pyro_emvae.problems._problem import ProblemTraits
from pyro_emvae.testing import Replay, assert_mean, check_estimator, exact_mean

RELAXED = [e.name for e in entries("estimator") if e.traits.draws == "relaxed"]
HARD = ["straight_through", "reinmax"]
ALL = [StraightThrough(), ReinMax(), GumbelSoftmax(), GumbelRao()]

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")


def f64(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def made(model, guide, params: dict[str, Tensor], elbo=None, nesting: int = 0) -> Problem:
    sites = tuple(n for n in ("z", "b", "k") if n in poutine.trace(guide).get_trace().nodes)
    pyro.clear_param_store()
    return Problem(
        name="made",
        model=model,
        guide=guide,
        args=(),
        sites=sites,
        model_params=(),
        guide_params=tuple(params),
        params=MappingProxyType(params),
        constraints=MappingProxyType(dict.fromkeys(params, torch.distributions.constraints.real)),
        max_plate_nesting=nesting,
        traits=ProblemTraits(support="discrete", reparameterised=False, enumerable=False),
        elbo=elbo,
    )


def bit(f, logit: float = 0.7) -> Problem:
    r"""One bit, f, and the prior logit 0.2."""
    start = f64(logit)

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=f64(0.2)))
        pyro.factor("f", f(b))

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("logit", start.clone)))

    def elbo(params: dict) -> Tensor:
        fn, b = dist.Bernoulli(logits=params["logit"]), f64([0.0, 1.0])
        log_q = fn.log_prob(b)
        return (log_q.exp() * (f(b) + dist.Bernoulli(logits=f64(0.2)).log_prob(b) - log_q)).sum()

    return made(model, guide, {"logit": start}, elbo)


P = 1 / (1 + math.exp(-0.7))
POWERS = {1: lambda b: 1.7 * b, 2: lambda b: (b - 0.3) ** 2, 3: lambda b: b**3}
BIAS = {  # of the slope f(1) - f(0), at p: straight-through takes p f'(1) + (1 - p) f'(0), ReinMax their mean
    ("straight_through", 1): 0.0,
    ("straight_through", 2): 2 * P - 1,
    ("straight_through", 3): 3 * P - 1,
    ("reinmax", 1): 0.0,
    ("reinmax", 2): 0.0,
    ("reinmax", 3): 0.5,
}


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("case", BIAS, ids=str)
def test_bias_of_a_bit_is_that_of_theory(case, num_particles):
    """Over all outcomes; the bias is in f alone, the prior and the entropy are exact."""
    estimator, power = case
    problem = bit(POWERS[power])
    found = exact_mean(Replay(problem, estimator, num_particles))
    bias = float(found.gradients["logit"] - exact_gradients(problem)["logit"])
    assert found.how == "enumeration"
    assert bias == pytest.approx(P * (1 - P) * BIAS[case], abs=1e-12)


@dataclass(frozen=True)
class Claimed(StraightThrough):
    """Straight-through, claimed unbiased."""

    traits: ClassVar[Traits] = replace(StraightThrough.traits, unbiased=True)


@pytest.mark.parametrize("problem", ["bernoulli", "bernoulli_vector"])
def test_straight_through_claimed_unbiased_is_caught(problem):
    with pytest.raises(AssertionError, match=r"Claimed.*the mean gradient of 'logits'.*over all .* outcomes: observed"):
        check_estimator(Claimed(), problems=[problem])


WEIGHTS = f64([[0.4, -1.0, 0.7], [1.1, 0.2, -0.6], [-0.3, 0.9, 0.5]])
SQUARES = f64([[0.3, -0.7, 0.2], [-0.7, 0.9, 0.4], [0.2, 0.4, -1.1]])


def composite(square: bool = False) -> Problem:
    r"""Three data of which two are subsampled, one masked; each has one of three classes and two bits in one event.

    f is linear in each site given the others, or, with `square`, has a quadratic form of the class.
    """
    params = {"classes": f64([[0.2, -0.5, 0.4], [1.0, 0.0, -1.0], [0.3, 0.3, -0.2]]), "bits": f64([0.6, -0.9])}
    kept = torch.tensor([True, False, True])
    prior, prior_bits = f64([0.1, 0.6, -0.2]), f64([0.3, 0.1])

    def f(z: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        linear = (z * weights).sum(-1) * (0.4 + b @ f64([0.8, -1.3])) + 0.5 * b[..., 0] * b[..., 1]
        return linear + ((z @ SQUARES) * z).sum(-1) if square else linear

    def model() -> None:
        with pyro.plate("data", 3, subsample_size=2, dim=-1) as index, poutine.mask(mask=kept[index]):
            z = pyro.sample("z", dist.OneHotCategorical(logits=prior))
            b = pyro.sample("b", dist.Bernoulli(logits=prior_bits).to_event(1))
            pyro.factor("f", f(z, b, WEIGHTS[index]))

    def guide() -> None:
        logits, bits = (pyro.param(name, value.clone()) for name, value in params.items())
        with pyro.plate("data", 3, subsample_size=2, dim=-1) as index, poutine.mask(mask=kept[index]):
            pyro.sample("z", dist.OneHotCategorical(logits=logits[index]))
            pyro.sample("b", dist.Bernoulli(logits=bits).to_event(1))

    def elbo(params: dict) -> Tensor:
        z = torch.eye(3, dtype=torch.float64)[:, None, None]  # outcomes of z, outcomes of b, data
        b = torch.cartesian_prod(*[f64([0.0, 1.0])] * 2)[None, :, None]
        q = dist.OneHotCategorical(logits=params["classes"]).log_prob(z)
        q = q + dist.Bernoulli(logits=params["bits"]).log_prob(b).sum(-1)
        p = dist.OneHotCategorical(logits=prior).log_prob(z) + dist.Bernoulli(logits=prior_bits).log_prob(b).sum(-1)
        return ((q.exp() * (f(z, b, WEIGHTS) + p - q)).sum((0, 1)) * kept).sum()

    return made(model, guide, params, elbo, nesting=1)


@pytest.mark.parametrize(("estimator", "square", "exact"), [(*HARD[:1], False, True), (*HARD[:1], True, False),
    (*HARD[1:], False, True), (*HARD[1:], True, True)])  # fmt: skip
def test_exact_if_linear_or_quadratic_in_plates_masks_minibatches_and_events(estimator, square, exact):
    problem = composite(square)
    found = exact_mean(Replay(problem, estimator, 1))
    error = max(float((found.gradients[n] - g).abs().max()) for n, g in exact_gradients(problem).items())
    assert error < 1e-12 if exact else error > 0.05
    assert found.outcomes == 3 * (3 * 2 * 2) ** 2


@pytest.mark.parametrize("estimator", HARD)
def test_two_levels_by_hand(estimator):
    """The second bit's logits depend on the first: its path goes through the second's mean and entropy."""
    params = {"first": f64(0.4), "second": f64([-0.6, 1.5])}

    def f(z: Tensor, b: Tensor) -> Tensor:
        return (0.7 * z - 1.2 * b) ** 2

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=f64(0.1)))
        b = pyro.sample("b", dist.Bernoulli(logits=0.3 - z))
        pyro.factor("f", f(z, b))

    def guide() -> None:
        first, second = (pyro.param(name, value.clone()) for name, value in params.items())
        z = pyro.sample("z", dist.Bernoulli(logits=first))
        pyro.sample("b", dist.Bernoulli(logits=second[0] + second[1] * z))

    def path(outcome: float, logit: Tensor) -> Tensor:
        p = logit.sigmoid()
        soft = p if estimator == "straight_through" else 0.5 * (outcome - p).abs().detach() * logit
        return outcome + soft - soft.detach()

    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    first, second = leaves.values()
    total = f64(0.0)
    for one in (0.0, 1.0):
        for two in (0.0, 1.0):
            z = path(one, first)
            logit = second[0] + second[1] * z
            b = path(two, logit)
            q = dist.Bernoulli(logits=first).log_prob(f64(one)) + dist.Bernoulli(logits=logit).log_prob(f64(two))
            log_p = log_mass(dist.Bernoulli(logits=f64(0.1)), z) + log_mass(dist.Bernoulli(logits=0.3 - z), b)
            entropy = dist.Bernoulli(logits=first).entropy() + dist.Bernoulli(logits=logit).entropy()
            total = total + q.exp().detach() * (f(z, b) + log_p + entropy)
    right = torch.autograd.grad(total, list(leaves.values()))
    found = exact_mean(Replay(made(model, guide, params), estimator, 2)).gradients
    for (name, gradient), expected in zip(found.items(), right, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12, msg=name)


def mixed() -> Problem:
    """A bit, and a normal latent whose mean it moves."""
    params = {"logit": f64(0.5), "loc": f64([0.2, -0.7]), "log_scale": f64(-0.3)}

    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(logits=f64(-0.4)))
        z = pyro.sample("z", dist.Normal(0.6 * k, 1.3))
        pyro.sample("x", dist.Normal(z - 0.8 * k * z, 0.9), obs=f64(0.7))

    def guide() -> None:
        logit, loc, log_scale = (pyro.param(name, value.clone()) for name, value in params.items())
        k = pyro.sample("k", dist.Bernoulli(logits=logit))
        pyro.sample("z", dist.Normal(loc[0] + loc[1] * k, (log_scale + 0.4 * k).exp()))

    return made(model, guide, params)


@pytest.mark.parametrize("estimator", HARD)
def test_mixed_with_any_other_estimator_the_mean_is_the_same(estimator):
    """What stands at the normal site is unbiased given the bit, however it splits or weighs its paths."""
    means = {
        other: exact_mean(Replay(mixed(), {"k": estimator, "z": other}, 2)).gradients
        for other in ("pathwise", "sticking_the_landing", "score", "leave_one_out")
    }
    for other, found in means.items():
        for name, gradient in means["pathwise"].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9, msg=f"{other}: {name}")


# Gumbel noise -------------------------------------------------------------------------------------------------------


def grid(value: Tensor, *rows: int) -> Tensor:
    """Midpoints in place of uniform noise: along the inner samples, or the shift of the inner samples of a bit."""
    if not rows:
        return torch.full_like(value, 0.5)
    return ((torch.arange(rows[0], dtype=value.dtype) + 0.5) / rows[0]).reshape(rows[0], *(1,) * value.dim())


def logistic(function) -> float:
    """Integrate over logistic noise by midpoints, none of which lies where the outcome changes."""
    x = (torch.arange(400_000, dtype=torch.float64) + 0.5) * 2e-4 - 40 - 0.7
    return float((x.sigmoid() * (-x).sigmoid() * function(x)).sum() * 2e-4)


def rao_mean(monkeypatch, problem: Problem, temperature: float) -> float:
    """The mean gradient of `GumbelRao`, inner samples on a grid, less those of prior and entropy (which are exact)."""
    monkeypatch.setattr(gumbel_rao, "uniform_like", grid)
    replay = Replay(problem, GumbelRao(temperature, 100_000), 1)
    total = f64(0.0)
    for outcome, p in ((0, 1 - P), (1, P)):
        total = total + p * replay.gradient(replay.evaluate({"b": torch.tensor(outcome)}))["logit"]
    return float(total)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_many_inner_samples_tend_to_the_mean_of_the_straight_through_gumbel_softmax(monkeypatch, temperature):
    problem = bit(lambda b: b**3)

    def slope(x: Tensor) -> Tensor:
        y = ((0.7 + x) / temperature).sigmoid()
        hard = (0.7 + x > 0).double()
        return (3 * hard**2 + 0.2) * y * (1 - y) / temperature  # f' and the prior's slope

    entropy = -0.7 * P * (1 - P)
    assert rao_mean(monkeypatch, problem, temperature) == pytest.approx(logistic(slope) + entropy, abs=3e-5)


def test_gumbel_rao_tends_to_reinmax_as_the_temperature_falls(monkeypatch):
    """And not to the exact gradient, if f is no quadratic."""
    problem = bit(lambda b: b**3)
    right = float(exact_gradients(problem)["logit"])
    bias = [rao_mean(monkeypatch, problem, t) - right for t in (1.0, 0.3, 0.1, 0.02)]
    limit = 0.5 * P * (1 - P)
    away = [abs(b - limit) for b in bias]
    assert away[3] < 0.25 * away[2] and away[2] < 0.3 * away[0]  # with the temperature


def test_the_inner_samples_of_a_bit_are_stratified_and_keep_their_mean():
    """The mean path over shifts is the integral, and four have less than a quarter of the variance of four draws."""
    fn, outcome = dist.Bernoulli(logits=torch.full((20_000,), 0.4, dtype=torch.float64)), torch.ones(20_000).double()
    logits = fn.logits.requires_grad_()
    pyro.set_rng_seed(0)
    (slopes,) = torch.autograd.grad(GumbelRao(0.5, 4).relax(fn, outcome).sum(), logits)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    soft = squashed(fn, held(dist.Bernoulli(logits=f64(0.4)), f64(1.0), u), 0.5)
    one = soft * (1 - soft) / 0.5
    assert_mean(slopes[:, None], one.mean()[None], detect=0.01)
    assert float(slopes.var()) < 0.25 * float(one.var()) / 4


@dataclass(frozen=True)
class Gridded(GumbelSoftmax):
    """Particles whose logistic noise lies on a grid of quantiles."""

    def draw(self, fn, num_particles):
        u = ((torch.arange(num_particles) + 0.5) / num_particles).double()
        outcome = (u > 1 - P).double()
        within = torch.where(outcome > 0, (u - (1 - P)) / P, u / (1 - P))
        return Draw(squashed(fn, perturbed(fn, outcome, within), self.temperature))


@pytest.mark.parametrize(
    ("temperature", "bias"), [(2.0, -0.138155), (0.5, -0.000897), (0.1, 0.009098), (0.02, 0.002162)]
)
def test_gumbel_softmax_is_the_gradient_of_its_own_objective(temperature, bias):
    """By quadrature; the bias is of its order as the temperature falls, and may change its sign before."""
    problem = bit(lambda b: b**3)
    loss = MonteCarloELBO(100_000, 0, vectorize_particles=True, estimator=Gridded(temperature))
    with quiet(seed=0):
        evaluation = loss.evaluate(problem.model, problem.guide, (), {})
    (leaf,) = evaluation.particles.params["guide"].values()
    (found,) = torch.autograd.grad(evaluation.surrogate, leaf)

    def slope(x: Tensor) -> Tensor:
        y = ((0.7 + x) / temperature).sigmoid()
        return (3 * y**2 + 0.2) * y * (1 - y) / temperature

    own = logistic(slope) - 0.7 * P * (1 - P)
    assert float(found) == pytest.approx(own, abs=1e-4)
    assert own - float(exact_gradients(problem)["logit"]) == pytest.approx(bias, abs=1e-5)


def test_perturbed_logits_lead_to_their_outcome_and_are_gumbel():
    """One-hot: the largest is the outcome's; over outcomes each has the mean of its logit plus Euler's constant."""
    logits = f64([0.3, -1.2, 0.9, 0.1])
    fn = dist.OneHotCategorical(logits=logits).expand([200_000])
    pyro.set_rng_seed(0)
    outcome = fn.sample()
    found = perturbed(fn, outcome, torch.rand(outcome.shape, dtype=torch.float64))
    assert torch.equal(found.argmax(-1), outcome.argmax(-1))
    assert_mean(found - dist.OneHotCategorical(logits=logits).logits, torch.full((4,), np.euler_gamma), detect=0.03)
    assert_mean((found - fn.logits - np.euler_gamma) ** 2, torch.full((4,), math.pi**2 / 6), detect=0.06)


def test_a_bit_is_a_class_of_two():
    """The same outcome, and the same distribution of the relaxed value given it."""
    bits, classes = dist.Bernoulli(logits=f64(0.7)), dist.OneHotCategorical(logits=f64([0.0, 0.7]))
    pyro.set_rng_seed(0)
    uniform = torch.rand(200_000, 2, dtype=torch.float64)
    one = squashed(bits, perturbed(bits, f64(1.0), uniform[:, 0]), 0.5)
    two = squashed(classes, perturbed(classes, f64([0.0, 1.0]), uniform), 0.5)[:, 1]
    assert bool((one > 0.5).all()) and bool((two > 0.5).all())
    for power in (1, 2):
        assert_mean(two**power, (one**power).mean(), detect=0.01)


def test_inner_samples_lower_the_variance_and_leave_the_mean():
    problem, samples = bit(lambda b: (b - 0.3) ** 2), {}
    for count in (1, 50):
        loss = MonteCarloELBO(1, estimator=GumbelRao(0.3, count))
        pyro.set_rng_seed(0)
        rows = []
        for _ in range(900):
            evaluation = loss.evaluate(problem.model, problem.guide, (), {})
            (leaf,) = evaluation.particles.params["guide"].values()
            rows.append(torch.autograd.grad(evaluation.surrogate, leaf)[0])
        samples[count] = torch.stack(rows)
    assert float(samples[50].var()) < 0.5 * float(samples[1].var())
    assert_mean(samples[1] - samples[50], f64(0.0), detect=0.15)


# Where values go ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_one_hot_values(estimator):
    """Outcomes stay outcomes, bit for bit; relaxed values sum to one; a class that cannot be stays so."""
    logits = torch.tensor([0.3, -math.inf, 0.9], dtype=torch.float32, requires_grad=True)
    fn = dist.OneHotCategorical(logits=logits).expand([500])
    pyro.set_rng_seed(1)
    value = estimator.draw(fn, 500).value
    assert value.dtype == torch.float32 and value.shape == (500, 3)
    torch.testing.assert_close(value.sum(-1).detach(), torch.ones(500))
    assert float(value[:, 1].detach().abs().max()) == 0.0
    if not isinstance(estimator, GumbelSoftmax):
        assert set(value.detach().flatten().tolist()) == {0.0, 1.0}
    (slope,) = torch.autograd.grad((value * torch.tensor([1.0, 2.0, -1.0])).sum(), logits)
    assert bool(torch.isfinite(slope[[0, 2]]).all()) and float(slope[0]) != 0.0


def test_masses_are_linear_and_those_of_the_distribution_at_outcomes():
    probs = f64([[0.2, 0.8, 0.3], [0.6, 0.1, 0.5]])
    keep = torch.tensor([True, False])
    classes = dist.OneHotCategorical(logits=probs.log())
    for fn in (
        dist.Bernoulli(probs),
        dist.Bernoulli(probs).to_event(1),
        dist.Bernoulli(probs).to_event(1).mask(keep),
        dist.Bernoulli(probs[0]).to_event(1).expand([2]),
        classes,
        classes.mask(False),
        classes.mask(keep),
        classes.to_event(1),
        dist.ExpandedDistribution(dist.OneHotCategorical(logits=probs[0]), torch.Size([2])),
    ):
        one, two = fn.sample(), fn.sample()
        torch.testing.assert_close(log_mass(fn, one), fn.log_prob(one), check_dtype=False)
        between = 0.3 * log_mass(fn, one) + 0.7 * log_mass(fn, two)
        torch.testing.assert_close(log_mass(fn, 0.3 * one + 0.7 * two), between)
    assert log_mass(dist.Binomial(3, probs), probs) is None


def test_looped_equals_vectorized():
    """The same outcomes, particle by particle."""

    @dataclass(frozen=True)
    class Dictated(ReinMax):
        outcomes: list = None

        def draw(self, fn, num_particles):
            drawn = self.outcomes.pop(0)
            return Draw(self.relax(fn, drawn))

    problem = composite(square=True)
    index = torch.tensor([0, 2])
    pyro.set_rng_seed(3)
    classes = torch.nn.functional.one_hot(torch.randint(3, (3, 2)), 3).double()
    bits = torch.randint(2, (3, 2, 2)).double()

    def guide() -> None:
        pyro.clear_param_store()
        problem.guide()

    found = []
    for vectorize in (True, False):
        given = {"z": [classes] * 9 if vectorize else [*classes] * 9, "b": [bits] * 9 if vectorize else [*bits] * 9}
        parts = {name: Dictated(outcomes) for name, outcomes in given.items()}
        loss = MonteCarloELBO(3, 1, vectorize_particles=vectorize, estimator=parts)
        with hold_batch({"data": index}):
            evaluation = loss.evaluate(problem.model, problem.guide, (), {})
        leaves = list(evaluation.particles.params["guide"].values())
        found.append([evaluation.objective, *torch.autograd.grad(evaluation.surrogate, leaves)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_an_exact_kl_takes_the_place_of_entropy_and_prior():
    problem = bit(lambda b: 0.0 * b)
    for estimator in ALL:
        loss = MonteCarloELBO(2, estimator=estimator, objective="elbo_analytic_kl")
        pyro.set_rng_seed(0)
        evaluation = loss.evaluate(problem.model, problem.guide, (), {})
        (leaf,) = evaluation.particles.params["guide"].values()
        (found,) = torch.autograd.grad(evaluation.surrogate, leaf)
        torch.testing.assert_close(found, exact_gradients(problem)["logit"], rtol=1e-12, atol=1e-12)


def test_the_entropy_has_no_variance():
    """A flat f: every single gradient is the exact one, but for the prior's noise at relaxed values."""
    problem = bit(lambda b: 0.0 * b)
    for estimator in HARD[:1]:
        noise, _ = Replay(problem, estimator, 1).outcomes(torch.zeros(1, 0), torch.ones(1))
        gradients, _ = Replay(problem, estimator, 1).gradients(noise)
        expected = exact_gradients(problem)["logit"].expand(2)
        torch.testing.assert_close(gradients["logit"], expected, rtol=1e-12, atol=1e-12)


def test_reached_directly_is_not_through_further_draws():
    pyro.clear_param_store()
    problem = mixed()

    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(logits=f64(-0.4)))
        z = pyro.sample("z", dist.Normal(0.6 * k, 1.3))
        pyro.sample("x", dist.Normal(z, 0.9), obs=f64(0.7))

    every, direct = (dependence(model, problem.guide, (), {}, direct=d) for d in (False, True))
    assert every["k"] - direct["k"] == {("model", "x")}
    assert every["z"] == direct["z"]


# Labels and errors --------------------------------------------------------------------------------------------------


def test_never_chosen_and_labelled_everywhere():
    assert sorted(RELAXED) == ["gumbel_rao", "gumbel_softmax", "reinmax", "straight_through"]
    assert not {row["estimator"] for row in auto_table()} & set(RELAXED)
    for entry in entries("estimator"):
        if entry.name in RELAXED:
            assert not entry.traits.unbiased and entry.traits.auto is None
            assert entry.summary.startswith("biased: ") and "biased" in entry.factory.__doc__.split("\n\n")[0].lower()
    pyro.clear_param_store()
    problem = problems.bernoulli_vector()
    loss = MonteCarloELBO(2, estimator="reinmax")
    loss.loss(problem.model, problem.guide, *problem.args)
    assert [row.why for row in loss.table] == ["named for the whole loss; biased"]
    assert "; biased" in str(explain(problem.model, problem.guide, *problem.args, loss=loss, seed=0))
    rows = ["score", "leave_one_out", "straight_through"]
    table = compare_gradients(problem.model, problem.guide, *problem.args, estimators=rows, num_replicates=50, seed=0)
    assert table.dataset.attrs["biased"] == ["straight_through"]
    assert "straight_through (biased)" in str(table) and "score (biased)" not in str(table)
    assert table.dataset.attrs["reference"] != "the row 'straight_through'"


def indexed(b):
    return f64([0.1, 0.9])[b.long()]


def compared(b):
    return (b > 0.5).double()


def branched(b):
    return f64(1.0) if b > 0.5 else f64(0.0)


def counted(b):
    return dist.Binomial(total_count=b.detach(), probs=f64(0.3), validate_args=True).log_prob(f64(0.0))


def test_a_model_that_drops_the_path_is_refused():
    for f, what in ((indexed, "'f'"), (compared, "'f'"), (branched, "'f'"), (counted, "'f'")):
        problem = bit(f)
        for estimator in (StraightThrough(), ReinMax()):
            state = torch.get_rng_state()
            loss = MonteCarloELBO(2, estimator=estimator, vectorize_particles=False)
            with pytest.raises(EstimatorError, match=rf"model's site {what}.*cannot be differentiated") as caught:
                loss.loss_and_grads(problem.model, problem.guide)
            assert 'Use estimator="leave_one_out"' in str(caught.value)
            assert torch.equal(torch.get_rng_state(), state)
            assert pyro.param("logit").grad is None


def test_a_model_that_raises_an_error_between_outcomes_is_refused():
    def whole(b):
        if not bool((b == b.round()).all()):
            raise ValueError("3.7 of a thing")
        return 2.0 * b

    problem = bit(whole)
    with pytest.raises(EstimatorError, match=r"GumbelSoftmax.*site 'b'.*ValueError: 3\.7 of a thing") as caught:
        MonteCarloELBO(1, estimator="gumbel_softmax").loss(problem.model, problem.guide)
    assert 'Use estimator="score"' in str(caught.value) and isinstance(caught.value.__cause__, ValueError)
    MonteCarloELBO(1, estimator="reinmax").loss(problem.model, problem.guide)


def test_an_error_of_the_model_itself_stays_what_it_is():
    def broken(b):
        raise ValueError("broken anyway")

    problem = bit(lambda b: b)
    with pytest.raises(ValueError, match=r"^broken anyway$"):
        MonteCarloELBO(1, estimator="straight_through").loss(broken_model(broken), problem.guide)


def broken_model(f):
    def model() -> None:
        f(pyro.sample("b", dist.Bernoulli(0.5)))

    return model


def test_relaxed_values_are_scored_under_validation():
    """Which is on, and stays so."""
    problem = bit(lambda b: 1.3 * b)
    assert dist.Bernoulli(f64(0.5))._validate_args
    MonteCarloELBO(3, estimator="gumbel_softmax").loss_and_grads(problem.model, problem.guide)
    assert dist.Bernoulli(f64(0.5))._validate_args
    with pytest.raises(ValueError, match="within the support"):
        dist.Bernoulli(f64(0.5)).log_prob(f64(0.4))


OTHERS = {
    "categorical": (lambda: dist.Categorical(logits=pyro.param("a", torch.zeros(3))), "integers"),
    "poisson": (lambda: dist.Poisson(pyro.param("a", torch.tensor(2.0))), "known for Bernoulli"),
    "normal": (lambda: dist.Normal(pyro.param("a", torch.tensor(2.0)), 1.0), "known for Bernoulli"),
}


@pytest.mark.parametrize("estimator", RELAXED)
@pytest.mark.parametrize("name", OTHERS)
def test_other_distributions_are_refused(name, estimator):
    fn, why = OTHERS[name]

    def guide() -> None:
        pyro.sample("z", fn())

    with pytest.raises(EstimatorError, match=rf"site 'z'.*{why}.*Use estimator="):
        MonteCarloELBO(2, estimator=estimator).loss(guide, guide)


def test_another_distribution_in_the_model_is_refused():
    def model() -> None:
        pyro.sample("b", dist.Binomial(1, torch.tensor(0.3)))

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(pyro.param("a", torch.tensor(0.5))))

    with pytest.raises(EstimatorError, match="got Binomial at the model's site"):
        MonteCarloELBO(2, estimator="straight_through").loss(model, guide)


@pytest.mark.parametrize("cls", [GumbelSoftmax, GumbelRao])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures(cls, temperature):
    with pytest.raises(EstimatorError, match=f"temperature={temperature}"):
        cls(temperature=temperature)


def test_bad_number_of_inner_samples():
    with pytest.raises(EmvaeError, match="num_samples: got 0"):
        GumbelRao(num_samples=0)


@pytest.mark.parametrize("estimator", RELAXED)
def test_other_objectives_are_refused(estimator):
    problem = bit(lambda b: b)
    with pytest.raises(EstimatorError, match="objective='iwae'"):
        MonteCarloELBO(2, estimator=estimator, objective="iwae").loss(problem.model, problem.guide)
