r"""Guides that build themselves from the model: `AutoAmortized`."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints

from pyro_emvae._checks import DataError, EmvaeError, ModelError
from pyro_emvae.families import Normal
from pyro_emvae.guides import AutoAmortized
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.particles import draw, replay, vectorizable
from pyro_emvae.problems import digits_vae, linear_gaussian
from pyro_emvae.testing import check_guide

WEIGHT = torch.tensor([[1.4, -0.5], [0.3, 1.1], [-0.9, 0.6]])
DATA = torch.tensor([[0.3, -1.0, 2.0], [1.1, 0.4, -0.2], [-0.7, 0.9, 0.5], [2.0, -0.1, 0.8], [-1.5, 0.6, 0.1]])


def model(x, index=None, size=None, subsample_size=None):
    """A factor model whose plate is opened in each of Pyro's ways."""
    size = len(x) if size is None else size
    with pyro.plate("data", size, subsample=index, subsample_size=subsample_size) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        obs = x if len(x) == len(z.mT[..., 0]) or subsample_size is None else x[rows]
        pyro.sample("x", dist.Normal(z @ WEIGHT.to(x).T, 0.7).to_event(1), obs=obs)


def two_sites(x):
    """A vector, then a positive scalar that depends on it, in one plate."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2.0 + z[..., 0] ** 2, 1.5))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T, rate.unsqueeze(-1)).to_event(1), obs=x)


def encoder(columns=4, rows=3, **kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(rows, 8, **kwargs), nn.Tanh(), nn.Linear(8, columns, **kwargs))


def trace(guide, *args, **kwargs):
    return poutine.trace(guide).get_trace(*args, **kwargs)


def normal(context):
    return Normal().distribution(context, torch.Size([context.shape[-1] // 2]))


# The guide is the encoder's output --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_site_is_the_encoders_output(dtype, device):
    net, x = encoder(dtype=dtype, device=device), DATA.to(device, dtype)
    tr = trace(AutoAmortized(model, net), x)
    tr.compute_log_prob()
    fn = normal(net(x))
    z = tr.nodes["z"]
    assert torch.equal(z["fn"].mean, fn.mean) and torch.equal(z["fn"].stddev, fn.stddev)
    assert torch.equal(z["log_prob"], fn.log_prob(z["value"]))
    assert z["value"].dtype == dtype and z["value"].device == x.device and not z["infer"]
    assert [name for name, node in tr.nodes.items() if node["type"] == "sample"] == ["z"]


def test_equal_data_equal_output_and_permutation():
    guide, order = AutoAmortized(model, encoder()), torch.tensor([2, 0, 4, 1, 3])
    one = trace(guide, DATA).nodes["z"]["fn"]
    two = trace(guide, DATA[order]).nodes["z"]["fn"]
    twice = trace(guide, DATA[[1, 1]]).nodes["z"]["fn"]
    assert torch.allclose(one.mean[order], two.mean) and torch.allclose(one.stddev[order], two.stddev)
    assert torch.equal(twice.mean[0], twice.mean[1])


def test_two_sites_split_the_columns_in_the_models_order():
    net = encoder(6)
    guide = AutoAmortized(two_sites, net)
    tr = trace(guide, DATA)
    context = net(DATA)
    assert guide.num_features == {"z": 4, "rate": 2}
    assert torch.equal(tr.nodes["z"]["fn"].mean, context[:, :2])
    assert torch.equal(tr.nodes["rate_unconstrained"]["fn"].mean, context[:, 4])
    assert torch.equal(tr.nodes["rate"]["value"], tr.nodes["rate_unconstrained"]["value"].exp())
    assert tr.nodes["rate_unconstrained"]["infer"] == {"is_auxiliary": True}


@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_rows_lie_at_the_plates_dim(dim):
    def model(x):
        with pyro.plate("data", len(x), dim=dim):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoAmortized(model, encoder())
    shape = torch.Size([5] + [1] * (-dim - 1))
    assert trace(guide, DATA).nodes["z"]["fn"].batch_shape == shape
    assert guide.median(DATA)["z"].shape == (*shape, 2)


def test_inner_plate_of_observations():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortized(model, encoder(2))
    assert guide(DATA)["z"].shape == (5, 1)
    assert math.isfinite(MonteCarloELBO(4, vectorize_particles=True).loss(model, guide, DATA))


# Losses -----------------------------------------------------------------------------------------------------------

LOSSES = [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, MonteCarloELBO]


@pytest.mark.parametrize("how", [(1, None), (4, False), (4, True)], ids=["1", "4 looped", "4 vectorized"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sites", [model, two_sites])
def test_losses_train_every_parameter(sites, loss, how):
    net = encoder(4 if sites is model else 6)
    guide = AutoAmortized(sites, net)
    svi = SVI(sites, guide, pyro.optim.Adam({"lr": 0.01}), loss(how[0], vectorize_particles=bool(how[1])))
    before = [p.clone() for p in net.parameters()]
    assert all(math.isfinite(svi.step(DATA)) for _ in range(2))
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert sorted(pyro.get_param_store()) == sorted(f"AutoAmortized.encoder$$${n}" for n, _ in net.named_parameters())


@pytest.mark.parametrize("sites", [model, two_sites])
def test_vectorizable(sites):
    guide = AutoAmortized(sites, encoder(4 if sites is model else 6))
    assert vectorizable(sites, guide, (DATA,), {}) == (True, 1, "")
    values = MonteCarloELBO(3).particles(sites, guide, (DATA,), {}).values("z")
    assert values.shape == (3, 5, 2) and not torch.equal(values[0], values[1])


def test_elbo_equals_a_guide_written_by_hand():
    net = encoder()

    def by_hand(x, index, size):
        pyro.module("by_hand", net)
        with pyro.plate("data", size, subsample=index):
            pyro.sample("z", normal(net(x)))

    args = DATA[:2], torch.tensor([4, 0]), 50
    auto, losses = AutoAmortized(model, net), []
    auto(*args)
    for guide in (auto, by_hand):
        torch.manual_seed(3)
        net.zero_grad()
        value = Trace_ELBO().loss_and_grads(model, guide, *args)
        losses.append((value, [p.grad.clone() for p in net.parameters()]))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))


def test_linear_vae_reaches_the_maximum_of_the_evidence():
    """The diagonal family contains the posterior at the best rotation of the weights; the last ELBO is exact."""
    problem = linear_gaussian()
    guide, (x,) = AutoAmortized(problem.model, nn.Linear(3, 4, dtype=torch.float64)), problem.args
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / 1000)})
    svi = SVI(problem.model, guide, optim, TraceMeanField_ELBO(16, vectorize_particles=True))
    for _ in range(1000):
        svi.step(x)
    q = trace(guide, x).nodes["z"]["fn"].base_dist
    weight, bias, sigma = (pyro.param(name) for name in ("weight", "bias", "sigma"))
    likelihood = dist.Normal(q.mean @ weight.T + bias, sigma).log_prob(x).sum()
    likelihood = likelihood - 0.5 * (q.variance @ weight.T**2).sum() / sigma**2
    elbo = (likelihood - torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)).sum()).item()
    evidence = problem.log_evidence({name: pyro.param(name) for name in problem.model_params}).item()
    assert evidence - 0.1 < elbo < evidence
    assert problem.log_evidence(problem.maximum()).item() - 0.05 < evidence


# Plates -----------------------------------------------------------------------------------------------------------


def plates(guide, *args, **kwargs):
    """Return the sizes that guide and model see at site z, after a check that they agree."""
    particles = draw(model, guide, args, kwargs)
    one, two = particles.guide["z"], particles.model["z"]
    (frame,), (other,) = one.frames, two.frames
    assert (frame.name, frame.dim, frame.size, frame.full_size) == (other.name, other.dim, other.size, other.full_size)
    assert float(one.scale) == float(two.scale)
    return frame.size, frame.full_size


def test_plates_of_every_kind_and_size():
    """The same guide follows the model from whole data to minibatches and validation data, in any order."""
    guide, index = AutoAmortized(model, encoder()), torch.tensor([3, 0])
    calls = [
        ((DATA,), (5, 5)),
        ((DATA[:4],), (4, 4)),
        ((DATA[:2], index, 100), (2, 100)),
        ((DATA[:2], index, 40), (2, 40)),
        ((DATA[:3], torch.arange(3), 100), (3, 100)),
        ((DATA[:2], None, 100, 2), (2, 100)),
        ((DATA, None, None, 2), (2, 5)),
        ((DATA[:4], None, None, 3), (3, 4)),
        ((DATA,), (5, 5)),
    ]
    for first in range(len(calls)):
        guide = AutoAmortized(model, guide.encoder)
        for args, sizes in calls[first:] + calls[:first]:
            assert plates(guide, *args) == sizes


def test_the_models_own_indices_reach_the_model():
    seen = []

    def model(x, index):
        with pyro.plate("data", 5, subsample=index) as rows:
            seen.append(rows)
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    draw(model, AutoAmortized(model, encoder()), (DATA[:2], torch.tensor([3, 1])))
    assert all(torch.equal(rows, torch.tensor([3, 1])) for rows in seen)


def test_drawn_indices_choose_the_encoders_rows():
    net = encoder()
    guide = AutoAmortized(model, net)
    for _ in range(5):
        particles = draw(model, guide, (DATA,), {"subsample_size": 2})
        fn = particles.guide["z"].fn
        tr = trace(guide, DATA, subsample_size=2)
        rows = tr.nodes["data"]["value"]
        assert len(rows) == 2 and fn.batch_shape == (2,)
        assert torch.allclose(tr.nodes["z"]["fn"].mean, net(DATA)[rows][:, :2])


@pytest.mark.parametrize("source", ["given", "drawn"])
def test_minibatch_gradients_average_to_the_whole(source):
    """Exact, over all minibatches: the mean of the scaled gradient of log q at fixed latents is that of all data."""
    net = encoder(dtype=torch.float64)
    guide, x = AutoAmortized(model, net), DATA.double()
    z = torch.randn(5, 2, dtype=torch.float64)

    def gradients(log_q):
        return torch.cat([g.flatten() for g in torch.autograd.grad(log_q, list(net.parameters()))])

    whole = gradients(draw(model, guide, (x,), values={"z": (z, None)}).log_q.sum())
    batches = []
    for pair in itertools.combinations(range(5), 2):
        rows = torch.tensor(pair)
        values = {"z": (z[rows], None)}
        if source == "given":
            particles = draw(model, guide, (x[rows], rows, 5), values=values)
        else:
            particles = draw(model, guide, (x,), {"subsample_size": 2}, values={**values, "data": (rows, None)})
        batches.append(gradients(particles.log_q.sum()))
    assert torch.allclose(torch.stack(batches).mean(0), whole, rtol=1e-10)


def test_the_model_is_run_once_per_shape_and_no_further_than_its_first_local_site():
    calls = []

    def model(x, size):
        calls.append("start")
        torch.rand(())
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            calls.append("end")
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, 1.0).to_event(1), obs=x)

    guide = AutoAmortized(model, encoder())
    for _ in range(3):
        guide(DATA, 10)
    assert calls == ["start", "end"]
    generator = torch.get_rng_state()
    guide.median(DATA[:2], 10)
    assert torch.equal(torch.get_rng_state(), generator) and calls == ["start", "end", "start"]
    guide(DATA[:2], 10), guide(DATA, 10), guide(DATA, 11)
    assert calls == ["start", "end", "start", "start"]


def test_set_up_changes_no_generator_mode_or_buffer():
    norm = nn.BatchNorm1d(3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(norm(z @ WEIGHT.T), 1.0).to_event(1), obs=x)

    guide, generator = AutoAmortized(model, encoder()), torch.get_rng_state()
    guide._setup_prototype(DATA)
    assert torch.equal(torch.get_rng_state(), generator)
    assert norm.training and int(norm.num_batches_tracked) == 0


def test_create_plates():
    index = torch.tensor([4, 2])

    def model(x):
        with pyro.plate("data", 5, subsample=index):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    net = encoder()
    guide = AutoAmortized(model, net, create_plates=lambda x: pyro.plate("data", 5, subsample=index, dim=-1))
    assert torch.allclose(trace(guide, DATA).nodes["z"]["fn"].mean, net(DATA[index])[:, :2])


def test_encoder_input():
    net = encoder(4, rows=4)
    inputs = AutoAmortized(
        lambda **batch: model(batch["x"]), net, encoder_input=lambda x, label: torch.cat([x, label[:, None]], 1)
    )
    label = torch.arange(5.0)
    assert torch.equal(
        trace(inputs, x=DATA, label=label).nodes["z"]["fn"].mean, net(torch.cat([DATA, label[:, None]], 1))[:, :2]
    )


def test_encoder_of_several_arguments():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = encoder()

        def forward(self, x, shift):
            return self.net(x + shift)

    net, shift = Pair(), torch.arange(5.0).unsqueeze(1)
    guide = AutoAmortized(model, net, encoder_input=lambda x, *_, **__: (x, shift))
    tr = trace(guide, DATA, subsample_size=2)
    rows = tr.nodes["data"]["value"]
    assert torch.allclose(tr.nodes["z"]["fn"].mean, net(DATA, shift)[rows][:, :2])


def test_given_indices_of_whole_data_need_the_batch():
    def model(x, index):
        with pyro.plate("data", 5, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, 1.0).to_event(1), obs=x[index])

    index, net = torch.tensor([3, 1]), encoder()
    with pytest.raises(ModelError, match=r"got a tensor of shape \(5, 4\).*\(2, 4\).*encoder_input=lambda x, index"):
        AutoAmortized(model, net)(DATA, index)
    pyro.clear_param_store()
    guide = AutoAmortized(model, net, encoder_input=lambda x, index: x[index])
    assert torch.equal(trace(guide, DATA, index).nodes["z"]["fn"].mean, net(DATA[index])[:, :2])


# Constrained supports ---------------------------------------------------------------------------------------------

PRIORS = [
    dist.Gamma(2.0, 1.5),
    dist.LogNormal(0.3, 0.8),
    dist.Beta(2.0, 3.0),
    dist.Uniform(-1.0, 4.0),
    dist.HalfCauchy(1.0),
    dist.Gamma(torch.tensor([2.0, 1.0]), 1.0).to_event(1),
    dist.Uniform(torch.tensor([0.0, -3.0]), torch.tensor([1.0, 2.0])).to_event(1),
    dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    dist.LKJCholesky(3, 1.0),
]


def under(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)

    return model


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_density_of_a_constrained_site_has_the_jacobian(prior):
    """log q(z) = log q(u) - log |det dz/du|, with the Jacobian of autograd (volume element for curved supports)."""
    model = under(prior)
    size = math.prod(biject_shape(prior))
    guide = AutoAmortized(model, encoder(2 * size))
    tr = trace(guide, DATA)
    assert tr.nodes["z"]["value"].shape == (5, *prior.event_shape)
    assert tr.nodes["z_unconstrained"]["value"].shape == (5, *biject_shape(prior))
    particles = replay(model, guide, {"z_unconstrained": torch.randn(5, *biject_shape(prior))}, (DATA,))
    site, free = particles.guide["z"], particles.guide["z_unconstrained"]
    assert prior.support.check(site.value).all() and site.fn.event_shape == prior.event_shape
    transform = torch.distributions.biject_to(prior.support)
    expected = -transform.log_abs_det_jacobian(free.value, site.value)
    assert torch.allclose(site.log_prob, expected.reshape(5, -1).sum(-1), rtol=1e-5)
    if size == 1 or prior.event_shape == (2,):
        jacobian = torch.func.vmap(torch.func.jacrev(transform))(free.value).reshape(5, size, size)
        assert torch.allclose(site.log_prob, -torch.linalg.slogdet(jacobian).logabsdet, atol=1e-4)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_constrained_sites_vectorize(prior, dim):
    def model(x):
        with pyro.plate("data", len(x), dim=dim):
            pyro.sample("z", prior)

    guide = AutoAmortized(model, encoder(2 * math.prod(biject_shape(prior))))
    assert vectorizable(model, guide, (DATA,), {}) == (True, -dim, "")
    values = MonteCarloELBO(3).particles(model, guide, (DATA,), {}).guide["z"].value
    assert values.shape == (3, 5, *[1] * (-dim - 1), *prior.event_shape)
    assert guide.median(DATA)["z"].shape == values.shape[1:]


def biject_shape(prior):
    return torch.distributions.biject_to(prior.support).inverse_shape(prior.event_shape)


@pytest.mark.parametrize("prior", [p for p in PRIORS if p.event_shape == ()], ids=str)
def test_density_of_a_constrained_site_integrates_to_one(prior):
    model, net = under(prior), encoder(2, dtype=torch.float64)
    guide = AutoAmortized(model, net)
    x = DATA[:1].double().expand(40_001, 3)
    transform = torch.distributions.biject_to(prior.support)
    z = transform(torch.linspace(-12, 12, len(x), dtype=torch.float64))
    density = replay(model, guide, {"z_unconstrained": transform.inv(z)}, (x,)).guide
    log_q = density["z"].log_prob + density["z_unconstrained"].log_prob
    assert abs(torch.trapezoid(log_q.exp(), z) - 1) < 1e-3


def test_weights_of_a_constrained_site_average_to_the_evidence():
    """By quadrature over q: the mean of p(x, z) / q(z) is p(x), negative binomial for Poisson counts of Gamma rates."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0).to(x), 1.5))
            pyro.sample("x", dist.Poisson(z), obs=x[:, 0])

    u = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    x = torch.full((len(u), 1), 3.0, dtype=torch.float64)
    guide = AutoAmortized(model, nn.Linear(1, 2, dtype=torch.float64))
    particles = replay(model, guide, {"z_unconstrained": u}, (x,))
    log_q = sum(site.log_prob for site in particles.guide.values())
    log_p = sum(site.log_prob for site in particles.model.values())
    q = particles.guide["z_unconstrained"].log_prob.exp()
    exact = dist.NegativeBinomial(2.0, probs=torch.tensor(0.4, dtype=torch.float64)).log_prob(x[0, 0])
    assert abs(torch.trapezoid(q * (log_p - log_q).exp(), u).log() - exact) < 1e-10


def test_bounds_keep_their_data_apart_from_their_features():
    model = under(dist.Uniform(torch.tensor([0.0, -3.0]), torch.tensor([1.0, 2.0])).to_event(1))
    guide = AutoAmortized(model, encoder(4))
    guide(DATA)
    value = guide(DATA.repeat(100, 1))["z"]
    assert (value.amin(0) > torch.tensor([0.0, -3.0])).all() and (value.amax(0) < torch.tensor([1.0, 2.0])).all()
    assert value[:, 1].amin() < 0 and value[:, 1].amax() > 1


# Pyro's contract --------------------------------------------------------------------------------------------------

CHECKED = [
    (model, (DATA[:2],), {}),
    (model, (DATA[:2], torch.tensor([3, 0]), 10), {}),
    (model, (DATA,), {"subsample_size": 2}),
    (two_sites, (DATA[:2],), {}),
]


@pytest.mark.parametrize(("model", "args", "kwargs"), CHECKED, ids=["whole", "given", "drawn", "two sites"])
def test_check_guide(model, args, kwargs):
    columns = 4 if model is not two_sites else 6
    check_guide(lambda model: AutoAmortized(model, encoder(columns)), model, args, kwargs)


def test_median_and_quantiles():
    net = encoder(6)
    guide = AutoAmortized(two_sites, net)
    context = net(DATA)
    median, quantiles = guide.median(DATA), guide.quantiles([0.1, 0.5, 0.9], DATA)
    assert torch.equal(median["z"], context[:, :2]) and torch.allclose(median["rate"], context[:, 4].exp())
    assert quantiles["z"].shape == (3, 5, 2) and quantiles["rate"].shape == (3, 5)
    assert torch.equal(quantiles["rate"][1], median["rate"]) and (quantiles["rate"].diff(dim=0) > 0).all()
    level = normal(context[:, :4]).base_dist.cdf(quantiles["z"][2])
    assert torch.allclose(level, torch.tensor(0.9), atol=1e-5) and not median["z"].requires_grad


def test_median_of_whole_data_under_a_drawn_plate():
    net = encoder()
    guide = AutoAmortized(model, net)
    assert torch.equal(guide.median(DATA, subsample_size=2)["z"], net(DATA)[:, :2])


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    guide = AutoAmortized(two_sites, encoder(6))
    draws = Predictive(guide, num_samples=7, parallel=parallel)(DATA)
    assert draws["z"].shape == (7, 5, 2) and draws["rate"].shape == (7, 5)
    replicate = Predictive(two_sites, guide=guide, num_samples=7, parallel=parallel, return_sites=("x", "z"))
    assert replicate(DATA[:3])["z"].shape == (7, 3, 2)


def test_auto_guide_list_with_a_global_latent():
    def model(x, subsample_size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            z = pyro.sample("z", dist.Normal(mu.unsqueeze(-1).expand(*mu.shape, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, 1.0).to_event(1), obs=x[rows])

    net = encoder()
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["z"])))
    guide.append(AutoAmortized(poutine.block(model, hide=["mu"]), net))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(DATA, 2)) for _ in range(3))
    assert set(guide(DATA, 2)) == {"mu", "z"} and set(guide.median(DATA, 2)) == {"mu", "z"}
    tr = trace(guide, DATA, 2)
    rows = tr.nodes["data"]["value"]
    assert torch.allclose(tr.nodes["z"]["fn"].mean, net(DATA)[rows][:, :2])
    assert "AutoGuideList.1.encoder$$$0.weight" in pyro.get_param_store()


def test_enumerated_discrete_site_beside_it():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z @ WEIGHT.T + k.unsqueeze(-1), 1.0).to_event(1), obs=x)

    guide = AutoAmortized(poutine.block(model, hide=["k"]), encoder())
    assert math.isfinite(TraceEnum_ELBO().loss_and_grads(model, guide, DATA))


@pytest.mark.parametrize("local", [False, True])
def test_module_local_params(local):
    with pyro.settings.context(module_local_params=local):
        net, other = encoder(), encoder(dtype=torch.float64)
        guide = AutoAmortized(model, net)
        loss = Trace_ELBO()(model, guide)
        before = [name for name, _ in guide.named_parameters()]
        loss(DATA).backward()
        assert (
            [name for name, _ in guide.named_parameters()]
            == before
            == [f"encoder.{n}" for n, _ in net.named_parameters()]
        )
        assert all(p.grad is not None for p in net.parameters())
        assert len(pyro.get_param_store()) == (0 if local else 4)
        if local:
            assert AutoAmortized(model, other)(DATA.double())["z"].dtype == torch.float64


def test_pyro_module_encoder():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[nn.Linear](3, 4)

        def forward(self, x):
            return self.layer(x)

    net = Net()
    guide = AutoAmortized(model, net)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA)
    assert set(pyro.get_param_store()) == {"AutoAmortized.encoder.layer.weight", "AutoAmortized.encoder.layer.bias"}
    assert net.layer.weight.shape == (4, 3)


@pytest.mark.parametrize("set_up", [False, True])
def test_deepcopy_is_independent_and_keeps_the_model(set_up):
    with pyro.settings.context(module_local_params=True):
        guide = AutoAmortized(two_sites, encoder(6))
        if set_up:
            guide(DATA)
        other = copy.deepcopy(guide)
        with torch.no_grad():
            for p in guide.parameters():
                p.add_(1.0)
        assert not torch.equal(guide.median(DATA)["z"], other.median(DATA)["z"])
        assert other(DATA[:2])["rate"].shape == guide(DATA[:2])["rate"].shape == (2,)
        loss = Trace_ELBO()(two_sites, other)
        loss(DATA).backward()
        assert all(p.grad is not None for p in other.parameters())
        assert all(p.grad is None for p in guide.parameters())


def test_pickle():
    guide = AutoAmortized(model, encoder())
    guide(DATA[:2], torch.tensor([1, 0]), 100)
    data = pickle.dumps(guide)
    assert guide(DATA)["z"].shape == (5, 2), "the pickled guide goes on working"
    pyro.clear_param_store()
    loaded = pickle.loads(data)
    assert torch.equal(loaded.median(DATA)["z"], guide.median(DATA)["z"])
    assert trace(loaded, DATA[:3], torch.arange(3), 100).nodes["z"]["cond_indep_stack"][0].full_size == 100
    assert len(data) < 20_000 and DATA.numpy().tobytes() not in data


def test_pickle_before_set_up_and_torch_save():
    buffer = io.BytesIO()
    torch.save(AutoAmortized(model, encoder()).state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    guide = AutoAmortized(model, net)
    guide(DATA)
    guide.load_state_dict(state)
    assert torch.equal(guide.median(DATA)["z"], encoder()(DATA)[:, :2])
    assert torch.equal(pyro.param("AutoAmortized.encoder$$$0.weight"), net[0].weight)


def test_estimator_annotation_is_taken_over():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"estimator": "leave_one_out"})
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0), infer={"estimator": "score"})
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, rate.unsqueeze(-1)).to_event(1), obs=x)

    loss = MonteCarloELBO(4)
    assert math.isfinite(loss.loss_and_grads(model, AutoAmortized(model, encoder(6)), DATA))
    kinds = {name: type(estimator).__name__ for name, estimator in loss.resolved.items()}
    assert kinds == {"z": "LeaveOneOut", "rate_unconstrained": "Score", "rate": "Pathwise"}


def test_digits_model_takes_any_batch():
    problem = digits_vae(num_train=100)
    x = problem.args[0].float()
    decoder_model = lambda x, index=None: problem.model(x.double(), index)  # noqa: E731
    guide = AutoAmortized(decoder_model, encoder(6, rows=64))
    for batch in (x, x[:10], x[10:17]):
        tr = trace(guide, batch)
        assert tr.nodes["z"]["cond_indep_stack"][0].full_size == 100 and len(tr.nodes["z"]["value"]) == len(batch)


def test_repr():
    guide = AutoAmortized(model, encoder())
    guide(DATA)
    assert "plate='data', z: 4 columns of Normal(init_scale=1.0)" in repr(guide)


# Errors -----------------------------------------------------------------------------------------------------------


def no_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z @ WEIGHT.T, 1.0).expand([5, 3]).to_event(2), obs=x)


def no_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)


def two_plates(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def two_in_both(x):
    with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def discrete(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Poisson(1.0))


def data_support(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(0.0, 1.0 + x[:, 0] ** 2))


def odd_support(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.ProjectedNormal(torch.zeros(3)))


REFUSED = [
    (no_plate, {}, r"got latents \['z'\] outside every plate.*pyro.plate.*AutoNormal"),
    (no_latent, {}, r"got a model without latents"),
    (two_plates, {}, r"got latents in plates \['rows', 'columns'\].*Write amortize='rows'"),
    (two_plates, {"amortize": "row"}, r"plate 'row'.*Did you mean 'rows'\?"),
    (two_in_both, {}, r"got latents in plates \['rows', 'columns'\].*Write amortize='rows'"),
    (discrete, {}, r"site 'k': got a discrete site \(Poisson\).*AutoGuideList"),
    (discrete, {"family": "normal"}, r"site 'k': got Poisson"),
    (data_support, {}, r"site 'z': got support .* that differs between data"),
    (odd_support, {}, r"site 'z': got support Sphere.*biject_to"),
]


@pytest.mark.parametrize(("model", "options", "match"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_refused_models(model, options, match):
    """Also the second call: nothing of a failed set-up stays."""
    guide = AutoAmortized(model, encoder(), **options)
    for _ in range(2):
        with pytest.raises(ModelError, match=match):
            guide(DATA)
    assert guide.prototype_trace is None


CONTEXTS = [
    (lambda x: x, r"got a tensor of shape \(5, 3\).*\(5, 4\).*4 for 'z'"),
    (lambda x: x[:4, [0, 1, 2, 0]], r"got a tensor of shape \(4, 4\).*\(5, 4\)"),
    (lambda x: x[:, None, [0, 1, 2, 0]], r"got a tensor of shape \(5, 1, 4\)"),
    (lambda x: (x, x), r"got tuple"),
    (lambda x: x.sum(), r"got a tensor of shape \(\)"),
]


@pytest.mark.parametrize(("function", "match"), CONTEXTS)
def test_wrong_encoder_output(function, match):
    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(ModelError, match=match):
        AutoAmortized(model, Net())(DATA)


@pytest.mark.parametrize("net", [lambda x: x, torch.zeros(3), nn.Linear], ids=["function", "tensor", "class"])
def test_encoder_is_no_module(net):
    with pytest.raises(EmvaeError, match=r"`AutoAmortized` cannot use its encoder: got"):
        AutoAmortized(model, net)


@pytest.mark.parametrize("family", [3, Normal, nn.Linear(2, 2)])
def test_family_is_none(family):
    with pytest.raises(EmvaeError, match=r"`AutoAmortized` cannot use its family"):
        AutoAmortized(model, encoder(), family=family)


def test_no_positional_argument():
    guide = AutoAmortized(model, encoder())
    with pytest.raises(ModelError, match=r"keywords \['x'\].*encoder_input=lambda"):
        guide(x=DATA)


def test_second_encoder_under_the_same_names():
    net = encoder()
    AutoAmortized(model, net)(DATA)
    AutoAmortized(model, net)(DATA)
    other = encoder()
    with pytest.raises(ModelError, match=r"got 'AutoAmortized.encoder\$\$\$0.weight' in the param store"):
        AutoAmortized(model, other)(DATA)
    pyro.module("AutoAmortized.encoder", other, update_module_params=True)
    assert AutoAmortized(model, other)(DATA)["z"].shape == (5, 2) and other[0].weight is net[0].weight


def test_structure_that_changes():
    def model(x, plated=True):
        with pyro.plate("data", len(x)) if plated else pyro.plate("other", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoAmortized(model, encoder())
    guide(DATA)
    with pytest.raises(ModelError, match=r"open plate 'data'.*structure"):
        guide(DATA, False)


def test_no_constraint_is_changed():
    """Bounds are reduced to one datum on a copy."""

    class Unit(dist.Uniform):
        support = constraints.interval(torch.zeros(5), torch.ones(5))

    assert AutoAmortized(under(Unit(0.0, 1.0)), encoder(2))(DATA)["z"].shape == (5,)
    assert Unit.support.lower_bound.shape == (5,)


@pytest.mark.parametrize("call", ["forward", "median"])
@pytest.mark.parametrize("used", [False, True])
def test_empty_data_are_refused(call, used):
    guide = AutoAmortized(model, encoder(4))
    if used:
        guide(DATA)
    with pytest.raises(DataError, match=rf"`AutoAmortized` cannot use empty data: got .* \(0, {DATA.shape[1]}\)"):
        getattr(guide, call)(DATA[:0])
    assert guide(DATA)["z"].shape[0] == len(DATA)


def test_empty_data_are_refused_through_an_encoder_input():
    guide = AutoAmortized(model, encoder(4), encoder_input=lambda x: x)
    with pytest.raises(DataError, match="empty data"):
        guide(DATA[:0])
