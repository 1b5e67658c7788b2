r"""Images beside their reconstructions, and maps of the latents."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._checks import DataError, fail
from .common import array, axes, legend_outside

__all__ = ["plot_latent", "plot_reconstructions"]


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
    ax = axes("plot_reconstructions", ax, figsize=(max(3.0, 0.6 * count), 1.6))
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
    points = array(latent)
    if points.ndim != 2 or max(dims) >= points.shape[1] or (labels is not None and len(labels) != len(points)):
        fail(
            DataError,
            "plot_latent",
            "draw a map",
            got=f"latents of shape {points.shape}" + ("" if labels is None else f" and {len(labels)} labels"),
            because=f"there are rows of data with dims {dims[0]} and {dims[1]}, and a label for each",
            fix="Pass latent of shape (N, D) and labels of shape (N,).",
        )
    ax = axes("plot_latent", ax, figsize=(5.0, 5.0))
    labels = np.zeros(len(points), int) if labels is None else array(labels)
    values = np.unique(labels)
    for i, value in enumerate(values):
        x, y = points[labels == value][:, list(dims)].T
        ax.scatter(x, y, s=8, color=f"C{i}" if len(values) <= 10 else None, label=str(value))
    ax.set_xlabel(f"z[{dims[0]}]")
    ax.set_ylabel(f"z[{dims[1]}]")
    if len(values) > 1:
        legend_outside(ax, markerscale=2, fontsize="small")
    return ax


def _images(images: Any, num: int, shape: Any) -> np.ndarray:
    rows = array(images)[:num].astype(float)
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
