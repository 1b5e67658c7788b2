r"""The recorded step against the eager one, bit for bit; what cannot be recorded is refused with its line."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import random
import re
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import Tensor, nn

from pyro_emvae import EM, SVI, EmvaeError, MonteCarloELBO, problems
from pyro_emvae._checks import RecordingError, StepError
from pyro_emvae._registry import entries
from pyro_emvae.engine import record
from pyro_emvae.particles import quiet
from pyro_emvae.testing.replay import fitting_sites

SMALL = {"digits_vae": functools.partial(problems.digits_vae, num_train=12, num_hidden=6)}
PROBLEMS = {entry.name: SMALL.get(entry.name, entry.factory) for entry in entries("problem")}
X = torch.tensor([0.3, 1.7, -0.5, 0.9])


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.05})


def values() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def trajectory(model, guide, args, *, backend: str, cls: type = SVI, optim: Any = None, steps: int = 3, **options):
    """Losses, parameters, optimizer state, estimator state and generator after a few steps from a fresh store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    loss = MonteCarloELBO(**options)
    svi = cls(model, guide, copy.deepcopy(optim) or adam(), loss, backend=backend)
    losses = [svi.step(*args) for _ in range(steps)]
    assert bool(svi.engine._recordings) == (backend == "graph")
    slots = {n: s["state"] for n, s in svi.optim.get_state().items()}
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "params": values(),
        "optim": slots,
        "state": loss.state,
        "generator": torch.get_rng_state(),
    }


def assert_equal(one: Any, two: Any, path: str = "") -> None:
    """Assert that two trees of tensors are equal bit for bit."""
    if isinstance(one, list | tuple):
        one, two = dict(enumerate(one)), dict(enumerate(two))
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_equal(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, two), f"{path}: {one} and {two}"
    else:
        assert one == two, path


def assert_graph_equals_eager(model, guide, args, **options) -> None:
    start = {id(m): copy.deepcopy(m.state_dict()) for m in modules_of(model, guide)}
    results = []
    for backend in ("eager", "graph"):
        for module in modules_of(model, guide):
            module.load_state_dict(start[id(module)])
        result = trajectory(model, guide, args, backend=backend, **options)
        buffers = {str(i): dict(m.named_buffers()) for i, m in enumerate(modules_of(model, guide))}
        results.append(copy.deepcopy(result | {"buffers": buffers}))
    assert_equal(*results)
    assert len(set(results[0]["losses"].tolist())) > 1


def modules_of(*functions: Any) -> list[nn.Module]:
    """The networks in the closures of model and guide."""
    cells = [c.cell_contents for f in functions for c in getattr(f, "__closure__", None) or ()]
    return [m for m in [*functions, *cells] if isinstance(m, nn.Module)]


# Graph and eager ------------------------------------------------------------------------------------------------


def fits(problem: Any, estimator: Any, particles: int) -> bool:
    """Whether an estimator can be used at every site of a problem's guide."""
    return set(problem.sites) <= set(fitting_sites(problem, estimator, particles))


def cases() -> list:
    """Every problem with auto; those with minibatches, masks, two levels or discrete sites with every estimator."""
    found = []
    for name, factory in PROBLEMS.items():
        pyro.clear_param_store()
        problem, loss = factory(), MonteCarloELBO()
        with quiet(seed=0):
            loss.loss(problem.model, problem.guide, *problem.args)
        found.append(pytest.param(name, "auto", 1, id=f"{name}-auto"))
        for entry in entries("estimator"):
            estimator = entry.factory()
            is_autos = set(loss.resolved.values()) == {estimator}
            traits = problem.traits
            varied = traits.subsampled or traits.masked or traits.two_level or not traits.reparameterised
            if varied and not is_autos and fits(problem, estimator, entry.traits.min_particles):
                found.append(pytest.param(name, entry.name, entry.traits.min_particles, id=f"{name}-{entry.name}"))
    pyro.clear_param_store()
    return found


@pytest.mark.parametrize(("name", "estimator", "particles"), cases())
def test_graph_equals_eager_on_every_problem_and_estimator(name, estimator, particles):
    problem = PROBLEMS[name]()
    assert_graph_equals_eager(problem.model, problem.guide, problem.args, estimator=estimator, num_particles=particles)


ONE_HOT = ["score", "measure_valued", "unordered_set", "rao_blackwell_topk", "straight_through", "gumbel_rao"]


@pytest.mark.parametrize("estimator", ONE_HOT)
def test_one_hot_draws_are_recorded(estimator):
    """Torch asks whether the indices of such a draw are below their number, which is known."""
    x = torch.tensor([0.3, -1.2, 2.1])

    def model(x: Tensor) -> None:
        with pyro.plate("data", 3, subsample_size=2) as index:
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.tensor([0.3, -0.2, 0.1])))
            pyro.sample("x", dist.Normal((z * torch.tensor([-1.0, 0.5, 2.0])).sum(-1), 0.8), obs=x[index])

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.linspace(-1, 1, 9).reshape(3, 3))
        with pyro.plate("data", 3, subsample_size=2) as index:
            pyro.sample("z", dist.OneHotCategorical(logits=logits[index]))

    with pyro.validation_enabled(False):  # which adds up the paths through a one-hot density in another order
        assert_graph_equals_eager(model, guide, (x,), estimator={"z": estimator}, num_particles=2)


def test_masks_of_a_minibatch_are_recorded_beside_a_kl_in_closed_form():
    """Model and guide each take the rows of one mask: equal tensors, and two."""
    x, keep = torch.tensor([0.3, -1.2, 2.1]), torch.tensor([True, False, True])

    def pair(other: Tensor) -> tuple:
        def model(x: Tensor) -> None:
            with pyro.plate("data", 3, subsample_size=2) as index, pyro.poutine.mask(mask=keep[index]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        def guide(x: Tensor) -> None:
            loc = pyro.param("loc", lambda: torch.zeros(3))
            with pyro.plate("data", 3, subsample_size=2) as index, pyro.poutine.mask(mask=other[index]):
                pyro.sample("z", dist.Normal(loc[index], 1.0))

        return model, guide

    assert_graph_equals_eager(*pair(keep), (x,), estimator="analytic_kl", num_particles=2)
    with pytest.raises(EmvaeError, match="a scale or mask that differs"):
        trajectory(*pair(~keep), (x,), backend="graph", estimator="analytic_kl", num_particles=2)


def classes() -> list:
    return [pytest.param(cls, id=cls.__name__) for cls in (SVI, EM)]


OPTIMIZERS = {
    "momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Adam": adam(),
    "ClippedAdam": pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 0.3, "lrd": 0.9}),
    "AdamW": torch.optim.AdamW,
    "RMSprop": pyro.optim.RMSprop({"lr": 0.01}),
    "Adagrad": pyro.optim.Adagrad({"lr": 0.1}),
    "clipped": pyro.optim.SGD({"lr": 0.01}, {"clip_norm": 0.5}),
    "per parameter": pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "loc" else 0.01}),
    "NAdam": pyro.optim.NAdam({"lr": 0.01}),
}


@pytest.mark.parametrize(("cls", "optim"), [*((SVI, name) for name in OPTIMIZERS), (EM, "Adam"), (EM, "momentum")])
def test_graph_equals_eager_with_every_optimizer(cls, optim):
    problem = problems.subsampled()
    assert_graph_equals_eager(problem.model, problem.guide, problem.args, cls=cls, optim=OPTIMIZERS[optim], steps=5)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_graph_equals_eager_with_particles_and_analytic_kl(particles, vectorize):
    problem = problems.local_global_subsampled()
    options = dict(num_particles=particles, vectorize_particles=vectorize, objective="elbo_analytic_kl")
    assert_graph_equals_eager(problem.model, problem.guide, problem.args, **options)


class Net(nn.Module):
    """Linear, batch norm, dropout."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(rows, columns), nn.BatchNorm1d(columns), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.linear(x).tanh()))


def autoencoder(norm: bool = True):
    """A model and a guide with dropout, and batch norm if asked for, in both networks."""
    torch.manual_seed(0)
    decoder, encoder = Net(2, 3), Net(3, 4)
    if not norm:
        decoder.norm = encoder.norm = nn.Identity()
    images = torch.randn(8, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide, (images,)


@pytest.mark.parametrize("cls", classes())
@pytest.mark.parametrize("particles", [1, 2])
def test_graph_equals_eager_with_dropout_and_batch_norm_in_both_networks(cls, particles):
    model, guide, args = autoencoder()
    options = dict(num_particles=particles, vectorize_particles=False)
    assert_graph_equals_eager(model, guide, args, cls=cls, steps=5, **options)


def regression():
    """A model with a positive global and a guide to be made by Pyro."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(pyro.param("prior", torch.tensor(0.1)), 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, tau), obs=x)

    return model


@pytest.mark.parametrize(
    "make",
    [
        autoguide.AutoNormal,
        autoguide.AutoDelta,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoNormalMessenger,
    ],
    ids=lambda cls: cls.__name__,
)
def test_graph_equals_eager_with_autoguides(make):
    model = regression()
    results = [trajectory(model, make(model), (X,), backend=backend) for backend in ("eager", "graph")]
    assert_equal(*results)


# What a recording leaves alone, and when it is made anew ----------------------------------------------------------


def test_recording_leaves_generators_buffers_and_parameters_as_they_were():
    model, guide, args = autoencoder()
    svi = SVI(model, guide, adam(), backend="graph")
    svi.step(*args)
    nets = modules_of(model, guide)
    before = copy.deepcopy([net.state_dict() for net in nets]), values(), copy.deepcopy(svi.loss.__self__.state)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    svi.engine._record(None, args, {}, svi.engine.loss)
    after = [net.state_dict() for net in nets], values(), svi.engine.loss.state
    assert_equal(before, after)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1] and random.getstate() == generators[2]
    assert all(p.grad is None for net in nets for p in net.parameters())


def recordings(svi: Any) -> int:
    return len(svi.engine._recordings)


def test_data_of_another_shape_or_dtype_are_recorded_anew_and_the_rest_is_not():
    problem = problems.normal_normal(dtype=torch.float32)
    sizes = [5, 5, 3, 5, 3, 4]
    results = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(problem.model, problem.guide, adam(), backend=backend)
        generator = torch.Generator().manual_seed(1)
        results.append([svi.step(torch.randn(n, generator=generator)) for n in sizes])
    assert results[0] == results[1]
    assert recordings(svi) == 2  # the first step on data of a new shape is eager
    for n in (4, 5):
        svi.step(torch.randn(n))
    assert recordings(svi) == 3


class Lazy:
    """A model that makes something at the first call with data of a new shape, and keeps it."""

    def __init__(self) -> None:
        self.made: dict[int, Tensor] = {}

    def model(self, x: Tensor) -> None:
        if len(x) not in self.made:
            self.made[len(x)] = torch.ones(len(x)).cumsum(0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * self.made[len(x)], 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


def test_what_is_made_at_the_first_call_with_a_new_shape_is_no_obstacle():
    lazy = Lazy()
    svi = SVI(lazy.model, lazy.guide, adam(), backend="graph")
    for n in (4, 4, 4, 2, 4, 2, 2):
        svi.step(torch.randn(n))
    assert recordings(svi) == 2


def test_an_attribute_that_is_annealed_from_outside_is_seen():
    """Not by the recording, in which the model does not change it, but when it is made again and compared."""
    annealed = Outside()
    svi = SVI(annealed.model, annealed.guide, adam(), backend="graph")
    with pytest.raises(RecordingError, match="changed since"):
        for beta in (0.1, 0.2, 0.3, 0.4):
            annealed.beta = beta
            svi.step(X)
    pyro.clear_param_store()
    annealed.beta = 0.1
    svi = SVI(annealed.model, annealed.guide, adam(), backend="graph")
    with pytest.raises(RecordingError, match="changed since"):
        svi.run(20, X, callbacks=lambda progress: setattr(annealed, "beta", 0.1 + progress.iteration))


class Outside:
    beta = 0.1

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=self.beta):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.scale(scale=self.beta):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


@pytest.mark.parametrize("norm", [True, False])
def test_a_switch_between_train_and_eval_is_seen(norm):
    results = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        model, guide, args = autoencoder(norm)
        pyro.set_rng_seed(0)
        svi, losses = SVI(model, guide, adam(), backend=backend), []
        for training in (True, True, True, False, False, True):
            for net in modules_of(model, guide):
                net.train(training)
            losses.append(svi.step(*args))
        results.append(losses)
    assert results[0] == results[1]


def test_buffers_that_were_exchanged_are_seen():
    results = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        model, guide, args = autoencoder()
        pyro.set_rng_seed(0)
        svi = SVI(model, guide, adam(), backend=backend)
        for step in range(6):
            svi.step(*args)
            if step == 3:
                for net in modules_of(model, guide):
                    net.norm.running_mean = torch.zeros_like(net.norm.running_mean)
        results.append([net.state_dict() for net in modules_of(model, guide)])
    assert_equal(*results)


def test_a_parameter_store_that_was_loaded_or_cleared_is_seen():
    results = []
    for backend in ("eager", "graph"):
        problem = problems.normal_normal()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(problem.model, problem.guide, adam(), backend=backend)
        losses = [svi.step(*problem.args) for _ in range(3)]
        state = pyro.get_param_store().get_state()
        losses += [svi.step(*problem.args) for _ in range(2)]
        pyro.get_param_store().set_state(state)
        losses += [svi.step(*problem.args) for _ in range(3)]
        pyro.clear_param_store()
        losses += [svi.step(*problem.args) for _ in range(3)]
        results.append([losses, values()])
    assert results[0][0] == results[1][0]
    assert_equal(results[0][1], results[1][1])


def test_python_arguments_are_part_of_what_is_recorded():
    def model(x, scale=1.0):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0).expand([4]).to_event(1), obs=x)

    def guide(x, scale=1.0):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    results = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, guide, adam(), backend=backend)
        results.append([svi.step(X, scale=scale) for scale in (1.0, 1.0, 2.0, 1.0, 2.0)])
    assert results[0] == results[1]
    assert recordings(svi) == 2


@pytest.mark.parametrize("fold", [False, True])
def test_a_tensor_that_is_changed_in_place_is_seen(fold):
    """An annealing factor held as a tensor is the form of one that can be recorded."""
    results, weight = [], torch.tensor(0.1)

    def annealed():
        return poutine.scale(scale=weight.sqrt() + 0.1 if fold else weight)

    def model(x):
        with annealed():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)

    def guide(x):
        with annealed():
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi, losses = SVI(model, guide, adam(), backend=backend), []
        for step in range(6):
            weight.fill_(0.1 * (step + 1))
            losses.append(svi.step(X))
        results.append(losses)
    assert results[0] == results[1]


def two_arguments():
    def model(x, y):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(2 * z, 1.0).expand([3]).to_event(1), obs=y.reshape(-1, 3))

    def guide(x, y):
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.2)) * x.sum(), 1.0))

    return model, guide


def both_backends(run: Any) -> list:
    """What `run` returns for a fresh fit on either backend."""
    results = []
    for backend in ("eager", "graph"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        results.append(run(functools.partial(SVI, optim=adam(), backend=backend)))
    return results


def test_one_tensor_given_twice_is_not_recorded_as_one():
    x, y = torch.ones(3, 3), torch.arange(9.0).reshape(3, 3)

    def run(make):
        svi = make(*two_arguments())
        return [svi.step(*args) for args in ((x, x), (x, x), (x, y), (y, x), (y, y), (x, x))]

    one, two = both_backends(run)
    assert one == two


def test_data_of_other_strides_are_recorded_anew():
    x = torch.arange(9.0).reshape(3, 3)

    def run(make):
        svi = make(*two_arguments())
        return [svi.step(*args) for args in ((x, x + 1), (x, x + 1), (x.T, x.T + 1), (x, (x + 1).T), (x, x + 1))]

    one, two = both_backends(run)
    assert one == two


class Batch:
    """A container that torch does not know; like a graph's batch, it shows its shapes only."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __repr__(self) -> str:
        return f"Batch({tuple(self.x.shape)})"


OPAQUE = {
    "container": (Batch, lambda b: b.x, "Batch"),
    "numpy": (lambda x: x.numpy(), torch.as_tensor, "ndarray"),
    "set": (lambda x: set(x.tolist()), lambda s: torch.tensor(sorted(s)), "set"),
}


@pytest.mark.parametrize("key", OPAQUE)
def test_data_that_a_recording_cannot_take_as_tensors_are_refused(key):
    wrap, unwrap, observed = OPAQUE[key]

    def model(batch):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=unwrap(batch))

    svi = SVI(model, Annealed().guide, adam(), backend="graph")
    with pytest.raises(RecordingError, match=f"{observed}.*tensors"):
        svi.step(wrap(X))
    assert SVI(model, Annealed().guide, adam()).run(3, wrap(X)).status == "MAX_ITER"


PLAIN = [
    1,
    2.0,
    np.float32(0.5),
    np.int64(7),
    "a",
    None,
    True,
    torch.float32,
    torch.device("cpu"),
    slice(0, 2),
    range(3),
    (1, [2, {"b": 3}]),
]


def test_plain_python_values_are_part_of_what_is_recorded():
    def model(x, value):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
        place = next(i for i, v in enumerate(PLAIN) if v is value)
        pyro.sample("x", dist.Normal(z * (1 + place), 1.0).expand([4]).to_event(1), obs=x)

    def guide(x, value):
        Annealed().guide(x)

    one, two = both_backends(lambda make: [make(model, guide).step(X, v) for v in PLAIN for _ in range(2)])
    assert one == two


def test_networks_given_as_arguments_are_told_apart():
    nets = [nn.Linear(1, 1) for _ in range(2)]

    def model(x, net):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
        loc = z + net(x.unsqueeze(-1)).squeeze(-1).detach()
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x, net):
        Annealed().guide(x)

    def run(make):
        svi = make(model, guide)
        return [svi.step(X, net) for net in (*nets, *nets, *nets)]

    one, two = both_backends(run)
    assert one == two


def test_handlers_around_a_step_count():
    """Annealing around the step in place of in the model."""
    problem = problems.normal_normal()

    def run(make):
        svi, losses = make(problem.model, problem.guide), []
        for step in range(6):
            with poutine.scale(scale=0.1 * (step + 1)) if step % 2 else contextlib.nullcontext():
                losses.append(svi.step(*problem.args))
        return losses

    one, two = both_backends(run)
    assert one == two


def test_autocast_around_a_step_counts():
    model, guide, args = autoencoder(norm=False)
    start = [copy.deepcopy(net.state_dict()) for net in modules_of(model, guide)]

    def run(make):
        for net, state in zip(modules_of(model, guide), start, strict=True):
            net.load_state_dict(state)
        svi, losses = make(model, guide), []
        for enabled in (False, False, True, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(svi.step(*args))
        return losses

    one, two = both_backends(run)
    assert one == two


# What is refused ------------------------------------------------------------------------------------------------


def line_of(function: Any, text: str) -> str:
    """The file, number and text of the line of a function that contains `text`."""
    lines, start = inspect.getsourcelines(function)
    at = next(i for i, line in enumerate(lines) if text in line)
    return f"{os.path.basename(__file__)}:{start + at}: {lines[at].strip()}"


class Annealed:
    """A model whose numbers come from Python."""

    def __init__(self) -> None:
        self.beta, self.calls = 0.1, 0

    def guide(self, x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def observe(self, x, z, scale=1.0):
        pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=x)

    def counter(self, x):
        self.calls += 1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        self.observe(x, z * (1 - 1 / self.calls))  # counter

    def tensor_counter(self, x):
        self.calls += 1
        self.observe(x, pyro.sample("z", dist.Normal(0.0, 1.0)) * torch.tensor(float(self.calls)))  # tensor_counter

    def prior_counter(self, x):
        self.calls += 1
        self.observe(x, pyro.sample("z", dist.Normal(0.1 * self.calls, 1.0)))  # prior_counter

    def branch_counter(self, x):
        self.calls += 1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if self.calls % 2:
            z = z * 2  # branch_counter
        self.observe(x, z)

    def numpy_random(self, x):
        self.observe(x, pyro.sample("z", dist.Normal(0.0, 1.0)) * float(np.random.rand()))  # numpy_random

    def numpy_tensor(self, x):
        noise = torch.as_tensor(np.random.rand(4), dtype=torch.float32)  # numpy_tensor
        self.observe(x, pyro.sample("z", dist.Normal(0.0, 1.0)) + noise)

    def python_random(self, x):
        self.observe(x, pyro.sample("z", dist.Normal(0.0, 1.0)) * random.random())  # python_random

    def annealing(self, x):
        self.beta = min(1.0, self.beta * 1.1)
        with poutine.scale(scale=self.beta):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))  # annealing
        self.observe(x, z)

    def item(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        self.observe(x, z * z.item())  # item

    def branch(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:  # branch
            z = z * 2
        self.observe(x, z)

    def numpy_detour(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        self.observe(x, z + torch.as_tensor(np.tanh(z.detach().numpy())))  # numpy_detour

    def steady(self, x):
        with poutine.scale(scale=self.beta):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        self.observe(x, z)


UNRECORDABLE = [
    "counter",
    "tensor_counter",
    "prior_counter",
    "branch_counter",
    "numpy_random",
    "numpy_tensor",
    "python_random",
    "annealing",
    "item",
    "branch",
    "numpy_detour",
]


@pytest.mark.parametrize(("cls", "name"), [*((SVI, name) for name in UNRECORDABLE), (EM, "counter"), (EM, "annealing")])
def test_what_python_changes_from_call_to_call_is_refused_with_its_line(cls, name):
    user = Annealed()

    def model(x):
        pyro.factor("penalty", -(pyro.param("theta", torch.tensor(0.0)) ** 2))
        getattr(user, name)(x)

    svi = cls(model, user.guide, adam(), backend="graph")
    svi.step(X)
    before, generator = values(), torch.get_rng_state()
    with pytest.raises(RecordingError, match=re.escape(line_of(getattr(Annealed, name), f"# {name}"))):
        svi.step(X)
    assert_equal(values(), before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_attribute_changed_between_runs_is_refused_until_recompile():
    user = Annealed()
    svi = SVI(user.steady, user.guide, adam(), backend="graph")
    svi.run(3, X)
    svi.run(2, X)
    user.beta = 0.7
    with pytest.raises(RecordingError, match=r"0\.1.*0\.7.*recompile"):
        svi.run(2, X)
    before = values()
    svi.recompile()
    svi.run(1, X)
    changed = values()
    pyro.get_param_store()["loc"].data.copy_(before["loc"])
    assert not torch.equal(changed["loc"], before["loc"])
    svi.run(2, X)


def test_other_losses_cannot_be_recorded():
    problem = problems.normal_normal()
    svi = SVI(problem.model, problem.guide, adam(), pyro.infer.Trace_ELBO(), backend="graph")
    svi.step(*problem.args)
    with pytest.raises(RecordingError, match="Trace_ELBO"):
        svi.step(*problem.args)


class Replaced(nn.Module):
    """A network whose running mean is a new tensor after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return x - self.mean


def test_a_buffer_that_is_replaced_in_place_of_being_written_is_refused():
    net = Replaced()

    def model(x):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=net(x))

    svi = SVI(model, Annealed().guide, adam(), backend="graph")
    svi.step(X)
    tensor, before = net.mean, net.mean.clone()
    with pytest.raises(RecordingError, match=r"Replaced\.mean.*self\.mean\.copy_"):
        svi.step(X)
    assert net.mean is tensor and torch.equal(tensor, before)


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_an_error_of_the_model_is_the_users_and_changes_nothing(backend):
    model, guide, args = autoencoder()
    svi = SVI(model, guide, adam(), backend=backend)
    for _ in range(3):
        svi.step(*args)
    before = copy.deepcopy([net.state_dict() for net in modules_of(model, guide)])
    with pytest.raises(RuntimeError, match="5"):
        svi.step(torch.randn(8, 5))
    for net, state in zip(modules_of(model, guide), before, strict=True):
        assert_equal(dict(net.state_dict()), dict(state))
    svi.step(*args)


def test_a_state_of_the_estimators_that_was_put_away_is_started_again():
    problem = problems.bernoulli()

    def run(make):
        loss = MonteCarloELBO(estimator="decaying_average")
        svi = make(problem.model, problem.guide, loss=loss)
        losses = [svi.step(*problem.args) for _ in range(3)]
        loss.state = {}
        return losses + [svi.step(*problem.args) for _ in range(3)] + [loss.state["z_0"]["weight"].item()]

    one, two = both_backends(run)
    assert one == two


def test_gradients_are_reduced_before_the_update():
    problem = problems.normal_normal()
    results = []
    for factor, lr in ((2.0, 0.01), (1.0, 0.02)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(problem.model, problem.guide, pyro.optim.SGD({"lr": lr}))
        svi.engine.reduce = lambda grads, factor=factor: {n: factor * g for n, g in grads.items()}
        for _ in range(3):
            svi.step(*problem.args)
        results.append(values())
    assert_equal(*results)


def test_the_state_is_all_that_a_run_changes():
    model, guide, args = autoencoder()
    svi = SVI(model, guide, adam())
    with pytest.raises(StepError, match="no step yet"):
        _ = svi.engine.state
    for _ in range(2):
        svi.step(*args)
    state = svi.engine.state
    assert set(state.params) == set(pyro.get_param_store().keys()) and state.count == 2
    assert {id(b) for b in state.buffers} == {id(b) for net in modules_of(model, guide) for b in net.norm.buffers()}
    assert all(int(c) == 2 for c in state.optim["None"]["count"].values())


@pytest.mark.parametrize("affine", [True, False])
def test_buffers_of_a_network_that_both_call_are_moved_once_per_iteration(affine):
    """They belong to neither half-step alone; the E-step moves them."""
    norm = nn.BatchNorm1d(1, affine=affine)

    def model(x):
        normed = norm(x.unsqueeze(-1)).squeeze(-1).detach()
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z + normed, 1.0).to_event(1), obs=x)

    def guide(x):
        norm(x.unsqueeze(-1))
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.0)), 1.0))

    em = EM(model, guide, adam())
    for _ in range(3):
        em.step(X)
    assert int(norm.num_batches_tracked) == 2 * 3  # twice per E-step: in the guide and in the model


def test_a_recording_is_a_function_of_the_estimators_state():
    problem = problems.bernoulli()
    loss = MonteCarloELBO(estimator="decaying_average")
    svi = SVI(problem.model, problem.guide, adam(), loss)
    for _ in range(3):
        svi.step(*problem.args)
    recording = record(problem.model, problem.guide, loss, svi.blocks.leaves(), [], problem.args, {})
    state = copy.deepcopy(loss.state)
    pyro.set_rng_seed(1)
    found = recording(problem.args, {}, loss.state)
    assert_equal(loss.state, state)
    pyro.set_rng_seed(1)
    expected = loss.evaluate(problem.model, problem.guide, problem.args, {})
    assert found.loss == -float(expected.objective)
    assert_equal(found.state, expected.state)
    pyro.set_rng_seed(1)
    shifted = recording(problem.args, {}, {site: {k: v + 1 for k, v in s.items()} for site, s in state.items()})
    assert any(not torch.equal(shifted.grads[n], found.grads[n]) for n in found.grads)


@pytest.mark.parametrize("cls", [SVI, EM])
def test_a_parameter_that_changes_its_name_is_trained(cls):
    """Pyro's flow guides give their first parameter a second name during the first run."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + pyro.param("shift", torch.zeros(2)), 1.0).to_event(1), obs=x)

    guide = autoguide.AutoIAFNormal(model, hidden_dim=[4])
    svi = cls(model, guide, pyro.optim.Adam({"lr": 0.01}))
    x = torch.tensor([0.3, -1.2])
    svi.step(x)
    before = {row.name: row.leaf.detach().clone() for row in svi.blocks.rows}
    svi.step(x)
    assert [row.name for row in svi.blocks.rows if torch.equal(row.leaf, before[row.name])] == []
