r"""`AutoSemiAmortized`: refinement against the exact optimum of each datum, and the gap that it measures."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

import pyro_emvae as emvae
from pyro_emvae._checks import BlockError, EmvaeError, ModelError, NonFiniteError, RecordingError
from pyro_emvae.guides import AutoSemiAmortized, _refine
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.particles import vectorizable
from pyro_emvae.testing import assert_mean, check_guide

WEIGHT = torch.tensor([[1.4, -0.5], [0.3, 1.1], [-0.9, 0.6]], dtype=torch.float64)
SCALE = 0.5
DATA = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5


def factor(x, index=None, size=None):
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.to(x).T, SCALE).to_event(1), obs=x)


def exact(x):
    """Return the log evidence per datum, and the gap of the best independent normals, which is the same for all."""
    covariance = WEIGHT @ WEIGHT.T + SCALE**2 * torch.eye(3, dtype=x.dtype)
    evidence = dist.MultivariateNormal(torch.zeros(3, dtype=x.dtype), covariance).log_prob(x)
    precision = torch.eye(2, dtype=x.dtype) + WEIGHT.T @ WEIGHT / SCALE**2
    return evidence, 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


def elbo(guide, x):
    """The exact ELBO per datum of independent normals."""
    precision = torch.eye(2, dtype=x.dtype) + WEIGHT.T @ WEIGHT / SCALE**2
    mean = torch.linalg.solve(precision, WEIGHT.T @ x.T / SCALE**2).T
    q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist
    off, variance = q.mean - mean, q.variance
    kl = 0.5 * ((off @ precision * off).sum(-1) + (precision.diagonal() * variance).sum(-1) - 2)
    kl = kl - 0.5 * (torch.logdet(precision) + variance.log().sum(-1))
    return (exact(x)[0] - kl).detach()


def encoder(columns=4, rows=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(rows, 8), nn.Tanh(), nn.Linear(8, columns)).double()


def test_refinement_reaches_the_best_member_of_the_family_for_each_datum():
    guide = AutoSemiAmortized(factor, encoder(), num_refinements=150, num_particles=256)
    evidence, approximation = exact(DATA)
    gap = evidence - elbo(guide, DATA)
    assert (gap > approximation - 1e-9).all() and (gap < approximation + 0.02).all()
    guide.num_refinements = 0
    assert (evidence - elbo(guide, DATA) > approximation + 1.0).any(), "the encoder alone is far from it"


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("num_refinements", [1, 5, 20])
def test_never_below_the_amortized_guide(num_refinements, trained):
    """In the mean over data, by exact ELBOs: far from the optimum, and at the encoder's own."""
    net = encoder() if not trained else nn.Linear(3, 4).double()
    guide = AutoSemiAmortized(factor, net, num_refinements=num_refinements)
    if trained:
        precision = torch.eye(2).double() + WEIGHT.T @ WEIGHT / SCALE**2
        scale = precision.diagonal() ** -0.5
        with torch.no_grad():
            net.weight[:2], net.weight[2:] = torch.linalg.solve(precision, WEIGHT.T / SCALE**2), 0.0
            net.bias[:2], net.bias[2:] = 0.0, scale.expm1().log() - math.log(math.expm1(1.0))
    x = DATA.repeat(10, 1)
    gain = elbo(guide, x) - elbo(guide.amortized, x)
    assert gain.mean() > (0.05 if not trained else -1e-3)


def test_gap_decomposition_equals_brute_force():
    """total = approximation + amortization, each against its closed form."""
    guide = AutoSemiAmortized(factor, encoder(), num_refinements=60, num_particles=128)
    evidence, approximation = exact(DATA)
    total = (evidence - elbo(guide.amortized, DATA)).sum().item()
    gap = emvae.elbo_gap(factor, guide, DATA, num_particles=10_000, seed=0)
    assert gap.total == pytest.approx(gap.approximation + gap.amortization, abs=1e-9)
    assert abs(gap.approximation - 8 * approximation) < 0.3
    assert abs(gap.total - total) < 5 * gap.standard_error + 0.3
    assert abs(gap.amortization - (total - 8 * approximation)) < 5 * gap.elbo.standard_error + 0.3
    assert "approximation" in repr(gap)


def test_the_check_of_the_mean_finds_steps_that_are_always_kept(monkeypatch):
    monkeypatch.setattr(_refine, "_is_better", lambda gains: torch.ones_like(gains[0], dtype=torch.bool))
    with pytest.raises(AssertionError):
        test_never_below_the_amortized_guide(5, True)


def test_each_datum_reaches_its_brute_force_optimum_on_a_logistic_model():
    """One latent, so that the ELBO of each datum and its evidence are quadratures; its optimum by L-BFGS."""
    slope = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).to(x), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1) * slope).to_event(1), obs=x)

    def log_likelihood(z):
        return dist.Bernoulli(logits=z.unsqueeze(-1) * slope).log_prob(x.unsqueeze(1)).sum(-1)

    def elbo(loc, scale):
        z = loc.unsqueeze(-1) + scale.unsqueeze(-1) * nodes
        kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
        return (log_likelihood(z) * weights).sum(-1) - kl

    free = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -elbo(free[0], free[1].exp()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = elbo(free[0], free[1].exp()).detach()
    guide = AutoSemiAmortized(model, encoder(2), num_refinements=60, num_particles=256)
    q = [poutine.trace(g).get_trace(x).nodes["z"]["fn"] for g in (guide, guide.amortized)]
    refined, amortized = (elbo(fn.mean, fn.stddev).detach() for fn in q)
    assert (refined <= best + 1e-6).all() and (refined > best - 0.01).all()
    evidence = torch.logsumexp(log_likelihood(nodes.expand(8, 60)) + weights.log(), -1)
    gap = emvae.elbo_gap(model, guide, x, num_particles=10_000, seed=0)
    for got, expected in [
        (gap.total, evidence - amortized),
        (gap.approximation, evidence - best),
        (gap.amortization, best - amortized),
    ]:
        assert abs(got - expected.sum().item()) < 0.1 + 5 * gap.standard_error


@pytest.mark.parametrize("source", ["given", "drawn"])
def test_minibatches(source):
    """The steps see the rows that the guide sees, and so does the answer."""
    seen = []

    def model(x, index=None, size=None):
        with pyro.plate("data", 8, subsample=index, subsample_size=size) as rows:
            seen.append(rows)
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            obs = x if len(x) < 8 else x[rows]
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, SCALE).to_event(1), obs=obs)

    guide = AutoSemiAmortized(model, encoder(), num_refinements=60, num_particles=64)
    rows = torch.tensor([6, 2])
    args = (DATA[rows], rows) if source == "given" else (DATA, None, 2)
    guide(*args)
    seen.clear()
    tr = poutine.trace(guide).get_trace(*args)
    rows = tr.nodes["data"]["value"] if source == "drawn" else rows
    assert len(seen) > 60 and all(torch.equal(torch.as_tensor(r), rows) for r in seen)
    fn = tr.nodes["z"]["fn"].base_dist
    precision = torch.eye(2).double() + WEIGHT.T @ WEIGHT / SCALE**2
    mean = torch.linalg.solve(precision, WEIGHT.T @ DATA.T / SCALE**2).T[rows]
    assert torch.allclose(fn.mean, mean, atol=0.15)


def test_gradient_of_the_encoder_is_that_by_the_refined_context():
    net = nn.Linear(3, 4).double()
    guide = AutoSemiAmortized(factor, net, num_refinements=3)
    pyro.set_rng_seed(1)
    q = poutine.trace(guide).get_trace(DATA).nodes["z"]["fn"].base_dist
    context = torch.cat([q.loc, q.scale], -1)
    (bias,) = torch.autograd.grad(context.sum(), net.bias, retain_graph=True)
    assert torch.allclose(bias[:2], torch.full((2,), 8.0).double()), "the steps are constants"
    assert not torch.allclose(q.loc, net(DATA)[:, :2])


def test_differentiable_steps_equal_finite_differences():
    """By the encoder's weights, through two steps: the draws are the same in every call."""
    net = nn.Linear(3, 4).double()
    guide = AutoSemiAmortized(factor, net, num_refinements=2, differentiable=True)

    def value():
        q = poutine.trace(guide).get_trace(DATA).nodes["z"]["fn"].base_dist
        return (q.loc**2 + q.scale).sum()

    value()
    (slope,) = torch.autograd.grad(value(), net.bias)
    found = []
    for i in range(4):
        pair = []
        for sign in (1, -1):
            with torch.no_grad():
                net.bias[i] += sign * 1e-6
            pair.append(value().item())
            with torch.no_grad():
                net.bias[i] -= sign * 1e-6
        found.append((pair[0] - pair[1]) / 2e-6)
    assert torch.allclose(slope, torch.tensor(found).double(), rtol=1e-4, atol=1e-4)
    guide.differentiable = False
    assert not torch.allclose(torch.autograd.grad(value(), net.bias)[0], slope, rtol=1e-2)


def test_same_distribution_in_every_call_and_generator_untouched():
    guide = AutoSemiAmortized(factor, encoder(), num_refinements=4)
    one = poutine.trace(guide).get_trace(DATA).nodes["z"]["fn"].mean
    state = torch.get_rng_state()
    two = poutine.trace(guide).get_trace(DATA).nodes["z"]["fn"].mean
    guide.median(DATA)
    assert torch.equal(one, two)
    torch.set_rng_state(state)
    expected = torch.randn(8, 2, dtype=torch.float64)
    torch.set_rng_state(state)
    q = poutine.trace(guide).get_trace(DATA).nodes["z"]
    assert torch.allclose(q["value"], q["fn"].mean + q["fn"].stddev * expected)
    assert vectorizable(factor, guide, (DATA,), {}) == (True, 1, "")


def test_no_refinement_is_the_amortized_guide():
    net = encoder()
    guide = AutoSemiAmortized(factor, net, num_refinements=0)
    assert torch.equal(poutine.trace(guide).get_trace(DATA).nodes["z"]["fn"].mean, net(DATA)[:, :2])


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, MonteCarloELBO])
@pytest.mark.parametrize("how", [(1, False), (3, True)])
def test_training(loss, how):
    net, decoder = encoder(), nn.Linear(2, 3).double()
    norm = nn.BatchNorm1d(3).double()

    def model(x, index=None, size=None):
        pyro.module("decoder", decoder)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            loc = decoder(z)
            loc = norm(loc) if how[0] == 1 else loc
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    guide = AutoSemiAmortized(model, net, num_refinements=2, num_particles=2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss(how[0], vectorize_particles=how[1]))
    svi.step(DATA)
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    tracked = int(norm.num_batches_tracked)
    assert all(math.isfinite(svi.step(DATA[:2], torch.tensor([5, 1]), 8)) for _ in range(2))
    assert all(not torch.equal(p, before[n]) for n, p in pyro.get_param_store().items())
    assert set(before) == set(pyro.get_param_store())
    if how[0] == 1:
        assert int(norm.num_batches_tracked) == tracked + 2, "steps of the guide move no buffer"
    assert all(p.grad is None or not p.grad.any() for p in decoder.parameters())


def hybrid(x):
    """A global latent, a discrete one, and a positive one whose family draws unconstrained values."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3).double()))
        z = pyro.sample("z", dist.Normal(mu + k, 1.0))
        s = pyro.sample("s", dist.Gamma(torch.tensor(3.0).double(), 3.0))
        pyro.sample("x", dist.Normal(z, 0.5 + s), obs=x[:, 0])


@pytest.mark.parametrize("dependence", ["none", "structured"])
def test_globals_discrete_and_constrained_sites(dependence):
    guide = AutoSemiAmortized(hybrid, dependence=dependence, num_refinements=3)
    guide(DATA)
    assert set(guide(DATA)) == {"mu", "k", "z", "s"} == set(guide.median(DATA))
    assert vectorizable(hybrid, guide, (DATA,), {}) == (True, 1, "")
    pair = []
    for g in (guide.amortized, guide):
        pyro.set_rng_seed(0)
        pair.append(MonteCarloELBO(8, vectorize_particles=True).loss(hybrid, g, DATA))
    assert pair[1] < pair[0]
    draws = Predictive(guide, num_samples=3, parallel=True)(DATA)
    assert draws["z"].shape == (3, 8) and set(guide.quantiles([0.1, 0.9], DATA)) == {"mu", "k", "z", "s"}


def test_nested_plates():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(torch.tensor(0.0).double(), 1.0))
            with pyro.plate("inner", 3, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 0.2), obs=x)

    guide = AutoSemiAmortized(model, num_refinements=10)
    guide(DATA)
    losses = [MonteCarloELBO(300, vectorize_particles=True).loss(model, g, DATA) for g in (guide.amortized, guide)]
    assert losses[1] < losses[0] - 1.0 and guide(DATA)["b"].shape == (8, 3)


def test_em_and_joint_steps():
    """The steps are constants to EM; if they are not, the guide depends on theta, which only joint SVI may."""

    def model(x):
        weight = pyro.param("weight", WEIGHT.clone)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, SCALE).to_event(1), obs=x)

    guide = AutoSemiAmortized(model, encoder(), num_refinements=2)
    em = emvae.EM(model, guide, pyro.optim.Adam({"lr": 0.01}))
    assert all(math.isfinite(em.step(DATA)) for _ in range(2))
    guide.differentiable = True
    with pytest.raises(BlockError, match=r"both log q and log p: \['weight'\]"):
        emvae.EM(model, guide, pyro.optim.Adam({"lr": 0.01})).step(DATA)
    assert math.isfinite(emvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.01})).step(DATA))


def test_check_guide():
    check_guide(lambda model: AutoSemiAmortized(model, encoder()), factor, (DATA[:2],))


def test_copies():
    with pyro.settings.context(module_local_params=True):
        guide = AutoSemiAmortized(factor, encoder(), num_refinements=2)
        before = guide.median(DATA)["z"]
        other = copy.deepcopy(guide)
        assert torch.equal(other.median(DATA)["z"], before) and other.amortized.encoder is not guide.amortized.encoder
        assert torch.equal(other.amortized(DATA[:2])["z"].new_zeros(2, 2), torch.zeros(2, 2).double())
        loaded = pickle.loads(pickle.dumps(guide))
        assert torch.equal(guide.median(DATA)["z"], before), "the pickled guide goes on working"
        with pytest.raises(ModelError, match="unpickled, without its model"):
            loaded(DATA)
        loaded.num_refinements = 0
        assert loaded(DATA[:2])["z"].shape == (2, 2)
        other.load_state_dict({n: p + 1 for n, p in guide.state_dict().items()})
        assert not torch.equal(other.median(DATA)["z"], before)


def test_in_a_list():
    guide = AutoGuideList(hybrid)
    guide.append(AutoNormal(poutine.block(hybrid, hide=["k", "z", "s"])))
    guide.append(AutoSemiAmortized(poutine.block(hybrid, hide=["mu"]), num_refinements=2))
    svi = SVI(hybrid, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    assert all(math.isfinite(svi.step(DATA)) for _ in range(2)) and set(guide(DATA)) == {"mu", "k", "z", "s"}


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_refinements": -1}, r"use num_refinements: got -1"),
        ({"num_refinements": 1.5}, r"use num_refinements: got 1.5"),
        ({"num_particles": 0}, r"use num_particles: got 0"),
        ({"step_size": 0.0}, r"use step_size: got 0.0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(EmvaeError, match=match):
        AutoSemiAmortized(factor, encoder(), **options)


def test_models_that_cannot_be_refined():
    def discrete(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k.double(), 1.0), obs=x[:, 0])

    def enumerated(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x[:, 0])

    def hopeless(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
            pyro.factor("never", torch.full_like(z, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    for model, error, match in [
        (discrete, ModelError, r"sites \['k'\] without a reparameterised sampler"),
        (enumerated, ModelError, r"site 'k', which the guide does not draw"),
        (hopeless, NonFiniteError, r"finite for no datum"),
    ]:
        pyro.clear_param_store()
        with pytest.raises(error, match=match):
            AutoSemiAmortized(model)(DATA)


def test_a_recording_is_refused():
    guide = AutoSemiAmortized(factor, encoder(), num_refinements=2)
    svi = emvae.SVI(factor, guide, pyro.optim.Adam({"lr": 0.01}), backend="graph")
    with pytest.raises(RecordingError, match=r"AutoSemiAmortized. cannot be recorded: got num_refinements=2"):
        for _ in range(3):
            svi.step(DATA)
    guide.num_refinements = 0
    assert math.isfinite(sum(svi.step(DATA + 1) for _ in range(3)))


def test_paired_mean_of_the_elbo():
    """Through the one door for statistics: on a model without a closed form, on common draws."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=3 * z @ WEIGHT.T).to_event(1), obs=(x > 0).double())

    guide = AutoSemiAmortized(model, encoder(), num_refinements=5)
    guide(DATA)
    gains = []
    for g in (guide, guide.amortized):
        pyro.set_rng_seed(0)
        gains.append(MonteCarloELBO(10_000, vectorize_particles=True).particles(model, g, (DATA,), {}))
    difference = (gains[0].log_p - gains[0].log_q) - (gains[1].log_p - gains[1].log_q)
    mean = difference.mean().item()
    assert mean > 1.0
    assert_mean(difference.detach(), mean, detect=1.0)
