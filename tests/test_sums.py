r"""Discrete sites summed out, in the guide and in the model, against Pyro's `TraceEnum_ELBO` and closed forms."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch.distributions import constraints, kl_divergence

from pyro_emvae import MonteCarloELBO
from pyro_emvae._checks import EmvaeError, EstimatorError

DATA = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
PARALLEL = {"enumerate": "parallel"}


def par(name: str, *value: float, **how: Any) -> torch.Tensor:
    return pyro.param(name, lambda: torch.tensor(value, dtype=torch.float64), **how)


def mixture(x: torch.Tensor) -> None:
    """Global weights, one class per datum, and a continuous local."""
    loc = par("loc", -1.0, 0.0, 1.5)
    probs = par("probs", 0.2, 0.5, 0.3, constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(probs), infer=PARALLEL)
        pyro.sample("x", dist.Normal(loc[z], 0.7), obs=x)


def mixture_guide(x: torch.Tensor) -> None:
    logits = par("logits", *([0.1, -0.4, 0.9] * len(x))).reshape(len(x), 3)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=logits), infer=PARALLEL)


def empty(x: torch.Tensor) -> None:
    """A guide of nothing: all latents are summed out of the model."""


def chain(x: torch.Tensor) -> None:
    """A hidden Markov chain with a global switch."""
    g = pyro.sample("g", dist.Bernoulli(par("p", 0.4).squeeze()), infer=PARALLEL)
    stay = par("stay", 1.2).squeeze()
    z = None
    for t in pyro.markov(range(len(x))):
        logits = (0.3 * g) if z is None else stay * (2 * z - 1)
        z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=logits), infer=PARALLEL)
        pyro.sample(f"x_{t}", dist.Normal(2 * z - 1 + 0.5 * g, 1.0), obs=x[t])


def chain_guide(x: torch.Tensor) -> None:
    g = pyro.sample("g", dist.Bernoulli(logits=par("g_logit", 0.2).squeeze()), infer=PARALLEL)
    a, b = par("a", 0.3).squeeze(), par("b", -0.8).squeeze()
    z = g
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=a + b * z), infer=PARALLEL)


def switched(x: torch.Tensor) -> None:
    """A class and a continuous local that depends on it."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(par("p", 0.4).squeeze()))
        w = pyro.sample("w", dist.Normal(2 * z, 1.0))
        pyro.sample("x", dist.Normal(w, 0.5 + z), obs=x)


def switched_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=par("logit", 0.3, -0.2, 0.8)), infer=PARALLEL)
        loc = par("loc", 0.5, -0.5, 1.0) + par("shift", 0.7) * z
        pyro.sample("w", dist.Normal(loc, par("scale", 0.6, constraint=constraints.positive)))


def nested(x: torch.Tensor) -> None:
    """A global class in the model only, outside the plate of what depends on it."""
    g = pyro.sample("g", dist.Categorical(par("probs", 0.3, 0.7, constraint=constraints.simplex)), infer=PARALLEL)
    loc = par("loc", -1.0, 1.0)
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(loc[g], 1.0))
        pyro.sample("x", dist.Normal(w, 0.5), obs=x)


def nested_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(par("m", 0.5, -0.5, 1.0), par("s", 0.6, constraint=constraints.positive)))


def gradient(loss: Any, model: Callable, guide: Callable, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, DATA)
    leaves = {n: pyro.param(n).unconstrained() for n in pyro.get_param_store()}
    return value, {n: leaf.grad for n, leaf in leaves.items()}


EXACT = {
    "mixture, in the guide": (mixture, mixture_guide, 1),
    "mixture, in the model": (mixture, empty, 1),
    "chain, in the guide": (chain, chain_guide, 0),
    "chain, in the model": (chain, empty, 0),
}


@pytest.mark.parametrize(("model", "guide", "nesting"), EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("how", [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": False}], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["nesting given", "nesting guessed"])
def test_all_summed_out_is_trace_enum(model, guide, nesting, how, given):
    """No draw is left: value and gradient are the same numbers, whatever the seed."""
    value, right = gradient(TraceEnum_ELBO(max_plate_nesting=nesting), model, guide)
    options = how | ({"max_plate_nesting": nesting} if given else {})
    for seed in (1, 2):
        found, grads = gradient(MonteCarloELBO(**options), model, guide, seed)
        assert found == pytest.approx(value, rel=1e-12)
        assert grads.keys() == right.keys()
        for name, g in right.items():
            torch.testing.assert_close(grads[name], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("model", "guide"), [(switched, switched_guide), (nested, nested_guide)])
def test_mixed_with_pathwise_draws_is_trace_enum(model, guide):
    """The same draws at the same seed, and so the same numbers."""
    value, right = gradient(TraceEnum_ELBO(max_plate_nesting=1), model, guide, seed=3)
    found, grads = gradient(MonteCarloELBO(max_plate_nesting=1), model, guide, seed=3)
    assert found == pytest.approx(value, rel=1e-10)
    for name, g in right.items():
        torch.testing.assert_close(grads[name], g, rtol=1e-8, atol=1e-10)


def above(x: torch.Tensor) -> None:
    """A global that is drawn, and a class that depends on it."""
    g = pyro.sample("g", dist.Bernoulli(par("p", 0.4).squeeze()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=torch.stack([0 * g, g, -g], -1)))
        pyro.sample("x", dist.Normal(par("loc", -1.0, 0.0, 1.5)[z] + g, 0.7), obs=x)


def above_guide(x: torch.Tensor) -> None:
    g = pyro.sample("g", dist.Bernoulli(logits=par("g_logit", 0.4).squeeze()))
    logits = par("logits", *([0.1, -0.4, 0.9] * len(x))).reshape(len(x), 3) + g.reshape(*g.shape, 1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=logits))


@pytest.mark.parametrize("score", ["score", "leave_one_out"])
def test_a_score_function_upstream_gets_the_conditional_expectation(score):
    """Averaged over both outcomes of all drawn particles, the gradient is the one with nothing drawn."""
    _, right = gradient(MonteCarloELBO(estimator="enumerated"), above, above_guide)
    rows = 2 if score == "leave_one_out" else 1
    loss = MonteCarloELBO(rows, 1, estimator={"g": score, "z": "enumerated"}, vectorize_particles=rows > 1)
    total: dict[str, torch.Tensor] = dict.fromkeys(right, torch.zeros((), dtype=torch.float64))
    found = set()
    for seed in range(40):
        _, grads = gradient(loss, above, above_guide, seed)
        pyro.set_rng_seed(seed)
        drawn = loss.particles(above, above_guide, (DATA,), {}).guide["g"]
        outcome = tuple(drawn.value.flatten().int().tolist())
        if outcome not in found:
            found.add(outcome)
            for name in right:
                total[name] = total[name] + drawn.log_prob.sum().exp().detach() * grads[name]
    assert len(found) == 2**rows
    for name, g in right.items():
        torch.testing.assert_close(total[name], g, rtol=1e-10, atol=1e-12)


def test_a_score_function_downstream_is_refused():
    loss = MonteCarloELBO(1, 1, estimator={"z": "enumerated", "w": "score"})
    with pytest.raises(EstimatorError, match=r"'w'.*Score.*\"w\": \"pathwise\".*\"z\": \"leave_one_out\""):
        loss.loss_and_grads(switched, switched_guide, DATA)
    assert not loss.state


@pytest.mark.parametrize("estimator", ["sticking_the_landing", "antithetic"])
def test_other_draws_downstream_are_refused(estimator):
    loss = MonteCarloELBO(2, 1, estimator={"z": "enumerated", "w": estimator}, vectorize_particles=True)
    with pytest.raises(EstimatorError, match=r"'w'.*Pathwise"):
        loss.loss_and_grads(switched, switched_guide, DATA)


def outside(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
    pyro.factor("f", (z * x).sum(-1, keepdim=True))


def outside_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=par("logits", 0.3, 0.1, -0.5)))


def test_a_term_outside_the_plate_is_refused_and_auto_does_not_try():
    """The sum over a plate at once would need all pairs of outcomes."""
    with pytest.raises(EstimatorError, match=r"'f'.*'data'"):
        MonteCarloELBO(1, 1, estimator="enumerated").loss(outside, outside_guide, DATA)
    loss = MonteCarloELBO(2, 1, vectorize_particles=True)
    loss.loss(outside, outside_guide, DATA)
    assert type(loss.resolved["z"]).__name__ != "Enumerated"


def wrong_under_dims(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)


def test_auto_looks_at_every_outcome_before_it_sums():
    """A mean over all dims passes every check of shapes."""
    loss = MonteCarloELBO(1, 1)
    loss.loss(wrong_under_dims, outside_guide, DATA)
    assert type(loss.resolved["z"]).__name__ == "DecayingAverage"


def annotated_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=par("logits", 0.3, 0.1, -0.5)), infer=PARALLEL)


@pytest.mark.parametrize(("guide", "estimator"), [(outside_guide, "enumerated"), (annotated_guide, "auto")])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_a_sum_that_was_asked_for_is_looked_at_too(guide, estimator, num_particles):
    """Pyro's `TraceEnum_ELBO` gives a wrong number here."""
    loss = MonteCarloELBO(num_particles, 1, estimator=estimator)
    before = torch.get_rng_state()
    with (
        pytest.warns() if num_particles > 1 else contextlib.nullcontext(),
        pytest.raises(EstimatorError, match=r"sum over site 'z'.*other densities.*\"leave_one_out\"") as caught,
    ):
        loss.loss_and_grads(wrong_under_dims, guide, DATA)
    assert "dim=-1" in str(caught.value) and loss.state == {} and torch.equal(torch.get_rng_state(), before)


def test_each_outcome_is_looked_at_once():
    calls = []

    def model(x: torch.Tensor) -> None:
        calls.append(1)
        mixture(x)

    loss = MonteCarloELBO(1, 1, estimator="enumerated")
    counts = []
    for _ in range(3):
        calls.clear()
        loss.loss(model, mixture_guide, DATA)
        counts.append(len(calls))
    assert counts[0] > 3 and counts[1:] == [1, 1]


def many_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=torch.zeros(len(x), 200_000)))


def vector_guide(x: torch.Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(logits=torch.zeros(50)).to_event(1))


def count_guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Poisson(torch.ones(len(x))))


@pytest.mark.parametrize(
    ("guide", "got"),
    [(many_guide, "200,000 outcomes"), (vector_guide, r"1\.13e\+15 outcomes"), (count_guide, "Poisson")],
)
def test_what_is_too_large_says_how_large(guide, got):
    with pytest.raises(EstimatorError, match=got):
        MonteCarloELBO(1, 1, estimator="enumerated").loss(guide, guide, DATA)


def test_what_is_too_large_in_the_model_says_how_large():
    def model(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(logits=torch.zeros(50)).to_event(1), infer=PARALLEL)

    with pytest.raises(EstimatorError, match=r"about 10\^15 outcomes"):
        MonteCarloELBO(1, 1).loss(model, empty, DATA)


def batch(x: torch.Tensor) -> None:
    loc = par("loc", -1.0, 0.0, 1.5)
    probs = par("probs", 0.2, 0.5, 0.3, constraint=constraints.simplex)
    with (
        pyro.plate("data", 9, subsample=torch.tensor([1, 4, 7])),
        pyro.poutine.mask(mask=torch.tensor([True, False, True])),
    ):
        z = pyro.sample("z", dist.Categorical(probs), infer=PARALLEL)
        pyro.sample("x", dist.Normal(loc[z], 0.7), obs=x)


@pytest.mark.parametrize("guide", [empty, mixture_guide])
def test_scales_and_masks_are_as_in_trace_enum(guide):
    def plated(x: torch.Tensor) -> None:
        logits = par("logits", *([0.1, -0.4, 0.9] * len(x))).reshape(len(x), 3)
        with (
            pyro.plate("data", 9, subsample=torch.tensor([1, 4, 7])),
            pyro.poutine.mask(mask=torch.tensor([True, False, True])),
        ):
            pyro.sample("z", dist.Categorical(logits=logits), infer=PARALLEL)

    guide = guide if guide is empty else plated
    value, right = gradient(TraceEnum_ELBO(max_plate_nesting=1), batch, guide)
    found, grads = gradient(MonteCarloELBO(2, vectorize_particles=True), batch, guide)
    assert found == pytest.approx(value, rel=1e-12)
    for name, g in right.items():
        torch.testing.assert_close(grads[name], g, rtol=1e-10, atol=1e-12)


def test_latents_of_different_scale_are_not_summed_out():
    def model(x: torch.Tensor) -> None:
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)), infer=PARALLEL)
        with pyro.plate("data", 9, subsample=torch.tensor([1, 4, 7])):
            pyro.sample("x", dist.Normal(g, 0.7), obs=x)

    with pytest.raises(EmvaeError, match=r"scales \[1\.0, 3\.0\]"):
        MonteCarloELBO().loss(model, empty, DATA)


def test_the_number_of_evaluations_counts_outcomes():
    loss = MonteCarloELBO(2, 1, vectorize_particles=True)
    loss.loss_and_grads(chain, chain_guide, DATA)
    assert loss.evaluations == 2 * 4  # a state, and the one before it or the switch


def test_second_derivatives_are_exact():
    pyro.clear_param_store()
    loss = MonteCarloELBO(estimator="enumerated", max_plate_nesting=1)
    with torch.enable_grad():
        value = loss.differentiable_loss(mixture, mixture_guide, DATA)
    leaf = pyro.param("logits").unconstrained()
    (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
    (curvature,) = torch.autograd.grad(slope[0], leaf)
    step = 1e-5
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf[0] += sign * step
        (found,) = torch.autograd.grad(loss.differentiable_loss(mixture, mixture_guide, DATA), leaf)
        moved.append(found)
        with torch.no_grad():
            leaf[0] -= sign * step
    torch.testing.assert_close(curvature, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_kl_in_closed_form_is_averaged_too():
    """Both ways of writing the same sum."""
    value, right = gradient(MonteCarloELBO(estimator="enumerated"), above, above_guide)
    found, grads = gradient(MonteCarloELBO(estimator="enumerated", objective="elbo_analytic_kl"), above, above_guide)
    assert found == pytest.approx(value, rel=1e-12)
    for name, g in right.items():
        torch.testing.assert_close(grads[name], g, rtol=1e-10, atol=1e-12)


# What a second model, masks and noise do to sums --------------------------------------------------------------------


SEEN = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
CHANCES = torch.tensor([0.3, 0.6, 0.5], dtype=torch.float64)


def bits_of(noise: Callable[[torch.Tensor], torch.Tensor] = lambda p: p) -> Callable:
    def guide() -> None:
        chances = pyro.param("chances", CHANCES.clone)
        with pyro.plate("data", 3):
            pyro.sample("k", dist.Bernoulli(noise(chances)))

    return guide


def seen_by_bit() -> None:
    """A datum is seen where its bit says so, and another counts twice."""
    with pyro.plate("data", 3):
        k = pyro.sample("k", dist.Bernoulli(SEEN.new_tensor(0.4)))
        with poutine.mask(mask=k.bool()):
            pyro.sample("x", dist.Normal(SEEN.new_ones(()), 1.0), obs=SEEN)
        with poutine.scale(scale=1 + k):
            pyro.sample("y", dist.Normal(SEEN.new_zeros(()), 1.0), obs=SEEN)


def shifted(center: bool) -> Callable:
    def model() -> None:
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Bernoulli(SEEN.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(3 * (k - k.mean()) if center else 3 * k, 1.0), obs=SEEN)

    return model


@pytest.mark.parametrize("estimator", ["enumerated", "auto"])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_masks_and_scales_by_outcome_are_summed(estimator, num_particles):
    pyro.clear_param_store()
    loss = MonteCarloELBO(num_particles, estimator=estimator)
    one, zero = dist.Normal(1.0, 1.0).log_prob(SEEN), dist.Normal(0.0, 1.0).log_prob(SEEN)
    kl = kl_divergence(dist.Bernoulli(CHANCES), dist.Bernoulli(SEEN.new_tensor(0.4)))
    exact = (CHANCES * one + (1 + CHANCES) * zero - kl).sum()
    assert loss.loss(seen_by_bit, bits_of()) == pytest.approx(-float(exact), rel=1e-12)
    assert type(loss.table[0].estimator).__name__ == "Enumerated"


def test_a_sum_that_was_right_for_one_model_is_looked_at_for_the_next():
    """The mean over the other elements' outcomes is not that over all of them at once: the bits are drawn then."""
    pyro.clear_param_store()
    loss, guide = MonteCarloELBO(1), bits_of()
    loss.loss(shifted(center=False), guide)
    assert type(loss.table[0].estimator).__name__ == "Enumerated"
    model = shifted(center=True)
    values = {loss.loss_and_grads(model, guide) for _ in range(30)}
    assert len(values) > 4 and type(loss.table[0].estimator).__name__ != "Enumerated"


def test_noise_that_is_no_site_proves_nothing():
    pyro.clear_param_store()
    loss = MonteCarloELBO(1, estimator="enumerated")
    dropped = bits_of(lambda p: p * torch.nn.functional.dropout(torch.ones_like(p), 0.5).clamp(0.5, 1.0))
    assert math.isfinite(loss.loss_and_grads(shifted(center=False), dropped))


def test_looking_for_sums_leaves_the_first_gradient_alone():
    """Buffers that the look restores belong to the graph of the draws before it."""
    pyro.clear_param_store()
    norm, x = torch.nn.BatchNorm1d(3).double(), torch.randn(4, 3, dtype=torch.float64)

    def guide() -> None:
        pyro.module("norm", norm)
        logits = norm(x).mean(0)
        with pyro.plate("data", 3):
            pyro.sample("k", dist.Bernoulli(logits=logits))

    def model() -> None:
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Bernoulli(SEEN.new_tensor(0.4)))
        pyro.sample("x", dist.Normal(k.sum(-1), 1.0), obs=SEEN[0])

    assert math.isfinite(MonteCarloELBO(1).loss_and_grads(model, guide))
