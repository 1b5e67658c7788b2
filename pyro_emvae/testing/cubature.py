r"""Exact means: all outcomes summed, normal noise integrated by rules that certify themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .replay import Replay

__all__ = ["Mean", "exact_mean"]

MAX_OUTCOMES = 200_000
STEPS = 150  # nodes per uniform coordinate
PRODUCT = (24, 22, 20, 16)  # nodes per coordinate of the product rule, by number of coordinates


@dataclass(frozen=True)
class Mean:
    """A mean gradient by parameter, how it was found (``"enumeration"``, ``"quadrature"``), and from how much."""

    gradients: dict[str, Tensor] = field(repr=False)
    how: str
    outcomes: int


def exact_mean(replay: Replay) -> Mean | None:
    r"""Return the exact mean gradient over every outcome; None if that is out of reach.

    Normal noise is integrated by rules of degree 3, of degree 5, and a product of Gauss-Hermite rules, in turn; uniform
    noise by opposite pairs, and a product of trapezoidal rules in its logit. Each is
    taken twice with different nodes: two turned rules of degree d agree to rounding on polynomials of that degree, and
    on hardly anything else, so one that does not agree is not used.

    Example:
        >>> from pyro_emvae.problems import exact_gradients, two_level
        >>> problem = two_level()
        >>> mean = exact_mean(Replay(problem, "leave_one_out", 3))
        >>> mean
        Mean(how='quadrature', outcomes=73)
        >>> abs(float(mean.gradients["slope"] - exact_gradients(problem)["slope"])) < 1e-12
        True
    """
    outcomes, (dims, uniform) = replay.size(), replay.continuous()
    relaxed = any(row.estimator.traits.draws == "relaxed" for row in replay.loss.table)
    if replay.own_draws or relaxed or outcomes > MAX_OUTCOMES:
        return None
    if dims + uniform == 0:
        noise, weights = replay.outcomes(torch.zeros(1, 0), torch.ones(1, dtype=torch.float64))
        return Mean(replay.mean(noise, weights), "enumeration", len(weights))
    cubature = [(2 * dims, partial(_cubature, dims, 3)), (2 * dims**2 + 1, partial(_cubature, dims, 5))]
    product = [(PRODUCT[dims - 1] ** dims, partial(_product, dims))] if 0 < dims <= len(PRODUCT) else []
    rules = (product if dims <= 2 else cubature + product) if dims else []
    for size, rule in _with_uniform(rules, uniform) if uniform else rules:
        if outcomes * size > MAX_OUTCOMES:
            continue
        one, two = (replay.mean(*replay.outcomes(*rule(turn))) for turn in (0, 1))
        scale = max(1.0, *(float(g.abs().max()) for g in one.values()))
        if all((one[n] - two[n]).abs().max() <= 1e-10 * scale for n in one):
            return Mean(one, "quadrature", round(outcomes * size))
    return None


def _with_uniform(rules: list, dims: int) -> list[tuple[int, Callable]]:
    """Return the rules for uniform noise: alone, or the simplest of them under each rule for the normal noise."""
    if not rules:
        smooth = [(STEPS**dims, partial(_logistic, dims))] if dims <= 2 else []
        return [(2, partial(_opposite, dims)), *smooth]
    return [(2 * size, partial(_under, rule, partial(_opposite, dims))) for size, rule in rules]


def _under(one: Callable, two: Callable, turn: int) -> tuple[Tensor, Tensor]:
    (x, v), (y, w) = one(turn), two(turn)
    nodes = torch.cat([x.repeat_interleave(len(y), 0), y.repeat(len(x), 1)], 1)
    return nodes, (v[:, None] * w).flatten()


def _opposite(dims: int, turn: int) -> tuple[Tensor, Tensor]:
    """Return two opposite nodes in the unit cube, exact for linear functions; another pair on another turn."""
    half = torch.rand(1, dims, generator=torch.Generator().manual_seed(turn), dtype=torch.float64)
    return torch.cat([half, 1 - half]), torch.full((2,), 0.5, dtype=torch.float64)


def _logistic(dims: int, turn: int) -> tuple[Tensor, Tensor]:
    """Return the trapezoidal rule in the logit of each coordinate, spectrally exact for smooth functions of it."""
    count = STEPS - 7 * turn
    t = torch.linspace(-30, 30, count, dtype=torch.float64)
    weights = t.sigmoid() * (-t).sigmoid() * (60 / (count - 1))
    grid = [torch.cartesian_prod(*[x] * dims).reshape(-1, dims) for x in (t.sigmoid(), weights)]
    return grid[0], grid[1].prod(-1)


def _cubature(dims: int, degree: int, turn: int) -> tuple[Tensor, Tensor]:
    r"""Return nodes and weights for $N(0,I)$, exact for polynomials of degree 3 or 5, turned by a random rotation.

    Source: McNamee and Stenger 1967, fully symmetric rules.
    """
    eye = torch.eye(dims, dtype=torch.float64)
    if degree == 3:
        nodes, weights = math.sqrt(dims) * torch.cat([eye, -eye]), eye.new_full((2 * dims,), 0.5 / dims)
    else:
        i, j = torch.triu_indices(dims, dims, 1)
        pairs = [a * eye[i] + b * eye[j] for a, b in itertools.product((1, -1), repeat=2)]
        nodes = math.sqrt(3) * torch.cat([0 * eye[:1], eye, -eye, *pairs])
        weights = eye.new_full((len(nodes),), 1 / 36)
        weights[0], weights[1 : 2 * dims + 1] = 1 + (dims**2 - 7 * dims) / 18, (4 - dims) / 18
    generator = torch.Generator().manual_seed(turn)
    rotation = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64)).Q
    return nodes @ rotation, weights


def _product(dims: int, turn: int) -> tuple[Tensor, Tensor]:
    """Return the product Gauss-Hermite rule; two turns differ in the number of nodes."""
    x, w = np.polynomial.hermite_e.hermegauss(PRODUCT[dims - 1] - 3 * turn)
    grid = [torch.cartesian_prod(*[torch.as_tensor(t)] * dims).reshape(-1, dims) for t in (x, w / w.sum())]
    return grid[0], grid[1].prod(-1)
