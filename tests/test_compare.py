"""`compare_gradients`: what it measures is right, what it finds biased is biased, and it leaves no trace."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_emvae as emvae
from pyro_emvae import problems
from pyro_emvae._registry import Traits
from pyro_emvae.compare.cost import _most_by_count
from pyro_emvae.compare.replicates import split
from pyro_emvae.compare.rows import Row
from pyro_emvae.engine import Replicator, gradient, record
from pyro_emvae.engine.replicates import BATCHED
from pyro_emvae.estimators import LeaveOneOut, Score
from pyro_emvae.objectives import ELBO, Objective
from pyro_emvae.particles import hold_batch

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")

EXACT = (
    "normal_normal",
    "linear_gaussian",
    "skewed",
    "bernoulli",
    "categorical",
    "two_level",
    "mixed_two_level",
    "masked",
)


def compare(problem, **options):
    return emvae.compare_gradients(problem.model, problem.guide, *problem.args, seed=0, **options)


@dataclass(frozen=True)
class Shrunk(LeaveOneOut):
    """The classic slip: dividing by n instead of n - 1."""

    traits: ClassVar[Traits] = Traits(min_particles=2)

    def surrogate(self, site, signal, rows, state):
        term = super().surrogate(site, signal, rows, state)["guide"] * ((rows - 1) / rows)
        return {"value": term, "guide": term}


@pytest.mark.parametrize("name", EXACT)
def test_unbiased_rows_agree_with_the_exact_gradient(name):
    problem = getattr(problems, name)()
    rows = ["score", "leave_one_out", *(["pathwise"] if problem.traits.reparameterised else [])]
    table = compare(problem, estimators=rows, reference=problems.exact_gradients(problem), num_replicates=2000)
    assert float(table.dataset.bias_z.max()) < table.dataset.attrs["bias_z_limit"] + 1


@pytest.mark.parametrize("reference", [True, False])
def test_a_biased_row_is_found(reference):
    problem = problems.bernoulli()
    exact = problems.exact_gradients(problem) if reference else None
    rows = {"shrunk": Shrunk(), "leave_one_out": "leave_one_out"}
    data = compare(problem, estimators=rows, reference=exact, num_replicates=4000).dataset.sel(block="guide")
    assert float(data.bias_z.max()) > 3 * data.attrs["bias_z_limit"]
    if reference:
        assert float(data.bias_z.sel(estimator="leave_one_out")) < data.attrs["bias_z_limit"] + 1


def test_variances_are_those_of_a_plain_loop():
    problem = problems.two_level()
    loss = emvae.MonteCarloELBO(2, estimator="score")
    data = compare(problem, estimators=["score"], num_replicates=4000).dataset
    torch.manual_seed(1)
    loop = [gradient(problem.model, problem.guide, loss, problem.args, {}).grads for _ in range(4000)]
    for block, names in (("guide", problem.guide_params), ("model", problem.model_params)):
        variance = torch.cat([torch.stack([g[n].reshape(-1) for g in loop]).var(0) for n in names])
        assert float(data.variance_mean.sel(estimator="score", block=block)) == pytest.approx(
            float(variance.mean()), rel=0.15
        )


def test_exact_variance_of_a_bernoulli_toy():
    """f(b) = (b - t)^2: the variances of estimators.md's table for t = 0.499, phi = 0 (Tucker et al. 2017)."""

    def model():
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        pyro.factor("f", (b - 0.499) ** 2)

    def guide():
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("phi", torch.tensor(0.0, dtype=torch.float64))))

    rows = ["score", "leave_one_out"]
    data = emvae.compare_gradients(model, guide, estimators=rows, num_replicates=20_000, seed=0).dataset
    variance = data.variance_mean.sel(block="guide")
    assert float(variance.sel(estimator="score")) == pytest.approx(0.00781256, rel=0.02)
    assert float(variance.sel(estimator="leave_one_out")) == pytest.approx(2.5e-7, rel=0.05)


def test_default_rows_leave_out_pathwise_where_a_site_has_no_rsample():
    names = list(compare(problems.bernoulli(), num_replicates=20).dataset.estimator.values)
    assert names == ["score", "leave_one_out", "Trace_ELBO"]
    names = list(compare(problems.two_level(), num_replicates=20).dataset.estimator.values)
    assert names == ["score", "leave_one_out", "pathwise", "Trace_ELBO"]


def test_pyro_losses_run_and_are_named_as_looped():
    losses = [
        Trace_ELBO(),
        TraceGraph_ELBO(),
        TraceMeanField_ELBO(),
        TraceEnum_ELBO(strict_enumeration_warning=False),
        Trace_ELBO(),
    ]
    table = compare(problems.local_global(), estimators=losses, num_replicates=30)
    assert list(table.dataset.estimator.values)[-1] == "Trace_ELBO (2)"
    assert set(table.looped) == set(table.dataset.estimator.values)
    assert "TraceGraph_ELBO was run one replicate at a time" in str(table)


def test_a_row_wins_over_annotations_and_a_mapping_is_a_row():
    problem = problems.two_level()
    guide = emvae.config_estimators(problem.guide, {"first": "score", "second": "score"})
    rows = {"all": "pathwise", "one": {"first": "pathwise"}, "again": LeaveOneOut()}
    data = emvae.compare_gradients(problem.model, guide, *problem.args, estimators=rows, seed=0).dataset
    variance = data.variance_mean.sel(block="guide")
    assert float(variance.sel(estimator="all")) < 0.5 * float(variance.sel(estimator="one"))


def test_what_cannot_be_recorded_is_looped_and_named():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z if float(z.detach().sum()) > 0 else 2 * z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))

    table = emvae.compare_gradients(
        model, guide, torch.tensor(1.0), estimators=["pathwise"], num_particles=1, num_replicates=10, seed=0
    )
    assert "test_compare.py" in table.looped["pathwise"]


def test_minibatch_row_is_the_variance_over_batches():
    problem = problems.subsampled()
    data = compare(problem, estimators=["pathwise"], num_replicates=4000).dataset
    leaves = {n: pyro.param(n).unconstrained() for n in problem.guide_params}
    loss = emvae.MonteCarloELBO(4000, estimator="pathwise")
    means = []
    for pair in itertools.combinations(range(5), 2):
        with hold_batch({"data": torch.tensor(pair)}):
            grads = gradient(problem.model, problem.guide, loss, problem.args, {}, only=leaves).grads
        means.append(torch.cat([grads[n].reshape(-1) for n in leaves]))
    expected = torch.stack(means).var(0, correction=0)
    got = data.sel(estimator="minibatch", block="guide")
    assert float(got.variance_max) == pytest.approx(float(expected.max()), rel=0.2)
    assert bool(got.evaluations.isnull())


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 4))

    def forward(self, x):
        return self.net(x)


def test_nothing_is_left_behind():
    encoder, x = Noisy(), torch.randn(6, 2)

    def model(x):
        w = pyro.param("w", torch.ones(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w * z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    svi = emvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}))
    svi.step(x)
    for p in encoder.parameters():
        p.grad = torch.ones_like(p)
    everything = [*encoder.parameters(), *encoder.buffers(), pyro.param("w").unconstrained()]
    before = [t.detach().clone() for t in everything]
    generator = torch.get_rng_state()
    rows = ["score", "pathwise", "decaying_average", Trace_ELBO()]
    emvae.compare_gradients(model, guide, x, estimators=rows, num_replicates=20, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(bool((p.grad == 1).all()) for p in encoder.parameters())
    assert encoder.training and encoder.net[1].training


def test_same_seed_same_numbers_and_export(tmp_path):
    problem = problems.bernoulli()
    one, two = (compare(problem, num_replicates=50) for _ in range(2))
    variables = [v for v in one.dataset.data_vars if "time" not in v and v != "milliseconds"]
    assert one.dataset[variables].equals(two.dataset[variables])
    one.to_csv(tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    sizes = one.dataset.sizes
    assert lines[0].startswith("estimator,block,site,bias,")
    assert len(lines) == 1 + sizes["estimator"] * (sizes["block"] + sizes["site"]) and sizes["site"] == 3
    assert "log" in (one.plot().get_xscale(), one.plot().get_yscale())


def test_chunks_do_not_change_what_is_estimated():
    problem = problems.two_level()
    small = compare(problem, estimators=["pathwise"], num_replicates=3000, memory=2e5).dataset
    large = compare(problem, estimators=["pathwise"], num_replicates=3000).dataset
    assert float(small.variance_mean[0, 0]) == pytest.approx(float(large.variance_mean[0, 0]), rel=0.15)


def test_chunks_are_few_and_even():
    assert split(1000, 528) == [500, 500]
    assert split(10, 4) == [3, 3, 4]
    assert split(3, 0) == [1, 1, 1]


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_replicates_without_randomness_are_the_eager_gradient(particles, weighted):
    """Not even rounding differs: what is left out, folded and rewritten for the replicates changes no number."""
    problem = problems.logistic_regression()

    def guide(x, y):
        pyro.sample("w", dist.Delta(pyro.param("w_map", x[0].clone()), event_dim=1))

    def model(x, y):
        with pyro.poutine.scale(scale=0.5 if weighted else 1.0):
            problem.model(x, y)

    loss = emvae.MonteCarloELBO(particles, estimator="pathwise")
    expected = gradient(model, guide, loss, problem.args, {})
    recording = record(model, guide, loss, expected.leaves, [], problem.args, {})
    replicates = Replicator(recording, problem.args, {}, {})
    assert torch.allclose(replicates(3)["w_map"], expected.grads["w_map"].expand(3, -1), rtol=1e-12, atol=0)
    assert not any("cross_entropy" in str(node.target) for node in replicates.nodes)


def test_the_score_of_a_replicate_is_that_of_its_draw():
    """The value of the objective is used here; with one value that w can take, the gradient is known."""
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    weights = torch.stack([torch.zeros(2), torch.ones(2)]).double()

    def model(x, y):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Bernoulli(logits=(k[..., None] * weights[1]) @ x.T), obs=y)

    def guide(x, y):
        pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.3, dtype=torch.float64))))

    loss = emvae.MonteCarloELBO(1, estimator="score")
    expected = gradient(model, guide, loss, (x, y), {})
    recording = record(model, guide, loss, expected.leaves, [], (x, y), {})
    got = Replicator(recording, (x, y), {}, {})(50)["logit"]
    q = torch.sigmoid(pyro.param("logit").detach())
    log_p = torch.stack([dist.Bernoulli(logits=x @ w).log_prob(y).sum() for w in weights]) + math.log(0.5)
    log_q = torch.stack([(1 - q).log(), q.log()])
    outcomes = -(log_p - log_q) * torch.stack([-q, 1 - q])
    distance = (got[:, None] - outcomes).abs().min(1).values
    assert float(distance.max()) < 1e-12 and len(got.unique()) == 2


def test_views_take_no_memory():
    problem = problems.logistic_regression()
    loss = emvae.MonteCarloELBO(2, estimator="pathwise")
    leaves = gradient(problem.model, problem.guide, loss, problem.args, {}).leaves
    recording = record(problem.model, problem.guide, loss, leaves, [], problem.args, {})
    one = 2 * 569 * 8
    assert one < Replicator(recording, problem.args, {}, {}).bytes_each < 8 * one


def test_a_sample_of_the_coordinates():
    problem = problems.logistic_regression()
    data = compare(problem, estimators=["pathwise"], num_replicates=50, max_coordinates=10).dataset
    assert data.attrs["coordinates"] == 10


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"estimators": ["pathwize"]}, "'pathwize'"),
        ({"estimators": [3.5]}, "float"),
        ({"estimators": ["pathwise"]}, "Bernoulli"),
        ({"estimators": ["leave_one_out"], "num_particles": 1}, "num_particles=1"),
        ({"num_replicates": 1}, "1"),
        ({"num_particles": 0}, "0"),
        ({"reference": {"nowhere": torch.zeros(())}}, "unknown parameter"),
    ],
)
def test_errors(options, observed):
    with pytest.raises(emvae.EmvaeError, match=observed):
        compare(problems.bernoulli(), **{"num_replicates": 10, **options})


def test_a_model_without_parameters_is_refused():
    with pytest.raises(emvae.EmvaeError, match="without parameters"):
        emvae.compare_gradients(
            lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), lambda: pyro.sample("z", dist.Normal(0.0, 2.0))
        )


def test_a_name_and_its_instance_are_the_same_row():
    data = compare(problems.bernoulli(), estimators={"a": "score", "b": Score()}, num_replicates=100).dataset
    assert data.variance_mean.values[0].tolist() == data.variance_mean.values[1].tolist()


# What a row is ----------------------------------------------------------------------------------------------------


def switch(obs: float = 1.0) -> tuple:
    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(obs))

    def guide() -> None:
        pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2))), infer={"baseline": BASELINE})

    return model, guide


BASELINE = {"use_decaying_avg_baseline": True}


def test_losses_of_pyro_leave_no_trace():
    """`TraceGraph_ELBO` keeps its averages in the parameter store, and a loss the plate nesting that it guessed."""
    model, guide = switch()
    loss = infer.TraceGraph_ELBO()
    emvae.compare_gradients(model, guide, estimators=["score", loss], num_replicates=10, seed=0)
    assert set(pyro.get_param_store().keys()) == {"logit"}
    assert loss.max_plate_nesting == math.inf
    loss.loss_and_grads(model, guide)
    average = pyro.param("__baseline_avg_downstream_cost_k").clone()
    emvae.compare_gradients(model, guide, estimators=["score", loss], num_replicates=10, seed=0)
    assert torch.equal(pyro.param("__baseline_avg_downstream_cost_k"), average)


def test_a_loss_in_use_is_compared_as_its_own_and_stays_as_it_is():
    loss = emvae.MonteCarloELBO(2)
    normal = problems.normal_normal()
    loss.loss_and_grads(normal.model, normal.guide, *normal.args)
    resolved = loss.resolved
    table = emvae.compare_gradients(*switch(), estimators=[loss, "score"], num_replicates=10, seed=0)
    assert not table.looped
    assert loss.resolved == resolved


@pytest.mark.parametrize(
    ("row", "unbiased"),
    [
        (infer.Trace_ELBO(num_particles=2), True),
        (infer.TraceGraph_ELBO(num_particles=2), True),
        (infer.TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1), False),
        (infer.RenyiELBO(num_particles=2), False),
    ],
    ids=lambda row: type(row).__name__,
)
def test_what_may_be_the_reference(row, unbiased):
    normal = problems.normal_normal()
    table = emvae.compare_gradients(normal.model, normal.guide, *normal.args, estimators=[row], num_replicates=20)
    assert (table.dataset.attrs["reference"] != "nothing") == unbiased


@dataclass(frozen=True)
class Doubled(Objective):
    """Another objective than the ELBO: twice that."""

    name: ClassVar[str] = "doubled"
    bounds: ClassVar[str] = "none"

    def terms(self, particles):
        return [term._replace(value=2 * term.value) for term in ELBO().terms(particles)]


def test_the_reference_is_a_row_of_the_objective():
    """`Trace_ELBO` and a loss of the ELBO have less variance, but are no reference for another objective."""
    normal = problems.normal_normal()
    theirs = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    rows = {"theirs": theirs, "elbo": emvae.MonteCarloELBO(20), "doubled": "score"}
    options = {"estimators": rows, "num_replicates": 100, "seed": 0}
    data = emvae.compare_gradients(normal.model, normal.guide, *normal.args, **options, objective=Doubled()).dataset
    assert data.attrs["reference"] == "the row 'doubled'"
    assert float(data.bias_z.sel(estimator="elbo").max()) > data.attrs["bias_z_limit"]
    analytic = emvae.compare_gradients(
        normal.model, normal.guide, *normal.args, **options, objective="elbo_analytic_kl"
    ).dataset
    assert analytic.attrs["reference"] in ("the row 'theirs'", "the row 'elbo'")


def test_default_rows_of_another_objective_are_those_that_take_it():
    normal = problems.normal_normal()
    table = emvae.compare_gradients(normal.model, normal.guide, *normal.args, objective=Doubled(), num_replicates=5)
    rows = set(table.dataset.estimator.values)
    assert {"score", "pathwise"} <= rows and not rows & {"leave_one_out", "adaptive_sticking", "vimco"}


def test_default_rows_have_the_same_number_of_particles():
    for number, rows in ((1, ["score", "Trace_ELBO"]), (3, ["score", "leave_one_out", "Trace_ELBO"])):
        table = emvae.compare_gradients(*switch(), num_particles=number, num_replicates=10, seed=0).dataset
        assert table.estimator.values.tolist() == rows
        assert set(table.evaluations.values) == {number}


REFERENCES = {
    "missing": ({"theta": torch.tensor(0.0)}, "'phi'"),
    "number": ({"theta": 0.0, "phi": 0.0, "psi": 1.0}, "'psi'"),
}


@pytest.mark.parametrize("key", REFERENCES)
def test_references_that_do_not_fit(key):
    reference, observed = REFERENCES[key]

    def model() -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.0)), 1.0))

    with pytest.raises(emvae.EmvaeError, match=observed):
        emvae.compare_gradients(model, guide, estimators=["pathwise"], num_replicates=5, reference=reference)


@pytest.mark.parametrize("estimators", [[], {}, ()])
def test_no_row_at_all(estimators):
    with pytest.raises(emvae.EmvaeError, match="a row"):
        emvae.compare_gradients(*switch(), estimators=estimators)


# Per site ---------------------------------------------------------------------------------------------------------


def test_site_rows_are_those_of_the_parameters_that_move_the_site():
    problem = problems.two_level()
    loss = emvae.MonteCarloELBO(2, estimator="score")
    data = compare(problem, estimators=["score"], num_replicates=5000).dataset
    assert data.site.values.tolist() == ["first", "second"]
    torch.manual_seed(1)
    loop = [gradient(problem.model, problem.guide, loss, problem.args, {}).grads for _ in range(1000)]
    moving = {"first": ["loc", "scale"], "second": ["slope", "intercept", "inner_scale"]}
    names = {site: [n for n in problem.guide_params if n in found] for site, found in moving.items()}
    assert sorted(itertools.chain(*names.values())) == sorted(problem.guide_params)
    for site, found in names.items():
        variance = torch.cat([torch.stack([g[n].reshape(-1) for g in loop]).var(0) for n in found])
        got = data.sel(estimator="score", site=site)
        assert float(got.site_variance_mean) == pytest.approx(float(variance.mean()), rel=0.2)
        assert float(got.site_variance_max) == pytest.approx(float(variance.max()), rel=0.2)
    assert f"score      {'second'}" in str(compare(problem, estimators=["score"], num_replicates=10))


def test_a_parameter_that_moves_two_sites_counts_at_both():
    def model():
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(0.0, 1.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.5))
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(loc, pyro.param(f"scale_{name}", torch.tensor(1.0))))

    data = emvae.compare_gradients(model, guide, estimators=["score"], num_replicates=2000, seed=0).dataset
    block, sites = data.second_moment.sel(block="guide"), data.site_second_moment
    assert float(sites.sum()) > 1.3 * float(block[0])


def test_second_moment_and_cosine_are_those_of_the_gradients():
    """One coordinate: the cosine is the share of replicates with the right sign, less that of the others."""
    problem = problems.bernoulli()
    exact = problems.exact_gradients(problem)
    data = compare(problem, estimators=["leave_one_out"], num_replicates=4000, reference=exact).dataset
    loss = emvae.MonteCarloELBO(2, estimator="leave_one_out")
    torch.manual_seed(5)
    loop = [gradient(problem.model, problem.guide, loss, problem.args, {}).grads for _ in range(600)]
    for block, names in (("guide", problem.guide_params), ("model", problem.model_params)):
        g = -torch.stack([torch.cat([row[n].reshape(-1) for n in names]) for row in loop])
        e = torch.cat([exact[n].reshape(-1) for n in names])
        cell = data.sel(estimator="leave_one_out", block=block)
        moment, cosine = g.pow(2).sum(1), torch.cosine_similarity(g, e[None], dim=1)
        for got, values in ((cell.second_moment, moment), (cell.cosine, cosine)):
            assert abs(float(got) - float(values.mean())) < 6 * float(values.std()) / math.sqrt(600)
        assert float(cell.second_moment_evaluations) == pytest.approx(2 * float(cell.second_moment))


def test_the_cosine_to_the_reference_row_leaves_the_replicate_itself_out():
    """Where the gradient is pure noise its mean cosine is 0; with the replicate in the mean it would be 1/sqrt(R)."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 2.0).expand([1000]).to_event(1))

    def guide():
        loc = pyro.param("loc", torch.zeros(1000))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    data = emvae.compare_gradients(model, guide, estimators=["pathwise"], num_replicates=50, seed=0).dataset
    assert abs(float(data.cosine[0, 0])) < 4 / math.sqrt(1000 * 50)
    assert float(data.second_moment[0, 0]) == pytest.approx(1000 / 4**2 / 2, rel=0.05)


# Noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_a_signal_below_the_floor_is_warned_of_by_row():
    def pair(loc):
        def model():
            pyro.sample("z", dist.Normal(loc, 2.0))

        def guide():
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

        return model, guide

    options = {"estimators": ["pathwise"], "num_particles": 1, "num_replicates": 400, "seed": 0}
    with pytest.warns(UserWarning, match=r"pathwise \(guide\) below 3/sqrt\(R\) with R = 400"):
        table = emvae.compare_gradients(*pair(0.0), **options)
    assert "noise alone gives 0.04" in str(table)
    assert float(table.dataset.snr[0, 0]) < table.dataset.attrs["snr_floor"] == 3 / 20
    pyro.clear_param_store()
    table = emvae.compare_gradients(*pair(2.0), **options)
    assert not table.weak_signals() and "noise alone" not in str(table)


def test_the_ratio_of_pure_noise_is_the_stated_one():
    def model():
        pyro.sample("z", dist.Normal(0.0, 2.0).expand([2000]).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2000)), 1.0).to_event(1))

    data = emvae.compare_gradients(model, guide, estimators=["pathwise"], num_replicates=100, seed=0).dataset
    assert float(data.snr[0, 0]) == pytest.approx(data.attrs["snr_noise"], rel=0.1)


# Equal cost -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probing:
    """A loss whose cost is two evaluations a particle and three besides, and which takes even numbers only."""

    num_particles: int

    @property
    def evaluations(self) -> int:
        return 2 * self.num_particles + 3


def test_equal_evaluations_are_the_same_number_for_all():
    problem = problems.two_level()
    losses = {"own": emvae.MonteCarloELBO(3), "theirs": Trace_ELBO(num_particles=4)}
    rows = {"score": "score", "leave_one_out": "leave_one_out", **losses}
    data = compare(problem, estimators=rows, num_replicates=5, equal="evaluations", budget=12).dataset
    assert data.evaluations.values.tolist() == [12] * 4
    assert data.particles.values.tolist() == [12, 12, 3, 4]
    assert data.repeats.values.tolist() == [1, 1, 4, 3]
    assert "each gradient may cost 12 evaluations" in str(
        compare(problem, estimators=rows, num_replicates=5, equal="evaluations", budget=12)
    )
    assert losses["theirs"].num_particles == 4


def test_by_default_all_cost_what_the_dearest_row_costs():
    rows = {"score": "score", "theirs": Trace_ELBO(num_particles=9)}
    data = compare(problems.bernoulli(), estimators=rows, num_replicates=5, equal="evaluations").dataset
    assert data.evaluations.values.tolist() == [9, 9] and data.attrs["budget"] == 9


def test_a_cost_that_does_not_divide_the_budget_is_less_and_said():
    rows = {"score": "score", "theirs": Trace_ELBO(num_particles=3)}
    table = compare(problems.bernoulli(), estimators=rows, num_replicates=5, equal="evaluations", budget=10)
    assert table.dataset.evaluations.values.tolist() == [10, 9]
    assert "3 x 3" in str(table)


def test_a_row_that_is_too_dear_is_nan_and_says_why():
    """The other rows are as they are without it."""
    rows = {"score": "score", "theirs": Trace_ELBO(num_particles=30), "rebar": "rebar"}
    options = {"num_replicates": 200, "equal": "evaluations", "budget": 12}
    table = compare(problems.bernoulli_vector(), estimators=rows, **options)
    alone = compare(problems.bernoulli_vector(), estimators={"score": "score"}, **options).dataset
    data = table.dataset
    assert data.particles.values.tolist()[::2] == [12, 2] and data.evaluations.values.tolist()[::2] == [12, 10]
    for name in ("particles", "evaluations", "repeats", "milliseconds", "variance_mean", "snr", "site_variance_mean"):
        assert bool(data[name].sel(estimator="theirs").isnull().all()), name
    assert torch.equal(*(torch.tensor(d.variance_mean.sel(estimator="score").values) for d in (data, alone)))
    (why,) = data.attrs["too_dear"]
    assert "'theirs' a cost of 12 evaluations: got 30" in why and "budget=30" in why and why in str(table)


@pytest.mark.parametrize("vectorized", [True, False])
def test_repeats_are_averages(vectorized):
    """The mean of m gradients has a variance of one m-th, whether replicates are vectorized or looped."""
    problem = problems.two_level()
    loss = emvae.MonteCarloELBO(2, estimator="pathwise") if vectorized else Trace_ELBO(num_particles=2)
    count = 4000 if vectorized else 150
    one = compare(problem, estimators=[loss], num_replicates=count).dataset
    four = compare(problem, estimators=[loss], num_replicates=count, equal="evaluations", budget=8).dataset
    ratio = float(one.variance_mean[0, 0] / four.variance_mean[0, 0])
    assert ratio == pytest.approx(4, rel=0.1 if vectorized else 0.4)
    assert float(four.second_moment_evaluations[0, 0]) == pytest.approx(8 * float(four.second_moment[0, 0]))


@pytest.mark.parametrize(("budget", "particles"), [(5, 1), (13, 5), (14, 5), (200, 98)])
def test_the_most_particles_that_keep_to_the_budget(budget, particles):
    """Cost 2 K + 3, from above, never below the answer."""
    row = Row("probing", Probing(2), Probing)
    _most_by_count(row, SimpleNamespace(pair=(None, None, (), {})), budget)
    assert row.loss.num_particles == particles and row.evaluations <= budget


@pytest.mark.parametrize(("budget", "particles"), [(None, [90, 90, 30]), (1.3, [30, 30, 30]), (1.15, None)])
def test_equal_milliseconds_are_the_most_particles_within_the_time(monkeypatch, budget, particles):
    """With a clock that takes a millisecond and a hundredth per particle; to a tenth of the answer."""
    clock = lambda row, problem: row.repeats * (1 + row.loss.num_particles / 100)  # noqa: E731
    monkeypatch.setattr("pyro_emvae.compare.cost.time_gradient", clock)
    rows = {"score": "score", "leave_one_out": "leave_one_out", "theirs": Trace_ELBO(num_particles=30)}
    rows |= {"dear": emvae.MonteCarloELBO(90, estimator="score")} if budget is None else {}
    options = {"estimators": rows, "num_replicates": 5, "equal": "milliseconds", "budget": budget}
    if particles is None:
        options["estimators"] = {"theirs": rows["theirs"]}
        with pytest.raises(emvae.EmvaeError, match=r"'theirs' a cost of 1.15 milliseconds: got 1.3 for 30 particles"):
            compare(problems.bernoulli(), **options)
        return
    data = compare(problems.bernoulli(), **options).dataset
    got = data.particles.values[:3]
    assert all(0.9 * most <= k <= most for k, most in zip(got, particles, strict=True))
    assert data.repeats.values.tolist() == [1] * len(rows)
    assert data.evaluations.values.tolist() == data.particles.values.tolist()


def test_cheap_rows_get_more_particles_for_the_same_time():
    rows = {"score": "score", "theirs": Trace_ELBO(num_particles=20)}
    data = compare(problems.bernoulli(), estimators=rows, num_replicates=5, equal="milliseconds").dataset
    assert float(data.particles.sel(estimator="score")) > 2 and data.attrs["budget"] > 0


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"equal": "evaluation"}, "Did you mean 'evaluations'"),
        ({"equal": True}, "equal=True"),
        ({"budget": 3}, "budget=3 with equal=None"),
        ({"equal": "evaluations", "budget": 0}, "got 0"),
        ({"equal": "evaluations", "budget": "3"}, "got '3'"),
        ({"equal": "evaluations", "budget": 2, "estimators": [Trace_ELBO(num_particles=3)]}, "got 3 for 3 particles"),
        ({"equal": "evaluations", "budget": 1, "estimators": ["leave_one_out"]}, "'leave_one_out' a cost of 1 "),
        ({"equal": "milliseconds", "budget": 1e-9, "estimators": ["score"]}, "'score' a cost of 1e-09"),
    ],
)
def test_equal_costs_that_cannot_be(options, observed):
    with pytest.raises(emvae.EmvaeError, match=re.escape(observed)):
        compare(problems.bernoulli(), num_replicates=5, **options)


IMPLICIT = {
    "Gamma": (lambda a: dist.Gamma(a, 1.5), (3,)),
    "Beta": (lambda a: dist.Beta(a, 1.0 + a), (3,)),
    "Dirichlet": (lambda a: dist.Dirichlet(a), (2, 3)),
    "StudentT": (lambda a: dist.StudentT(a, 0.3 * a), (3,)),
}


@pytest.mark.parametrize(("make", "shape"), IMPLICIT.values(), ids=IMPLICIT)
def test_implicit_paths_are_vectorized_without_a_word(make, shape, capfd):
    """`torch.vmap` loops where it has no rule, and writes of it to the terminal, past all filters of warnings."""
    concentration = 1.0 + torch.rand(shape, dtype=torch.float64)

    def model() -> None:
        with pyro.plate("data", shape[0]):
            z = pyro.sample("z", make(2.0 * torch.ones(shape, dtype=torch.float64)))
            z = z.sum(-1) if len(shape) > 1 else z
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(shape[0], dtype=torch.float64))

    def guide() -> None:
        with pyro.plate("data", shape[0]):
            pyro.sample("z", make(pyro.param("a", concentration.clone, constraint=dist.constraints.positive)))

    problem = SimpleNamespace(model=model, guide=guide, args=())
    capfd.readouterr()
    data = compare(problem, estimators=["pathwise"], num_particles=2, num_replicates=100).dataset
    assert data.attrs["looped"] == [] and "performance drop" not in capfd.readouterr().err


def test_what_vmap_has_no_rule_for_is_the_same_in_a_loop():
    a, z = 0.5 + torch.rand(4, 3, dtype=torch.float64), torch.rand(5, 4, 3, dtype=torch.float64)
    z = z / z.sum(-1, keepdim=True)
    gamma, dirichlet = BATCHED[torch.ops.aten._standard_gamma_grad.default], torch.ops.aten._dirichlet_grad.default
    loop = torch.stack([torch.ops.aten._standard_gamma_grad(a, row) for row in z])
    assert torch.equal(torch.vmap(gamma, (None, 0))(a, z), loop)
    assert torch.equal(torch.vmap(gamma, (0, 1))(a, z), loop.movedim(1, 0))
    assert torch.equal(
        torch.vmap(gamma, (None, 0))(a[0], z), torch.ops.aten._standard_gamma_grad(a[0].expand(z.shape), z)
    )
    total = a.sum(-1, keepdim=True).expand(a.shape)
    loop = torch.stack([dirichlet(row, a, total) for row in z])
    assert torch.equal(torch.vmap(BATCHED[dirichlet], (0, None, None))(z, a, total), loop)
    written = torch.vmap(lambda x: BATCHED[torch.ops.aten.clamp_.default](x.clone(), 0.2, max=0.4))(z)
    assert torch.equal(written, z.clamp(0.2, 0.4))
