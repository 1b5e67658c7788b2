"""`compare_gradients` against a loop over Pyro's ``loss_and_grads``, at the same estimator and number of particles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_emvae as emvae

from .timing import Call, Case

REPLICATES = 1000
PARTICLES = 2


def replicates(ours: bool, estimator: str, vectorize: bool = True) -> Call:
    problem = emvae.problems.logistic_regression(dtype=torch.float32)
    normal = dist.Normal if estimator == "pathwise" else NonreparameterizedNormal

    def guide(x: Tensor, y: Tensor) -> None:
        loc, log_scale = (pyro.param(name, x.new_zeros(x.shape[1])) for name in ("loc", "log_scale"))
        pyro.sample("w", normal(loc, log_scale.exp()).to_event(1))

    if ours:
        return lambda: emvae.compare_gradients(
            problem.model,
            guide,
            *problem.args,
            estimators=[estimator],
            num_replicates=REPLICATES,
            num_particles=PARTICLES,
        )
    loss = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=vectorize, max_plate_nesting=1)
    return lambda: loop(loss, problem.model, guide, problem.args)


def loop(loss: Trace_ELBO, model: Callable, guide: Callable, args: tuple) -> Tensor:
    """Return the gradients of all replicates, one row each."""
    guide(*args)
    leaves = [pyro.param(name).unconstrained() for name in ("loc", "log_scale")]
    rows = []
    for _ in range(REPLICATES):
        loss.loss_and_grads(model, guide, *args)
        rows.append(torch.cat([leaf.grad for leaf in leaves]))
        pyro.infer.util.zero_grads(leaves)
    return torch.stack(rows)


WHAT = f"{REPLICATES:,} {{}} gradients of logistic regression against a loop over `Trace_ELBO`, {{}}"
CASES = (
    Case("compare_pathwise", WHAT.format("pathwise", "vectorized"), 1 / 30, partial(replicates, estimator="pathwise")),
    Case("compare_score", WHAT.format("score", "vectorized"), 1 / 30, partial(replicates, estimator="score")),
    Case(
        "compare_defaults",
        WHAT.format("pathwise", "particles one by one (Pyro's default)"),
        1 / 30,
        partial(replicates, estimator="pathwise", vectorize=False),
    ),
)
