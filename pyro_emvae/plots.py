r"""Figures from results, on plain matplotlib; each returns its Axes.

With ``ax=None`` a figure of its own is made without pyplot: no backend is chosen and nothing stays open. Save it with
``ax.figure.savefig(...)``; in a notebook, ``ax.figure`` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._checks import DataError, EmvaeError, fail, nearest

__all__ = ["plot_elbo", "plot_latent", "plot_reconstructions", "plot_variance_ladder"]

PHASES = {0: ("E", "tab:blue"), 1: ("M", "tab:orange")}
BANDS = 150  # more changes of phase than that are too thin to see
MARKERS = "osD^v<>P*X"


def plot_elbo(fit_or_history: Any, ax: Any = None, log_evidence: Any = None, smooth: int | None = None) -> Any:
    r"""Plot the ELBO over gradient steps, with E- and M-phases shaded.

    Args:
        fit_or_history: What ``run`` returned, its ``.history``, or the container that `to_arviz` made of it.
        ax: Axes to draw into.
        log_evidence: A number, or anything with ``.value`` (and ``.standard_error``): a line that
            the ELBO stays below, but for Monte Carlo error.
        smooth: Window of a centred running mean in steps; the steps themselves are then drawn faintly.

    Phases that change too often to be seen are named below the axis and not shaded. If the first tenth of the steps
    would make all others a flat line, it is left to lie outside of the frame.

    Raises:
        DataError: If there is no ELBO.

    Example:
        >>> import numpy as np, xarray as xr
        >>> history = xr.Dataset({"elbo": ("step", np.log(np.arange(1.0, 9.0))), "phase": ("step", [0, 1] * 4)})
        >>> plot_elbo(history, log_evidence=3.0).get_ylabel()
        'ELBO (nats)'
    """
    history = _history(fit_or_history)
    chains = np.atleast_2d(np.asarray(history["elbo"], dtype=float))
    ax = _axes("plot_elbo", ax, figsize=(7.0, 4.0))
    steps = np.arange(1, chains.shape[1] + 1)
    for i, elbo in enumerate(chains):
        label = "ELBO" if len(chains) == 1 else f"ELBO, chain {i}"
        if smooth is not None and smooth > 1:
            ax.plot(steps, elbo, color=f"C{i}", alpha=0.3, linewidth=0.8)
            elbo, label = _running_mean(elbo, smooth), f"{label}, mean of {smooth} steps"
        ax.plot(steps, elbo, color=f"C{i}", label=label)
    phases = _shade(ax, steps, np.atleast_2d(np.asarray(history["phase"]))[0]) if "phase" in history else ""
    if log_evidence is not None:
        _line(ax, log_evidence)
    _frame(ax, chains, log_evidence)
    ax.set_xlabel("gradient step" + phases)
    ax.set_ylabel("ELBO (nats)")
    ax.set_xlim(0.5, max(len(steps), 1) + 0.5)
    ax.legend()
    return ax


def plot_variance_ladder(comparison: Any, block: str | Sequence[str] | None = None, ax: Any = None) -> Any:
    r"""Plot the variance of each gradient estimator on a logarithmic axis, per block and stage.

    Args:
        comparison: What `compare_gradients` returned, or its ``.dataset``: ``variance_mean`` (and ``variance_max``)
            over ``(estimator, block)``, possibly with a leading dim ``stage``.
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
    table = getattr(comparison, "dataset", comparison)
    _require("plot_variance_ladder", table, "variance_mean", "a comparison's dataset")
    blocks = [block] if isinstance(block, str) else list(block or map(str, table["block"].values))
    for name in blocks:
        if name not in table["block"].values:
            fail(
                DataError,
                "plot_variance_ladder",
                f"show block {name!r}",
                got="an unknown block",
                because="rows are sorted by block",
                fix=nearest(name, map(str, table["block"].values)),
            )
    estimators = [str(name) for name in table["estimator"].values]
    ax = _axes("plot_variance_ladder", ax, figsize=(7.0, 1.2 + 0.5 * len(estimators)))
    stages = [str(s) for s in table["stage"].values] if "stage" in table.dims else [None]
    series = [(name, stage) for name in blocks for stage in stages]
    means = [_rungs(table, "variance_mean", name, stage, estimators) for name, stage in series]
    positive = [v for rungs in means for v in rungs if np.isfinite(v) and v > 0]
    edge = min(positive, default=1.0) / 10
    for i, ((name, stage), mean) in enumerate(zip(series, means, strict=True)):
        y = np.arange(len(estimators)) + (i - (len(series) - 1) / 2) * 0.6 / len(series)
        top = _rungs(table, "variance_max", name, stage, estimators) if "variance_max" in table else mean
        color, marker = f"C{blocks.index(name)}", MARKERS[stages.index(stage) % len(MARKERS)]
        zero, label = mean == 0, name if stage is None else f"{name}, {stage}"
        ax.hlines(y, np.where(zero, edge, mean), np.where(top == 0, edge, top), color=color, linewidth=1)
        ax.plot(np.where(zero, np.nan, mean), y, marker, color=color, label=label)
        ax.plot(np.full(int(zero.sum()), edge), y[zero], marker, color=color, fillstyle="none")
    ax.set_xscale("log")
    ax.set_yticks(range(len(estimators)), estimators)
    ax.set_ylim(len(estimators) - 0.5, -0.5)
    line = "\n(mark: mean over coordinates, line: up to the largest)" if "variance_max" in table else ""
    ax.set_xlabel("variance of the gradient per coordinate" + line)
    ax.grid(True, axis="x", alpha=0.3)
    _legend_outside(ax)
    return ax


def plot_reconstructions(images: Any, reconstructions: Any, ax: Any = None, *, num: int = 12, shape: Any = None) -> Any:
    r"""Plot images in the upper row and their reconstructions below.

    Args:
        images, reconstructions: Arrays or tensors ``(N, height, width)``, or ``(N, pixels)``.
        ax: Axes to draw into.
        num: How many, at most.
        shape: Height and width of flat images; by default they are squares.

    Raises:
        DataError: If the two differ in shape, or flat images are no squares.

    Example:
        >>> plot_reconstructions(np.eye(4), np.eye(4) / 2).get_images()[0].get_array().shape
        (5, 11)
    """
    rows = [_images(rows, num, shape) for rows in (images, reconstructions)]
    if rows[0].shape != rows[1].shape:
        fail(
            DataError,
            "plot_reconstructions",
            "pair images with reconstructions",
            got=f"shapes {rows[0].shape} and {rows[1].shape}",
            because="each image has one reconstruction",
            fix="Pass the probabilities of the same rows.",
        )
    count, height, width = rows[0].shape
    mosaic = np.full((2 * height + 1, count * (width + 1) - 1), np.nan)
    for top, group in zip((0, height + 1), rows, strict=True):
        for i, image in enumerate(group):
            mosaic[top : top + height, i * (width + 1) : i * (width + 1) + width] = image
    ax = _axes("plot_reconstructions", ax, figsize=(max(3.0, 0.6 * count), 1.6))
    low, high = min(0.0, np.nanmin(mosaic)), max(1.0, np.nanmax(mosaic))
    ax.imshow(mosaic, cmap="gray_r", interpolation="nearest", vmin=low, vmax=high)
    ax.set_xticks([])
    ax.set_yticks([(height - 1) / 2, height + 1 + (height - 1) / 2], ["data", "reconstruction"])
    return ax


def plot_latent(latent: Any, labels: Any = None, ax: Any = None, *, dims: tuple[int, int] = (0, 1)) -> Any:
    r"""Plot a map of the latents, coloured by label.

    Args:
        latent: Array or tensor ``(N, D)``: a draw or the mean per datum.
        labels: Labels ``(N,)``.
        ax: Axes to draw into.
        dims: The two latent dims to show.

    The legend stands to the right of the axes, as in `plot_variance_ladder`.

    Raises:
        DataError: If `latent` has no such dims, or `labels` another length.

    Example:
        >>> len(plot_latent(np.eye(3), [0, 1, 1]).collections)
        2
    """
    points = _array(latent)
    if points.ndim != 2 or max(dims) >= points.shape[1] or (labels is not None and len(labels) != len(points)):
        fail(
            DataError,
            "plot_latent",
            "draw a map",
            got=f"latents of shape {points.shape}" + ("" if labels is None else f" and {len(labels)} labels"),
            because=f"there are rows of data with dims {dims[0]} and {dims[1]}, and a label for each",
            fix="Pass latent of shape (N, D) and labels of shape (N,).",
        )
    ax = _axes("plot_latent", ax, figsize=(5.0, 5.0))
    labels = np.zeros(len(points), int) if labels is None else _array(labels)
    values = np.unique(labels)
    for i, value in enumerate(values):
        x, y = points[labels == value][:, list(dims)].T
        ax.scatter(x, y, s=8, color=f"C{i}" if len(values) <= 10 else None, label=str(value))
    ax.set_xlabel(f"z[{dims[0]}]")
    ax.set_ylabel(f"z[{dims[1]}]")
    if len(values) > 1:
        _legend_outside(ax, markerscale=2, fontsize="small")
    return ax


def _axes(name: str, ax: Any, figsize: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as cause:
        fail(
            EmvaeError,
            name,
            "draw",
            got="no module 'matplotlib'",
            because="figures are drawn by it",
            fix="Run: pip install 'pyro_emvae[plots]'",
            cause=cause,
        )
    return Figure(figsize=figsize, layout="constrained").subplots()


def _history(fit: Any) -> Any:
    history = getattr(fit, "history", fit)
    if not hasattr(history, "data_vars") or "elbo" not in history:
        history = history["fit_stats"] if hasattr(history, "__contains__") and "fit_stats" in history else history
    _require("plot_elbo", history, "elbo", "a fit, or its history")
    return history


def _require(name: str, table: Any, variable: str, what: str) -> None:
    if not hasattr(table, "data_vars") or variable not in table:
        fail(
            DataError,
            name,
            f"find {variable!r}",
            got=type(table).__name__,
            because=f"it reads an xarray.Dataset with a variable of that name: {what}",
            fix="Pass what run or compare_gradients returned.",
        )


def _shade(ax: Any, steps: np.ndarray, phase: np.ndarray) -> str:
    """Shade runs of one phase as bands behind the lines; return text for what is too thin to be seen."""
    starts = np.flatnonzero(np.diff(phase.astype(int), prepend=-1))
    ends = np.append(starts, len(phase))[1:]
    if len(starts) > BANDS:
        first = ", ".join(PHASES[int(k)][0] for k in phase[starts[:4]] if int(k) in PHASES)
        return f" (phases: {first}, ...)"
    for value, (name, color) in PHASES.items():
        spans = [(steps[a] - 0.5, b - a) for a, b in zip(starts, ends, strict=True) if phase[a] == value]
        if spans:
            look = {"color": color, "alpha": 0.15, "linewidth": 0, "label": f"{name}-phase"}
            ax.broken_barh(spans, (0, 1), transform=ax.get_xaxis_transform(), **look)
    return ""


def _frame(ax: Any, chains: np.ndarray, log_evidence: Any) -> None:
    """Fit the y-axis to the steps after the first tenth, if this makes them more than three times as tall."""
    start = chains.shape[1] // 10
    everything, later = (rows[np.isfinite(rows)] for rows in (chains, chains[:, start:]))
    if start == 0 or later.size == 0:
        return
    ends = [float(later.min()), float(later.max())]
    if log_evidence is not None:
        ends.append(float(getattr(log_evidence, "value", log_evidence)))
    low, high = min(ends), max(ends)
    if high > low and max(np.ptp(everything), high - everything.min()) > 3 * (high - low):
        margin = 0.05 * (high - low)
        ax.set_ylim(low - margin, high + margin)


def _legend_outside(ax: Any, **options: Any) -> None:
    """Put the legend to the right of the axes, where no data are."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **options)


def _line(ax: Any, log_evidence: Any) -> None:
    value = float(getattr(log_evidence, "value", log_evidence))
    error = getattr(log_evidence, "standard_error", None)
    ax.axhline(value, color="black", linestyle="--", linewidth=1, label="log evidence")
    if error is not None:
        ax.axhspan(value - float(error), value + float(error), color="black", alpha=0.15, linewidth=0)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over the `window` values around each that are there; NaN counts as not there."""
    there = np.isfinite(values)
    sides = np.array([[-(window // 2)], [window - window // 2]])
    ends = np.clip(np.arange(len(values)) + sides, 0, len(values))
    sums, counts = (
        np.diff(np.concatenate([[0], np.cumsum(column)])[ends], axis=0)[0]
        for column in (np.where(there, values, 0.0), there)
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _rungs(table: Any, variable: str, block: str, stage: str | None, estimators: list[str]) -> np.ndarray:
    column = table[variable].sel(block=block)
    column = column if stage is None else column.isel(stage=[str(s) for s in table["stage"].values].index(stage))
    return np.asarray(column.transpose("estimator"), dtype=float)


def _array(values: Any) -> np.ndarray:
    """Return a tensor's or array's values."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _images(images: Any, num: int, shape: Any) -> np.ndarray:
    rows = _array(images)[:num].astype(float)
    if rows.ndim == 3:
        return rows
    side = round(rows.shape[-1] ** 0.5)
    height, width = shape or (side, side)
    if rows.ndim != 2 or height * width != rows.shape[-1]:
        fail(
            DataError,
            "plot_reconstructions",
            "lay out images",
            got=f"shape {rows.shape}",
            because="rows of pixels become rectangles",
            fix="Write shape=(height, width).",
        )
    return rows.reshape(-1, height, width)
