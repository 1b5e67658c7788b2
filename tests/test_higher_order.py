r"""Second derivatives of the surrogate, over all outcomes, are those of the exact ELBO."""

from __future__ import annotations

import pytest
import torch

from pyro_emvae import problems
from pyro_emvae._registry import create, entries
from pyro_emvae.particles import quiet
from pyro_emvae.testing import Replay
from pyro_emvae.testing.cubature import _product

RIGHT = [e.name for e in entries("estimator") if create("estimator", e.name).traits.higher_order]


def second_derivatives(value: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    rows = [
        torch.autograd.grad(g, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for part in first
        for g in part.flatten()
        if g.requires_grad
    ]
    return torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])


def mean_hessian(problem, estimator: str, num_particles: int, order: int = 2) -> torch.Tensor:
    replay = Replay(problem, estimator, num_particles)
    dims = replay.size()[1]
    rule = _product(dims, 0) if dims else (torch.zeros(1, 0), torch.ones(1, dtype=torch.float64))
    noise, weights = replay.outcomes(*rule)
    leaves, total = list(replay.leaves.values()), 0.0
    for i, weight in enumerate(weights):
        row = {name: rows[i] for name, rows in noise.items()}
        with quiet(seed=0, validate=False):
            evaluation = replay.evaluate(row, order=order)
        logs = [evaluation.particles.guide[name].log_prob.detach().sum() for name in replay.sizes]
        probability = weight * torch.stack(logs).sum().exp()
        total = total + probability * second_derivatives(evaluation.surrogate, leaves)
    return total


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("bernoulli", "score"),
        ("bernoulli", "leave_one_out"),
        ("bernoulli", "decaying_average"),
        ("categorical", "score"),
        ("mixed_two_level", "score"),
    ],
)
def test_hessian_over_all_outcomes(name, estimator):
    """One particle, or the least number; a bit upstream of a normal: one is scored, the other pathwise."""
    assert estimator in RIGHT
    problem, num_particles = getattr(problems, name)(), create("estimator", estimator).traits.min_particles
    leaves = problem.unconstrained()
    exact = second_derivatives(problem.elbo(problem.constrained(leaves)), list(leaves.values()))
    found = mean_hessian(problem, estimator, num_particles)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    first_order_only = mean_hessian(problem, estimator, num_particles, order=1)
    assert float((first_order_only - exact).abs().max()) > 1e-3  # the usual surrogate's are wrong
