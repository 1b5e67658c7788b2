r"""The sleep phase: the guide learns from data that the model dreams up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import StepError, fail, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..loss import Evaluation, States, remember
from ..parameters import GUIDE
from ..particles import Particles, Place, Simulation, find_places, score_guide, simulate
from ..posterior import GuidePosterior, Posterior
from .base import HalfStep, Info

__all__ = ["Dream", "Sleep", "climb"]


class Sleep(HalfStep):
    r"""The E-step on dreams: latents and data drawn from the model, the guide fitted to the latents.

    $$\phi\leftarrow\arg\text{raise}_\phi\,E_{p_\theta(x,z)}[\log q_\phi(z|x)],$$

    which lowers $E_{p_\theta(x)}\mathrm{KL}(p_\theta(z|x)\,\|\,q_\phi(z|x))$. ``EM(e_step=Sleep(), m_step=Gradient())``
    is the wake-sleep algorithm: wake-theta is the M-step, on draws of the guide given the real data.

    When to use: an amortized guide with latents of any kind, discrete ones included, for no derivative of the model is
    taken and the gradient has little noise. q learns about the data that the present model makes: early on those are
    not yours, and the KL is the other way round than in the ELBO, so that the bound may fall. A guide with free
    parameters per datum learns nothing about that datum here: it goes to the prior.

    Args:
        simulate: None: the model itself is run with its observed sites drawn, and the argument that *is* the ``obs=``
            tensor of a site (found by identity), or whose rows a subsampling plate observes, is replaced by what was
            drawn. Otherwise a Pyro program of the model's arguments that draws the latents by `pyro.sample` under
            their names and returns the arguments with simulated data: a tuple of the first positional ones, a dict of
            those to be passed by name, or the first one. A model that reads its data elsewhere than at ``obs=``
            (teacher forcing) needs one.
        num_steps: Updates per E-step, each on new dreams.
        num_particles: Dreams per update: each is as many data as the batch has, and the guide's plates and scales
            apply, so that the objective is a sum over the data as the ELBO is.
        optim: An optimizer of its own; by default that of `EM`.

    Dreams come from the model in evaluation mode; its parameters and buffers stay bit for bit. The guide is run as it
    stands. The loss in `Info` is NaN, for the objective is not the ELBO. It can be recorded: ``backend="graph"``.

    Raises:
        StepError: An observed value that is no argument or several, a factor, a model that reads its data elsewhere,
            a guide with auxiliary sites; all need `simulate`, or another guide.

    Source: Hinton, Dayan, Frey and Neal 1995, "The wake-sleep algorithm for unsupervised neural networks", eq. 5.

    Example:
        >>> Sleep(num_steps=5)
        Sleep(num_steps=5)
    """

    traits: ClassVar[Traits] = Traits(slots=("E",), needs_guide=True, amortized=True)

    def __init__(
        self,
        simulate: Callable | None = None,
        num_steps: int = 1,
        num_particles: int = 1,
        optim: Any = None,
    ) -> None:
        self.num_steps = positive_int("steps.Sleep", "num_steps", num_steps)
        self.dream = Dream(simulate, positive_int("steps.Sleep", "num_particles", num_particles))
        self.simulate, self.num_particles, self.optim = simulate, num_particles, optim

    def __repr__(self) -> str:
        own = "" if self.num_particles == 1 else f", num_particles={self.num_particles}"
        program = "" if self.simulate is None else f", simulate={getattr(self.simulate, '__name__', self.simulate)}"
        return f"Sleep(num_steps={self.num_steps}{own}{program})"

    def expect(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> tuple[State, Posterior, Info]:
        info = climb(problem, self.dream, self.num_steps, args, kwargs)
        return state, GuidePosterior(problem.model, problem.guide, args, kwargs), info


def climb(problem: Engine, loss: Any, num_steps: int, args: tuple, kwargs: Mapping[str, Any]) -> Info:
    """Take gradient steps of the guide on an objective that is not the ELBO, whose values are no losses of it."""
    steps = [problem.step(GUIDE, args, kwargs, loss=loss) for _ in range(num_steps)]
    return Info(tuple(step._replace(loss=math.nan) for step in steps if step is not None))


class Dream:
    r"""The objective of sleep as a loss of the engine: $\frac1K\sum_k\log q_\phi(z_k|x_k)$, $(z_k,x_k)\sim p_\theta$.

    Args:
        simulate: As for `Sleep`.
        num_particles: K.
    """

    table: ClassVar[tuple] = ()

    def __init__(self, simulate: Callable | None, num_particles: int) -> None:
        if simulate is not None and not callable(simulate):
            fail(
                StepError,
                "steps.Sleep",
                "simulate",
                got=repr(simulate),
                because="simulate is a Pyro program of the model's arguments",
                fix="Write Sleep(simulate=program), or leave it out.",
            )
        self.program, self.num_particles = simulate, num_particles
        self.state: States = {}
        self._places: dict[Any, tuple[Place, ...]] = {}

    def evaluate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], state: Any = None
    ) -> Evaluation:
        rows = [self._once(model, guide, args, kwargs) for _ in range(self.num_particles)]
        objective = torch.stack([row[0] for row in rows]).mean()
        return Evaluation(objective, objective, rows[0][1], {})

    def _once(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]):
        """Dream once and return log q of the latents, summed over the data, and what was met."""
        if self.program is None:
            places = self._find(model, args, kwargs)
            dreamt = simulate(model, args, kwargs)
            args, kwargs = dreamt.replaced(places, args, kwargs)
        else:
            dreamt = simulate(self.program, args, kwargs)
            args, kwargs = _arguments(dreamt, args, kwargs)
        sites, params = score_guide(guide, dreamt, args, kwargs)
        log_q: Tensor | float = sum(site.scaled.sum() for site in sites.values())
        met = {"guide": params, "model": dreamt.params}
        return torch.as_tensor(log_q), Particles(1, 0, sites, {}, met)

    def _find(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Place, ...]:
        key = (model, *map(_kind, args), *((name, _kind(x)) for name, x in kwargs.items()))
        if key not in self._places:
            remember(self._places, key, find_places(model, args, kwargs))
        return self._places[key]


def _kind(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else type(x)


def _arguments(dreamt: Simulation, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict]:
    """Put what the user's program returned in place of the arguments."""
    result = dreamt.result
    if isinstance(result, Mapping):
        return args, {**kwargs, **result}
    result = result if isinstance(result, tuple) else (result,)
    if not all(x is not None for x in result) or len(result) > len(args):
        fail(
            StepError,
            "steps.Sleep",
            "place the simulated data",
            got=f"{type(dreamt.result).__name__} from simulate= for {len(args)} positional arguments",
            because="a tuple replaces the first positional arguments, a dict those by name, anything else the first",
            fix="Return the arguments with simulated data.",
        )
    return (*result, *args[len(result) :]), dict(kwargs)


register(
    "step",
    "sleep",
    Sleep,
    summary="the guide fitted to latents and data that the model draws",
    source="Hinton, Dayan, Frey and Neal 1995",
)
