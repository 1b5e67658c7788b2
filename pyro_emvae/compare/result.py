r"""What a comparison returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .figures import METRICS

__all__ = ["GradientComparison"]

COSTS = {
    "particles": "K",
    "milliseconds": "ms",
    "evaluations": "evals",
    "variance_evaluations": "var x evals",
    "variance_time": "var x ms",
    "second_moment_evaluations": "E|g|^2 x evals",
}


@dataclass(frozen=True)
class GradientComparison:
    r"""What `compare_gradients` measured; prints as a table.

    Args:
        dataset: An `xarray.Dataset` over ``estimator``, ``block`` and ``site``.
        looped: Rows whose replicates could not be vectorized, with the reason.
    """

    dataset: Any = field(repr=False)
    looped: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        data, attrs = self.dataset, self.dataset.attrs
        lines = _table(data, "block", {n: n for n in METRICS} | COSTS)
        if data.sizes["site"] > 1:
            lines += ["", *_table(data, "site", {f"site_{n}": n for n in METRICS})]
        lines.append(
            f"bias against {attrs['reference']}; |z| beyond {attrs['bias_z_limit']:.1f} is beyond chance; "
            f"{attrs['num_replicates']} replicates"
        )
        if "equal" in attrs:
            lines.append(f"each gradient may cost {attrs['budget']:.4g} {attrs['equal']}")
        lines += self.dataset.attrs.get("too_dear", [])
        if weak := self.weak_signals():
            lines.append(
                f"an snr below {attrs['snr_floor']:.2g} cannot be told from 0 with so many replicates "
                f"(noise alone gives {attrs['snr_noise']:.2g}): {', '.join(weak)}"
            )
        lines += [f"{name} was run one replicate at a time: {why}" for name, why in self.looped.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def weak_signals(self) -> list[str]:
        """Return the rows, by block, whose signal-to-noise ratio cannot be told from 0."""
        snr = self.dataset.snr.transpose("block", "estimator")
        weak = snr.values < self.dataset.attrs["snr_floor"]
        names, blocks = snr.estimator.values.tolist(), snr.block.values.tolist()
        return [
            f"{e} ({b})" for b, line in zip(blocks, weak, strict=True) for e, w in zip(names, line, strict=True) if w
        ]

    def to_csv(self, path: Any) -> None:
        """Write one line per estimator and block, then one per estimator and guide site."""
        import pandas as pd

        data = self.dataset
        sites = data[[name for name in data if "site" in data[name].dims]]
        blocks = data.drop_dims("site").to_dataframe().reset_index()
        by_site = sites.rename({name: name.removeprefix("site_") for name in sites}).to_dataframe().reset_index()
        frame = pd.concat([blocks, by_site], ignore_index=True)
        first = ["estimator", "block", "site"]
        frame[first + [name for name in frame if name not in first]].to_csv(path, index=False)

    def plot(self, block: str | None = None, ax: Any = None) -> Any:
        """Draw the variance ladder; see `plots.plot_variance_ladder`."""
        from ..plots import plot_variance_ladder

        return plot_variance_ladder(self.dataset, block=block, ax=ax)


def _table(data: Any, dim: str, columns: dict[str, str]) -> list[str]:
    """Return aligned lines of a header and one line per estimator and member of `dim`."""
    rows = [["estimator", dim, *columns.values()]]
    for name in data.estimator.values:
        for member in data[dim].values:
            cell = data.sel({"estimator": name, dim: member})
            label = f"{name} (biased)" if name in data.attrs["biased"] else str(name)
            rows.append([label, str(member), *[_text(cell, column) for column in columns]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _text(cell: Any, column: str) -> str:
    text = f"{float(cell[column]):.3g}"
    return f"{text} x {float(cell.repeats):g}" if column == "particles" and float(cell.repeats) > 1 else text
