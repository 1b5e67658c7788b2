r"""When an inner loop over the guide ends, and when inner loops are no longer worth it."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from .._checks import DataError, EmvaeError, fail, positive_int
from ..batches import arguments
from ..evidence import elbo, mutual_information

__all__ = ["Criterion", "HeldOut", "MutualInformation", "batches", "check_source", "check_until", "improves"]

logger = logging.getLogger("pyro_emvae")


class Criterion(ABC):
    r"""How long a `Gradient` E-step is aggressive, within an iteration and over iterations.

    Each E-step makes updates as long as the mean objective of `window` of them is above that of the `window` before, at
    most `max_steps`. After every `every` E-steps `measure` says what that was good for; when it has not risen in
    `patience` measurements, aggressive training is over for good, and E-steps make `Gradient`'s ``num_steps`` updates.
    """

    window: int
    max_steps: int
    every: int
    patience: int

    @abstractmethod
    def measure(self, model: Callable, guide: Callable) -> float:
        """Return how good the guide is, the higher the better; changes nothing."""

    def init(self) -> dict[str, Tensor]:
        """Return the state before the first E-step."""
        return {
            "aggressive": torch.tensor(True),
            "count": torch.tensor(0),
            "best": torch.tensor(-math.inf, dtype=torch.float64),
            "misses": torch.tensor(0),
        }

    def after(self, own: Mapping[str, Tensor], model: Callable, guide: Callable) -> dict[str, Tensor]:
        """Return the state after an aggressive E-step."""
        count = int(own["count"]) + 1
        new = {**own, "count": torch.tensor(count)}
        if count % self.every:
            return new
        value, best = self.measure(model, guide), float(own["best"])
        misses = 0 if value > best else int(own["misses"]) + 1
        over = misses >= self.patience
        logger.info("%s: %.5g after %d E-steps%s", type(self).__name__, value, count, "; the end" if over else "")
        return new | {
            "aggressive": torch.tensor(not over),
            "best": torch.tensor(max(value, best), dtype=torch.float64),
            "misses": torch.tensor(misses),
        }


@dataclass(frozen=True)
class MutualInformation(Criterion):
    r"""Aggressive training until the information of data and latents no longer climbs: the lagging encoder's rule.

    $$I_q(x;z)=E_x\mathrm{KL}\big(q(z|x)\,\|\,q(z)\big)$$

    When to use: a variational autoencoder whose latents collapse, as with autoregressive decoders. At the start the
    guide lags behind the true posterior, and the decoder learns to do without z; with the guide near the posterior
    first it does not. The information is over *all* of `data` (`mutual_information`), whose number therefore has to
    have a logarithm well above what the latents can tell.

    Args:
        data: Validation data, as a batch: a tuple is ``*args``, a dict ``**kwargs``, anything else one argument.
        every: E-steps between two measurements, such as the batches of an epoch.
        patience: Measurements in a row without a new best value after which aggressive training ends. It has to outlast
            the start, where the information may lie near 0 and move by noise alone.
        window: Updates whose mean objective is compared with that of the ones before.
        max_steps: Updates per E-step at most.
        num_particles: Draws per datum; all measurements have common random numbers.

    Source: He, Spokoyny, Neubig and Berg-Kirkpatrick 2019, "Lagging inference networks and posterior collapse",
    algorithm 1. Differs: the aggregate posterior is over all of the data and not over batches, whose cap of log B
    hides a rise; `patience`, where they end at the first fall.

    Example:
        >>> MutualInformation(torch.zeros(500, 3), every=20)
        MutualInformation(every=20, patience=2, window=10, max_steps=100, num_particles=1)
    """

    data: Any = field(repr=False)
    every: int = 20
    patience: int = 2
    window: int = 10
    max_steps: int = 100
    num_particles: int = 1

    def __post_init__(self) -> None:
        _check(self)

    def measure(self, model: Callable, guide: Callable) -> float:
        args, kwargs = arguments(self.data)
        return mutual_information(model, guide, *args, num_particles=self.num_particles, seed=0, **kwargs).value


@dataclass(frozen=True)
class HeldOut(Criterion):
    r"""Aggressive training until the ELBO of held-out data no longer rises.

    When to use: where the information of the latents is not what one is after, or where it is near the logarithm of
    the number of data from the start, such as many latents per datum.

    Args:
        data: Held-out data, as a batch: a tuple is ``*args``, a dict ``**kwargs``, anything else one argument.
        every, patience, window, max_steps: As for `MutualInformation`.
        num_particles: Draws of the guide; all measurements have common random numbers.

    Source: He et al. 2019 use the information; Cremer, Li and Duvenaud 2018 for the gap that is left otherwise.

    Example:
        >>> HeldOut(torch.zeros(500, 3), patience=5)
        HeldOut(every=20, patience=5, window=10, max_steps=100, num_particles=10)
    """

    data: Any = field(repr=False)
    every: int = 20
    patience: int = 2
    window: int = 10
    max_steps: int = 100
    num_particles: int = 10

    def __post_init__(self) -> None:
        _check(self)

    def measure(self, model: Callable, guide: Callable) -> float:
        args, kwargs = arguments(self.data)
        return elbo(model, guide, *args, num_particles=self.num_particles, seed=0, **kwargs).value


def improves(losses: Sequence[float], window: int) -> bool:
    r"""Whether an inner loop goes on: its last window is not complete, or its mean loss is below that before.

    Example:
        >>> improves([3.0, 2.0, 2.5], 2), improves([3.0, 2.0, 2.0, 2.0], 2), improves([3.0, 2.0, 2.0, 4.0], 2)
        (True, True, False)
    """
    if len(losses) % window or len(losses) < 2 * window:
        return True
    last, before = losses[-window:], losses[-2 * window : -window]
    return sum(last) < sum(before)


def batches(source: Iterable | None, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple, Mapping]]:
    """Yield the data of an inner loop's updates: the E-step's own batch first, then fresh ones of the source.

    Without a source it is the own batch for ever; a plate that subsamples makes it fresh.
    """
    yield args, kwargs
    while True:
        if source is None:
            yield args, kwargs
        elif isinstance(source, Sequence):
            yield arguments(source[int(torch.randint(len(source), ()))])
        else:
            yield from _all_of(source)


def _all_of(source: Iterable) -> Iterator[tuple[tuple, Mapping]]:
    empty = True
    for batch in source:
        empty = False
        yield arguments(batch)
    if empty:
        fail(
            DataError,
            "steps.Gradient",
            "take a fresh batch",
            got="an iterable without batches",
            because="each E-step begins it anew",
            fix="Pass a list or a DataLoader, not a generator.",
        )


def check_source(source: Any) -> Any:
    """Return `source` if its batches are in random order, else raise."""
    in_order = isinstance(source, DataLoader) and isinstance(source.sampler, SequentialSampler)
    if in_order or (source is not None and not isinstance(source, Iterable)) or isinstance(source, Tensor):
        fail(
            DataError,
            "steps.Gradient",
            "use batches=",
            got="a loader that does not shuffle" if in_order else type(source).__name__,
            because="each inner loop begins it anew and would see the same first batches",
            fix="Write DataLoader(..., shuffle=True), or pass a list of batches.",
        )
    return source


def check_until(until: Any, source: Any) -> Criterion | None:
    """Return `until` if it is a criterion or None, else raise."""
    if (until is None and source is not None) or not (until is None or isinstance(until, Criterion)):
        fail(
            EmvaeError,
            "steps.Gradient",
            "use until=" if until is not None else "use batches=",
            got=repr(until)[:60],
            because="an inner loop has a criterion, and fresh batches are for an inner loop",
            fix="Write Gradient(until=steps.MutualInformation(x_valid), batches=loader).",
        )
    return until


def _check(rule: Any) -> None:
    name = f"steps.{type(rule).__name__}"
    for key in ("every", "patience", "window", "num_particles"):
        positive_int(name, key, getattr(rule, key))
    positive_int(name, "max_steps", rule.max_steps, minimum=2 * rule.window)
