r"""The `pyro.optim` object that the user gave: stepped, read, saved and loaded as under `pyro.infer.SVI`."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from torch import Tensor

from pyro_emvae import EM, SVI, MonteCarloELBO
from pyro_emvae.optimizers import BlockOptimizer

X = torch.tensor([0.3, -1.2, 1.7, 0.4])
LEAVES = ("theta", "phi.loc", "phi.scale")


def model(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor([0.5, 0.1]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta[0], 1.0))
        pyro.sample("x", dist.Normal(z, theta[1].exp()), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("phi.loc", torch.zeros(len(x)))
    scale = pyro.param("phi.scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


KINDS = {
    "Pyro": infer.SVI,
    "SVI": SVI,
    "SVI, graph": functools.partial(SVI, backend="graph"),
    "EM, joint": functools.partial(EM, schedule="joint"),
}
ours = pytest.mark.parametrize("kind", [k for k in KINDS if k != "Pyro"])

OPTIMIZERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 2.0}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
    "nadam": lambda: pyro.optim.NAdam({"lr": 0.05}),
    "clipped_adam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.95}),
}
SCHEDULERS = {
    "step": lambda: pyro.optim.StepLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "step_size": 2, "gamma": 0.1}
    ),
    "exponential": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.8}, {"clip_value": 1.0}
    ),
    "plateau": lambda: pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "patience": 1, "factor": 0.5}
    ),
}
each = pytest.mark.parametrize("name", OPTIMIZERS | SCHEDULERS)


def make(kind: str, optim: Any, **options: Any) -> Any:
    loss = infer.Trace_ELBO() if kind == "Pyro" else MonteCarloELBO(estimator="pyro")
    return KINDS[kind](model, guide, optim, loss=loss, **options)


def start(kind: str, optim: Any, **options: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    return make(kind, optim, **options)


def schedule(optim: Any, loss: float) -> None:
    """Step the user's own scheduler, if theirs is one."""
    if isinstance(optim, pyro.optim.PyroLRScheduler):
        optim.step(*([loss] if optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau else []))


def train(svi: Any, optim: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(svi.step(X))
        schedule(optim, losses[-1])
    return losses


def rates(optim: Any) -> list[float]:
    return [getattr(o, "optimizer", o).param_groups[0]["lr"] for o in optim.optim_objs.values()]


def assert_same_state(one: dict, two: dict) -> None:
    """Compare nested states, keys included."""
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same_state(value, two[key])
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for mine, theirs in zip(value, two[key], strict=True):
                assert_same_state(mine, theirs)
        elif isinstance(value, float | Tensor):
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(two[key]), rtol=1e-6, atol=1e-6)
        else:
            assert value == two[key], key


# Schedulers -----------------------------------------------------------------------------------------------------


@ours
@each
def test_the_users_scheduler_is_stepped(kind, name):
    make_optim = (OPTIMIZERS | SCHEDULERS)[name]
    results = []
    for k in ("Pyro", kind):
        optim = make_optim()
        results.append((train(start(k, optim), optim, 20), rates(optim)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-12) and len(results[0][1]) == len(LEAVES)
    if name in SCHEDULERS:
        assert results[1][1][0] < SCHEDULERS[name]().pt_optim_args["lr"]


@ours
@pytest.mark.parametrize("name", ["step", "exponential"])
def test_the_users_scheduler_is_stepped_in_a_callback(kind, name):
    optim, reference = SCHEDULERS[name](), SCHEDULERS[name]()
    losses = train(start("Pyro", reference), reference, 12)
    seen = []

    def callback(progress: Any) -> None:
        seen.append(progress.loss)
        optim.step()

    svi = start(kind, optim)
    svi.run(X, max_iter=12, callbacks=callback) if "EM" in kind else svi.run(12, X, callbacks=callback)
    assert seen == pytest.approx(losses, rel=1e-5)
    assert rates(optim) == pytest.approx(rates(reference), rel=1e-12)


def test_one_scheduler_for_both_blocks_has_the_entries_of_both():
    optim, svi_optim = SCHEDULERS["exponential"](), SCHEDULERS["exponential"]()
    results = []
    for given, stepped in ((optim, lambda em: optim.step()), (svi_optim, lambda em: em.optim.step())):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        em = EM(model, guide, given)
        losses = []
        for _ in range(6):
            losses.append(em.step(X))
            stepped(em)
        assert set(given.get_state()) == set(LEAVES)
        results.append((losses, rates(given)))
    assert results[0] == results[1]
    assert results[0][1] == pytest.approx([0.05 * 0.8**6] * 3)


def test_each_block_follows_its_own_scheduler():
    slow, fast = SCHEDULERS["exponential"](), SCHEDULERS["step"]()
    em = EM(model, guide, {"guide": slow, "model": fast})
    for _ in range(4):
        em.step(X)
        slow.step()
    assert set(slow.get_state()) == {"phi.loc", "phi.scale"} and set(fast.get_state()) == {"theta"}
    assert rates(slow) == pytest.approx([0.05 * 0.8**4] * 2) and rates(fast) == [0.01]


def test_optim_objs_has_a_scheduler_that_passes_for_torchs():
    optim = SCHEDULERS["step"]()
    svi = start("SVI", optim)
    svi.step(X)
    scheduler = next(iter(optim.optim_objs.values()))
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR) and scheduler.get_last_lr() == [0.01]
    scheduler.gamma = 0.5
    twin = copy.deepcopy(scheduler)
    twin.optimizer.param_groups[0]["lr"] = 0.5
    assert (twin.gamma, [g["lr"] for g in twin.optimizer.carrier.param_groups], rates(optim)[0]) == (0.5, [0.5], 0.01)
    assert svi.optim.optim_objs.keys() == optim.optim_objs.keys()


# Reading, saving and loading --------------------------------------------------------------------------------------


@ours
@each
def test_the_users_state_is_as_under_pyro(kind, name):
    states = []
    for k in ("Pyro", kind):
        optim = (OPTIMIZERS | SCHEDULERS)[name]()
        train(start(k, optim), optim, 5)
        states.append(optim.get_state())
    assert set(states[0]) == set(LEAVES)
    assert_same_state(states[1], states[0])


@ours
@each
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_goes_on_as_if_uninterrupted(kind, name, when, tmp_path):
    """Loaded into a fresh run: before its first step, or after steps that are then undone."""
    make_optim = (OPTIMIZERS | SCHEDULERS)[name]
    optim = make_optim()
    svi = start(kind, optim)
    train(svi, optim, 5)
    optim.save(tmp_path / "optim.pt")
    params = {n: pyro.param(n).detach().clone() for n in LEAVES}
    generator = torch.get_rng_state()
    expected = train(svi, optim, 5), optim.get_state()

    optim = make_optim()
    svi = start(kind, optim)
    if when == "after":
        train(svi, optim, 2)
    optim.load(tmp_path / "optim.pt")
    for n, value in params.items():
        if when == "before":
            pyro.param(n, value, constraint=dist.constraints.positive if "scale" in n else dist.constraints.real)
        else:
            leaf = pyro.get_param_store()._params[n]
            leaf.data.copy_(value.log() if "scale" in n else value)
    torch.set_rng_state(generator)
    assert train(svi, optim, 5) == pytest.approx(expected[0], rel=1e-5)
    assert_same_state(optim.get_state(), expected[1])
    assert optim._state_waiting_to_be_consumed == {}


@pytest.mark.parametrize("name", ["adam", "exponential"])
def test_what_waits_is_set_once_on_each_block(name):
    """A state set on the view is not set again at the next step, and what no block knows goes on waiting."""
    optim = (OPTIMIZERS | SCHEDULERS)[name]()
    em = EM(model, guide, optim)
    train(em, optim, 2)
    em.optim.set_state(em.optim.get_state() | {"later": {}})
    assert optim._state_waiting_to_be_consumed == {"later": {}}
    train(em, optim, 3)
    states = [getattr(o, "optimizer", o).state_dict()["state"][0] for o in em.optim.optim_objs.values()]
    assert [float(s["step"]) for s in states] == [5.0] * 3


# Objects that share an optimizer ----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kinds", [("SVI", "SVI"), ("SVI", "EM, joint"), ("Pyro", "SVI"), ("SVI", "Pyro")], ids=str)
def test_objects_that_share_an_optimizer_share_its_state(kinds, name):
    """Two objects step the same parameters in turn, as two of Pyro's would."""
    results = []
    for pair in (("Pyro", "Pyro"), kinds):
        optim = (OPTIMIZERS | SCHEDULERS)[name]()
        one, two = start(pair[0], optim), make(pair[1], optim)
        losses = [loss for _ in range(4) for svi in (one, two) for loss in train(svi, optim, 1)]
        results.append((losses, optim.get_state()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert_same_state(results[1][1], results[0][1])


@pytest.mark.parametrize("give", [OPTIMIZERS["momentum"], lambda: torch.optim.NAdam], ids=["pyro", "torch"])
def test_an_optimizer_taken_from_another_object_is_shared(give):
    one = start("SVI", give())
    expected = [one.step(X) for _ in range(4)]
    one = start("SVI", give())
    losses = [one.step(X)]
    two = make("SVI", one.optim)
    losses += [svi.step(X) for svi in (two, one, two)]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert one.optim.optim_objs == two.optim.optim_objs


def test_a_single_entry_is_stepped_by_the_users_object():
    """Pyro's own call, with one parameter: the others stay, also those of the same torch optimizer."""
    for give in (pyro.optim.SGD({"lr": 0.5}), torch.optim.NAdam):
        params = {n: torch.ones(2, requires_grad=True) for n in "ab"}
        block = BlockOptimizer.from_user(give, params)
        for p in params.values():
            p.grad = torch.ones(2)
        if isinstance(give, pyro.optim.PyroOptim):
            give([params["a"]])
        else:
            block.objects[params["a"]].step()
        assert not torch.equal(params["a"], torch.ones(2)) and torch.equal(params["b"], torch.ones(2))
        assert torch.equal(params["b"].grad, torch.ones(2))
        assert [int(c) for c in block.state["count"].values()] == [1, 0]


def test_a_cleared_store_starts_afresh_with_the_same_optimizer():
    results = []
    for kind in ("Pyro", "SVI"):
        optim = OPTIMIZERS["adam"]()
        svi = start(kind, optim)
        train(svi, optim, 3)
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        results.append(train(svi, optim, 3))
        assert len(optim.optim_objs) == 6
    assert results[1] == pytest.approx(results[0], rel=1e-5)
