r"""Pareto smoothed importance sampling: fit the tail of the weights, smooth it, and say how heavy it is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import DataError, fail

__all__ = ["Smoothed", "fit_generalized_pareto", "fit_tail", "khat_limit", "psis", "tail_size"]

LOG_TINY = math.log(torch.finfo(torch.float64).tiny)
MIN_TAIL = 5
PRIOR_SCALE, PRIOR_DRAWS, PRIOR_SHAPE = 3.0, 10.0, 0.5
MAX_ELEMENTS = 10_000_000


class Smoothed(NamedTuple):
    """Smoothed log weights in the order that they were given in, the tail index k-hat, and its standard error."""

    log_weights: Tensor
    khat: Tensor
    khat_se: Tensor


def psis(log_weights: Any, *, dim: int = -1, normalize: bool = True) -> Smoothed:
    r"""Smooth the largest importance weights and estimate the tail index.

    The excesses of the $M=\lceil\min(S/5,3\sqrt S)\rceil$ largest of S weights over the next one are fitted by a
    generalized Pareto distribution with shape $\hat k$, and replaced by its quantiles. The weights' moments of order
    below $1/\hat k$ exist.

    When to use: to judge a guide as a proposal. Below `khat_limit` (at most 0.7) averages over the weights can be
    trusted, above it neither they nor their standard errors can.

    Args:
        log_weights: log p - log q of independent draws, up to a constant; a tensor or an array. -inf is a weight of 0.
        dim: The dim of the draws; all others are a batch.
        normalize: Let the smoothed weights sum to one.

    Returns:
        ``(log_weights, khat, khat_se)``. k-hat is -inf where all of the tail's weights are equal to rounding, as they
        are if the guide is exact, and inf where fewer than five draws lie in the tail. Its standard error is that of
        the maximum likelihood estimate, $(1+\hat k)/\sqrt M$, shrunk like $\hat k$ itself.

    Shape: ``log_weights``: the input's; ``khat, khat_se``: the input's without `dim`.

    Raises:
        DataError: If a log weight is NaN or +inf, or all of them are -inf.

    Source: Vehtari et al. 2024, "Pareto smoothed importance sampling", JMLR 25(72); the fit: Zhang and Stephens 2009.
    Equal to `arviz.psislw` 0.23, which however returns inf for equal weights.

    Example:
        >>> import torch
        >>> draws = -(torch.arange(5000, dtype=torch.float64) + 0.5).div(5000).log()  # of an exponential of mean 1,
        >>> log_weights = draws - draws / 2  # as a proposal for one of mean 2: the weights' tail index is 1/2
        >>> f"{psis(log_weights).khat:.2f}"
        '0.50'
        >>> psis(torch.zeros(100)).khat
        tensor(-inf)
    """
    given = torch.as_tensor(log_weights)
    if given.dim() == 0 or not given.is_floating_point() or not given.numel():
        _refuse(f"shape {tuple(given.shape)} and {given.dtype}", "weights are real numbers along a dim of draws")
    rows = given.movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1]).double()
    peak = flat.amax(-1)
    if not bool(torch.isfinite(peak).all()):  # amax passes NaN on
        _refuse(f"a largest log weight of {float(peak[~torch.isfinite(peak)][0])}", "every weight has to be finite")
    top, where = flat.topk(min(tail_size(flat.shape[-1]) + 1, flat.shape[-1]))
    tail = fit_tail(top, eps=torch.finfo(given.dtype).eps)
    smoothed = flat.scatter(-1, where, tail.log_weights)
    if normalize:
        smoothed = smoothed - smoothed.logsumexp(-1, keepdim=True)
    batch = rows.shape[:-1]
    return Smoothed(
        smoothed.reshape(rows.shape).movedim(-1, dim).to(given.dtype),
        tail.khat.reshape(batch).to(given.dtype),
        tail.khat_se.reshape(batch).to(given.dtype),
    )


def tail_size(num_draws: int) -> int:
    """Return M, the number of weights that are smoothed.

    Example:
        >>> tail_size(1000), tail_size(20)
        (95, 4)
    """
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def khat_limit(num_draws: int) -> float:
    r"""Return the k-hat up to which an average over so many weights can be trusted: $\min(1-1/\log_{10}S, 0.7)$.

    Source: Vehtari et al. 2024, "Pareto smoothed importance sampling".

    Example:
        >>> print(khat_limit(100), khat_limit(5000))
        0.5 0.7
    """
    return min(1 - 1 / math.log10(max(num_draws, 2)), 0.7)


def fit_tail(top: Tensor, *, eps: float) -> Smoothed:
    r"""Smooth the largest log weights.

    Args:
        top: The M + 1 largest log weights in descending order, the largest finite; the last one is the cutoff.
        eps: Machine epsilon of the arithmetic that they were computed in, for what counts as equal.

    Shape: ``top``: (rows, M + 1) -> log_weights (rows, M + 1); khat, khat_se (rows,).
    """
    top = top.double()
    shifted = top - top[:, :1]
    cutoff = shifted[:, -1:].clamp(min=LOG_TINY)
    count = (shifted > cutoff).sum(-1)
    smoothed, khat = top.clone(), top.new_full((len(top),), math.inf)
    khat_se = khat.clone()
    for size in count.unique().tolist():
        if size < MIN_TAIL:
            continue
        grid = size * _grid_size(size)
        for rows in (count == size).nonzero().squeeze(-1).split(max(1, MAX_ELEMENTS // grid)):
            quantiles, khat[rows] = _smooth(shifted[rows, :size].flip(-1), cutoff[rows].exp())
            smoothed[rows, :size] = quantiles.flip(-1) + top[rows, :1]
            khat_se[rows] = (1 + khat[rows]).clamp(min=0.5) * math.sqrt(size) / (size + PRIOR_DRAWS)
    spread = top[:, 0] - top[:, -1]
    equal = (spread <= (64 * eps * top[:, 0].abs()).clamp(min=1e-6)) & (top.shape[-1] > 1)
    return Smoothed(
        torch.where(equal.unsqueeze(-1), top, smoothed),
        khat.masked_fill(equal, -math.inf),
        khat_se.masked_fill(equal, 0.0),
    )


def fit_generalized_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return shape k and scale $\sigma$ of generalized Pareto distributions, the posterior mean of Zhang and Stephens.

    Args:
        excess: Positive numbers in ascending order along the last dim, in float64.

    Shape: (..., n) -> (...), (...).

    Source: Zhang and Stephens 2009, with the weak prior on k of Vehtari et al. 2024 (ten draws with k = 1/2).
    `pyro.ops.stats.fit_generalized_pareto` is the same for one row.

    Example:
        >>> import torch
        >>> uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> k, sigma = fit_generalized_pareto((1 - uniform) ** -0.5 - 1)
        >>> f"{k:.2f} {sigma:.2f}"
        '0.50 0.50'
    """
    size = excess.shape[-1]
    grid = _grid_size(size)
    steps = 1 - torch.sqrt(grid / (torch.arange(1, grid + 1).to(excess) - 0.5))
    quartile = excess[..., int(size / 4 + 0.5) - 1]
    ratio = steps / (PRIOR_SCALE * quartile.unsqueeze(-1)) + 1 / excess[..., -1:]  # candidates for k / sigma
    shape = _shape(ratio, excess)
    log_profile = size * (torch.log(-ratio / shape) - shape - 1)
    ratio = (ratio * log_profile.softmax(-1)).sum(-1)
    shape = _shape(ratio.unsqueeze(-1), excess).squeeze(-1)
    sigma = -shape / ratio
    return (size * shape + PRIOR_DRAWS * PRIOR_SHAPE) / (size + PRIOR_DRAWS), sigma


def _shape(ratio: Tensor, excess: Tensor) -> Tensor:
    return torch.log1p(-ratio.unsqueeze(-1) * excess.unsqueeze(-2)).mean(-1)


def _grid_size(size: int) -> int:
    return 30 + int(math.sqrt(size))


def _smooth(tail: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tail's expected order statistics, as logarithms of at most 0, and k; unfitted where the fit fails."""
    size = tail.shape[-1]
    shape, sigma = fit_generalized_pareto(tail.exp() - cutoff)
    log_survival = torch.log1p(-(torch.arange(size).to(tail) + 0.5) / size)
    k, scale = shape.unsqueeze(-1), sigma.unsqueeze(-1)
    flat = k.abs() < torch.finfo(k.dtype).eps
    quantiles = scale * torch.where(flat, -log_survival, torch.expm1(-k * log_survival) / k.masked_fill(flat, 1.0))
    smoothed = torch.log(quantiles + cutoff).clamp(max=0.0)
    failed = ~(torch.isfinite(shape) & (sigma > 0))
    smoothed = torch.where(failed.unsqueeze(-1), tail, smoothed)
    return smoothed, shape.masked_fill(~torch.isfinite(shape), math.inf)


def _refuse(got: str, because: str) -> None:
    fail(
        DataError,
        "psis",
        "smooth these weights",
        got=got,
        because=because,
        fix="Pass log p - log q of draws at which both are finite.",
    )
