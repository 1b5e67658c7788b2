r"""Several M-steps in closed form as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._checks import StepError, fail
from ..posterior import Support
from .closed_form import ClosedForm, total

__all__ = ["combined"]


@dataclass(frozen=True)
class CombinedStatistics:
    """The statistics of several steps side by side, each under its number: ``{"0.n": ..., "1.square": ...}``."""

    parts: tuple[Callable[..., Mapping[str, Tensor]], ...]

    __name__ = "combined_statistics"

    def __call__(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return _numbered(part(values, *args, **kwargs) for part in self.parts)

    def total(self, support: Support, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return _numbered(total(part, support, *args, **kwargs) for part in self.parts)


def combined(*m_steps: ClosedForm) -> ClosedForm:
    r"""Return the M-step that makes several at once, each for parameters of its own.

    $$E[\log p_\theta(x,z)]=Q_1(\theta_1)+Q_2(\theta_2)+\dots,$$

    so that the parts are maximised apart.

    When to use: a model of several parts, each of which has a ready step, such as a regression and the prior of its
    random effects.

    Args:
        m_steps: `ClosedForm`, one or more; their updates get the present parameters and nothing else.

    Raises:
        StepError: One of them is no `ClosedForm`, or counts neighbours in a chain; by the step: two of them return the
            same parameter.

    Source: Dempster, Laird and Rubin 1977, section 3: Q is maximised, whatever it is a sum of.

    Example:
        >>> from pyro_emvae.steps import glm_intercepts, random_effects
        >>> combined(glm_intercepts("poisson"), random_effects())
        ClosedForm(combined_statistics, combined_update)
    """
    for m_step in m_steps:
        if not isinstance(m_step, ClosedForm) or hasattr(m_step.statistics, "of_posterior"):
            fail(
                StepError,
                "steps.combined",
                "combine M-steps",
                got=repr(m_step),
                because="it adds up statistics of values of the latents, one by one",
                fix="Write combined(steps.ClosedForm(...), steps.random_effects()).",
            )

    def combined_update(sums: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        for number, m_step in enumerate(m_steps):
            mine = f"{number}."
            found = m_step.update({n.removeprefix(mine): x for n, x in sums.items() if n.startswith(mine)}, params)
            if new.keys() & found.keys():
                fail(
                    StepError,
                    "steps.combined",
                    "combine updates",
                    got=f"{min(new.keys() & found.keys())!r} from more than one step",
                    because="each step has parameters of its own",
                    fix="Give the parameters names of their own, by the arguments of the ready steps.",
                )
            new |= found
        return new

    starts = [m_step.start for m_step in m_steps if m_step.start is not None]

    def start(seed: int, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: x for each in starts for name, x in each(seed, params, *args, **kwargs).items()}

    return ClosedForm(
        CombinedStatistics(tuple(m_step.statistics for m_step in m_steps)),
        combined_update,
        num_particles=max((m_step.num_particles for m_step in m_steps), default=1),
        start=start if starts else None,
    )


def _numbered(parts: Any) -> dict[str, Any]:
    return {f"{number}.{name}": x for number, part in enumerate(parts) for name, x in part.items()}
