r"""Objectives of several particles: every value and gradient over all outcomes, against sums written by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from test_higher_order import second_derivatives
from torch import Tensor
from torch.distributions import constraints

from pyro_emvae import EM, SVI, EmvaeError, MonteCarloELBO, compare_gradients, problems, steps
from pyro_emvae._registry import Traits
from pyro_emvae.estimators import OVIS, VIMCO, MultiSampleScore, ScoreFunction
from pyro_emvae.estimators.vimco import direct
from pyro_emvae.objectives import IWAE, Chi2, MultiSample, Renyi
from pyro_emvae.particles import quiet
from pyro_emvae.problems import Problem
from pyro_emvae.problems._problem import ProblemTraits
from pyro_emvae.testing import Replay, assert_mean, exact_mean

DOUBLE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")


def tensor(x: Any) -> Tensor:
    return torch.tensor(x, dtype=DOUBLE)


# h by hand, over the last dim; for theta the second, where it differs
def iwae(w: Tensor) -> Tensor:
    return w.exp().mean(-1).log()


def renyi(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda w: ((1 - alpha) * w).exp().mean(-1).log() / (1 - alpha)


def elbo(w: Tensor) -> Tensor:
    return w.mean(-1)


def chi2(w: Tensor) -> Tensor:
    return -0.5 * (2 * w).exp().mean(-1).log()


BY_HAND = {
    "iwae": (IWAE(), iwae, iwae),
    "renyi 0.5": (Renyi(0.5), renyi(0.5), renyi(0.5)),
    "renyi -0.7": (Renyi(-0.7), renyi(-0.7), renyi(-0.7)),
    "renyi 3": (Renyi(3.0), renyi(3.0), renyi(3.0)),
    "renyi 1": (Renyi(1.0), elbo, elbo),
    "chi2": (Chi2(), chi2, iwae),
}
SCORES = ["score", "decaying_average", "vimco", VIMCO("arithmetic"), "ovis", "multi_sample_score"]


def make(name: str, model, guide, theta: dict, phi: dict, args: tuple = (), nesting: int = 0, **traits) -> Problem:
    positive = {n for n in (*theta, *phi) if n.startswith(("sigma", "scale"))}
    return Problem(
        name=name,
        model=model,
        guide=guide,
        args=args,
        sites=(),
        model_params=tuple(theta),
        guide_params=tuple(phi),
        params=MappingProxyType({n: tensor(v) for n, v in {**theta, **phi}.items()}),
        constraints=MappingProxyType(
            {n: constraints.positive if n in positive else constraints.real for n in {**theta, **phi}}
        ),
        max_plate_nesting=nesting,
        traits=ProblemTraits(**traits),
    )


def param(values: dict, name: str) -> Tensor:
    constraint = constraints.positive if name.startswith(("sigma", "scale")) else constraints.real
    return pyro.param(name, lambda: tensor(values[name]), constraint=constraint)


X = tensor([0.3, -1.2, 2.1])


def bits(size: int | None = None) -> Problem:
    """A bit for each of three data, of which two are seen at a time."""
    theta, phi = {"prior": -0.4, "means": [0.2, 1.4], "sigma": 0.8}, {"logits": [0.5, -0.9, 1.3]}

    def model(x):
        with pyro.plate("data", len(x), subsample_size=size, dim=-1) as index:
            z = pyro.sample("z", dist.Bernoulli(logits=param(theta, "prior")))
            pyro.sample("x", dist.Normal(param(theta, "means")[z.long()], param(theta, "sigma")), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=size, dim=-1) as index:
            pyro.sample("z", dist.Bernoulli(logits=param(phi, "logits")[index]))

    return make("bits", model, guide, theta, phi, (X,), 1)


def tuples(size: int, count: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(size), repeat=count)))


def mean_h(h: Callable, log_p: Tensor, log_q: Tensor, count: int) -> Tensor:
    """E[h] of one datum whose latent has finitely many values."""
    rows = tuples(len(log_q), count)
    return (log_q[rows].sum(-1).exp() * h((log_p - log_q)[rows])).sum()


def log_bit(logit: Tensor) -> Tensor:
    return torch.stack([-logit, logit]).sigmoid().log()


def bits_by_hand(p: dict, h: Callable, count: int) -> Tensor:
    prior = log_bit(p["prior"])
    rows = [prior + dist.Normal(p["means"], p["sigma"]).log_prob(x) for x in X]
    return sum(mean_h(h, row, log_bit(q), count) for row, q in zip(rows, p["logits"], strict=True))


def bits_evidence(p: dict) -> float:
    rows = [log_bit(p["prior"]) + dist.Normal(p["means"], p["sigma"]).log_prob(x) for x in X]
    return float(sum(row.logsumexp(0) for row in rows))


def derivatives(problem: Problem, by_hand: Callable, phi: Callable, theta: Callable, *more: Any) -> dict[str, Tensor]:
    """The gradient of a sum by hand in unconstrained space: of `phi` by the guide's, of `theta` by the model's."""
    leaves = problem.unconstrained()
    found = {}
    for names, h in ((problem.guide_params, phi), (problem.model_params, theta)):
        value = by_hand(problem.constrained(leaves), h, *more)
        grads = torch.autograd.grad(value, [leaves[n] for n in names], allow_unused=True, materialize_grads=True)
        found |= dict(zip(names, grads, strict=True))
    return found


def assert_gradients(found: dict[str, Tensor], right: dict[str, Tensor], atol: float = 1e-10) -> None:
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("estimator", SCORES, ids=str)
@pytest.mark.parametrize("objective", BY_HAND)
def test_discrete_gradients_over_all_outcomes(objective, estimator):
    """Minibatches of two of three data x all draws of three particles."""
    instance, phi, theta = BY_HAND[objective]
    problem = bits(2)
    found = exact_mean(Replay(problem, estimator, 3, objective=instance))
    assert found.how == "enumeration" and found.outcomes == 3 * 2**6
    assert_gradients(found.gradients, derivatives(problem, bits_by_hand, phi, theta, 3))


def values(problem: Problem, objective: Any, num_particles: int) -> float:
    """The exact mean of the objective."""
    replay = Replay(problem, "score", num_particles, objective=objective)
    noise, weights = replay.outcomes(torch.zeros(1, 0), torch.ones(1, dtype=DOUBLE))
    total = 0.0
    for i, weight in enumerate(weights):
        with quiet(seed=0, validate=False):
            evaluation, probability = replay._at(tuple(noise[n][i] for n in (*replay.noise, *replay.plates)))
        total += float(weight * probability * evaluation.objective)
    return total


def test_values_and_their_order():
    """IWAE rises with K, Renyi's falls with alpha; a minibatch has the same mean, below the evidence."""
    params = dict(bits().params)
    evidence = bits_evidence(params)
    assert values(bits(), "elbo", 1) == pytest.approx(float(bits_by_hand(params, elbo, 1)), abs=1e-12)
    for instance, h, _ in BY_HAND.values():
        for count in (1, 2):
            right = float(bits_by_hand(params, h, count))
            assert values(bits(2), instance, count) == pytest.approx(right, abs=1e-12)
            assert values(bits(), instance, count) == pytest.approx(right, abs=1e-12)
            if instance.bounds == "lower":
                assert right <= evidence
    bound = [values(bits(), "iwae", k) for k in (1, 2, 3)]
    assert bound[0] < bound[1] < bound[2] < evidence
    ordered = [float(bits_by_hand(params, renyi(a), 3)) for a in (-1.0, 0.0, 0.5, 1.0001, 3.0)]
    assert ordered == sorted(ordered, reverse=True)
    above = [-float(bits_by_hand(params, chi2, k)) for k in (1, 8)]
    assert above[0] < evidence < above[1]  # an upper bound in the limit only


@pytest.mark.parametrize("estimator", ["pathwise", "score"])
def test_terms_that_no_draw_reaches_are_in_no_weight(estimator):
    """A penalty of theta outside the plate that subsamples: added once, also for one particle."""

    def model(x):
        m = pyro.param("m", tensor(0.4))
        pyro.factor("penalty", -m.square())
        with pyro.plate("data", 3, subsample_size=2, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", 3, subsample_size=2, dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("q", tensor(0.1)), 1.0))

    for count in (1, 3):
        pairs = []
        for fine in (model, pyro.poutine.block(model, hide=["penalty"])):
            pyro.clear_param_store()
            pyro.set_rng_seed(2)
            loss = MonteCarloELBO(count, objective="iwae", estimator=estimator, max_plate_nesting=1)
            pairs.append((loss.loss_and_grads(fine, guide, X), float(pyro.param("m").grad)))
        assert pairs[0][0] - pairs[1][0] == pytest.approx(0.16, abs=1e-12)
        assert pairs[0][1] - pairs[1][1] == pytest.approx(0.8, abs=1e-12)


def test_scale_of_the_user_stays_inside():
    """Only the plate's N/B is outside of the logarithm."""
    problem = bits(2)
    scaled = dataclasses.replace(
        problem,
        model=pyro.poutine.scale(problem.model, 0.5),
        guide=pyro.poutine.scale(problem.guide, 0.5),
    )
    right = bits_by_hand(dict(problem.params), lambda w: iwae(0.5 * w), 2)
    assert values(scaled, "iwae", 2) == pytest.approx(float(right), abs=1e-12)


# A global latent ---------------------------------------------------------------------------------------------------


def bits_under_a_bit(size: int | None = None) -> Problem:
    """A bit for each of two data, after a global one on which theirs depend."""
    theta = {"top": 0.6, "prior": [-0.4, 0.9], "means": [0.2, 1.4], "sigma": 0.8}
    phi = {"above": -0.7, "logits": [0.5, -0.9], "slope": 0.8}

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(logits=param(theta, "top")))
        with pyro.plate("data", len(x), subsample_size=size, dim=-1) as index:
            z = pyro.sample("z", dist.Bernoulli(logits=param(theta, "prior")[g.long()]))
            pyro.sample("x", dist.Normal(param(theta, "means")[z.long()], param(theta, "sigma")), obs=x[index])

    def guide(x):
        g = pyro.sample("g", dist.Bernoulli(logits=param(phi, "above")))
        with pyro.plate("data", len(x), subsample_size=size, dim=-1) as index:
            pyro.sample("z", dist.Bernoulli(logits=param(phi, "logits")[index] + param(phi, "slope") * g))

    return make("bits_under_a_bit", model, guide, theta, phi, (X[:2],), 1)


def under_a_bit_by_hand(p: dict, h: Callable, count: int) -> Tensor:
    total = 0.0
    for g in (0, 1):
        log_q, log_p = log_bit(p["above"])[g], log_bit(p["top"])[g]
        prior = log_bit(p["prior"][g])
        rows = [prior + dist.Normal(p["means"], p["sigma"]).log_prob(x) for x in X[:2]]
        local = sum(mean_h(h, r, log_bit(q + p["slope"] * g), count) for r, q in zip(rows, p["logits"], strict=True))
        total = total + log_q.exp() * (log_p - log_q + local)
    return total


LOCAL = {"iwae": (IWAE(2), iwae), "renyi 0.5": (Renyi(0.5, 2), renyi(0.5))}


@pytest.mark.parametrize("estimator", SCORES, ids=str)
@pytest.mark.parametrize("objective", LOCAL)
def test_local_particles_under_a_global_draw(objective, estimator):
    """Two global draws of two local ones each, one of two data at a time: all outcomes."""
    instance, h = LOCAL[objective]
    problem = bits_under_a_bit(1)
    found = exact_mean(Replay(problem, estimator, 4, objective=instance))
    assert found.outcomes == 2 * 2**2 * 2**4
    assert_gradients(found.gradients, derivatives(problem, under_a_bit_by_hand, h, h, 2))


def test_the_bound_of_a_minibatch_is_below_the_evidence():
    """Each global draw has bounds of the data given it; more local particles tighten them."""
    problem = bits_under_a_bit(1)
    p = dict(problem.params)
    joint = [
        log_bit(p["top"])[g]
        + sum((log_bit(p["prior"][g]) + dist.Normal(p["means"], p["sigma"]).log_prob(x)).logsumexp(0) for x in X[:2])
        for g in (0, 1)
    ]
    evidence = float(torch.stack(joint).logsumexp(0))
    bounds = [values(problem, IWAE(count), count) for count in (1, 2, 3)]
    assert bounds == pytest.approx([float(under_a_bit_by_hand(p, iwae, k)) for k in (1, 2, 3)], abs=1e-12)
    assert bounds[0] < bounds[1] < bounds[2] < evidence


def test_groups_of_local_latents_are_means_of_bounds():
    params = dict(bits().params)
    assert values(bits(2), IWAE(1), 2) == pytest.approx(float(bits_by_hand(params, elbo, 1)), abs=1e-12)


# Reparameterised sites ----------------------------------------------------------------------------------------------


def gauss(dims: int, count: int) -> tuple[Tensor, Tensor]:
    x, w = (torch.as_tensor(t) for t in np.polynomial.hermite_e.hermegauss(count))
    grid = [torch.cartesian_prod(*[t] * dims).reshape(-1, dims) for t in (x, w / w.sum())]
    return grid[0], grid[1].prod(-1)


def mean_by_quadrature(problem: Problem, estimator: Any, num_particles: int, objective: Any, nodes: int):
    replay = Replay(problem, estimator, num_particles, objective=objective)
    return replay.mean(*replay.outcomes(*gauss(replay.size()[1], nodes)))


def switched(theta: dict | None = None) -> Problem:
    """A bit, and a normal number whose mean it moves; one datum."""
    theta = {"prior": -0.4, "shift": 0.7, "sigma": 0.9}
    phi = {"logit": 0.5, "locs": [0.1, 0.5], "scale": 0.6}

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(logits=param(theta, "prior")))
        z = pyro.sample("z", dist.Normal(param(theta, "shift") * k, 1.0))
        pyro.sample("x", dist.Normal(z, param(theta, "sigma")), obs=x)

    def guide(x):
        k = pyro.sample("k", dist.Bernoulli(logits=param(phi, "logit")))
        pyro.sample("z", dist.Normal(param(phi, "locs")[k.long()], param(phi, "scale")))

    return make("switched", model, guide, theta, phi, (X[0],))


NODES = 28


def switched_by_hand(p: dict, h: Callable) -> Tensor:
    """Two particles: the bits summed, the numbers integrated along their paths."""
    eps, weights = gauss(2, NODES)
    total = 0.0
    for row in tuples(2, 2):
        log_k = log_bit(p["logit"])[row]
        z = p["locs"][row] + p["scale"] * eps
        log_q = log_k + dist.Normal(p["locs"][row], p["scale"]).log_prob(z)
        log_p = log_bit(p["prior"])[row] + dist.Normal(p["shift"] * row, 1.0).log_prob(z)
        log_p = log_p + dist.Normal(z, p["sigma"]).log_prob(X[0])
        total = total + log_k.sum().exp() * (weights * h(log_p - log_q)).sum()
    return total


@pytest.mark.parametrize("number", ["pathwise", "dreg", "score"])
@pytest.mark.parametrize("objective", BY_HAND)
def test_a_bit_and_a_number_in_one_guide(objective, number):
    instance, phi, theta = BY_HAND[objective]
    problem = switched()
    found = mean_by_quadrature(problem, {"k": "vimco", "z": number}, 2, instance, NODES)
    assert_gradients(found, derivatives(problem, switched_by_hand, phi, theta), 1e-8)


def chain(gap: float = 0.08) -> Problem:
    """The registered two-level problem, near its posterior, where quadrature is exact with few nodes."""
    problem = problems.two_level()
    params = {**problem.params, **problem.exact_guide()}
    shifted = {n: params[n] * (1 + gap) + (0 if n.endswith("scale") else gap) for n in problem.guide_params}
    return dataclasses.replace(problem, params=MappingProxyType({**params, **shifted}))


@pytest.mark.parametrize(
    "mapping", ["dreg", {"first": "dreg", "second": "pathwise"}, {"first": "pathwise", "second": "dreg"}], ids=str
)
@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.4), Chi2()], ids=lambda o: o.name)
def test_dreg_in_a_two_level_guide(objective, mapping):
    """Each site is carried back with its own factors, through what is downstream of it."""
    problem = chain()
    right = mean_by_quadrature(problem, "pathwise", 2, objective, 12)
    assert_gradients(mean_by_quadrature(problem, mapping, 2, objective, 12), right, 1e-6)
    assert max(float(right[n].abs().max()) for n in problem.guide_params) > 1e-2


def number_under_a_number(scale: float = 1.0, mask: bool = True) -> Problem:
    """A normal number after a global one, both near their posterior; one datum in a plate.

    Args:
        scale: Of all of model and guide.
        mask: Whether the density of the local number counts.
    """
    theta = {"sigma": 1.3}
    phi = {"above": 0.2, "scale_above": 0.5, "loc": 0.1, "slope": 0.4, "scale": 0.6}

    def model(x):
        g = pyro.sample("g", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("data", 1, dim=-1):
            z = pyro.sample("z", dist.Normal(g, 1.0).mask(mask))
            pyro.sample("x", dist.Normal(z, param(theta, "sigma")), obs=x)

    def guide(x):
        g = pyro.sample("g", dist.Normal(param(phi, "above"), param(phi, "scale_above")))
        with pyro.plate("data", 1, dim=-1):
            pyro.sample("z", dist.Normal(param(phi, "loc") + param(phi, "slope") * g, param(phi, "scale")).mask(mask))

    model, guide = (pyro.poutine.scale(f, scale) for f in (model, guide))
    return make("number_under_a_number", model, guide, theta, phi, (X[:1],), 1)


@pytest.mark.parametrize("estimator", ["dreg", {"z": "dreg"}, {"g": "dreg"}, {"g": "score", "z": "dreg"}], ids=str)
def test_dreg_under_a_global_draw(estimator):
    """What goes through the global draw has the plain weights, what goes through local ones the doubly ones."""
    problem, objective = number_under_a_number(), IWAE(2)
    right = mean_by_quadrature(problem, "pathwise", 2, objective, 14)
    assert_gradients(mean_by_quadrature(problem, estimator, 2, objective, 14), right, 1e-6)


@pytest.mark.parametrize(
    ("counts", "objective"),
    [({"scale": 0.4}, IWAE()), ({"scale": 0.4}, Chi2()), ({"scale": 0.4}, Renyi(0.4)), ({"mask": False}, Renyi(0.4))],
    ids=str,
)
def test_dreg_where_log_q_does_not_count_whole(counts, objective):
    """A scale of the user's, or a mask of the latent alone: the direct score is in the weights in part, or not."""
    problem = number_under_a_number(**counts)
    right = mean_by_quadrature(problem, "pathwise", 2, objective, 14)
    for estimator in ("dreg", {"z": "dreg", "g": "pathwise"}):
        assert_gradients(mean_by_quadrature(problem, estimator, 2, objective, 14), right, 1e-6)


def by_transform(positive: bool) -> Problem:
    """`switched`'s number with a guide as Pyro's autoguides write it: an auxiliary normal and a point mass."""

    def model(x):
        z = pyro.sample("z", dist.LogNormal(tensor(0.2), 1.0) if positive else dist.Normal(tensor(0.2), 1.0))
        pyro.sample("x", dist.Normal(z, param({"sigma": 0.9}, "sigma")), obs=x)

    def guide(x):
        loc, scale = param({"loc": 0.1}, "loc"), param({"scale": 0.3}, "scale")
        u = pyro.sample("u", dist.Normal(loc, scale), infer={"is_auxiliary": True})
        if positive:
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))
        else:
            pyro.sample("z", dist.Delta(u * loc, log_density=-loc.abs().log()))

    return make("by_transform", model, guide, {"sigma": 0.9}, {"loc": 0.4, "scale": 0.3}, (X[0],))


@pytest.mark.parametrize("positive", [True, False])
def test_dreg_through_a_point_mass(positive):
    """What a point mass adds, its own parameters too, keeps all its paths."""
    problem = by_transform(positive)
    right = mean_by_quadrature(problem, "pathwise", 2, IWAE(), 40)
    assert_gradients(mean_by_quadrature(problem, {"u": "dreg"}, 2, IWAE(), 40), right, 1e-6)


# Identities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.4), Chi2()], ids=lambda o: o.name)
def test_one_particle_is_the_elbo(objective):
    """Its value up to sign, and its gradient."""
    problem = bits(2)
    noise = Replay(problem, "score", 1).draws(5, index=True)
    one, other = (Replay(problem, "score", 1, objective=o) for o in ("elbo", objective))
    for i in range(5):
        row = {n: rows[i] for n, rows in noise.items()}
        a, b = one.evaluate(row), other.evaluate(row)
        assert float(a.objective) == pytest.approx(objective.sign * float(b.objective), rel=1e-12)
    found, right = other.gradients(noise)[0], one.gradients(noise)[0]
    for name in right:
        sign = objective.sign if name in problem.guide_params else 1.0
        torch.testing.assert_close(sign * found[name], right[name], rtol=1e-10, atol=1e-10)


def test_renyi_tends_to_the_elbo():
    w = torch.linspace(-3, 2, 12, dtype=DOUBLE).reshape(4, 3)
    for alpha, tolerance in ((1 - 1e-4, 1e-3), (1 + 1e-6, 1e-5), (1 - 1e-12, 1e-11), (1.0, 1e-15)):
        torch.testing.assert_close(Renyi(alpha).value(w), w.mean(0, keepdim=True), rtol=0, atol=tolerance)
        torch.testing.assert_close(Renyi(alpha).slopes(w), torch.full_like(w, 0.25), rtol=0, atol=tolerance)
    torch.testing.assert_close(Renyi(0.0).value(w), IWAE().value(w), rtol=1e-14, atol=0)


@pytest.mark.parametrize("objective", [o for o, _, _ in BY_HAND.values()], ids=str)
def test_derivatives_and_baselines_of_an_objective(objective):
    """Slopes, the factors of DReG and the baselines, against autograd and against the value itself."""
    w = (3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)).requires_grad_()
    (slopes,) = torch.autograd.grad(objective.value(w).sum(), w, create_graph=True)
    torch.testing.assert_close(objective.slopes(w), slopes, rtol=1e-10, atol=1e-12)
    slopes = slopes + 0 * w  # those of a mean are constants
    curved = torch.stack([torch.autograd.grad(slopes[k].sum(), w, retain_graph=True)[0][k] for k in range(5)])
    torch.testing.assert_close(objective.doubly(w), slopes - curved, rtol=1e-10, atol=1e-10)
    for mean in ("geometric", "arithmetic"):
        by_value = MultiSample.without(objective, w.detach(), mean)
        torch.testing.assert_close(objective.without(w.detach(), mean), by_value, rtol=1e-10, atol=1e-10)


def test_baselines_stand_one_weight_above_all():
    """Subtraction from the sum of all weights would leave nothing of the others."""
    w = tensor([[0.0], [-90.0], [-91.0]])
    rest = IWAE().without(w, "arithmetic")
    assert float(rest[0]) == pytest.approx(-90 + math.log1p(math.exp(-1)) - math.log(2), abs=1e-12)


def test_vimco_of_two_particles_in_closed_form():
    """Each baseline is the other's log weight, whatever the mean."""
    w = tensor([[0.3], [-1.1]])
    for mean in ("geometric", "arithmetic"):
        torch.testing.assert_close(IWAE().without(w, mean), w.flip(0), rtol=0, atol=1e-14)
    problem = bits()
    replay = Replay(problem, "vimco", 2, objective="iwae")
    noise = {n: rows[0] for n, rows in replay.draws(1, index=True).items()}
    evaluation = replay.evaluate(noise)
    z = evaluation.particles.guide["z"].value
    p = dict(problem.params)
    table = torch.stack([log_bit(p["prior"]) + dist.Normal(p["means"], p["sigma"]).log_prob(x) for x in X])
    q = torch.stack([log_bit(logit) for logit in p["logits"]])
    pick = z.long().unsqueeze(-1)
    weights = (table - q).expand(2, 3, 2).gather(-1, pick)[..., 0]
    v = weights.softmax(0)
    factor = weights.logsumexp(0) - math.log(2) - weights.flip(0) - v
    right = (factor * (z - p["logits"].sigmoid())).sum(0)
    torch.testing.assert_close(replay.gradient(evaluation)["logits"], right, rtol=1e-10, atol=1e-12)


def test_ovis_vanishes_faster_where_weights_are_alike():
    """At the posterior the factors are of order 1/K^2; those of VIMCO are -1/K."""
    for count in (4, 64):
        w = torch.zeros(count, 1, dtype=DOUBLE)
        h, v, rest = IWAE().value(w), IWAE().slopes(w), IWAE().without(w, "arithmetic")
        torch.testing.assert_close(h - rest - v, torch.full_like(w, -1 / count))
        factor = h - rest - math.log1p(-1 / count) - v
        assert 0 < float(factor[0]) < 0.7 / count**2


@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.4)], ids=lambda o: o.name)
def test_dreg_is_zero_at_the_posterior(objective):
    problem = chain(gap=0.0)
    replay = Replay(problem, "dreg", 5, objective=objective)
    with quiet(seed=1):
        found = replay.gradient(replay.evaluate({}))
    for name in problem.guide_params:
        assert float(found[name].abs().max()) < 1e-9


def test_dreg_of_one_particle_is_sticking_the_landing():
    problem = problems.two_level()
    one, other = Replay(problem, "sticking_the_landing", 1), Replay(problem, "dreg", 1, objective="iwae")
    noise = one.draws(3)
    assert_gradients(other.gradients(noise)[0], one.gradients(noise)[0])


def test_the_choice_of_vimco_or_ovis_is_lagged_and_can_change():
    """By K at first, then by the running factors: VIMCO far from the posterior, OVIS at it."""
    problem = problems.categorical()
    at = dataclasses.replace(problem, params=MappingProxyType({**problem.params, **problem.exact_guide()}))
    for params, count, first, second in ((at, 4, "vimco", "ovis"), (at, 9, "ovis", "ovis")):
        replay = Replay(params, "multi_sample_score", count, objective="iwae")
        noise = {n: rows[0] for n, rows in replay.draws(1).items()}
        evaluation = replay.evaluate(noise)
        for state, chosen in ((None, first), (evaluation.state, second)):
            right = Replay(params, chosen, count, objective="iwae")
            found = replay.gradient(replay.evaluate(noise, state))
            assert_gradients(found, right.gradient(right.evaluate(noise)))


@pytest.mark.parametrize(
    ("problem", "estimator", "objective", "count"),
    [
        (bits(2), "score", IWAE(), 2),
        (bits(2), "vimco", Renyi(0.5), 2),
        (bits(2), "ovis", IWAE(), 2),
        (bits_under_a_bit(1), "vimco", IWAE(2), 4),
        (bits_under_a_bit(1), "score", IWAE(2), 2),
        (bits_under_a_bit(1), "multi_sample_score", IWAE(2), 4),
        (bits_under_a_bit(1), "neural_baseline", IWAE(2), 2),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_hessian_over_all_outcomes(problem, estimator, objective, count):
    """Second derivatives of `differentiable_loss`."""
    replay = Replay(problem, estimator, count, objective=objective)
    noise, weights = replay.outcomes(torch.zeros(1, 0), torch.ones(1, dtype=DOUBLE))
    leaves, found = list(replay.leaves.values()), 0.0
    for i, weight in enumerate(weights):
        with quiet(seed=0, validate=False):
            evaluation = replay.evaluate({n: rows[i] for n, rows in noise.items()}, order=2)
        logs = [replay._log_probability(name, evaluation.particles).detach() for name in replay.sizes]
        found = found + weight * torch.stack(logs).sum().exp() * second_derivatives(evaluation.surrogate, leaves)
    fresh, size = problem.unconstrained(), objective.num_local_particles or count
    h = BY_HAND["renyi 0.5" if objective.name == "renyi" else "iwae"][1]
    by_hand = bits_by_hand if problem.name == "bits" else under_a_bit_by_hand
    exact = second_derivatives(by_hand(problem.constrained(fresh), h, size), [fresh[n] for n in replay.leaves])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


# Planted defects, each caught by a named check ----------------------------------------------------------------------


@dataclass(frozen=True)
class DoublyOnTheta(IWAE):
    """The squared weights of DReG on theta too."""

    splits_paths: ClassVar[bool] = True

    def model_slopes(self, log_weight):
        return self.doubly(log_weight)


@dataclass(frozen=True)
class WeightsNotSquared(IWAE):
    """w in place of w^2 through the values: sticking the landing in IWAE."""

    def doubly(self, log_weight):
        return self.slopes(log_weight)


@dataclass(frozen=True)
class ScaledInside(IWAE):
    """N/B inside the logarithm, as `RenyiELBO` has it: one power of all weights."""

    scale: float = 1.5

    def __init__(self, scale: float = 1.5) -> None:
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "num_local_particles", None)

    def value(self, log_weight):
        return super().value(self.scale * log_weight) / self.scale

    def slopes(self, log_weight):
        return super().slopes(self.scale * log_weight)


@dataclass(frozen=True)
class InfinitelyMany(ScoreFunction):
    r"""Pyro's $\alpha/(1-\alpha)\log q$: the gradient of Renyi's bound for infinitely many particles."""

    traits: ClassVar[Traits] = Traits(objectives=("multi_sample",))

    def advantage(self, site, signal, rows, state):
        return direct(site.bound) / site.bound.objective.power


@dataclass(frozen=True)
class GammaOne(ScoreFunction):
    """OVIS without the direct derivative of the weights."""

    traits: ClassVar[Traits] = OVIS.traits

    def advantage(self, site, signal, rows, state):
        return OVIS().advantage(site, signal, rows, state) + direct(site.bound)


@dataclass(frozen=True)
class OwnParticleInTheBaseline(ScoreFunction):
    """The mean of all log weights in each particle's place."""

    traits: ClassVar[Traits] = VIMCO.traits

    def advantage(self, site, signal, rows, state):
        held = site.bound.held
        filled = site.bound.objective.without(held, "geometric") + 0.5 * (held - held.mean(0))
        return signal - site.bound.size * site.bound.scale * site.bound.unfold(filled)


def check_bits(estimator: Any, objective: Any, h: Callable) -> None:
    found = exact_mean(Replay(bits(2), estimator, 3, objective=objective)).gradients
    assert_gradients(found, derivatives(bits(2), bits_by_hand, h, h, 3))


def check_switched(estimator: Any, objective: Any, h: Callable) -> None:
    found = mean_by_quadrature(switched(), {"k": "score", "z": estimator}, 2, objective, NODES)
    assert_gradients(found, derivatives(switched(), switched_by_hand, h, h), 1e-8)


PLANTED = {
    "DReG's weights on theta": (check_switched, "dreg", DoublyOnTheta(), iwae, "prior"),
    "w in place of w^2": (check_switched, "dreg", WeightsNotSquared(), iwae, "locs"),
    "Renyi's alpha/(1-alpha) surrogate": (check_bits, InfinitelyMany(), Renyi(0.5), renyi(0.5), "logits"),
    "no gradient at alpha = 0": (check_bits, InfinitelyMany(), IWAE(), iwae, "logits"),
    "OVIS with gamma = 1": (check_bits, GammaOne(), IWAE(), iwae, "logits"),
    "N/B inside the logarithm": (check_bits, "score", ScaledInside(), iwae, "logits"),
    "its own particle in a baseline": (check_bits, OwnParticleInTheBaseline(), IWAE(), iwae, "logits"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_defect_is_caught(planted):
    check, estimator, objective, h, name = PLANTED[planted]
    with pytest.raises(AssertionError, match=f"^{name}: "):
        check(estimator, objective, h)
    check("dreg" if check is check_switched else "score", IWAE(), iwae)


class DetachedNormal(dist.Normal):
    """Its density holds its parameters, as in the usual recipe for sticking the landing and its doubly sibling."""

    def log_prob(self, value):
        return dist.Normal(self.loc.detach(), self.scale.detach()).log_prob(value)


class DetachedDistributions(pyro.poutine.messenger.Messenger):
    def _pyro_sample(self, msg):
        if not msg["is_observed"]:
            msg["fn"] = DetachedNormal(msg["fn"].loc, msg["fn"].scale)


@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.4)], ids=lambda o: o.name)
def test_dreg_by_a_detached_distribution_is_caught_in_a_two_level_guide(objective):
    """The first draw's path through the second's density is lost."""
    problem = chain()
    right = mean_by_quadrature(problem, "pathwise", 2, objective, 12)
    detached = dataclasses.replace(problem, guide=DetachedDistributions()(problem.guide))
    with pytest.raises(AssertionError, match=r"^loc: "):
        assert_gradients(mean_by_quadrature(detached, "dreg", 2, objective, 12), right, 1e-3)
    assert_gradients(mean_by_quadrature(problem, "dreg", 2, objective, 12), right, 1e-6)


# Errors -------------------------------------------------------------------------------------------------------------


def refused(match: str, problem: Problem, num_particles: int = 4, **options: Any) -> None:
    pyro.clear_param_store()
    with pytest.raises(EmvaeError, match=match):
        MonteCarloELBO(num_particles, **options).loss_and_grads(problem.model, problem.guide, *problem.args)


def test_what_does_not_fit_is_refused():
    refused("objective='iwae'.*'elbo'.*multi_sample_score", bits(), objective="iwae", estimator="leave_one_out")
    refused("objective='elbo'.*'multi_sample'", bits(), estimator="vimco")
    refused("num_particles=1", bits(), 1, objective="iwae", estimator="ovis")
    refused("has_rsample=False", bits(), objective="iwae", estimator="dreg")
    refused("site 'g' outside plate 'data'.*num_local_particles", bits_under_a_bit(1), objective="iwae")
    refused("num_particles=4 and num_local_particles=3", bits(), objective=IWAE(3))
    refused("no latent in a plate", switched(), objective=IWAE(2))
    refused("a latent outside every plate", bits_under_a_bit(1), objective=Chi2(2))
    refused("num_particles=2", bits_under_a_bit(1), 2, objective=IWAE(1), estimator={"z": "vimco"})
    looped = {"objective": IWAE(2), "vectorize_particles": False}
    refused("site 'g' together.*one by one", bits_under_a_bit(1), **looped)
    with pytest.raises(EmvaeError, match="alpha"):
        MonteCarloELBO(objective="renyi")
    for wrong in (lambda: Renyi(math.inf), lambda: Renyi("half"), lambda: IWAE(0), lambda: VIMCO("harmonic")):
        with pytest.raises(EmvaeError):
            wrong()
    with pytest.raises(EmvaeError, match=r"decay=1\.0"):
        MultiSampleScore(1.0)


def test_a_loop_over_a_plate_that_subsamples_is_refused():
    def model(x):
        for i in pyro.plate("data", len(x), subsample_size=2):
            z = pyro.sample(f"z{i}", dist.Normal(tensor(0.0), 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x), subsample_size=2):
            pyro.sample(f"z{i}", dist.Normal(pyro.param("m", tensor(0.1)), 1.0))

    for options in ({"num_particles": 1}, {"num_particles": 1, "estimator": "score"}):
        with pytest.raises(EmvaeError, match="a loop over plate 'data', which subsamples 2 of 3"):
            MonteCarloELBO(objective="iwae", **options).loss(model, guide, X)


def test_a_score_downstream_of_dreg_is_refused():
    """Its derivative by the value would be missing; upstream it is right."""

    def guide(x):
        z = pyro.sample("z", dist.Normal(pyro.param("m", tensor(0.1)), 1.0))
        pyro.sample("k", dist.Bernoulli(logits=z))

    def model(x):
        k = pyro.sample("k", dist.Bernoulli(tensor(0.5)))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    problem = dataclasses.replace(switched(), model=model, guide=guide)
    for score, count in (("vimco", 4), ("score", 1)):
        mapping = {"z": "dreg", "k": score}
        refused("site 'k', differentiated by its score", problem, count, objective="iwae", estimator=mapping)


# Users of the objectives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
def test_looped_particles_have_the_same_gradients(vectorize):
    """Against the exact gradient: the mean of many draws."""
    problem = switched()
    right = derivatives(problem, switched_by_hand, iwae, iwae)
    loss = MonteCarloELBO(
        2, objective="iwae", estimator={"k": "ovis", "z": "dreg"}, vectorize_particles=vectorize, max_plate_nesting=0
    )
    rows = []
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    for _ in range(300):
        loss.loss_and_grads(problem.model, problem.guide, *problem.args)
        leaves = {n: pyro.param(n).unconstrained() for n in right}
        rows.append(torch.cat([-leaf.grad.reshape(-1) for leaf in leaves.values()]))
        for leaf in leaves.values():
            leaf.grad = None
    x, target = torch.stack(rows), torch.cat([g.reshape(-1) for g in right.values()])
    assert float(((x.mean(0) - target) / (x.std(0) / len(x) ** 0.5)).abs().max()) < 4.5


def test_looped_particles_of_a_minibatch_see_the_same_data():
    """Weights are compared datum by datum: the mean is that of the bound, and one datum's parameters get a gradient."""
    problem, values = bits(1), []
    loss = MonteCarloELBO(3, 1, vectorize_particles=False, objective="iwae", estimator="ovis")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    for _ in range(300):
        evaluation = loss.evaluate(problem.model, problem.guide, problem.args, {})
        (gradient,) = torch.autograd.grad(evaluation.surrogate, pyro.param("logits").unconstrained())
        assert int((gradient != 0).sum()) == 1
        values.append(evaluation.objective)
    assert_mean(torch.stack(values), bits_by_hand(dict(problem.params), iwae, 3), detect=1.5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_one_datum_reparameterised_is_pyro_s(alpha):
    """There the two objectives are the same: loss and gradients at the same seed."""
    problem = number_under_a_number()
    found = []
    for loss in (
        RenyiELBO(alpha, 4, vectorize_particles=True, max_plate_nesting=1),
        MonteCarloELBO(4, objective=Renyi(alpha)),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        value = loss.loss_and_grads(problem.model, problem.guide, *problem.args)
        grads = [pyro.param(n).unconstrained().grad for n in (*problem.guide_params, *problem.model_params)]
        found.append(torch.stack([tensor(value), *grads]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_auto_takes_what_fits_the_objective():
    problem = switched()
    loss = MonteCarloELBO(4, objective="iwae")
    loss.loss(problem.model, problem.guide, *problem.args)
    assert {n: type(e).__name__ for n, e in loss.resolved.items()} == {"k": "MultiSampleScore", "z": "Pathwise"}


@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.5), Chi2(), IWAE(2)], ids=str)
def test_recorded_runs_equal_eager_ones_and_say_what_they_record(objective):
    problem = bits(2)
    found = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        loss = MonteCarloELBO(4, objective=objective)
        svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.05}), loss, backend=backend)
        fit = svi.run(12, *problem.args, seed=3, progress_bar=False)
        assert set(fit.history["objective_kind"].values) == {objective.name}
        assert objective.name in fit.history.attrs["objective_kind"]
        assert bool(fit.history["elbo"].isnull().all())
        found.append({n: v.clone() for n, v in fit.params.items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", ["iwae", "chi2"])
def test_em_climbs_an_objective_of_several_particles(objective):
    """The guide comes to cover the posterior, the model its evidence, and E and M say what they climb."""
    problem = bits()
    pyro.clear_param_store()
    before = bits_evidence(dict(problem.params))
    em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.05}), MonteCarloELBO(8, objective=objective))
    fit = em.run(*problem.args, max_iter=60, seed=0, progress_bar=False)
    assert set(fit.history["objective_kind"].values) == {objective}
    after = bits_evidence({n: v.detach() for n, v in fit.params.items()})
    assert after > before + 0.3


def test_compare_gradients_takes_an_objective():
    problem = bits()
    reference = derivatives(problem, bits_by_hand, iwae, iwae, 3)
    pyro.clear_param_store()
    table = compare_gradients(
        problem.model,
        problem.guide,
        *problem.args,
        estimators=["score", "vimco", "ovis"],
        objective="iwae",
        num_particles=3,
        num_replicates=500,
        reference=reference,
        seed=0,
    ).dataset
    assert bool((table.bias_z < table.attrs["bias_z_limit"]).all())
    variance = table.variance_mean.sel(block="guide")
    assert float(variance.sel(estimator="vimco")) < 0.5 * float(variance.sel(estimator="score"))


def test_wake_theta_is_the_gradient_of_the_bound():
    """Reweighted wake-sleep and IWAE weigh the same draws alike: the same value, and the same gradient of theta."""
    problem = bits()
    pyro.clear_param_store()
    posterior = steps.WakeSleep(num_particles=5).infer(problem.model, problem.args, {}, problem.guide)
    leaves = {n: pyro.param(n).unconstrained() for n in problem.model_params}
    wake = torch.autograd.grad(posterior.expected_log_joint(), list(leaves.values()))
    replay = Replay(problem, "vimco", 5, objective="iwae")
    evaluation = replay.evaluate({"z": posterior.draws.values["z"].long()})
    assert float(evaluation.objective) == pytest.approx(posterior.log_evidence, rel=1e-12)
    assert_gradients(replay.gradient(evaluation), dict(zip(leaves, wake, strict=True)))


def test_annealing_is_refused():
    problem = bits()
    pyro.clear_param_store()
    loss = MonteCarloELBO(2, objective="iwae", estimator="score")
    with pytest.raises(EmvaeError, match="objective='iwae'"):
        loss.evaluate(problem.model, problem.guide, problem.args, {}, beta=tensor(0.5))


def test_masks_that_are_not_compared_are_not_taken_as_equal():
    """Without validation, as in a recording, no value is looked at: the KL is NaN where masks differ."""
    keep, other = torch.tensor([True, True, False]), torch.tensor([True, False, False])

    def model(mask: Tensor, _: Tensor) -> None:
        with pyro.plate("data", 3):
            with pyro.poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    def guide(_: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", 3), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0))

    pyro.clear_param_store()
    loss = MonteCarloELBO(1, 1, objective="elbo_analytic_kl")
    with pyro.validation_enabled(False):
        assert math.isfinite(loss.loss(model, guide, keep, keep.clone()))
        for pair in ((keep, other), (other, keep)):
            with pytest.raises(EmvaeError, match="not finite"):
                loss.loss(model, guide, *pair)
    with pytest.raises(EmvaeError, match="a scale or mask that differs"):
        loss.loss(model, guide, keep, other)
