r"""What the surrogate is put together from: which draw reaches which term, probes, learned coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO

from pyro_emvae import EmvaeError, EstimatorError, MonteCarloELBO, Traits, compare_gradients
from pyro_emvae.estimators import Control, Estimator, LeaveOneOut, Score
from pyro_emvae.estimators.bernoulli import element_logits
from pyro_emvae.particles import dependence
from pyro_emvae.testing import check_estimator

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")
NAMES = ("a", "b", "c", "d", "e", "f")


def guide() -> None:
    a = pyro.sample("a", dist.Normal(pyro.param("p", torch.zeros(())), 1.0))
    pyro.sample("b", dist.Bernoulli(logits=a))
    for name in NAMES[2:]:
        pyro.sample(name, dist.Normal(0.0, 1.0))


def model() -> None:
    z = {name: pyro.sample(name, dist.Bernoulli(0.5) if name == "b" else dist.Normal(0.0, 1.0)) for name in NAMES}
    written = torch.zeros(3)
    written[1] = z["c"]
    loc = 1.0 if z["d"] > 0 else 0.0
    pyro.sample("x", dist.Normal(written, 1.0).to_event(1), obs=torch.zeros(3))
    pyro.sample("y", dist.Normal(float(np.asarray(z["e"].detach())), 1.0), obs=torch.tensor(loc))


def test_what_a_draw_reaches():
    pyro.clear_param_store()
    found = dependence(model, guide, (), {})
    assert found["a"] == {("guide", "a"), ("guide", "b"), ("model", "a"), ("model", "b")}
    assert found["b"] == {("guide", "b"), ("model", "b")}
    assert found["c"] == {("guide", "c"), ("model", "c"), ("model", "x")}  # written into a view
    assert ("model", "y") in found["d"] and len(found["d"]) == 11 and len(found["e"]) == 10  # Python has looked at them
    assert found["f"] == {("guide", "f"), ("model", "f")}
    assert found.upstream("b") == ("a",) and found.upstream("f") == ("d", "e")


def pairs(count: int = 6):
    """Independent pairs of a bit and its datum, in no plate."""

    def model() -> None:
        for i in range(count):
            b = pyro.sample(f"b{i}", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            pyro.sample(f"x{i}", dist.Normal(2 * b, 1.0), obs=torch.tensor(0.5 * i, dtype=torch.float64))

    def guide() -> None:
        logits = pyro.param("logits", lambda: torch.linspace(-1, 1, count, dtype=torch.float64))
        for i in range(count):
            pyro.sample(f"b{i}", dist.Bernoulli(logits=logits[i]))

    return model, guide


def test_terms_that_a_draw_does_not_reach_are_left_out():
    """As in TraceGraph_ELBO; Trace_ELBO weighs every site by everything."""
    pyro.clear_param_store()
    rows = {
        "ours": "score",
        "all": Score(reach="all"),
        "graph": TraceGraph_ELBO(num_particles=1),
        "trace": Trace_ELBO(num_particles=1),
    }
    table = compare_gradients(*pairs(4), estimators=rows, num_particles=1, num_replicates=400, seed=0).dataset
    variance = {name: float(table.variance_mean.sel(estimator=name, block="guide")) for name in rows}
    assert variance["ours"] < 0.4 * variance["all"]
    assert variance["ours"] == pytest.approx(variance["graph"], rel=0.35)
    assert variance["all"] == pytest.approx(variance["trace"], rel=0.35)


def test_a_model_that_changes_is_looked_at_again():
    """A term that a draw begins to reach is found after 2, 8, 64, ... uses."""
    pyro.clear_param_store()
    switch = {"on": False}

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(0.5))
        loc = b if switch["on"] else torch.zeros(())
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("b", dist.Bernoulli(pyro.param("q", torch.tensor(0.5))))

    loss = MonteCarloELBO(2, estimator="leave_one_out")
    loss.loss_and_grads(model, guide)
    (plan,) = loss.plans.values()
    assert ("model", "x") not in plan.depends["b"]
    switch["on"] = True
    for _ in range(7):
        loss.loss_and_grads(model, guide)
    assert ("model", "x") in plan.depends["b"]


@dataclass(frozen=True)
class Difference(Estimator):
    """The exact gradient of a bit, by the model's values at both outcomes."""

    traits: ClassVar[Traits] = Traits(support="binary", probes="yes")

    def probes(self, site, rows, state):
        return torch.stack([torch.ones_like(site.value), torch.zeros_like(site.value)])

    def surrogate(self, site, signal, rows, state):
        term = (site.probed.signal[0] - site.probed.signal[1]) * element_logits(site).sigmoid()
        return {"value": term, "guide": term}


@dataclass(frozen=True)
class Constant(Estimator):
    """The score function with a learned constant as baseline."""

    traits: ClassVar[Traits] = Traits(controls=True, stateful=True, support="binary")

    def surrogate(self, site, signal, rows, state):
        term = signal * site.log_q
        return {"value": term, "guide": term, "controls": {"constant": Control(site.log_q, decay=0.95)}}


X = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)


def bits_in_a_plate(size: int | None = None):
    """Bits of a plate (of which a part is seen), after a global one that every bit's distribution depends on."""

    def model(x):
        g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
        with pyro.plate("data", len(x), subsample_size=size) as index:
            b = pyro.sample("b", dist.Bernoulli(0.3 + 0.2 * g))
            pyro.sample("x", dist.Normal(2 * b, 1.0), obs=x[index])

    def guide(x):
        logit = pyro.param("global", lambda: torch.tensor(0.3, dtype=torch.float64))
        logits = pyro.param("logits", lambda: torch.linspace(-1, 1, 4, dtype=torch.float64))
        g = pyro.sample("g", dist.Bernoulli(logits=logit))
        with pyro.plate("data", len(x), subsample_size=size) as index:
            pyro.sample("b", dist.Bernoulli(logits=logits[index] + g))

    return model, guide


def exact(logit, logits):
    """The gradient of the ELBO, by summing over all values."""
    total = 0.0
    q_g = torch.stack([-logit, logit]).sigmoid()
    for g, p_g in enumerate((0.6, 0.4)):
        q = (logits + g).sigmoid()
        p = 0.3 + 0.2 * g
        one = dist.Normal(2.0, 1.0).log_prob(X) + np.log(p) - q.log()
        zero = dist.Normal(0.0, 1.0).log_prob(X) + np.log(1 - p) - (1 - q).log()
        total = total + q_g[g] * (np.log(p_g) - q_g[g].log() + (q * one + (1 - q) * zero).sum())
    return total


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [None, False], ids=["together", "one by one"])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("estimator", [Difference(), Constant()], ids=["probes", "controls"])
def test_probes_and_controls_are_unbiased(num_particles, vectorize, size, estimator):
    """Downstream draws are made anew at a probe, upstream ones kept; minibatches keep their indices."""
    pyro.clear_param_store()
    model, guide = bits_in_a_plate(size)
    leaves = [torch.tensor(0.3, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(exact(*leaves), leaves)
    loss = MonteCarloELBO(num_particles, estimator=estimator, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(0)
    rows = []
    for _ in range(500):
        loss.loss_and_grads(model, guide, X)
        params = [pyro.param(name).unconstrained() for name in ("global", "logits")]
        rows.append(torch.cat([-p.grad.reshape(-1) for p in params]))
        for p in params:
            p.grad = None
    samples, target = torch.stack(rows), torch.cat([g.reshape(-1) for g in expected])
    z = (samples.mean(0) - target) / (samples.std(0) / len(samples) ** 0.5)
    assert float(z.abs().max()) < 4.5
    assert loss.evaluations == num_particles * (5 if isinstance(estimator, Difference) else 1)


def test_a_learned_constant_removes_most_of_the_variance():
    pyro.clear_param_store()
    rows = {"score": "score", "learned": Constant()}
    table = compare_gradients(*pairs(1), estimators=rows, num_particles=1, num_replicates=1000, seed=0).dataset
    score, learned = (float(table.variance_mean.sel(estimator=name, block="guide")) for name in rows)
    assert learned < score / 2


def test_one_weight_for_all_data_is_refused_in_minibatches():
    with pytest.raises(EmvaeError, match="site 'g' outside plate 'data', which subsamples 2 of 4"):
        MonteCarloELBO(3, objective="iwae", estimator="score").loss(*bits_in_a_plate(2), X)


def test_iwae_of_one_particle_is_the_elbo():
    model, guide = bits_in_a_plate()
    values = []
    for name in ("elbo", "iwae"):
        pyro.set_rng_seed(0)
        values.append(MonteCarloELBO(1, objective=name, estimator="score").loss(model, guide, X))
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_a_learned_coefficient_of_leave_one_out_is_unbiased():
    rows = check_estimator(LeaveOneOut(coefficient="learned"), problems=["bernoulli", "two_level"], num_particles=[2])
    assert [row.how for row in rows] == ["enumeration", "quadrature"]
    with pytest.raises(EstimatorError, match="coefficient='half'"):
        LeaveOneOut(coefficient="half")


# Probes without the guide ---------------------------------------------------------------------------------------------


class Shared:
    """A guide that leaves its model something that is no site."""

    x = torch.tensor([0.3, -1.2, 0.8])

    def guide(self) -> None:
        chances = pyro.param("chances", lambda: torch.tensor([0.3, 0.6, 0.5]))
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Normal(0.1, 1.0))
            b = pyro.sample("b", dist.Bernoulli(chances))
        self.mean = 2 * a + b

    def model(self) -> None:
        with pyro.plate("data", 3):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(self.mean, 1.0), obs=self.x)

    def open_model(self) -> None:
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=a > 0):
                b = pyro.sample("b", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2 * a + b, 1.0), obs=self.x)

    def masking_guide(self) -> None:
        chances = pyro.param("chances", lambda: torch.tensor([0.3, 0.6, 0.5]))
        with pyro.plate("data", 3):
            a = pyro.sample("a", dist.Normal(0.1, 1.0))
            with poutine.mask(mask=a > 0):
                pyro.sample("b", dist.Bernoulli(chances))


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("estimator", ["rebar", "relax", "measure_valued"])
def test_probes_run_the_guide_where_the_model_needs_it(estimator, num_particles):
    """Else the model alone: also under masks by particle."""
    for names, alone in ((("model", "guide"), False), (("open_model", "masking_guide"), True)):
        pyro.clear_param_store()
        shared = Shared()
        pair = tuple(getattr(shared, name) for name in names)
        loss = MonteCarloELBO(num_particles, 1, vectorize_particles=True, estimator={"b": estimator})
        assert math.isfinite(loss.loss_and_grads(*pair))
        assert loss.plans[pair].shortcut == {"b": alone}


def scaled_chain(linked: bool):
    """A masked local normal under a scale, whose location in the guide follows a global one if it is `linked`."""
    keep = torch.tensor([True, False, True, True])

    def sites(loc, scale, g_loc):
        g = pyro.sample("g", dist.Normal(g_loc, 0.5))
        with pyro.plate("data", 4), poutine.scale(scale=2.5), poutine.mask(mask=keep):
            return pyro.sample("z", dist.Normal(loc + (g if linked else 0.0), scale))

    def model():
        z = sites(torch.zeros(4, dtype=torch.float64), 1.3, torch.tensor(0.2, dtype=torch.float64))
        with pyro.plate("observed", 4):
            pyro.sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        loc = pyro.param("loc", lambda: torch.linspace(-1, 1, 4, dtype=torch.float64))
        log_scale = pyro.param("log_scale", lambda: torch.tensor(-0.5, dtype=torch.float64))
        sites(loc, log_scale.exp(), pyro.param("g_loc", lambda: torch.tensor(0.4, dtype=torch.float64)))

    return model, guide


@pytest.mark.parametrize("estimator", ["sticking_the_landing", "adaptive_sticking"])
@pytest.mark.parametrize(("num_particles", "vectorize"), [(1, None), (3, True), (3, False)])
def test_values_are_cut_only_where_a_site_has_draws_upstream(estimator, num_particles, vectorize):
    """Without such, the direct score is taken off by log q at detached values: the same gradient, draw by draw."""
    for linked in (False, True):
        pyro.clear_param_store()
        pair, grads = scaled_chain(linked), []
        loss = MonteCarloELBO(num_particles, vectorize_particles=vectorize, max_plate_nesting=1, estimator=estimator)
        loss.loss(*pair)
        (plan,) = loss.plans.values()
        assert plan.splits == linked
        for splits in (plan.splits, True):
            plan.splits = splits
            pyro.set_rng_seed(1)
            state = {}
            for _ in range(20):  # coefficients are learned
                evaluation = loss.evaluate(*pair, (), {}, state)
                state = evaluation.state
            leaves = [pyro.param(name).unconstrained() for name in ("loc", "log_scale", "g_loc")]
            grads.append(torch.autograd.grad(evaluation.surrogate, leaves))
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_a_draw_that_comes_to_have_draws_upstream_is_cut_from_then_on():
    pyro.clear_param_store()
    switch = {"on": False}

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    def guide():
        a = pyro.sample("a", dist.Normal(pyro.param("p", torch.tensor(0.5)), 1.0))
        pyro.sample("b", dist.Normal(a if switch["on"] else torch.zeros(()), 1.0))

    loss = MonteCarloELBO(1, estimator="sticking_the_landing")
    loss.loss_and_grads(model, guide)
    (plan,) = loss.plans.values()
    assert not plan.splits
    switch["on"] = True
    for _ in range(8):
        loss.loss_and_grads(model, guide)
    assert plan.splits


def test_double_control_variate_runs_model_and_guide_once():
    pyro.clear_param_store()
    calls = []

    def model():
        calls.append("model")
        with pyro.plate("data", 4):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(2 * b, 1.0), obs=X)

    def guide():
        calls.append("guide")
        logits = pyro.param("logits", lambda: torch.zeros(4, dtype=torch.float64))
        with pyro.plate("data", 4):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    loss = MonteCarloELBO(3, max_plate_nesting=1, vectorize_particles=True, estimator="double_control_variate")
    loss.loss(model, guide)
    calls.clear()
    loss.evaluate(model, guide, (), {})
    assert calls == ["guide", "model"] and loss.evaluations == 6


def test_a_site_that_appears_later_is_in_the_signal_at_once():
    pyro.clear_param_store()
    switch = {"on": False}

    def later(b, loc):
        if switch["on"]:
            pyro.sample("z", dist.Normal(loc * b, 0.5))

    def model():
        b = pyro.sample("b", dist.Poisson(2.0))
        later(b, 1.0)
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(1.0))

    def guide():
        b = pyro.sample("b", dist.Poisson(pyro.param("rate", torch.tensor(1.5))))
        later(b, 0.3)

    loss = MonteCarloELBO(2, estimator="leave_one_out")
    for _ in range(3):
        loss.loss_and_grads(model, guide)
    (plan,) = loss.plans.values()
    switch["on"] = True
    loss.loss_and_grads(model, guide)
    assert {("model", "z"), ("guide", "z")} <= plan.depends["b"]


def test_sticking_is_annealed_as_the_objective_is():
    """Where q is the tempered posterior, nothing is left of the gradient."""
    pyro.clear_param_store()
    beta = torch.tensor(0.5, dtype=torch.float64)
    precision = 1 + 1 / beta  # p(z) N(x; z, 1)^(1/beta)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide():
        loc = pyro.param("loc", X[0] / beta / precision)
        pyro.sample("z", dist.Normal(loc, pyro.param("scale", precision**-0.5)))

    loss = MonteCarloELBO(3, vectorize_particles=True, estimator="sticking_the_landing")
    evaluation = loss.evaluate(model, guide, (), {}, beta=beta)
    for gradient in torch.autograd.grad(evaluation.surrogate, [pyro.param(name) for name in ("loc", "scale")]):
        assert float(gradient.abs()) < 1e-12


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparse", [False, True])
def test_coefficients_of_any_dtype_and_layout(first, sparse):
    """Of parameters of two dtypes, of a table alone, and none of a density without parameters."""
    pyro.clear_param_store()
    second = torch.float64 if first is torch.float32 else torch.float32
    table = torch.nn.Embedding(3, 1, sparse=True)

    def model():
        pyro.sample("e", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("e", dist.Normal(0.0, 1.0))
        if sparse:
            pyro.module("table", table)
            loc = table(torch.tensor([0, 2])).squeeze(-1)
        else:
            loc = pyro.param("a", torch.zeros(2, dtype=first)) + pyro.param("b", torch.ones(2, dtype=second))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    loss = MonteCarloELBO(2, estimator="adaptive_sticking")
    for _ in range(3):
        loss.loss_and_grads(model, guide)
    assert all(torch.isfinite(tensor).all() for tensor in loss.state["z"].values())
    assert any(bool(tensor.abs().min() > 0) for tensor in loss.state["z"].values())
