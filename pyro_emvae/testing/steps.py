r"""`check_step`: a half-step of EM against its contract."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from .._checks import ModelError, StepError, fail, nearest
from .._registry import create
from ..em import EM
from ..engine import State
from ..evidence import elbo
from ..parameters import GUIDE, MODEL, Parameters, Row, substitute
from ..particles import quiet
from ..posterior import GuidePosterior, Posterior
from ..problems import Problem, categorical, linear_gaussian, normal_normal
from ..steps import Fixed, HalfStep, Info

__all__ = ["check_step"]


def check_step(
    step: HalfStep | str,
    slot: str,
    problem: Problem | Sequence[Any] | None = None,
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
    * With `problem`, both of this is judged there and not on these two: the other block stays, the ELBO rises. That
      is the way for a step that fits one model only, such as a closed form; start where it can still rise.
    * `init` returns a dict, `expect` the state, a `Posterior` and an `Info`, `maximise` the state and an `Info`.
    * An E-step that makes its posterior without gradients moves no parameter: all stay, bit for bit. If it does not
      draw, the ELBO of its posterior on `problem`, $E[\log p(x,z)]+H(q)$, is what it reports, and never above the exact
      log evidence. If it is exact both are equal, so that the KL divergence from the true posterior is zero, and the
      gradient of $E[\log p_\theta(x,z)]$ is that of $\log p_\theta(x)$. By default the problem is one that has the
      latents of its traits.

    Args:
        step: An instance or a registered name.
        slot: ``"E"`` or ``"M"``; the other slot gets `steps.Gradient()`.
        problem: A tuple ``(model, guide, *args)``, whose ELBO is estimated from 1,000 common draws, or a
            `problems.Problem`, whose exact ELBO is taken if it has one.
        optim: Adam with a learning rate of 0.02 by default.
        loss: `MonteCarloELBO()` by default.
        num_steps: Half-steps that have to raise the ELBO.
        seed: Of initial values and draws.

    The param store is not touched, but for parameters that the model of such a tuple makes when it runs first. All
    parameters are as before.

    Raises:
        AssertionError: Naming what moved, or the ELBO before and after.
        StepError: The step does not fit the slot, or there is no such slot.
        ModelError: `problem` is neither of the two, or its parameters live in modules.

    Example:
        >>> check_step("gradient", "E")
        >>> check_step("gradient", "M", problem=linear_gaussian(), num_steps=5)
    """
    if slot not in ("E", "M"):
        fail(
            StepError,
            "check_step",
            f"put a step into slot {slot!r}",
            got=repr(slot),
            because="an iteration of EM has an E-step and an M-step",
            fix=nearest(str(slot).upper(), ("E", "M")),
        )
    optim = pyro.optim.Adam({"lr": 0.02}) if optim is None else copy.deepcopy(optim)
    options = {"e_step": step} if slot == "E" else {"m_step": step}

    def make(model: Callable, guide: Callable) -> EM:
        return EM(model, guide, optim, loss, **options)

    with quiet(seed=seed):
        made = create("step", step)
        if slot == "E" and not hasattr(made, "optim") and type(made).infer is not HalfStep.infer:
            _check_posterior(made, _evident(problem, made))
            return
        if problem is None:
            _check_blocks(slot, make)
        _check_rise(slot, make, num_steps, _case(linear_gaussian() if problem is None else problem, seed))


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


def _evident(problem: Any, step: HalfStep) -> Problem:
    """Return a problem whose log evidence is known, with latents that the step takes."""
    if problem is None:
        return {"discrete": categorical, "conjugate": normal_normal}.get(step.traits.latents, linear_gaussian)()
    if not isinstance(problem, Problem) or problem.log_evidence is None or problem.traits.modules:
        fail(
            ModelError,
            "check_step",
            f"prove the posterior of {step!r}",
            got=repr(problem)[:80],
            because="an E-step without a guide is judged by the exact log evidence",
            fix="Write problem=a problems.Problem of pyro.param statements with log_evidence=.",
        )
    return problem


def _check_posterior(step: HalfStep, problem: Problem) -> None:
    leaves = nn.ParameterDict({n: nn.Parameter(t.detach()) for n, t in problem.unconstrained().items()})
    guide = _Substituted(problem, "guide", leaves) if step.traits.needs_guide else None
    em = EM(_Substituted(problem, "model", leaves), guide, e_step=step, m_step=Fixed())
    em.engine.setup(problem.args, {})
    before = {row.name: row.leaf.detach().clone() for row in em.blocks.rows}
    posterior, info = _half_step(em, "E", *problem.args)
    for row in em.blocks.rows:
        assert torch.equal(row.leaf, before[row.name]), (
            f"the E-step {step!r} moved {row.name!r} of the {row.block}: "
            f"observed {row.leaf}, expected {before[row.name]}"
        )
    if not (step.traits.exact or step.traits.deterministic):
        return
    mine = {n: leaf for n, leaf in leaves.items() if n in problem.model_params}
    evidence = problem.log_evidence(problem.constrained(dict(leaves.items())))
    q = posterior.expected_log_joint(100)
    bound, exact = float(q.detach()) + posterior.entropy, float(evidence.detach())
    size = 1e-8 * (1 + abs(exact))
    assert abs(bound + info.loss) <= size and bound <= exact + size, (
        f"{step!r} reports {-info.loss:.10g} nats, its posterior's ELBO is {bound:.10g}, and log p(x) is {exact:.10g}"
    )
    if step.traits.exact:
        assert abs(bound - exact) <= size, f"the ELBO of {step!r} is {bound:.10g}, expected log p(x) = {exact:.10g}"
        pairs = [torch.autograd.grad(x, list(mine.values()), materialize_grads=True) for x in (q, evidence)]
        for name, found, expected in zip(mine, *pairs, strict=True):
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8), (
                f"{step!r}: the gradient of E[log p] by {name!r} is {found}, expected that of log p(x), {expected}"
            )


@dataclass(frozen=True)
class _Case:
    """A model and guide, their data, and how high the ELBO is, in words and as a function."""

    model: Callable
    guide: Callable
    args: tuple
    name: str
    value: Callable[[], float]


def _case(problem: Problem | Sequence[Any], seed: int) -> _Case:
    if isinstance(problem, Problem) and not problem.traits.modules:
        leaves = nn.ParameterDict({n: nn.Parameter(t.detach()) for n, t in problem.unconstrained().items()})
        pair = (_Substituted(problem, "model", leaves), _Substituted(problem, "guide", leaves))
        if problem.elbo is not None:
            return _Case(*pair, problem.args, f"exact ELBO of {problem.name}", lambda: _exact(problem, leaves))
        problem = (*pair, *problem.args)
    if not isinstance(problem, tuple | list) or len(problem) < 2 or not all(map(callable, problem[:2])):
        fail(
            ModelError,
            "check_step",
            "take steps on this problem",
            got=repr(problem)[:80],
            because="a problem is a model, a guide and their data, with parameters that can be put back",
            fix="Write problem=(model, guide, x), or a problems.Problem of pyro.param statements.",
        )
    model, guide, *args = problem
    name = f"ELBO of {getattr(model, '__name__', type(model).__name__)}"
    return _Case(model, guide, tuple(args), name, lambda: elbo(model, guide, *args, seed=seed).value)


def _check_rise(slot: str, make: Callable[[Callable, Callable], EM], num_steps: int, case: _Case) -> None:
    em = make(case.model, case.guide)
    rows = em.engine.setup(case.args, {}).rows
    start = {row.name: row.leaf.detach().clone() for row in rows}
    own, kind = (GUIDE, "model") if slot == "E" else (MODEL, "guide")
    try:
        before = case.value()
        for _ in range(num_steps):
            _half_step(em, slot, *case.args)
        after = case.value()
        for row in rows:
            assert row.block == own or torch.equal(row.leaf, start[row.name]), (
                f"the {slot}-step {_name(em, slot)} moved {row.name!r} of the {kind}: "
                f"observed {row.leaf.detach()}, expected {start[row.name]}"
            )
    finally:
        with torch.no_grad():
            for row in rows:
                row.leaf.copy_(start[row.name])
    assert after > before, (
        f"{num_steps} {slot}-steps {_name(em, slot)} took the {case.name} from {before:.6g} to {after:.6g}, "
        "expected a rise"
    )


def _half_step(em: EM, slot: str, *args: Any) -> tuple[Any, Info]:
    """Make one half-step and look at what it returns, and return that; an M-step gets the guide as it stands."""
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
    return result[-2], result[-1]


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
