r"""What ``svi.optim`` is, and what stands in ``optim_objs``, the user's own too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pyro.optim import PyroOptim
from torch import Tensor

from .entry import Entry, refuse

__all__ = ["OptimView", "Scheduled", "face"]


class Scheduled:
    """A parameter's scheduler as ``optim_objs`` has it: the scheduler itself, but its ``optimizer`` is the live entry.

    It passes for an instance of the scheduler's class, because `PyroOptim` steps those by their ``optimizer``.

    Args:
        entry: The parameter's share of the optimizer, with a scheduler.
    """

    optimizer: Entry

    def __init__(self, entry: Entry) -> None:
        object.__setattr__(self, "optimizer", entry)

    @property
    def __class__(self) -> type:
        return type(self.optimizer.scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer.scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.optimizer.scheduler, name, value)

    def __reduce__(self) -> tuple:
        return Scheduled, (self.optimizer,)


def face(entry: Entry) -> Entry | Scheduled:
    """Return what ``optim_objs`` has for a parameter: its entry, or that entry's scheduler."""
    return entry if entry.scheduler is None else Scheduled(entry)


class OptimView(PyroOptim):
    """What ``svi.optim`` is: all blocks behind the face of a `pyro.optim.PyroOptim`.

    Args:
        blocks: The block optimizers by the names of their blocks; looked up at each use.
        user: What the user gave as ``optim``.

    Raises:
        OptimizerError: If called with tensors that no block has.

    Example:
        >>> import torch
        >>> from pyro_emvae.optimizers import BlockOptimizer
        >>> theta = torch.ones(2, requires_grad=True)
        >>> view = OptimView({"model": BlockOptimizer.from_user(torch.optim.SGD, {"theta": theta})})
        >>> view.optim_objs[theta].param_groups[0]["lr"] = 0.25
        >>> theta.grad = torch.ones(2)
        >>> view([theta])
        >>> theta.tolist()
        [0.75, 0.75]
    """

    def __init__(self, blocks: Mapping[str, Any], user: Any = None) -> None:
        self.blocks = blocks
        self.user = user if user is not None else next((block.user for block in blocks.values()), None)
        for name in ("pt_optim_constructor", "pt_optim_args", "pt_clip_args"):
            setattr(self, name, getattr(self.user, name, {}))

    @property
    def optim_objs(self) -> dict[Tensor, Entry | Scheduled]:
        """For each parameter its live ``param_groups``, ``state``, ``state_dict()``, ``step()``, or its scheduler."""
        return {param: entry for block in self.blocks.values() for param, entry in block.objects.items()}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Do one update of `params` from their ``.grad``."""
        wanted = set(params)
        if unknown := wanted - self.optim_objs.keys():
            because = "an optimizer is made for a parameter when a step first meets it"
            shapes = f"unknown tensors of shapes {sorted(tuple(p.shape) for p in unknown)}"
            refuse("update parameters", shapes, because, "Call svi.step first.")
        for block in self.blocks.values():
            block.step([p.grad if p in wanted else None for p in block.params])

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the schedulers, as `PyroLRScheduler.step`; without schedulers nothing happens."""
        for block in self.blocks.values():
            block.scheduler_step(*args, **kwargs)

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return the state of all blocks by parameter name."""
        return {name: state for block in self.blocks.values() for name, state in block.get_state().items()}

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state at once; what belongs to no parameter yet waits."""
        names = [set(block.names) for block in self.blocks.values()]
        unknown = state_dict.keys() - set().union(*names)
        for block, mine in zip(self.blocks.values(), names, strict=True):
            block.set_state({n: s for n, s in state_dict.items() if n in mine or n in unknown})
