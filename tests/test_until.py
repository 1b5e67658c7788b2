"""Aggressive training: when an inner loop ends, when it is over for good, and what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_emvae as emvae
from pyro_emvae import EM, steps
from pyro_emvae._checks import DataError, EmvaeError, StepError
from pyro_emvae.steps.until import batches, improves

X = torch.tensor([0.7, -1.1, 2.0, 0.4], dtype=torch.float64)


def model(x: Tensor) -> None:
    theta = pyro.param("theta", lambda: torch.tensor(-1.0).double())
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(theta, 1.0)), 1.0), obs=x)


def guide(x: Tensor) -> None:
    slope, offset = (pyro.param(name, lambda: torch.tensor(0.0).double()) for name in ("slope", "offset"))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + offset, 0.5**0.5))


@dataclass(frozen=True)
class Given(steps.Criterion):
    """Measures what it is told, and notes when."""

    values: tuple[float, ...]
    window: int = 3
    max_steps: int = 12
    every: int = 1
    patience: int = 2

    def measure(self, model: Callable, guide: Callable) -> float:
        SEEN.append(1.0)
        return self.values[len(SEEN) - 1]


SEEN: list[float] = []


def em_of(e_step: steps.HalfStep, lr: float = 0.1) -> EM:
    SEEN.clear()
    return EM(model, guide, pyro.optim.SGD({"lr": lr}), e_step=e_step)


def updates(em: EM, *data: Tensor) -> int:
    """Return how many updates of the guide an iteration makes."""
    before = em.engine.count
    em.step(*data)
    return em.engine.count - before - 1


# The inner loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "window", "goes_on"),
    [
        ([9.0], 1, True),
        ([3.0, 2.0], 1, True),
        ([3.0, 3.0], 1, False),
        ([5.0, 4.0, 4.0, 3.0], 2, True),
        ([5.0, 4.0, 4.0, 5.0], 2, False),
        ([5.0, 4.0, 9.0], 2, True),
        ([9.0, 1.0, 5.0, 4.0, 6.0, 4.0], 2, False),
        ([1.0, 1.0, math.nan, 1.0], 2, False),
    ],
)
def test_windows_by_hand(losses, window, goes_on):
    assert improves(losses, window) is goes_on


def test_the_inner_loop_is_updates_by_hand_until_a_window_is_no_better():
    """The same draws and updates as `steps.Gradient(num_steps)` of the number at which the windows say stop."""
    em = em_of(steps.Gradient(until=Given((1.0,))))
    torch.manual_seed(0)
    em.step(X)
    found, params = em.engine.count - 1, em.blocks.constrained()
    assert found % 3 == 0 and 6 <= found <= 12

    pyro.clear_param_store()
    plain = em_of(steps.Gradient(num_steps=found))
    torch.manual_seed(0)
    plain.engine.setup((X,), {})
    losses = [plain.engine.step("guide", (X,), {}).loss for _ in range(found)]
    ends = [n for n in range(6, 13, 3) if not sum(losses[n - 3 : n]) < sum(losses[n - 6 : n - 3])]
    assert found == (ends[0] if ends else 12)
    plain.engine.step("model", (X,), {})
    for name, value in plain.blocks.constrained().items():
        assert torch.equal(value, params[name])


def test_the_cap():
    """An optimizer that hardly moves has windows of pure noise; one that descends steadily goes on to the cap."""
    em = em_of(steps.Gradient(until=Given((1.0,)), loss=Falling()))
    assert updates(em, X) == 12


class Falling(emvae.MonteCarloELBO):
    """A loss whose value falls from call to call."""

    calls = 0

    def evaluate(self, *args, **kwargs):
        from dataclasses import replace

        self.calls += 1
        found = super().evaluate(*args, **kwargs)
        return replace(found, objective=found.objective * 0 + self.calls)


# Over for good ------------------------------------------------------------------------------------------------------


def test_patience_and_the_end():
    """Best values at 1 and 3; two misses in a row only after the third measurement."""
    em = em_of(steps.Gradient(num_steps=2, until=Given((1.0, 0.5, 2.0, 2.0, 1.9, 9.0))))
    numbers = [updates(em, X) for _ in range(7)]
    assert all(n >= 6 for n in numbers[:5]) and numbers[5:] == [2, 2]
    own = em.engine.steps["E"]
    assert len(SEEN) == 5 and not bool(own["aggressive"]) and float(own["best"]) == 2.0 and int(own["count"]) == 5


def test_measurements_every_so_many_steps():
    em = em_of(steps.Gradient(until=Given((1.0, 2.0, 3.0), every=3)))
    seen = []
    for _ in range(7):
        em.step(X)
        seen.append(len(SEEN))
    assert seen == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("rule", [steps.MutualInformation(X, every=1), steps.HeldOut((X,), every=1)], ids=repr)
def test_criteria_measure_the_guide_and_change_nothing(rule):
    em = em_of(steps.Gradient(until=rule))
    em.step(X)
    torch.manual_seed(3)
    state, before = torch.get_rng_state(), em.blocks.constrained()
    one, two = rule.measure(model, guide), rule.measure(model, guide)
    assert one == two and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in em.blocks.constrained().items())
    if isinstance(rule, steps.HeldOut):
        assert one == emvae.elbo(model, guide, X, num_particles=10, seed=0).value
    else:
        assert one == emvae.mutual_information(model, guide, X, seed=0).value
    assert float(em.engine.steps["E"]["best"]) > -math.inf


# Fresh batches ------------------------------------------------------------------------------------------------------


class Noting:
    """Notes which data the guide sees."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def guide(self, x: Tensor) -> None:
        self.seen.append(float(x[0]))
        guide(x)


def test_the_first_update_and_theta_have_the_own_batch_and_the_others_fresh_ones():
    noting, own = Noting(), torch.full((2,), 9.0).double()
    step = steps.Gradient(until=Given((1.0,) * 9), batches=[X[:2], X[2:], X[1:3]])
    em = EM(model, noting.guide, pyro.optim.SGD({"lr": 0.1}), e_step=step)
    SEEN.clear()
    em.engine.setup((own,), {})
    noting.seen.clear()
    em.step(own)
    assert noting.seen[0] == noting.seen[-1] == 9.0
    assert set(noting.seen[1:-1]) <= {float(x[0]) for x in (X[:2], X[2:], X[1:3])} and len(set(noting.seen)) > 2


def test_a_loader_is_begun_anew_and_gone_through():
    data = TensorDataset(torch.arange(6.0))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    torch.manual_seed(0)
    source = batches(loader, (torch.zeros(2),), {})
    taken = [next(source)[0][0] for _ in range(7)]
    for epoch in (taken[1:4], taken[4:7]):
        assert sorted(torch.cat(epoch).tolist()) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(taken[0], torch.zeros(2))


def test_without_a_source_a_plate_that_subsamples_makes_the_batch_fresh():
    source = batches(None, (X,), {"k": 1})
    assert all(next(source) == ((X,), {"k": 1}) for _ in range(3))


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "got"),
    [
        (lambda: steps.Gradient(until=3), EmvaeError, "3"),
        (lambda: steps.Gradient(batches=[X]), EmvaeError, "None"),
        (lambda: steps.Gradient(until=Given(()), batches=X), DataError, "Tensor"),
        (
            lambda: steps.Gradient(until=Given(()), batches=DataLoader(TensorDataset(X))),
            DataError,
            "a loader that does not shuffle",
        ),
        (lambda: steps.MutualInformation(X, every=0), EmvaeError, "0"),
        (lambda: steps.MutualInformation(X, window=10, max_steps=15), EmvaeError, "15"),
        (lambda: steps.HeldOut(X, patience=-1), EmvaeError, "-1"),
        (lambda: steps.HeldOut(X, window=0), EmvaeError, "0"),
    ],
)
def test_arguments_out_of_range(make, error, got):
    with pytest.raises(error, match=f"got {got}"):
        make()


def test_an_exhausted_source():
    em = em_of(steps.Gradient(until=Given((1.0,)), batches=iter(())))
    with pytest.raises(DataError, match="got an iterable without batches"):
        em.step(X)


def test_no_m_step():
    em = EM(model, guide, pyro.optim.SGD({"lr": 0.1}), m_step=steps.Gradient(until=Given((1.0,))))
    with pytest.raises(StepError, match=r"cannot be the M-step: got until=Given"):
        em.step(X)
