r"""When to stop, and what to call it: pure rules on numbers, which the run loop feeds.

`Deterministic` is for EM whose iterations draw nothing, `Windowed` for everything that draws, `Ascent` for the number
of draws of Monte Carlo EM. A rule never sees a model; it is given the objective's values so far (nats) and answers with
a `Verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

from ._checks import EmvaeError, fail, positive_int

__all__ = ["STATUSES", "Ascent", "Deterministic", "Verdict", "Windowed"]

STATUSES = {
    "CONVERGED": "the stopping rule holds",
    "SLOW": "the projected gain is below tol, but at a rate at which no projection is to be trusted",
    "STALLED": "the objective no longer moves beyond its rounding or noise, which is no proof that tol is reached",
    "MAX_ITER": "all iterations were made; no claim of convergence",
    "DECREASED": "an iteration lowered an objective that it cannot lower, and the run went on",
    "REVERTED": "an iteration lowered it; the parameters are those before it",
    "DEGENERATE": "an update left the inside of a parameter's constraint, such as a variance of zero, "
    "or the run ended on a spike of an unbounded likelihood",
    "NAN": "updates were left out because something was not finite",
    "STOPPED": "a callback stopped the run",
    "INTERRUPTED": "Ctrl-C",
}


@dataclass(frozen=True)
class Verdict:
    """What a rule says.

    Args:
        status: A key of `STATUSES`, or None to go on.
        rate: Estimated ratio of successive gains; NaN if unknown.
        remaining: Projected gain that is left, or drift per window, in nats per datum.
        change: Projected relative change of the parameters that is left, or drift; NaN if unknown.
        error: Monte Carlo standard error of `remaining`; 0 for a deterministic rule.
        reason: One sentence.
    """

    status: str | None = None
    rate: float = math.nan
    remaining: float = math.nan
    change: float = math.nan
    error: float = 0.0
    reason: str = field(default="too few iterations to judge", repr=False)


@dataclass(frozen=True)
class Deterministic:
    r"""Stop when the gain that is *left*, not the last one, is small, and so is the way that the parameters have to go.

    With gains $d_k=L_k-L_{k-1}$ and their ratio $r$, Aitken's projection of what is left is

    $$L_\infty-L_k\approx d_k\,\frac{r}{1-r}.$$

    The same is done with the relative changes of the unconstrained parameters. The ratio is the largest of the
    geometric means over the last $1,2,\dots,$ ``window`` iterations, so that neither a steep start nor one lucky
    iteration makes a slow run look fast. A rule on $d_k$ alone stops a slow run early, by a factor $1/(1-r)$.

    When to use: EM whose objective is computed without noise (no half-step draws, full data). One that may go down, as
    Laplace's approximation may, is judged by the size of its steps.

    * CONVERGED: the projected gain is below `tol`, the projected change below `change_tol`, the rate at most `slow`.
    * SLOW: the projected gain is below `tol`, but the mean rate of the last `window` iterations above `slow`. Gains
      that die out like a power of the number of iterations end here: for them every projection falls short.
    * STALLED: over `window` iterations the gain is lost in rounding, and the parameters still move.

    Args:
        tol: Gain that may be left, in nats per datum.
        change_tol: Relative change of any parameter, unconstrained, that may be left.
        window: Iterations over which the rate is taken.
        slow: Rate of the gains above which nothing is called converged.
        confirm: Iterations in a row for which it has to hold: the first slow gain after fast ones looks fast itself.
        stride: Iterations that count as one: 2 for accelerated runs, whose gains alternate between large and small.

    Raises:
        EmvaeError: A tolerance that is not positive, or a rate outside (0, 1).

    Source: Aitken 1926; Boehning et al. 1994 for mixtures. Differs: the largest ratio, and the parameters as well.

    Example:
        >>> gains = [2.0**-k for k in range(30)]
        >>> rule = Deterministic(tol=1e-6)
        >>> rule.judge([sum(gains[:k]) for k in range(1, 31)], gains).status
        'CONVERGED'
        >>> creeping = [-1.0 / k for k in range(1, 1000)]
        >>> rule.judge(creeping, [1.0 / k for k in range(1, 1000)], num_data=1000).status
        'SLOW'
    """

    tol: float = 1e-6
    change_tol: float = 1e-3
    window: int = 10
    slow: float = 0.99
    confirm: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        _positive("Deterministic", tol=self.tol, change_tol=self.change_tol)
        positive_int("convergence.Deterministic", "window", self.window)
        positive_int("convergence.Deterministic", "confirm", self.confirm)
        positive_int("convergence.Deterministic", "stride", self.stride)
        _positive("Deterministic", slow=self.slow, below=1.0)

    def judge(
        self,
        objectives: Sequence[float],
        changes: Sequence[float] = (),
        parameters: np.ndarray | None = None,
        num_data: int = 1,
        epsilon: float = 2.0**-52,
    ) -> Verdict:
        r"""Judge after an iteration.

        Args:
            objectives: The objective before each iteration, the first one included: nats, summed over the data.
            changes: The relative change that each iteration made of the unconstrained parameters.
            parameters: Not used.
            num_data: Number of data.
            epsilon: Rounding unit of the objective's dtype.
        """
        needed = self.stride * (self.window + 2) + self.confirm
        objectives, changes = objectives[-needed:], changes[-needed:]
        verdict = self._once(objectives, changes, num_data, epsilon)
        if verdict.status != "CONVERGED":
            return verdict
        for back in range(1, self.confirm):
            earlier = self._once(objectives[:-back], changes[:-back], num_data, epsilon)
            if earlier.status != "CONVERGED":
                return replace(verdict, status=None, reason=f"{verdict.reason}, for {back} iterations only")
        return verdict

    def _once(self, objectives: Sequence[float], changes: Sequence[float], num_data: int, epsilon: float) -> Verdict:
        """Judge the last iteration by itself."""
        if self.stride > 1:
            objectives = objectives[:: -self.stride][::-1]
            changes = [sum(changes[max(k - self.stride, 0) : k]) for k in range(len(changes), 0, -self.stride)][::-1]
        tail = np.asarray(objectives[-self.window - 2 :], dtype=float)
        if len(tail) < 3 or not np.isfinite(tail).all():
            return Verdict()
        gains = np.diff(tail)
        falls = gains < -math.sqrt(epsilon) * np.maximum(num_data, np.abs(tail[1:]))
        gains = np.where(falls, -gains, gains)
        resolution = 8 * epsilon * max(abs(tail[-1]), num_data)
        rate, mean = _rate(gains, resolution, self.window)
        change_rate, _ = _rate(np.asarray(changes[-self.window - 1 :], dtype=float), 64 * epsilon, self.window)
        lost = gains[-1] <= resolution
        remaining = 0.0 if lost else _left(gains[-1], rate) / num_data
        change = 0.0 if changes[-1] <= 64 * epsilon else _left(changes[-1], change_rate)
        numbers = (mean if math.isfinite(mean) else rate, remaining, change)
        found = dict(zip(("rate", "remaining", "change"), map(float, numbers), strict=True))
        if not lost and self.slow < mean <= 1.0:
            text = f"gains shrink by {mean:.4f} per iteration only: try accelerate='squarem'"
            return Verdict("SLOW" if remaining < self.tol else None, **found, reason=text)
        if remaining < self.tol and change < self.change_tol:
            text = f"projected gain {remaining:.2g} nats per datum, projected change {change:.2g}"
            return Verdict("CONVERGED", **found, reason=text)
        if len(gains) > self.window and (np.abs(gains[-self.window :]) <= resolution).all():
            text = f"gains below the rounding of the objective, {resolution:.2g} nats, while parameters move"
            return Verdict("STALLED", **found, reason=text)
        return Verdict(**found, reason=f"projected gain {remaining:.2g} nats per datum, projected change {change:.2g}")


def _rate(steps: np.ndarray, resolution: float, window: int) -> tuple[float, float]:
    """Return the largest geometric mean ratio over the last 1, 2, ... steps, and the one over the whole window."""
    last, earlier = steps[-1], steps[-2 : -window - 2 : -1]
    if last <= resolution or not len(earlier):
        return 0.0, math.nan
    ratios = [(last / step) ** (1 / n) if step > 0 else math.inf for n, step in enumerate(earlier, 1)]
    return max(ratios), ratios[-1] if len(ratios) == window else math.nan


def _left(step: float, rate: float) -> float:
    return step * rate / (1 - rate) if rate < 1 else math.inf


@dataclass(frozen=True)
class Windowed:
    r"""Stop when the objective's drift from window to window is lost in its Monte Carlo error, and that error is small.

    The run is cut into windows. The mean of a window has a standard error $s$, from batch means within the windows, for
    neighbouring values are correlated. Over the last ``patience + 1`` windows, the difference of neighbouring means
    ($\sqrt2\,s$) and the linear trend over all of them have to stay within ``max(tol, z * error)``.

    When to use: gradient steps and Monte Carlo E-steps, where single values say nothing.

    * CONVERGED: no drift, and ``z * error`` is below `tol`, so that a drift of `tol` would have been seen.
    * STALLED: no drift is seen, but the noise would hide one of `tol`. More particles, a longer window or a smaller
      learning rate tell.

    A learning rate that decays to zero stops all drift: no rule on the values can tell that from convergence.

    Args:
        tol: Drift per window that may be left, in nats per datum.
        window: Iterations per window; with a loader, epochs.
        patience: Differences of windows in a row that have to be quiet.
        warm_up: Iterations (epochs) that are never judged, such as those of annealing.
        change_tol: Drift per window of a parameter that may be left, relative to ``max(1, abs(value))``.
        max_parameters: The model's parameters are judged too, by the same rule, if they are at most this many
            numbers; 0 judges the objective only.
        alpha: Level of all tests at one time, together.

    Raises:
        EmvaeError: A tolerance that is not positive, a window of less than 4.

    Source: Flegal and Jones 2010 for batch means. The rule is ours.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> noise = 0.01 * rng.normal(size=400)
        >>> rule = Windowed(window=50, patience=4)
        >>> rule.judge(noise).status, rule.judge(noise + 0.01 * np.arange(400)).status, rule.judge(100 * noise).status
        ('CONVERGED', None, 'STALLED')
    """

    tol: float = 1e-2
    window: int = 50
    patience: int = 4
    warm_up: int = 0
    change_tol: float = 1e-2
    max_parameters: int = 1000
    alpha: float = 0.05

    def __post_init__(self) -> None:
        _positive("Windowed", tol=self.tol, change_tol=self.change_tol)
        _positive("Windowed", alpha=self.alpha, below=1.0)
        positive_int("convergence.Windowed", "window", self.window, 4)
        positive_int("convergence.Windowed", "patience", self.patience)
        positive_int("convergence.Windowed", "warm_up", self.warm_up, 0)
        positive_int("convergence.Windowed", "max_parameters", self.max_parameters, 0)

    @property
    def span(self) -> int:
        """Iterations that are looked back on."""
        return (self.patience + 1) * self.window

    def judge(
        self,
        objectives: Sequence[float],
        changes: Sequence[float] = (),
        parameters: np.ndarray | None = None,
        num_data: int = 1,
        epsilon: float = 2.0**-52,
    ) -> Verdict:
        r"""Judge after an iteration; it answers at the end of a window only.

        Args:
            objectives: The objective of each iteration from the first on; nats, summed over the data.
            changes: Not used.
            parameters: The unconstrained parameters after the last `span` iterations: ``(span, parameters)``, or None.
            num_data: Number of data.
            epsilon: Not used.
        """
        count = len(objectives) - self.warm_up
        if count < self.span or count % self.window:
            return Verdict()
        values = np.asarray(objectives[-self.span :], dtype=float)[:, None] / num_data
        if not np.isfinite(values).all():
            return Verdict(reason="values that are not finite in the last windows")
        drift, error, quiet = self._test(values, self.tol, 1)
        change, still = math.nan, True
        if parameters is not None and parameters.shape[1]:
            scale = np.maximum(1.0, np.abs(parameters.mean(0)))
            change, _, still = self._test(parameters / scale, self.change_tol, parameters.shape[1])
        found = {"remaining": drift, "change": change, "error": error}
        text = f"drift {drift:.2g} with standard error {error:.2g} nats per datum and window"
        if not (quiet and still):
            return Verdict(**found, reason=text)
        seen = self._z(self.patience + 1) * error <= self.tol
        return Verdict("CONVERGED" if seen else "STALLED", **found, reason=text)

    def _z(self, number: int) -> float:
        return _quantile(1 - self.alpha / (2 * number))

    def _test(self, values: np.ndarray, tol: float, number: int) -> tuple[float, float, bool]:
        """Return the largest drift, its standard error, and whether all drifts and the trend are quiet."""
        windows = values.reshape(self.patience + 1, self.window, -1)
        means = windows.mean(1)
        error = _standard_error(windows)
        drifts = np.abs(np.diff(means, axis=0))
        places = np.arange(self.patience + 1) - self.patience / 2
        slope = (places[:, None] * means).sum(0) / (places**2).sum()
        trend, trend_error = np.abs(slope) * self.patience, error * self.patience / math.sqrt((places**2).sum())
        z = self._z(number * (self.patience + 1))
        quiet = (drifts <= np.maximum(tol, z * math.sqrt(2) * error)).all()
        level = (trend <= np.maximum(tol, z * trend_error)).all()
        return float(drifts.max()), float(math.sqrt(2) * error.max()), bool(quiet and level)


def _standard_error(windows: np.ndarray) -> np.ndarray:
    """Return the standard error of a window's mean by batch means, pooled over windows: ``(windows, T, p) -> (p,)``."""
    size = math.isqrt(windows.shape[1])
    number = windows.shape[1] // size
    batches = windows[:, : number * size].reshape(len(windows), number, size, -1).mean(2)
    return np.sqrt(batches.var(1, ddof=1).mean(0) / number)


@dataclass(frozen=True)
class Ascent:
    r"""Whether a step of Monte Carlo EM went up, and how many draws the next one needs.

    A step is judged by the estimated gain $\Delta Q$ of $Q(\theta|\theta_t)=E[\log p_\theta(x,z)\,|\,x,\theta_t]$ and
    its standard error $s$:

    * ``"accept"``: $\Delta Q-z_\alpha s>0$, so the likelihood rose with confidence $1-\alpha$;
    * ``"stop"``: $\Delta Q+z_\gamma s<$ `tol`: the gain is below `tol` with confidence $1-\gamma$;
    * ``"grow"``: neither; draw more and judge again.

    Args:
        alpha: Level of the lower bound.
        gamma: Level of the upper bound.
        growth: Factor of the number of draws.
        tol: Gain that is not worth a step; nats, summed over the data.
        patience: Steps in a row to be below `tol` before the run is called converged.
        max_size: Draws per datum at most.

    Raises:
        EmvaeError: A level outside (0, 1), a tolerance that is not positive, a factor of at most 1.

    Source: Caffo, Jank and Jones 2005, sections 3 and 4.

    Example:
        >>> rule = Ascent()
        >>> rule.judge(1.0, 0.1), rule.judge(0.05, 0.1), rule.judge(1e-5, 1e-5), rule.next_size(100)
        ('accept', 'grow', 'stop', 134)
    """

    alpha: float = 0.25
    gamma: float = 0.1
    growth: float = 4 / 3
    tol: float = 1e-3
    patience: int = 3
    max_size: int = 100_000

    def __post_init__(self) -> None:
        positive_int("convergence.Ascent", "patience", self.patience)
        positive_int("convergence.Ascent", "max_size", self.max_size, 2)
        _positive("Ascent", alpha=self.alpha, below=1.0)
        _positive("Ascent", gamma=self.gamma, below=1.0)
        _positive("Ascent", tol=self.tol, growth=self.growth - 1)

    def judge(self, gain: float, error: float) -> str:
        """Judge an estimated gain (nats) with its standard error."""
        if gain + _quantile(1 - self.gamma) * error < self.tol:
            return "stop"
        return "accept" if gain - _quantile(1 - self.alpha) * error > 0 else "grow"

    def next_size(self, size: int) -> int:
        """Return the number of draws that follows `size`."""
        return math.ceil(size * self.growth)


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf(level)


def _positive(rule: str, below: float = math.inf, **values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < below:
            fail(
                EmvaeError,
                f"convergence.{rule}",
                f"use {name}",
                got=repr(value),
                because=f"{name} lies between 0 and {below}" if below < math.inf else f"{name} is positive",
                fix=f"Leave {name} at its default.",
            )
