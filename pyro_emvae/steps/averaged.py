r"""M-steps in closed form that move with care: by averaged statistics, or part of the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import StepError, fail, number, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..parameters import MODEL, Row
from ..posterior import Posterior
from .base import HalfStep, Info
from .closed_form import ClosedForm

__all__ = ["Averaged", "Damped"]

COUNT, STATISTIC, MEAN = "count", "statistic:", "mean:"


class Averaged(HalfStep):
    r"""An M-step in closed form on statistics that are averaged over iterations.

    $$S_t=S_{t-1}+\gamma_t(s_t-S_{t-1}),\qquad\theta_t=\mathrm{update}(S_t),\qquad
      \gamma_t=\begin{cases}1&t\le b\\(t-b)^{-\rho}&t>b,\end{cases}$$

    with $s_t$ the expected statistics of iteration t, of a whole data set or of a minibatch that the plate scales up.

    When to use: after a Monte Carlo E-step with few draws (that is SAEM), and on minibatches (online EM). As the noise
    of draws and batches is averaged out, theta settles, where the plain step goes on to jitter at a fixed number of
    draws. Exact E-steps on all data need no average.

    Args:
        m_step: The `ClosedForm` whose statistics are averaged.
        rate: $\rho$, in (0.5, 1]: the sum of $\gamma_t$ diverges and that of their squares does not. The smaller, the
            faster the start is forgotten and the less noise is averaged out.
        burn_in: b, iterations without an average: theta goes to where it fluctuates.
        first_update: The iteration from which theta is updated; the ones before only gather statistics. With small
            minibatches, whose statistics alone make no sensible update, a few.
        average_from: The iteration from which theta is averaged too, in unconstrained space (Polyak); None: never.
            Nothing in the iteration uses that average: `averaged` returns it.

    Its own state, count, statistics and averages, is ``state.steps["M"]``. A further run goes on from there; it starts
    anew when the parameter store was cleared.

    Raises:
        EmvaeError: An argument out of its range.
        StepError: `m_step` is no `ClosedForm`; statistics change their names or shapes from call to call.

    After an error nothing has changed, the averages included.

    Source: Delyon, Lavielle and Moulines 1999, eq. 4 (SAEM); Cappe and Moulines 2009, eq. 13 (online EM), whose
    statistics are per datum, ours sums over all data; Polyak and Juditsky 1992.

    Example:
        >>> from pyro_emvae.steps import gaussian_mixture
        >>> Averaged(gaussian_mixture(3), rate=0.7, burn_in=100)
        Averaged(ClosedForm(mixture_statistics, full), rate=0.7, burn_in=100)
    """

    traits: ClassVar[Traits] = Traits(slots=("M",), arguments=("m_step",), stateful=True)

    def __init__(
        self,
        m_step: ClosedForm,
        rate: float = 0.7,
        burn_in: int = 0,
        first_update: int = 1,
        average_from: int | None = None,
    ) -> None:
        self.m_step = _closed_form("Averaged", m_step)
        self.start = m_step.start
        self.rate = number("steps.Averaged", "rate", rate, "above 0.5 and at most 1", lambda x: 0.5 < x <= 1, 0.7)
        self.burn_in = positive_int("steps.Averaged", "burn_in", burn_in, minimum=0)
        self.first_update = positive_int("steps.Averaged", "first_update", first_update)
        given = average_from is not None
        self.average_from = positive_int("steps.Averaged", "average_from", average_from) if given else None

    def __repr__(self) -> str:
        return f"Averaged({self.m_step!r}, rate={self.rate:g}, burn_in={self.burn_in})"

    def gain(self, t: int) -> float:
        r"""Return $\gamma_t$, the weight of the statistics of iteration t = 1, 2, ...

        Example:
            >>> step = Averaged(ClosedForm(dict, dict), rate=1.0, burn_in=2)
            >>> [step.gain(t) for t in (1, 2, 3, 4, 6)]
            [1.0, 1.0, 1.0, 0.5, 0.25]
        """
        return max(t - self.burn_in, 1) ** -self.rate

    def init(self, problem: Engine, state: State, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {COUNT: torch.tensor(0)}

    @torch.no_grad()
    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        own = state.steps.get("M") or self.init(problem, state)
        t = int(own[COUNT]) + 1
        statistics = self._average(_named(own, STATISTIC), self.m_step.summarize(posterior, *args, **kwargs), t)
        if t >= self.first_update:
            self.m_step.commit(problem, statistics, *args, **kwargs)
        means = self._means(problem, _named(own, MEAN), t)
        new = {COUNT: torch.tensor(t)} | _prefixed(statistics, STATISTIC) | _prefixed(means, MEAN)
        return state.with_own("M", new), Info()

    def _average(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
        gain = self.gain(t)
        if not old or gain == 1:
            return dict(new)
        shapes = [{name: tuple(x.shape) for name, x in each.items()} for each in (old, new)]
        if shapes[0] != shapes[1]:
            fail(
                StepError,
                "steps.Averaged",
                f"average statistics in iteration {t}",
                got=f"shapes {shapes[1]} after {shapes[0]}",
                because="sums over data keep their names and shapes from call to call",
                fix="Let `statistics` return one row per datum, under fixed names.",
            )
        return {name: old[name] + gain * (new[name] - old[name]) for name in new}

    def _means(self, problem: Engine, old: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
        """Return the mean of theta since `average_from`, unconstrained."""
        first = self.average_from
        if first is None or t < first:
            return {}
        leaves = {row.name: row.leaf.detach().clone() for row in _rows(problem)}
        return {name: old[name] + (x - old[name]) / (t - first + 1) if old else x for name, x in leaves.items()}

    def averaged(self, problem: Engine) -> dict[str, Tensor]:
        """Return the mean of theta since `average_from`, constrained: ``em.m_step.averaged(em.engine)``.

        ``parameters.assign(em.blocks, em.m_step.averaged(em.engine))`` makes it the estimate, when the run has ended.

        Raises:
            StepError: Nothing has been averaged yet.
        """
        key = next((key for key, step in problem.half_steps.items() if step is self), "M")
        own = problem.steps.get(key, {})
        means = _named(own, MEAN)
        if not means:
            fail(
                StepError,
                "steps.Averaged",
                "return averaged parameters",
                got=f"average_from={self.average_from} after {int(own.get(COUNT, 0))} iterations",
                because="none have been averaged so far",
                fix="Write Averaged(..., average_from=1), and run further than that.",
            )
        rows = [row for row in problem.parameters.rows if row.name in means]
        return {row.name: replace(row, leaf=means[row.name]).value for row in rows}


class Damped(HalfStep):
    r"""An M-step in closed form of which theta goes a part of the way, in unconstrained space.

    $$\theta_t=\theta_{t-1}+\alpha\big(\mathrm{update}(s_t)-\theta_{t-1}\big).$$

    When to use: noisy or oscillating updates (below 1); slow EM (above 1: over-relaxation).

    Args:
        m_step: A `ClosedForm`.
        factor: $\alpha$, above 0 and below 2, between which a fixed point of EM that attracts does so still; 1 is
            `m_step` itself. The objective may go down, as it never does by `m_step` after an exact E-step.

    Raises:
        EmvaeError: A factor out of its range.
        StepError: `m_step` is no `ClosedForm`.

    Source: Peters and Walker 1978, eq. 2.4.

    Example:
        >>> from pyro_emvae.steps import gaussian_mixture
        >>> Damped(gaussian_mixture(3), 0.5)
        Damped(ClosedForm(mixture_statistics, full), factor=0.5)
    """

    traits: ClassVar[Traits] = Traits(slots=("M",), arguments=("m_step", "factor"))

    def __init__(self, m_step: ClosedForm, factor: float) -> None:
        self.m_step = _closed_form("Damped", m_step)
        self.start = m_step.start
        self.factor = number("steps.Damped", "factor", factor, "above 0 and below 2", lambda x: 0 < x < 2, 0.5)

    def __repr__(self) -> str:
        return f"Damped({self.m_step!r}, factor={self.factor:g})"

    @torch.no_grad()
    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        before = {row.name: row.leaf.detach().clone() for row in _rows(problem)}
        written = self.m_step.commit(problem, self.m_step.summarize(posterior, *args, **kwargs), *args, **kwargs)
        for row in _rows(problem):
            if row.name in written:
                row.leaf.copy_(torch.lerp(before[row.name], row.leaf, self.factor))
        return state, Info()


def _rows(problem: Engine) -> list[Row]:
    return [row for row in problem.parameters.rows if row.block == MODEL]


def _named(own: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in own.items() if name.startswith(prefix)}


def _prefixed(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in values.items()}


def _closed_form(who: str, m_step: Any) -> ClosedForm:
    if not isinstance(m_step, ClosedForm):
        fail(
            StepError,
            f"steps.{who}",
            "wrap this M-step",
            got=repr(m_step),
            because="it works on statistics and the update that they make",
            fix=f"Write {who}(steps.ClosedForm(statistics, update)), or a ready one such as steps.gaussian_mixture(3).",
        )
    return m_step


register(
    "step",
    "averaged",
    Averaged,
    summary="theta from statistics averaged over iterations: SAEM, online EM",
    source="Delyon, Lavielle and Moulines 1999; Cappe and Moulines 2009",
)
register(
    "step",
    "damped",
    Damped,
    summary="a closed form of which theta goes a part of the way",
    source="Peters and Walker 1978",
)
