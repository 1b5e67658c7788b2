r"""`explain`: the tables say what is there, every flag finds its planted defect, and sound models have none."""

from __future__ import annotations

import dataclasses
import importlib
import math
import random
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_emvae as emvae
from pyro_emvae import MonteCarloELBO, problems
from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import entries
from pyro_emvae.diagnostics import explain
from pyro_emvae.particles import draw

explain_module = importlib.import_module("pyro_emvae.diagnostics.explain")  # the package's name is the function
FACTORIES = {entry.name: entry.factory for entry in entries("problem")}
X = torch.tensor([0.5, -1.0, 2.0, 0.25])


def param(name: str, value: float = 0.0, **kwargs):
    return pyro.param(name, torch.tensor(value), **kwargs)


def model(x):
    mu = pyro.sample("mu", dist.Normal(param("theta", 0.3), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x, **infer):
    pyro.sample("mu", dist.Normal(param("loc"), 0.6), infer=infer.get("mu"))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + param("shift"), 0.4))


def wide_guide(x):
    pyro.sample("mu", dist.Normal(param("loc"), 0.6))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + pyro.param("shift", torch.zeros(2)).sum(), 0.4))


def kinds(result) -> list[str]:
    return [flag.kind for flag in result.flags]


# What is there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_problems_have_no_flags(name):
    problem = FACTORIES[name]()
    result = explain(problem.model, problem.guide, *problem.args, seed=0)
    assert result.flags == ()
    assert {row.site for row in result.sites if row.role == "latent"} == set(problem.sites)
    blocks = {"guide": problem.guide_params, "model": problem.model_params}
    for block, names in blocks.items():
        assert {row.parameter for row in result.parameters if row.block == block} == set(names)
    assert all(row.gradient_norm > 0 and row.snr >= 0 for row in result.parameters)


def test_rows():
    result = explain(model, guide, X, loss=MonteCarloELBO(num_particles=4, estimator={"mu": "leave_one_out"}), seed=0)
    mu, z, x = result.sites
    assert (mu.site, mu.role, mu.plates, mu.shape, mu.scale, mu.mask) == ("mu", "latent", (), (), "1", "")
    assert (mu.estimator, mu.why, mu.cost) == ("LeaveOneOut", "named for this site", "4 model runs, vectorized")
    assert (z.plates, z.shape, z.estimator) == (("data[4]",), (4,), "Pathwise(entropy=Analytic())")
    assert (x.role, x.estimator, x.cost) == ("data", "", "")
    assert [(row.parameter, row.block) for row in result.parameters] == [
        ("loc", "guide"),
        ("shift", "guide"),
        ("theta", "model"),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.flags = ()


def test_roles_scales_and_masks():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(z**2))
        pyro.deterministic("twice", 2 * z)
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 0), obs=x)

    result = explain(model, AutoDiagonalNormal(model), X, seed=0)
    assert {row.site: row.role for row in result.sites} == {
        "_AutoDiagonalNormal_latent": "auxiliary",
        "z": "latent",
        "penalty": "factor",
        "twice": "deterministic",
        "x": "data",
    }
    x = result.sites[-1]
    assert (x.plates, x.scale, x.mask) == (("data[4 of 8]",), "2", "3 of 4")


def test_gradient_norm_and_signal_to_noise(monkeypatch):
    grads = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1.0
    states = iter(range(20))

    def gradient(model, guide, loss, args, kwargs, *, only):
        k = next(states)
        assert loss.state == ({"step": k} if k else {})
        return SimpleNamespace(grads={"shift": grads[k, :2].float(), "theta": grads[k, 2]}, state={"step": k + 1})

    monkeypatch.setattr(explain_module, "gradient", gradient)
    monkeypatch.setattr(explain_module, "_choose", lambda loss, site: ("", ""))
    loc, shift, theta = explain(lambda x: model(x), wide_guide, X, loss=MonteCarloELBO()).parameters
    assert (loc.gradient_norm, math.isnan(loc.snr)) == (0.0, True)
    mean, variance = grads[:, 2].mean(), grads[:, 2].var()
    assert theta.gradient_norm == pytest.approx(float(mean), rel=1e-12)
    assert theta.snr == pytest.approx(float(((mean**2 - variance / 20) / variance).sqrt()), rel=1e-12)
    mean, variance = grads[:, :2].mean(0), grads[:, :2].var(0).sum()
    assert shift.gradient_norm == pytest.approx(float(mean.norm()), rel=1e-6)
    assert shift.snr == pytest.approx(float(((mean.square().sum() - variance / 20) / variance).sqrt()), rel=1e-6)


def test_exact_gradient_has_infinite_signal_to_noise():
    def model():
        pyro.sample("z", dist.Delta(param("point", 1.5)))
        pyro.sample("x", dist.Normal(param("point"), 1.0), obs=torch.tensor(0.0))

    def guide():
        pyro.sample("z", dist.Delta(param("point", 1.5)))

    (row,) = explain(model, guide, seed=0).parameters
    assert row.gradient_norm == pytest.approx(1.5) and row.snr == math.inf


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger, AutoDelta])
def test_autoguides_have_no_flags(make):
    assert explain(model, make(model), X, seed=0).flags == ()


def test_pyro_modules_have_no_flags():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](1, 1)
            self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

        def forward(self, x):
            pyro.sample("mu", dist.Normal(self.net(x.mean()[None])[0], self.scale))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x[:, None])[:, 0], self.scale))

    assert explain(model, Guide(), X, seed=0).flags == ()


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceGraph_ELBO(2), TraceMeanField_ELBO(), TraceEnum_ELBO()])
def test_losses_of_pyro(loss):
    result = explain(model, guide, X, loss=loss, seed=0)
    assert result.flags == () and all(row.gradient_norm > 0 for row in result.parameters)
    name = type(loss).__name__
    assert [row.why for row in result.sites] == [f"{name}: has rsample"] * 2 + [""]


def test_prints_as_tables():
    text = str(explain(model, lambda x: guide(x, mu={"baseline": {}}), X, seed=0))
    header, rule, *_ = text.splitlines()
    assert header.split() == ["site", "role", "plates", "shape", "scale", "mask", "estimator", "why", "cost"]
    assert set(rule) == {"-", " "} and "data[4]" in text and "! [annotation] mu: " in text
    assert repr(explain(model, guide, X)).endswith("No flags.")


# Planted defects ----------------------------------------------------------------------------------------------------


def in_model_only(x):
    model(x)
    pyro.sample("extra", dist.Normal(0.0, 1.0))


def other_event(x):
    pyro.sample("mu", dist.Normal(param("theta"), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 1]).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=x)


def observed_z(x):
    with poutine.condition(data={"z": x}):
        model(x)


def scaled(x):
    with poutine.scale(scale=0.1):
        model(x)


def masked(x):
    mu = pyro.sample("mu", dist.Normal(param("theta", 0.3), 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=x > -0.5):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def masked_elsewhere(x):
    pyro.sample("mu", dist.Normal(param("loc"), 0.6))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + param("shift"), 0.4).mask(x < 2))


def loose(x):
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
    model(x)


def loose_guide(x):
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))
    guide(x)


def centred(x):
    mu = pyro.sample("mu", dist.Normal(param("theta"), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(), 0.5), obs=x)


def branching(x):
    mu = pyro.sample("mu", dist.Normal(param("theta"), 1.0))
    mu = mu if mu > 0 else -mu
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(mu, 1.0)), 0.5), obs=x)


def zero_scale_guide(x):
    pyro.sample("mu", dist.Normal(param("loc"), param("scale", math.nan)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.4))


def infinite(x):
    model(x)
    pyro.factor("wall", torch.tensor(-math.inf))


def annotated_model(x):
    pyro.sample("mu", dist.Normal(param("theta"), 1.0), infer={"estimator": "score"})
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.5), obs=x)


def idle(x):
    model(x)
    param("forgotten")


def detached(x):
    pyro.sample("mu", dist.Normal(param("loc"), 0.6))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + (param("shift", 1.0) - 1.0).abs() * 0.0, 0.4))


NET = nn.Linear(1, 1)


def unregistered(x):
    pyro.sample("mu", dist.Normal(param("loc"), 0.6))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(NET(x[:, None])[:, 0], 0.4))


def root(x):
    mu = pyro.sample("mu", dist.Normal(param("theta"), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0 + param("width", 0.0).sqrt()))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def outside(x):
    model(x)
    pyro.sample("count", dist.Poisson(2.0), obs=torch.tensor(0.5))


def crash(x):
    raise KeyError("weights")


def spoilt(x):
    return torch.where(x > 1, math.nan, x)


def idle_auxiliary(x):
    guide(x)
    pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


def too_many_auxiliaries(x):
    us = [pyro.sample(name, dist.Normal(param("loc"), 0.6), infer={"is_auxiliary": True}) for name in ("u", "v")]
    pyro.sample("mu", dist.Delta(us[0] + us[1]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + param("shift"), 0.4))


def scaled_auxiliary(x):
    with poutine.scale(scale=3.0):
        u = pyro.sample("u", dist.Normal(param("loc"), 0.6), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(u))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + param("shift"), 0.4))


def reverse(z):
    return z + z.flip(-1)


def mixing(mix):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(param("theta", 0.3), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(mix(z), 0.5), obs=x)

    return model


def narrow_guide(make):
    def guide(x):
        pyro.sample("mu", dist.Normal(param("loc"), 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", make((x + param("shift")).exp()))

    return guide


def other_plate(x):
    pyro.sample("mu", dist.Normal(param("loc"), 0.6))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x + param("shift"), 0.4))


AUTO_CUMSUM = AutoDiagonalNormal(mixing(lambda z: z.cumsum(-1)))
BASELINE = {"mu": {"baseline": {"use_decaying_avg_baseline": True}}}
ANNOTATED = {"mu": {"estimator": "score"}}


@dataclasses.dataclass(frozen=True)
class Defect:
    """A planted defect, the flags that it raises, and what the first has to name."""

    kind: str
    where: str
    says: str
    mends: str
    model: object = model
    guide: object = guide
    loss: object = None
    x: torch.Tensor = X
    also: tuple[str, ...] = ()


DEFECTS = {
    "in the model only": Defect("unmatched_site", "extra", "does not draw", "'extra'", in_model_only),
    "in the guide only": Defect("unmatched_site", "extra", "no such site", "is_auxiliary", guide=in_model_only),
    "renamed": Defect(
        "unmatched_site", "my", "no such site", "'mu'", guide=lambda x: pyro.sample("my", dist.Normal(0.0, 1.0))
    ),
    "observed": Defect("unmatched_site", "z", "the model observes it", "Delete", observed_z),
    "event dims": Defect("unmatched_site", "z", "0 in the guide and 1 in the model", ".to_event", other_event),
    "scale": Defect("scale", "mu", "scale 0.1 in the model, 1 in the guide", "poutine.scale", scaled),
    "mask": Defect(
        "scale",
        "z",
        "mask 3 of 4 in the model, none in the guide",
        "poutine.mask",
        masked,
    ),
    "other mask": Defect(
        "scale", "z", "mask 3 of 4, of other elements in the guide", "poutine.mask", masked, masked_elsewhere
    ),
    "idle auxiliary": Defect(
        "auxiliary", "u", "no Delta site is computed", "Add it to the model", guide=idle_auxiliary
    ),
    "two for one": Defect("auxiliary", "u", "2 auxiliary coordinates, but 1", "as many", guide=too_many_auxiliaries),
    "scaled auxiliary": Defect(
        "scale", "u", "scale 3 in the guide, 1 of 'mu'", "poutine.scale", guide=scaled_auxiliary
    ),
    "a sum over data": Defect("entangled", "x", "plate 'data'", ".to_event(1)", mixing(lambda z: z.cumsum(-1))),
    "a sum over data, drawn at once": Defect(
        "entangled", "x", "plate 'data'", ".to_event(1)", mixing(lambda z: z.cumsum(-1)), guide=AUTO_CUMSUM
    ),
    "data in pairs": Defect("entangled", "x", "plate 'data'", ".to_event(1)", mixing(reverse)),
    "half the support": Defect(
        "support", "z", "the guide never draws values such as -", "LogNormal", guide=narrow_guide(dist.HalfCauchy)
    ),
    "positive": Defect("support", "z", "Real() in the model", "dist.Normal", guide=narrow_guide(dist.Exponential)),
    "renamed plate": Defect(
        "plate_name", "z", "'data' in the model, 'rows' in the guide", 'plate("data"', guide=other_plate
    ),
    "NaN in an encoder": Defect("non_finite", "z", "argument 'x' holds NaN", "x.nan_to_num()", x=spoilt(X)),
    "batch dims": Defect(
        "batch_dims", "w", "batch shape (3,), of which plates declare 0", ".to_event(1)", loose, loose_guide
    ),
    "mixes particles": Defect("vectorize", "x", "site 'x' differs", "z.mean(-1)", centred, also=("entangled",)),
    "branches": Defect("vectorize", "model or guide", "RuntimeError", "vectorize_particles=False", branching),
    "baseline": Defect("annotation", "mu", "MonteCarloELBO ignores", "rsample", guide=lambda x: guide(x, **BASELINE)),
    "baseline in Trace_ELBO": Defect(
        "annotation", "mu", "Trace_ELBO ignores", "rsample", guide=lambda x: guide(x, **BASELINE), loss=Trace_ELBO()
    ),
    "estimator in Trace_ELBO": Defect(
        "annotation",
        "mu",
        'Trace_ELBO ignores infer={"estimator": ...}',
        "MonteCarloELBO(estimator=",
        guide=lambda x: guide(x, **ANNOTATED),
        loss=Trace_ELBO(),
    ),
    "annotations off": Defect(
        "annotation",
        "mu",
        "MonteCarloELBO ignores",
        "estimator=",
        guide=lambda x: guide(x, **ANNOTATED),
        loss=MonteCarloELBO(annotations=False),
    ),
    "annotated model": Defect("annotation", "mu", "stands in the model", "guide's pyro.sample('mu'", annotated_model),
    "unused": Defect("no_gradient", "forgotten", "depends on it", "delete", idle),
    "zero gradient": Defect("no_gradient", "shift", "zero in all 20 replicates", ".detach()", guide=detached),
    "unregistered": Defect("no_gradient", "Linear", "weight, bias", "pyro.module", guide=unregistered),
    "NaN in the data": Defect(
        "non_finite", "x", "non-finite value at the model's", "nan_to_num", guide=lambda x: guide(X), x=spoilt(X)
    ),
    "NaN in a parameter": Defect("non_finite", "mu", "value at the guide's", "finite", guide=zero_scale_guide),
    "infinite factor": Defect("non_finite", "wall", "log density", "support", infinite),
    "infinite gradient": Defect("non_finite", "gradient", "'width'", "sqrt", root),
    "outside the support": Defect("run", "model or guide", "site 'count'", "support of the site", outside),
    "a name twice": Defect("run", "model or guide", "second sample", "its own name", lambda x: (model(x), model(x))),
    "crashes": Defect("run", "model or guide", "KeyError: 'weights'", "model(*args)", crash),
    "one particle": Defect(
        "loss", "MonteCarloELBO", "num_particles=1", "num_particles=2", loss=MonteCarloELBO(estimator="leave_one_out")
    ),
    "unknown site": Defect(
        "loss", "MonteCarloELBO", "site 'my'", "'mu'", loss=MonteCarloELBO(estimator={"my": "score"})
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_is_flagged(name):
    defect = DEFECTS[name]
    result = explain(defect.model, defect.guide, defect.x, loss=defect.loss, seed=0)
    flags = {flag.where: flag for flag in result.flags if flag.kind == defect.kind}
    assert set(kinds(result)) == {defect.kind, *defect.also}, str(result)
    flag = flags[defect.where]
    assert defect.says in flag.message and defect.mends in flag.fix, str(flag)
    assert str(flag) in str(result)


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(param("theta", 0.3) + k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x + param("shift"), 0.4))


@pytest.mark.parametrize("loss", [TraceEnum_ELBO(max_plate_nesting=1), MonteCarloELBO()])
def test_what_is_enumerated_needs_no_guide(loss):
    assert explain(mixture, mixture_guide, X, loss=loss, seed=0).flags == ()


def test_what_is_not_enumerated_is_said():
    loss = Trace_ELBO()
    (flag,) = explain(mixture, mixture_guide, X, loss=loss, seed=0).flags
    assert (flag.kind, flag.where) == ("unmatched_site", "k")
    assert f"{type(loss).__name__} does not sum out" in flag.message and "TraceEnum_ELBO()" in flag.fix


def test_an_enumerated_guide_site_is_summed_unless_its_estimator_draws():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + param("shift"), 0.4))
            pyro.sample("k", dist.Bernoulli(0.5 + 0 * x), infer={"enumerate": "parallel"})

    assert not explain(mixture, guide, X, seed=0).flags
    flags = explain(mixture, guide, X, loss=MonteCarloELBO(estimator={"k": "score"}), seed=0).flags
    assert [(flag.kind, flag.where) for flag in flags] == [("annotation", "k")]


def test_empty_data():
    (flag,) = explain(model, guide, X[:0], seed=0).flags
    assert flag.kind == "run" and "shape (0,)" in flag.message and "at least one" in flag.fix


@pytest.mark.parametrize("nested", [False, True])
def test_what_crosses_plates_by_right_is_no_flag(nested):
    """A group's latent is shared by its items, and a site outside a plate may read all of it."""

    def model(x):
        with pyro.plate("groups", 2, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("items", 3, dim=-2) if nested else poutine.block(hide=[]):
                pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(a.sum(-1, keepdim=True), 1.0), obs=x.sum())

    assert explain(model, AutoNormal(model), X, seed=0).flags == ()


def batch_model(x, num_data=None, index=None, epochs=1000):
    mu = pyro.sample("mu", dist.Normal(param("theta"), 1.0))
    x = x if index is None else x[index]
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 0.5), obs=x)


def batch_guide(*args, **kwargs):
    pyro.sample("mu", dist.Normal(param("loc"), 0.6))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_data": 100}, ("'num_data' speaks of 100", "25 times", 'pyro.plate("data", num_data, subsample_size=4)')),
        (
            {"index": torch.tensor([0, 2])},
            ("'x' speaks of 4", "2 times", 'pyro.plate("data", len(x), subsample_size=2)'),
        ),
        ({"num_data": 4}, None),
        ({"epochs": 2000}, None),
        ({}, None),
    ],
)
def test_plate_as_large_as_the_batch(arguments, says):
    result = explain(batch_model, batch_guide, X, **arguments, seed=0)
    if says is None:
        assert result.flags == ()
    else:
        (flag,) = result.flags
        assert flag.kind == "plate_size" and flag.where == "data"
        assert says[0] in flag.message and says[1] in flag.message and says[2] in flag.fix


def test_plate_size_reads_a_modules_forward():
    class Model(nn.Module):
        def forward(self, x, total_size):
            batch_model(x)

    assert kinds(explain(Model(), batch_guide, X, 100)) == ["plate_size"]
    assert kinds(explain(lambda x, *_: batch_model(x), batch_guide, X, 100)) == []


def test_subsampled_plate_is_no_flag():
    def model(x, num_data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", num_data, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, 0.5), obs=x)

    assert explain(model, batch_guide, X, 100).flags == ()


def test_what_is_no_loss_is_refused():
    with pytest.raises(EmvaeError, match="str"):
        explain(model, guide, X, loss="elbo")


def test_several_defects_at_once():
    result = explain(scaled, lambda x: (guide(x, **BASELINE), param("forgotten")), X, seed=0)
    assert kinds(result) == ["scale", "scale", "annotation", "no_gradient"]


# Watching changes nothing -------------------------------------------------------------------------------------------


def test_looking_changes_nothing():
    encoder = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.sample("mu", dist.Normal(param("loc"), 0.6), infer={"estimator": "decaying_average"})
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 0.4))

    loss = MonteCarloELBO()
    loss.loss_and_grads(model, guide, X)
    for leaf in encoder.parameters():
        leaf.grad = torch.ones_like(leaf)
    loc = pyro.get_param_store()["loc"]
    loc.grad = torch.tensor(7.0)
    encoder[2].eval()
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    state = {n: t.clone() for n, t in loss.state["mu"].items()}
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for seed, kind in ((None, loss), (3, loss), (3, Trace_ELBO())):
        explain(model, guide, X, loss=kind, seed=seed)
        explain(in_model_only, guide, X, loss=kind, seed=seed)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == generators[1:]
    assert all(torch.equal(t, before[n]) for n, t in encoder.state_dict().items())
    assert [m.training for m in encoder] == [True, True, False, True]
    assert all(bool((leaf.grad == 1).all()) for leaf in encoder.parameters()) and float(loc.grad) == 7.0
    assert {n: float(t) for n, t in loss.state["mu"].items()} == {n: float(t) for n, t in state.items()}
    assert set(loss.resolved) == {"mu", "z"}


def test_loss_that_has_not_run_stays_as_it_is():
    loss = MonteCarloELBO(num_particles=2)
    explain(model, guide, X, loss=loss)
    assert loss.resolved == {} and loss.state == {}


@pytest.mark.parametrize("look", [explain, emvae.to_arviz])
def test_a_fit_is_the_same_after_looking(look):
    def guide(x):
        loc = pyro.param("start", lambda: torch.randn(()))
        pyro.sample("mu", dist.Normal(loc, 0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + param("shift"), 0.4))

    results = []
    for before in (lambda: None, lambda: look(model, guide, X, seed=1)):
        pyro.clear_param_store()
        torch.manual_seed(5)
        before()
        em = emvae.EM(model, guide, pyro.optim.Adam({"lr": 0.01}))
        results.append([em.step(X) for _ in range(3)] + [v.item() for v in pyro.get_param_store().values()])
    assert results[0] == results[1]


def test_seeds():
    draw(model, guide, (X,))
    one, two, three = (explain(model, guide, X, seed=seed) for seed in (0, 0, 1))
    assert one == two and one != three


@pytest.mark.parametrize(("make", "loss", "shown"), [
    (problems.categorical, None, ("Enumerated", "3 model runs")),
    (problems.categorical, MonteCarloELBO(2, estimator="leave_one_out"), ("LeaveOneOut", "2 model runs, vectorized")),
    (problems.bernoulli_vector, MonteCarloELBO(estimator="rebar"), ("Rebar", "5 model runs")),
    (problems.discrete_two_level, None, ("Enumerated", "2 model runs")),
])  # fmt: skip
def test_the_cost_counts_outcomes_and_further_values(make, loss, shown):
    problem = make()
    row = explain(problem.model, problem.guide, *problem.args, loss=loss, seed=0).sites
    drawn = [site for site in row if site.estimator]
    assert (drawn[-1].estimator, drawn[-1].cost) == shown


def test_a_kl_in_closed_form_at_its_least_is_no_cut_gradient():
    """Guide and prior agree at the start: the prior's mean has the gradient zero in every draw, and is not cut."""

    def agreeing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(param("theta"), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def agreed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(param("loc"), 1.0))

    result = explain(agreeing, agreed, X, seed=0)
    assert {row.parameter: row.gradient_norm for row in result.parameters}["theta"] == 0
    assert result.flags == ()
