r"""The one door for statistics in tests: a test of a mean that says when it has no power."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail

__all__ = ["Underpowered", "assert_mean", "coordinate", "needed"]


class Underpowered(EmvaeError):
    """A statistical test that could not have seen what it looks for."""


def assert_mean(
    samples: Tensor, expected: Any, *, detect: Any, alpha: float = 1e-6, beta: float = 1e-2, what: str = "mean"
) -> None:
    r"""Assert that independent samples have the expected mean, if a wrong one would have been found.

    With $z_a=\Phi^{-1}(1-a)$ and standard error $s/\sqrt n$ it fails beyond $z_{\alpha/2}\,s/\sqrt n$.

    Args:
        samples: Draws along dim 0; the other dims are coordinates.
        expected: Their mean, or something that broadcasts to it.
        detect: The deviation that has to be found with probability 1 - beta, in the samples' unit.
        alpha: Probability of a false alarm, for all coordinates together.
        beta: Probability to miss a deviation of `detect`, per coordinate.
        what: A name for the message.

    Coordinates without variance have to equal the expectation to rounding.

    Raises:
        AssertionError: Naming the worst coordinate, what was observed and what was expected.
        Underpowered: If $(z_{\alpha/2}+z_\beta)\,s/\sqrt n$ exceeds `detect`, or $n<10\,\mathrm{skew}^2z_{\alpha/2}^2$
            (the mean is then not normal so far out).

    Example:
        >>> samples = torch.tensor([0.9, 1.1] * 5000, dtype=torch.float64)
        >>> assert_mean(samples, 1.0, detect=0.02)
        >>> assert_mean(samples, 1.02, detect=0.02)
        Traceback (most recent call last):
        AssertionError: mean: observed 1 with standard error 0.001, expected 1.02
    """
    shape = samples.shape[1:]
    x, target, size = _flatten(samples, expected)
    error = x.std(0) / math.sqrt(len(x))
    flat = _is_flat(samples, x, size)
    enough = _needed(x, torch.as_tensor(detect).to(x).broadcast_to(shape).flatten(), alpha, beta)
    lacking = torch.where(flat, 0.0, enough / len(x))
    i = int(lacking.argmax())
    if lacking[i] > 1:
        fail(
            Underpowered,
            "assert_mean",
            f"judge {what}{coordinate(i, shape)}",
            got=f"{len(x)} samples with standard error {error[i]:.3g}",
            because=f"to find a deviation of {detect} and for a normal mean it takes {int(enough[i]) + 1}",
            fix="Draw more samples, or compare by paired differences.",
        )
    z = NormalDist().inv_cdf(1 - alpha / x.shape[1] / 2)
    limit = torch.where(flat, 100 * _eps(samples) * size, z * error)
    off = (x.mean(0) - target).abs()
    i = int((off - limit).argmax())
    assert off[i] <= limit[i], (
        f"{what}{coordinate(i, shape)}: observed {x.mean(0)[i]:.8g} with standard error {error[i]:.3g}, "
        f"expected {target[i]:.8g}"
    )


def needed(samples: Tensor, detect: Any, alpha: float = 1e-6, beta: float = 1e-2) -> int:
    """Return how many samples like these `assert_mean` needs.

    Example:
        >>> needed(torch.tensor([-1.0, 1.0] * 50), 0.1)
        5263
    """
    x, _, size = _flatten(samples, 0.0)
    enough = _needed(x, torch.as_tensor(detect).to(x).broadcast_to(samples.shape[1:]).flatten(), alpha, beta)
    return int(torch.where(_is_flat(samples, x, size), 0.0, enough).max()) + 1


def _needed(x: Tensor, detect: Tensor, alpha: float, beta: float) -> Tensor:
    z, z_beta = NormalDist().inv_cdf(1 - alpha / x.shape[1] / 2), NormalDist().inv_cdf(1 - beta)
    s = x.std(0)
    skew = ((x - x.mean(0)) ** 3).mean(0) / s.clamp(min=torch.finfo(x.dtype).tiny ** (1 / 3)) ** 3
    return ((z + z_beta) * s / detect).square().maximum(10 * skew**2 * z**2)


def _flatten(samples: Tensor, expected: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = samples.detach().reshape(len(samples), -1).double()
    target = torch.as_tensor(expected).detach().to(x).broadcast_to(samples.shape[1:]).flatten()
    return x, target, x.abs().amax(0).maximum(target.abs())


def _is_flat(samples: Tensor, x: Tensor, size: Tensor) -> Tensor:
    return x.std(0) <= 8 * _eps(samples) * size


def _eps(samples: Tensor) -> float:
    return torch.finfo(samples.dtype if samples.is_floating_point() else torch.float64).eps


def coordinate(index: int, shape: torch.Size) -> str:
    """Return where a flat index lies, as in ``[1, 2]``; nothing for a scalar."""
    where = torch.unravel_index(torch.tensor(index), shape) if shape else ()
    return str([int(i) for i in where]) if shape else ""
