r"""Inverse distribution functions that torch has not; from scipy, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse"]


def inverse(name: str, level: Tensor, *parameters: Tensor) -> Tensor:
    r"""Return an inverse distribution function of ``scipy.special``, on the device and in the dtype of its parameters.

    Args:
        name: ``"stdtrit"``, ``"gammaincinv"`` or ``"betaincinv"``, whose last argument is the level.
        level: Probabilities.
        parameters: What comes before it.

    Example:
        >>> inverse("stdtrit", torch.tensor(0.975), torch.tensor(10.0))
        tensor(2.2281)
    """
    from scipy import special

    arrays = [tensor.detach().double().cpu().numpy() for tensor in (*parameters, level)]
    return torch.as_tensor(getattr(special, name)(*arrays), dtype=parameters[0].dtype, device=parameters[0].device)
