"""One loss on several models, structure that changes, and factors of a guide."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_emvae import MonteCarloELBO, config_estimators, problems
from pyro_emvae._checks import EmvaeError, EstimatorError, ModelError
from pyro_emvae._registry import create, entries
from pyro_emvae.estimators import Rebar, Relax
from pyro_emvae.particles import vectorizable

# One loss, several models; structure that changes -----------------------------------------------------------------


def by_kind(family: Any) -> tuple[Any, Any]:
    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5) if family is dist.Bernoulli else dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        p = pyro.param(family.__name__, torch.tensor(0.2))
        pyro.sample("k", dist.Bernoulli(logits=p) if family is dist.Bernoulli else dist.Normal(p, 1.0))

    return model, guide


@pytest.mark.parametrize("num_particles", [1, 2])
def test_a_loss_that_moves_on_to_another_guide_chooses_anew(num_particles):
    loss = MonteCarloELBO(num_particles)
    loss.loss_and_grads(*by_kind(dist.Normal))
    loss.loss_and_grads(*by_kind(dist.Bernoulli))
    fresh = MonteCarloELBO(num_particles)
    fresh.loss_and_grads(*by_kind(dist.Bernoulli))
    assert loss.resolved == fresh.resolved
    pathwise = MonteCarloELBO(num_particles, estimator={"k": "pathwise"})
    pathwise.loss_and_grads(*by_kind(dist.Normal))
    with pytest.raises(EstimatorError, match="Bernoulli"):
        pathwise.loss_and_grads(*by_kind(dist.Bernoulli))


def late_model(late: bool) -> None:
    pyro.sample("a", dist.Bernoulli(0.5))
    if late:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def late_guide(late: bool) -> None:
    pyro.sample("a", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3))))
    if late:
        loc, scale = pyro.param("loc", torch.tensor(0.7)), pyro.param("scale", torch.tensor(0.5))
        pyro.sample("z", dist.Normal(loc, scale), infer={"estimator": "sticking_the_landing"})


def test_a_site_that_appears_later_has_its_paths_split():
    grads = []
    for first in (True, False):
        pyro.clear_param_store()
        loss = MonteCarloELBO()
        loss.loss(late_model, late_guide, first)
        late_guide(True)
        evaluation = loss.evaluate(late_model, late_guide, (True,), {})
        z, scale = evaluation.particles.guide["z"].value.detach(), pyro.param("scale").detach()
        (found,) = torch.autograd.grad(evaluation.surrogate, [pyro.param("scale").unconstrained()])
        noise = (z - 0.7) / scale  # log p - log q through the value alone
        grads.append(float(found) - float(noise * (-z + (1 - z) + noise / scale)))
    assert grads == pytest.approx([0.0, 0.0], abs=1e-5)


def test_a_site_that_stops_being_observed_is_checked_again():
    def model(y: Any = None) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Any = None) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    loss = MonteCarloELBO()
    loss.loss(model, guide, torch.tensor(1.0))
    with pytest.raises(ModelError, match="'y'"):
        loss.loss(model, guide)


def test_a_name_of_the_mapping_may_be_observed_in_some_calls():
    def model(x: Tensor, y: Any = None) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.5), obs=y)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x: Tensor, y: Any = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                pyro.sample("y", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    loss, x = MonteCarloELBO(2, estimator={"y": "leave_one_out"}), torch.tensor([0.1, 0.8])
    assert math.isfinite(loss.loss_and_grads(model, guide, x, torch.ones(2)))
    assert math.isfinite(loss.loss_and_grads(model, guide, x))


@pytest.mark.parametrize("num_particles", [1, 2])
def test_batch_dims_that_no_plate_declares_are_refused(num_particles):
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(3))))

    with pytest.raises(ModelError, match=r"'z'.*shape \(.*3,?\)"):
        MonteCarloELBO(num_particles, vectorize_particles=False).loss(model, guide)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_splitting_paths_runs_the_networks_once(num_particles):
    norm = torch.nn.BatchNorm1d(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(norm(x[:, None])[:, 0], 1.0))

    loss = MonteCarloELBO(num_particles, estimator="stl", vectorize_particles=False)
    pyro.set_rng_seed(0)
    values = [loss.loss_and_grads(model, guide, torch.tensor([0.1, 0.8, 2.0]))]
    assert int(norm.num_batches_tracked) == num_particles
    pyro.set_rng_seed(0)
    again = MonteCarloELBO(num_particles, vectorize_particles=False)
    assert values == [again.loss_and_grads(model, guide, torch.tensor([0.1, 0.8, 2.0]))]


# Factors in the guide -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["auto", "pyro", "score", "decaying_average"])
def test_a_factor_of_draws_that_are_no_sample_statement_is_a_score_term(estimator):
    """Exact: both outcomes, weighted by their probability."""
    probs = pyro.param("probs", torch.tensor(0.3, dtype=torch.float64))

    def model(k: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(1.0, dtype=torch.float64))

    def guide(k: Tensor) -> None:
        pyro.factor("log_q", dist.Bernoulli(pyro.param("probs")).log_prob(k), has_rsample=False)
        pyro.sample("k", dist.Delta(k))

    mean = torch.zeros(())
    loss = MonteCarloELBO(estimator=estimator)
    for outcome in (0.0, 1.0):
        evaluation = loss.evaluate(model, guide, (torch.tensor(outcome, dtype=torch.float64),), {}, {})
        (g,) = torch.autograd.grad(evaluation.surrogate, [probs])
        mean = mean + (probs if outcome else 1 - probs).detach() * g
    p = probs.detach()
    likelihood = [float(dist.Normal(k, 1.0).log_prob(torch.tensor(1.0))) for k in (0.0, 1.0)]
    exact = likelihood[1] - likelihood[0] - (p / (1 - p)).log()
    assert float(mean) == pytest.approx(float(exact), rel=1e-6)


# Vectorization --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("discrete", [True, False])
def test_models_that_mix_particles_are_found_whatever_is_drawn(discrete, scale):
    """Two equal or nearly equal draws would hide it."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5) if discrete else dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(3 * (z - z.mean()), 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(1 - 0.5 * scale) if discrete else dist.Normal(0.2, scale))

    for seed in range(10):
        pyro.set_rng_seed(seed)
        agrees, _, what = vectorizable(model, guide, (), {})
        assert not agrees and "'x'" in what


def test_annotations_in_bulk_need_a_mapping_or_a_function():
    with pytest.raises(EstimatorError, match="'score'"):
        config_estimators(lambda: None, "score")


COUNTED = [e.name for e in entries("estimator") if not e.traits.arguments]


@pytest.mark.parametrize("name", COUNTED)
def test_evaluations_are_counted_before_the_first_gradient(name):
    """None before anything is run; then what a gradient finds, and no generator moves for it."""
    estimator = create("estimator", name)
    for problem in (problems.normal_normal(), problems.bernoulli_vector(), problems.categorical()):
        pyro.clear_param_store()
        count = max(2, estimator.traits.min_particles)
        loss = MonteCarloELBO(count, problem.max_plate_nesting, estimator=estimator)
        assert loss.evaluations is None
        before = torch.get_rng_state()
        try:
            loss.prepare(problem.model, problem.guide, problem.args, {})
        except EmvaeError:
            continue
        counted, costs = loss.evaluations, [row.cost for row in loss.table]
        assert counted >= count and torch.equal(torch.get_rng_state(), before)
        loss.loss_and_grads(problem.model, problem.guide, *problem.args)
        assert (loss.evaluations, [row.cost for row in loss.table]) == (counted, costs)
        assert loss.fresh().evaluations is None
        return
    assert not {"elbo", "any"} & set(estimator.traits.objectives)  # it is made for several particles


def test_what_is_differentiated_twice_counts_twice():
    problem, found = problems.bernoulli_vector(), {}
    for estimator in (Rebar(), Rebar(lr=0.0), Relax(model=False)):
        loss = MonteCarloELBO(2, problem.max_plate_nesting, estimator=estimator)
        loss.prepare(problem.model, problem.guide, problem.args, {})
        found[str(estimator)] = (loss.evaluations, loss.table[0].cost)
    assert list(found.values()) == [(10, 10), (6, 6), (2, 2)]
