r"""Second derivatives of the surrogate, over all outcomes, are those of the exact objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_emvae import problems
from pyro_emvae._registry import create, entries
from pyro_emvae.particles import quiet
from pyro_emvae.testing import Replay
from pyro_emvae.testing.estimators import objective_for
from pyro_emvae.testing.replay import Expectation, fitting_sites

RIGHT = [e.name for e in entries("estimator") if create("estimator", e.name).traits.higher_order]
NODES = 5  # per coordinate of the noise: exact up to degree 9, and f times two derivatives of log q has degree 6


def second_derivatives(value: Tensor, leaves: list[Tensor]) -> Tensor:
    first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    rows = [
        torch.autograd.grad(g, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        if g.requires_grad
        else [torch.zeros_like(leaf) for leaf in leaves]
        for part in first
        for g in part.flatten()
    ]
    return torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])


def outcomes(replay: Replay) -> tuple[list[dict[str, Tensor]], Tensor]:
    """All finite outcomes and the nodes of the noise, row by row, and their weights."""
    dims, (x, w) = replay.size()[1], map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(NODES))
    rule = torch.zeros(1, 0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    if dims:
        grid = [torch.cartesian_prod(*[t] * dims).reshape(-1, dims) for t in (x, w / w.sum())]
        rule = grid[0], grid[1].prod(-1)
    noise, weights = replay.outcomes(*rule)
    return [{name: rows[i] for name, rows in noise.items()} for i in range(len(weights))], weights


def mean_hessian(replay: Replay, order: int = 2) -> Tensor:
    leaves, total = list(replay.leaves.values()), 0.0
    for row, weight in zip(*outcomes(replay), strict=True):
        with quiet(seed=0, validate=False):
            evaluation = replay.evaluate(row, order=order)
        logs = [replay._log_probability(name, evaluation.particles).detach() for name in replay.sizes]
        probability = weight * (torch.stack(logs).sum().exp() if logs else 1.0)
        total = total + probability * second_derivatives(evaluation.surrogate, leaves)
    return total


def exact_hessian(problem, num_particles: int, objective) -> Tensor:
    """Of the ELBO in closed form; else of the mean objective over all outcomes, whose weights are differentiated."""
    if objective == "elbo":
        leaves = problem.unconstrained()
        return second_derivatives(problem.elbo(problem.constrained(leaves)), list(leaves.values()))
    mean = Expectation(problem, num_particles, objective)
    with quiet(seed=0, validate=False):
        total = sum(
            weight * mean._at(tuple(row[n] for n in (*mean.noise, *mean.plates)))[0].surrogate
            for row, weight in zip(*outcomes(mean), strict=True)
        )
    return second_derivatives(total, list(mean.leaves.values()))


def later(replay: Replay) -> dict:
    """The state after three steps, at random draws: a baseline that is not zero."""
    state = replay.state
    for step in range(3):
        with quiet(seed=step, validate=False):
            state = replay.evaluate({}, state).state
    return state


@pytest.mark.parametrize("estimator", RIGHT)
def test_hessian_over_all_outcomes(estimator):
    """Of every estimator that claims it, at a bit and a normal number downstream; of bounds at three bits.

    What has a state has one of earlier steps.
    """
    part = create("estimator", estimator)
    objective, count = objective_for(part), part.traits.min_particles
    problem = problems.mixed_two_level() if objective == "elbo" else problems.bernoulli()
    sites = fitting_sites(problem, part, count, objective)
    rows = {**({"k": "score", "z": "pathwise"} if objective == "elbo" else {}), **dict.fromkeys(sites, part)}
    replay = Replay(problem, rows, count, later(Replay(problem, rows, count, objective=objective)), objective)
    assert part in replay.loss.resolved.values()
    exact = exact_hessian(problem, count, objective)
    assert float(exact.abs().max()) > 0.1
    torch.testing.assert_close(mean_hessian(replay), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["score", "leave_one_out", "decaying_average", "vimco"])
def test_the_usual_surrogate_has_other_second_derivatives(estimator):
    """So that the test above can fail: those of `compose`, whose first derivatives are the same."""
    part, problem = create("estimator", estimator), problems.bernoulli()
    objective, count = objective_for(part), part.traits.min_particles
    replay, exact = Replay(problem, part, count, objective=objective), exact_hessian(problem, count, objective)
    torch.testing.assert_close(mean_hessian(replay), exact, rtol=0, atol=1e-9)
    assert float((mean_hessian(replay, order=1) - exact).abs().max()) > 1e-3
