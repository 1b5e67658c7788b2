r"""Loops of the shapes that clients of Pyro write around `pyro.infer.SVI`, unchanged around `SVI` and `EM`.

Each loop is a function of what it takes the place of, and is run with Pyro's own class first: what works there has to
work here, with the same numbers where the steps are the same.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_emvae import EM, SVI, MonteCarloELBO

X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8], [0.1, 0.2], [-1.0, 0.6]])
LOADER = DataLoader(TensorDataset(X), batch_size=3)


class Module(PyroModule):
    """A module with `model` and `guide`, as scvi-tools' and CellBender's are; it is called on a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        self.encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def as_pyro() -> MonteCarloELBO:
    return MonteCarloELBO(estimator="pyro")


KINDS = {
    "Pyro": infer.SVI,
    "SVI": SVI,
    "SVI, graph": functools.partial(SVI, backend="graph"),
    "EM, joint": functools.partial(EM, schedule="joint"),
    "EM": EM,
}
every = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, optim: Any = None, module: Module | None = None) -> tuple[Any, Module]:
    pyro.clear_param_store()
    module = module or Module()
    pyro.set_rng_seed(1)
    loss = infer.Trace_ELBO() if kind == "Pyro" else as_pyro()
    optim = copy.deepcopy(optim) or pyro.optim.Adam({"lr": 0.01})
    return KINDS[kind](module.model, module.guide, optim, loss=loss), module


def same_as_pyro(loop: Any, kind: str, **options: Any) -> None:
    """Run a loop with Pyro's class and with ours, and compare what it returns; EM's alternation is another path."""
    results = [loop(*make(k, **options)) for k in ("Pyro", kind)]
    if kind != "EM":
        assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert all(math.isfinite(v) for v in results[1])


# Reading the optimizer ------------------------------------------------------------------------------------------


@every
def test_learning_rates_are_read_from_optim_objs(kind):
    """CellBender logs the learning rate of the first parameter, whatever it is."""

    def loop(svi, module):
        rates = []
        for _ in range(3):
            svi.step(X)
            objects = svi.optim.optim_objs
            rates.append(next(iter(objects.values())).param_groups[0]["lr"])
            rates.append(next(iter(objects.values())).state_dict()["param_groups"][0]["lr"])
            rates += [objects[p].param_groups[0]["lr"] for p in list(objects)]
        return rates

    same_as_pyro(loop, kind)


@every
def test_a_learning_rate_is_set_on_optim_objs(kind):
    def loop(svi, module):
        losses = []
        for step in range(4):
            losses.append(svi.step(X))
            for optim in svi.optim.optim_objs.values():
                for group in optim.param_groups:
                    group["lr"] = 0.1 / (step + 1)
        return losses

    same_as_pyro(loop, kind)


@every
def test_optim_objs_are_looked_up_by_the_leaves_of_the_store(kind):
    def loop(svi, module):
        svi.step(X)
        leaves = [p.unconstrained() if hasattr(p, "unconstrained") else p for p in pyro.get_param_store().values()]
        return [float(svi.optim.optim_objs[leaf].state_dict()["state"][0]["step"]) for leaf in leaves]

    same_as_pyro(loop, kind)


@every
@pytest.mark.parametrize("steps", [1, 3])
def test_schedulers_are_stepped_by_the_client(kind, steps):
    """CellBender's and Pyro's loops: `optim.step()` once per epoch if the optimizer is a scheduler."""
    scheduler = pyro.optim.OneCycleLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.01},
            "max_lr": 0.05,
            "total_steps": 10,
            "cycle_momentum": False,
        }
    )

    def loop(svi, module):
        result = []
        for _ in range(4):
            result += [svi.step(X) for _ in range(steps)]
            svi.optim.step()
            result.append(next(iter(svi.optim.optim_objs.values())).optimizer.param_groups[0]["lr"])
        return result

    results = [loop(*make(k, optim=scheduler)) for k in ("Pyro", kind)]
    if kind != "EM":
        assert results[1] == pytest.approx(results[0], rel=1e-4)
    rates = [[v for i, v in enumerate(r) if i % (steps + 1) == steps] for r in results]
    assert rates[1] == pytest.approx(rates[0])


@every
def test_a_plateau_scheduler_is_given_the_loss(kind):
    scheduler = pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "patience": 0, "factor": 0.5, "threshold": 1e9}
    )

    def loop(svi, module):
        for _ in range(3):
            svi.step(X)
            svi.optim.step(100.0)
        return [next(iter(svi.optim.optim_objs.values())).optimizer.param_groups[0]["lr"]]

    same_as_pyro(loop, kind, optim=scheduler)


# Saving and loading ---------------------------------------------------------------------------------------------


@every
def test_optimizer_and_store_are_saved_and_loaded(kind, tmp_path):
    """A checkpoint as CellBender writes it: the optimizer by its own `save`, parameters by name."""
    svi, module = make(kind)
    for _ in range(3):
        svi.step(X)
    svi.optim.save(str(tmp_path / "optim"))
    pyro.get_param_store().save(str(tmp_path / "params"))
    network, generator = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    expected = [svi.step(X) for _ in range(3)]

    other, module = make(kind)
    module.load_state_dict(network)
    other.optim.load(str(tmp_path / "optim"))
    torch.set_rng_state(generator)
    assert [other.step(X) for _ in range(3)] == pytest.approx(expected, rel=1e-6)


@every
def test_the_state_goes_from_pyros_optimizer_to_ours_and_back(kind):
    first, module = make("Pyro")
    for _ in range(2):
        first.step(X)
    state, network, generator = first.optim.get_state(), copy.deepcopy(module.state_dict()), torch.get_rng_state()
    expected = [first.step(X) for _ in range(2)]
    state = copy.deepcopy(state) if kind == "Pyro" else state

    svi, module = make("SVI" if kind == "EM" else kind)
    module.load_state_dict(network)
    svi.optim.set_state(state)
    torch.set_rng_state(generator)
    svi.step(X)
    middle = svi.optim.get_state()
    assert set(middle) == set(state)
    network, generator = copy.deepcopy(module.state_dict()), torch.get_rng_state()

    back, module = make("Pyro")
    module.load_state_dict(network)
    back.optim.set_state(middle)
    torch.set_rng_state(generator)
    assert back.step(X) == pytest.approx(expected[1], rel=1e-2)  # Pyro's running state is read after its step


# What a step returns --------------------------------------------------------------------------------------------


@every
def test_the_loss_is_wrapped_and_averaged(kind):
    def loop(svi, module):
        epochs = []
        for _ in range(2):
            total, losses = 0.0, []
            for (batch,) in LOADER:
                loss = svi.step(batch)
                losses += [loss]
                total += loss
            assert isinstance(loss, float) and not isinstance(loss, np.floating)
            epochs += [
                np.mean(losses),
                total / len(X),
                float(np.asarray(losses).sum()),
                torch.tensor(losses).mean().item(),
            ]
            assert f"{loss:.4f}" and math.isfinite(loss) and json_able(loss)
        return epochs

    same_as_pyro(loop, kind)


def json_able(value: Any) -> bool:
    import json

    return json.loads(json.dumps({"loss": value}))["loss"] == value


@every
def test_training_and_validation_epochs(kind):
    """The loop of Pyro's VAE example: train and eval mode, `evaluate_loss` on held-out batches, early stopping."""

    def loop(svi, module):
        history = defaultdict(list)
        best, patience = math.inf, 2
        for _ in range(4):
            module.train()
            history["train"].append(np.mean([svi.step(batch) for (batch,) in LOADER]))
            module.eval()
            with torch.no_grad():
                history["test"].append(np.mean([svi.evaluate_loss(batch) for (batch,) in LOADER]))
            if history["test"][-1] < best:
                best = history["test"][-1]
            elif not (patience := patience - 1):
                break
        return history["train"] + history["test"]

    same_as_pyro(loop, kind)


@every
def test_the_losses_functions_are_called(kind):
    """`svi.loss` and `svi.loss_and_grads` with model and guide, and a step of one's own on the gradients."""

    def loop(svi, module):
        svi.step(X)
        value = svi.loss(svi.model, svi.guide, X)
        for p in module.parameters():
            p.grad = None
        with poutine.trace(param_only=True) as captured:
            loss = svi.loss_and_grads(svi.model, svi.guide, X)
        params = {site["value"].unconstrained() for site in captured.trace.nodes.values()}
        assert params == set(module.parameters())
        norm = float(nn.utils.clip_grad_norm_(list(params), 1e6))
        svi.optim(params)
        infer.util.zero_grads(params)
        return [float(value), float(loss), norm, svi.evaluate_loss(X)]

    same_as_pyro(loop, kind)


def test_it_passes_for_pyros_class():
    for kind in list(KINDS)[1:]:
        svi, module = make(kind)
        assert isinstance(svi, infer.SVI)
        assert isinstance(svi.optim, pyro.optim.PyroOptim)
        assert svi.model == module.model and svi.guide == module.guide
        assert {"num_steps", "num_samples", "loss", "loss_and_grads"} <= set(vars(svi))


# Losses without SVI ---------------------------------------------------------------------------------------------


class TrainingPlan:
    """Shaped after scvi-tools' Pyro training plan: a differentiable loss of scaled callables, torch's optimizer."""

    def __init__(self, module: Module, loss: infer.ELBO) -> None:
        self.module, self.kl_weight = module, 0.5
        self.differentiable_loss = loss.differentiable_loss
        module.guide(X)
        module.model(X)
        self.optimizer = torch.optim.Adam(list(module.parameters()), lr=0.01)

    def scaled(self, function: Any) -> Any:
        return poutine.scale(function, self.kl_weight)

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        loss = self.differentiable_loss(self.scaled(self.module.model), self.scaled(self.module.guide), batch)
        return {"loss": loss}

    def fit(self, epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            for (batch,) in LOADER:
                self.optimizer.zero_grad()
                out = self.training_step(batch)
                out["loss"].backward()
                nn.utils.clip_grad_norm_(self.module.parameters(), 10.0)
                self.optimizer.step()
                losses.append(out["loss"].detach().item())
        return losses


@pytest.mark.parametrize("particles", [1, 2])
def test_a_differentiable_loss_in_a_training_plan(particles):
    results = []
    for loss in (infer.Trace_ELBO(particles), MonteCarloELBO(particles, estimator="pyro", vectorize_particles=False)):
        pyro.clear_param_store()
        plan = TrainingPlan(Module(), loss)
        pyro.set_rng_seed(1)
        results.append(plan.fit(3))
    assert results[1] == pytest.approx(results[0], rel=1e-5)


class Lightning(nn.Module):
    """Shaped after a LightningModule: `training_step`, `validation_step`, `configure_optimizers`, checkpoints."""

    def __init__(self, loss: infer.ELBO) -> None:
        super().__init__()
        self.elbo = loss(BayesianRegression(), AutoNormal(BayesianRegression()))
        self.elbo.guide = AutoNormal(self.elbo.model)
        self.elbo(X[:, :1], X[:, 1])  # creates the guide's parameters

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.elbo(*batch)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return float(self.elbo(*batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.elbo.parameters(), lr=0.05)


class BayesianRegression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = pyro.nn.PyroSample(dist.Normal(torch.zeros(1, 1), 1.0).to_event(2))
        self.linear.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def train(module: Lightning, batches: list, epochs: int) -> list[float]:
    optimizer, log = module.configure_optimizers(), []
    for _ in range(epochs):
        module.train()
        for batch in batches:
            loss = module.training_step(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.append(loss.item())
        module.eval()
        log += [module.validation_step(batch) for batch in batches]
    return log


def test_a_loss_as_a_module_in_a_lightning_loop():
    batches = [(X[i : i + 3, :1], X[i : i + 3, 1]) for i in (0, 3)]
    results = []
    for loss in (infer.Trace_ELBO(), as_pyro()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with pyro.settings.context(module_local_params=True):
            module = Lightning(loss)
            names = [n for n, _ in module.elbo.named_parameters()]
            assert any("bias" in n for n in names) and any("locs" in n for n in names)
            results.append(train(module, batches, 3))
            state = module.state_dict()
            module.load_state_dict(state)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_wrapped_callables_do_not_pile_up():
    """A client that wraps model and guide anew in every step must not make the loss keep all of them."""
    module, loss = Module(), MonteCarloELBO(2, vectorize_particles=False)
    for _ in range(40):
        loss.differentiable_loss(poutine.scale(module.model, 0.5), poutine.scale(module.guide, 0.5), X)
    assert len(loss.plans) < 20


# Hooks, modules, predictions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Pyro", "SVI", "EM"])
def test_hooks_on_parameters_see_the_gradients(kind):
    """Pyro's tutorial on gradient norms registers a hook on every parameter of the store."""
    svi, _ = make(kind)
    svi.step(X)
    norms = defaultdict(list)
    for name, value in pyro.get_param_store().named_parameters():
        value.register_hook(lambda g, name=name: norms[name].append(g.norm().item()))
    for _ in range(3):
        svi.step(X)
    assert set(norms) == set(pyro.get_param_store().keys())
    assert {len(v) for v in norms.values()} == {3}


@every
def test_predictive_after_training(kind):
    svi, module = make(kind)
    for _ in range(3):
        svi.step(X)
    samples = infer.Predictive(module.model, guide=module.guide, num_samples=4)(X)
    assert samples["z"].shape == (4, 6, 2)


@every
def test_a_fit_is_started_again_after_the_store_was_cleared(kind):
    """Tutorials clear the store between fits and keep the module."""
    module, losses = Module(), []
    start = copy.deepcopy(module.state_dict())
    for _ in range(2):
        module.load_state_dict(start)
        svi, _ = make(kind, module=module)
        losses.append([svi.step(X) for _ in range(3)])
    assert losses[0] == losses[1]


@every
def test_two_fits_side_by_side(kind):
    """Two modules under two names, stepped in turn."""
    pyro.clear_param_store()

    def build(name: str) -> Any:
        def model(x):
            pyro.sample(
                "x",
                dist.Normal(pyro.sample("z", dist.Normal(pyro.param(f"{name}.theta", torch.tensor(0.1)), 1.0)), 1.0),
                obs=x,
            )

        def guide(x):
            pyro.sample("z", dist.Normal(pyro.param(f"{name}.phi", torch.tensor(0.2)), 1.0))

        loss = infer.Trace_ELBO() if kind == "Pyro" else as_pyro()
        return KINDS[kind](model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)

    one, two = build("one"), build("two")
    for _ in range(4):
        one.step(X[0, 0])
        two.step(X[1, 1])
    assert len(one.optim.optim_objs) == len(two.optim.optim_objs) == 2
    assert len({float(v.detach()) for v in pyro.get_param_store().values()}) == 4
