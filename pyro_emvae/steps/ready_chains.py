r"""The ready M-step in closed form for hidden Markov models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from .._checks import StepError, fail, nearest
from ..posterior import EnumeratedPosterior, Posterior, Support
from .closed_form import ClosedForm, total

__all__ = ["hidden_markov"]

EMISSION = "emission."


@dataclass(frozen=True)
class ChainStatistics:
    r"""Expected numbers of first states and of transitions, and the emission's statistics.

    Args:
        emission: The statistics of a mixture; time is one more plate of its data, the outermost.
        latent, observed: Names of the sites, with ``{}`` for the time.

    Returns:
        ``{"initial": (K,), "transition": (K, K), "emission.<name>": ...}`` from `of_posterior`.
    """

    emission: Callable[..., Mapping[str, Tensor]]
    latent: str
    observed: str

    __name__ = "chain_statistics"

    def __call__(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self._refuse("values of the latents")

    def of_posterior(self, posterior: Posterior, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not isinstance(posterior, EnumeratedPosterior):
            self._refuse(f"a posterior of kind {posterior.kind!r}")
        names = self._names(posterior)
        initial, transition, responsibilities = self._visits(posterior, names)
        values = {getattr(self.emission, "latent", "z"): _outcomes(responsibilities)}
        seen = self._seen(posterior, len(names))
        if seen is not None:
            seen = seen.reshape(len(seen), *seen.shape[seen.dim() - responsibilities.dim() + 2 :])
        support = Support(
            values, responsibilities.movedim(-1, 0).log(), responsibilities.dim() - 1, posterior.scale, seen
        )
        emitted = total(self.emission, support, *args, **kwargs)
        return {"initial": initial, "transition": transition} | {EMISSION + name: x for name, x in emitted.items()}

    def _names(self, posterior: EnumeratedPosterior) -> list[str]:
        latents = posterior.latents
        names = list(takewhile(latents.__contains__, map(self.latent.format, count())))
        if not names:
            fail(
                StepError,
                "steps.hidden_markov",
                f"read latent {self.latent.format(0)!r}",
                got="no such latent",
                because="the states are counted from 0",
                fix=nearest(self.latent.format(0), latents) + " Write latent=...",
            )
        for earlier, name in zip([None, *names], names, strict=False):
            found = posterior.depends(name)
            if found != ((name,) if earlier is None else (earlier, name)):
                fail(
                    StepError,
                    "steps.hidden_markov",
                    f"count the transitions to {name!r}",
                    got=f"a density that depends on {', '.join(found)}",
                    because="in a chain of first order a state depends on the one before it",
                    fix="Use steps.Gradient().",
                )
        return names

    def _visits(self, posterior: EnumeratedPosterior, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return numbers of first states and of transitions, and p(z_t | y): ``(T, *plates, K)``."""
        first, plates = names[0], tuple(range(posterior.nesting))
        own = _own_plates(posterior, first)
        gammas = [posterior.clique(first)]
        initial = _sum(posterior.expected_counts(first), plates)
        transition = initial.new_zeros(len(initial), len(initial))
        for name in names[1:]:
            gammas.append(posterior.clique(name).sum(-2))
            transition += _sum(posterior.expected_counts(name), plates)
        gamma = torch.stack(gammas)
        return initial, transition, gamma.reshape(len(gamma), *gamma.shape[1 + len(plates) - own :])

    def _seen(self, posterior: EnumeratedPosterior, length: int) -> Tensor | None:
        """Return where the model keeps an observation, ``(T, *plates)``; None: everywhere."""
        sites = posterior.trace.nodes
        names = [self.observed.format(t) for t in range(length)]
        if not any(name in sites for name in names):
            fail(
                StepError,
                "steps.hidden_markov",
                f"read site {names[0]!r}",
                got="no such site",
                because="its mask says which observations count",
                fix=nearest(names[0], sites) + " Write observed=...",
            )
        device = posterior.clique(self.latent.format(0)).device
        missing = torch.zeros((1,) * posterior.nesting, dtype=torch.bool, device=device)
        return _stack(posterior.mask(name) if name in sites else missing for name in names)

    def _refuse(self, got: str) -> None:
        fail(
            StepError,
            "steps.hidden_markov",
            "count transitions",
            got=got,
            because="it needs the probabilities of neighbouring states",
            fix='Use e_step="enumerated", or the M-step steps.Gradient().',
        )


def hidden_markov(
    emission: ClosedForm,
    *,
    latent: str = "z_{}",
    observed: str = "y_{}",
    initial: str | None = "initial",
    transition: str | None = "transition",
) -> ClosedForm:
    r"""M-step of a hidden Markov model (Baum-Welch).

    With $\gamma_t(k)=p(z_t=k|y)$ and $\xi_t(j,k)=p(z_{t-1}=j,z_t=k|y)$, sums going over the sequences,

    $$\pi_k\propto\sum\gamma_0(k),\qquad A_{jk}\propto\sum\sum_{t\ge1}\xi_t(j,k),$$

    and the emissions are those of a mixture with $\gamma_t$ as responsibilities, each time and sequence a datum.

    When to use: after the E-step `Enumerated`, on a model that writes its states as
    ``for t in pyro.markov(range(T))``. Time and memory are linear in T.

    Args:
        emission: The M-step of the mixture that the model would be without memory, such as
            ``steps.gaussian_mixture(5, "diagonal")``: its `data` say which argument holds the observations
            ``(T, N, ...)``, N sequences in one plate (``(T, ...)`` without a plate). Its mixing weights are left out,
            and have to bear the default name ``"weights"``.
        latent, observed: Names of the sites, with ``{}`` for the time, counted from 0.
        initial, transition: Names of the parameters: probabilities ``(K,)`` and ``(K, K)``, one row for each state
            that is left; None: not estimated.

    Sequences of different length: mask state and observation after each one's end. A missing value inside a sequence:
    mask the observation alone. What is masked does not count, and may be NaN in the argument if the model replaces it.

    A state that is never left keeps its row. A probability of zero, such as a transition that a left-to-right chain
    does not make, is kept at the rounding unit of its dtype: unconstrained, zero is minus infinity, which no optimizer,
    rule or standard error could take. ``Categorical(probs)`` has that floor itself, so that evidence and all other
    parameters are those of exact zeros up to rounding; and a zero stays one, unless data speak against it by 36 nats
    (16 in float32).

    Raises:
        StepError: By the step: sites of other names, a state that depends on more than the one before, or an E-step
            that does not enumerate. By the E-step: a state masked before the end of its sequence.
        DegenerateError: By the update: as the emission's.

    Source: Baum, Petrie, Soules and Weiss 1970; Rabiner 1989, eqs. 40 and 95.

    Example:
        >>> from pyro_emvae.steps import poisson_mixture
        >>> hidden_markov(poisson_mixture(3))
        ClosedForm(chain_statistics, hidden_markov_update)
    """

    def hidden_markov_update(sums: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        emitted = {name.removeprefix(EMISSION): x for name, x in sums.items() if name.startswith(EMISSION)}
        new = {name: x for name, x in emission.update(emitted, params).items() if name != "weights"}
        if initial is not None:
            new[initial] = _shares(sums["initial"])
        if transition is not None:
            rows = _shares(sums["transition"])
            left = (sums["transition"].sum(-1, keepdim=True) > 0) | (transition not in params)
            new[transition] = torch.where(left, rows, params.get(transition, rows))
        return new

    return ClosedForm(ChainStatistics(emission.statistics, latent, observed), hidden_markov_update)


def _shares(counts: Tensor) -> Tensor:
    shares = (counts / counts.sum(-1, keepdim=True)).clamp(min=torch.finfo(counts.dtype).eps)
    return shares / shares.sum(-1, keepdim=True)


def _sum(x: Tensor, plates: tuple[int, ...]) -> Tensor:
    return x.sum(plates) if plates else x


def _outcomes(responsibilities: Tensor) -> Tensor:
    """Return the states, with a dim for time and for each plate."""
    states = torch.arange(responsibilities.shape[-1], device=responsibilities.device)
    return states.reshape(-1, *(1,) * (responsibilities.dim() - 1))


def _own_plates(posterior: EnumeratedPosterior, name: str) -> int:
    """Return how many plate dims a site has, to the left as far as its outermost plate."""
    frames = [frame.dim for frame in posterior.latents[name]["cond_indep_stack"] if frame.vectorized]
    return -min(frames, default=0)


def _stack(masks: Iterator[Tensor | None]) -> Tensor | None:
    """Return the masks of all times, ``(T, *plates)``; None if there is none."""
    found = list(masks)
    given = [mask for mask in found if mask is not None]
    if not given:
        return None
    shape = torch.broadcast_shapes(*[mask.shape for mask in given])
    everywhere = torch.ones((), dtype=torch.bool, device=given[0].device)
    return torch.stack([(everywhere if mask is None else mask).expand(shape) for mask in found])
