"""`sweep_gradients`: each cell is `compare_gradients` there, a file is gone on with, and nothing is left behind."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import pyro_emvae as emvae
from pyro_emvae import problems
from pyro_emvae.compare import sweep as module
from pyro_emvae.compare.sweep import _seed

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")
TIMES = ("milliseconds", "variance_time")


def sweep(problem, **options):
    options = {"estimators": ["score", "pathwise"], "num_replicates": 20} | options
    return emvae.sweep_gradients(problem.model, problem.guide, *problem.args, **options)


def same(one: xr.Dataset, two: xr.Dataset) -> bool:
    return one.drop_vars(TIMES).equals(two.drop_vars(TIMES))


@pytest.fixture
def calls(monkeypatch):
    """The numbers of particles of the cells that were computed."""
    made: list[int] = []
    measure = module.measure

    def counted(*args, **options):
        made.append(options["num_particles"])
        return measure(*args, **options)

    monkeypatch.setattr(module, "measure", counted)
    return made


def train(problem, steps: int, seed: int = 0) -> None:
    """Move the parameters as a sweep does on its way."""
    with emvae.particles.quiet(seed=_seed(seed, "training", None)):
        svi = emvae.SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.01}))
        for _ in range(steps):
            svi.step(*problem.args)


def test_each_cell_is_the_comparison_there():
    problem = problems.two_level()
    data = sweep(problem, num_particles=[1, 3], stages=[0, 5, 12])
    assert dict(data.snr.sizes) == {"stage": 3, "num_particles": 2, "estimator": 2, "block": 2}
    assert data.stage.values.tolist() == [0, 5, 12] and data.num_particles.values.tolist() == [1, 3]
    assert data.evaluations.sel(stage=5, estimator="score").values.tolist() == [1, 3]
    train(problem, 12)
    alone = emvae.compare_gradients(
        problem.model,
        problem.guide,
        *problem.args,
        estimators=["score", "pathwise"],
        num_replicates=20,
        num_particles=3,
        seed=_seed(0, None, 12, 3),
    ).dataset
    cell = data.sel(stage=12, num_particles=3)
    for name in ("variance_mean", "bias_z", "cosine", "site_snr", "particles"):
        np.testing.assert_array_equal(cell[name].values, alone[name].values)
    assert str(cell.reference.values) == alone.attrs["reference"]
    assert float(cell.bias_z_limit) == alone.attrs["bias_z_limit"]


def test_only_what_was_asked_for_by_a_sequence_is_a_dim():
    problem = problems.normal_normal()
    assert dict(sweep(problem).snr.sizes) == {"estimator": 2, "block": 2}
    assert dict(sweep(problem, num_particles=[2]).snr.sizes) == {"num_particles": 1, "estimator": 2, "block": 2}


def test_the_dearest_row_is_the_budget_of_each_cell():
    rows = ["score", pyro.infer.Trace_ELBO(num_particles=2)]
    data = sweep(problems.normal_normal(), estimators=rows, num_particles=[1, 4], equal="evaluations", num_replicates=5)
    assert data.budget.values.tolist() == [2, 4] and data.evaluations.values.tolist() == [[2, 2], [4, 4]]


def test_dimensions_are_problems_of_their_own(calls):
    """E|g|^2 grows with the dimension; the store is as it was."""
    pyro.param("loc", torch.tensor(7.0))

    def make(width: int) -> tuple:
        def model():
            pyro.sample("z", dist.Normal(torch.zeros(width), 2.0).to_event(1))

        def guide():
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.ones(width)), 1.0).to_event(1))

        return model, guide

    options = {"estimators": ["pathwise"], "num_replicates": 2000, "num_particles": 1}
    data = emvae.sweep_gradients(make, dimension=[1, 4, 16], stages=[0, 3], **options)
    assert dict(data.snr.sizes) == {"dimension": 3, "stage": 2, "estimator": 1, "block": 1}
    moment = data.second_moment.sel(stage=0, block="guide", estimator="pathwise")
    np.testing.assert_allclose(moment / moment.dimension, 1 / 8, rtol=0.1)
    assert set(pyro.get_param_store().keys()) == {"loc"} and float(pyro.param("loc").detach()) == 7
    assert calls == [1] * 6
    as_problem = emvae.sweep_gradients(
        lambda width: SimpleNamespace(model=make(width)[0], guide=make(width)[1], args=()),
        dimension=[4],
        stages=[0],
        **options,
    )
    assert same(as_problem, data.sel(dimension=[4], stage=[0]))


def test_stages_by_values_and_by_functions():
    problem = problems.normal_normal()

    def move(model, guide, *args):
        assert model is problem.model and args == problem.args
        with torch.no_grad():
            pyro.param("loc").unconstrained().add_(1.0)

    names = {
        "start": {},
        "fit": {"loc": torch.tensor(3.0)},
        "moved": move,
        "by hand": {"loc": problem.params["loc"] + 1},
    }
    exact = problems.exact_gradients
    data = sweep(problem, stages=names, reference=lambda _, leaves: exact(problem, leaves), num_replicates=500)
    assert data.stage.values.tolist() == list(names)
    assert float(data.bias_z.max()) < float(data.bias_z_limit.max()) + 1
    moment = data.second_moment.sel(estimator="pathwise", block="guide")
    assert abs(float(moment[2] / moment[3]) - 1) < 0.2 < abs(float(moment[1] / moment[0]) - 1)


def test_parameters_gradients_and_generators_are_as_before():
    problem = problems.two_level()
    problem.guide(*problem.args)
    leaves = {n: pyro.param(n).unconstrained() for n in problem.guide_params}
    for leaf in leaves.values():
        leaf.grad = torch.full_like(leaf, 3.0)
    before, generator = {n: leaf.detach().clone() for n, leaf in leaves.items()}, torch.get_rng_state()
    ours = lambda model, guide: pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())  # noqa: E731
    data = sweep(problem, stages=[0, 4], svi=ours)
    assert not torch.equal(torch.tensor(data.snr.sel(stage=0).values), torch.tensor(data.snr.sel(stage=4).values))
    for name, leaf in leaves.items():
        assert pyro.param(name).unconstrained() is leaf
        assert torch.equal(leaf, before[name]) and bool((leaf.grad == 3).all())
    assert torch.equal(generator, torch.get_rng_state())


# The file -----------------------------------------------------------------------------------------------------------


def test_a_sweep_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, calls, monkeypatch):
    problem = problems.two_level()
    whole = sweep(problem, num_particles=[1, 2], stages=[0, 3, 6])
    path = tmp_path / "sweep.json"
    counted, stop = module.measure, 4

    def stopping(*args, **options):
        if len(calls) == 6 + stop:
            raise KeyboardInterrupt
        return counted(*args, **options)

    monkeypatch.setattr(module, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep(problem, num_particles=[1, 2], stages=[0, 3, 6], path=path)
    assert len(json.loads(path.read_text())["cells"]) == stop
    monkeypatch.setattr(module, "measure", counted)
    again = sweep(problem, num_particles=[1, 2], stages=[0, 3, 6], path=path)
    assert len(calls) == 6 + 6 and same(again, whole)
    assert sweep(problem, num_particles=[1, 2], stages=[0, 3, 6], path=path).equals(again) and len(calls) == 12


def test_more_is_added_and_other_rows_are_computed_anew(tmp_path, calls):
    problem, path = problems.normal_normal(), tmp_path / "sweep.json"
    first = sweep(problem, num_particles=[1, 2], path=path)
    more = sweep(problem, num_particles=[1, 2, 4], path=path)
    assert calls == [1, 2, 4] and more.sel(num_particles=[1, 2]).equals(first)
    assert sweep(problem, num_particles=[2], path=path, estimators=["score"]).sizes["estimator"] == 1
    assert calls == [1, 2, 4, 2]
    sweep(problem, num_particles=[1, 2], path=path)
    assert calls == [1, 2, 4, 2, 2]


@pytest.mark.parametrize("change", ["data", "parameters", "replicates", "seed", "exact", "stage"])
def test_cells_of_something_else_are_refused(tmp_path, change):
    problem, path = problems.normal_normal(), tmp_path / "sweep.json"
    stages = {"there": {"loc": torch.tensor(1.0)}}
    sweep(problem, path=path, stages=stages)
    before, options, args = path.read_bytes(), {}, problem.args
    if change == "data":
        args = tuple(a + 1 for a in args)
    elif change == "parameters":
        with torch.no_grad():
            pyro.param("loc").unconstrained().add_(1.0)
    elif change == "stage":
        stages = {"there": {"loc": torch.tensor(2.0)}}
    else:
        options = {"replicates": {"num_replicates": 21}, "seed": {"seed": 1}}.get(change, {"reference": lambda *_: {}})
    observed = {"replicates": "num_replicates 21 where the file has 20", "seed": "seed 1"}.get(change, change)
    with pytest.raises(emvae.EmvaeError, match=observed):
        sweep(SimpleNamespace(model=problem.model, guide=problem.guide, args=args), path=path, stages=stages, **options)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    problem, path = problems.normal_normal(), tmp_path / "sweep.json"
    sweep(problem, num_particles=[1], path=path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pyro_emvae.compare.cells.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        sweep(problem, num_particles=[1, 2], path=path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"format": 7, "cells": {}}', "[1"])
def test_what_is_no_sweep_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(emvae.EmvaeError, match=r"sweep\.json"):
        sweep(problems.normal_normal(), path=tmp_path / "sweep.json")
    assert (tmp_path / "sweep.json").read_text() == content


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"num_particles": []}, "[]"),
        ({"num_particles": [2, 2]}, "[2, 2]"),
        ({"num_particles": [0]}, "0"),
        ({"num_particles": 1.5}, "1.5"),
        ({"stages": []}, "stages=[]"),
        ({"stages": [3, 1]}, "[3, 1]"),
        ({"stages": [-1]}, "[-1]"),
        ({"stages": "end"}, "'end'"),
        ({"stages": {"end": 3}}, "{'end': 3}"),
        ({"stages": {"end": {"lok": torch.tensor(0.0)}}}, "'lok'"),
        ({"dimension": [1, 2]}, "and a guide"),
        ({"path": 3}, "path=3"),
        ({"path": "nowhere/sweep.json"}, "nowhere"),
        ({"num_replicates": 1}, "1"),
        ({"equal": "cost"}, "'cost'"),
    ],
)
def test_errors(options, observed):
    with pytest.raises(emvae.EmvaeError, match=re.escape(observed)):
        sweep(problems.normal_normal(), **options)


def test_what_a_dimension_makes_has_to_be_a_problem():
    with pytest.raises(emvae.EmvaeError, match=re.escape("dimension 3: got int")):
        emvae.sweep_gradients(lambda d: d, dimension=[3])
    with pytest.raises(emvae.EmvaeError, match="guide=None"):
        emvae.sweep_gradients(lambda: None)
