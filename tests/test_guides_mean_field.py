r"""`AutoMeanField`: free parameters per site and row, of any family, and minibatches that leave other rows alone."""

from __future__ import annotations

import copy
import io
import math
import pickle
import resource
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value

import pyro_emvae as emvae
from pyro_emvae._checks import DataError, EmvaeError, ModelError
from pyro_emvae.guides import AutoExact, AutoMeanField
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.optimizers import RowAdam
from pyro_emvae.particles import draw
from pyro_emvae.testing import check_guide

X = torch.tensor([0.7, -1.2, 2.1, 0.3], dtype=torch.float64)


def at(value):
    return value * torch.ones((), dtype=torch.float64)


def continuous(x):
    scale = pyro.sample("scale", dist.Gamma(at(3.0), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(at(0.0), 1.0))
        p = pyro.sample("p", dist.Beta(at(2.0), 2.0))
        pyro.sample("x", dist.Normal(z + p, scale), obs=x)


def discrete(x):
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(at(0.3)))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=x.dtype)))
        o = pyro.sample("o", dist.OneHotCategorical(torch.tensor([0.4, 0.6], dtype=x.dtype)))
        pyro.sample("x", dist.Normal(b + k - o[..., 0], 1.0), obs=x)


def minibatches(x, index=None, size=None):
    """Global and local latents; a nested plate in the local one."""
    mu = pyro.sample("mu", dist.Normal(at(0.0), 1.0))
    with pyro.plate("data", 4, subsample=index, subsample_size=size, dim=-2) as rows:
        with pyro.plate("features", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
        batch = x if index is not None else x[rows]
        w = pyro.sample("w", dist.Gamma(at(2.0), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), w), obs=batch[..., None])


# Sites and families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [continuous, discrete])
def test_proves_itself(model):
    check_guide(AutoMeanField, model, (X[:1],))


@pytest.mark.parametrize(
    "family",
    [{"scale": "gamma", "p": "beta"}, {"scale": "log_normal"}, "student_t", {"z": "flow"}],
    ids=["own", "log", "t", "flow"],
)
def test_proves_itself_with_other_families(family):
    check_guide(lambda model: AutoMeanField(model, family), continuous, (X[:1],))


def test_sites():
    guide = AutoMeanField(continuous, {"p": "beta"})
    tr = poutine.trace(guide).get_trace(X)
    names = [name for name, node in tr.nodes.items() if node["type"] == "sample"]
    assert names == ["data", "scale_unconstrained", "scale", "z", "p"]
    assert {n: tuple(p.shape) for n, p in guide.named_parameters()} == {
        "contexts.scale": (2,),
        "contexts.z": (4, 2),
        "contexts.p": (4, 2),
    }
    assert all(p.dtype == X.dtype for p in guide.parameters())


def test_starts_where_it_is_told():
    values = {"scale": at(1.7), "z": torch.linspace(-1, 1, 4, dtype=X.dtype), "p": at(0.3).expand(4)}
    guide = AutoMeanField(continuous, init_loc_fn=init_to_value(values=values))
    for name, value in guide.median(X).items():
        assert torch.allclose(value, values[name]), name


def test_discrete_sites_start_equal_and_reach_the_posterior():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=x.dtype)))
            pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x)

    guide = AutoMeanField(model)
    guide(X)
    assert torch.equal(guide.contexts.k, torch.zeros_like(guide.contexts.k))
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.1}),
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    )
    svi.guide = pyro.infer.config_enumerate(guide)
    for _ in range(200):
        svi.step(X)
    fn = poutine.trace(guide).get_trace(X).nodes["k"]["fn"]
    assert torch.allclose(fn.probs, AutoExact(model).posterior(X).marginal("k").probs, atol=1e-4)


@pytest.mark.parametrize("family", ["normal", "full_rank_normal"])
def test_recovers_a_posterior_inside_the_family(family):
    """KL by closed form below 1e-3 nats; full rank covariances to 2 %, the diagonal family's best by the precision."""
    precision = torch.tensor([[3.0, 0.0], [0.0, 1.5]], dtype=X.dtype)
    if family == "full_rank_normal":
        precision[0, 1] = precision[1, 0] = 1.2
    posterior = dist.MultivariateNormal(torch.tensor([0.4, -1.0], dtype=X.dtype), precision_matrix=precision)

    def model():
        prior = dist.Normal(torch.zeros(2, dtype=X.dtype), 1.0).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("data", posterior.log_prob(z) - prior.log_prob(z))

    guide = AutoMeanField(model, family)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / 250)})
    svi = SVI(model, guide, optim, MonteCarloELBO(8, vectorize_particles=True, estimator="stl"))
    for _ in range(250):
        svi.step()
    fn = poutine.trace(guide).get_trace().nodes["z"]["fn"]
    fn = getattr(fn, "base_dist", fn)
    covariance = fn.covariance_matrix if family == "full_rank_normal" else torch.diag(fn.variance)
    q = dist.MultivariateNormal(fn.mean, covariance)
    assert torch.distributions.kl_divergence(q, posterior) < 1e-3
    assert torch.allclose(covariance, posterior.covariance_matrix, rtol=0.04, atol=0.01)


def test_agrees_with_autonormal():
    """The same draws and loss as Pyro's, from the same starting point and generator."""
    found = []
    for kind in (AutoNormal, AutoMeanField):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = kind(continuous)
        guide(X)
        torch.manual_seed(1)
        found.append(Trace_ELBO().loss(continuous, guide, X))
    assert math.isclose(*found, rel_tol=1e-6)


# Minibatches ------------------------------------------------------------------------------------------------------


def rows_that_move(guide, step, *args, **kwargs):
    tables = {name: getattr(guide.contexts, name) for name in ("z", "w")}
    before = {name: table.detach().clone() for name, table in tables.items()}
    step(*args, **kwargs)
    moved = {name: (table.detach() != before[name]).any(-1).nonzero().flatten() for name, table in tables.items()}
    assert torch.equal(moved["z"], moved["w"])
    return moved["z"]


def pyro_svi(guide):
    return SVI(minibatches, guide, pyro.optim.PyroOptim(RowAdam, {"lr": 0.05}), Trace_ELBO())


def own_svi(backend):
    def make(guide):
        return emvae.SVI(minibatches, guide, pyro.optim.Adam({"lr": 0.05}), MonteCarloELBO(), backend=backend)

    return make


@pytest.mark.parametrize("make", [pyro_svi, own_svi("eager"), own_svi("graph")], ids=["pyro", "eager", "graph"])
def test_rows_outside_the_batch_stay_bit_for_bit(make):
    guide = AutoMeanField(minibatches)
    guide(X, size=2)
    svi, seen = make(guide), set()
    for index in ([3, 1], [0, 3], [2, 1], [1, 3], [0, 2]):
        rows = torch.tensor(index)
        moved = rows_that_move(guide, svi.step, X[rows], rows)
        assert sorted(moved.tolist()) == sorted(index)
        seen.update(index)
    assert seen == {0, 1, 2, 3}


def test_drawn_minibatches_move_their_rows():
    guide = AutoMeanField(minibatches)
    guide(X, size=2)
    svi = pyro_svi(guide)
    for _ in range(5):
        assert len(rows_that_move(guide, svi.step, X, size=2)) == 2


def test_minibatch_gradients_average_to_the_whole():
    """Exact, over all minibatches, at fixed draws; those of the table are sparse, and dense ones are equal."""
    z, w = torch.randn(4, 2, dtype=X.dtype), torch.rand(4, 1, dtype=X.dtype) + 0.5
    for sparse in (True, False):
        pyro.clear_param_store()
        guide = AutoMeanField(minibatches, {"w": "gamma"}, sparse=sparse)
        guide(X, size=2)

        def gradient(index, guide=guide, sparse=sparse):
            rows = torch.tensor(index)
            values = {"z": (z[rows], None), "w": (w[rows], None)}
            log_q = draw(minibatches, guide, (X[rows], rows), values=values).log_q.sum()
            log_q = log_q - draw(minibatches, guide, (X[rows], rows), values=values).guide["mu"].scaled.sum() * 0
            grads = torch.autograd.grad(log_q, [guide.contexts.z, guide.contexts.w])
            assert all(g.is_sparse == (sparse and len(index) < 4) for g in grads)
            return torch.cat([(g.to_dense() if g.is_sparse else g).flatten(1) for g in grads], 1)

        pairs = [(i, j) for i in range(4) for j in range(i)]
        mean = torch.stack([gradient(list(pair)) for pair in pairs]).mean(0)
        assert torch.allclose(mean, gradient([0, 1, 2, 3]), rtol=1e-10)


def test_minibatches_prove_themselves_and_are_compared():
    """What only looks takes the rows' gradients as dense ones."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(at(0.0), 1.0))
        with pyro.plate("data", 3, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    check_guide(AutoMeanField, model, (X[:3],))
    guide = AutoMeanField(model)
    found = emvae.compare_gradients(model, guide, X[:3], estimators=["pathwise"], num_replicates=100, seed=0)
    assert all(math.isfinite(v) for v in found.dataset["variance_mean"].sel(block="guide").values.flatten())
    assert "nan" not in str(emvae.explain(model, guide, X[:3]))


def test_scale_and_values_of_a_batch():
    guide = AutoMeanField(minibatches, init_loc_fn=lambda site: site["fn"].mean.expand(site["fn"].shape()))
    rows = torch.tensor([2, 0])
    guide(X[rows], rows)
    with torch.no_grad():
        guide.contexts.z.copy_(torch.arange(16.0).reshape(4, 4))
    particles = draw(minibatches, guide, (X[rows], rows))
    site = particles.guide["z"]
    assert float(site.scale) == float(particles.model["z"].scale) == 2.0
    whole = guide.median(X[rows], rows)["z"]
    assert whole.shape == (4, 2) and torch.equal(site.fn.mean, whole[rows])


def placed(guide):
    """Return a guide of `rows_of` whose values tell the row: 0, 10, 20, 30."""
    with torch.no_grad():
        guide.contexts.z.copy_(torch.tensor([[0.0, -20.0], [10.0, -20.0], [20.0, -20.0], [30.0, -20.0]]))
    return guide


def rows_of(x, index=None):
    with pyro.plate("data", 4, subsample=index):
        pyro.sample("z", dist.Normal(at(0.0), 1.0))


@pytest.mark.parametrize("first", [[2, 0], [0, 1, 2, 3], None])
def test_rows_are_the_models_whatever_the_first_call_and_in_copies(first):
    guide, index = AutoMeanField(rows_of), torch.tensor([3, 1])
    guide(X, None if first is None else torch.tensor(first))
    placed(guide)
    for twin in (guide, copy.deepcopy(guide)):
        assert twin(X, index)["z"].round().tolist() == [30.0, 10.0]
        assert twin(X, None)["z"].round().tolist() == [0.0, 10.0, 20.0, 30.0]
        twin(X, index)["z"].sum().backward()
        assert twin.contexts.z.grad.is_sparse and sorted(twin.contexts.z.grad.coalesce().indices()[0].tolist()) == [
            1,
            3,
        ]
    with pytest.raises(ModelError, match=r"open plate 'data': got a guide that was unpickled, without its model"):
        pickle.loads(pickle.dumps(guide))(X, index)


def test_a_first_call_with_all_data_leaves_open_which_of_several_plates_comes_in_minibatches():
    guide, index = AutoMeanField(minibatches), torch.tensor([2, 0])
    guide(X, torch.arange(4))
    with pytest.raises(ModelError, match=r"got 2 of 4 data after a first call with all of them"):
        guide(X[index], index)


def test_a_list_that_would_draw_other_rows_than_the_model_is_refused():
    def model(x, index):
        pyro.sample("mu", dist.Normal(at(0.0), 1.0))
        rows_of(x, index)

    def listed(**options):
        guide = AutoGuideList(model, **options)
        guide.append(AutoNormal(poutine.block(model, hide=["z"])))
        guide.append(AutoMeanField(poutine.block(model, hide=["mu"])))
        return guide

    index = torch.tensor([3, 1])
    with pytest.raises(ModelError, match=r"open plate 'data': got an AutoGuideList without create_plates="):
        listed()(X, index)
    pyro.clear_param_store()
    guide = listed(create_plates=lambda x, index: pyro.plate("data", 4, subsample=index))
    guide(X, index)
    placed(guide[1])
    assert guide(X, index)["z"].round().tolist() == [30.0, 10.0]


def test_copies_before_the_first_call():
    guide = AutoMeanField(continuous, init_loc_fn=init_to_value(values={"z": X}))
    assert copy.deepcopy(guide)(X)["z"].shape == (4,) and guide.prototype_trace is None


def test_no_plate_of_the_guides_own_reaches_the_model():
    seen = []

    def model(x, index):
        with pyro.plate("data", 4, subsample=index) as rows:
            seen.append(rows)
            pyro.sample("z", dist.Normal(at(0.0), 1.0))

    guide, index = AutoMeanField(model), torch.tensor([3, 1])
    for _ in range(3):
        draw(model, guide, (X[index], index))
    assert all(torch.equal(rows, index) for rows in seen)


def test_row_adam_is_adam_on_dense_gradients_and_sparse_adam_on_rows():
    def run(kind, sparse, rows=((0, 2), (2, 1), (0, 1))):
        table = torch.linspace(-1, 1, 6, dtype=X.dtype).reshape(3, 2).requires_grad_()
        optimizer = kind([table], lr=0.1)
        for step in rows:
            optimizer.zero_grad()
            torch.nn.functional.embedding(torch.tensor(step), table, sparse=sparse).square().sum().backward()
            optimizer.step()
        return table.detach()

    assert torch.equal(run(RowAdam, False), run(torch.optim.Adam, False))
    every = [(0, 1, 2)] * 4
    assert torch.allclose(run(RowAdam, True, every), run(torch.optim.Adam, False, every), rtol=1e-12)
    assert torch.allclose(run(RowAdam, True), run(torch.optim.SparseAdam, True), rtol=1e-5, atol=1e-6)
    assert not torch.equal(run(RowAdam, True), run(torch.optim.Adam, False))


@pytest.mark.slow
def test_a_million_rows_train_in_flat_memory(record_result):
    size, batch = 1_000_000, 1_000
    x = torch.randn(size, 10)

    def model(x):
        with pyro.plate("data", size, subsample_size=batch) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    svi = emvae.SVI(model, AutoMeanField(model), pyro.optim.Adam({"lr": 0.05}), MonteCarloELBO())
    for _ in range(5):
        svi.step(x)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for _ in range(300):
        svi.step(x)
    seconds = (time.perf_counter() - start) / 300
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    record_result("AutoMeanField, 1e6 x 10 local latents: growth of memory over 300 steps", f"{grown:.1f} MiB")
    record_result("AutoMeanField, 1e6 x 10 local latents: one step", f"{1000 * seconds:.1f} ms")
    assert grown < 20


# The interface ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [continuous, discrete])
def test_first_call_creates_every_parameter(model):
    guide = AutoMeanField(model)
    guide(X)
    before = [name for name, _ in guide.named_parameters()]
    svi = emvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), MonteCarloELBO(4))
    for _ in range(3):
        svi.step(X)
    assert [name for name, _ in guide.named_parameters()] == before
    assert sorted(pyro.get_param_store()) == sorted(f"AutoMeanField.{name}" for name in before)


def test_closed_form_kl_of_real_sites():
    guide = AutoMeanField(lambda x: poutine.condition(continuous, data={"scale": at(1.0), "p": at(0.5)})(x))
    loss = TraceMeanField_ELBO()
    assert math.isfinite(loss.loss_and_grads(guide.model, guide, X))


def test_in_a_list_of_guides():
    guide = AutoGuideList(continuous)
    guide.append(AutoMeanField(poutine.block(continuous, expose=["scale", "p"])))
    guide.append(AutoNormal(poutine.block(continuous, expose=["z"])))
    svi = SVI(continuous, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert all(math.isfinite(svi.step(X)) for _ in range(3)) and set(guide(X)) == {"scale", "p", "z"}
    assert set(guide.median(X)) == {"scale", "p", "z"}


def test_copies_and_state_dict():
    guide = AutoMeanField(continuous, {"p": "beta"})
    guide(X)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    with pyro.settings.context(module_local_params=True):
        fresh = AutoMeanField(continuous, {"p": "beta"})
        fresh(X)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        medians = fresh.median(X)
        assert fresh(X)["z"].shape == (4,)
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        for name, value in guide.median(X).items():
            assert torch.equal(twin.median(X)[name], value) and torch.equal(medians[name], value)
        assert twin(X)["z"].shape == (4,)


def test_predictive():
    guide = AutoMeanField(discrete)
    for parallel in (False, True):
        assert Predictive(discrete, guide=guide, num_samples=5, parallel=parallel)(X)["k"].shape == (5, 4)


def test_names_with_dots():
    def model():
        pyro.sample("net.weight", dist.Normal(at(0.0), 1.0))

    guide = AutoMeanField(model)
    assert set(guide()) == {"net.weight"} and "contexts.net/weight" in guide.state_dict()


def test_repr():
    guide = AutoMeanField(discrete)
    guide(X)
    assert repr(guide).startswith("AutoMeanField(b: Bernoulli(init_prob=0.5), k: Categorical(")


# Errors -----------------------------------------------------------------------------------------------------------


def test_family_that_does_not_fit():
    with pytest.raises(ModelError, match=r"cannot serve site 'z': got Normal with support Real"):
        AutoMeanField(continuous, {"z": "gamma"})(X)


def test_unknown_site():
    guide = AutoMeanField(continuous, {"y": "gamma"})
    for _ in range(2):
        with pytest.raises(ModelError, match=r"family of site 'y': got no such latent.*Known: 'p', 'scale', 'z'"):
            guide(X)


@pytest.mark.parametrize("family", [3, {"z": torch.zeros(2)}])
def test_family_is_none(family):
    with pytest.raises(EmvaeError, match=r"`AutoMeanField` cannot use its family"):
        AutoMeanField(continuous, family)


def test_no_latents():
    with pytest.raises(ModelError, match="got a model without latents"):
        AutoMeanField(lambda: None)()


def test_data_of_another_size():
    guide = AutoMeanField(continuous)
    guide(X)
    with pytest.raises(ModelError, match=r"plate 'data': got 3 data.*parameters for 4.*AutoAmortized"):
        guide(X[:3])
    assert guide(X)["z"].shape == (4,)


def test_support_that_differs_between_data():
    def model(x, index):
        with pyro.plate("data", 4, subsample=index):
            pyro.sample("z", dist.Uniform(0.0, 1.0 + x**2))

    index = torch.tensor([1, 2])
    with pytest.raises(ModelError, match=r"serve site 'z': got support .* differs between data"):
        AutoMeanField(model)(X[index], index)


def test_empty_data():
    with pytest.raises(DataError, match="empty data"):
        AutoMeanField(continuous)(X[:0])
