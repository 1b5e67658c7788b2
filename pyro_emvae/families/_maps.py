r"""From numbers that may be anything to valid ones; differentiable and finite, wherever the context goes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .._checks import EmvaeError, fail

__all__ = ["between", "check_setting", "flat", "limited", "parts", "raw_of", "raw_scale", "scale", "unlimited"]


def check_setting(family: Any, name: str, low: float = 0.0, high: float = math.inf) -> None:
    """Raise `EmvaeError` if a setting of a family is not a number between its bounds."""
    value = getattr(family, name)
    if isinstance(value, bool) or not isinstance(value, Real) or not low < value < high:
        fail(
            EmvaeError,
            type(family).__name__,
            f"start at its {name}",
            got=f"{name}={value!r}",
            because=f"it has to be a number above {low:g} and below {high:g}",
            fix=f"Write {name}={min(max(1.0, 2 * low), high / 2):g}.",
        )


def parts(context: Tensor, event_shape: torch.Size, count: int) -> tuple[Tensor, ...]:
    """Return a context's equal parts, one after another, each in the shape of the value."""
    chunks = context.chunk(count, -1)
    return chunks if len(event_shape) == 1 else tuple(c.reshape(c.shape[:-1] + event_shape) for c in chunks)


def flat(value: Tensor, event_shape: torch.Size) -> Tensor:
    """Return values of a shape as vectors."""
    return value.reshape(*value.shape[: value.dim() - len(event_shape)], math.prod(event_shape))


def limited(x: Tensor, bound: float) -> Tensor:
    r"""Return $x/\sqrt{1+(x/B)^2}$, which is about x within the bound B and never leaves it.

    Its slope falls like $|x|^{-3}$ and no faster, so that a context that went astray can come back.

    Example:
        >>> limited(torch.tensor([0.5, 1e30]), 40.0)
        tensor([ 0.5000, 40.0000])
    """
    return bound * (x / torch.hypot(x, torch.full_like(x, bound)))


def unlimited(y: Tensor, bound: float) -> Tensor:
    """Return the x of which `limited` makes y, or as near as can be."""
    y = (y / bound).clamp(-0.99, 0.99)
    return bound * y / (1 - y**2).sqrt()


def scale(raw: Tensor, init: float) -> Tensor:
    r"""Return $\log(1+e^{b+c})$, positive, with c such that b = 0 means `init`.

    Linear for large b, so that a wild b does not overflow as $e^b$ would; never below 3e-8 of `init` in float32 and
    2e-62 in float64, so that densities far from a narrow distribution still have finite gradients.
    """
    offset, floor = init + math.log(-math.expm1(-init)), init * torch.finfo(raw.dtype).tiny ** 0.2
    return softplus(raw + offset) + floor


def raw_scale(y: Tensor, init: float) -> Tensor:
    """Return the b of which `scale` makes y; NaN where there is none.

    Example:
        >>> raw_scale(scale(torch.tensor([-3.0, 1.0, 50.0]), 0.1), 0.1)
        tensor([-3.0000,  1.0000, 50.0000])
    """
    offset, floor = init + math.log(-math.expm1(-init)), init * torch.finfo(y.dtype).tiny ** 0.2
    x = y - floor
    return x + (-torch.expm1(-x)).log() - offset


def between(raw: Tensor, low: float, high: float, init: float) -> Tensor:
    r"""Return a positive number within its bounds, about $\text{init}\cdot e^{b}$ where they are far.

    $$y=e^{m+h\,u/\sqrt{1+u^2}},\qquad u=u_0+b/(h\,s_0),\qquad m\pm h=\log\text{high},\log\text{low},$$

    with $u_0$ such that b = 0 means `init`, and $s_0$ such that the slope of log y is 1 there.

    Example:
        >>> between(torch.tensor([-1e9, 0.0, 0.01, 1e9]), 0.1, 1e4, 2.0)
        tensor([1.0000e-01, 2.0000e+00, 2.0201e+00, 1.0000e+04])
    """
    middle, half, start = _logarithmic(low, high, init)
    return (middle + half * limited(raw / (half * (1 - start**2) ** 1.5) + start / math.sqrt(1 - start**2), 1.0)).exp()


def raw_of(y: Tensor, low: float, high: float, init: float) -> Tensor:
    """Return the b of which `between` makes y, or as near as can be."""
    middle, half, start = _logarithmic(low, high, init)
    u = unlimited((y.log() - middle) / half, 1.0)
    return (u - start / math.sqrt(1 - start**2)) * half * (1 - start**2) ** 1.5


def _logarithmic(low: float, high: float, init: float) -> tuple[float, float, float]:
    """Return middle and half length of the bounds on a logarithmic scale, and the place of `init` from -1 to 1."""
    middle, half = math.log(low * high) / 2, math.log(high / low) / 2
    return middle, half, (math.log(init) - middle) / half
