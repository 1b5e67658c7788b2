r"""`SVI`, and `EM` with the joint schedule, against `pyro.infer.SVI` at the same seed from a fresh store."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import autoguide
from torch import Tensor, nn

from pyro_emvae import EM, SVI, MonteCarloELBO, problems
from pyro_emvae._registry import entries
from pyro_emvae.optimizers import Adam

SMALL = {"digits_vae": functools.partial(problems.digits_vae, num_train=12, num_hidden=6)}
PROBLEMS = {entry.name: SMALL.get(entry.name, entry.factory) for entry in entries("problem")}
X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8]], dtype=torch.float64)

SGD = {"SGD": pyro.optim.SGD({"lr": 1e-3}), "momentum": pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})}
OTHER = {
    "Adam": pyro.optim.Adam({"lr": 0.02}),
    "ClippedAdam": pyro.optim.ClippedAdam({"lr": 0.02, "clip_norm": 1.0, "lrd": 0.99}),
    "RMSprop": pyro.optim.RMSprop({"lr": 0.01}),
}
joint = functools.partial(EM, schedule="joint")
OURS = {"SVI": SVI, "EM": joint}
ours = pytest.mark.parametrize("cls", OURS.values(), ids=OURS)


def fit(cls, model, guide, args, optim, loss, *, steps: int = 4, modules: tuple = ()) -> tuple[list, dict[str, Tensor]]:
    """Losses of a few steps from a fresh store and the first seed; all parameters and buffers at the end."""
    start = [copy.deepcopy(m.state_dict()) for m in modules]
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    svi = cls(model, guide, copy.deepcopy(optim), loss)
    losses = [svi.step(*args) for _ in range(steps)]
    end = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    end |= {f"{i}.{n}": v.clone() for i, m in enumerate(modules) for n, v in m.state_dict().items()}
    end["generator"] = torch.get_rng_state()
    for module, state in zip(modules, start, strict=True):
        module.load_state_dict(state)
    return losses, end


def assert_same(one: tuple, two: tuple, rtol: float = 0.0) -> None:
    """Assert that two fits are the same: bit for bit, or to a relative tolerance."""
    assert one[1].keys() == two[1].keys()
    if not rtol:
        assert one[0] == two[0]
        assert [n for n, v in one[1].items() if not torch.equal(v, two[1][n])] == []
    assert one[0] == pytest.approx(two[0], rel=rtol)
    for name, value in one[1].items():
        torch.testing.assert_close(value, two[1][name], rtol=rtol, atol=rtol)


def as_pyro(**options: Any) -> MonteCarloELBO:
    return MonteCarloELBO(estimator="pyro", **options)


# The joint step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@ours
def test_joint_step_equals_pyro_bit_for_bit_with_sgd(cls, name):
    results = []
    for make, loss in ((infer.SVI, infer.Trace_ELBO()), (cls, as_pyro())):
        problem = PROBLEMS[name]()
        results.append(fit(make, problem.model, problem.guide, problem.args, SGD["momentum"], loss))
    assert_same(*results)


@pytest.mark.parametrize("optim", [*SGD, *OTHER])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
@ours
def test_joint_step_equals_pyro_with_every_optimizer(cls, vectorize, particles, optim):
    problem = problems.local_global_subsampled()
    results = []
    for make, loss in ((infer.SVI, infer.Trace_ELBO), (cls, as_pyro)):
        elbo = loss(num_particles=particles, vectorize_particles=vectorize, max_plate_nesting=1)
        results.append(fit(make, problem.model, problem.guide, problem.args, (SGD | OTHER)[optim], elbo))
    exact = optim in SGD and particles == 1
    assert_same(*results, rtol=0.0 if exact else 1e-6)


def hierarchical(x):
    loc = pyro.sample("mu", dist.Normal(pyro.param("prior", torch.tensor(0.1, dtype=torch.float64)), 1.0))
    scale = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc * torch.ones(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


AUTOGUIDES = [
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoDelta,
    autoguide.AutoNormalMessenger,
    functools.partial(autoguide.AutoNormal, init_loc_fn=autoguide.init_to_sample),
]


@pytest.mark.parametrize("make_guide", AUTOGUIDES, ids=lambda f: getattr(f, "__name__", "init_to_sample"))
@pytest.mark.parametrize("optim", ["momentum", "Adam"])
@ours
def test_joint_step_equals_pyro_with_autoguides(cls, optim, make_guide):
    results = []
    for make, loss in ((infer.SVI, infer.Trace_ELBO()), (cls, as_pyro())):
        results.append(fit(make, hierarchical, make_guide(hierarchical), (X,), (SGD | OTHER)[optim], loss))
    assert_same(*results, rtol=0.0 if optim == "momentum" else 1e-6)


class Net(nn.Module):
    """Linear, batch norm, dropout."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(rows, columns), nn.BatchNorm1d(columns), nn.Dropout(0.4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.linear(x).tanh()))


def autoencoder(lazy: bool = False):
    """A variational autoencoder; `lazy`: the networks' parameters come from `pyro.param` and its generator."""
    torch.manual_seed(0)
    decoder, encoder = Net(2, 2), Net(2, 4)

    def model(x):
        pyro.module("decoder", decoder)
        shift = pyro.param("shift", lambda: torch.randn(2, dtype=torch.float64)) if lazy else 0.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + shift, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        shift = pyro.param("own shift", lambda: torch.randn(2, dtype=torch.float64)) if lazy else 0.0
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + shift, scale.exp()).to_event(1))

    return model, guide, (decoder, encoder)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("optim", ["momentum", "Adam"])
@ours
def test_joint_step_equals_pyro_for_an_autoencoder_with_dropout_and_batch_norm(cls, optim, lazy):
    model, guide, modules = autoencoder(lazy)
    results = []
    for make, loss in ((infer.SVI, infer.Trace_ELBO()), (cls, as_pyro())):
        results.append(fit(make, model, guide, (X,), (SGD | OTHER)[optim], loss, modules=modules))
    assert_same(*results, rtol=0.0 if optim == "momentum" else 1e-6)


@ours
def test_joint_step_trains_what_both_blocks_share(cls):
    """The location of q and of the prior is one parameter."""

    def shared():
        return pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))

    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(shared(), 1.0)), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(shared() + x * pyro.param("slope", torch.ones_like(x)), 1.0))

    results = []
    for make, loss in ((infer.SVI, infer.Trace_ELBO()), (cls, as_pyro())):
        results.append(fit(make, model, guide, (X[2, 1],), SGD["momentum"], loss))
    assert_same(*results)


@pytest.mark.parametrize("steps", [1, 4])
def test_an_optimizer_per_block_equals_one_for_all(steps):
    problem = problems.linear_gaussian()
    results = []
    for optim in (OTHER["Adam"], {"guide": OTHER["Adam"], "model": OTHER["Adam"]}):
        results.append(fit(SVI, problem.model, problem.guide, problem.args, optim, None, steps=steps))
    assert_same(*results)


def test_an_optimizer_per_block_gives_each_its_own_rate():
    problem = problems.linear_gaussian()
    optim = {"guide": pyro.optim.SGD({"lr": 0.0}), "model": pyro.optim.SGD({"lr": 0.01})}
    _, end = fit(SVI, problem.model, problem.guide, problem.args, optim, None)
    for name, value in problem.params.items():
        assert torch.allclose(end[name], value, rtol=1e-12) == (name in problem.guide_params), name


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.Adam({"lr": 0.02}),
        functools.partial(torch.optim.Adam, lr=0.02),
        Adam(lr=0.02),
        pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 0.02}),
        pyro.optim.Adam(lambda name: {"lr": 0.02}),
        pyro.optim.StepLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "step_size": 1000}),
    ],
    ids=["pyro", "partial", "rule", "PyroOptim", "callable", "scheduler"],
)
def test_every_form_of_optimizer_gives_the_same_fit(optim):
    problem = problems.normal_normal()
    expected = fit(infer.SVI, problem.model, problem.guide, problem.args, OTHER["Adam"], infer.Trace_ELBO())
    found = fit(SVI, problem.model, problem.guide, problem.args, optim, MonteCarloELBO(estimator="pyro"))
    assert_same(found, expected, rtol=1e-6)


# Pyro's own losses ----------------------------------------------------------------------------------------------


def simple_loss(model, guide, *args):
    """A loss that is a function, as in Pyro's tutorial on custom objectives."""
    traced = pyro.poutine.trace(guide).get_trace(*args)
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace=traced)).get_trace(*args)
    return -1.0 * (replayed.log_prob_sum() - traced.log_prob_sum())


LOSSES = {
    "Trace_ELBO": infer.Trace_ELBO,
    "Trace_ELBO, 3 particles": lambda: infer.Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceGraph_ELBO": infer.TraceGraph_ELBO,
    "TraceMeanField_ELBO": infer.TraceMeanField_ELBO,
    "TraceEnum_ELBO": lambda: infer.TraceEnum_ELBO(strict_enumeration_warning=False),
    "RenyiELBO": lambda: infer.RenyiELBO(alpha=0.5, num_particles=3),
    "TraceTailAdaptive_ELBO": lambda: infer.TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True),
    "function": lambda: simple_loss,
}
COMMON = ["normal_normal", "local_global_subsampled", "linear_gaussian"]


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("loss", LOSSES)
@ours
def test_pyros_losses_give_the_same_fit_as_under_pyro(cls, loss, name):
    problem = PROBLEMS[name]()
    results = []
    for make in (infer.SVI, cls):
        results.append(fit(make, problem.model, problem.guide, problem.args, SGD["momentum"], LOSSES[loss]()))
    assert_same(*results)


@pytest.mark.parametrize("name", ["bernoulli", "categorical", "discrete_two_level"])
def test_enumeration_gives_the_same_fit_as_under_pyro(name):
    problem = PROBLEMS[name]()
    guide = infer.config_enumerate(problem.guide, "parallel")
    elbo = functools.partial(infer.TraceEnum_ELBO, max_plate_nesting=1)
    results = [fit(cls, problem.model, guide, problem.args, SGD["momentum"], elbo()) for cls in (infer.SVI, SVI)]
    assert_same(*results)


def test_a_latent_that_the_model_enumerates_is_trained():
    def model(x):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0], dtype=torch.float64))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2, dtype=torch.float64)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    def guide(x):
        pass

    elbo = functools.partial(infer.TraceEnum_ELBO, max_plate_nesting=1)
    results = [fit(cls, model, guide, (X[:, 0],), SGD["momentum"], elbo()) for cls in (infer.SVI, SVI)]
    assert_same(*results)


def test_reweighted_wake_sleep_gives_the_same_fit_and_a_float():
    problem = problems.linear_gaussian()
    results = []
    for cls in (infer.SVI, SVI):
        loss = infer.ReweightedWakeSleep(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        results.append(fit(cls, problem.model, problem.guide, problem.args, SGD["momentum"], loss))
    assert [wake_theta for wake_theta, _ in results[0][0]] == results[1][0]
    assert_same((results[1][0], results[0][1]), results[1])


def test_a_given_loss_and_grads_is_called():
    problem = problems.normal_normal()

    def loss_and_grads(model, guide, *args):
        loss = simple_loss(model, guide, *args)
        (loss * 2).backward()
        return loss.item()

    results = []
    for cls in (infer.SVI, SVI):
        with_grads = functools.partial(cls, loss_and_grads=loss_and_grads)
        results.append(fit(with_grads, problem.model, problem.guide, problem.args, SGD["momentum"], simple_loss))
    assert_same(*results)
    half = fit(SVI, problem.model, problem.guide, problem.args, SGD["momentum"], simple_loss)
    assert any(not torch.equal(half[1][n], results[0][1][n]) for n in problem.params)


# The interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [None, infer.Trace_ELBO(), simple_loss], ids=["default", "Trace_ELBO", "function"])
@ours
def test_it_has_what_pyros_svi_has(cls, loss):
    problem = problems.linear_gaussian()
    svi = cls(problem.model, problem.guide, OTHER["Adam"], loss)
    assert isinstance(svi, infer.SVI) and isinstance(svi.optim, pyro.optim.PyroOptim)
    assert svi.model is problem.model and svi.guide is problem.guide
    assert type(svi.step(*problem.args)) is float
    assert type(svi.evaluate_loss(*problem.args)) is float
    value = svi.loss(svi.model, svi.guide, *problem.args)
    assert float(torch.as_tensor(value).detach()) > 0
    svi.loss_and_grads(svi.model, svi.guide, *problem.args)
    assert set(svi.optim.get_state()) == set(problem.params)


def test_gradients_are_neither_left_nor_taken():
    """A step leaves ``.grad`` as it was, and does not add what was there."""
    problem = problems.normal_normal()
    results = []
    for loss in (MonteCarloELBO(estimator="pyro"), infer.Trace_ELBO()):
        for grad in (None, 7.0):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            problem.model(*problem.args)
            problem.guide(*problem.args)
            pyro.set_rng_seed(0)
            leaves = dict(pyro.get_param_store().named_parameters())
            for leaf in leaves.values():
                leaf.grad = None if grad is None else torch.full_like(leaf, grad)
            svi = SVI(problem.model, problem.guide, SGD["SGD"], loss)
            results.append([svi.step(*problem.args) for _ in range(3)])
            for leaf in leaves.values():
                assert leaf.grad is None if grad is None else bool((leaf.grad == grad).all())
    assert results[0] == results[1] == results[2] == results[3]


@ours
def test_run_equals_steps(cls):
    problem = problems.subsampled()
    stepped = fit(cls, problem.model, problem.guide, problem.args, OTHER["Adam"], None, steps=6)
    pyro.clear_param_store()
    svi = cls(problem.model, problem.guide, OTHER["Adam"])
    name = "num_steps" if cls is SVI else "max_iter"
    result = svi.run(
        *(problem.args if cls is joint else (6, *problem.args)), seed=2, **({name: 6} if cls is joint else {})
    )
    assert result.history["objective"].values.tolist() == [-loss for loss in stepped[0]]
    assert all(torch.equal(result.params[n], stepped[1][n]) for n in problem.params)
    assert result.status == "MAX_ITER" and result.num_iterations == 6


def test_a_leaf_of_two_names_is_trained_like_any_other():
    """`AutoIAFNormal` registers one tensor twice: the first step meets one name, later steps the other."""
    x, y = torch.randn(8, 3), torch.ones(8)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)).to_event(1), obs=y)

    losses = []
    for make in (lambda *a: infer.SVI(*a, infer.Trace_ELBO()), SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(model, autoguide.AutoIAFNormal(model, hidden_dim=[20]), pyro.optim.Adam({"lr": 0.05}))
        losses.append([svi.step(x, y) for _ in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_keywords_of_a_wrapper_and_of_a_module_go_to_the_model():
    """Functions are looked at with and without what `functools.wraps` says of them, modules at their ``forward``."""
    x = torch.tensor([0.3, -1.2])

    def inner(x: Tensor, scale: float = 1.0) -> None:
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=x)

    @functools.wraps(inner)
    def wrapped(x: Tensor, temperature: float = 1.0, **kwargs: Any) -> None:
        inner(x, scale=temperature)

    class Module(nn.Module):
        def forward(self, x: Tensor, annealing: float = 1.0) -> None:
            inner(x, scale=annealing)

    def guide(x: Tensor, **kwargs: Any) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    for model, given in ((wrapped, {"temperature": 0.5}), (Module(), {"annealing": 0.5})):
        pyro.clear_param_store()
        assert SVI(model, guide, Adam(lr=0.01)).run(2, x, progress_bar=False, **given).status == "MAX_ITER"
