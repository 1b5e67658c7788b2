r"""`check_step`: a half-step of EM against its contract."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from ..em import EM
from ..engine import State
from ..parameters import Parameters, Row, substitute
from ..particles import quiet
from ..posterior import GuidePosterior, Posterior
from ..problems import Problem, linear_gaussian
from ..steps import HalfStep, Info

__all__ = ["check_step"]


def check_step(
    step: HalfStep | str,
    slot: str,
    *,
    optim: Any = None,
    loss: ELBO | None = None,
    num_steps: int = 100,
    seed: int = 0,
) -> None:
    r"""Prove a half-step: it changes its own block only, raises the objective, and returns what its contract says.

    * Between two networks with batch norm and dropout, after iterations that gave both optimizers momentum, an E-step
      leaves the model's parameters *and* buffers bit-for-bit alone, an M-step the guide's.
    * On probabilistic PCA `num_steps` of them raise the exact ELBO.
    * `init` returns a dict, `expect` the state, a `Posterior` and an `Info`, `maximise` the state and an `Info`.

    Args:
        step: An instance or a registered name.
        slot: ``"E"`` or ``"M"``; the other slot gets `steps.Gradient()`.
        optim: Adam with a learning rate of 0.02 by default.
        loss: `MonteCarloELBO()` by default.
        num_steps: Half-steps on the second problem.
        seed: Of initial values and draws.

    The param store is not touched.

    Raises:
        AssertionError: Naming what moved, or the exact ELBO before and after.
        StepError: The step does not fit the slot.

    Example:
        >>> check_step("gradient", "E")
    """
    optim = pyro.optim.Adam({"lr": 0.02}) if optim is None else copy.deepcopy(optim)
    options = {"e_step": step} if slot == "E" else {"m_step": step}
    with quiet(seed=seed):
        _check_blocks(slot, lambda model, guide: EM(model, guide, optim, loss, **options))
        _check_rise(slot, lambda model, guide: EM(model, guide, optim, loss, **options), num_steps)


def _check_blocks(slot: str, make: Callable[[nn.Module, nn.Module], EM]) -> None:
    model, guide = _Decoder(), _Encoder()
    x = torch.randn(8, 3)
    em = make(model, guide)
    em.engine.setup((x,), {})
    _half_step(em, slot, x)
    for _ in range(2):
        em.step(x)
    other, kind = (model, "model") if slot == "E" else (guide, "guide")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    _half_step(em, slot, x)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), (
            f"the {slot}-step {_name(em, slot)} moved {name!r} of the {kind}: "
            f"observed {tensor}, expected {before[name]}"
        )


def _check_rise(slot: str, make: Callable[[nn.Module, nn.Module], EM], num_steps: int) -> None:
    problem = linear_gaussian()
    leaves = nn.ParameterDict({n: nn.Parameter(t.detach()) for n, t in problem.unconstrained().items()})
    em = make(_Substituted(problem, "model", leaves), _Substituted(problem, "guide", leaves))
    em.engine.setup(problem.args, {})
    before = _exact(problem, leaves)
    for _ in range(num_steps):
        _half_step(em, slot, *problem.args)
    after = _exact(problem, leaves)
    assert after > before, (
        f"{num_steps} {slot}-steps {_name(em, slot)} took the exact ELBO of probabilistic PCA from {before:.6g} to "
        f"{after:.6g}, expected a rise"
    )


def _half_step(em: EM, slot: str, *args: Any) -> None:
    """Make one half-step and look at what it returns; an M-step gets the guide as it stands."""
    step, state = (em.e_step if slot == "E" else em.m_step), em.engine.state
    if slot not in state.steps:
        own = step.init(em.engine, state, *args)
        assert isinstance(own, dict), f"{_name(em, slot)}: `init` returned {own}, expected a dict of tensors"
        state = state.with_own(slot, own)
    if slot == "E":
        result, expected = step.expect(em.engine, state, *args), (State, Posterior, Info)
    else:
        posterior = GuidePosterior(em.model, em.guide, args)
        result, expected = step.maximise(em.engine, state, posterior, *args), (State, Info)
    kinds = tuple(map(type, result)) if type(result) is tuple else (type(result),)
    assert len(kinds) == len(expected) and all(map(issubclass, kinds, expected)), (
        f"{_name(em, slot)}: `{'expect' if slot == 'E' else 'maximise'}` returned {result}, "
        f"expected {', '.join(kind.__name__ for kind in expected)}"
    )
    em.engine.steps = result[0].steps


def _name(em: EM, slot: str) -> str:
    return repr(em.e_step if slot == "E" else em.m_step)


def _exact(problem: Problem, leaves: nn.ParameterDict) -> float:
    with torch.no_grad():
        return float(problem.elbo(problem.constrained(dict(leaves.items()))))


class _Substituted(nn.Module):
    """A problem's model or guide with a module's parameters in place of the store's."""

    def __init__(self, problem: Problem, side: str, leaves: nn.ParameterDict) -> None:
        super().__init__()
        names = problem.model_params if side == "model" else problem.guide_params
        self.leaves = nn.ParameterDict({name: leaves[name] for name in names})
        self.function = getattr(problem, side)
        rows = (Row(name, leaf, side, "", problem.constraints[name]) for name, leaf in self.leaves.items())
        self.rows = Parameters(tuple(rows))

    def forward(self, *args: Any) -> Any:
        with substitute(self.rows, dict(self.leaves.items())):
            return self.function(*args)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
        self.log_scale = nn.Parameter(torch.full((2,), -1.0))

    def forward(self, x: Tensor) -> None:
        loc = self.encoder(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, self.log_scale.exp()).to_event(1))


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)
