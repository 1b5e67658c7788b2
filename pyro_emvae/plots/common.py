r"""What all figures need: axes without pyplot, legends beside them, and arguments that are what they should be."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._checks import DataError, EmvaeError, fail

__all__ = ["array", "axes", "legend_outside", "require"]


def axes(name: str, ax: Any, figsize: tuple[float, float]) -> Any:
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


def require(name: str, table: Any, variable: str, what: str) -> None:
    if not hasattr(table, "data_vars") or variable not in table:
        fail(
            DataError,
            name,
            f"find {variable!r}",
            got=type(table).__name__,
            because=f"it reads an xarray.Dataset with a variable of that name: {what}",
            fix="Pass what run or compare_gradients returned.",
        )


def legend_outside(ax: Any, **options: Any) -> None:
    """Put the legend to the right of the axes, where no data are."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **options)


def array(values: Any) -> np.ndarray:
    """Return a tensor's or array's values."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
