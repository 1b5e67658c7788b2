r"""Comparisons of gradients: the variance ladder, variance against cost, the signal-to-noise ratio against K."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._checks import DataError, fail, nearest
from .common import axes, legend_outside, require

__all__ = ["plot_snr", "plot_variance_cost", "plot_variance_ladder", "snr_slopes"]

MARKERS = "osD^v<>P*X"
WHAT = "a comparison's dataset"


def plot_variance_ladder(comparison: Any, block: str | Sequence[str] | None = None, ax: Any = None) -> Any:
    r"""Plot the variance of each gradient estimator on a logarithmic axis, per block and stage.

    Args:
        comparison: What `compare_gradients` or `sweep_gradients` returned, or its ``.dataset``: ``variance_mean`` (and
            ``variance_max``) over ``(estimator, block)``, possibly with further dims such as ``stage``.
        block: One or several blocks; all by default.
        ax: Axes to draw into.

    A mark is the mean over coordinates, a thin line reaches to the largest. A variance of exactly zero stands at the
    left edge as a hollow mark. The legend stands to the right of the axes: give `ax` a figure with
    ``layout="constrained"``, which leaves room for it.

    Raises:
        DataError: If there is no such table, or a block is unknown.

    Example:
        >>> import xarray as xr
        >>> table = xr.Dataset(
        ...     {"variance_mean": (("estimator", "block"), [[4.0e3], [2.0]])},
        ...     {"estimator": ["score", "pathwise"], "block": ["guide"]},
        ... )
        >>> plot_variance_ladder(table).get_xscale()
        'log'
    """
    table = _table("plot_variance_ladder", comparison, "variance_mean")
    blocks = _blocks("plot_variance_ladder", table, block)
    estimators = [str(name) for name in table["estimator"].values]
    ax = axes("plot_variance_ladder", ax, figsize=(7.0, 1.2 + 0.5 * len(estimators)))
    places = _places(table, short=("stage",))
    series = [(name, i, place) for name in blocks for i, place in enumerate(places)]
    means = [_rungs(table, "variance_mean", name, place) for name, _, (_, place) in series]
    positive = [v for rungs in means for v in rungs if np.isfinite(v) and v > 0]
    edge = min(positive, default=1.0) / 10
    for i, ((name, k, (text, place)), mean) in enumerate(zip(series, means, strict=True)):
        y = np.arange(len(estimators)) + (i - (len(series) - 1) / 2) * 0.6 / len(series)
        top = _rungs(table, "variance_max", name, place) if "variance_max" in table else mean
        color, marker = f"C{blocks.index(name)}", MARKERS[k % len(MARKERS)]
        zero, label = mean == 0, ", ".join(filter(None, (name, text)))
        ax.hlines(y, np.where(zero, edge, mean), np.where(top == 0, edge, top), color=color, linewidth=1)
        ax.plot(np.where(zero, np.nan, mean), y, marker, color=color, label=label)
        ax.plot(np.full(int(zero.sum()), edge), y[zero], marker, color=color, fillstyle="none")
    ax.set_xscale("log")
    ax.set_yticks(range(len(estimators)), estimators)
    ax.set_ylim(len(estimators) - 0.5, -0.5)
    line = "\n(mark: mean over coordinates, line: up to the largest)" if "variance_max" in table else ""
    ax.set_xlabel("variance of the gradient per coordinate" + line)
    ax.grid(True, axis="x", alpha=0.3)
    legend_outside(ax)
    return ax


def plot_variance_cost(
    comparison: Any, block: str | None = None, ax: Any = None, *, cost: str = "evaluations", maximum: bool = False
) -> Any:
    r"""Plot the variance of each gradient estimator against what a gradient costs, both axes logarithmic.

    Args:
        comparison: What `sweep_gradients` or `compare_gradients` returned, or its ``.dataset``. With several numbers of
            particles, a line joins those of one estimator.
        block: The block; by default the first.
        ax: Axes to draw into.
        cost: ``"evaluations"`` (of the model) or ``"milliseconds"``.
        maximum: Draw the largest coordinate's variance in place of the mean over coordinates.

    Averaging draws moves a point down a diagonal of slope -1; of two estimators, the one whose line lies lower is the
    better at equal cost. A variance of exactly zero has no place on the axis and is named in the legend.

    Raises:
        DataError: If there is no such table, or a block or cost is unknown.

    Example:
        >>> import xarray as xr
        >>> table = xr.Dataset(
        ...     {"variance_mean": (("estimator", "block"), [[4.0], [2.0]]), "evaluations": ("estimator", [1.0, 2.0])},
        ...     {"estimator": ["score", "pathwise"], "block": ["guide"]},
        ... )
        >>> plot_variance_cost(table).get_xlabel()
        'model evaluations'
    """
    variable = "variance_max" if maximum else "variance_mean"
    table = _table("plot_variance_cost", comparison, variable)
    (name,) = _blocks("plot_variance_cost", table, block or str(table["block"].values[0]))
    labels = {"evaluations": "model evaluations", "milliseconds": "milliseconds per gradient"}
    if cost not in labels or cost not in table:
        known = [c for c in labels if c in table]
        _refuse("plot_variance_cost", f"use cost={cost!r}", "an unknown cost", "a cost is a variable", cost, known)
    ax = axes("plot_variance_cost", ax, figsize=(7.0, 4.5))
    for i, estimator in enumerate(table["estimator"].values):
        for k, (text, place) in enumerate(_places(table, over="num_particles")):
            cell = table.sel(estimator=estimator, block=name, **place)
            x, y = (np.atleast_1d(np.asarray(cell[v], dtype=float)) for v in (cost, variable))
            if not np.isfinite(x).any():  # the choice of the batch, which is no estimator
                continue
            zero = ", variance 0" if bool((y == 0).any()) else ""
            style = {"color": f"C{i % 10}", "marker": MARKERS[k % len(MARKERS)], "linestyle": "-"}
            label = ", ".join(filter(None, (str(estimator), text))) + zero
            ax.plot(np.broadcast_to(x, y.shape), np.where(y > 0, y, np.nan), label=label, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    _ticks(ax, np.asarray(table[cost], dtype=float))
    ax.set_xlabel(labels[cost])
    ax.set_ylabel(
        f"variance of the gradient, {name}, " + ("largest coordinate" if maximum else "mean over coordinates")
    )
    ax.grid(True, alpha=0.3)
    legend_outside(ax)
    return ax


def plot_snr(sweep: Any, block: str | None = None, ax: Any = None) -> Any:
    r"""Plot the signal-to-noise ratio of each estimator against the number of particles, with its floor and slopes.

    Args:
        sweep: What `sweep_gradients` returned for several numbers of particles.
        block: The block; by default the first.
        ax: Axes to draw into.

    The dotted line is what noise alone gives, 0.8/sqrt(R); in the grey below 3/sqrt(R) a ratio cannot be told from 0:
    marks there are hollow. The legend has the slope of `snr_slopes`, fitted to the other points, and it is drawn.

    Raises:
        DataError: If there is no such table, or a block is unknown.

    Source: Rainforth et al. 2018, figure 1; the floor: theirs has none, and shows it.

    Example:
        >>> import xarray as xr
        >>> table = xr.Dataset(
        ...     {"snr": (("num_particles", "estimator", "block"), [[[1.0]], [[2.0]]])},
        ...     {"num_particles": [1, 4], "estimator": ["pathwise"], "block": ["model"]},
        ...     {"snr_floor": 0.03, "snr_noise": 0.008},
        ... )
        >>> plot_snr(table).get_legend().get_texts()[0].get_text()
        'pathwise: slope +0.50'
    """
    table = _table("plot_snr", sweep, "snr")
    _require_particles("plot_snr", table)
    (name,) = _blocks("plot_snr", table, block or str(table["block"].values[0]))
    floor, slopes, counts = table.attrs["snr_floor"], snr_slopes(table), np.asarray(table["num_particles"], dtype=float)
    ax = axes("plot_snr", ax, figsize=(7.0, 4.5))
    for i, estimator in enumerate(table["estimator"].values):
        for k, (text, place) in enumerate(_places(table, over="num_particles")):
            at = {"estimator": estimator, "block": name, **place}
            snr, slope = np.asarray(table["snr"].sel(at), dtype=float), float(slopes.sel(at))
            above = np.isfinite(snr) & (snr > floor)
            label = ", ".join(filter(None, (str(estimator), text)))
            label += f": slope {slope:+.2f}" if np.isfinite(slope) else ": no slope above the floor"
            color, marker = f"C{i % 10}", MARKERS[k % len(MARKERS)]
            ax.plot(counts[above], snr[above], marker, color=color, label=label)
            ax.plot(counts[~above], snr[~above], marker, color=color, fillstyle="none")
            if np.isfinite(slope):
                logs = np.log(counts[above])
                fit = np.exp(np.log(snr[above]).mean() + slope * (logs - logs.mean()))
                ax.plot(counts[above], fit, color=color, linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    _ticks(ax, counts)
    bottom = min(ax.get_ylim()[0], table.attrs["snr_noise"] / 1.5)
    ax.axhspan(bottom, floor, color="black", alpha=0.1, linewidth=0)
    ax.axhline(table.attrs["snr_noise"], color="black", linestyle=":", linewidth=1)
    ax.set_ylim(bottom=bottom)
    ax.set_xlabel("particles K")
    ax.set_ylabel(f"signal-to-noise ratio, {name}, mean over coordinates")
    legend_outside(ax)
    return ax


def snr_slopes(sweep: Any, floor: float | None = None) -> Any:
    r"""Return the slope of log SNR by log K, by least squares over the points above the floor.

    Args:
        sweep: What `sweep_gradients` returned for several numbers of particles.
        floor: Points at or below it are left out; by default 3/sqrt(R), below which a ratio cannot be told from 0.

    Returns:
        An `xarray.DataArray` over the other dims; NaN where fewer than two points are left.

    Raises:
        DataError: If there is no such table.

    Source: Rainforth et al. 2018, "Tighter variational bounds are not necessarily better", theorem 1: +1/2 for theta,
    -1/2 for phi.

    Example:
        >>> import xarray as xr
        >>> snr = xr.DataArray([1.0, 2.0, 4.0, 0.01], {"num_particles": [1, 4, 16, 64]}, ["num_particles"])
        >>> float(snr_slopes(xr.Dataset({"snr": snr}, attrs={"snr_floor": 0.03})).round(3))
        0.5
    """
    import xarray as xr

    table = _table("snr_slopes", sweep, "snr")
    _require_particles("snr_slopes", table)
    limit = table.attrs["snr_floor"] if floor is None else floor

    def slope(snr: np.ndarray, counts: np.ndarray) -> float:
        there = np.isfinite(snr) & (snr > limit)
        return float(np.polyfit(np.log(counts[there]), np.log(snr[there]), 1)[0]) if there.sum() > 1 else np.nan

    counts = table["num_particles"].astype(float)
    core = [["num_particles"], ["num_particles"]]
    found = xr.apply_ufunc(slope, table["snr"], counts, input_core_dims=core, vectorize=True)
    return found.rename("snr_slope")


def _table(name: str, comparison: Any, variable: str) -> Any:
    table = getattr(comparison, "dataset", comparison)
    require(name, table, variable, WHAT)
    return table


def _require_particles(name: str, table: Any) -> None:
    if "num_particles" not in table.dims:
        fail(
            DataError,
            name,
            "follow the signal-to-noise ratio",
            got=f"dims {tuple(map(str, table.dims))}",
            because="it is drawn against the number of particles",
            fix="Write sweep_gradients(..., num_particles=[1, 4, 16, 64]).",
        )


def _blocks(name: str, table: Any, block: str | Sequence[str] | None) -> list[str]:
    blocks = [block] if isinstance(block, str) else list(block or map(str, table["block"].values))
    for wanted in blocks:
        if wanted not in table["block"].values:
            known = list(map(str, table["block"].values))
            _refuse(name, f"show block {wanted!r}", "an unknown block", "rows are sorted by block", wanted, known)
    return blocks


def _refuse(name: str, act: str, got: str, because: str, wanted: str, known: list[str]) -> None:
    fail(DataError, name, act, got=got, because=because, fix=nearest(wanted, known))


def _places(table: Any, over: str = "", short: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return a label and a selection for each combination of the further dims, such as stages."""
    dims = [str(d) for d in table.dims if d not in ("estimator", "block", "site", over)]
    combinations = itertools.product(*(table[d].values.tolist() for d in dims))
    places = [dict(zip(dims, values, strict=True)) for values in combinations]
    return [(", ".join(str(v) if d in short else f"{d} {v}" for d, v in place.items()), place) for place in places]


def _ticks(ax: Any, values: np.ndarray) -> None:
    """Put the ticks of a logarithmic axis at the whole numbers that were used, if they are few."""
    few = np.unique(values[np.isfinite(values)])
    if len(few) <= 10 and bool((few == few.round()).all()):
        ax.set_xticks(few, [f"{n:g}" for n in few])
        ax.set_xticks([], minor=True)


def _rungs(table: Any, variable: str, block: str, place: dict[str, Any]) -> np.ndarray:
    return np.asarray(table[variable].sel(block=block, **place).transpose("estimator"), dtype=float)
