r"""Every registered estimator through an amortized guide has the exact mean gradient; every E-step with every guide."""

from __future__ import annotations

import functools
import math

import guides_table as table
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import Entry, entries
from pyro_emvae.em import EM
from pyro_emvae.guides import AutoAmortized, AutoExact, AutoMeanField, AutoMixture, AutoSemiAmortized
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


# E-steps ----------------------------------------------------------------------------------------------------------


def columns(x):
    theta = pyro.param("theta", torch.zeros((), dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * torch.ones(3, dtype=x.dtype), 1.0).to_event(1), obs=x)


GUIDES = {
    "AutoAmortized": lambda: AutoAmortized(columns),
    "AutoSemiAmortized": lambda: AutoSemiAmortized(columns, num_refinements=1),
    "AutoMeanField": lambda: AutoMeanField(columns),
    "AutoMixture": lambda: AutoMixture([AutoMeanField(columns), AutoNormal(columns)]),
    "AutoExact": lambda: AutoExact(columns),
}
E_STEPS = [entry.name for entry in entries("step") if "E" in entry.traits.slots and entry.traits.needs_guide]
REFUSED = {
    ("sleep", "AutoMixture"): "site 'mixture_component' of the guide",
    **{(step, "AutoExact"): "a guide without parameters" for step in ("gradient", "sleep", "wake_sleep")},
    **{("natural_gradient", guide): f"got {guide}" for guide in GUIDES if guide != "AutoMeanField"},
}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("step", E_STEPS)
def test_every_e_step_takes_every_guide_or_says_why_not(step, guide):
    """Two iterations; theta stays in the E-step, and the guide in the M-step, is proven for each step elsewhere."""
    x = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)
    em = EM(columns, GUIDES[guide](), pyro.optim.Adam({"lr": 0.05}), e_step=step)
    if (step, guide) in REFUSED:
        with pytest.raises(EmvaeError, match=REFUSED[step, guide]):
            em.step(x)
        return
    em.step(x)
    before = pyro.param("theta").item()
    assert math.isfinite(em.step(x)) and pyro.param("theta").item() != before
