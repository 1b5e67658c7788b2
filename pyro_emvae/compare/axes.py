r"""What a sweep goes over: numbers of particles, stages and problems; and its cells laid out over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

from .._checks import EmvaeError, fail, positive_int

__all__ = ["Setting", "combine", "counts_of", "dimensions_of", "places_of", "setting_of"]


@dataclass(frozen=True)
class Setting:
    """One problem of the sweep; `problem` is what the function of the dimension returned."""

    model: Callable
    guide: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    problem: Any = None

    @property
    def pair(self) -> tuple:
        return self.model, self.guide, self.args, self.kwargs

    def exact(self, reference: Callable | None) -> Callable | None:
        """Return the exact gradient as a function of the leaves."""
        problem = (self.model, self.guide, *self.args) if self.problem is None else self.problem
        return None if reference is None else lambda leaves: reference(problem, leaves)


def _refuse(act: str, got: str, because: str, fix: str) -> NoReturn:
    fail(EmvaeError, "sweep_gradients", act, got=got, because=because, fix=fix)


def counts_of(num_particles: Any) -> list[int]:
    counts = list(num_particles) if isinstance(num_particles, Iterable) else [num_particles]
    if not counts or len(set(counts)) < len(counts):
        _refuse(
            "use num_particles",
            f"{num_particles!r}",
            "a sweep goes over different numbers",
            "Write num_particles=[1, 4, 16].",
        )
    return [positive_int("sweep_gradients", "num_particles", count) for count in counts]


def places_of(stages: Any) -> list[tuple[Any, Any]]:
    """Return pairs of a label and how to get there: a number of steps, values, a function, or None to stay."""
    if stages is None:
        return [(None, None)]
    if isinstance(stages, Mapping):
        bad = [label for label, place in stages.items() if not (isinstance(place, Mapping) or callable(place))]
        if stages and not bad:
            return list(stages.items())
    elif not isinstance(stages, str) and isinstance(stages, Iterable):
        steps = list(stages)
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in steps)
        if steps and whole and all(a < b for a, b in itertools.pairwise(steps)):
            return [(int(n), int(n)) for n in steps]
    _refuse(
        "go through stages",
        f"stages={stages!r:.80}",
        "they are rising numbers of training steps, or a mapping from labels to parameters or functions",
        'Write stages=[0, 100, 1000], or stages={"end": fit.params}.',
    )


def dimensions_of(dimension: Any, model: Any, guide: Any) -> list[Any]:
    if dimension is None:
        if not callable(guide):
            _refuse("sweep", f"guide={guide!r}", "a problem is a model and a guide", "Pass both, or give dimension=.")
        return [None]
    if isinstance(dimension, str) or not isinstance(dimension, Iterable) or not list(dimension) or guide is not None:
        got = f"dimension={dimension!r}" + ("" if guide is None else " and a guide")
        because = (
            "the first argument is then a function that makes model, guide and data, for each of several dimensions"
        )
        _refuse("sweep over dimensions", got, because, "Write sweep_gradients(make_problem, dimension=[2, 8, 32]).")
    return list(dimension)


def setting_of(make: Callable, at: Any, args: tuple, kwargs: Mapping[str, Any]) -> Setting:
    problem = make(at)
    if isinstance(problem, tuple) and len(problem) >= 2:
        return Setting(problem[0], problem[1], problem[2:], kwargs, problem)
    if all(hasattr(problem, name) for name in ("model", "guide", "args")):
        return Setting(problem.model, problem.guide, tuple(problem.args), kwargs, problem)
    _refuse(
        f"make the problem of dimension {at!r}",
        f"{type(problem).__name__}",
        "a problem has model, guide and args, or is a tuple of these",
        "Return (model, guide, *args).",
    )


def combine(table: Mapping[tuple, Any], dims: Sequence[str]) -> Any:
    """Lay the cells out over the dims that were swept."""
    import xarray as xr

    names = ("dimension", "stage", "num_particles")
    cells = list(table.values())
    looped = sorted({line for cell in table.values() for line in cell.attrs["looped"]})
    biased = sorted({name for cell in table.values() for name in cell.attrs["biased"]})
    for depth in (2, 1, 0):
        groups: dict[tuple, list] = {}
        for place, cell in table.items():
            groups.setdefault(place[:depth], []).append((place[depth], cell))
        if names[depth] in dims:
            options = {"join": "outer", "data_vars": "all", "coords": "minimal", "compat": "override"}
            options |= {"combine_attrs": "override"}
            table = {
                rest: xr.concat(
                    [cell for _, cell in members], _index(names[depth], [at for at, _ in members]), **options
                )
                for rest, members in groups.items()
            }
        else:
            table = {rest: members[0][1] for rest, members in groups.items()}
    combined = table[()]
    combined.attrs["looped"] = looped
    combined.attrs["too_dear"] = sorted({line for cell in cells for line in cell.attrs.get("too_dear", [])})
    combined.attrs["biased"] = biased
    return combined.transpose(*dims, "estimator", "block", "site")


def _index(name: str, values: list[Any]) -> Any:
    import pandas as pd

    return pd.Index([v if isinstance(v, Integral | float | str) else str(v) for v in values], name=name)
