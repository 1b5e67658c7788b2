r"""Every registered estimator against every problem: exact means, exact variances, and what each one promises."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from torch.distributions import constraints

from pyro_emvae import MonteCarloELBO, problems
from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import create, entries
from pyro_emvae.estimators import Estimator
from pyro_emvae.particles import quiet
from pyro_emvae.problems import Problem, exact_gradients
from pyro_emvae.problems._problem import ProblemTraits
from pyro_emvae.testing import Replay, assert_mean, check_estimator, exact_mean
from pyro_emvae.testing.estimators import objective_for
from pyro_emvae.testing.replay import fitting_sites


def exact_problems() -> list[Problem]:
    """All problems with an exact ELBO that need no further package."""
    made = [entry.factory() for entry in entries("problem")]
    return [problem for problem in made if problem.elbo is not None and not problem.traits.needs]


def fits(estimator: str, problem: Problem) -> bool:
    part = create("estimator", estimator)
    if part.traits.probes == "twice" and len(problem.sites) > 1:  # a recording with second derivatives takes seconds
        return False
    return any(fitting_sites(problem, part, k, objective_for(part)) for k in (part.traits.min_particles, 4))


PROBLEMS = exact_problems()
ESTIMATORS = [entry.name for entry in entries("estimator")]


def is_for(part: Estimator, problem: Problem) -> bool:
    """Whether an estimator of an objective of several particles is meant for such sites, and the objective for it."""
    bounded = problem.traits.local or not problem.traits.subsampled
    return bounded and (part.traits.needs_rsample or not problem.traits.reparameterised)


DEAR = ("linear_gaussian", "linear_gaussian_full", "eight_schools", "local_global", "masked")  # 1,000 noisy particles
CASES = [
    (e, p)
    for e in ESTIMATORS
    for part in [create("estimator", e)]
    for p in PROBLEMS
    if fits(e, p) and (objective_for(part) == "elbo" or is_for(part, p)) and not (part.traits.noisy and p.name in DEAR)
]


@pytest.mark.parametrize(("estimator", "problem"), CASES, ids=lambda x: getattr(x, "name", x))
def test_estimator_is_right(estimator, problem):
    rows = check_estimator(estimator, problems=[problem.name], strict=False)
    assert len(rows) in (1, 2)
    part = create("estimator", estimator)
    smooth = part.traits.probes == "twice"  # in too many uniform numbers to integrate
    sampled = smooth or objective_for(part) != "elbo" or not part.traits.unbiased
    if problem.posterior is not None and not sampled and not Replay(problem, part, rows[0].num_particles).own_draws:
        assert rows[0].how in ("enumeration", "quadrature")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_has_cases(estimator):
    assert [p.name for e, p in CASES if e == estimator]


def bernoulli_toy(t: float, phi: float, constant: float = 0.0) -> Problem:
    r"""$f(b)=(b-t)^2$ for a Bernoulli b: the prior is the guide's distribution, held."""
    logit = torch.tensor(phi, dtype=torch.float64)

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=logit))
        pyro.factor("f", (b - t) ** 2 + constant)

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("phi", logit.clone)))

    def elbo(params: dict) -> torch.Tensor:
        q = torch.stack([-params["phi"], params["phi"]]).sigmoid()
        held = torch.stack([-logit, logit]).sigmoid().log()
        f = torch.tensor([t**2, (1 - t) ** 2], dtype=torch.float64) + constant
        return (q * (f + held - q.log())).sum()

    return Problem(
        name="bernoulli_toy",
        model=model,
        guide=guide,
        args=(),
        sites=("b",),
        model_params=(),
        guide_params=("phi",),
        params=MappingProxyType({"phi": logit}),
        constraints=MappingProxyType({"phi": constraints.real}),
        max_plate_nesting=0,
        traits=ProblemTraits(support="discrete", reparameterised=False, enumerable=True),
        elbo=elbo,
    )


def moments(replay: Replay, nodes: Any = None, weights: Any = None) -> tuple[float, float]:
    """Mean and variance of the gradient over all outcomes and the nodes of noise."""
    nodes = torch.zeros(1, 0) if nodes is None else nodes
    weights = torch.ones(1, dtype=torch.float64) if weights is None else weights
    noise, weights = replay.outcomes(nodes, weights)
    gradients, probability = replay.gradients(noise)
    g, p = gradients["phi"], weights * probability
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-14 if len(nodes) < 3 else 1e-11)
    mean = (p * g).sum()
    return float(mean), float((p * (g - mean) ** 2).sum())


TRUE = {(0.499, 0.0): 5.0e-4, (0.499, 2.0): 2.09987e-4, (0.45, 2.0): 0.0104994}


def test_leave_one_out_does_not_see_a_constant():
    plain, shifted = (Replay(bernoulli_toy(0.45, 2.0, constant=c), "leave_one_out", 3) for c in (0.0, 1000.0))
    noise, _ = plain.outcomes(torch.zeros(1, 0), torch.ones(1))
    torch.testing.assert_close(plain.gradients(noise)[0]["phi"], shifted.gradients(noise)[0]["phi"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("estimator", ["score", "decaying_average"])
def test_a_constant_costs_the_others_variance(estimator):
    plain, shifted = (moments(Replay(bernoulli_toy(0.45, 2.0, constant=c), estimator, 1)) for c in (0.0, 10.0))
    assert plain[0] == pytest.approx(shifted[0], abs=1e-12)
    assert shifted[1] > 100 * plain[1]


TIGHT = [p for p in PROBLEMS if p.exact_guide is not None and p.traits.reparameterised and not p.traits.subsampled]


def at_posterior(problem: Problem) -> Problem:
    return dataclasses.replace(problem, params=MappingProxyType({**problem.params, **problem.exact_guide()}))


def assert_zero_at_posterior(estimator: Any, problem: Problem) -> None:
    replay = Replay(at_posterior(problem), estimator, 3)
    with quiet(seed=1):
        gradient = replay.gradient(replay.evaluate({}))
    for name in problem.guide_params:
        assert float(gradient[name].abs().max()) < 1e-9, f"{estimator} at the posterior: gradient of {name!r}"


@pytest.mark.parametrize("problem", TIGHT, ids=lambda p: p.name)
def test_sticking_the_landing_is_zero_at_the_posterior(problem):
    assert_zero_at_posterior("sticking_the_landing", problem)
    with pytest.raises(AssertionError, match="pathwise at the posterior"):
        assert_zero_at_posterior("pathwise", problem)


def transformed(problem: Problem) -> Problem:
    """`skewed` with its LogNormal guide as Pyro's autoguides write it: an auxiliary normal and a point mass."""

    def guide(counts: torch.Tensor) -> None:
        loc = pyro.param("loc", problem.params["loc"].clone)
        scale = pyro.param("scale", problem.params["scale"].clone, constraint=constraints.positive)
        u = pyro.sample("u", dist.Normal(loc, scale), infer={"is_auxiliary": True})
        pyro.sample("rate", dist.Delta(u.exp(), log_density=-u))

    return dataclasses.replace(problem, name="transformed", guide=guide)


def noise_out(problem: Problem) -> Problem:
    """`normal_normal` with its guide written as noise and a point mass that scales it, as `AutoStructured` does."""

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", problem.params["loc"].clone)
        scale = pyro.param("scale", problem.params["scale"].clone, constraint=constraints.positive)
        eps = pyro.sample("eps", dist.Normal(torch.zeros_like(loc), 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(loc + scale * eps, log_density=-scale.log()))

    return dataclasses.replace(problem, name="noise_out", guide=guide)


@pytest.mark.parametrize("problem", [transformed(problems.skewed()), noise_out(problems.normal_normal())], ids=str)
@pytest.mark.parametrize("estimator", ["pathwise", "sticking_the_landing"])
def test_guides_with_point_masses(estimator, problem):
    """What a point mass adds to log q keeps all its paths."""
    (row,) = check_estimator(estimator, problems=[problem], num_particles=[2])
    assert row.how == "quadrature"


def test_sticking_at_a_point_mass_is_refused_or_right():
    """Its log density has no score of mean zero that could be left out."""
    problem = noise_out(problems.normal_normal())
    try:
        found = exact_mean(Replay(problem, {"z": "sticking_the_landing"}, 2)).gradients
    except EmvaeError as error:
        assert "'z'" in str(error)
    else:
        torch.testing.assert_close(found["scale"], exact_gradients(problem)["scale"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.exact_guide is not None and not p.traits.subsampled])
def test_leave_one_out_is_zero_at_the_posterior(problem):
    """log p - log q is then constant."""
    assert_zero_at_posterior("leave_one_out", problem)


def test_decaying_average_uses_the_old_value():
    """By hand: the first baseline is 0, the second the first signal, the third a weighted mean of the first two."""
    t, phi, beta = 0.45, 2.0, 0.9
    replay = Replay(bernoulli_toy(t, phi), create("estimator", "decaying_average"), 1)
    probability = torch.tensor(phi, dtype=torch.float64).sigmoid()
    state, past = None, []
    for b in (1.0, 0.0, 0.0):
        evaluation = replay.evaluate({"b": torch.tensor(int(b))}, state)
        weights = [(1 - beta) * beta**i for i in range(len(past))][::-1]
        baseline = sum(w * f for w, f in zip(weights, past, strict=True)) / sum(weights) if past else 0.0
        expected = ((b - t) ** 2 - baseline) * (b - probability)
        torch.testing.assert_close(replay.gradient(evaluation)["phi"], expected, rtol=1e-12, atol=0)
        past.append((b - t) ** 2)
        state = evaluation.state
        assert {k: v.shape for k, v in state["b"].items()} == {"average": torch.Size(), "weight": torch.Size()}


def test_decaying_average_averages_over_plates():
    problem = problems.categorical()
    loss = MonteCarloELBO(estimator="decaying_average", max_plate_nesting=1)
    loss.loss_and_grads(problem.model, problem.guide, *problem.args)
    assert loss.state["z"]["average"].shape == ()


def test_decaying_average_refuses_a_decay_of_one():
    with pytest.raises(EmvaeError, match=r"beta=1\.0"):
        create("estimator", "decaying_average").__class__(beta=1.0)


MIXED = {
    "k score, z pathwise": {"k": "score", "z": "pathwise"},
    "k leave-one-out, z sticking": {"k": "leave_one_out", "z": "sticking_the_landing"},
    "k decaying, z score": {"k": "decaying_average", "z": "score"},
    "k leave-one-out, z leave-one-out": {"k": "leave_one_out", "z": "leave_one_out"},
}


@pytest.mark.parametrize("mapping", MIXED.values(), ids=MIXED)
def test_estimators_mix_in_one_guide(mapping):
    problem = problems.mixed_two_level()
    replay = Replay(problem, mapping, 2)
    found, right = exact_mean(replay).gradients, exact_gradients(problem)
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)
    assert {n: type(e) for n, e in replay.loss.resolved.items()} == {
        n: type(create("estimator", e)) for n, e in mapping.items()
    }


@pytest.mark.parametrize("estimator", ["partial_pathwise", "pyro", "auto"])
def test_a_rejection_sampler_is_reparameterised_in_part(estimator):
    """Pathwise alone is biased here; `score_parts` says what is missing."""
    problem = problems.skewed_gamma()
    shape, rate = problem.params["concentration"], problem.params["rate_param"]

    def guide(counts: torch.Tensor) -> None:
        concentration = pyro.param("concentration", shape.clone, constraint=constraints.positive)
        pyro.sample(
            "rate",
            ShapeAugmentedGamma(concentration, pyro.param("rate_param", rate.clone, constraint=constraints.positive)),
        )

    loss = MonteCarloELBO(2000, 1, vectorize_particles=True, estimator=estimator)
    samples = []
    for _ in range(100):
        loss.loss_and_grads(problem.model, guide, *problem.args)
        leaves = [pyro.param(name).unconstrained() for name in problem.guide_params]
        samples.append(torch.stack([-leaf.grad for leaf in leaves]))
        for leaf in leaves:
            leaf.grad = None
    right = exact_gradients(problem)
    expected = torch.stack([right[name] for name in problem.guide_params])
    assert_mean(torch.stack(samples), expected, detect=0.1 * float(expected.abs().max()))
