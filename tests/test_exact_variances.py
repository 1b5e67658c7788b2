r"""Exact variances: the toy of the RELAX paper by hand, and Mohamed et al. 2020, figures 2 and 3, by quadrature."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_estimators import TRUE, bernoulli_toy, moments
from torch import Tensor
from torch.distributions import constraints

from pyro_emvae import MonteCarloELBO
from pyro_emvae.estimators import measure_valued
from pyro_emvae.particles import quiet
from pyro_emvae.problems import Problem
from pyro_emvae.problems._problem import ProblemTraits
from pyro_emvae.testing import Replay

F64 = torch.float64


def t(*x: float) -> Tensor:
    return torch.tensor(x if len(x) > 1 else x[0], dtype=F64)


# f(b) = (b - t)^2, b ~ Bernoulli(sigmoid(phi)) ---------------------------------------------------------------------


def of_rows(rows: Any) -> tuple[float, float]:
    """Mean and variance of pairs of probability and gradient."""
    p, g = np.array(list(rows)).T
    assert p.sum() == pytest.approx(1.0, abs=1e-14)
    return float(p @ g), float(p @ (g - p @ g) ** 2)


def tuples(p: float, count: int, gradient: Callable) -> tuple[float, float]:
    rows = itertools.product((0.0, 1.0), repeat=count)
    return of_rows((np.prod([p if b else 1 - p for b in row]), gradient(np.array(row))) for row in rows)


def score(p: float, f: Callable, count: int, baseline: float = 0.0) -> tuple[float, float]:
    return tuples(p, count, lambda b: np.mean((f(b) - baseline) * (b - p)))


def leave_one_out(p: float, f: Callable, count: int) -> tuple[float, float]:
    return tuples(p, count, lambda b: np.sum((f(b) - f(b).mean()) * (b - p)) / (count - 1))


def exact_baseline(p: float, f: Callable, count: int) -> tuple[float, float]:
    return score(p, f, count, p * f(1.0) + (1 - p) * f(0.0))


def disarm(p: float, f: Callable, count: int) -> tuple[float, float]:
    """One pair: they differ where u or 1 - u is below the rarer outcome's probability."""
    differ = 2 * min(p, 1 - p)
    return of_rows([(differ, 0.5 * (f(1.0) - f(0.0)) * max(p, 1 - p)), (1 - differ, 0.0)])


def arm(p: float, f: Callable, count: int) -> tuple[float, float]:
    r"""$(f(\tilde b)-f(b))(u-1/2)$: its integrals over the u at which the pair differs, at either end."""
    low, slope = min(p, 1 - p), f(1.0) - f(0.0)
    mean, square = (2 * abs(slope) ** k * (0.5 ** (k + 1) - (0.5 - low) ** (k + 1)) / (k + 1) for k in (1, 2))
    return np.sign(slope) * mean, square - mean**2


def straight_through(p: float, f: Callable, count: int) -> tuple[float, float]:
    return tuples(p, count, lambda b: np.mean((f(b + 0.5) - f(b - 0.5)) * p * (1 - p)))


def reinmax(p: float, f: Callable, count: int) -> tuple[float, float]:
    return tuples(p, count, lambda b: np.mean((f(b + 0.5) - f(b - 0.5)) * np.abs(b - p) / 2))


def no_variance(p: float, f: Callable, count: int) -> tuple[float, float]:
    return p * (1 - p) * (f(1.0) - f(0.0)), 0.0


ROWS = {  # the estimator and K: by hand, and as published, at the parameters of TRUE
    ("score", 1): (score, (0.0156251, 0.00652223, 0.00482719)),
    ("score", 2): (score, (0.00781256, 0.00326112, 0.0024136)),
    ("decaying_average", 1): (exact_baseline, (0.0, 2.43596e-7, 6.0899e-4)),
    ("leave_one_out", 2): (leave_one_out, (2.5e-7, 1.65893e-7, 4.14731e-4)),
    ("leave_one_out", 4): (leave_one_out, (4.16667e-8, 6.82481e-8, 1.7062e-4)),
    ("arm", 2): (arm, (8.33333e-8, 1.4199e-7, 3.54976e-4)),
    ("disarm", 2): (disarm, (0.0, 1.40861e-7, 3.52153e-4)),
    ("arms", 2): (disarm, (0.0, 1.40861e-7, 3.52153e-4)),
    ("straight_through", 1): (straight_through, (0.0625, 0.00462965, 0.00462965)),
    ("reinmax", 1): (reinmax, (0.0625, 0.0261685, 0.0224025)),
    ("enumerated", 1): (no_variance, (0.0, 0.0, 0.0)),
    ("measure_valued", 1): (no_variance, (0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("where", TRUE, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_table_of_the_toy(row, where):
    """To a millionth by hand; a published figure to its digits."""
    (name, count), (by_hand, published) = row, ROWS[row]
    p = 1 / (1 + np.exp(-where[1]))
    mean, variance = by_hand(p, lambda b: (b - where[0]) ** 2, count)
    assert variance == pytest.approx(published[list(TRUE).index(where)], rel=5e-6, abs=1e-20)
    state = None
    if name == "decaying_average":
        average = p * (1 - where[0]) ** 2 + (1 - p) * where[0] ** 2
        state = {"b": {"average": t(average), "weight": t(1.0)}}
    objective = "elbo_analytic_kl" if name in ("reinmax", "straight_through") else "elbo"  # of f alone, no prior
    replay = Replay(bernoulli_toy(*where), name, count, state, objective)
    gauss = t(0.5 - 12**-0.5, 0.5 + 12**-0.5)[:, None] if replay.continuous() == (0, 1) else None
    found = moments(replay, gauss, None if gauss is None else t(0.5, 0.5))
    assert found == pytest.approx((mean, variance), rel=1e-6, abs=1e-15)
    right = TRUE[where] + (0.0800 if name == "straight_through" and where[1] else 0.0)
    assert found[0] == pytest.approx(right, rel=1e-5 if name != "straight_through" else 5e-3)


# f of z ~ N(1, 1), by mean and standard deviation -------------------------------------------------------------------

INTEGRANDS = {
    "square": lambda z, k: (z - k) ** 2,
    "exp": lambda z, k: (-k * z**2).exp(),
    "cos": lambda z, k: (k * z).cos(),
}
WAYS = ("score", "best baseline", "pathwise", "measure_valued")
PUBLISHED = {  # by mean, by standard deviation, in the order of WAYS
    ("square", -3.0): ((495, 134, 4, 17.49), (1546, 664, 72, 68)),
    ("square", 0.0): ((30, 14, 4, 1.093), (136, 64, 12, 8)),
    ("square", 3.0): ((87, 38, 4, 4.372), (346, 184, 24, 20)),
    ("exp", 0.1): ((0.5635, 0.04047, 0.01629, 0.002509), (0.9354, 0.141, 0.02777, 0.02197)),
    ("exp", 1.0): ((0.1758, 0.07222, 0.2117, 0.01257), (0.1767, 0.1128, 0.1757, 0.07066)),
    ("exp", 10.0): ((0.07694, 0.0602, 0.9416, 0.02066), (0.009035, 0.008739, 0.892, 0.1167)),
    ("cos", 0.5): ((0.4552, 0.1179, 0.03928, 0.008275), (0.7987, 0.4601, 0.08751, 0.06527)),
    ("cos", 1.0): ((0.324, 0.324, 0.2677, 0.028), (0.8363, 0.7826, 0.3081, 0.2026)),
    ("cos", 5.0): ((0.5, 0.5, 12.5, 0.2957), (1, 1, 12.5, 1)),
}


def nodes_of_the_normal() -> tuple[Tensor, Tensor]:
    e = torch.linspace(-10, 10, 4001, dtype=F64)
    return e[:, None], dist.Normal(t(0.0), 1.0).log_prob(e).exp() * 0.005


def on_a_line(f: Callable) -> Problem:
    """The model's density is q(z) exp(f(z)) with q held, so that the signal is f."""

    def model() -> None:
        pyro.factor("f", f(pyro.sample("z", dist.Normal(t(1.0), 1.0))))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", t(1.0).clone), pyro.param("scale", t(1.0).clone)))

    return Problem(
        name="on_a_line",
        model=model,
        guide=guide,
        args=(),
        sites=("z",),
        model_params=(),
        guide_params=("loc", "scale"),
        params=MappingProxyType({"loc": t(1.0), "scale": t(1.0)}),
        constraints=MappingProxyType(dict.fromkeys(("loc", "scale"), constraints.real)),
        max_plate_nesting=0,
        traits=ProblemTraits(),
    )


def weighed(gradient: Tensor, weights: Tensor) -> tuple[float, float]:
    mean = (weights * gradient).sum()
    return float(mean), float((weights * (gradient - mean) ** 2).sum())


def by_draws(f: Callable, estimator: str, state: dict | None = None) -> dict[str, tuple[float, float]]:
    replay = Replay(on_a_line(f), estimator, 1, state)
    noise, weights = replay.outcomes(*nodes_of_the_normal())
    return {name: weighed(g, weights) for name, g in replay.gradients(noise)[0].items()}


def best_baseline(f: Callable) -> dict[str, tuple[float, float]]:
    r"""Per parameter with score s, $E[fs^2]/E[s^2]$, as a running average that has come to it."""
    (e,), weights = nodes_of_the_normal()[0].T, nodes_of_the_normal()[1]
    found = {}
    for name, s in (("loc", e), ("scale", e**2 - 1)):
        average = (weights * f(1 + e) * s**2).sum() / (weights * s**2).sum()
        state = {"z": {"average": average, "weight": t(1.0)}}
        found[name] = by_draws(f, "decaying_average", state)[name]
    return found


class Dictated:
    """Torch, whose random numbers are given, as the pairs of `NormalPair` ask for them."""

    def __init__(self, *uniform: Tensor, maxwell: Tensor) -> None:
        self.uniform, self.maxwell = list(uniform), maxwell

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def rand_like(self, like: Tensor) -> Tensor:
        return self.uniform.pop(0).reshape(like.shape)

    def randn(self, shape: tuple, **options: Any) -> Tensor:
        return torch.stack([self.maxwell.abs(), 0 * self.maxwell, 0 * self.maxwell]).reshape(shape)

    def randn_like(self, like: Tensor) -> Tensor:
        return self.maxwell.reshape(like.shape)


def by_pairs(monkeypatch, f: Callable) -> dict[str, tuple[float, float]]:
    """One estimate per element of a plate, each with random numbers of its own on a grid."""
    r, m = torch.linspace(0, 8, 3201, dtype=F64), torch.linspace(-10, 10, 801, dtype=F64)
    u, by_u = (torch.as_tensor(x) / 2 for x in np.polynomial.legendre.leggauss(32))
    grid = torch.cartesian_prod(m, u + 0.5).T
    maxwell = (m**2 * dist.Normal(t(0.0), 1.0).log_prob(m).exp() * 0.025)[:, None] * by_u
    half = torch.full((), 0.5, dtype=F64)
    cases = {
        "loc": ((half.expand(len(r)), -torch.expm1(-(r**2) / 2), 1 + 0 * r), r * (-(r**2) / 2).exp() * 0.0025),
        "scale": ((grid[1], half.expand(grid.shape[1]), grid[0]), maxwell.flatten()),
    }
    found = {}
    for name, ((uniform, rayleigh, normals), weights) in cases.items():
        leaves = {n: torch.ones(len(weights), dtype=F64) for n in ("loc", "scale")}

        def model() -> None:
            with pyro.plate("nodes", len(weights)):  # noqa: B023
                pyro.factor("f", f(pyro.sample("z", dist.Normal(t(1.0), 1.0))))

        def guide() -> None:
            with pyro.plate("nodes", len(weights)):  # noqa: B023
                pyro.sample("z", dist.Normal(*(pyro.param(n, leaf) for n, leaf in leaves.items())))  # noqa: B023

        pyro.clear_param_store()
        loss = MonteCarloELBO(1, 1, vectorize_particles=True, estimator="measure_valued")
        loss.loss(model, guide)
        with quiet(seed=0), monkeypatch.context() as patch:
            patch.setattr(measure_valued, "torch", Dictated(uniform, rayleigh, maxwell=normals))
            evaluation = loss.evaluate(model, guide, (), {})
        (gradient,) = torch.autograd.grad(evaluation.surrogate, pyro.param(name).unconstrained())
        found[name] = weighed(gradient, weights)
    return found


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_figures_of_mohamed_et_al(monkeypatch, case):
    """Every estimator of their figures has the published variance to a hundredth, and all have one mean."""

    def f(z: Tensor) -> Tensor:
        return INTEGRANDS[case[0]](z, case[1])

    found = SimpleNamespace(
        score=by_draws(f, "score"),
        pathwise=by_draws(f, "sticking_the_landing"),  # plain pathwise has the paths of log q, which is held here
        measure_valued=by_pairs(monkeypatch, f),
    )
    rows = [found.score, best_baseline(f), found.pathwise, found.measure_valued]
    for name, published in zip(("loc", "scale"), PUBLISHED[case], strict=True):
        for way, row, variance in zip(WAYS, rows, published, strict=True):
            mean, observed = row[name]
            assert mean == pytest.approx(rows[0][name][0], rel=1e-6, abs=1e-6), f"{way}: mean by {name}"
            assert observed == pytest.approx(variance, rel=0.01), f"{way}: variance by {name}"
