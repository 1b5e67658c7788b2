r"""`to_arviz`: what ArviZ gets is exactly what was drawn, in dims with names, and drawing changes nothing."""

from __future__ import annotations

import inspect
import random
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from torch import nn

import pyro_emvae as emvae
from pyro_emvae._checks import DataError, EmvaeError, ModelError
from pyro_emvae._registry import entries
from pyro_emvae.diagnostics import arviz as arviz_module
from pyro_emvae.diagnostics import container, to_arviz
from pyro_emvae.particles import draw
from pyro_emvae.problems import local_global

FACTORIES = {entry.name: entry.factory for entry in entries("problem")}


def make(name: str):
    """Return a problem, with few data if it has a choice."""
    factory = FACTORIES[name]
    return factory(num_train=20) if "num_train" in inspect.signature(factory).parameters else factory()


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


@pytest.mark.parametrize("name", FACTORIES)
def test_problem(az, name, tmp_path):
    problem = make(name)
    data = to_arviz(problem.model, problem.guide, *problem.args, fit=SimpleNamespace(history=history()), seed=1)
    assert set(data["posterior"].data_vars) == set(problem.sites)
    assert set(data["sample_stats"].data_vars) == {"lp", "log_q", "log_weight"}
    for group in ("posterior", "sample_stats"):
        assert all(v.dims[:2] == ("chain", "draw") and v.shape[:2] == (1, 1000) for v in data[group].values())
    scalars = [v for v in problem.sites if not pyro_shape(problem, v)]
    assert all(data["posterior"][v].dims == ("chain", "draw") for v in scalars)
    summary = az.summary(data, kind="all", var_names=list(problem.sites[:1]))
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


@pytest.mark.parametrize("name", FACTORIES)
def test_values_are_the_draws(name):
    problem = make(name)
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
            values=batch_of(problem, data),
        )
    for site in problem.sites:
        np.testing.assert_array_equal(data["posterior"][site].values[0], by_hand.values(site).numpy())


def batch_of(problem, data) -> dict:
    """The indices of the subsampled plate, in the form that `draw` takes."""
    index = data["observed_data"].coords
    return {name: (torch.tensor(index[name].values), {}) for name in index} if problem.traits.subsampled else {}


def check_densities(problem, data) -> None:
    """Compare every draw's densities with those of Pyro's traces at its values and its batch."""
    batch = {name: index for name, (index, _) in batch_of(problem, data).items()}
    for k in data["posterior"]["draw"].values:
        values = {v: torch.as_tensor(data["posterior"][v].values[0, k]) for v in problem.sites} | batch
        with torch.no_grad():
            log_p, log_q = (
                poutine.trace(poutine.condition(fn, data=values)).get_trace(*problem.args).log_prob_sum()
                for fn in (problem.model, problem.guide)
            )
        stats = data["sample_stats"].isel(chain=0, draw=k)
        np.testing.assert_allclose(stats["lp"], log_p, rtol=1e-12)
        np.testing.assert_allclose(stats["log_q"], log_q, rtol=1e-12)
        np.testing.assert_allclose(stats["log_weight"], log_p - log_q, rtol=1e-10)


@pytest.mark.parametrize("name", FACTORIES)
def test_densities_are_those_of_pyros_traces(name):
    problem = make(name)
    draw(problem.model, problem.guide, problem.args)
    check_densities(problem, to_arviz(problem.model, problem.guide, *problem.args, num_samples=3, seed=0))


def test_subsampled_plate_is_the_batch_and_labelled_by_index():
    problem = FACTORIES["local_global_subsampled"]()
    data = to_arviz(problem.model, problem.guide, *problem.args, num_samples=5, seed=2, coords={"data": list("abcdef")})
    index = to_arviz(problem.model, problem.guide, *problem.args, num_samples=5, seed=2)["posterior"]["data"].values
    assert list(data["posterior"]["data"].values) == [list("abcdef")[i] for i in index]
    np.testing.assert_array_equal(data["observed_data"]["x"].values, problem.args[0].numpy()[index])
    assert data["posterior"].attrs["subsampled"] == "data: 2 of 6"


def test_draws_in_turns_hold_one_batch(monkeypatch):
    monkeypatch.setattr(arviz_module, "ELEMENTS", 50)
    problem = FACTORIES["local_global_subsampled"]()
    data = to_arviz(problem.model, problem.guide, *problem.args, num_samples=23, seed=0)
    z = data["posterior"]["z"].values
    assert z.shape == (1, 23, 2) and len(np.unique(z)) == z.size
    check_densities(problem, data)


def scalar_model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0).expand([1]).to_event(1))
    pyro.deterministic("twice", 2 * mu)
    pyro.deterministic("row", torch.stack([mu, mu + 1], -1), event_dim=1)
    pyro.deterministic("fixed", torch.tensor([1.0, 2.0, 3.0]))
    pyro.factor("penalty", -(mu**2))
    with pyro.plate("n", len(x)):
        n = pyro.sample("n_", dist.Normal(mu, tau[..., 0]))
        pyro.deterministic("n_twice", 2 * n)
        pyro.deterministic("n_pair", torch.stack([n, n], -1), event_dim=1)
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


X = torch.tensor([0.5, -1.0, 2.0, 0.25])


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger, AutoDelta])
def test_sites_that_pyro_adds_stay_out(guide):
    guide = guide(scalar_model)
    data = to_arviz(scalar_model, guide, X, num_samples=6, seed=0)
    posterior = data["posterior"]
    expected = {
        "mu": (),
        "tau": ("tau_dim_0",),
        "twice": (),
        "row": ("row_dim_0",),
        "fixed": ("fixed_dim_0",),
        "n_": ("n",),
        "n_twice": ("n",),
        "n_pair": ("n", "n_pair_dim_0"),
    }
    assert {name: v.dims[2:] for name, v in posterior.data_vars.items()} == expected
    assert set(data["observed_data"].data_vars) == {"x"}
    np.testing.assert_array_equal(posterior["twice"], 2 * posterior["mu"])
    np.testing.assert_array_equal(posterior["n_twice"], 2 * posterior["n_"])
    np.testing.assert_array_equal(posterior["row"][..., 1], posterior["mu"] + 1)
    np.testing.assert_array_equal(posterior["fixed"][0, 4], [1.0, 2.0, 3.0])
    assert (posterior["tau"] > 0).all()


@pytest.mark.parametrize("size", [1, 4])
def test_deterministic_value_that_mixes_particles_is_run_one_by_one(size):
    def model():
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("mean", z.mean())

    def guide():
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(1.0, 2.0))

    data = to_arviz(model, guide, num_samples=9, seed=0)["posterior"]
    np.testing.assert_allclose(data["mean"], data["z"].mean("data"), rtol=1e-6)
    assert data["z"].dims == ("chain", "draw", "data")


def test_what_reparam_computes_is_no_data():
    """`pyro.infer.reparam` leaves an observed point mass of a latent: its draws belong to the posterior."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            lognormal = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()])
            y = pyro.sample("y", lognormal)
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=torch.zeros(3))

    moved = poutine.reparam(model, {"z": LocScaleReparam(0.0), "y": TransformReparam()})
    guide = AutoNormal(moved)
    guide()
    data = to_arviz(moved, guide, num_samples=7, seed=0)
    posterior = data["posterior"]
    assert set(data["observed_data"].data_vars) == {"x"}
    np.testing.assert_allclose(posterior["z"], 1.0 + 2.0 * posterior["z_decentered"], rtol=1e-5)
    np.testing.assert_allclose(posterior["y"], np.exp(posterior["y_base"]), rtol=1e-5)


def test_data_that_reparam_moves_stay_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            lognormal = dist.TransformedDistribution(dist.Normal(z, 1.0), [dist.transforms.ExpTransform()])
            pyro.sample("y", lognormal, obs=torch.tensor([0.5, 1.0, 3.0]))

    moved = poutine.reparam(model, {"y": TransformReparam()})
    guide = AutoNormal(moved)
    guide()
    data = to_arviz(moved, guide, num_samples=7, seed=0)
    assert set(data["posterior"].data_vars) == {"z"}
    np.testing.assert_allclose(data["observed_data"]["y"], [0.5, 1.0, 3.0])


def test_model_that_mixes_particles_is_run_one_by_one():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=torch.zeros(3))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(1.0, 2.0))

    data = to_arviz(model, guide, num_samples=5, seed=0)
    z = data["posterior"]["z"].values[0]
    prior, likelihood = dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0)
    centred = torch.as_tensor(z - z.mean(-1, keepdims=True))
    log_p = prior.log_prob(torch.as_tensor(z)).sum(-1) + likelihood.log_prob(centred).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["lp"][0], log_p, rtol=1e-5)


def test_nested_plates_and_names_of_plates():
    def model(x):
        with pyro.plate("lp", 2, dim=-2), pyro.plate("draw", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2, 3, 4]).to_event(1))
        with pyro.plate("outer", 2, dim=-2):
            pyro.sample("y", dist.Normal(0.0, 1.0))
        with pyro.plate("x", dim=-1):  # Pyro refuses the name of a site for plates with a size
            pyro.sample("x", dist.Normal(z.sum(-1).sum(-2, keepdim=True), 1.0).to_event(0), obs=x)

    def guide(x):
        with pyro.plate("lp", 2, dim=-2), pyro.plate("draw", 3, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("outer", 2, dim=-2):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    data = to_arviz(model, guide, torch.zeros(3), num_samples=4, coords={"x": list("abc")})
    assert data["posterior"]["z"].dims == ("chain", "draw", "lp_dim", "draw_dim", "z_dim_0")
    assert data["posterior"]["y"].dims == ("chain", "draw", "outer")
    assert data["observed_data"]["x"].dims == ("x_dim",)
    assert list(data["observed_data"]["x_dim"].values) == list("abc")


def test_mask_and_observations():
    keep = torch.tensor([True, False, True])
    label = torch.tensor([1, 0, 1])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0).mask(keep), obs=torch.tensor([1.0, 9.0, 2.0]))
            with poutine.mask(mask=keep):
                pyro.sample("y", dist.Bernoulli(0.5), obs=label.float())
                pyro.sample("k", dist.Categorical(torch.ones(2)), obs=label)
            pyro.sample("all", dist.Categorical(torch.ones(2)), obs=label)
            pyro.sample("one", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
            pyro.sample("v", dist.Normal(z, 1.0).expand([3, 2]).to_event(1).mask(keep), obs=torch.ones(3, 2))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    data = to_arviz(model, guide, num_samples=4, seed=0)
    seen = data["observed_data"]
    np.testing.assert_array_equal(seen["x"], [1.0, np.nan, 2.0])
    np.testing.assert_array_equal(seen["y"], [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(seen["k"], [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(seen["v"], [[1.0, 1.0], [np.nan, np.nan], [1.0, 1.0]])
    np.testing.assert_array_equal(seen["one"], [0.5, 0.5, 0.5])
    assert seen["all"].dtype == np.int64 and seen["all"].values.tolist() == [1, 0, 1]
    z = torch.as_tensor(data["posterior"]["z"].values[0])
    normal = dist.Normal(z, 1.0)
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + normal.log_prob(torch.tensor(1.0)) + normal.log_prob(torch.tensor(2.0))
    log_p += 3 * normal.log_prob(torch.tensor(0.5)) + 4 * normal.log_prob(torch.tensor(1.0)) + 7 * np.log(0.5)
    np.testing.assert_allclose(data["sample_stats"]["lp"][0], log_p, rtol=1e-5)


def test_partly_observed_site():
    keep = torch.tensor([True, False])

    def model():
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor([1.0, 9.0]), obs_mask=keep)

    data = to_arviz(model, AutoNormal(model), num_samples=4, seed=0)
    np.testing.assert_array_equal(data["observed_data"]["x_observed"], [1.0, np.nan])
    imputed = data["posterior"]["x"].values[0]
    np.testing.assert_array_equal(imputed[:, 0], np.ones(4))
    np.testing.assert_array_equal(imputed[:, 1], data["posterior"]["x_unobserved"].values[0, :, 1])


# Names, labels, attributes ------------------------------------------------------------------------------------------


def pair(event: int = 3):
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([event]).to_event(1))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([2, event]).to_event(1))

    return model, AutoNormal(model)


def test_dims_and_coords():
    model, guide = pair()
    dims = {"w": ["feature"], "z": ["data", "feature"]}
    data = to_arviz(model, guide, num_samples=2, dims=dims, coords={"feature": list("abc"), "data": [10, 20]})
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "feature")
    assert float(data["posterior"]["w"].sel(feature="b")[0, 0]) == float(data["posterior"]["w"][0, 0, 1])
    assert data["posterior"]["data"].values.tolist() == [10, 20]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dims": {"v": ["a"]}}, "'v'"),
        ({"dims": {"z": ["a", "b", "c"]}}, "3 names"),
        ({"dims": {"w": ["data"]}}, "sizes"),
        ({"coords": {"dta": [1, 2]}}, "'data'"),
        ({"coords": {"data": [1, 2, 3]}}, "3 coords"),
        ({"fit": object()}, "object"),
        ({"fit": SimpleNamespace(history=[1.0])}, "list"),
        ({"num_samples": 0}, "0"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    model, guide = pair()
    with pytest.raises(EmvaeError, match=named):
        to_arviz(model, guide, **arguments)


def test_broken_pairs_are_named():
    model, _ = pair()
    with pytest.raises(ModelError, match="'w'"):
        to_arviz(model, lambda: None)
    with pytest.raises(ModelError, match="without latent sites"):
        to_arviz(lambda: pyro.factor("x", torch.ones(())), lambda: None)

    def loose():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pytest.raises(ModelError, match="to_event"):
        to_arviz(loose, loose)

    def reserved():
        pyro.sample("draw", dist.Normal(0.0, 1.0))

    with pytest.raises(DataError, match="'draw'"):
        to_arviz(reserved, reserved)


def test_slash_in_a_name(az, tmp_path):
    def model():
        pyro.sample("a/z", dist.Normal(0.0, 1.0))

    data = to_arviz(model, model, num_samples=3)
    data.to_netcdf(str(tmp_path / "a.nc"))
    assert set(data["posterior"].data_vars) == {"a.z"}


def test_attributes():
    problem = FACTORIES["normal_normal"]()
    data = to_arviz(problem.model, problem.guide, *problem.args, num_samples=3, seed=5)
    for group in ("posterior", "sample_stats", "observed_data"):
        attrs = data[group].attrs
        assert attrs["inference_library"] == "pyro" and attrs["inference_library_version"] == pyro.__version__
        assert attrs["creation_library"] == "pyro_emvae" and attrs["guide"] == "guide" and attrs["seed"] == 5
        assert all(isinstance(value, (str, int, float, list)) for value in attrs.values())


def test_fit_stats():
    problem = FACTORIES["normal_normal"]()
    given = history()
    kept = given.copy(deep=True)
    fit = SimpleNamespace(history=given, status="converged")
    stats = to_arviz(problem.model, problem.guide, *problem.args, num_samples=3, fit=fit)["fit_stats"]
    assert stats["elbo"].dims == ("chain", "step") and stats["e_gain"].dims == ("chain", "iteration")
    np.testing.assert_array_equal(stats["elbo"][0], given["elbo"])
    assert stats["phase"].dtype == np.int8 and stats["phase"].attrs["flag_meanings"] == "E M joint"
    assert stats.attrs["status"] == "converged" and stats.attrs["converged"] == 1 and "at" not in stats.attrs
    xr.testing.assert_identical(given, kept)


def test_fit_of_em(az, tmp_path):
    problem = FACTORIES["local_global"]()
    em = emvae.EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.01}))
    fit = em.run(*problem.args, max_iter=5, progress_bar=False, seed=0)
    data = to_arviz(problem.model, problem.guide, *problem.args, fit=fit, num_samples=4, seed=0)
    data.to_netcdf(str(tmp_path / "fit.nc"))
    stats = az.from_netcdf(str(tmp_path / "fit.nc"))["fit_stats"]
    np.testing.assert_array_equal(stats["elbo"].values, fit.history["elbo"].values[None])
    assert stats["phase"].values.tolist() == [[0, 1] * 5] and stats["e_gain"].shape == (1, 5)
    assert stats.attrs["status"] == fit.status and stats.attrs["fit_torch"] == torch.__version__


# Watching changes nothing -------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x):
        return self.net(x)[:, 0]


def amortized():
    encoder, x = Encoder(), torch.randn(6, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5))

    return model, guide, x, encoder


@pytest.mark.parametrize("seed", [None, 3])
def test_drawing_changes_nothing(seed):
    model, guide, x, encoder = amortized()
    draw(model, guide, (x,))
    encoder.net[2].eval()
    modes = [m.training for m in encoder.modules()]
    tensors = {n: t.clone() for n, t in encoder.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    data = to_arviz(model, guide, x, num_samples=10, seed=seed)
    with pytest.raises(ModelError):
        to_arviz(model, lambda x: encoder(x), x, num_samples=10, seed=seed)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert [m.training for m in encoder.modules()] == modes
    assert all(torch.equal(t, tensors[n]) for n, t in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    log_q = dist.Normal(encoder.eval()(x).detach(), 0.5).log_prob(torch.as_tensor(data["posterior"]["z"].values[0]))
    np.testing.assert_allclose(data["sample_stats"]["log_q"][0], log_q.sum(-1), rtol=1e-5)


def test_seeds():
    problem = FACTORIES["local_global"]()
    one, two, three = (
        to_arviz(problem.model, problem.guide, *problem.args, num_samples=5, seed=seed)["posterior"]["z"].values
        for seed in (0, 0, 1)
    )
    assert (one == two).all() and not (one == three).any()
    torch.manual_seed(8)
    free = [to_arviz(problem.model, problem.guide, *problem.args, num_samples=5)["posterior"]["z"].values for _ in "ab"]
    assert (free[0] == free[1]).all() and not (free[0] == one).any()


# The container ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "kind"), [("0.21.0", "InferenceData"), ("1.3.0", "DataTree")])
def test_container_of_each_generation(az, monkeypatch, tmp_path, version, kind):
    monkeypatch.setattr(az, "__version__", version)
    problem = FACTORIES["local_global"]()
    fit = SimpleNamespace(history=history())
    data = to_arviz(problem.model, problem.guide, *problem.args, num_samples=4, fit=fit, seed=0)
    assert type(data).__name__ == kind and data.attrs["creation_library"] == "pyro_emvae"
    groups = {"posterior", "sample_stats", "observed_data", "fit_stats"}
    assert all(group in data for group in groups)
    assert data["posterior"]["z"].shape == (1, 4, 6)
    if kind == "DataTree":
        assert set(data.children) == groups
        data.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
        back = xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf")
        xr.testing.assert_identical(back.load(), data)
        back.close()


def test_groups_that_are_none_are_left_out(az):
    data = container.finalize({"posterior": xr.Dataset({"z": ("draw", np.zeros(2))}), "prior": None})
    assert "prior" not in data


def test_attributes_fit_into_a_file(tmp_path):
    given = {
        "a": None,
        "b": True,
        "c": {"x": 1},
        "d": [True, 2],
        "e": [1, "x"],
        "f": np.float32(1.5),
        "g": [],
        "h": torch.__version__,
    }
    attrs = container.plain(given | {"units": "seconds"})
    assert type(attrs.pop("h")) is str
    assert attrs == {"b": 1, "c": "{'x': 1}", "d": [1, 2], "e": ["1", "x"], "f": 1.5, "unit": "seconds"}
    xr.Dataset(attrs=attrs).to_netcdf(tmp_path / "a.nc")


def test_rename_dims():
    assert container.rename_dims(["n", "n_dim", "step"], ["n"]) == {
        "n": "n_dim_dim",
        "n_dim": "n_dim",
        "step": "step_dim",
    }


def test_empty_data():
    problem = local_global()
    with pytest.raises(DataError, match=r"`to_arviz` cannot use empty data: got a tensor of shape \(0,"):
        to_arviz(problem.model, problem.guide, problem.args[0][:0])
