r"""ELBO, log evidence and gap: against closed forms, and against the same draws weighed by hand."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from statistics import NormalDist

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_sample
from torch import nn

from pyro_emvae import evidence, problems
from pyro_emvae._checks import DataError, EmvaeError, ModelError, NonFiniteError
from pyro_emvae._registry import entries
from pyro_emvae.evidence import Estimate, EvidenceMethod, Importance, elbo, elbo_gap, log_evidence
from pyro_emvae.evidence.moments import Moments
from pyro_emvae.particles import hold_batch
from pyro_emvae.problems import Problem
from pyro_emvae.psis import psis
from pyro_emvae.testing import assert_mean

DOUBLE = torch.float64
PROBLEMS = {e.name: e.factory for e in entries("problem")}
BUILT = {name: factory() for name, factory in PROBLEMS.items()}
EXACT_GUIDE = [n for n, p in BUILT.items() if p.exact_guide is not None and not p.traits.subsampled]
WITH_EVIDENCE = [n for n, p in BUILT.items() if p.log_evidence is not None and not p.traits.subsampled]
SUBSAMPLED = [n for n, p in BUILT.items() if p.traits.subsampled]
FUNCTIONS = {"elbo": elbo, "log_evidence": log_evidence, "elbo_gap": elbo_gap}


def start(problem: Problem, params: dict | None = None, jitter: float = 0.0) -> None:
    """Put parameters into the store, moved by `jitter` times noise in unconstrained space."""
    for name, value in problem.unconstrained(params).items():
        noise = jitter * torch.randn_like(value) if name in problem.guide_params else 0.0
        moved = problem.constrained({name: (value + noise).detach()})[name]
        pyro.param(name, moved, constraint=problem.constraints[name])


# A local model whose draws the guide writes down, so that they can be weighed by hand ---------------------------------

X = torch.tensor([0.3, -1.2, 2.1, 0.8, -0.4, 1.5], dtype=DOUBLE)


class Local:
    """z_n ~ N(0.2, 1), x_n ~ N(z_n, 0.7); guide N(0.5 x_n + 0.1, 0.9), all scaled by `power`."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power
        self.draws: list[torch.Tensor] = []

    def plate(self, x, index=None):
        subsample = torch.arange(len(x)) if index is None else index
        return pyro.plate("data", len(x), subsample=subsample, dim=-1)

    def model(self, x, index=None):
        with poutine.scale(scale=self.power), self.plate(x, index) as i:
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.2), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x[i])

    def guide(self, x, index=None):
        with poutine.scale(scale=self.power), self.plate(x, index) as i:
            self.draws.append(pyro.sample("z", dist.Normal(0.5 * x[i] + 0.1, 0.9)))

    def log_weights(self, x, num_particles: int, index=None) -> torch.Tensor:
        """Return log p - log q of the last K draws, ``(K, data)``, without the plate's scale."""
        rows, taken = [], 0
        while taken < num_particles:
            rows.append(torch.atleast_2d(self.draws[-1 - len(rows)]))
            taken += len(rows[-1])
        z = torch.cat(rows[::-1])
        x = x if index is None else x[index]
        log_p = dist.Normal(x.new_tensor(0.2), 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(x)
        return self.power * (log_p - dist.Normal(0.5 * x + 0.1, 0.9).log_prob(z))

    @staticmethod
    def exact(x) -> torch.Tensor:
        return dist.Normal(x.new_tensor(0.2), math.sqrt(1 + 0.49)).log_prob(x)


def log_mean_exp(log_weights: torch.Tensor) -> torch.Tensor:
    return log_weights.logsumexp(0) - math.log(len(log_weights))


@pytest.mark.parametrize("vectorize", [None, False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 40])
def test_equals_the_same_draws_by_hand(chunk_size, vectorize):
    local = Local()
    how = {"num_particles": 40, "chunk_size": chunk_size, "vectorize_particles": vectorize, "seed": 3}
    found = log_evidence(local.model, local.guide, X, **how)
    lw = local.log_weights(X, 40)
    w = (lw - lw.amax(0)).exp()
    relative_variance = w.var(0) / w.mean(0) ** 2 / 40
    data = found.per_datum
    torch.testing.assert_close(data.value, log_mean_exp(lw), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(data.standard_error, relative_variance.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(data.ess, w.sum(0) ** 2 / w.square().sum(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(data.khat, psis(lw, dim=0).khat, rtol=1e-10, atol=0)
    assert found.value == pytest.approx(float(log_mean_exp(lw).sum()), rel=1e-12)
    assert found.standard_error == pytest.approx(float(relative_variance.sum().sqrt()), rel=1e-10)
    assert found.bias == pytest.approx(float(-relative_variance.sum() / 2), rel=1e-10)
    assert found.ess == float(data.ess.min()) and found.khat == float(data.khat.max())
    assert (data.plates, data.scale, data.constant) == (("data",), 1.0, 0.0)

    lower = elbo(local.model, local.guide, X, **how)
    assert torch.equal(local.log_weights(X, 40), lw), "elbo makes the same draws"
    assert lower.value == pytest.approx(float(lw.sum(1).mean()), rel=1e-12)
    assert lower.standard_error == pytest.approx(float(lw.sum(1).std() / math.sqrt(40)), rel=1e-10)
    torch.testing.assert_close(lower.per_datum.value, lw.mean(0), rtol=1e-12, atol=1e-12)

    gap = elbo_gap(local.model, local.guide, X, **how)
    influence = w / w.mean(0) - lw
    assert gap.total == pytest.approx(found.value - lower.value, rel=1e-10)
    assert (gap.elbo.value, gap.log_evidence.value) == (lower.value, found.value)
    torch.testing.assert_close(gap.per_datum.standard_error, (influence.var(0) / 40).sqrt(), rtol=1e-8, atol=0)
    assert gap.standard_error == pytest.approx(float((influence.var(0).sum() / 40).sqrt()), rel=1e-8)
    assert gap.standard_error < math.hypot(found.standard_error, lower.standard_error)
    assert bool((gap.per_datum.value >= 0).all()) and gap.approximation is gap.amortization is None


@pytest.mark.parametrize("size", [1, 2, 5])
def test_minibatches_average_to_all_data(size):
    """The plate's scale comes after the logarithm; inside, `RenyiELBO` overshoots the evidence."""
    local = Local()
    exact_guide = lambda x, index=None: _exact_guide(local, x, index)  # noqa: E731
    batches = [torch.tensor(b) for b in itertools.combinations(range(6), size)]
    of_exact, inside = [], []
    for batch in batches:
        estimate = log_evidence(local.model, exact_guide, X, batch, num_particles=4, seed=0)
        of_exact.append(estimate.value)
        found = log_evidence(local.model, local.guide, X, batch, num_particles=30, seed=1)
        lw = local.log_weights(X, 30, batch)
        assert found.value == pytest.approx(6 / size * float(log_mean_exp(lw).sum()), rel=1e-12)
        assert found.per_datum.scale == 6 / size and len(found.per_datum) == size
        inside.append(float(log_mean_exp(6 / size * lw).sum()))
        w = (lw - lw.amax(0)).exp()
        error = 6 / size * float((w.var(0) / w.mean(0) ** 2 / 30).sum().sqrt())
        assert found.standard_error == pytest.approx(error, rel=1e-10)
        gap = elbo_gap(local.model, local.guide, X, batch, num_particles=30, seed=1)
        error = 6 / size * float(((w / w.mean(0) - lw).var(0) / 30).sum().sqrt())
        assert gap.standard_error == pytest.approx(error, rel=1e-8)
        assert gap.total == pytest.approx(gap.log_evidence.value - gap.elbo.value, rel=1e-10)
        lower = elbo(local.model, local.guide, X, batch, num_particles=30, seed=1)
        assert lower.value == pytest.approx(6 / size * float(lw.mean(0).sum()), rel=1e-12)
        assert lower.value < found.value < inside[-1], "scale inside the logarithm is no bound"
    assert np.mean(of_exact) == pytest.approx(float(Local.exact(X).sum()), abs=1e-10)


def _exact_guide(local: Local, x, index):
    with local.plate(x, index) as i:
        precision = 1 + 1 / 0.49
        pyro.sample("z", dist.Normal((0.2 + x[i] / 0.49) / precision, precision**-0.5))


@pytest.mark.parametrize("num_particles", [1, 2])
def test_mean_below_the_evidence_is_the_enumerated_one(num_particles):
    """Mixture of two: E log mean_k w_k over all outcomes; 20,000 equal data are as many replicates."""
    prior, likelihood, guide = (torch.tensor(v, dtype=DOUBLE) for v in ([0.3, 0.7], [0.9, 0.2], [0.1, 0.9]))

    def model(n):
        with pyro.plate("data", n, subsample=torch.arange(n // 2), dim=-1):
            z = pyro.sample("z", dist.Categorical(prior))
            pyro.sample("x", dist.Bernoulli(likelihood[z]), obs=torch.tensor(1.0, dtype=DOUBLE))

    def proposal(n):
        with pyro.plate("data", n, subsample=torch.arange(n // 2), dim=-1):
            pyro.sample("z", dist.Categorical(guide))

    n = 40_000
    found = log_evidence(model, proposal, n, num_particles=num_particles, seed=0)
    weights = prior * likelihood / guide
    outcomes = [torch.tensor(o) for o in itertools.product(range(2), repeat=num_particles)]
    expected = sum(float(guide[o].prod() * weights[o].mean().log()) for o in outcomes)
    exact = math.log(float((prior * likelihood).sum()))
    assert_mean(found.per_datum.value, expected, detect=0.06)
    assert expected < exact - 0.04 and found.value / n < exact - 0.04
    assert found.value == pytest.approx(2 * float(found.per_datum.value.sum()), rel=1e-12)


def test_one_particle_is_the_elbo():
    for function in (elbo, log_evidence):
        local = Local()
        found = function(local.model, local.guide, X, num_particles=1, seed=5)
        assert found.value == pytest.approx(float(local.log_weights(X, 1).sum()), rel=1e-12)
        assert math.isnan(found.standard_error) and found.num_particles == 1
    assert elbo_gap(local.model, local.guide, X, num_particles=1, seed=5).total == pytest.approx(0.0, abs=1e-12)


def test_users_scale_stays_inside_the_weight():
    local = Local(power=0.4)
    batch = torch.tensor([4, 1, 2])
    found = log_evidence(local.model, local.guide, X, batch, num_particles=30, seed=1)
    expected = 2 * float(log_mean_exp(local.log_weights(X, 30, batch)).sum())
    assert found.value == pytest.approx(expected, rel=1e-12)


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT_GUIDE)
def test_exact_guide_has_no_error(name):
    problem = BUILT[name]
    start(problem, problem.exact_guide())
    gap = elbo_gap(problem.model, problem.guide, *problem.args, num_particles=50, seed=0)
    exact = float(problem.log_evidence())
    for estimate in (gap.elbo, gap.log_evidence):
        assert estimate.value == pytest.approx(exact, abs=1e-10)
        assert estimate.standard_error < 1e-10
    assert gap.total == pytest.approx(0.0, abs=1e-10) and gap.standard_error < 1e-10
    assert gap.log_evidence.ess == pytest.approx(50, abs=1e-8) and gap.log_evidence.khat == -math.inf


@pytest.mark.parametrize("name", EXACT_GUIDE)
def test_near_the_exact_guide(name):
    problem = BUILT[name]
    start(problem, problem.exact_guide(), jitter=0.05)
    gap = elbo_gap(problem.model, problem.guide, *problem.args, seed=0)
    evidence = gap.log_evidence
    assert abs(evidence.value - float(problem.log_evidence())) < 4 * evidence.standard_error < 0.2
    assert gap.elbo.value < evidence.value and evidence.ess > 1500
    assert (evidence.per_datum is not None) == problem.traits.local


@pytest.mark.parametrize("name", WITH_EVIDENCE)
def test_right_or_flagged(name):
    """From any guide, the estimate is within five standard errors of the truth, or k-hat says not to believe it."""
    problem = BUILT[name]
    start(problem)
    found = log_evidence(problem.model, problem.guide, *problem.args, seed=0)
    exact = float(problem.log_evidence())
    assert abs(found.value - exact) < 5 * found.standard_error + abs(found.bias) or found.khat > 0.7
    if problem.elbo is not None:
        lower = elbo(problem.model, problem.guide, *problem.args, seed=0)
        assert abs(lower.value - float(problem.elbo())) < 5 * lower.standard_error


@pytest.mark.parametrize("name", SUBSAMPLED)
def test_elbo_of_minibatches_averages_to_the_elbo(name):
    problem = BUILT[name]
    start(problem)
    found = []
    for batch in itertools.combinations(range(len(problem.args[0])), 2):
        with hold_batch({"data": torch.tensor(batch)}):
            found.append(elbo(problem.model, problem.guide, *problem.args, num_particles=4000, seed=len(found)))
    error = math.hypot(*(estimate.standard_error for estimate in found)) / len(found)
    assert abs(np.mean([estimate.value for estimate in found]) - float(problem.elbo())) < 5 * error < 1.0


def test_every_particle_and_chunk_sees_one_minibatch():
    seen = []

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), subsample_size=2, dim=-1) as i:
            seen.append(tuple(i.tolist()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo(model, guide, X, num_particles=10, chunk_size=3, seed=0)
    assert len(set(seen)) == 1
    elbo(model, guide, X, num_particles=4, vectorize_particles=False, seed=1)
    assert len(set(seen)) == 2


@pytest.mark.parametrize("name", SUBSAMPLED)
def test_global_latent_with_a_minibatch_is_refused(name):
    problem = BUILT[name]
    start(problem)
    for function in (log_evidence, elbo_gap):
        with pytest.raises(EmvaeError, match=r"plate 'data' while a latent site lies outside"):
            function(problem.model, problem.guide, *problem.args, num_particles=3)


def test_sequential_plate_with_a_minibatch_is_refused():
    def model(x):
        for i in pyro.plate("data", len(x), subsample_size=2):
            z = pyro.sample(f"z_{i}", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x), subsample_size=2):
            pyro.sample(f"z_{i}", dist.Normal(0.5 * x[i], 0.5**0.5))

    with pytest.raises(EmvaeError, match="subsampled plate 'data'"):
        log_evidence(model, guide, X, num_particles=3)
    assert math.isfinite(elbo(model, guide, X, num_particles=9, chunk_size=4).value)


def test_sequential_plate_of_all_data_has_a_joint_weight():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(0.5 * x[i], 0.5**0.5))

    found = log_evidence(model, guide, X, num_particles=3)
    assert found.value == pytest.approx(float(dist.Normal(0.0, 2**0.5).log_prob(X).sum()), abs=1e-6)
    assert found.per_datum is None


# Plates ---------------------------------------------------------------------------------------------------------------


def test_masked_data_do_not_count():
    problem = BUILT["masked"]
    x, valid, observed = problem.args
    start(problem)
    first = log_evidence(problem.model, problem.guide, x, valid, observed, num_particles=100, seed=0)
    hidden = torch.where(valid & observed, x, torch.where(valid, x, -77.0))
    second = log_evidence(problem.model, problem.guide, hidden, valid, observed, num_particles=100, seed=0)
    assert first.per_datum.plates == ("time", "series") and first.per_datum.value.shape == x.shape
    assert torch.equal(first.per_datum.value, second.per_datum.value)
    outside = first.per_datum.value[~valid]
    assert torch.equal(outside, torch.zeros_like(outside))
    assert torch.equal(first.per_datum.khat[~valid], torch.full_like(outside, -math.inf))


def test_nested_plates_share_the_outer_one():
    """A latent per group and one per datum in it: weights per group; only what all latents share is shared."""
    x = torch.randn(4, 3, dtype=DOUBLE)
    draws = []

    def model(x):
        with pyro.plate("group", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("item", 4, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x):
        with pyro.plate("group", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(x.mean(-2), 0.7))
            with pyro.plate("item", 4, dim=-2):
                draws.append((a, pyro.sample("b", dist.Normal(0.8 * x + 0.2 * a, 0.5))))

    found = log_evidence(model, guide, x, num_particles=50, seed=0)
    a, b = draws[-1]
    local = dist.Normal(a, 1.0).log_prob(b) + dist.Normal(b, 0.5).log_prob(x)
    local = local - dist.Normal(0.8 * x + 0.2 * a, 0.5).log_prob(b)
    lw = local.sum(-2, keepdim=True) + dist.Normal(0.0, 1.0).log_prob(a) - dist.Normal(x.mean(-2), 0.7).log_prob(a)
    assert found.per_datum.plates == ("group",)
    torch.testing.assert_close(found.per_datum.value, log_mean_exp(lw.squeeze(-2)), rtol=1e-7, atol=1e-7)

    with pytest.raises(EmvaeError, match="plate 'item' while not all latent sites have the plate"):
        sub = poutine.condition  # a minibatch of items inside each group
        log_evidence(_subsampled_items(sub), _subsampled_items(None), x, num_particles=3)


def _subsampled_items(condition):
    def program(x):
        with pyro.plate("group", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("item", 4, subsample_size=2, dim=-2) as i:
                b = pyro.sample("b", dist.Normal(a, 1.0))
                if condition is not None:
                    pyro.sample("x", dist.Normal(b, 0.5), obs=x[i])

    return program


def test_terms_without_latents_are_added():
    local = Local()

    def model(x):
        local.model(x)
        pyro.factor("penalty", torch.tensor(-3.25, dtype=DOUBLE))
        pyro.deterministic("twice", 2 * x)
        with pyro.plate("other", 5, subsample_size=2, dim=-1):
            pyro.sample("y", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0), obs=torch.tensor(1.0, dtype=DOUBLE))

    plain = log_evidence(local.model, local.guide, X, num_particles=30, seed=2)
    constant = -3.25 + 5 * float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0, dtype=DOUBLE)))
    local.draws.clear()
    found = log_evidence(model, local.guide, X, num_particles=30, seed=2)
    value = log_mean_exp(local.log_weights(X, 30))
    torch.testing.assert_close(found.per_datum.value, value)
    assert found.per_datum.constant == pytest.approx(constant, rel=1e-6)
    assert found.value == pytest.approx(float(value.sum()) + constant, rel=1e-6)
    assert plain.per_datum.constant == 0.0


def test_what_depends_on_all_latents_joins_the_weights():
    local = Local()

    def model(x, index=None):
        with local.plate(x, index) as i:
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.2), 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x[i])
        pyro.factor("sum", -(z.sum(-1, keepdim=True) ** 2))

    found = log_evidence(model, local.guide, X, num_particles=30, chunk_size=11, seed=2)
    draws = torch.cat(local.draws[-3:])
    lw = local.log_weights(X, 30).sum(-1) - draws.sum(-1) ** 2
    assert found.per_datum is None
    assert found.value == pytest.approx(float(log_mean_exp(lw)), rel=1e-12)
    with pytest.raises(EmvaeError, match="site 'sum' outside the data's plates"):
        log_evidence(model, local.guide, X, torch.tensor([0, 3]), num_particles=30)


def test_plate_without_a_size():
    def model(x):
        with pyro.plate("data", dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, torch.full_like(x, 0.5**0.5)))

    found = log_evidence(model, guide, X, num_particles=5)
    torch.testing.assert_close(found.per_datum.value, dist.Normal(0.0, 2**0.5).log_prob(X), rtol=1e-6, atol=1e-6)


def test_without_latents_it_is_exact():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)

    found = log_evidence(model, lambda x: None, X, num_particles=3)
    assert found.value == pytest.approx(float(dist.Normal(0.0, 1.0).log_prob(X).sum()), rel=1e-12)
    assert (found.kind, found.standard_error) == ("exact", 0.0)


# Guides ---------------------------------------------------------------------------------------------------------------

AUTO = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
}


def positive_model(x):
    """A Gamma rate and Poisson counts: conjugate, and constrained, so that autoguides transform."""
    rate = pyro.sample("rate", dist.Gamma(x.new_tensor(1.5), 0.8))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Poisson(rate), obs=x)


COUNTS = torch.tensor([2.0, 0.0, 3.0], dtype=DOUBLE)
LOG_EVIDENCE_OF_COUNTS = float(
    1.5 * math.log(0.8)
    - math.lgamma(1.5)
    + math.lgamma(6.5)
    - 6.5 * math.log(3.8)
    - sum(math.lgamma(c + 1) for c in (2, 0, 3))
)


@pytest.mark.parametrize("name", AUTO)
def test_autoguides(name):
    guide = AUTO[name](positive_model, **({} if "Messenger" in name else {"init_scale": 0.5}))
    with torch.no_grad():
        guide(COUNTS)
        for key, value in pyro.get_param_store().items():
            if "scale" in key and "tril" not in key and "Messenger" in name:
                pyro.get_param_store()[key] = torch.full_like(value, 0.5)
    for module, key in ((guide, "loc"),):
        if isinstance(getattr(module, key, None), torch.Tensor):
            getattr(module, key).data.fill_(0.5)
    found = log_evidence(positive_model, guide, COUNTS, seed=0)
    assert abs(found.value - LOG_EVIDENCE_OF_COUNTS) < 4 * found.standard_error < 0.4
    assert found.per_datum is None and found.given == ()


def test_local_autoguide_has_weights_per_datum():
    """The auxiliary sites of AutoNormal lie in the plates, so the data keep weights of their own."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(1.5), 0.8))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    guide = autoguide.AutoNormal(model, init_scale=0.6, init_loc_fn=init_to_sample)
    guide(COUNTS)
    with torch.no_grad():
        guide.locs.rate.copy_(((COUNTS + 1.5) / 1.8).log())
    found = log_evidence(model, guide, COUNTS, seed=0)
    exact = 1.5 * math.log(0.8) - math.lgamma(1.5) + torch.lgamma(COUNTS + 1.5) - (COUNTS + 1.5) * math.log(1.8)
    exact = exact - torch.lgamma(COUNTS + 1)
    z = (found.per_datum.value - exact) / found.per_datum.standard_error
    assert float(z.abs().max()) < 4 and float(found.per_datum.standard_error.max()) < 0.05
    joint = log_evidence(model, autoguide.AutoDiagonalNormal(model), COUNTS, num_particles=5)
    assert joint.per_datum is None


def test_point_masses():
    with pytest.raises(EmvaeError, match="point mass at 'rate'"):
        log_evidence(positive_model, autoguide.AutoDelta(positive_model), COUNTS, num_particles=5)
    guide = autoguide.AutoDelta(positive_model)
    found = elbo(positive_model, guide, COUNTS, num_particles=5)
    assert (found.kind, found.given, found.standard_error) == ("exact", ("rate",), 0.0)
    assert found.value == pytest.approx(-Trace_ELBO().loss(positive_model, guide, COUNTS), rel=1e-6)


@pytest.mark.parametrize("subsample_size", [None, 2])
def test_global_point_mass_counts_as_a_parameter(subsample_size):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", len(x), subsample_size=subsample_size, dim=-1) as i:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        mean = pyro.sample("mean", dist.Delta(x.new_tensor(0.3)))
        with pyro.plate("data", len(x), subsample_size=subsample_size, dim=-1) as i:
            pyro.sample("z", dist.Normal(0.5 * (x[i] + mean), 0.5**0.5))

    found = log_evidence(model, guide, X, num_particles=5, chunk_size=2, seed=0)
    prior = float(dist.Normal(0.0, 2.0).log_prob(torch.tensor(0.3)))
    expected = dist.Normal(0.3, 2**0.5).log_prob(X)
    assert found.given == ("mean",) and "log p(x, mean)" in repr(found)
    assert found.per_datum.constant == pytest.approx(prior, rel=1e-6)
    assert found.standard_error < 1e-6
    if subsample_size is None:
        assert found.value == pytest.approx(float(expected.sum()) + prior, rel=1e-6)
    else:
        assert found.per_datum.scale == 3.0
        assert found.value == pytest.approx(3 * float(found.per_datum.value.sum()) + prior, rel=1e-6)


def test_auxiliary_sites_count_in_log_q():
    def model(x):
        z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    def guide(x):
        u = pyro.sample("u", dist.Normal(0.5 * x, 0.5**0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    found = log_evidence(model, guide, X[0], num_particles=20)
    assert found.value == pytest.approx(float(dist.Normal(0.0, 2**0.5).log_prob(X[0])), abs=1e-6)
    assert found.standard_error < 1e-6 and found.given == ()


# What is no bound -----------------------------------------------------------------------------------------------------


def one_latent(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_guide(u=None, scale=1.0, mask=True):
    """Return a guide that holds the posterior, with something wrong around it."""

    def guide(x):
        if u is not None:
            pyro.sample("u", u, infer={"is_auxiliary": True})
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=scale), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.5 * x, 0.5**0.5))

    return guide


def masked_data(x):
    """Pyro's ``obs_mask``: what is missing is a latent, masked in the model and not in AutoNormal."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=x > 0)


UNSOUND = {
    "auxiliary": (one_latent, with_guide(u=dist.Normal(0.0, 0.1)), "'u': got an auxiliary guide site"),
    "discrete auxiliary": (one_latent, with_guide(u=dist.Bernoulli(0.5)), "'u': got an auxiliary guide site"),
    "scale": (one_latent, with_guide(scale=2.0), "'z': got scale 1 in the model, 2 in the guide"),
    "mask": (one_latent, with_guide(mask=X > 0), "'z': got mask none in the model, 4 of 6 in the guide"),
    "obs_mask": (masked_data, autoguide.AutoNormal(masked_data), "'x_unobserved': got mask 2 of 6 in the model, none"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_no_bound_is_refused_or_says_so(name):
    model, guide, match = UNSOUND[name]
    guide(X)
    found = elbo(model, guide, X, num_particles=20, seed=0)
    assert found.kind == "none" and "no bound of log p(x)" in repr(found)
    assert found.note.startswith("site " + match.split(":")[0]) and found.note in repr(found)
    for function in (log_evidence, elbo_gap):
        with pytest.raises(ModelError, match=match):
            function(model, guide, X, num_particles=20, seed=0)


def test_auxiliaries_that_are_accounted_for():
    """A gradient that is cut, a discrete site and a factor that corrects for what is drawn."""

    def model(x):
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=DOUBLE)))
        one_latent(x)

    def guide(x):
        k = pyro.sample("j", dist.Bernoulli(torch.tensor(0.3, dtype=DOUBLE)), infer={"is_auxiliary": True})
        pyro.sample("k", dist.Delta(1 - k if len(x) > 9 else k))
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(0.5 * x, 0.5**0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.detach()))

    exact = float(dist.Normal(0.0, 2**0.5).log_prob(X).sum())
    assert log_evidence(model, guide, X, num_particles=5).value == pytest.approx(exact, abs=1e-6)

    def corrected(x):
        v = pyro.sample("v", dist.Normal(x.new_zeros(()), 1.0), infer={"is_auxiliary": True})
        pyro.factor("v_given_z", -dist.Normal(x.new_zeros(()), 1.0).log_prob(v), has_rsample=True)
        with_guide()(x)

    found = log_evidence(one_latent, corrected, X, num_particles=5)
    assert found.kind == "lower" and found.value == pytest.approx(exact, abs=1e-6)


def test_a_point_mass_has_no_density_to_scale():
    def model(x):
        with poutine.scale(scale=0.5):
            pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        one_latent(x)

    def guide(x):
        pyro.sample("mean", dist.Delta(x.new_tensor(0.3)))
        with_guide()(x)

    assert elbo(model, guide, X, num_particles=3).kind == "lower"


def crossed(mix):
    def model(x, index=None):
        index = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", len(x), subsample=index, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(mix(z), 1.0), obs=x[index])

    def guide(x, index=None):
        index = torch.arange(len(x)) if index is None else index
        with pyro.plate("data", len(x), subsample=index, dim=-1):
            pyro.sample("z", dist.Normal(0.3 * x[index], 0.7))

    return model, guide


@pytest.mark.parametrize("mix", [lambda z: z.cumsum(-1), lambda z: z + z.flip(-1)], ids=["cumsum", "flip"])
def test_data_that_depend_on_each_other_share_a_weight(mix):
    model, guide = crossed(mix)
    found = log_evidence(model, guide, X, num_particles=20_000, seed=0)
    matrix = mix(torch.eye(6, dtype=DOUBLE)).T
    exact = dist.MultivariateNormal(X.new_zeros(6), torch.eye(6, dtype=DOUBLE) + matrix @ matrix.T).log_prob(X)
    assert found.per_datum is None and "site 'x' of one datum depends on another's" in repr(found)
    assert abs(found.value - float(exact)) < 5 * found.standard_error or found.khat > 0.7
    assert elbo(model, guide, X, num_particles=20, seed=0).per_datum is None
    with pytest.raises(EmvaeError, match="minibatch: got a subsampled plate 'data' while site 'x' of one datum"):
        log_evidence(model, guide, X, torch.tensor([0, 3]), num_particles=30)


@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_every_pair_of_data_is_told_apart(size):
    """Two data that swap latents, wherever they are, among as many as there are masks for."""
    x = torch.zeros(size, dtype=DOUBLE)
    for i, j in itertools.islice(itertools.combinations(range(size), 2), 0, None, max(1, size)):
        order = torch.arange(size)
        order[i], order[j] = j, i
        model, guide = crossed(lambda z, order=order: z[..., order])
        assert elbo(model, guide, x, num_particles=1, seed=i).per_datum is None, (i, j)
    assert elbo(*crossed(lambda z: 2 * z), x, num_particles=1).per_datum is not None


# Standard errors ------------------------------------------------------------------------------------------------------


def within_binomial(hits: int, n: int, p: float, alpha: float = 1e-6) -> bool:
    """Whether a count is between the alpha / 2 quantiles of Binomial(n, p)."""
    pmf = dist.Binomial(n, torch.tensor(p, dtype=DOUBLE)).log_prob(torch.arange(n + 1.0, dtype=DOUBLE)).exp()
    return bool(pmf[: hits + 1].sum() > alpha / 2) and bool(pmf[hits:].sum() > alpha / 2)


@pytest.mark.parametrize("name", ["linear_gaussian", "skewed_gamma"])
def test_coverage_over_seeds(name):
    """z-scores of 200 seeds: as many beyond 1 and 2 standard errors as a normal has."""
    problem = BUILT[name]
    tight = problems.linear_gaussian_full().exact_guide() | {"scale": torch.tensor([0.75, 0.8], dtype=DOUBLE)}
    params = problem.exact_guide() if problem.exact_guide else {k: v for k, v in tight.items() if k in problem.params}
    start(problem, params, jitter=0.15 if problem.exact_guide else 0.0)
    current = {n: pyro.param(n).detach() for n in problem.params}
    exact = {"log_evidence": float(problem.log_evidence(current)), "elbo": float(problem.elbo(current))}
    exact["total"] = exact["log_evidence"] - exact["elbo"]
    how = {"vectorize_particles": True, "max_plate_nesting": problem.max_plate_nesting, "num_particles": 400}
    z = []
    for seed in range(200):
        gap = elbo_gap(problem.model, problem.guide, *problem.args, seed=seed, **how)
        parts = [gap.log_evidence, gap.elbo, gap]
        z.append([(float(p) - value) / p.standard_error for p, value in zip(parts, exact.values(), strict=True)])
    for quantity, scores in zip(exact, torch.tensor(z).T, strict=True):
        for limit in (1.0, 2.0):
            hits = int((scores.abs() > limit).sum())
            assert within_binomial(hits, 200, 2 * NormalDist().cdf(-limit)), (quantity, limit, hits)
        assert abs(float(scores.mean())) < 4.9 / math.sqrt(200) + 0.2, f"{quantity}: bias of the order of 1/K apart"


def test_coverage_per_datum():
    """2,000 equal data are 2,000 replicates in one call."""
    local, x = Local(), torch.full((2000,), 0.9, dtype=DOUBLE)
    found = log_evidence(local.model, local.guide, x, num_particles=500, seed=0)
    z = (found.per_datum.value - Local.exact(x)) / found.per_datum.standard_error
    for limit in (1.0, 2.0):
        tail = 2 * NormalDist().cdf(-limit)
        assert within_binomial(int((z.abs() > limit).sum()), 2000, tail)
    assert abs(found.value - float(Local.exact(x).sum()) - found.bias) < 4 * found.standard_error


@pytest.mark.parametrize("sizes", [[10], [1, 9], [3, 3, 4], [1] * 10])
def test_streamed_moments_equal_those_at_once(sizes):
    lw = torch.tensor([[-3.0, 700.0], [2.0, -800.0], [-math.inf, 3.0], [9.0, 4.0], [9.5, 699.0]] * 2, dtype=DOUBLE)
    moments = Moments(10)
    for chunk in lw.split(sizes):
        moments.update(chunk, eps=1e-16)
    w = (lw - lw.amax(0)).exp()
    torch.testing.assert_close(moments.log_mean_exp, log_mean_exp(lw))
    torch.testing.assert_close(moments.log_mean_exp_variance, w.var(0) / w.mean(0) ** 2 / 10)
    torch.testing.assert_close(moments.ess, w.sum(0) ** 2 / w.square().sum(0))
    torch.testing.assert_close(moments.mean[1], lw[:, 1].mean())
    torch.testing.assert_close(moments.mean_variance[1], lw[:, 1].var() / 10)
    assert moments.mean[0] == -math.inf


def test_a_tail_that_is_too_long_is_left_out(monkeypatch):
    from pyro_emvae.evidence import moments

    monkeypatch.setattr(moments, "MAX_TAIL_ELEMENTS", 10)
    local = Local()
    found = log_evidence(local.model, local.guide, X, num_particles=40, seed=3)
    assert found.khat is found.khat_se is found.per_datum.khat is None and "khat" not in repr(found)
    assert math.isfinite(found.value)


# Watching changes nothing ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An encoder with batch norm, dropout, and a switch to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.layers[2].eval()  # mixed modes have to come back as they were
        self.fail = False
        self.seen: set[bool] = set()

    def forward(self, x):
        self.seen.add(self.training)
        if self.fail:
            raise RuntimeError("planted")
        return self.layers(x)


def net_program(net):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_is_left_behind(function, fails):
    net = Net().train()
    model, guide = net_program(net)
    x = torch.randn(5, 3)
    guide(x)  # the store knows the module
    net.seen.clear()
    net.fail = fails
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.requires_grad for p in net.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    hooks = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    if fails:
        with pytest.raises(RuntimeError, match="planted"):
            FUNCTIONS[function](model, guide, x, num_particles=4, seed=1)
    else:
        one, two = (float(FUNCTIONS[function](model, guide, x, num_particles=4, seed=1)) for _ in range(2))
        other = float(FUNCTIONS[function](model, guide, x, num_particles=4, seed=2))
        assert one == two != other
    assert net.seen == {False} and [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == grads and all(p.grad is None for p in net.parameters())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert hooks == (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_devices_and_precision(device, dtype):
    problem = problems.linear_gaussian_full(dtype=dtype, device=str(device))
    start(problem, problem.exact_guide())
    found = log_evidence(problem.model, problem.guide, *problem.args, num_particles=500, seed=0)
    assert found.value == pytest.approx(float(problem.log_evidence()), rel=20 * torch.finfo(dtype).eps)
    assert found.per_datum.value.device.type == device.type and found.khat == -math.inf
    assert found.standard_error < 1e3 * torch.finfo(dtype).eps


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["num_particles", "chunk_size"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_numbers_that_are_none(function, name, value):
    local = Local()
    with pytest.raises(EmvaeError, match=f"`{function}` cannot use {name}: got {value!r}"):
        FUNCTIONS[function](local.model, local.guide, X, **{name: value})
    assert not local.draws


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_data(function):
    local = Local()
    with pytest.raises(DataError, match=rf"`{function}` cannot use empty data: got a tensor of shape \(0,\)"):
        FUNCTIONS[function](local.model, local.guide, X[:0])
    with pytest.raises(DataError, match=r"shape \(0, 3\)"):
        FUNCTIONS[function](local.model, local.guide, batch={"x": [torch.zeros(0, 3)]})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_batch_dims_of_no_plate(function):
    def program(x):
        pyro.sample("w", dist.Normal(x.new_zeros(2, 4), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(
        ModelError,
        match=rf"`{function}` cannot lay out site 'w': got batch shape \(2, 4\), of which no plate declares dim -2",
    ):
        FUNCTIONS[function](program, program, X, num_particles=3)


def test_batch_dims_of_size_one_need_no_plate():
    def program(x, obs=None):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0))
        if obs is not None:
            pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    found = log_evidence(lambda x: program(x, x[:1]), program, X, num_particles=2000, seed=0)
    exact = float(dist.Normal(0.0, 2**0.5).log_prob(X[0]))
    assert abs(found.value - exact) < 4 * found.standard_error < 0.1


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("num_particles", [1, 3, 6, 8])
def test_too_few_plate_dims(function, num_particles):
    local = Local()
    with pytest.raises(EmvaeError, match=f"`{function}` cannot use max_plate_nesting=0: got plates of 1 dims"):
        FUNCTIONS[function](local.model, local.guide, X, num_particles=num_particles, max_plate_nesting=0)
    with pytest.raises(EmvaeError, match="use max_plate_nesting: got -1"):
        FUNCTIONS[function](local.model, local.guide, X, max_plate_nesting=-1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sites_that_do_not_match(function):
    local = Local()
    with pytest.raises(ModelError, match="draw site 'z': got no such site in the guide"):
        FUNCTIONS[function](local.model, lambda x: None, X, num_particles=3)

    def guide(x):
        local.guide(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="draw site 'extra': got a site that the model lacks"):
        FUNCTIONS[function](local.model, guide, X, num_particles=3)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_model_without_sites(function):
    with pytest.raises(ModelError, match=r"without any pyro\.sample"):
        FUNCTIONS[function](lambda: None, lambda: None)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_name_the_site(function, value):
    local = Local()

    def model(x):
        local.model(x)
        pyro.factor("broken", x.new_tensor(value))

    match = f"`{function}` .* log weight of {value} .*'broken'"
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match=match):
        FUNCTIONS[function](model, local.guide, X, num_particles=3)


def test_weights_of_zero():
    """A factor that is zero for z < 0: weights of zero are fine for the evidence, and make the ELBO minus infinity."""

    def model(limit):
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
            pyro.factor("positive", torch.where(z > limit, 0.0, -math.inf))

    def guide(limit):
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))

    found = log_evidence(model, guide, 0.0, seed=0)
    assert abs(found.value - 3 * math.log(0.5)) < 4 * found.standard_error
    assert found.standard_error == pytest.approx(math.sqrt(3 / 5000), rel=0.1) and found.khat == -math.inf
    for function in (elbo, elbo_gap):
        with pytest.raises(NonFiniteError, match="mean of -inf"):
            function(model, guide, 0.0, num_particles=50, seed=0)
    with pytest.raises(NonFiniteError, match=r"5 weights of datum \(0,\) that are all zero"):
        log_evidence(model, guide, 99.0, num_particles=5)


def test_a_model_that_mixes_particles():
    """With ``z - z.mean()`` a vectorized run passes every shape check and is wrong: it loops and says so."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    with pytest.warns(UserWarning, match="one by one: .*'x'"):
        one = log_evidence(model, guide, X, num_particles=20, seed=0)
    two = log_evidence(model, guide, X, num_particles=20, seed=0, vectorize_particles=False)
    assert one.value == two.value
    with pytest.raises(ModelError, match=r"cannot vectorize particles: .*'x'"):
        log_evidence(model, guide, X, num_particles=20, seed=0, vectorize_particles=True)


def test_methods():
    class Constant(EvidenceMethod):
        name, bounds = "constant", "upper"

        def estimate(self, request):
            return Estimate(float(len(request.args[0])), 0.0, "upper", request.num_particles)

    local = Local()
    assert log_evidence(local.model, local.guide, X, method=Constant()).value == 6.0
    by_name, by_instance = (
        log_evidence(local.model, local.guide, X, method=m, num_particles=9, seed=0).value
        for m in ("importance", Importance())
    )
    assert by_name == by_instance
    with pytest.raises(EmvaeError, match="Did you mean 'importance'"):
        log_evidence(local.model, local.guide, X, method="importanc")
    with pytest.raises(EmvaeError, match="got 3"):
        log_evidence(local.model, local.guide, X, method=3)
    assert "importance" in [e.name for e in entries("evidence")]


def test_what_it_looks_like():
    local = Local()
    gap = elbo_gap(local.model, local.guide, X, torch.tensor([1, 2]), num_particles=400, seed=0)
    assert float(gap) == gap.total and float(gap.elbo) == gap.elbo.value
    for text in ("+-", "nats", "lower bound of log p(x)", "400 particles", "ess >=", "khat <=", "2 data"):
        assert text in repr(gap.log_evidence)
    assert repr(gap).startswith("Gap(") and "elbo=Estimate(" in repr(gap)
    assert "PerDatum(data: 2; mean" in repr(gap.per_datum) and "each counted 3 times" in repr(gap.per_datum)
    assert evidence.__all__ == sorted(evidence.__all__)


@pytest.mark.parametrize(
    ("khat", "ess", "says"),
    [
        (0.3, 50.0, "khat = 0.30 +- 0.05,"),
        (0.71, 50.0, "khat = 0.71 +- 0.05: unreliable"),
        (math.inf, 2.0, "khat = inf +- 0.05: unreliable"),
        (-math.inf, 100.0, "equal weights"),
        (-math.inf, 50.0, "equal largest weights"),
    ],
)
def test_khat_in_words(khat, ess, says):
    text = repr(Estimate(-1.0, 0.1, "lower", 100, ess=ess, khat=khat, khat_se=0.05, note="end"))
    assert says in text and "inf +- 0.00" not in text and ("unreliable" in text) == (khat > 0.7)
