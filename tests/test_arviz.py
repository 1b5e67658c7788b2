r"""`to_arviz`: what ArviZ gets is exactly what was drawn, in dims with names, and drawing changes nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from torch import nn

import pyro_emvae.problems  # noqa: F401
from pyro_emvae._checks import DataError, EmvaeError, ModelError
from pyro_emvae._registry import entries
from pyro_emvae.diagnostics import arviz as arviz_module
from pyro_emvae.diagnostics import container, to_arviz
from pyro_emvae.particles import draw

PROBLEMS = [entry.name for entry in entries("problem")]
FACTORIES = {entry.name: entry.factory for entry in entries("problem")}
SMALL = {"digits_vae": {"num_train": 20}}


@pytest.fixture
def az():
    import arviz

    return arviz


def history(num_iterations: int = 3) -> xr.Dataset:
    """A history as `run` returns it: one row per gradient step, one per iteration."""
    steps = 2 * num_iterations
    return xr.Dataset(
        {
            "elbo": ("step", -10.0 + np.arange(steps)),
            "phase": ("step", np.tile(np.array([0, 1], np.int8), num_iterations)),
            "grad_norm": ("step", np.ones(steps)),
            "time": ("step", np.linspace(0.0, 1.0, steps), {"units": "seconds"}),
            "iteration": ("step", np.repeat(np.arange(num_iterations), 2)),
            "e_gain": ("iteration", np.ones(num_iterations)),
            "validation": ("iteration", np.full(num_iterations, np.nan)),
        },
        attrs={"objective": "elbo", "converged": True, "at": None, "optim": {"lr": 0.1}},
    )


# Values and dims ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(az, name, tmp_path):
    problem = FACTORIES[name](**SMALL.get(name, {}))
    data = to_arviz(problem.model, problem.guide, *problem.args, fit=SimpleNamespace(history=history()), seed=1)
    assert set(data["posterior"].data_vars) == set(problem.sites)
    assert set(data["sample_stats"].data_vars) == {"lp", "log_q", "log_weight"}
    for group in ("posterior", "sample_stats"):
        assert all(v.dims[:2] == ("chain", "draw") and v.shape[:2] == (1, 1000) for v in data[group].values())
    weight = data["sample_stats"]["log_weight"].values[0]
    if problem.elbo is not None and not problem.traits.subsampled:
        assert abs(weight.mean() - float(problem.elbo())) < 6 * weight.std() / 1000**0.5
    scalars = [v for v in problem.sites if not pyro_shape(problem, v)]
    assert all(data["posterior"][v].dims == ("chain", "draw") for v in scalars)
    summary = az.summary(data, kind="all", var_names=problem.sites[:1])
    assert np.isfinite(summary["mean"]).all() and len(summary) == data["posterior"][problem.sites[0]][0, 0].size
    assert set(az.ess(data["posterior"].isel(draw=slice(100))).data_vars) == set(problem.sites)
    path = tmp_path / "fit.nc"
    data.to_netcdf(str(path))
    back = az.from_netcdf(str(path))
    for group in ("posterior", "sample_stats", "observed_data", "fit_stats"):
        xr.testing.assert_identical(back[group].load(), data[group])


def pyro_shape(problem, site: str) -> tuple:
    particles = draw(problem.model, problem.guide, problem.args)
    return tuple(particles.model[site].value.shape)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if not FACTORIES[n](**SMALL.get(n, {})).traits.subsampled])
def test_values_are_the_draws(name):
    problem = FACTORIES[name](**SMALL.get(name, {}))
    draw(problem.model, problem.guide, problem.args)
    data = to_arviz(problem.model, problem.guide, *problem.args, num_samples=7, seed=3)
    torch.manual_seed(3)
    with torch.no_grad():
        by_hand = draw(
            problem.model,
            problem.guide,
            problem.args,
            num_particles=7,
            vectorize=True,
            max_plate_nesting=problem.max_plate_nesting,
        )
    for site in problem.sites:
        np.testing.assert_array_equal(data["posterior"][site].values[0], by_hand.values(site).numpy())
    log_p, log_q = (sum(by_hand.rows(s.scaled).reshape(-1, 7 if by_hand.rows(s.scaled).shape[0] == 7 else 1, 1).shape[0] * 0 for s in run.values()) for run in (by_hand.model, by_hand.guide))
