r"""How far a stochastic run's estimate may lie from where it would settle: its Monte Carlo error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._checks import EmvaeError, fail, positive_int
from ..driver import Fit

__all__ = ["MonteCarloErrors", "batch_means", "monte_carlo_error"]

MIN_PER_BATCH = 3
FEW = 3.0


@dataclass(frozen=True, eq=False)
class MonteCarloErrors:
    r"""Means of late iterates with their Monte Carlo errors; prints as a table.

    Args:
        since: First iterate of the mean; 0 is the initial value, t the value after t iterations.
        num_iterates: Iterates in the mean.
        estimate: Means by parameter, in its shape and units.
        error: Standard errors of these means.
        effective: How many independent iterates would have an error as large.
        drift: Difference of the means of the last and the first half, over its own standard error.
        note: What makes the errors doubtful; empty if nothing was seen.
    """

    since: int
    num_iterates: int
    estimate: dict[str, np.ndarray] = field(repr=False)
    error: dict[str, np.ndarray] = field(repr=False)
    effective: dict[str, np.ndarray] = field(repr=False)
    drift: dict[str, np.ndarray] = field(repr=False)
    note: str = ""

    def __getitem__(self, name: str) -> np.ndarray:
        """Return one parameter's Monte Carlo errors, in its shape."""
        return self.error[name]

    def __repr__(self) -> str:
        lines = [f"{'parameter':<20} {'mean':>12} {'MC error':>12} {'effective':>10} {'drift':>7}"]
        for name, mean in self.estimate.items():
            for index in np.ndindex(mean.shape):
                label = name + (str(list(index)) if index else "")
                cells = (each[name][index] for each in (self.estimate, self.error, self.effective, self.drift))
                lines.append("{:<20} {:>12.5g} {:>12.2g} {:>10.1f} {:>7.1f}".format(label, *cells))
        last = f"{self.num_iterates} iterates from {self.since} on" + (f"; {self.note}" if self.note else "")
        return "\n".join([*lines, last])


def monte_carlo_error(fit: Fit, since: int | None = None, num_batches: int = 10) -> MonteCarloErrors:
    r"""Mean of the late iterates of a stochastic run, and the standard error that draws and minibatches leave in it.

    Successive iterates are correlated, by EM itself, by chains that go on, and by averaged statistics. So they are cut
    into batches of neighbours of $n_k$ iterates with means $m_k$, and the variance of the mean of all n is

    $$\hat V=\frac{2B_a-B_{3a}}{n},\qquad B_a=\frac1{a-1}\sum_{k=1}^{a}n_k(m_k-m)^2,$$

    with a batches, and with 3a that are shorter. The second term corrects what correlated batches lack, to the safe
    side; where it would make the variance smaller than $B_a/n$ it is left out. Batches have equal sums of gains
    $\gamma_t$ of the M-step, so that with `steps.Averaged` later ones are longer, as its memory is; else equal lengths.

    When to use: Monte Carlo EM with a fixed number of draws, SAEM, online EM, stochastic gradients at a fixed learning
    rate, once the iterates fluctuate about a level. The error says nothing of a bias that all iterates share, such as
    that of self-normalised weights (of the order of one over the number of draws), Laplace's, or a guide's; and it is
    not the standard error of the parameter, see `standard_errors`: it should be small beside that.

    Args:
        fit: What a run with ``track=[...]`` returned; the parameters that were tracked are taken.
        since: First iterate of the mean; by default `average_from` of `steps.Averaged`, else half of the run. Before
            it the iterates should have come to their level: `drift` tells if they have not.
        num_batches: a. Batches have to be longer than the memory of the iterates: `effective` well above a says so.

    Returns:
        ``estimate``, ``error``, ``effective`` and ``drift`` by parameter; ``result["name"]`` is one parameter's error.
        With a batches it has a - 1 degrees of freedom.

    Raises:
        EmvaeError: Nothing was tracked, or too few iterates for the batches.

    Source: Flegal and Jones 2010 for batch means; Vats and Flegal 2022, "Lugsail lag windows", eq. 4, for the
    correction; Chen, Lee, Tong and Zhang 2020, section 4, for batches by gain. Differs: the correction only raises.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_emvae import EM, steps
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(loc, 1.0)), 1.0), obs=x)
        >>> m_step = steps.ClosedForm(lambda v, x: {"z": v["z"]}, lambda s, p: {"loc": s["z"] / 4})
        >>> em = EM(model, e_step=steps.MonteCarlo("prior", 200), m_step=m_step)
        >>> fit = em.run(torch.tensor([1.0, 2.0, 3.0, 4.0]), max_iter=300, track="loc", seed=0)
        >>> found = monte_carlo_error(fit, since=20)
        >>> bool(abs(found.estimate["loc"] - 2.5) < 3 * found["loc"]), bool(found["loc"] < 0.02)
        (True, True)
    """
    paths = _paths(fit)
    m_step = getattr(fit.inference, "m_step", None)
    first = getattr(m_step, "average_from", None) or (fit.num_iterations + 1) // 2 if since is None else since
    first = positive_int("monte_carlo_error", "since", first, minimum=0)
    count = min(map(len, paths.values())) - first
    batches = positive_int("monte_carlo_error", "num_batches", num_batches, minimum=2)
    if count < 3 * batches * MIN_PER_BATCH:
        _refuse(
            f"make {batches} batches",
            f"{max(count, 0)} iterates from {first} on",
            f"each has thirds of {MIN_PER_BATCH} iterates at least, {3 * batches * MIN_PER_BATCH} iterates in all",
            "Run further (a further em.run goes on from here), or write num_batches=5.",
        )
    gains = _gains(fit, getattr(m_step, "gain", None), count + first)[first:]
    found = {name: batch_means(path[first:], batches, gains) for name, path in paths.items()}
    columns = ({name: cells[i] for name, cells in found.items()} for i in range(4))
    estimate, error, effective, drift = columns
    return MonteCarloErrors(first, count, estimate, error, effective, drift, _note(effective, drift, batches))


def batch_means(path: np.ndarray, num_batches: int, gains: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    r"""Return mean, standard error, effective number and drift of a path: ``(n, ...) -> (...)`` each.

    Args:
        path: Iterates.
        num_batches: Of the longer batches.
        gains: Of the iterates, which fix the batches' lengths; equal ones if None: ``(n,)``.

    Example:
        >>> path = np.random.default_rng(0).normal(size=4000)
        >>> bool(abs(batch_means(path, 20)[1] * 4000**0.5 - 1) < 0.5)
        True
    """
    path = np.asarray(path, dtype=float)
    gains = np.ones(len(path)) if gains is None else gains
    mean, count = path.mean(0), len(path)
    coarse, fine = (_spread(path, mean, _cuts(gains, number)) for number in (num_batches, 3 * num_batches))
    variance = np.maximum(2 * coarse - fine, coarse)
    half = _cuts(gains, 2)[0]
    parts = (half, count - half)
    move = path[half:].mean(0) - path[:half].mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a path that never moves has no error
        effective = np.where(variance == 0, count, count * path.var(0, ddof=1) / variance)
        drift = np.where(move == 0, 0.0, move / np.sqrt(variance * (1 / parts[0] + 1 / parts[1])))
    return mean, np.sqrt(variance / count), effective, drift


def _cuts(gains: np.ndarray, number: int) -> np.ndarray:
    """Return where to cut so that the parts have about equal sums of gains, and `MIN_PER_BATCH` iterates at least."""
    share = np.cumsum(gains) / gains.sum()
    cuts = np.searchsorted(share, np.arange(1, number) / number) + 1
    place = MIN_PER_BATCH * np.arange(1, number)
    cuts = np.maximum.accumulate(cuts - place) + place  # no batch below the least length
    return np.clip(cuts, place, len(gains) - place[::-1])


def _spread(path: np.ndarray, mean: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Return the long-run variance of the path by its batches."""
    parts = np.split(path, cuts)
    return sum(len(part) * (part.mean(0) - mean) ** 2 for part in parts) / (len(parts) - 1)


def _paths(fit: Any) -> dict[str, np.ndarray]:
    tracked = fit.record.monitor.tracked if isinstance(fit, Fit) and fit.record.monitor else {}
    paths = {name: np.stack(values) for name, values in tracked.items()}
    if not paths:
        _refuse(
            "find iterates",
            f"{repr(fit)[:80]} with no tracked parameter",
            "it compares the parameters' values from iteration to iteration",
            'Write em.run(x, track=["loc"], ...).',
        )
    return paths


def _gains(fit: Fit, gain: Callable[[int], float] | None, count: int) -> np.ndarray:
    """Return the gain that led to each iterate, the initial one's as the next; a step counts from its own first one."""
    if gain is None:
        return np.ones(count)
    last = int(fit.inference.engine.steps.get("M", {}).get("count", count - 1))
    return np.array([gain(max(t, 1)) for t in range(last - count + 1, last + 1)])


def _note(effective: dict[str, np.ndarray], drift: dict[str, np.ndarray], batches: int) -> str:
    notes = []
    least = min(float(np.min(x, initial=math.inf)) for x in effective.values())
    if least < batches:
        notes.append(f"the iterates are worth {least:.0f} independent ones, fewer than the batches: run further")
    most = max(float(np.max(np.abs(x), initial=0.0)) for x in drift.values())
    if most > FEW:
        notes.append(f"they drift, by {most:.1f} standard errors: start the mean later")
    return "; ".join(notes)


def _refuse(act: str, got: str, because: str, fix: str) -> None:
    fail(EmvaeError, "monte_carlo_error", act, got=got, because=because, fix=fix)
