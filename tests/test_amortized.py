r"""`AutoAmortized` beyond one site and one plate: default encoder, nested plates, globals, discrete sites."""

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
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import nn

import pyro_emvae as emvae
from pyro_emvae._checks import EmvaeError, ModelError
from pyro_emvae._registry import entries
from pyro_emvae.guides import AutoAmortized
from pyro_emvae.guides._observed import leaf_mask
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.particles import draw, vectorizable
from pyro_emvae.testing import check_guide

WEIGHT = torch.tensor([[1.4, -0.5], [0.3, 1.1], [-0.9, 0.6]])
DATA = torch.tensor([[0.3, -1.0, 2.0], [1.1, 0.4, -0.2], [-0.7, 0.9, 0.5], [2.0, -0.1, 0.8], [-1.5, 0.6, 0.1]])
COUNTS = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 7.0], [1.0, 1.0, 0.0], [4.0, 9.0, 2.0], [0.0, 0.0, 0.0]])


def factor(x, index=None, size=None, subsample_size=None):
    """A factor model whose plate is opened in each of Pyro's ways; x holds the batch, or all data."""
    with pyro.plate("data", size or len(x), subsample=index, subsample_size=subsample_size) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        obs = x if z.shape[-2] == len(x) else x[rows]
        pyro.sample("x", dist.Normal(z @ WEIGHT.to(x).T, 0.7).to_event(1), obs=obs)


def mixed(x, counts):
    """Two global latents, and local ones of every kind of support; two observed sites."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        b = pyro.sample("b", dist.Bernoulli(0.4))
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(shape, 1.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        loc = z @ WEIGHT.T + (k + b).unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
        pyro.sample("counts", dist.Poisson(rate.unsqueeze(-1) * w + 0.1).to_event(1), obs=counts)


def hierarchy(x, num_groups=None, index=None, size=None):
    """Three levels: global mean, groups, members; observations (groups, members, 2) under a plate of their own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", size or len(x), dim=-3, subsample=index):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("members", x.shape[1], dim=-2):
            b = pyro.sample("b", dist.Normal(a, 0.5))
            with pyro.plate("repeats", x.shape[2], dim=-1):
                pyro.sample("x", dist.Normal(b, 0.3), obs=x)


MEMBERS = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)) + 1.0


def linear(rows, columns, **kwargs):
    torch.manual_seed(0)
    return nn.Linear(rows, columns, **kwargs)


def trace(guide, *args, **kwargs):
    return poutine.trace(guide).get_trace(*args, **kwargs)


def steps(model, guide, *args, loss=None, num=2, **kwargs):
    """Take steps of SVI and return the parameters that did not move."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss or Trace_ELBO())
    svi.step(*args, **kwargs)
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    assert all(math.isfinite(svi.step(*args, **kwargs)) for _ in range(num))
    assert set(before) == set(pyro.get_param_store()), "a parameter came later than the first call"
    return [n for n, p in pyro.get_param_store().items() if torch.equal(p, before[n])]


# Sites of every kind, and global ones -----------------------------------------------------------------------------


LOSSES = {
    "trace": Trace_ELBO(),
    "graph": TraceGraph_ELBO(),
    "enum": TraceEnum_ELBO(strict_enumeration_warning=False),
    "ours": MonteCarloELBO(),
}


@pytest.mark.parametrize("dependence", ["none", "structured"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_kind_of_site_trains(loss, dependence):
    guide = AutoAmortized(mixed, dependence=dependence)
    assert steps(mixed, guide, DATA, COUNTS, loss=LOSSES[loss], num=3) == []
    tr = trace(guide, DATA, COUNTS)
    kinds = {n: type(v["fn"]).__name__ for n, v in tr.nodes.items() if v["type"] == "sample" and n != "data"}
    assert kinds["k"] == "Categorical" and kinds["b"] == "Bernoulli" and kinds["w_unconstrained"] == "Independent"
    assert set(guide(DATA, COUNTS)) == {"mu", "shape", "k", "b", "z", "rate", "w"}
    assert guide.num_features == {"k": 3, "b": 1, "z": 4, "rate": 2, "w": 4}


PRIORS = {
    "continuous": dist.Normal(torch.zeros(2), 1.0).to_event(1),
    "any": dist.Normal(torch.zeros(2), 1.0).to_event(1),
    "positive": dist.Gamma(2.0, 1.0),
    "unit_interval": dist.Beta(2.0, 2.0),
    "simplex": dist.Dirichlet(torch.ones(3)),
    "circle": dist.VonMises(0.0, 1.0),
    "binary": dist.Bernoulli(0.3),
    "categorical": dist.Categorical(torch.ones(3)),
    "one_hot": dist.OneHotCategorical(torch.ones(3)),
}
FAMILIES = [e for e in entries("family") if not e.traits.arguments and e.traits.support in PRIORS]


def one_site(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior).float()
            mean = z.reshape(*z.shape[: z.dim() - prior.event_dim], -1).mean(-1, keepdim=True)
            pyro.sample("x", dist.Normal(mean + torch.zeros(3), 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.name)
def test_every_family(entry):
    """Samples and densities agree, every parameter learns, and the guide can be copied."""
    model = one_site(PRIORS[entry.traits.support])
    guide = AutoAmortized(model, family=entry.name)
    assert steps(model, guide, DATA) == []
    assert vectorizable(model, guide, (DATA,), {}) == (True, 1, "")
    assert pickle.loads(pickle.dumps(guide))(DATA[:2])["z"].shape[0] == 2
    pyro.clear_param_store()
    if entry.name != "point_mass":
        check_guide(lambda model: AutoAmortized(model, family=entry.name), model, (DATA[:1],), num_samples=40_000)


def test_first_call_creates_every_parameter_and_validation_data_of_another_size():
    guide = AutoAmortized(mixed, dependence="structured")
    guide(DATA, COUNTS)
    before = set(pyro.get_param_store())
    for rows in (1, 3, 5):
        assert guide(DATA[:rows], COUNTS[:rows])["z"].shape == (rows, 2)
        assert math.isfinite(Trace_ELBO().loss(mixed, guide, DATA[:rows], COUNTS[:rows]))
    assert set(pyro.get_param_store()) == before == {f"AutoAmortized.{n}" for n in names_in_store(guide)}


def names_in_store(guide):
    modules = ("encoder", "links", "flows")
    for name, _ in guide.named_parameters():
        first, _, rest = name.partition(".")
        yield f"{first}$$${rest}" if first in modules else name.replace("_unconstrained", "")


@pytest.mark.parametrize("family", ["gamma", "log_normal"])
def test_family_per_site(family):
    guide = AutoAmortized(mixed, family={"rate": family, "w": "dirichlet"})
    tr = trace(guide, DATA, COUNTS)
    assert "rate_unconstrained" not in tr.nodes and "w_unconstrained" not in tr.nodes
    assert type(tr.nodes["w"]["fn"]).__name__ == "Dirichlet" and tr.nodes["rate"]["value"].min() > 0
    assert type(tr.nodes["z"]["fn"].base_dist).__name__ == "Normal"
    assert steps(mixed, guide, DATA, COUNTS) == []


def test_family_that_does_not_fit():
    with pytest.raises(ModelError, match=r"site 'k': got Categorical"):
        AutoAmortized(mixed, family="normal")(DATA, COUNTS)
    with pytest.raises(ModelError, match=r"site 'z': got Normal.*normal"):
        AutoAmortized(mixed, family={"z": "dirichlet"})(DATA, COUNTS)
    with pytest.raises(ModelError, match=r"site 'zz'.*Did you mean 'z'"):
        AutoAmortized(mixed, family={"zz": "normal"})(DATA, COUNTS)
    with pytest.raises(EmvaeError, match=r"cannot use its family"):
        AutoAmortized(mixed, family={"z": 3})


GLOBALS = [None, AutoNormal, AutoMultivariateNormal, AutoDelta, "instance", "list"]


@pytest.mark.parametrize("kind", GLOBALS, ids=str)
def test_global_guide(kind):
    part = poutine.block(mixed, hide=["k", "b", "z", "rate", "w"])
    if kind == "instance":
        kind = AutoNormal(part, init_scale=0.01)
    elif kind == "list":
        kind = AutoGuideList(part)
        kind.append(AutoDelta(poutine.block(part, hide=["mu"])))
        kind.append(AutoNormal(poutine.block(part, hide=["shape"])))
    guide = AutoAmortized(mixed, global_guide=kind)
    assert steps(mixed, guide, DATA, COUNTS) == []
    names = set(pyro.get_param_store())
    assert any(n.startswith("AutoAmortized.global_guide.") for n in names)
    assert set(guide(DATA, COUNTS)) == {"mu", "shape", "k", "b", "z", "rate", "w"}
    assert set(guide.median(DATA, COUNTS)) == {"mu", "shape", "k", "b", "z", "rate", "w"}
    assert guide(DATA[:2], COUNTS[:2])["mu"].shape == (2,)


def test_global_guide_that_does_not_fit():
    local = ["k", "b", "z", "rate", "w"]
    cases = [
        (AutoNormal(poutine.block(mixed, hide=[*local, "mu"])), ModelError, r"a guide of \['shape'\].*hide=\['b'"),
        (3, EmvaeError, r"global_guide: got 3"),
        (lambda model: None, EmvaeError, r"global_guide: got None"),
    ]
    for guide, error, match in cases:
        pyro.clear_param_store()
        with pytest.raises(error, match=match):
            AutoAmortized(mixed, global_guide=guide)(DATA, COUNTS)
    with pytest.raises(ModelError, match=r"global_guide: got a model without latents outside"):
        AutoAmortized(factor, global_guide=AutoNormal)(DATA)


def test_global_discrete_latent_needs_a_guide():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    with pytest.raises(ModelError, match=r"global latent 'k': got a discrete site \(Bernoulli\)"):
        AutoAmortized(model)(DATA)


def test_enumerated_sites_of_the_model_are_left_out():
    def model(x):
        m = pyro.sample("m", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            loc = z @ WEIGHT.T + (k + m).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    guide = AutoAmortized(model)
    assert set(guide(DATA)) == {"z"}
    assert steps(model, guide, DATA, loss=TraceEnum_ELBO(max_plate_nesting=1)) == []


def test_discrete_site_enumerated_in_the_guide():
    """TraceEnum sums over the guide's own values too: then the ELBO has no noise from k."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", dist.Bernoulli(0.1 + 0.3 * k))
            pyro.sample("x", dist.Normal(k + z, 1.0), obs=x[:, 0])

    guide = AutoAmortized(model, dependence="structured")
    enumerated = pyro.infer.config_enumerate(guide)
    for _ in range(3):
        SVI(model, enumerated, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1)).step(DATA)
    losses = [TraceEnum_ELBO(max_plate_nesting=1).loss(model, enumerated, DATA) for _ in range(3)]
    assert max(losses) - min(losses) < 1e-4


def small(x, counts):
    k = None
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])))
        z = pyro.sample("z", dist.Normal(k.to(x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("dependence", ["none", "structured"])
def test_check_guide_of_a_hybrid_model(dependence):
    """Samples and log q agree, with a discrete site and a later one that sees it."""

    def make(model):
        pyro.set_rng_seed(3)
        guide = AutoAmortized(model, dependence=dependence)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.003}), Trace_ELBO())
        for _ in range(20):
            svi.step(DATA[:2, 0], None)
        return guide

    check_guide(make, small, (DATA[:2, 0], None), num_samples=200_000)


# The default encoder ----------------------------------------------------------------------------------------------


def columns(guide, *args, **kwargs):
    """Return what the default encoder's first layer reads in a call, one tensor per level."""
    seen = []
    guide(*args, **kwargs)
    hooks = [
        body[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for body in guide.encoder.bodies
    ]
    guide(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


def test_default_encoder_reads_what_is_observed_in_trace_order():
    guide = AutoAmortized(mixed)
    (read,) = columns(guide, DATA, COUNTS)
    total = COUNTS.sum(1, keepdim=True)
    mean = total.mean()
    expected = torch.cat(
        [
            (DATA - DATA.mean()) / DATA.std(correction=0),
            torch.log1p(COUNTS * mean / total.clamp(min=1)),
            torch.log1p(total) - torch.log1p(mean),
        ],
        1,
    )
    assert torch.allclose(read, expected, atol=1e-6)
    assert (guide.encoder.bodies[0][0].out_features, guide.encoder.bodies[0][2].out_features) == (128, 128)
    assert isinstance(guide.encoder.bodies[0][1], nn.SiLU)
    assert "reads 'x' (real), 'counts' (count): 7 columns" in repr(guide)
    assert torch.equal(columns(guide, DATA[:2], COUNTS[:2])[0], read[:2]), "the numbers are those of the first data"


def test_default_encoder_whatever_the_signature():
    """Equal guides, whether the data are a positional argument, in a dict, changed by the model, or of its own."""

    def by_dict(batch, *, scale=1.0):
        factor(batch["nested"][0]["x"])

    def changed(x):
        factor(x.double().float() * 1.0)

    def closed():
        factor(DATA)

    contexts = []
    for model, args, kwargs in [
        (factor, (DATA,), {}),
        (factor, (), {"x": DATA}),
        (by_dict, ({"nested": [{"x": DATA}]},), {"scale": 2.0}),
        (changed, (DATA,), {}),
        (closed, (), {}),
    ]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoAmortized(model)
        contexts.append(trace(guide, *args, **kwargs).nodes["z"]["fn"].mean)
    assert all(torch.equal(context, contexts[0]) for context in contexts)


def test_values_among_the_arguments_are_read_without_a_run_of_the_model():
    calls = []

    def model(x, index=None, size=None, change=False):
        calls.append(1)
        factor(x + 0.0 if change else x, index, size)

    guide = AutoAmortized(model)
    for _ in range(3):
        guide(DATA), guide(DATA[:2], torch.tensor([1, 0]), 9)
    assert len(calls) == 2, "once per shape"
    for _ in range(3):
        guide(DATA, None, None, True)
    assert len(calls) == 2 + 1 + 3, "once, and in every call"


@pytest.mark.parametrize("kwargs", [{"subsample_size": 2}, {"index": torch.tensor([4, 1])}], ids=["drawn", "given"])
def test_default_encoder_of_a_subsampled_plate(kwargs):
    guide, calls = AutoAmortized(lambda *args, **kwargs: calls.append(1) or factor(*args, **kwargs)), []
    guide(DATA)
    whole = trace(guide, DATA).nodes["z"]["fn"].mean
    for _ in range(4):
        tr = trace(guide, DATA, **kwargs)
        rows = tr.nodes["data"]["value"] if "data" in tr.nodes else kwargs["index"]
        assert torch.allclose(tr.nodes["z"]["fn"].mean, whole[rows], atol=1e-6)
        assert tr.nodes["z"]["cond_indep_stack"][0].full_size == 5 and len(rows) == 2
    assert len(calls) == 2
    assert len(guide.median(DATA, **kwargs)["z"]) == (5 if "subsample_size" in kwargs else 2)
    assert steps(factor, guide, DATA, **kwargs) == []


def test_changed_values_are_those_of_the_minibatch_in_use():
    """Two drawn plates, nested, and data that the model computes: a run for them has the guide's own indices."""

    def model(x, size=None):
        with pyro.plate("data", 5, subsample_size=size, dim=-2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, subsample_size=size, dim=-1) as columns:
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=(x + 0.0)[rows][:, columns])

    guide = AutoAmortized(model)
    guide(DATA)
    seen = []
    guide.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]["x"][0]))
    for _ in range(5):
        tr = trace(guide, DATA, 2)
        rows, inner = (tr.nodes[name]["value"] for name in ("data", "inner"))
        assert torch.equal(seen[-1], DATA[rows][:, inner])
    assert len(seen) == 5 and guide.median(DATA)["w"].shape == (5, 3)
    with pytest.raises(ModelError, match=r"medians and quantiles: got a random minibatch of plate 'data'"):
        guide.median(DATA, 2)
    assert steps(model, guide, DATA, 2) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device(dtype, device):
    x = DATA.to(device, dtype)
    guide = AutoAmortized(factor, dependence="structured")
    value = guide(x)["z"]
    assert (value.dtype, value.device) == (dtype, x.device)
    assert all(p.dtype == dtype and p.device == x.device for p in guide.parameters())


def test_integers_and_categories():
    def model(label, counts, flag):
        with pyro.plate("data", len(label)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("label", dist.Categorical(logits=z.unsqueeze(-1) * torch.ones(3)), obs=label)
            pyro.sample("counts", dist.Binomial(9, logits=z), obs=counts)
            pyro.sample("flag", dist.Bernoulli(logits=z), obs=flag)

    label, counts, flag = torch.tensor([0, 2, 1, 2]), torch.tensor([0.0, 9.0, 3.0, 1.0]), torch.tensor([0.0, 1.0, 1, 0])
    (read,) = columns(AutoAmortized(model), label, counts, flag)
    assert torch.equal(read[:, :3], torch.eye(3)[label]) and torch.equal(read[:, 3], counts.log1p())
    assert torch.equal(read[:, 4], 2 * flag - 1)


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (dist.Poisson(torch.ones(3)).to_event(1), "count"),
        (dist.ZeroInflatedPoisson(torch.ones(3), gate=torch.tensor(0.5)).to_event(1), "count"),
        (dist.Multinomial(4, torch.ones(3)), "count"),
        (dist.Binomial(torch.tensor([4.0, 5, 6]), 0.5).to_event(1), "count"),
        (dist.Categorical(torch.ones(300)).expand([3]).to_event(1), "count"),
        (dist.Categorical(torch.ones(7)).expand([3]).to_event(1), "category"),
        (dist.OneHotCategorical(torch.ones(3)), "real"),
        (dist.Bernoulli(torch.ones(3) / 2).to_event(1), "real"),
        (dist.Gamma(torch.ones(3), 1.0).to_event(1), "real"),
    ],
    ids=lambda value: getattr(value, "base_dist", value).__class__.__name__,
)
def test_kinds_of_observed_values(fn, kind):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", fn, obs=x)

    guide = AutoAmortized(model)
    guide(fn.sample((5,)))
    assert guide.encoder.observed[0].kind == kind and guide(fn.sample((2,)))["z"].isfinite().all()


def test_equal_data_equal_output_and_permutation():
    guide, order = AutoAmortized(mixed, dependence="structured"), torch.tensor([2, 0, 4, 1, 3])
    guide(DATA, COUNTS)
    one, two, twice = (guide.median(DATA[i], COUNTS[i]) for i in (torch.arange(5), order, torch.tensor([1, 1])))
    for name in ("k", "b", "z", "rate", "w"):
        assert torch.allclose(one[name][order], two[name], atol=1e-6) and torch.allclose(
            *twice[name].float(), atol=1e-6
        )


def test_no_observed_site_in_the_plate():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=x.sum())

    guide = AutoAmortized(model)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"make an encoder: got a model that observes nothing in plate 'data'"):
            guide(DATA)
    assert guide.prototype_trace is None and "encoder" not in dict(guide.named_modules())


def test_default_encoder_needs_no_input():
    with pytest.raises(EmvaeError, match=r"use encoder_input: got no encoder"):
        AutoAmortized(factor, encoder_input=lambda x: x)
    with pytest.raises(EmvaeError, match=r"use dependence: got 'structure'.*Did you mean 'structured'"):
        AutoAmortized(factor, dependence="structure")
    with pytest.raises(EmvaeError, match=r"use dependence: got \['z', 1\]"):
        AutoAmortized(factor, dependence=["z", 1])
    with pytest.raises(ModelError, match=r"let later sites see 'zz'.*Did you mean 'z'"):
        AutoAmortized(factor, dependence=["zz"])(DATA)


@pytest.mark.parametrize("net", [None, linear(3, 4)], ids=["default", "given"])
def test_data_of_another_dtype(net):
    guide = AutoAmortized(factor, net)
    guide(DATA)
    match = (
        r"read the observed site 'x': got torch.float64 on cpu, torch.float32"
        if net is None
        else (r"encode the data: got a tensor of torch.float64 on cpu.*parameters are of torch.float32 on cpu")
    )
    with pytest.raises(ModelError, match=match):
        guide(DATA.double())
    assert guide(DATA)["z"].dtype == torch.float32


def test_latent_that_changes_its_shape():
    def model(x, width=2):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(width), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(5, 3), 1.0).to_event(1), obs=x)

    guide = AutoAmortized(model)
    guide(DATA)
    with pytest.raises(ModelError, match=r"draw site 'z': got event shape \(3,\) in plates \['data'\]; it was \(2,\)"):
        guide(DATA, 3)


# Missing data -----------------------------------------------------------------------------------------------------


def entries(x, there):
    """Single entries are missing: the mask is inside the site's distribution."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.7).mask(there).to_event(1), obs=x)


def rows(x, there):
    """Whole data are missing: a handler's mask."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with poutine.mask(mask=there):
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.7).to_event(1), obs=x)


ENTRIES = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()


@pytest.mark.parametrize(("model", "there"), [(entries, ENTRIES), (rows, ENTRIES[:, 0])], ids=["entries", "rows"])
def test_missing_values_are_zero_and_the_mask_is_read(model, there):
    guide = AutoAmortized(model)
    (read,) = columns(guide, DATA, there)
    full = there if there.dim() == 2 else there[:, None].expand(5, 3)
    mean, std = DATA[full].mean(), DATA[full].std(correction=0)
    expected = torch.cat([torch.where(full, (DATA - mean) / std, 0.0), full.float()], 1)
    assert torch.allclose(read, expected, atol=1e-6)
    assert "'x' (real, mask): 6 columns" in repr(guide)
    assert steps(model, guide, DATA, there) == []


def test_values_in_missing_places_change_nothing():
    guide = AutoAmortized(entries)
    guide(DATA, ENTRIES)
    other = torch.where(ENTRIES, DATA, torch.full_like(DATA, 77.0))
    assert torch.equal(guide.median(DATA, ENTRIES)["z"], guide.median(other, ENTRIES)["z"])
    assert not torch.equal(guide.median(DATA, ENTRIES)["z"], guide.median(DATA, ~ENTRIES)["z"])


def test_mask_that_comes_or_goes():
    def model(x, there=None):
        (factor if there is None else lambda x: entries(x, there))(x)

    for first, second, match in [((), (ENTRIES,), "a mask"), ((ENTRIES,), (), "no mask")]:
        pyro.clear_param_store()
        guide = AutoAmortized(model)
        guide(DATA, *first)
        with pytest.raises(ModelError, match=rf"read the observed site 'x': got {match}"):
            guide(DATA, *second)


def test_masked_latents_are_masked_in_the_guide():
    """`obs_mask` makes a latent of what is missing, and masks it where it is not: so has the guide to."""

    def model(x, there):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0], obs_mask=there)

    guide = AutoAmortized(model)
    for there in (ENTRIES[:, 0], ENTRIES[:, 1]):
        tr = trace(guide, DATA, there)
        tr.compute_log_prob()
        assert set(guide(DATA, there)) == {"z", "x_unobserved"}
        assert torch.equal(tr.nodes["x_unobserved"]["mask"], ~there)
        assert torch.equal(tr.nodes["x_unobserved"]["log_prob"] != 0, ~there)
    assert steps(model, guide, DATA, ENTRIES[:, 0]) == []


# Nested plates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dependence", ["none", "structured"])
def test_three_levels(dependence):
    guide = AutoAmortized(hierarchy, dependence=dependence)
    tr = trace(guide, MEMBERS)
    assert tr.nodes["a"]["value"].shape == (4, 1, 1) and tr.nodes["b"]["value"].shape == (4, 3, 1)
    assert [f.name for f in tr.nodes["b"]["cond_indep_stack"]] == ["groups", "members"]
    assert steps(hierarchy, guide, MEMBERS) == []
    batch = (MEMBERS[:2], None, torch.tensor([3, 0]), 40)
    assert trace(guide, *batch).nodes["b"]["cond_indep_stack"][0].full_size == 40
    assert guide(*batch)["b"].shape == (2, 3, 1), "validation data of another size"
    assert guide(MEMBERS[:, :2])["b"].shape == (4, 2, 1), "groups of another size"
    assert vectorizable(hierarchy, guide, (MEMBERS,), {}) == (True, 3, "")
    draws = Predictive(guide, num_samples=3, parallel=True)(MEMBERS)
    assert draws["b"].shape == (3, 4, 3, 1) and draws["mu"].shape[0] == 3


def test_levels_are_exchangeable():
    """Members of a group come in any order, and so do groups; a group's latent does not see the order."""
    guide = AutoAmortized(hierarchy)
    guide(MEMBERS)
    groups, members = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    one, two, three = guide.median(MEMBERS), guide.median(MEMBERS[groups]), guide.median(MEMBERS[:, members])
    assert torch.allclose(one["a"][groups], two["a"], atol=1e-6) and torch.allclose(one["a"], three["a"], atol=1e-6)
    assert torch.allclose(one["b"][groups], two["b"], atol=1e-6)
    assert torch.allclose(one["b"][:, members], three["b"], atol=1e-6)
    changed = MEMBERS.clone()
    changed[0, 0] += 1.0
    other = guide.median(changed)
    assert not torch.isclose(other["a"][0], one["a"][0]).any(), "a group sees its members"
    assert not torch.isclose(other["b"][0, 1], one["b"][0, 1]).any(), "a member sees its group"
    assert torch.equal(other["a"][1:], one["a"][1:]) and torch.equal(other["b"][1:], one["b"][1:])


def test_plates_without_observations_or_without_latents_are_flattened():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("parts", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("x", dist.Normal(z.sum((-1, -2), keepdim=True).squeeze(-1), 1.0), obs=x)

    guide = AutoAmortized(model, amortize="data")
    (read,) = columns(guide, DATA)
    assert read.shape == (5, 3) and guide(DATA)["z"].shape == (5, 2, 3) and guide.num_features == {"z": 6}
    assert not torch.isclose(guide.median(DATA)["z"][:, 0], guide.median(DATA)["z"][:, 1]).any()
    assert guide(DATA[:2])["z"].shape == (2, 2, 3)
    assert steps(model, guide, DATA) == []


@pytest.mark.parametrize("how", ["columns", "mapping"])
def test_given_encoder_of_nested_plates(how):
    """A tensor has the inner plates among its columns; a mapping has them as dims."""
    net = linear(6, 2 + 3 * 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.rows = net, None

        def forward(self, x):
            out = self.net(x.flatten(1))[: self.rows]
            return out if how == "columns" else {"b": out[:, 2:].reshape(-1, 3, 2), "a": out[:, :2]}

    guide = AutoAmortized(hierarchy, Net())
    out = net(MEMBERS.flatten(1))
    tr = trace(guide, MEMBERS)
    assert torch.equal(tr.nodes["a"]["fn"].mean, out[:, 0].reshape(4, 1, 1))
    assert torch.equal(tr.nodes["b"]["fn"].mean, out[:, 2:].reshape(4, 3, 2)[..., :1])
    guide.encoder.rows = 2
    match = (
        r"\(2, 8\).*\(4, 8\).*2 for 'a' and 6 for 'b'" if how == "columns" else r"site 'a': got .*\(2, 2\).*\(4, 2\)"
    )
    with pytest.raises(ModelError, match=match):
        guide(MEMBERS)


@pytest.mark.parametrize("plates", [("data", "inner"), ("inner", "data")])
def test_inner_plate_left_or_right_of_the_data(plates):
    def model(x):
        dims = {plates[0]: -2, plates[1]: -1}
        with pyro.plate("data", 5, dim=dims["data"]):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=dims["inner"]):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = DATA if plates[0] == "data" else DATA.T.contiguous()
    guide = AutoAmortized(model, dependence="structured")
    pyro.set_rng_seed(0)
    median = guide.median(x)
    assert median["b"].shape == x.shape and median["a"].shape == ((5, 1) if plates[0] == "data" else (5,))
    assert steps(model, guide, x) == []
    assert vectorizable(model, guide, (x,), {}) == (True, 2, "")


def users_and_items(x):
    """Two data plates; each entry belongs to a user and an item."""
    with pyro.plate("users", x.shape[0], dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("items", x.shape[1], dim=-1):
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        pyro.sample("x", dist.Normal(u + v, 0.5), obs=x)


def test_two_data_plates_one_amortized():
    """The latents of the other plate get free parameters, one for each."""
    guide = AutoAmortized(users_and_items, linear(3, 2), amortize="users")
    assert steps(users_and_items, guide, DATA) == []
    tr = trace(guide, DATA)
    assert tr.nodes["u"]["value"].shape == (5, 1) and tr.nodes["v"]["value"].shape == (3,)
    assert pyro.param("AutoAmortized.global_guide.locs.v").shape == (3,)
    assert set(guide.median(DATA)) == {"u", "v"}


def test_two_data_plates_both_amortized():
    guide = AutoGuideList(users_and_items)
    guide.append(AutoAmortized(poutine.block(users_and_items, hide=["v"]), linear(3, 2)))
    items = poutine.block(users_and_items, hide=["u"])
    guide.append(AutoAmortized(items, linear(5, 2), encoder_input=lambda x: x.T))
    assert steps(users_and_items, guide, DATA) == []
    tr = trace(guide, DATA)
    assert torch.equal(tr.nodes["v"]["fn"].mean, guide[1].encoder(DATA.T)[:, 0])
    assert set(guide.median(DATA)) == {"u", "v"}
    with pytest.raises(ModelError, match=r"plates \['users', 'items'\].*Write amortize='users'"):
        AutoAmortized(users_and_items)(DATA)


def test_two_data_plates_reach_the_means_of_the_posterior():
    """All of it is Gaussian, so that a factorised guide has its means: those of the linear equations."""
    x = DATA.double()
    guide = AutoGuideList(users_and_items)
    guide.append(AutoAmortized(poutine.block(users_and_items, hide=["v"]), linear(3, 2).double()))
    items = poutine.block(users_and_items, hide=["u"])
    guide.append(AutoAmortized(items, linear(5, 2).double(), encoder_input=lambda x: x.T))
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / 600)})
    loss = MonteCarloELBO(8, estimator="sticking_the_landing", vectorize_particles=True)
    svi = emvae.SVI(users_and_items, guide, optim, loss, backend="graph")
    for _ in range(600):
        svi.step(x)
    design = torch.cat([torch.eye(5).repeat_interleave(3, 0), torch.eye(3).repeat(5, 1)], 1).double()
    exact = torch.linalg.solve(torch.eye(8).double() + 4 * design.T @ design, 4 * design.T @ x.flatten())
    found = guide.median(x)
    assert torch.allclose(torch.cat([found["u"].flatten(), found["v"]]), exact, atol=0.02)


# Pyro's contract --------------------------------------------------------------------------------------------------


COPIED = {
    "default": lambda: AutoAmortized(mixed, dependence="structured"),
    "given": lambda: AutoAmortized(mixed, linear(3, 14), global_guide=AutoMultivariateNormal),
}


@pytest.mark.parametrize("make", COPIED)
@pytest.mark.parametrize("used", [False, True])
def test_deepcopy(make, used):
    with pyro.settings.context(module_local_params=True):
        guide = COPIED[make]()
        if used:
            guide(DATA, COUNTS)
        other = copy.deepcopy(guide)
        for one in (guide, other):
            loss = Trace_ELBO()(mixed, one)
            loss(DATA[:2], COUNTS[:2]).backward()
            assert one(DATA, COUNTS)["mu"].shape == (2,)
        with torch.no_grad():
            for p in guide.parameters():
                p.add_(1.0)
        one, two = guide.median(DATA, COUNTS), other.median(DATA, COUNTS)
        assert not torch.equal(one["z"], two["z"]) and not torch.equal(one["mu"], two["mu"])
        assert not {id(p) for p in guide.parameters()} & {id(p) for p in other.parameters()}


@pytest.mark.parametrize("make", COPIED)
def test_pickle(make):
    guide = COPIED[make]()
    guide(DATA, COUNTS)
    data = pickle.dumps(guide)
    assert steps(mixed, guide, DATA[:4], COUNTS[:4]) == [], "the pickled guide goes on working"
    expected = guide.median(DATA, COUNTS)
    data = pickle.dumps(guide)
    pyro.clear_param_store()
    loaded = pickle.loads(data)
    assert all(torch.equal(v, expected[n]) for n, v in loaded.median(DATA, COUNTS).items())
    assert loaded(DATA[:3], COUNTS[:3])["z"].shape == (3, 2), "another number of rows"
    assert DATA.numpy().tobytes() not in data


def test_nothing_is_kept_per_datum():
    """A first call on 1e5 data, latents with parameters of their own, leaves what one on 5 data leaves."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(mu + x[:, 0], 1.0))
            k = pyro.sample("k", dist.Bernoulli(logits=a))
            pyro.sample("x", dist.Normal(a + k, 1.0), obs=x[:, 0], obs_mask=x[:, 1] > 0)

    sizes = []
    for rows in (5, 100_000):
        pyro.clear_param_store()
        guide = AutoAmortized(model, dependence="structured")
        guide(DATA[:1].expand(rows, 3).clone())
        sizes.append(len(pickle.dumps(guide)))
    assert abs(sizes[1] - sizes[0]) < 1000


def test_an_unpickled_guide_says_what_it_lacks():
    guide = AutoAmortized(entries)
    guide(DATA, ENTRIES)
    loaded = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ModelError, match=r"read site 'x': got a guide that was unpickled, without its model"):
        loaded(DATA, ENTRIES)


def test_state_dict_through_torch_save():
    guide, buffer = AutoAmortized(mixed, dependence="structured"), io.BytesIO()
    steps(mixed, guide, DATA, COUNTS)
    torch.save(guide.state_dict(), buffer)
    expected = guide.median(DATA, COUNTS)
    buffer.seek(0)
    pyro.clear_param_store()
    other = AutoAmortized(mixed, dependence="structured")
    other(COUNTS, COUNTS)
    assert not torch.equal(other.median(DATA, COUNTS)["z"], expected["z"])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(v, expected[n]) for n, v in other.median(DATA, COUNTS).items())


def test_in_a_list_beside_a_global_guide():
    guide = AutoGuideList(mixed)
    local = ["k", "b", "z", "rate", "w"]
    guide.append(AutoNormal(poutine.block(mixed, hide=local)))
    guide.append(AutoAmortized(poutine.block(mixed, hide=["mu", "shape"]), dependence="structured"))
    assert steps(mixed, guide, DATA, COUNTS) == []
    assert set(guide(DATA[:5], COUNTS)) == {"mu", "shape", *local} == set(guide.median(DATA, COUNTS))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_with_globals(parallel):
    guide = AutoAmortized(mixed, dependence="structured")
    guide(DATA, COUNTS)
    draws = Predictive(mixed, guide=guide, num_samples=6, parallel=parallel)(DATA[:3], COUNTS[:3])
    assert draws["x"].shape == (6, 3, 3) and draws["counts"].shape == (6, 3, 3)
    sites = Predictive(guide, num_samples=6, parallel=parallel)(DATA[:3], COUNTS[:3])
    assert sites["z"].shape == (6, 3, 2) and sites["k"].shape[0] == 6


@pytest.mark.parametrize("dependence", ["none", "structured"])
def test_vectorized_particles(dependence):
    guide = AutoAmortized(mixed, dependence=dependence)
    guide(DATA, COUNTS)
    assert vectorizable(mixed, guide, (DATA, COUNTS), {}) == (True, 1, "")
    loss = MonteCarloELBO(8, vectorize_particles=True)
    assert math.isfinite(loss.loss_and_grads(mixed, guide, DATA, COUNTS))


def test_quantiles_of_every_site():
    guide = AutoAmortized(mixed, dependence="structured")
    guide(DATA, COUNTS)
    quantiles, median = guide.quantiles([0.1, 0.5, 0.9], DATA, COUNTS), guide.median(DATA, COUNTS)
    for name in ("mu", "shape", "z", "rate"):
        assert torch.allclose(quantiles[name][1], median[name]) and (quantiles[name].diff(dim=0) > 0).all()
    assert set(quantiles["k"].unique().tolist()) <= {0, 1, 2} and (quantiles["k"].diff(dim=0) >= 0).all()


def test_reparam_of_the_model():
    reparam = poutine.reparam(mixed, config={"z": LocScaleReparam(0.0)})
    guide = AutoAmortized(reparam)
    assert "z_decentered" in guide(DATA, COUNTS)
    assert steps(reparam, guide, DATA, COUNTS) == []


def skewed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        base, exp = dist.Normal(0.0, 1.0), torch.distributions.transforms.ExpTransform()
        w = pyro.sample("w", dist.TransformedDistribution(base, [exp]))
        pyro.sample("x", dist.Normal((z + w).unsqueeze(-1), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    "config",
    [{"z": LocScaleReparam(0.0)}, {"z": LocScaleReparam()}, {"w": TransformReparam()}],
    ids=["decentered", "learned", "transformed"],
)
def test_what_reparam_computes_is_no_observation(config):
    """A default encoder reads x alone: its answer for data is the same in every call, whatever the latents."""
    model = poutine.reparam(skewed, config=config)
    guide = AutoAmortized(model)
    one, two = trace(guide, DATA), trace(guide, DATA)
    assert [o.name for o in guide.encoder.observed] == ["x"]
    for name in config.keys() ^ {"z", "w"}:
        node = f"{name}_unconstrained" if f"{name}_unconstrained" in one.nodes else name
        assert torch.equal(one.nodes[node]["fn"].mean, two.nodes[node]["fn"].mean)
    assert vectorizable(model, guide, (DATA,), {})[0] and steps(model, guide, DATA) == []


def test_a_value_wider_than_its_distribution_is_read_whole():
    """One mean for three columns of data, which the density broadcasts."""
    guide = AutoAmortized(skewed)
    guide(DATA)
    assert guide.encoder.widths == (3,)
    one, two = trace(guide, DATA).nodes["z"]["fn"].mean, trace(guide, DATA + torch.eye(5, 3)).nodes["z"]["fn"].mean
    assert ((one - two).abs() > 0).tolist() == [True] * 3 + [False] * 2


def test_masks_of_handlers_and_distributions_meet():
    masks = [torch.tensor(row) for row in ([True, True, False], [True, False, True], [False, True, True])]
    fn = dist.Normal(torch.zeros(3), 1.0).mask(masks[0]).mask(masks[1])
    assert leaf_mask({"fn": fn, "mask": masks[2]}).tolist() == [False] * 3
    assert leaf_mask({"fn": fn, "mask": None}).tolist() == [True, False, False]


def test_a_list_of_guides_says_that_its_plates_have_the_size_of_its_first_call():
    def model(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        factor(x)

    def listed(**options):
        guide = AutoGuideList(model, **options)
        guide.append(AutoNormal(poutine.block(model, hide=["z"])))
        guide.append(AutoAmortized(poutine.block(model, hide=["mu"])))
        return guide

    guide = listed()
    guide(DATA)
    with pytest.raises(ModelError, match=r"got 5 data in the plate that was opened for it, 3 in the model's.*create"):
        guide(DATA[:3])
    pyro.clear_param_store()
    guide = listed(create_plates=lambda x: pyro.plate("data", len(x)))
    assert guide(DATA)["z"].shape == (5, 2) and guide(DATA[:3])["z"].shape == (3, 2)


# Proofs -----------------------------------------------------------------------------------------------------------


def hybrid(x, index=None, size=None):
    """A global latent, and two local ones of which the later depends on the earlier."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).to(x), 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3).to(x)))
        z = pyro.sample("z", dist.Normal(mu + k, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * torch.ones(3).to(x), 0.7).to_event(1), obs=x)


def test_minibatch_gradients_average_to_the_whole():
    """Exact: the mean over all minibatches of the ELBO's gradient at fixed draws is that over all data."""
    x = DATA.double()
    guide = AutoAmortized(hybrid, dependence="structured")
    guide(x)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    drawn = {name: value.detach() for name, value in guide(x).items()}
    leaves = [p for p in guide.parameters() if p.requires_grad]

    def gradient(rows, *args):
        values = {n: (v if n == "mu" else v[rows], None) for n, v in drawn.items()}
        values["mu_unconstrained"] = (drawn["mu"], None)
        particles = draw(hybrid, guide, args, values=values)
        elbo = particles.log_p - particles.log_q
        return torch.cat([g.flatten() for g in torch.autograd.grad(elbo.sum(), leaves, materialize_grads=True)])

    whole = gradient(torch.arange(5), x)
    batches = [torch.tensor(pair) for pair in itertools.combinations(range(5), 2)]
    mean = torch.stack([gradient(rows, x[rows], rows, 5) for rows in batches]).mean(0)
    assert whole.abs().max() > 0.1 and torch.allclose(mean, whole, rtol=1e-9, atol=1e-12)


def test_structured_guide_holds_a_posterior_that_factors_cannot():
    """Two local normals with correlation under the posterior: exact, in closed form."""
    x = DATA[:, 0].double()

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.tensor(0.0).to(x), 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.5))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    evidence = dist.Normal(0.0, math.sqrt(1.5)).log_prob(x).sum().item()
    best = {}
    for dependence in ("none", "structured"):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoAmortized(
            model, nn.Linear(1, 4).double(), dependence=dependence, encoder_input=lambda x: x[:, None]
        )
        optim = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / 600)})
        svi = SVI(model, guide, optim, MonteCarloELBO(32, estimator="sticking_the_landing", vectorize_particles=True))
        for _ in range(600):
            svi.step(x)
        best[dependence] = -MonteCarloELBO(4000, vectorize_particles=True).loss(model, guide, x)
    assert evidence - best["structured"] < 1e-3 * len(x) < evidence - best["none"]


def shared(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(50), 1.0).to_event(1))
    k = pyro.sample("k", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(mu.mean(-1) + k, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x[:, 0])


READ = {"structured": {"mu", "k", "a"}, ("a",): {"a"}, ("k", "mu"): {"k", "mu"}, "none": set()}


@pytest.mark.parametrize("dependence", READ)
def test_later_sites_see_the_latents_that_are_named(dependence):
    """With random weights, the last site's distribution follows these and no others."""
    guide = AutoAmortized(shared, dependence=dependence)
    guide(DATA)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    start = {name: torch.zeros(shape) for name, shape in (("mu", 50), ("k", ()), ("a", 5), ("b", 5))}

    def last(**changed):
        with poutine.condition(data={**start, **changed}):
            return poutine.trace(guide).get_trace(DATA).nodes["b"]["fn"].mean

    moved = {name for name in ("mu", "k", "a") if not torch.equal(last(), last(**{name: start[name] + 1.0}))}
    assert moved == READ[dependence]


def test_a_latent_that_all_data_share_weighs_no_more_for_having_many_columns():
    """A step of all weights as long moves the context by the mean of its columns."""
    guide = AutoAmortized(shared, dependence="structured")
    guide(DATA)
    columns = {e.name: e.columns(torch.ones(e.width), torch.float32) for e in guide.links.seen["b"]}
    assert {name: float(c.sum()) for name, c in columns.items()} == pytest.approx({"mu": 1.0, "k": 1.0, "a": 1.0})


def test_structured_guide_of_three_levels_reaches_the_evidence():
    """All of it is Gaussian: q(mu) q(a | mu, x) q(b | a, mu, x) holds the posterior, with means linear in the data."""
    x = MEMBERS.double()

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).to(x), 2.0))
        with pyro.plate("groups", len(x), dim=-3):
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with pyro.plate("members", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 0.5))
                with pyro.plate("repeats", 2, dim=-1):
                    pyro.sample("x", dist.Normal(b, 0.3), obs=x)

    same = torch.kron(torch.eye(4), torch.ones(6, 6)), torch.kron(torch.eye(12), torch.ones(2, 2))
    covariance = 4.0 * torch.ones(24, 24) + same[0] + 0.25 * same[1] + 0.09 * torch.eye(24)
    evidence = dist.MultivariateNormal(torch.zeros(24).double(), covariance.double()).log_prob(x.flatten()).item()

    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(1, 2).double(), nn.Linear(1, 2).double()

        def forward(self, x):
            return {"a": self.a(x.mean((1, 2)).unsqueeze(-1)), "b": self.b(x.mean(2).unsqueeze(-1))}

    guide = AutoAmortized(model, Means(), dependence="structured")
    optim = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.02 ** (1 / 500)})
    loss = MonteCarloELBO(16, estimator="sticking_the_landing", vectorize_particles=True)
    svi = SVI(model, guide, optim, loss)
    for _ in range(500):
        svi.step(x)
    elbo = -MonteCarloELBO(2000, vectorize_particles=True).loss(model, guide, x)
    assert evidence - 0.15 < elbo < evidence + 0.05


@pytest.mark.parametrize("kind", ["normal", "full_rank_normal", "flow"])
def test_families_with_dependence_and_copies(kind):
    """A flow's own parameters are the guide's, and a copy has its own."""
    with pyro.settings.context(module_local_params=True):
        guide = AutoAmortized(factor, family=kind, dependence="structured")
        loss = Trace_ELBO()(factor, guide)
        loss(DATA).backward()
        assert all(p.grad is not None for p in guide.parameters())
        assert (guide.flows is not None) == (kind == "flow")
        other = copy.deepcopy(guide)
        other.load_state_dict(guide.state_dict())
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        pyro.set_rng_seed(0)
        one = guide(DATA)["z"]
        pyro.set_rng_seed(0)
        assert not torch.equal(one, other(DATA)["z"])
        pyro.set_rng_seed(0)
        assert torch.equal(one, guide(DATA)["z"])


@pytest.mark.parametrize("changed", [False, True])
def test_recorded_steps(changed):
    """Equal to eager ones number for number, unless a step runs the model once more, which then draws as well."""

    def model(x):
        factor(x + 0.0 if changed else x)

    losses = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = emvae.SVI(model, AutoAmortized(model), pyro.optim.Adam({"lr": 0.01}), backend=backend)
        losses.append([svi.step(DATA + i) for i in range(4)])
    assert (losses[0] == losses[1]) is not changed and all(map(math.isfinite, losses[1]))
