r"""`MonteCarloELBO` with every registered estimator, through an amortized guide: gradients have the exact mean."""

from __future__ import annotations

import functools

import guides_table as table
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_emvae._registry import Entry, entries
from pyro_emvae.guides import AutoAmortized, AutoMeanField
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.particles import vectorizable

SITES = {
    "normal": table.model_of(lambda: dist.Normal(table.at(0.0), 1.0)),
    "bernoulli": table.model_of(table.PRIORS["binary"]),
    "categorical": table.model_of(table.PRIORS["categorical"]),
    "one_hot": table.model_of(table.PRIORS["one_hot"]),
}


def families(entry: Entry) -> list[str]:
    """Return families whose sites an estimator serves, by its traits."""
    if entry.traits.draws == "relaxed":
        return ["one_hot"]
    if entry.traits.needs_rsample:
        return ["normal"]
    every = {"binary": ["bernoulli"], "categorical": ["categorical"], "discrete": ["bernoulli", "categorical"]}
    return every.get(entry.traits.support, ["normal", "categorical"])


CASES = [(entry, family) for entry in entries("estimator") for family in families(entry)]


@functools.cache
def prepared(family: str, two_draws: bool):
    """Return what depends on the family alone: contexts off their start, and the exact answers at them."""
    guide = AutoAmortized(SITES[family], table.encoder_of(SITES[family], family), family)
    guide(table.X)
    guide.leaves = table.spread_contexts(guide)
    return guide.leaves[0].detach().clone(), table.right(SITES[family], guide, two_draws).exact


@pytest.mark.parametrize(("entry", "family"), CASES, ids=[f"{entry.name}-{family}" for entry, family in CASES])
def test_gradients_have_the_exact_mean(entry, family):
    """In the second step, so that what an estimator has learned from the first one is at work; the value too."""
    two_draws = entry.traits.objectives == ("multi_sample",)
    contexts, exact = prepared(family, two_draws)
    pyro.clear_param_store()
    model, encoder = SITES[family], table.encoder_of(SITES[family], family)
    guide = AutoAmortized(model, encoder, family)
    encoder.table.data.copy_(contexts)
    few = two_draws or entry.traits.draws == "weighted"  # different values, of which there are three
    objective, count = "iwae" if two_draws else "elbo", 2 if few else table.PARTICLES
    loss = MonteCarloELBO(count, estimator=entry.name, objective=objective, **table.HOW)
    loss.loss_and_grads(model, guide, table.X)
    guide.zero_grad()
    pyro.param("shift").unconstrained().grad = None
    answer = table.Right(exact, (encoder.table,))
    said = table.measure(loss, model, guide, answer)
    assert said == "pass" or (not entry.traits.unbiased and said in table.BIASED), said


def test_a_constrained_latent_of_many_data_vectorizes_whatever_the_draws():
    """A point mass that is computed anew differs by rounding from the one replayed, and would have the density 0."""
    model, x = table.model_of(table.PRIORS["unit_interval"]), table.X[:200]
    for seed in range(20):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoMeanField(model)
        guide(x)
        guide.contexts.z.data += 0.3 * torch.randn(2, 2, dtype=x.dtype).repeat(100, 1)
        assert vectorizable(model, guide, (x,), {})[0], f"seed {seed}"
