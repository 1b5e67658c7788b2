r"""Watching changes nothing: a run with and without what only measures is the same, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from torch import Tensor, nn

import pyro_emvae as emvae
from pyro_emvae import EM, SVI, MonteCarloELBO

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")

X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8], [0.1, 0.2], [-1.0, 0.6]])


class Net(nn.Module):
    """Linear, batch norm, dropout, and buffers that each call changes: one in place, one by replacement."""

    def __init__(self, rows: int, columns: int, replace: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(rows, columns), nn.BatchNorm1d(columns), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))
        self.replace = replace

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if self.replace:
            self.count = self.count + 1
        return self.drop(self.norm(self.linear(x).tanh()))


class User:
    """A model with everything that watching could change: minibatches, dropout, buffers, a discrete site."""

    def __init__(self, replace: bool = True) -> None:
        torch.manual_seed(0)
        self.decoder, self.encoder = Net(2, 2, replace), Net(2, 4, replace)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), subsample_size=4):
            rows = pyro.subsample(x, event_dim=1)
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4)))
            z = pyro.sample("z", dist.Normal(k.unsqueeze(-1) * torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=rows)

    def decode(self, z: Tensor) -> Tensor:
        flat = self.decoder(z.reshape(-1, 2))
        return flat.reshape(*z.shape[:-1], -1)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), subsample_size=4):
            rows = pyro.subsample(x, event_dim=1)
            loc, scale = self.encoder(rows).chunk(2, -1)
            pyro.sample("k", dist.Bernoulli(logits=loc.sum(-1)))
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def look(svi: Any, user: User) -> dict[str, Any]:
    """All that a run changes, and what else watching could."""
    state = {f"decoder.{n}": v for n, v in user.decoder.state_dict().items()}
    state |= {f"encoder.{n}": v for n, v in user.encoder.state_dict().items()}
    state |= {f"store.{n}": v.detach() for n, v in pyro.get_param_store().items()}
    for name, saved in svi.optim.get_state().items():
        state |= {f"optim.{name}.{k}": torch.as_tensor(v) for k, v in saved["state"][0].items()}
    for site, tensors in getattr(svi.engine.loss, "state", {}).items():
        state |= {f"estimator.{site}.{k}": v for k, v in tensors.items()}
    nets = {"decoder": user.decoder, "encoder": user.encoder}
    state |= {f"mode.{n}": torch.tensor([m.training for m in net.modules()]) for n, net in nets.items()}
    state |= {f"grad.{n}": torch.tensor([p.grad is None for p in net.parameters()]) for n, net in nets.items()}
    state["generator"] = torch.get_rng_state()
    state["numpy"] = torch.as_tensor(np.random.get_state()[1].astype(np.int64))
    state["python"] = torch.tensor(random.getstate()[1])
    return {n: v.clone() for n, v in state.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [n for n, v in one.items() if not torch.equal(v, two[n])] == []


ADAM = {"lr": 0.01}


def fit(cls: type, backend: str, *, loss: Any = None, replace: bool = True, **options: Any):
    """A short run from a fresh store and seed; `watch(svi, user)` is called after every iteration."""
    watch: Callable | None = options.pop("watch", None)
    pyro.clear_param_store()
    user = User(replace)
    loss = MonteCarloELBO(estimator={"k": "decaying_average"}) if loss is None else loss
    svi = cls(user.model, user.guide, pyro.optim.Adam(ADAM), loss, backend=backend)
    callbacks = [] if watch is None else [lambda progress: watch(svi, user)]
    number = {"max_iter": 6} if cls is EM else {"num_steps": 6}
    result = svi.run(**number, **options, data=[X] * 6, seed=1, callbacks=callbacks)
    history = result.history.drop_vars(["time", "iteration_time", "validation"])
    return history, look(svi, user)


def modes(svi: Any, user: User) -> None:
    """A careless callback: eval mode is switched on and not off."""
    user.encoder.eval()
    user.encoder(X)
    user.decoder.eval()
    user.decoder(X)


def draws(svi: Any, user: User) -> None:
    pyro.set_rng_seed(0)
    torch.randn(7), np.random.rand(3), random.random()
    user.encoder(X)


def fails(svi: Any, user: User) -> None:
    """A callback that handles its own errors."""
    try:
        user.decoder.eval()
        user.decoder(X[:, :1])
    except RuntimeError:
        user.decoder.train()


def losses(svi: Any, user: User) -> None:
    svi.evaluate_loss(X)
    svi.loss(user.model, user.guide, X)
    svi.engine.loss.differentiable_loss(user.model, user.guide, X)


def predictive(svi: Any, user: User) -> None:
    infer.Predictive(user.model, guide=user.guide, num_samples=2)(X)


def compared(svi: Any, user: User) -> None:
    if svi.engine.count in (3, 4):
        rows = ["score", svi.engine.loss, infer.Trace_ELBO()]
        emvae.compare_gradients(user.model, user.guide, X, estimators=rows, num_replicates=3)


def once(function: Callable) -> Callable:
    """Watch in the middle of the run only."""

    def watch(svi: Any, user: User) -> None:
        if svi.engine.count in (3, 4):
            function(svi, user)

    watch.__name__ = function.__name__
    return watch


def evidence(svi: Any, user: User) -> None:
    emvae.elbo(user.model, user.guide, X, num_particles=4, vectorize_particles=False)
    emvae.log_evidence(user.model, user.guide, X, num_particles=4, vectorize_particles=False)
    emvae.elbo_gap(user.model, user.guide, X, num_particles=4, vectorize_particles=False)


def explained(svi: Any, user: User) -> None:
    str(emvae.explain(user.model, user.guide, X, loss=svi.engine.loss))


def converted(svi: Any, user: User) -> None:
    emvae.to_arviz(user.model, user.guide, X, num_samples=3)


def posterior(svi: Any, user: User) -> None:
    if isinstance(svi, EM):
        svi.posterior(X).expect(lambda values: values["z"], num_particles=2)


def state(svi: Any, user: User) -> None:
    copy.deepcopy(svi.engine.state.params)
    svi.optim.get_state()
    str(svi.blocks)
    svi.engine.loss.state_dict()


EXPENSIVE = [once(watch) for watch in (compared, evidence, explained, converted, posterior)]
WATCHERS = [modes, draws, fails, losses, predictive, state, *EXPENSIVE]
PLAIN: dict[Any, Any] = {}


def plain(cls: type, backend: str):
    """The run that nobody watches, made once."""
    if (cls, backend) not in PLAIN:
        PLAIN[cls, backend] = fit(cls, backend, replace=backend == "eager")
    return PLAIN[cls, backend]


RUNS = [(SVI, "eager"), (EM, "eager")]
GRAPH = [(modes, EM, "graph"), (losses, EM, "graph"), (EXPENSIVE[0], EM, "graph")]
runs = pytest.mark.parametrize(("cls", "backend"), RUNS)


@pytest.mark.filterwarnings("ignore:particles are run one by one")
@pytest.mark.parametrize(
    ("watch", "cls", "backend"),
    [*((watch, *run) for watch in WATCHERS for run in RUNS), *GRAPH],
    ids=lambda f: getattr(f, "__name__", f),
)
def test_a_run_with_a_callback_that_measures_is_the_same(watch, cls, backend):
    history, end = fit(cls, backend, watch=watch, replace=backend == "eager")
    assert history.identical(plain(cls, backend)[0])
    assert_same(end, plain(cls, backend)[1])


@pytest.mark.parametrize("validation", [X[:3].repeat(2, 1), [X, X.flip(0)]], ids=["tensor", "batches"])
@runs
def test_a_run_with_validation_is_the_same(cls, backend, validation):
    history, end = fit(cls, backend, validation=validation, every=1, replace=backend == "eager")
    assert history.identical(plain(cls, backend)[0])
    assert_same(end, plain(cls, backend)[1])


@pytest.mark.filterwarnings("ignore:particles are run one by one")
@pytest.mark.parametrize("watch", [compared, evidence, explained, converted], ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_measuring_outside_a_run_changes_nothing(watch, training):
    user = User()
    svi = SVI(user.model, user.guide, pyro.optim.Adam(ADAM), MonteCarloELBO(estimator={"k": "decaying_average"}))
    svi.run(3, X)
    user.encoder.train(training)
    svi.engine.count = 3
    before = look(svi, user)
    watch(svi, user)
    assert_same(look(svi, user), before)


@pytest.mark.filterwarnings("ignore:particles are run one by one")
@pytest.mark.parametrize("watch", [compared, evidence, explained, converted], ids=lambda f: f.__name__)
def test_measuring_that_fails_changes_nothing(watch):
    user = User()
    svi = SVI(user.model, user.guide, pyro.optim.Adam(ADAM), MonteCarloELBO(estimator={"k": "decaying_average"}))
    svi.run(3, X)
    before, model = look(svi, user), user.model

    def broken(x):
        model(x)
        raise ZeroDivisionError

    user.model = broken
    with contextlib.suppress(ZeroDivisionError):
        watch(svi, user)
    assert_same(look(svi, user), before)


@pytest.mark.parametrize("loss", [infer.Trace_ELBO, infer.TraceGraph_ELBO], ids=lambda c: c.__name__)
def test_a_run_with_pyros_loss_is_the_same_under_validation(loss):
    results = [fit(SVI, "eager", loss=loss(), **options) for options in ({}, {"validation": X, "every": 1})]
    assert results[0][0].identical(results[1][0])
    assert_same(results[0][1], results[1][1])
