r"""Markov chains by datum, kept from E-step to E-step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import StepError, fail

__all__ = ["Chains", "check_same_data", "fingerprint", "gather", "scatter"]


class Chains(NamedTuple):
    r"""Where the chains of some units are, and how their steps are adapted; a unit of count 0 is still to be started.

    Args:
        position: Unconstrained coordinates, or outcomes of discrete latents: ``(units, chains, D)``.
        log_step, log_average, error, count: As in `kernels.DualAveraging`: ``(units,)``.
    """

    position: Tensor
    log_step: Tensor
    log_average: Tensor
    error: Tensor
    count: Tensor

    @classmethod
    def new(cls, units: int, chains: int, width: int, like: Tensor) -> Chains:
        """Return chains that are still to be started."""
        return cls(like.new_zeros(units, chains, width), *(like.new_zeros(units) for _ in range(4)))

    def resized(self, chains: int) -> Chains:
        """Return so many chains per unit: the first ones, or more that start where these are."""
        have = self.position.shape[1]
        if have == chains:
            return self
        return self._replace(position=self.position[:, torch.arange(chains, device=self.position.device) % have])


def gather(own: Mapping[str, Tensor], rows: Tensor | None, units: int) -> Chains | None:
    r"""Return the chains of a batch's units from a step's own tensors; None before the first E-step.

    Args:
        own: What `scatter` returned.
        rows: Row numbers of the batch's units; None if the batch is all units.
        units: Number of units in the batch.

    Raises:
        StepError: The batch has another number of units than the chains, and does not say which.
    """
    if "position" not in own:
        return None
    chains = Chains(*(own[name] for name in Chains._fields))
    have = len(chains.count)
    if rows is None and have != units:
        _refuse_batch(f"a batch of {units} data and chains for {have}")
    if rows is None:
        return chains
    missing = int(rows.max()) + 1 - have
    return Chains(*(_grown(x, missing)[rows.to(x.device)] for x in chains))


def scatter(own: Mapping[str, Tensor], rows: Tensor | None, chains: Chains) -> dict[str, Tensor]:
    """Return a step's own tensors with the chains of a batch's units replaced, in new tensors."""
    if rows is None:
        return dict(zip(Chains._fields, chains, strict=True))
    new = {}
    for name, mine in zip(Chains._fields, chains, strict=True):
        size = int(rows.max()) + 1
        old = own.get(name, mine[:0])
        if name == "position" and old.shape[1] != mine.shape[1]:
            old = old[:, torch.arange(mine.shape[1], device=old.device) % old.shape[1]]
        new[name] = _grown(old, size - len(old)).clone()
        new[name][rows.to(mine.device)] = mine
    return new


def _grown(x: Tensor, missing: int) -> Tensor:
    return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def fingerprint(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """Return numbers that tell data tensors apart, also in another order of their rows: float64, on the CPU."""
    numbers = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and x.dim():
            rows = x.detach().reshape(len(x), -1).nan_to_num().double().sum(1)
            ramp = torch.arange(1, len(x) + 1, device=x.device, dtype=torch.float64)
            numbers += [torch.as_tensor(n, dtype=torch.float64).cpu() for n in (x.numel(), rows.sum(), rows @ ramp)]
    return torch.stack(numbers) if numbers else torch.zeros(0, dtype=torch.float64)


def check_same_data(own: Mapping[str, Tensor], print_: Tensor) -> None:
    r"""Raise if the data are not those that the chains belong to.

    Raises:
        StepError: The data changed, and nothing says which rows they are.
    """
    if "data" in own and not torch.equal(own["data"], print_):
        _refuse_batch("other data than in the E-step before, or the same in another order")


def _refuse_batch(got: str) -> None:
    fail(
        StepError,
        "MonteCarlo",
        "go on with its chains",
        got=got,
        because="each datum has chains of its own, so a minibatch has to say which data it holds",
        fix="Let the plate subsample (pyro.plate(..., subsample_size=B) or subsample=rows), or pass index=rows to step "
        "and model.",
    )
