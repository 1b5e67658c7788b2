r"""Many starts: what they find, that side by side is as alone, screening, files, and what goes wrong."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from test_loop import DISCRETE, IRIS, KINDS, LINKAGE, discrete, f64, linkage_em, mixture_em, pca_em, schools_em
from test_loop import SCHOOLS as Y
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_emvae import EM, SVI, MonteCarloELBO, checkpoint, problems, steps
from pyro_emvae._checks import (
    CheckpointError,
    DataError,
    DegenerateError,
    EmvaeError,
    ModelError,
    RecordingError,
    StepError,
)
from pyro_emvae.engine import BatchedMap, record_map
from pyro_emvae.particles import report
from pyro_emvae.restarts import Initial, lockstep

COLUMNS = ["start", "seed", "init", "objective", "status", "degenerate", "iterations", "agrees", "reason"]

# What they find ----------------------------------------------------------------------------------------------------

REFERENCE = {  # of scikit-learn; the diagonal one from its other starts: from k-means it ends at -307.1776
    (2, "full"): -214.3547,
    (3, "full"): -180.1855,
    (3, "tied"): -256.354,
    (3, "diagonal"): -306.8605,
    (3, "spherical"): -384.3141,
}


@pytest.mark.parametrize(("number", "kind"), REFERENCE)
def test_default_restarts_find_the_maxima_on_iris(number, kind):
    fit = mixture_em(number, kind).run(IRIS, n_init=10, seed=0)
    assert fit.status == "CONVERGED"
    assert fit.objective == pytest.approx(REFERENCE[number, kind], abs=2e-4)
    table = fit.restarts
    assert list(table.columns) == COLUMNS and len(table) == 10
    assert table["objective"].max() == pytest.approx(fit.objective)
    assert {"SCREENED", "CONVERGED", "DEGENERATE"} >= set(table["status"])
    assert set(table["init"]) == {"present", "k-means", "k-means++", "random data", "noise"}
    assert table.attrs["restarts"] == fit.provenance["restarts"] == "side by side"


def on_a_plane(seed: int) -> dict[str, Tensor]:
    """Start 0 has a component on the flowers whose petals are 0.2 wide: its covariance becomes singular."""
    if seed:
        return steps.gaussian_mixture(3).start(seed, {}, IRIS)
    flat = torch.diag(f64(0.4, 0.4, 0.2, 0.02))
    wide = torch.linalg.cholesky(torch.cov(IRIS.T))
    means = torch.stack([IRIS[IRIS[:, 3] == 0.2].mean(0), IRIS[50:100].mean(0), IRIS[100:].mean(0)])
    return {"weights": f64(1, 1, 1) / 3, "means": means, "scales": torch.stack([flat, wide, wide])}


def test_the_degenerate_optimum_is_rejected():
    """The best of many starts of scikit-learn is -99.17, a component on a plane, at its floor for variances."""
    x = IRIS + 1e-4 * torch.randn(IRIS.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    on_plane = mixture_em(3, "full", floor=1e-12).run(x, init=lambda seed: on_a_plane(0))
    assert on_plane.status == "CONVERGED" and on_plane.objective > -120
    fit = mixture_em(3, "full").run(x, n_init=6, init=on_a_plane, seed=0)
    assert fit.restarts["degenerate"].tolist() == [True] + [False] * 5
    assert "component 0" in fit.restarts["reason"][0] and fit.restarts["agrees"][0] is None
    assert fit.status == "CONVERGED" and fit.objective == pytest.approx(-180.1855, abs=0.1)
    assert all(torch.equal(v, pyro.param(name)) for name, v in fit.params.items())
    assert fit.provenance["restarts"] == "side by side"


def test_a_single_run_into_a_singular_covariance_ends_degenerate_with_the_last_sound_parameters():
    em = mixture_em(3, "full")
    fit = em.run(IRIS, init=lambda seed: on_a_plane(0))
    assert fit.status == "DEGENERATE" and "component 0" in fit.verdict.reason
    assert all(bool(torch.isfinite(v).all()) for v in fit.params.values())
    with pytest.raises(DegenerateError, match="component 0"):
        em.step(IRIS)


def test_when_all_starts_are_degenerate_the_fit_says_so():
    fit = mixture_em(3, "full").run(IRIS, n_init=2, init=lambda seed: on_a_plane(0))
    assert fit.status == "DEGENERATE" and fit.restarts["degenerate"].all()
    assert math.isnan(fit.restarts.attrs["agreement"])
    assert all(torch.equal(v, pyro.param(name)) for name, v in fit.params.items())


@pytest.mark.parametrize("kind", DISCRETE)
def test_discrete_mixtures_restart_from_data(kind):
    em, x = discrete(kind)
    fit = em.run(x, n_init=4, seed=0, max_iter=1000)
    assert fit.status in ("CONVERGED", "SLOW", "STALLED")  # the last two where a rate of zero is the maximum
    assert fit.restarts["init"].tolist() == ["present", "k-means++", "random data", "k-means"]


def without_start(number: int) -> EM:
    em = mixture_em(number, "tied")
    em.m_step.start = None
    return em


def test_starts_are_those_of_the_seed():
    objectives = []
    for seed in (0, 0, 1):
        pyro.clear_param_store()
        torch.manual_seed(len(objectives))
        objectives.append(without_start(3).run(IRIS, n_init=4, seed=seed).restarts["objective"].tolist())
    assert objectives[0] == objectives[1] != objectives[2]
    assert objectives[0][0] == objectives[2][0]  # the present values


def test_a_start_that_converges_while_screened_says_so_and_agreement_is_of_those_at_their_end():
    init = [{"theta": f64(x)[0]} for x in (0.6268, 0.1, 0.3, 0.9)]
    fit = linkage_em().run(LINKAGE, n_init=4, init=lambda seed: init[seed], seed=0)
    table = fit.restarts
    assert table["status"].tolist() == ["CONVERGED"] * 4 and table["iterations"].max() < 10
    assert table["agrees"].tolist() == [True] * 4 and table.attrs["agreement"] == 1.0
    assert fit.num_iterations == table["iterations"][int(table["objective"].argmax())]


def test_the_history_of_the_best_is_that_of_its_run_alone():
    fit = mixture_em(2, "full").run(IRIS, n_init=3, seed=1, track="means")
    best = int(fit.restarts["objective"].argmax())
    assert best != 0
    alone = mixture_em(2, "full")
    start = steps.gaussian_mixture(2, "full").start(1 + best, {}, IRIS)
    pyro.clear_param_store()
    alone = alone.run(IRIS, init=lambda seed: start, track="means")
    for name in ("objective", "param_means", "change"):
        np.testing.assert_allclose(fit.history[name].values, alone.history[name].values, rtol=1e-10, atol=1e-10)
    assert (fit.status, fit.num_iterations) == (alone.status, alone.num_iterations)


# Side by side ------------------------------------------------------------------------------------------------------


def ppca(x: Tensor) -> None:
    weight = pyro.param("weight", torch.eye(4, 2, dtype=x.dtype))
    bias = pyro.param("bias", x.mean(0))
    sigma = pyro.param("sigma", x.new_ones(()), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T + bias, sigma).to_event(1), obs=x)


def markov(x: Tensor) -> None:
    initial = pyro.param("initial", f64(0.5, 0.5), constraint=constraints.simplex)
    transition = pyro.param("transition", f64(0.8, 0.2, 0.3, 0.7).reshape(2, 2), constraint=constraints.simplex)
    locs = pyro.param("locs", f64(-1.0, 1.0))
    z = None
    for t in pyro.markov(range(x.shape[-1])):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[t])


def chain_statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    z = torch.stack([values[f"z_{t}"] for t in range(len(x))], -1)
    r = torch.nn.functional.one_hot(z, 2).to(x)
    return {
        "n": r.sum(-2),
        "x": (r * x[:, None]).sum(-2),
        "first": r[..., 0, :],
        "pairs": r[..., :-1, :].mT @ r[..., 1:, :],
    }


def chain_update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = s["pairs"] + 0.1
    first = s["first"] + 0.1
    return {"initial": first / first.sum(), "transition": pairs / pairs.sum(-1, keepdim=True), "locs": s["x"] / s["n"]}


def mixture_of(kind: str) -> Callable[[], tuple[EM, Tensor]]:
    return lambda: (mixture_em(3, kind), IRIS)


TOGETHER = {
    **{kind: mixture_of(kind) for kind in KINDS},
    **{kind: functools.partial(discrete, kind) for kind in DISCRETE},
    "linkage": lambda: (linkage_em(), LINKAGE),
    "ppca": lambda: (EM(ppca, e_step="gaussian", m_step=steps.linear_gaussian()), IRIS),
    "masked": lambda: (EM(masked, e_step="enumerated", m_step=steps.gaussian_mixture(2)), IRIS),
    "markov": lambda: (
        EM(markov, e_step="enumerated", m_step=steps.ClosedForm(chain_statistics, chain_update)),
        SERIES,
    ),
}
SERIES = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2


def masked(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_ones(2) / 2, constraint=constraints.simplex)
    means = pyro.param("means", x[[0, 149]].clone())
    scales = pyro.param("scales", torch.eye(4).to(x).repeat(2, 1, 1), constraint=constraints.lower_cholesky)
    with (
        pyro.plate("data", len(x)),
        pyro.poutine.mask(mask=torch.arange(len(x)) % 3 > 0),
        pyro.poutine.scale(scale=2.0),
    ):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(means[z], scale_tril=scales[z]), obs=x)


@pytest.mark.parametrize("name", TOGETHER)
def test_side_by_side_is_as_one_by_one(monkeypatch, name):
    fits = []
    for largest in (lockstep.LARGEST, 1):
        monkeypatch.setattr(lockstep, "LARGEST", largest)
        pyro.clear_param_store()
        em, x = TOGETHER[name]()
        track = next(iter(em.run(x, max_iter=1, stop=None).params))
        fits.append(em.run(x, n_init=4, seed=2, max_iter=30, track=track))
    one, other = fits
    assert one.provenance["restarts"] == "side by side"
    assert other.provenance["restarts"] == "one by one: an iteration that takes too much memory to be recorded"
    assert one.restarts.drop(columns="objective").equals(other.restarts.drop(columns="objective"))
    np.testing.assert_allclose(one.restarts["objective"], other.restarts["objective"], rtol=1e-10)
    for key in ("objective", f"param_{track}"):
        np.testing.assert_allclose(one.history[key].values, other.history[key].values, rtol=1e-10, atol=1e-10)
    for key, value in one.params.items():
        torch.testing.assert_close(value, other.params[key], rtol=1e-10, atol=1e-10)


def test_starts_that_are_large_go_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(lockstep, "MANY", 3 * 2**18)
    fit = mixture_em(3, "full").run(IRIS, n_init=7, seed=0)
    size = int(fit.provenance["restarts"].split("side by side, ")[1].split(" ")[0])
    assert 1 < size < 7 and fit.objective == pytest.approx(REFERENCE[3, "full"], abs=2e-4)


def test_a_degenerate_start_does_not_touch_the_others():
    alone = mixture_em(3, "full").run(IRIS, n_init=4, init=lambda seed: on_a_plane(seed or 9), seed=0).restarts
    pyro.clear_param_store()
    beside = mixture_em(3, "full").run(IRIS, n_init=4, init=on_a_plane, seed=0).restarts
    assert beside["status"][0] == "DEGENERATE"
    assert alone["screened" if "screened" in alone else "objective"][1:].tolist()[0] == beside["objective"][1]


def singular(threshold: float) -> EM:
    """An update whose factorization fails, for all starts at once, where theta is small."""

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        root = torch.linalg.cholesky((params["theta"] - threshold).reshape(1, 1))
        return {"theta": s["recombined"] / s["all"] + 0 * root[0, 0]}

    return linkage_em(update)


def test_a_factorization_that_fails_for_one_start_is_that_ones_end():
    init = [{"theta": f64(x)[0]} for x in (0.5, 0.1, 0.7)]
    fit = singular(0.2).run(LINKAGE, n_init=3, init=lambda seed: init[seed], seed=0)
    assert fit.restarts["status"].tolist() == ["CONVERGED", "DEGENERATE", "CONVERGED"]
    assert fit.provenance["restarts"] == "side by side"
    assert float(fit.params["theta"]) == pytest.approx(0.626821498, abs=1e-6)


def test_an_operation_that_raises_in_the_batch_stops_the_start_that_it_raises_for():
    """Eigenvalues of a matrix that is not finite: torch raises for the whole batch."""

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        bad = torch.where(params["theta"] < 0.2, math.nan, 1.0).to(params["theta"])
        values = torch.linalg.eigvalsh(torch.eye(3).to(bad) * bad)
        return {"theta": s["recombined"] / s["all"] + 0 * values[0]}

    init = [{"theta": f64(x)[0]} for x in (0.5, 0.1, 0.7)]
    fit = linkage_em(update).run(LINKAGE, n_init=3, init=lambda seed: init[seed], seed=0)
    assert fit.restarts["status"].tolist()[::2] == ["CONVERGED", "CONVERGED"]
    assert fit.restarts["status"][1] in ("FAILED", "DEGENERATE")
    assert fit.provenance["restarts"] == "side by side"


@pytest.mark.parametrize("edge", [0.55, 0.62681])
def test_a_branch_that_starts_take_differently_is_taken_by_each(edge):
    """Twice the step below an edge that starts cross at different times."""

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        new, old = s["recombined"] / s["all"], params["theta"]
        return {"theta": (2 * new - old).clamp(0.01, 0.62) if bool(old < edge) and float(edge) > 0 else new}

    init = [{"theta": f64(x)[0]} for x in (0.5, 0.1, 0.6, 0.9)]
    options = {"n_init": 4, "init": lambda seed: init[seed], "seed": 0, "on_decrease": "warn", "max_iter": 30}
    one = linkage_em(update).run(LINKAGE, **options)
    pyro.clear_param_store()
    other = linkage_em(update).run(LINKAGE, history="full", **options)
    assert one.provenance["restarts"] == "side by side"
    assert other.provenance["restarts"] == "one by one: history='full'"
    columns = ["status", "iterations"]
    assert one.restarts[columns].equals(other.restarts[columns])
    np.testing.assert_allclose(one.restarts["objective"], other.restarts["objective"], rtol=1e-12)


def with_item(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"theta": torch.tensor((s["recombined"] / s["all"]).item(), dtype=torch.float64)}


def with_noise(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"theta": s["recombined"] / s["all"] + 1e-12 * torch.rand(()).double()}


def counting() -> Callable:
    calls = []

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        return {"theta": s["recombined"] / s["all"] + 1e-12 * len(calls)}

    return update


@pytest.mark.parametrize(
    ("em", "x", "options", "reason"),
    [
        (lambda: linkage_em(with_item), LINKAGE, {}, "a Python number taken from a tensor"),
        (lambda: linkage_em(with_noise), LINKAGE, {}, "random draws"),
        (lambda: linkage_em(counting()), LINKAGE, {}, "in one recording and"),
        (schools_em, Y, {"max_iter": 30}, "a Python number taken from a tensor"),
        (linkage_em, LINKAGE, {"accelerate": "squarem"}, "accelerate="),
        (linkage_em, LINKAGE, {"history": "full"}, "history='full'"),
    ],
)
def test_what_cannot_go_side_by_side_goes_one_by_one_and_says_why(em, x, options, reason):
    fit = em().run(x, n_init=3, seed=0, **options)
    assert fit.provenance["restarts"].startswith("one by one: ") and reason in fit.provenance["restarts"]
    assert fit.restarts.attrs["restarts"] == fit.provenance["restarts"]
    assert fit.restarts["status"].isin(["CONVERGED", "SLOW", "MAX_ITER", "SCREENED"]).all()


def test_squarem_goes_on_from_the_screening():
    fit = pca_em().run(IRIS, n_init=4, seed=0, accelerate="squarem")
    assert fit.status == "CONVERGED" and fit.objective == pytest.approx(-404.962780, abs=1e-4)
    assert fit.history.attrs["map_evaluations"] == 3 * fit.num_iterations


def test_callbacks_and_validation_see_the_runs_to_the_end_alone():
    seen = []
    em = mixture_em(2, "full")
    fit = em.run(IRIS, n_init=3, seed=0, max_iter=14, stop=None, callbacks=lambda p: seen.append(p.iteration))
    assert seen == [10, 11, 12, 13] and fit.num_iterations == 14


@pytest.mark.filterwarnings("ignore:`EM` cannot raise the objective")
def test_what_a_callback_changes_counts():
    factor = {"value": 1.0}

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"theta": s["recombined"] / s["all"] * factor["value"]}

    def change(progress: Any) -> None:
        factor["value"] = 0.5

    fit = linkage_em(update).run(
        LINKAGE, n_init=2, seed=0, max_iter=14, stop=None, on_decrease="warn", callbacks=change
    )
    assert 0.28 < float(fit.params["theta"]) < 0.29  # 0.627 without it


# Maps ----------------------------------------------------------------------------------------------------------------


def batched(step: Callable[[Tensor], Tensor], rows: int = 3) -> tuple[Tensor, Tensor]:
    """Run a step, recorded at 1 and 2, on rows of values; return the new ones, and alone what each would have been."""
    x = torch.ones(2, dtype=torch.float64)

    def iterate() -> float:
        with torch.no_grad():
            x.copy_(step(x))
        return -report(x.sum())

    recorded = record_map(iterate, [x], [[x.clone()], [2 * x]])
    assert torch.equal(x, torch.ones(2, dtype=torch.float64))
    start = torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    (new,), value, kept = BatchedMap(recorded, rows)([start])
    assert kept.all()
    torch.testing.assert_close(value, new.sum(-1))
    return new, torch.stack([step(row) for row in start])


CONSTANT = torch.arange(2, dtype=torch.float64)


def filled(x: Tensor) -> Tensor:
    out = torch.zeros(3, 2, dtype=torch.float64)
    out[1, :] = x
    out[2] += 2 * x
    return out.sum(0)


def aliased(x: Tensor) -> Tensor:
    y = x * 1.0
    view = y[:1]
    view.mul_(3.0)
    return y


def seeded(x: Tensor) -> Tensor:
    return x + torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "step",
    [
        filled,
        aliased,
        seeded,
        lambda x: x * CONSTANT.cos(),
        lambda x: torch.linalg.inv(torch.outer(x, x) + torch.eye(2)) @ x,
    ],
)
def test_a_map_of_many_rows_is_the_map_of_each(step):
    torch.testing.assert_close(*batched(step), rtol=1e-12, atol=1e-12)


def drawn(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda x: x + torch.rand(2, generator=generator)


def writing(x: Tensor) -> Tensor:
    BUFFER.copy_(x)
    return BUFFER + x


BUFFER = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("step", "observed"),
    [
        (lambda x: x + torch.rand(2), "random draws"),
        (drawn(torch.Generator().manual_seed(0)), "constant"),
        (lambda x: x * float(x.max()), "a Python number"),
        (lambda x: x if bool(x[0] > 1.5) else 2 * x, "recording"),
        (writing, "written in place"),
        (lambda x: x + report(x.sum()), "2 reported numbers"),
    ],
)
def test_what_is_no_map_is_refused(step, observed):
    with pytest.raises(RecordingError, match=observed):
        batched(step)


# Gradient steps -----------------------------------------------------------------------------------------------------


def two_hills(x: Tensor) -> None:
    """The likelihood of loc has a low maximum near -2 and a high one near 3."""
    loc = pyro.param("loc", torch.tensor(-2.0))
    pyro.sample("z", dist.Normal(0.0, 1.0))
    low, high = dist.Normal(-2.0, 0.5).log_prob(loc), dist.Normal(3.0, 0.5).log_prob(loc) + 4.0
    pyro.factor("hill", torch.logaddexp(low, high) + 0 * x)


def hill_guide(x: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.5))
    pyro.sample("z", dist.Normal(mean, pyro.param("width", torch.tensor(0.7), constraint=constraints.positive)))


def svi(**options: Any) -> SVI:
    return SVI(two_hills, hill_guide, pyro.optim.Adam({"lr": 0.05}), **options)


def hills(seed: int) -> dict[str, Tensor]:
    return {"loc": torch.tensor([-2.0, -1.5, 2.0, -3.0][seed]), "mean": torch.tensor(0.1 * seed)}


ZERO = torch.tensor(0.0)


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_svi_takes_the_best_of_many_starts_and_it_is_the_run_alone(backend):
    fit = svi(backend=backend).run(100, ZERO, n_init=4, init=lambda seed: hills(seed - 5), seed=5, track="loc")
    table = fit.restarts
    assert table["status"].tolist() == ["SCREENED", "SCREENED", "MAX_ITER", "SCREENED"]
    assert table["iterations"].tolist() == [10, 10, 100, 10] and int(table["objective"].argmax()) == 2
    assert fit.provenance["restarts"] == "one by one: gradient steps" and fit.num_iterations == 100
    after = torch.rand(3)
    pyro.clear_param_store()
    alone = svi(backend=backend).run(100, ZERO, init=lambda seed: hills(2), seed=7, track="loc")
    assert all(torch.equal(value, fit.params[name]) for name, value in alone.params.items())
    assert torch.equal(after, torch.rand(3))
    np.testing.assert_array_equal(fit.history["elbo"].values, alone.history["elbo"].values)
    np.testing.assert_array_equal(fit.history["param_loc"].values, alone.history["param_loc"].values)


def test_optimizers_begin_anew_with_each_start():
    one = svi()
    fit = one.run(40, ZERO, n_init=4, init=hills, seed=0)
    state = one.optim.get_state()
    pyro.clear_param_store()
    alone = svi()
    alone.run(40, ZERO, init=lambda seed: hills(2), seed=2)
    assert fit.restarts["iterations"].tolist() == [10, 10, 40, 10]
    expected = alone.optim.get_state()
    for name in ("loc", "mean", "width"):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            one, other = (s[name]["state"][0][key] for s in (state, expected))
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), (name, key)


def test_the_default_starts_of_svi_are_noise_on_model_and_guide():
    fit = svi().run(30, ZERO, n_init=6, seed=0)
    assert fit.restarts["init"].tolist() == ["present"] + ["noise"] * 5
    assert fit.restarts["objective"].max() > 2.0  # on the high hill
    assert float(fit.params["loc"]) == pytest.approx(3.0, abs=0.6)


def test_noise_has_the_scale_of_a_layers_weights():
    layer = nn.Linear(50, 40)
    layer.weight.data.mul_(0.01)

    def model(x: Tensor) -> None:
        pyro.module("layer", layer)
        loc = pyro.param("loc", torch.zeros(50))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.Normal(layer(pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))), 1.0).to_event(1), obs=x
            )

    guide, x = AutoNormal(model), torch.randn(3, 40)
    one = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}))
    one.engine.setup((x,), {})
    rows = {row.name: row.leaf.detach().clone() for row in one.blocks.rows}
    noisy = Initial(one.engine, "noise", (x,), {})(1, 1, 1.0, rows)
    moved = {name: float((noisy[name] - leaf).std()) for name, leaf in rows.items()}
    weight = next(name for name in rows if name.endswith("weight"))
    assert moved[weight] == pytest.approx(float(rows[weight].square().mean().sqrt()), rel=0.1)
    assert moved["loc"] == pytest.approx(1.0, rel=0.3)
    assert all(value > 0.5 for name, value in moved.items() if "loc" in name)


def test_em_by_gradients_and_with_an_exact_e_step():
    problem = problems.normal_normal()
    em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.05}))
    fit = em.run(*problem.args, max_iter=40, n_init=3, seed=0)
    assert sorted(fit.restarts["status"]) == ["MAX_ITER", "SCREENED", "SCREENED"]
    pyro.clear_param_store()
    em = EM(mixture_em(2, "tied").model, optim=pyro.optim.Adam({"lr": 0.02}), e_step="enumerated")
    fit = em.run(IRIS, max_iter=30, n_init=3, seed=0)
    best = int(fit.restarts["objective"].argmax())
    assert fit.restarts["iterations"][best] == 30
    assert fit.restarts["objective"][best] == pytest.approx(-em._evaluate((IRIS,), {}), rel=1e-12)


def test_monte_carlo_em_is_compared_by_its_own_draws():
    e_step = steps.MonteCarlo("prior", num_particles=50)
    em = EM(mixture_em(2, "spherical").model, e_step=e_step, m_step=steps.gaussian_mixture(2, "spherical"))
    fit = em.run(IRIS, max_iter=12, n_init=3, seed=0)
    assert fit.restarts["objective"].notna().all() and fit.provenance["restarts"].endswith("that are not exact")


def test_starts_are_not_compared_by_a_guide_that_no_step_moves():
    """The proposal of importance sampling; its own bound is near the log evidence."""
    problem = problems.normal_normal()
    e_step = steps.MonteCarlo("importance", num_particles=200)
    em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.05}), e_step=e_step)
    fit = em.run(*problem.args, max_iter=60, n_init=2, init="noise", seed=0)
    best = fit.restarts["objective"].max()
    assert best == pytest.approx(fit.history["objective"].values[-30:].mean(), rel=1e-12)
    assert best > -MonteCarloELBO(num_particles=200).loss(problem.model, problem.guide, *problem.args) + 1


def test_starts_of_steps_without_noise_are_compared_by_where_they_end():
    em = EM(mixture_em(2, "tied").model, e_step="mean_field", m_step=steps.gaussian_mixture(2, "tied"))
    fit = em.run(IRIS, max_iter=15, n_init=2, seed=0)
    assert fit.restarts["objective"].max() == fit.objective


def test_starts_without_an_objective_cannot_be_compared():
    class Silent(steps.Enumerated):
        traits = steps.Enumerated.traits

        def expect(self, *args: Any, **kwargs: Any) -> Any:
            state, posterior, info = super().expect(*args, **kwargs)
            return state, posterior, info._replace(loss=math.nan)

    em = linkage_em()
    em.e_step = Silent()
    with pytest.raises(StepError, match=r"n_init=2.*start 0.*start 1"):
        em.run(LINKAGE, n_init=2, max_iter=3, stop=None)
    assert float(em.blocks.constrained()["theta"]) == 0.5


def test_a_loader_is_screened_by_epochs_and_every_start_sees_the_same_batches():
    problem = problems.normal_normal()
    (x,) = problem.args
    data = DataLoader(TensorDataset(x), len(x), shuffle=True, generator=torch.Generator().manual_seed(3))
    one = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.05}))
    fit = one.run(data=data, num_epochs=6, n_init=3, init="noise", seed=0)
    assert sorted(fit.restarts["iterations"]) == [1, 1, 6] and fit.num_iterations == 6


# Where starts begin -------------------------------------------------------------------------------------------------


def test_one_start_from_init():
    def init(seed: int) -> dict[str, Tensor]:
        return {"means": IRIS[[seed, 75, 149]]}

    fit = mixture_em(3, "tied").run(IRIS, init=init, seed=5, max_iter=2, track="means", stop=None)
    assert fit.num_iterations == 2 and fit.restarts is None
    assert fit.history["param_means"].values[0] == pytest.approx(IRIS[[5, 75, 149]].numpy())


def test_init_takes_the_data_if_it_has_a_parameter_for_them():
    def of_data(seed: int, x: Tensor, spread: float = 1.0) -> dict[str, Tensor]:
        return {"means": spread * x[[seed, 75, 149]]}

    def of_seed(seed: int, spread: float = 1.0) -> dict[str, Tensor]:
        return {"means": spread * IRIS[[seed, 75, 149]]}

    def of_anything(seed: int, *args: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return of_data(seed, *args)

    tables = []
    for init in (of_data, of_seed, of_anything, functools.partial(of_seed, spread=1.0)):
        pyro.clear_param_store()
        tables.append(mixture_em(3, "tied").run(IRIS, n_init=3, init=init, seed=0).restarts)
    assert all(table.equals(tables[0]) for table in tables) and set(tables[0]["init"]) == {"given"}


def test_noise_alone_is_asked_for_by_name():
    fit = mixture_em(2, "full").run(IRIS, n_init=3, init="noise", seed=0)
    assert fit.restarts["init"].tolist() == ["present", "noise", "noise"]


# What goes wrong ----------------------------------------------------------------------------------------------------


def everything(fitter: Any) -> Any:
    return copy.deepcopy(
        (
            {row.name: row.leaf.detach().tolist() for row in fitter.blocks.rows},
            repr(fitter.optim.get_state()),
            torch.get_rng_state().tolist(),
            fitter.engine.steps,
        )
    )


@pytest.mark.parametrize(
    ("options", "error", "observed"),
    [
        ({"n_init": 0}, EmvaeError, "got 0"),
        ({"n_init": 2.5}, EmvaeError, "2.5"),
        ({"n_init": 3, "init": "kmeans"}, EmvaeError, "'kmeans'"),
        ({"init": "kmeans"}, EmvaeError, "'kmeans'"),
        ({"n_init": 3, "init": lambda seed: {"mean": IRIS[:3]}}, ModelError, r"'mean'.*'means'"),
        ({"n_init": 3, "init": lambda seed: {"means": IRIS[:2]}}, ModelError, r"\(2, 4\)"),
        ({"init": lambda seed: {"means": IRIS[:2]}}, ModelError, r"\(2, 4\)"),
        ({"n_init": 3, "init": lambda seed: {"weights": f64(1.0, 2.0, 3.0)}}, ModelError, "Simplex"),
        ({"n_init": 3, "init": lambda seed: None}, ModelError, "NoneType"),
    ],
)
def test_what_starts_cannot_be_made_from(options, error, observed):
    em = mixture_em(3, "tied")
    em.step(IRIS)
    before = everything(em)
    with pytest.raises(error, match=observed):
        em.run(IRIS, **options)
    assert everything(em) == before


def test_when_all_starts_fail_the_error_has_the_reason_of_each():
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", ((loc - loc.detach()) * (loc < 50.0)).sqrt() + 0 * x)

    one = SVI(model, hill_guide, pyro.optim.Adam({"lr": 0.1}))
    one.engine.setup((ZERO,), {})
    one.engine.optimizers[None].add({row.name: row.leaf for row in one.blocks.rows})
    before = everything(one)
    with pytest.raises(StepError, match=r"start 0: .*'loc'.*start 1: .*'loc'.*start 2: "):
        one.run(20, ZERO, n_init=3, seed=0)
    assert everything(one) == before
    with torch.no_grad():
        one.blocks.leaves()["mean"].fill_(1.0)
    with pytest.raises(ModelError, match="'loc'"):  # and not that an earlier step failed
        one.step(ZERO)


def test_some_starts_fail_and_the_others_go_on():
    init = [{"loc": torch.tensor(math.inf)}, {"loc": torch.tensor(2.0)}]
    with pytest.raises(ModelError, match="inf"):
        svi().run(20, ZERO, n_init=2, init=lambda seed: init[seed], seed=0)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", loc.log() - loc + 0 * x)

    pyro.clear_param_store()
    starts = [{"loc": torch.tensor(-1.0)}, {"loc": torch.tensor(2.0)}]
    one = SVI(model, hill_guide, pyro.optim.Adam({"lr": 0.1}))
    fit = one.run(20, ZERO, n_init=2, init=lambda seed: starts[seed], seed=0)
    assert fit.restarts["status"].tolist() == ["FAILED", "MAX_ITER"] and "'f'" in fit.restarts["reason"][0]
    assert float(fit.params["loc"]) > 0


def test_an_objective_that_goes_down_is_an_error_of_the_update_and_nothing_has_changed():
    em = linkage_em(lambda s, params: {"theta": 0.9 * params["theta"]})
    em.engine.setup((LINKAGE,), {})
    with pytest.raises(StepError, match="raise the objective"):
        em.run(LINKAGE, n_init=3, seed=0)
    assert float(em.blocks.constrained()["theta"]) == 0.5


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"data": ZERO, "num_epochs": 2}, "Tensor"),
        ({"data": [], "num_epochs": 2}, "without batches"),
        ({"data": iter([ZERO]), "num_epochs": 2}, "iterator"),
        ({"data": [ZERO], "num_epochs": 2, "num_steps": 3}, "iterations, 3"),
    ],
)
def test_data_that_many_starts_cannot_go_through(options, observed):
    with pytest.raises(DataError, match=observed):
        svi().run(n_init=2, **options)


def test_ctrl_c_ends_all_starts_and_keeps_the_best():
    def init(seed: int) -> dict[str, Tensor]:
        return steps.gaussian_mixture(3).start(seed, {}, IRIS)

    def interrupt(progress: Any) -> None:
        raise KeyboardInterrupt

    fit = mixture_em(3, "full").run(IRIS, n_init=6, init=init, seed=0, callbacks=interrupt)
    assert fit.status == "INTERRUPTED" and len(fit.restarts) == 6
    assert (fit.restarts["status"] == "INTERRUPTED").sum() == 1
    assert all(torch.equal(v, pyro.param(name)) for name, v in fit.params.items())


# A file -------------------------------------------------------------------------------------------------------------


def stored(folder: Any, **options: Any) -> tuple[EM, Any]:
    em = mixture_em(2, "full")
    return em, em.run(IRIS, **({"n_init": 4, "seed": 0, "checkpoint": folder / "run.pt"} | options))


def test_a_search_at_its_end_returns_its_fit(tmp_path):
    _, fit = stored(tmp_path)
    pyro.clear_param_store()
    _, again = stored(tmp_path)
    assert again.restarts.equals(fit.restarts) and again.status == fit.status
    assert "run.pt" in again.provenance["resumed_from"] and "resumed_from" not in fit.provenance
    assert all(torch.equal(value, again.params[name]) for name, value in fit.params.items())
    np.testing.assert_array_equal(again.history["objective"].values, fit.history["objective"].values)
    assert all(torch.equal(v, pyro.param(name)) for name, v in fit.params.items())


def test_a_file_of_many_starts_gives_the_best_to_load(tmp_path):
    _, fit = stored(tmp_path)
    pyro.clear_param_store()
    em = mixture_em(2, "full")
    em.load(tmp_path / "run.pt", IRIS)
    assert all(torch.equal(value, pyro.param(name)) for name, value in fit.params.items())


@pytest.mark.parametrize(
    ("first", "second", "observed"),
    [
        ({}, {"n_init": 5}, r"'n_init': 5.*'n_init': 4"),
        ({}, {"seed": 1}, r"'seed': 1.*'seed': 0"),
        ({}, {"n_init": 1}, "4 starts"),
        ({"n_init": 1}, {}, "one run"),
    ],
)
def test_a_file_holds_one_search(tmp_path, first, second, observed):
    stored(tmp_path, **first)
    with pytest.raises(CheckpointError, match=observed):
        stored(tmp_path, **second)
    stored(tmp_path, **second, resume=False)


def test_resume_wants_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"run\.pt"):
        stored(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="missing"):
        stored(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="'maybe'"):
        stored(tmp_path, resume="maybe")
    with pytest.raises(CheckpointError, match="no path"):
        mixture_em(2, "full").run(IRIS, n_init=2, resume=True)


def test_another_model_is_refused_and_nothing_has_changed(tmp_path):
    stored(tmp_path)
    pyro.clear_param_store()
    em = mixture_em(3, "full")
    em.step(IRIS)
    before = everything(em)
    with pytest.raises(CheckpointError, match=r"shape \[2\].*shape \[3\]"):
        em.run(IRIS, n_init=4, seed=0, checkpoint=tmp_path / "run.pt")
    assert everything(em) == before


def test_an_interrupted_search_goes_on_from_its_file(tmp_path):
    long = {"max_iter": 20, "stop": None}
    expected = mixture_em(2, "full").run(IRIS, n_init=4, seed=0, **long)
    pyro.clear_param_store()

    def interrupt(progress: Any) -> None:
        raise KeyboardInterrupt

    _, fit = stored(tmp_path, callbacks=interrupt, **long)
    assert fit.status == "INTERRUPTED"
    pyro.clear_param_store()
    _, fit = stored(tmp_path, **long)
    assert fit.restarts.equals(expected.restarts)
    assert all(torch.equal(value, expected.params[name]) for name, value in fit.params.items())
    assert set(checkpoint.read(tmp_path / "run.pt")["restarts"]["plan"]) == {"n_init", "seed", "screen", "total"}
