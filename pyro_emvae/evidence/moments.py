r"""Moments of log weights and weights, one chunk of particles after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..psis import Smoothed, fit_tail, tail_size

__all__ = ["Moments"]

MAX_TAIL_ELEMENTS = 40_000_000


class Moments:
    r"""Running moments of log weights l and of $u=e^{l-m}$, m the largest l so far, and the largest l.

    Nothing is kept per particle but the tail that k-hat needs. Sums of squares are taken around running means, so that
    equal weights have a variance of exactly zero.

    Args:
        num_particles: K, to know how long the tail is.

    Source: Chan, Golub and LeVeque 1983, for merging moments of chunks. Differs: the shift m moves along.

    Example:
        >>> import torch
        >>> moments = Moments(4)
        >>> moments.update(torch.tensor([0.0, 1.0]), eps=1e-7)
        >>> moments.update(torch.tensor([2.0, 3.0]), eps=1e-7)
        >>> print(f"{moments.mean:.2f} {moments.log_mean_exp:.4f} {moments.ess:.3f}")
        1.50 2.0539 2.086
    """

    def __init__(self, num_particles: int) -> None:
        self.count = 0
        self.tail = min(tail_size(num_particles) + 1, num_particles)
        self.eps = 0.0

    def update(self, log_weight: Tensor, *, eps: float) -> None:
        """Take in a chunk ``(particles, *plates)``; `eps` is the machine epsilon of what it was computed in."""
        new = log_weight.double()
        if not self.count:
            self._begin(new)
        self.eps = max(self.eps, eps)
        shift = torch.maximum(self.shift, new.amax(0))
        anchor = shift.masked_fill(torch.isneginf(shift), 0.0)
        self._rescale(torch.exp(self.shift - anchor))
        self.shift = shift
        self._merge(new, torch.exp(new - anchor))
        if self.tail:
            top = torch.cat([self.top, new])
            self.top = top.topk(min(self.tail, len(top)), dim=0).values

    def _begin(self, new: Tensor) -> None:
        zero = new.new_zeros(new.shape[1:])
        self.shape = zero.shape
        self.shift = torch.full_like(zero, -math.inf)
        self.mean = self.mean_u = self.squares = self.squares_u = self.products = zero
        self.tail = self.tail if self.tail * zero.numel() <= MAX_TAIL_ELEMENTS else 0
        self.top = new[:0]

    def _rescale(self, factor: Tensor) -> None:
        self.mean_u = self.mean_u * factor
        self.squares_u = self.squares_u * factor**2
        self.products = self.products * factor

    def _merge(self, new: Tensor, u: Tensor) -> None:
        mean, mean_u = new.mean(0), u.mean(0)
        total = self.count + len(new)
        share, pairs = len(new) / total, self.count * len(new) / total
        step, step_u = mean - self.mean, mean_u - self.mean_u
        self.squares = self.squares + (new - mean).square().sum(0) + step**2 * pairs
        self.squares_u = self.squares_u + (u - mean_u).square().sum(0) + step_u**2 * pairs
        self.products = self.products + ((new - mean) * (u - mean_u)).sum(0) + step * step_u * pairs
        self.mean = self.mean * (1 - share) + mean * share  # stays -inf once it is
        self.mean_u = self.mean_u + step_u * share
        self.count = total

    @property
    def mean_variance(self) -> Tensor:
        """Variance of `mean`; NaN from one particle."""
        return self.squares / self._freedom / self.count

    @property
    def log_mean_exp(self) -> Tensor:
        """The log of the mean weight."""
        return self.shift + self.mean_u.log()

    @property
    def log_mean_exp_variance(self) -> Tensor:
        """Variance of `log_mean_exp` by the delta method: the weights' relative variance over K."""
        return self.squares_u / self._freedom / self.mean_u**2 / self.count

    @property
    def gap_variance(self) -> Tensor:
        """Variance of ``log_mean_exp - mean`` by the delta method, the two being of the same draws."""
        covariance = self.products / self._freedom / self.mean_u / self.count
        return (self.mean_variance + self.log_mean_exp_variance - 2 * covariance).clamp(min=0)

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights, between 1 and K."""
        return self.count / (1 + self.squares_u / self.count / self.mean_u**2)

    @property
    def _freedom(self) -> float:
        return self.count - 1 if self.count > 1 else math.nan

    def tail_index(self) -> Smoothed | None:
        """Return k-hat and its standard error, of this shape; None where the tail was too large to be kept."""
        if not self.tail:
            return None
        fit = fit_tail(self.top.flatten(1).movedim(0, -1) if self.shape else self.top.unsqueeze(0), eps=self.eps)
        return Smoothed(fit.log_weights, fit.khat.reshape(self.shape), fit.khat_se.reshape(self.shape))
