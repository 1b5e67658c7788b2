r"""What Pyro's distributions have in common."""

from __future__ import annotations

from typing import Any

__all__ = ["base_of"]


def base_of(fn: Any) -> Any:
    """Return the distribution inside its reinterpreted, expanded or masked forms; a transformed one is its own.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> base_of(dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False))
        Normal(loc: torch.Size([3]), scale: torch.Size([3]))
    """
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn
