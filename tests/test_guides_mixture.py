r"""`AutoMixture`: the density of a mixture at its own draws, and gradients of weights and components."""

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
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal

from pyro_emvae._checks import DataError, EmvaeError, ModelError
from pyro_emvae.guides import AutoAmortized, AutoExact, AutoMeanField, AutoMixture
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.particles import draw
from pyro_emvae.testing import assert_mean, check_guide

X = torch.tensor([0.7, -1.2, 2.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
LOCS = torch.tensor([-1.4, 0.9], dtype=torch.float64)


class at:
    """Starting values that can be pickled."""

    def __init__(self, value):
        self.value = value

    def __call__(self, site):
        return torch.full(site["fn"].shape(), self.value, dtype=torch.float64)


def two_modes():
    """The posterior is a mixture of two normals; the evidence is one."""
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), 3.0)
    parts = dist.Normal(LOCS, torch.tensor([0.5, 0.8], dtype=torch.float64))
    z = pyro.sample("z", prior)
    pyro.factor("f", dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts).log_prob(z) - prior.log_prob(z))


def scalar(x=1.3):
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    pyro.sample("x", dist.Normal(z.abs(), 0.7), obs=torch.tensor(x, dtype=torch.float64))


def nested(x):
    mu = pyro.sample("mu", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu.unsqueeze(-1), torch.ones(2, dtype=x.dtype)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def local(x, size=None):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.5), obs=x[index])


def pair(model, one=AutoNormal, other=AutoNormal, **options):
    guides = [one(model, init_loc_fn=at(0.6), init_scale=0.6), other(model, init_loc_fn=at(1.1), init_scale=0.8)]
    return AutoMixture(guides, **options)


def component_log_q(guide, j, values, x):
    """The density of one AutoNormal by hand."""
    part, total = guide.components[j], 0.0
    for name, node in part.prototype_trace.iter_stochastic_nodes():
        loc, scale = part._get_loc_and_scale(name)
        transform = torch.distributions.biject_to(node["fn"].support)
        free = transform.inv(values[name])
        total = total + dist.Normal(loc, scale).log_prob(free).sum()
        total = total - transform.log_abs_det_jacobian(free, values[name]).sum()
    return total


# The density ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nested, local])
def test_density_is_that_of_the_mixture(model):
    guide = pair(model)
    guide(X)
    guide.logits.data.copy_(torch.tensor([0.4, -0.7]))
    for _ in range(4):
        particles = draw(model, guide, (X,))
        values = {name: site.value for name, site in particles.guide.items() if name in ("mu", "z")}
        log_q = torch.stack([component_log_q(guide, j, values, X) for j in range(2)])
        expected = (log_q + guide.logits.log_softmax(-1)).logsumexp(-1)
        assert torch.allclose(particles.log_q.sum(), expected, rtol=1e-10)


def test_density_per_element_of_a_plate():
    guide = pair(local, plate="data")
    guide(X)
    guide.logits.data.copy_(torch.tensor([0.4, -0.7]))
    site = draw(local, guide, (X,)).guide["z"]
    parts = [dist.Normal(*guide.components[j]._get_loc_and_scale("z")).log_prob(site.value) for j in range(2)]
    expected = (torch.stack(parts, -1) + guide.logits.log_softmax(-1)).logsumexp(-1)
    assert torch.allclose(site.log_prob, expected, rtol=1e-10) and site.log_prob.shape == (3,)


def test_no_gap_where_the_posterior_is_a_mixture():
    guide = AutoMixture([AutoNormal(two_modes, init_loc_fn=at(float(m))) for m in LOCS])
    guide()
    guide.logits.data.copy_(WEIGHTS.log())
    guide.component_0.scales.z, guide.component_1.scales.z = torch.tensor([0.5, 0.8], dtype=torch.float64)
    for loss in (Trace_ELBO(4), TraceGraph_ELBO(), MonteCarloELBO(5, vectorize_particles=True)):
        assert abs(loss.loss(two_modes, guide)) < 1e-10


@pytest.mark.parametrize("kinds", [(AutoNormal, AutoNormal), (AutoMultivariateNormal, AutoNormal)], ids=["NN", "MN"])
@pytest.mark.parametrize("model", [nested, local])
def test_proves_itself(kinds, model):
    check_guide(lambda model: pair(model, *kinds), model, (X[:1],), num_samples=40_000)


@pytest.mark.parametrize("defect", ["spread", "components' mean"])
def test_a_wrong_density_is_caught(defect, monkeypatch):
    """Planted: the density counted once per element of the plate; that of the mean of the components' logarithms."""
    if defect == "spread":
        monkeypatch.setattr(AutoMixture, "_num_elements", lambda self, name, value: 1)
    else:
        monkeypatch.setattr(torch.Tensor, "logsumexp", lambda self, dim, keepdim=False: self.mean(dim, keepdim))
    with pytest.raises(AssertionError, match=r"E_q\[h\(z\) / q\(z\)\]"):
        check_guide(pair, local, (X[:2],), num_samples=80_000)


def test_proves_itself_per_element():
    check_guide(lambda model: pair(model, plate="data"), local, (X[:2],))


# Gradients --------------------------------------------------------------------------------------------------------


def exact_gradient(guide):
    """By quadrature: the ELBO as a function of weights, means and scales."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    log_p = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z.abs(), 0.7).log_prob(torch.tensor(1.3).double())
    leaves = [guide.logits]
    parts = []
    for part in guide.components:
        loc, scale = part._get_loc_and_scale("z")
        parts.append(dist.Normal(loc, scale).log_prob(z))
    log_q = (torch.stack(parts, -1) + guide.logits.log_softmax(-1)).logsumexp(-1)
    elbo = torch.trapezoid(log_q.exp() * (log_p - log_q), z)
    leaves = list(guide.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(elbo, leaves)])


LOSSES = {
    "Trace_ELBO": lambda k: Trace_ELBO(k, vectorize_particles=True, max_plate_nesting=0),
    "leave_one_out": lambda k: MonteCarloELBO(k, estimator={"mixture_component": "leave_one_out"}),
    "TraceGraph_ELBO": lambda k: TraceGraph_ELBO(k, vectorize_particles=True, max_plate_nesting=0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_unbiased(name):
    guide = pair(scalar)
    guide()
    guide.logits.data.copy_(torch.tensor([0.4, -0.7]))
    guide.component_0.locs.z.data.fill_(-0.8)
    exact, loss, samples = exact_gradient(guide), LOSSES[name](2000), []
    for _ in range(120):
        loss.loss_and_grads(scalar, guide)
        samples.append(torch.cat([-p.grad.flatten() for p in guide.parameters()]))
        guide.zero_grad()
    assert_mean(torch.stack(samples), exact, detect=0.1, what=f"the gradient of {name}")


def discrete_part(probs):
    def guide():
        p = pyro.param(f"p_{probs}", torch.tensor([probs, 1 - probs], dtype=torch.float64))
        k = pyro.sample("k", dist.Categorical(p))
        loc = pyro.param(f"m_{probs}", torch.tensor([-0.3, 0.6], dtype=torch.float64) + probs)
        pyro.sample("z", dist.Normal(loc[k], 0.7))

    return guide


def switching():
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6], dtype=torch.float64)))
    pyro.sample("z", dist.Normal(1.5 * k - 0.5, 1.2))


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceGraph_ELBO])
def test_gradient_of_components_with_discrete_sites(kind):
    """Sites without a path are scored at the auxiliary site; the exact gradient is by enumeration and quadrature."""
    guide = AutoMixture([discrete_part(0.2), discrete_part(0.7)], switching)
    guide()
    store = pyro.get_param_store()
    names = [f"{kind}_{probs}" for kind in "pm" for probs in (0.2, 0.7)]
    leaves = [guide.logits, *(store[name].unconstrained() for name in names)]
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    elbo = 0.0
    for k in range(2):
        log_p = math.log([0.4, 0.6][k]) + dist.Normal(1.5 * k - 0.5, 1.2).log_prob(z)
        parts = []
        for probs in (0.2, 0.7):
            p = store[f"p_{probs}"]
            parts.append((p[k] / p.sum()).log() + dist.Normal(store[f"m_{probs}"][k], 0.7).log_prob(z))
        log_q = (torch.stack(parts, -1) + guide.logits.log_softmax(-1)).logsumexp(-1)
        elbo = elbo + torch.trapezoid(log_q.exp() * (log_p - log_q), z)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(elbo, leaves)])
    loss, samples = kind(500, vectorize_particles=True, max_plate_nesting=0), []
    for _ in range(100):
        loss.loss_and_grads(switching, guide)
        samples.append(torch.cat([-leaf.grad.flatten() for leaf in leaves]))
        for leaf in leaves:
            leaf.grad = None
    assert_mean(torch.stack(samples), exact, detect=0.1, what="the gradient")


def test_fit_finds_both_modes():
    guide = AutoMixture([AutoNormal(scalar, init_loc_fn=at(m), init_scale=0.4) for m in (-0.5, 0.5)])
    loss = MonteCarloELBO(20, vectorize_particles=True)
    svi = SVI(scalar, guide, pyro.optim.Adam({"lr": 0.08}), loss)
    for _ in range(150):
        svi.step()
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    log_p = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z.abs(), 0.7).log_prob(torch.tensor(1.3).double())
    evidence = torch.trapezoid(log_p.exp(), z).log().item()
    with torch.no_grad():
        many = MonteCarloELBO(20_000, vectorize_particles=True)
        assert evidence - 0.15 < -many.loss(scalar, guide) < evidence + 0.02
    assert guide.component_0.median()["z"] < -0.5 < 0.5 < guide.component_1.median()["z"]
    assert (guide.weights - 0.5).abs().max() < 0.1


# The interface ----------------------------------------------------------------------------------------------------


def test_components_of_other_kinds():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def by_hand(x):
        mu = pyro.sample("mu", dist.Normal(torch.ones((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu, 1.0))

    guide = AutoMixture([AutoExact(model), by_hand, AutoMultivariateNormal(model)])
    guide(X)
    guide.logits.data.copy_(torch.tensor([60.0, 0.0, 0.0]))
    evidence = AutoExact(model).posterior(X).log_evidence
    assert math.isclose(-Trace_ELBO(3).loss(model, guide, X), evidence, rel_tol=1e-9)
    guide.logits.data.zero_()
    assert -Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, X) < evidence


def test_minibatches_per_element():
    guide = AutoMixture(
        [AutoNormal(local, init_loc_fn=at(m)) for m in (-1.0, 1.0)],
        plate="data",
        create_plates=lambda x, size: pyro.plate("data", len(x), subsample_size=size, dim=-1),
    )
    svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert all(math.isfinite(svi.step(X, 2)) for _ in range(5))
    particles = draw(local, guide, (X, 2))
    assert float(particles.guide["z"].scale) == 1.5 and particles.guide["z"].value.shape == (2,)


def test_rows_that_the_model_chooses_and_data_of_another_size():
    def model(x, size, index=None):
        with pyro.plate("data", size, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoMixture([AutoMeanField(model) for _ in range(2)], plate="data")
    guide(X, 3)
    with torch.no_grad():
        for part in guide.components:
            part.contexts.z.copy_(torch.tensor([[0.0, -20.0], [10.0, -20.0], [20.0, -20.0]]))
    index = torch.tensor([2, 0])
    for twin in (guide, copy.deepcopy(guide)):
        assert twin(X[index], 3, index)["z"].round().tolist() == [20.0, 0.0]
    with pytest.raises(ModelError, match="unpickled, without its model"):
        pickle.loads(pickle.dumps(guide))(X[index], 3, index)
    pyro.clear_param_store()
    guide = AutoMixture([AutoAmortized(model) for _ in range(2)])
    assert guide(X, 3)["z"].shape == (3,) and guide(X.repeat(3), 9)["z"].shape == (9,)
    assert math.isfinite(Trace_ELBO().loss(model, guide, X.repeat(3), 9))


def test_copies_before_the_first_call():
    guide = pair(nested)
    assert copy.deepcopy(guide)(X)["z"].shape == (3, 2) and guide.prototype_trace is None
    pickle.dumps(guide)
    pyro.clear_param_store()
    assert guide(X)["z"].shape == (3, 2), "a copy or a pickle has taken the model away"


def test_in_a_list_of_guides():
    def model(x):
        nested(x)
        pyro.sample("w", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 1.0))

    guide = AutoGuideList(model)
    guide.append(pair(poutine.block(model, hide=["w"])))
    guide.append(AutoNormal(poutine.block(model, hide=["mu", "z"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert all(math.isfinite(svi.step(X)) for _ in range(3)) and set(guide(X)) == {"mu", "z", "w"}


def test_first_call_creates_every_parameter():
    guide = pair(nested)
    guide(X)
    before = [name for name, _ in guide.named_parameters()]
    assert len(before) == 9 and guide.logits.dtype == X.dtype
    svi = SVI(nested, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(4, vectorize_particles=True))
    for _ in range(3):
        svi.step(X)
    assert [name for name, _ in guide.named_parameters()] == before
    assert all(p.grad is not None for p in guide.parameters())


def test_copies_and_state_dict():
    guide = pair(nested)
    guide(X)
    guide.logits.data.copy_(torch.tensor([0.4, -0.7]))
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    loaded = pickle.loads(pickle.dumps(guide))
    assert torch.equal(loaded.weights, guide.weights) and loaded(X)["z"].shape == (3, 2)
    with pyro.settings.context(module_local_params=True):
        fresh = pair(nested)
        fresh(X)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        for twin in (fresh, copy.deepcopy(fresh)):
            assert torch.equal(twin.weights, guide.weights) and twin(X)["z"].shape == (3, 2)


def test_predictive():
    guide = pair(nested)
    for parallel in (False, True):
        assert Predictive(nested, guide=guide, num_samples=5, parallel=parallel)(X)["z"].shape == (5, 3, 2)


# Errors -----------------------------------------------------------------------------------------------------------


def transformed_by_hand(x):
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(u.exp()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


REFUSED = [
    (lambda: [AutoNormal(nested), AutoDelta(nested)], {}, nested, r"component 1 \(AutoDelta\): got point masses"),
    (
        lambda: [AutoNormal(nested), AutoNormal(poutine.block(nested, hide=["mu"]))],
        {},
        nested,
        r"component 1 .* got sites \['z'\].*\['mu', 'z'\]",
    ),
    (lambda: [AutoNormal(nested), transformed_by_hand], {}, nested, r"auxiliary site 'u': got Normal"),
    (
        lambda: [AutoNormal(nested), AutoNormal(nested)],
        {"plate": "data"},
        nested,
        r"element of plate 'data': got latent 'mu'",
    ),
    (
        lambda: [AutoNormal(local), AutoMultivariateNormal(local)],
        {"plate": "data"},
        local,
        r"component 1 .* got site '_.*_latent' outside plate 'data'",
    ),
]


@pytest.mark.parametrize(("guides", "options", "model", "match"), REFUSED, ids=range(len(REFUSED)))
def test_refused(guides, options, model, match):
    guide = AutoMixture(guides(), model, **options)
    for _ in range(2):
        with pytest.raises(ModelError, match=match):
            guide(X)


def test_minibatch_of_a_joint_mixture():
    guide = AutoMixture([AutoNormal(lambda x: local(x, 2)), AutoNormal(lambda x: local(x, 2))])
    with pytest.raises(ModelError, match=r"density of 'z': got 2 of 3 data.*plate='data'"):
        guide(X)


@pytest.mark.parametrize("guides", [[], [AutoNormal(nested)], [nested, nested]], ids=["none", "one", "no model"])
def test_too_few(guides):
    with pytest.raises(EmvaeError, match=r"`AutoMixture` cannot be made: got [012] guides"):
        AutoMixture(guides)


def test_no_quantiles():
    with pytest.raises(EmvaeError, match="got a mixture of guides"):
        pair(nested).median(X)


def test_empty_data():
    with pytest.raises(DataError, match="empty data"):
        pair(local)(X[:0])
