r"""`AutoMCMC`: the draws of a chain behind the guide interface."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_emvae._checks import DataError, EmvaeError, ModelError, NonFiniteError
from pyro_emvae.diagnostics import to_arviz
from pyro_emvae.evidence import log_evidence
from pyro_emvae.guides import AutoExact, AutoMCMC
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.testing import assert_mean

X = torch.tensor([0.7, -1.2, 2.1], dtype=torch.float64)


def model(x):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.3, dtype=x.dtype), 1.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.9))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def with_discrete(x):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.3, dtype=x.dtype), 1.3))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
        pyro.sample("x", dist.Normal(mu + 2 * k, 0.6), obs=x)


def regression(x, y=None):
    """A slope and no latent per datum, so that new inputs can follow."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, 0.3), obs=y)


def small(model=model, sampler="nuts", **options):
    return AutoMCMC(model, sampler, **{"num_samples": 20, "num_warmup": 10} | options)


def test_draws_are_those_of_the_posterior():
    guide = AutoMCMC(model, num_samples=600, num_warmup=50).run(X)
    exact = AutoExact(model).posterior(X)
    for name in ("mu", "z"):
        level = exact.marginal(name).cdf(guide.draws[name][0, ::2])
        assert_mean(level, 0.5, detect=0.2, what=name)
        assert_mean((level - 0.5).abs(), 0.25, detect=0.1, what=f"the spread of {name}")
    assert all(float(found["r_hat"].max()) < 1.05 for found in guide.diagnostics().values())


def test_a_draw_is_one_joint_draw_of_the_chain():
    guide = small()
    for _ in range(5):
        drawn = guide(X)
        place = (guide.draws["mu"][0] == drawn["mu"]).nonzero()[0, 0]
        assert torch.equal(guide.draws["z"][0, place], drawn["z"])
    together = Predictive(model, guide=guide, num_samples=7, parallel=True)(X)
    for mu, z in zip(together["mu"].flatten(), together["z"].reshape(7, 3), strict=True):
        assert torch.equal(guide.draws["z"][0, (guide.draws["mu"][0] == mu).nonzero()[0, 0]], z)


def test_predictive_takes_new_inputs():
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    guide = AutoMCMC(regression, num_samples=100, num_warmup=50).run(x, 2 * x)
    new = torch.tensor([3.0, -3.0], dtype=torch.float64)
    found = Predictive(regression, guide=guide, num_samples=50)(new)["y"]
    assert found.shape == (50, 2) and (found.mean(0) - 2 * new).abs().max() < 0.6


def test_to_arviz_writes_the_chains_in_order():
    guide = small(num_chains=2)
    data = to_arviz(model, guide, X, num_samples=7, seed=0)
    for name in ("mu", "z"):
        assert (data["posterior"][name].values == guide.draws[name].numpy()).all()
    assert data["posterior"]["z"].dims == ("chain", "draw", "data")
    lp = data["sample_stats"]["lp"].values
    values = {name: value[1, 4] for name, value in guide.draws.items()}
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(X)
    assert math.isclose(lp[1, 4], float(trace.log_prob_sum()))
    assert data["posterior"].attrs["num_samples"] == 40
    again = to_arviz(model, guide, X)
    assert (again["posterior"]["mu"].values == data["posterior"]["mu"].values).all()


def test_discrete_latents_are_drawn_given_the_others():
    guide = small(with_discrete, num_samples=60)
    guide(X)
    assert guide.draws["k"].shape == (1, 60, 3) and list(guide.draws) == ["mu", "k"]
    mu = guide.draws["mu"][0]
    expected = torch.stack(
        [AutoExact(poutine.condition(with_discrete, data={"mu": m})).posterior(X).marginal("k").probs for m in mu]
    )
    assert_mean((guide.draws["k"][0] - expected).mean(-1), 0.0, detect=0.3, what="k less its probability")


@pytest.mark.parametrize("kind", ["hmc", "kernel", "mcmc", "mcmc that has run"])
def test_samplers(kind):
    sampler = kind
    if kind == "kernel":
        sampler = HMC(model, step_size=0.3, num_steps=3)
    if kind.startswith("mcmc"):
        sampler = MCMC(NUTS(model), 20, 5, disable_progbar=True)
        if kind != "mcmc":
            sampler.run(X)
            kept = sampler.get_samples()["mu"].clone()
    guide = small(sampler=sampler)
    assert guide(X)["z"].shape == (3,) and guide.draws["mu"].shape == (1, 20)
    if kind == "mcmc that has run":
        assert torch.equal(guide.draws["mu"][0], kept)


def test_no_density():
    guide = small()
    guide(X)
    with pytest.raises(NonFiniteError, match="nan"):
        MonteCarloELBO().loss_and_grads(model, guide, X)
    estimate = log_evidence(model, guide, X, num_particles=50)
    assert math.isclose(estimate.value, AutoExact(model).posterior(X).log_evidence, rel_tol=1e-6)


def test_median_and_quantiles():
    guide = small()
    found = guide.quantiles([0.05, 0.5, 1.0], X)["z"]
    ordered = guide.draws["z"][0].sort(0).values
    assert torch.equal(found, ordered[[0, 9, 19]]) and torch.equal(guide.median(X)["z"], ordered[9])


def test_in_a_list_of_guides():
    def halves(x):
        model(x)
        pyro.sample("w", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 1.0))

    guide = AutoGuideList(halves)
    guide.append(small(poutine.block(halves, hide=["w"])))
    guide.append(AutoNormal(poutine.block(halves, hide=["mu", "z"])))
    assert set(guide(X)) == {"mu", "z", "w"}


def test_copies_and_state_dict():
    guide = small()
    guide(X)
    loaded, other = pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    fresh = small()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (loaded, other, fresh):
        assert torch.equal(twin.draws["z"], guide.draws["z"]) and twin(X)["z"].shape == (3,)
        assert torch.equal(twin.median(X)["z"], guide.median(X)["z"])
    assert X.numpy().tobytes() not in pickle.dumps(guide)


def test_run_takes_other_data():
    guide = small()
    guide(X)
    before = guide.draws["mu"]
    assert guide.run(X[:2]) is guide and guide(X[:2])["z"].shape == (2,)
    assert not torch.equal(before, guide.draws["mu"])


# Errors -----------------------------------------------------------------------------------------------------------


def test_data_of_another_size():
    guide = small()
    guide(X)
    with pytest.raises(ModelError, match=r"site 'z': got a value of shape \(2,\).*\(3,\).*guide\.run"):
        guide(X[:2])
    assert guide(X)["z"].shape == (3,)


@pytest.mark.parametrize("sampler", ["gibbs", 3, NUTS])
def test_sampler_is_none(sampler):
    with pytest.raises(EmvaeError, match=r"`AutoMCMC` cannot use its sampler: got"):
        AutoMCMC(model, sampler)


def test_minibatch():
    def batched(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ModelError, match=r"site 'z': got 2 of 3 data in plate 'data'"):
        small(batched)(X)


def test_draws_that_lack_a_latent():
    mcmc = MCMC(NUTS(poutine.condition(model, data={"mu": torch.tensor(0.0).double()})), 5, 2, disable_progbar=True)
    with pytest.raises(ModelError, match=r"draws of 'mu': got draws of \['z'\] for latents \['mu', 'z'\]"):
        small(sampler=mcmc)(X)


def test_part_without_data():
    guide = AutoGuideList(model)
    guide.append(small(poutine.block(model, expose=["mu"])))
    with pytest.raises(ModelError, match=r"`AutoMCMC` .* got a part without observed sites"):
        guide(X)


def test_empty_data():
    with pytest.raises(DataError, match="empty data"):
        small()(X[:0])
