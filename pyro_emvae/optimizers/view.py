r"""What ``svi.optim`` is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pyro.optim import PyroOptim
from torch import Tensor

from .entry import Entry, refuse

__all__ = ["OptimView"]


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
    def optim_objs(self) -> dict[Tensor, Entry]:
        """For each parameter its live ``param_groups``, ``state``, ``state_dict()``, ``zero_grad()``."""
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
        for block in self.blocks.values():
            block.set_state(state_dict)
