r"""`AutoExact`: the posterior of the model as a guide, with no gap, and no answer where it is not exact."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from scipy import stats
from torch import nn

from pyro_emvae._checks import DataError, ModelError
from pyro_emvae._registry import entries
from pyro_emvae.evidence import log_evidence
from pyro_emvae.guides import AutoExact
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.problems import exact_gradients, linear_gaussian, local_global
from pyro_emvae.testing import assert_mean, check_guide

X = torch.tensor([0.7, -1.2, 2.1, 0.3], dtype=torch.float64)


def mixture(x):
    """One discrete latent per datum."""
    weight = pyro.param("weight", torch.tensor([0.3, 0.5, 0.2], dtype=x.dtype), constraint=dist.constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 0.4, 2.0], dtype=x.dtype))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weight))
        pyro.sample("x", dist.Normal(loc[k], 0.8), obs=x)


def linear(x):
    """A latent that all data share, and one per datum."""
    loc = pyro.param("loc", torch.tensor(0.3, dtype=x.dtype))
    mu = pyro.sample("mu", dist.Normal(loc, 1.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.9))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def conjugate(x):
    """A mean and its precision."""
    rate = pyro.param("rate", torch.tensor(1.5, dtype=x.dtype), constraint=dist.constraints.positive)
    tau = pyro.sample("tau", dist.Gamma(2.0 * torch.ones_like(rate), rate))
    mu = pyro.sample("mu", dist.Normal(0.2, (2.0 * tau).rsqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)


def at(value):
    return torch.tensor(value, dtype=X.dtype)


def switching(x):
    """Two discrete latents, the second given the first, then a chain of normals, with a plate in it."""
    a = pyro.sample("a", dist.Bernoulli(at(0.4)))
    b = pyro.sample("b", dist.Categorical(torch.stack([1.0 + a, 2.0 - a, 0.7 + 0 * a], -1)))
    mu = pyro.sample("mu", dist.Normal(1.5 * a - 0.5 * b, at(1.0)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.5 + a))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def switching_rates(x):
    a = pyro.sample("a", dist.Bernoulli(at(0.4)))
    rate = pyro.sample("rate", dist.Gamma(2.0 + a, 1.0 + a))
    with pyro.plate("data", len(x)):
        pyro.sample("n", dist.Poisson(rate), obs=x.abs().round())


def local_switching(x):
    """A class per datum, one of three values given it, and a normal given both; some data are missing."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(at(0.4)))
        c = pyro.sample("c", dist.Categorical(torch.stack([1.0 + k, 2.0 - k, 0.7 + 0 * k], -1)))
        z = pyro.sample("z", dist.Normal(2.0 * k - 0.5 * c, 0.5 + k))
        with poutine.mask(mask=x < 1.0):
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def local_rates(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(at(0.4)))
        rate = pyro.sample("rate", dist.Gamma(2.0 + a, 1.0 + 3 * a))
        pyro.sample("n", dist.Poisson(rate), obs=x.abs().round())


def chain(x):
    z = pyro.sample("z_0", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
    for t in range(len(x)):
        z = pyro.sample(f"z_{t + 1}", dist.Bernoulli(0.2 + 0.6 * z), infer={"enumerate": "parallel"})
        pyro.sample(f"x_{t}", dist.Normal(2 * z - 0.5, 1.0), obs=x[t])


MODELS = {"mixture": mixture, "linear": linear, "conjugate": conjugate, "chain": chain}
MODELS |= {"switching": switching, "rates": switching_rates, "of each": local_switching, "rates of each": local_rates}
KINDS = {"mixture": "enumerated", "linear": "gaussian", "conjugate": "conjugate", "chain": "enumerated"}
KINDS |= {"switching": "given discrete latents, gaussian", "rates": "given discrete latents, conjugate"}
KINDS |= {"of each": KINDS["switching"], "rates of each": KINDS["rates"]}


def elbo(model, guide, *args, loss=Trace_ELBO):
    return -loss().loss(model, guide, *args)


# Exact ------------------------------------------------------------------------------------------------------------


def exact_problems():
    """Every registered problem that has an analytic posterior, where all latents are of one of the kinds."""
    for entry in entries("problem"):
        problem = entry.factory() if "sklearn" not in entry.name else None
        pyro.clear_param_store()
        if problem.posterior is not None and not problem.traits.subsampled:
            yield problem


@pytest.mark.parametrize("problem", list(exact_problems()), ids=lambda p: p.name)
def test_equals_the_analytic_posterior_and_every_draw_gives_the_evidence(problem):
    guide, expected = AutoExact(problem.model), problem.posterior()
    evidence = float(problem.log_evidence())
    for _ in range(3):
        assert math.isclose(elbo(problem.model, guide, *problem.args), evidence, rel_tol=1e-9)
    posterior = guide.posterior(*problem.args)
    for site, fn in expected.items():
        marginal = posterior.marginal(site)
        for moment in ("probs",) if hasattr(fn, "probs") and hasattr(marginal, "probs") else ("mean", "variance"):
            assert torch.allclose(getattr(marginal, moment), getattr(fn, moment), rtol=1e-9), site


@pytest.mark.parametrize("name", MODELS)
def test_no_gap_for_any_loss_or_number_of_particles(name):
    model, guide = MODELS[name], AutoExact(MODELS[name])
    evidence = guide.posterior(X).log_evidence
    assert guide.kind == KINDS[name]
    losses = [Trace_ELBO(), TraceGraph_ELBO(2), RenyiELBO(0.0, 2), MonteCarloELBO(2)]
    for loss in [*losses, Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1)]:
        assert math.isclose(-loss.loss(model, guide, X), evidence, rel_tol=1e-9)
    estimate = log_evidence(model, guide, X, num_particles=4)
    assert math.isclose(estimate.value, evidence, rel_tol=1e-9) and estimate.standard_error < 1e-9


@pytest.mark.parametrize("name", ["mixture", "linear", "conjugate", "switching"])
def test_proves_itself(name):
    check_guide(AutoExact, MODELS[name], (X[:1],), num_samples=40_000, trains=False)


LOADINGS = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
CENTRES = torch.tensor([[0.0, 0.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64)


def factor_mixture(x):
    """A mixture of two factor models: a class and a vector per datum."""
    shift = pyro.param("shift", at(0.3))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(at(0.3))).unsqueeze(-1)
        z = pyro.sample("z", dist.Normal(shift * k.expand(-1, 2), 1.0 + k).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS + CENTRES[k.long().squeeze(-1)], 0.7).to_event(1), obs=x)


def test_a_mixture_of_factor_models_in_closed_form():
    """Evidence, classes, the vectors' means and the gradient by a parameter."""
    x = torch.randn(5, 3, dtype=torch.float64)
    shift, log_joint, means = at(0.3).requires_grad_(), [], []
    for k, prior in ((0, 0.7), (1, 0.3)):
        variance, loc = (1.0 + k) ** 2, shift * k * torch.ones(2).to(x)
        covariance = variance * LOADINGS.T @ LOADINGS + 0.49 * torch.eye(3).to(x)
        residual = x - CENTRES[k] - loc @ LOADINGS
        log_joint.append(math.log(prior) + dist.MultivariateNormal(torch.zeros(3).to(x), covariance).log_prob(residual))
        means.append(loc + variance * residual @ torch.linalg.inv(covariance) @ LOADINGS.T)
    log_joint, means = torch.stack(log_joint), torch.stack(means)
    evidence, weights = log_joint.logsumexp(0).sum(), log_joint.softmax(0)
    value = float(evidence.detach())
    guide = AutoExact(factor_mixture)
    posterior = guide.posterior(x)
    assert guide.kind == "given discrete latents, gaussian"
    assert math.isclose(posterior.log_evidence, value, rel_tol=1e-12)
    assert all(math.isclose(elbo(factor_mixture, guide, x), value, rel_tol=1e-12) for _ in range(3))
    assert torch.allclose(posterior.marginal("k").mean, weights[1], rtol=1e-10)
    exact = (weights[..., None] * means).sum(0).detach()
    assert torch.allclose(posterior.support().expect(lambda values: values["z"]), exact, rtol=1e-10)
    with pyro.plate("draws", 12_000, dim=-2):
        drawn = guide(x)
    assert_mean(drawn["k"], weights[1].detach(), detect=0.1, what="the classes")
    assert_mean(drawn["z"].flatten(1), exact.flatten(), detect=0.3, what="the vectors")
    leaf = pyro.param("shift").unconstrained()
    found = torch.autograd.grad(posterior.expected_log_joint(), leaf)[0]
    assert torch.allclose(found, torch.autograd.grad(evidence, shift)[0], rtol=1e-10)


def test_discrete_vectors_are_listed():
    """Two sites with event dims in a plate, the second given the first; also as particles of one run."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor([0.3, 0.6], dtype=x.dtype)).to_event(1))
            c = pyro.sample("c", dist.Categorical(torch.stack([k + 0.5, 2.0 - k], -1)).to_event(1))
            pyro.sample("x", dist.Normal(k.sum(-1) - c[..., 0], 0.7), obs=x)

    guide = AutoExact(model)
    x = X[:2]
    log_joint = []
    for k in [(a, b) for a in (0.0, 1.0) for b in (0.0, 1.0)]:
        for c in [(a, b) for a in (0, 1) for b in (0, 1)]:
            data = {"k": torch.tensor(k, dtype=X.dtype).expand(2, 2), "c": torch.tensor(c).expand(2, 2)}
            trace = poutine.trace(poutine.condition(model, data=data)).get_trace(x)
            trace.compute_log_prob()
            log_joint.append(sum(node["log_prob"] for node in trace.nodes.values() if "log_prob" in node))
    evidence = torch.stack(log_joint).logsumexp(0).sum().item()
    for loss in (Trace_ELBO(), Trace_ELBO(5, vectorize_particles=True, max_plate_nesting=1)):
        assert math.isclose(-loss.loss(model, guide, x), evidence, rel_tol=1e-9)
    check_guide(AutoExact, model, (x[:1],), num_samples=40_000, trains=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype, device):
    x = X.to(device, dtype)
    values = AutoExact(linear)(x)
    assert all(v.dtype == dtype and v.device == x.device for v in values.values())


# Gradients --------------------------------------------------------------------------------------------------------


def gradient(model, guide, loss):
    loss.loss_and_grads(model, guide, X)
    leaves = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
    found = torch.cat([p.grad.flatten() for p in leaves])
    for p in leaves:
        p.grad = None
    return found


@pytest.mark.parametrize(
    ("name", "loss"),
    [("mixture", Trace_ELBO), ("mixture", MonteCarloELBO), ("linear", Trace_ELBO)],
)
def test_gradient_is_that_of_the_log_evidence(name, loss):
    """In the mean over draws; the expected log joint at the held posterior has it without noise."""
    model, guide = MODELS[name], AutoExact(MODELS[name])
    guide(X)
    leaves = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
    found = torch.autograd.grad(guide.posterior(X).expected_log_joint(), leaves)
    exact = torch.cat([g.flatten() for g in found])
    many = loss(2_000, vectorize_particles=True, max_plate_nesting=1)
    samples = torch.stack([-gradient(model, guide, many) for _ in range(120)])
    assert_mean(samples, exact, detect=0.03, what="the gradient")


def test_gradient_of_the_held_posterior_is_the_exact_one():
    problem = local_global()
    guide = AutoExact(problem.model)
    guide(*problem.args)
    expected = exact_gradients(problem, objective="log_evidence")
    names = list(problem.model_params)
    leaves = [pyro.get_param_store()[n].unconstrained() for n in names]
    found = torch.autograd.grad(guide.posterior(*problem.args).expected_log_joint(), leaves)
    for name, g in zip(names, found, strict=True):
        assert torch.allclose(g, expected[name], rtol=1e-9)


def test_guide_has_no_gradient_and_no_parameters():
    guide = AutoExact(linear)
    tr = poutine.trace(guide).get_trace(X)
    tr.compute_log_prob()
    sites = [node for node in tr.nodes.values() if node["type"] == "sample"]
    assert not any(node["log_prob"].requires_grad or node["value"].requires_grad for node in sites)
    assert not list(guide.parameters()) and not guide.state_dict()


def test_svi_reaches_the_maximum_of_the_evidence():
    problem = linear_gaussian()
    loss = Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(problem.model, AutoExact(problem.model), pyro.optim.Adam({"lr": 0.08}), loss)
    for _ in range(80):
        svi.step(*problem.args)
    theta = {name: pyro.param(name) for name in problem.model_params}
    best = problem.log_evidence(problem.maximum()).item()
    assert best - 0.5 < problem.log_evidence(theta).item() < best + 1e-9


# The interface ----------------------------------------------------------------------------------------------------


def test_median_and_quantiles():
    levels = [0.1, 0.5, 0.9]
    found = AutoExact(linear).quantiles(levels, X)
    marginal = AutoExact(linear).posterior(X).marginal("z")
    assert torch.allclose(marginal.cdf(found["z"]), torch.tensor(levels, dtype=X.dtype)[:, None].expand(3, 4))
    found = AutoExact(conjugate).quantiles(levels, X)
    posterior = AutoExact(conjugate).posterior(X)
    assert torch.allclose(posterior.marginal("tau").cdf(found["tau"]), torch.tensor(levels, dtype=X.dtype))
    mu = posterior.marginal("mu")
    below = stats.t.cdf(found["mu"], mu.df, mu.loc, mu.scale)
    assert torch.allclose(torch.as_tensor(below), torch.tensor(levels, dtype=X.dtype))
    pyro.clear_param_store()
    assert AutoExact(mixture).median(X)["k"].shape == (4,)
    probs = AutoExact(mixture).posterior(X).marginal("k").probs
    assert torch.equal(AutoExact(mixture).median(X)["k"], (probs.cumsum(-1) < 0.5).sum(-1))


def test_vector_medians_and_dirichlet_quantiles():
    problem = linear_gaussian()
    guide = AutoExact(problem.model)
    median = guide.median(*problem.args)["z"]
    assert torch.allclose(median, problem.posterior()["z"].mean) and median.shape == (*problem.args[0].shape[:1], 2)

    def model(x):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5], dtype=X.dtype)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(p), obs=x)

    x = torch.tensor([0, 1, 1, 2])
    levels = torch.tensor([0.2, 0.7], dtype=X.dtype)
    found = AutoExact(model).quantiles(levels, x)["p"]
    a = torch.tensor([2.0, 4.0, 1.5])
    for i in range(3):
        below = stats.beta.cdf(found[:, i], a[i].item(), (a.sum() - a[i]).item())
        assert torch.allclose(torch.as_tensor(below), levels, rtol=1e-6)


def test_follows_data_of_any_size_and_theta():
    guide = AutoExact(mixture)
    for x in (X, X[:2], X.repeat(5)):
        assert guide(x)["k"].shape == x.shape
    before = guide.posterior(X).marginal("k").probs
    pyro.param("loc").data.add_(1.0)
    assert not torch.allclose(before, guide.posterior(X).marginal("k").probs)


def halves(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        b = pyro.sample("b", dist.Gamma(2.0 * torch.ones((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        pyro.sample("y", dist.LogNormal(b.log(), 1.0), obs=x.exp())


@pytest.mark.parametrize("exact_first", [True, False])
def test_in_a_list_of_guides(exact_first):
    guide = AutoGuideList(halves)
    parts = [AutoExact(poutine.block(halves, hide=["b", "y"])), AutoNormal(poutine.block(halves, hide=["a", "x"]))]
    for part in parts if exact_first else reversed(parts):
        guide.append(part)
    assert set(guide(X)) == {"a", "b"}
    marginal = parts[0].posterior(X).marginal("a")
    assert torch.allclose(marginal.mean, X / 2)
    svi = SVI(halves, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(X)) for _ in range(3))
    assert set(guide.median(X)) == {"a", "b"}


def minibatches(x, size=None):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def test_minibatch_has_a_posterior_of_its_own():
    model = lambda x: minibatches(x, 2)  # noqa: E731
    guide, seen = AutoExact(model), set()
    evidence = dist.Normal(0.0, torch.tensor(2.0, dtype=X.dtype).sqrt()).log_prob(X)
    pairs = [evidence[[i, j]].sum().item() * 2 for i in range(4) for j in range(i)]
    for _ in range(20):
        value = elbo(model, guide, X)
        seen.add(min(range(6), key=lambda i, value=value: abs(pairs[i] - value)))
        assert min(abs(value - pair) for pair in pairs) < 1e-9
    assert len(seen) > 1


def test_created_plates():
    index = torch.tensor([2, 0])

    def model(x):
        with pyro.plate("data", 4, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = AutoExact(model, create_plates=lambda x: pyro.plate("data", 4, subsample=index, dim=-1))
    assert torch.allclose(guide.posterior(X).marginal("z").scale, torch.tensor(0.5, dtype=X.dtype).sqrt())
    expected = 2 * dist.Normal(0.0, torch.tensor(2.0, dtype=X.dtype).sqrt()).log_prob(X[index]).sum()
    assert math.isclose(elbo(model, guide, X), expected.item(), rel_tol=1e-9)


@pytest.mark.parametrize("name", ["mixture", "linear"])
def test_scale_and_mask_of_the_model_leave_no_gap(name):
    seen = torch.tensor([True, False, True, True])

    def model(x):
        with poutine.scale(scale=0.3), poutine.mask(mask=seen):
            MODELS[name](x)

    if name == "linear":

        def model(x):
            with poutine.scale(scale=0.3):
                mu = pyro.sample("mu", dist.Normal(torch.tensor(0.3, dtype=x.dtype), 1.3))
                with pyro.plate("data", len(x)), poutine.mask(mask=seen):
                    z = pyro.sample("z", dist.Normal(mu, 0.9))
                    pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    guide = AutoExact(model)
    full = AutoExact(MODELS[name]).posterior(X[seen]).log_evidence
    for _ in range(3):
        assert math.isclose(elbo(model, guide, X), 0.3 * full, rel_tol=1e-9)


def test_copies():
    guide = AutoExact(linear)
    guide(X)
    other = copy.deepcopy(guide)
    loaded = pickle.loads(pickle.dumps(guide))
    evidence = guide.posterior(X).log_evidence
    for twin in (other, loaded, pickle.loads(pickle.dumps(AutoExact(linear)))):
        assert math.isclose(elbo(linear, twin, X), evidence, rel_tol=1e-9)
        twin.load_state_dict(guide.state_dict())
    assert other.model is guide.model
    assert X.numpy().tobytes() not in pickle.dumps(guide)
    assert guide(X[:2])["z"].shape == (2,), "the pickled guide goes on working"


def test_first_call_changes_no_generator_or_buffer():
    norm = nn.BatchNorm1d(1).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            norm(x[:, None])
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    generator = torch.get_rng_state()
    AutoExact(model).posterior(X)
    assert torch.equal(torch.get_rng_state(), generator)
    assert norm.training and int(norm.num_batches_tracked) == 0


# Errors -----------------------------------------------------------------------------------------------------------


def poisson(x):
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("n", dist.Poisson(rate.sum().exp()), obs=x.abs().round())


def log_normal(x):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, s), obs=x)


def count(x):
    k = pyro.sample("k", dist.Poisson(2.0))
    pyro.sample("x", dist.Normal(k, 1.0), obs=x[0])


def vector(x):
    k = pyro.sample("k", dist.Bernoulli(0.4).expand([13]).to_event(1))
    pyro.sample("x", dist.Normal(k.sum(-1), 1.0), obs=x[0])


def local_switch(x):
    """A normal that all data share, beside a class for each."""
    z = pyro.sample("z", dist.Normal(at(0.0), at(1.0)))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(at(0.4)))
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


def joined_switch(x):
    """The vectors of all data meet in a site."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(at(0.4)))
        z = pyro.sample("z", dist.Normal(k, at(1.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=x[0])


def odd_switch(x):
    k = pyro.sample("k", dist.Bernoulli(at(0.4)))
    z = pyro.sample("z", dist.Normal(k, at(1.0)))
    pyro.sample("x", dist.Normal(z**3, 1.0), obs=x[0])


def no_latent(x):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0])


REFUSED = [
    (poisson, r"out of site 'n': got Poisson, whose log density is not quadratic.*AutoMeanField"),
    (log_normal, r"site 's': got LogNormal, of support.*AutoMeanField"),
    (count, r"site 'k': got Poisson, of infinitely many outcomes"),
    (vector, r"site 'k': got Bernoulli, of more than 4096 joint outcomes"),
    (local_switch, r"site 'z' out: got Normal beside the discrete 'k'\."),
    (joined_switch, r"site '\w' out: got .*beside the discrete 'k'"),
    (odd_switch, r"site 'z' out: got Normal beside the discrete 'k'; given them, a log joint"),
    (no_latent, r"got a model without latents"),
]


@pytest.mark.parametrize(("model", "match"), REFUSED, ids=range(len(REFUSED)))
def test_refused_models(model, match):
    """Also the second call: nothing of a failed set-up stays."""
    guide = AutoExact(model)
    for _ in range(2):
        with pytest.raises(ModelError, match=match):
            guide(X)
    assert guide.kind is None


def test_model_that_stops_being_exact():
    def model(x, quadratic=True):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z if quadratic else z**3, 1.0), obs=x[0])

    guide = AutoExact(model)
    guide(X)
    with pytest.raises(ModelError, match=r"out of site 'x': got Normal, whose log density is not quadratic"):
        guide(X, False)


def test_model_with_other_random_numbers():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[0] + torch.randn(()))

    with pytest.raises(ModelError, match=r"posterior of site 'z': got log densities .* dropout"):
        AutoExact(model)(X)


def test_part_without_data():
    guide = AutoGuideList(halves)
    guide.append(AutoExact(poutine.block(halves, expose=["a"])))
    with pytest.raises(ModelError, match=r"got a part without observed sites.*hide=\["):
        guide(X)


def test_minibatch_with_a_global_latent():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])

    with pytest.raises(ModelError, match=r"got scales 1\.0, 2\.0.*Give all data"):
        AutoExact(model)(X)


def test_empty_data():
    with pytest.raises(DataError, match=r"`AutoExact` cannot use empty data: got a tensor of shape \(0,\)"):
        AutoExact(linear)(X[:0])
