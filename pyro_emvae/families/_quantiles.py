r"""Distribution functions and their inverses that torch has not; from scipy, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["special"]


def special(name: str, *arguments: Tensor) -> Tensor:
    r"""Return a function of ``scipy.special``, on the device and in the dtype of its first argument.

    Example:
        >>> special("stdtrit", torch.tensor(10.0), torch.tensor(0.975))
        tensor(2.2281)
    """
    from scipy import special as functions

    arrays = [tensor.detach().double().cpu().numpy() for tensor in arguments]
    return torch.as_tensor(getattr(functions, name)(*arrays), dtype=arguments[0].dtype, device=arguments[0].device)
