r"""The comparison over numbers of particles, stages of training and dimensions: one call, one Dataset, resumable."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import pyro
import torch

from ..parameters import Parameters, assign, discover, keep_store, own_store
from ..particles import quiet
from ..svi import SVI
from .axes import Setting, combine, counts_of, dimensions_of, places_of, setting_of
from .cells import Cells, digest, signature
from .gradients import measure
from .rows import labelled

__all__ = ["sweep_gradients"]

VARYING = ("reference", "bias_z_limit", "coordinates", "budget")  # attributes that differ from cell to cell


def sweep_gradients(
    model: Callable,
    guide: Callable | None = None,
    *args: Any,
    estimators: Iterable[Any] | Mapping[str, Any] | None = None,
    num_particles: int | Sequence[int] = 2,
    stages: Sequence[int] | Mapping[Any, Any] | None = None,
    dimension: Sequence[Any] | None = None,
    svi: Callable[[Callable, Callable], Any] | None = None,
    reference: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] | None = None,
    path: Any = None,
    num_replicates: int = 1000,
    equal: str | None = None,
    budget: float | None = None,
    objective: Any = "elbo",
    blocks: Any = None,
    max_coordinates: int = 20_000,
    memory: float | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    r"""Compare gradients over numbers of particles, stages of training and dimensions; return one Dataset.

    Each combination is a cell: one call of `compare_gradients` with a seed of its own, made of `seed` and the cell's
    place, so that a cell is the same in whatever sweep it stands.

    Args:
        model, guide, args, kwargs: The problem. With `dimension`, `model` is a function from a dimension to a problem:
            to anything with ``model``, ``guide`` and ``args``, or to a tuple ``(model, guide, *args)``.
        estimators: Rows, as in `compare_gradients`.
        num_particles: One number, or several: a dim ``num_particles``.
        stages: A dim ``stage``. Numbers of training steps from the present parameters, rising: they are taken once, on
            the way. Or a mapping from a label to the parameters there: constrained values by name, as ``fit.params``
            has them; or a function, called with the problem as a model is with its guide before it,
            ``move(model, guide, *args)``, that moves the parameters in place.
        dimension: What `model` is called with, one problem each, in parameter stores of their own: a dim ``dimension``.
        svi: From model and guide to what trains, by its ``step(*args)``; by default
            ``SVI(model, guide, pyro.optim.Adam({"lr": 0.01}))``.
        reference: From the problem and its unconstrained leaves by name to the exact gradient there, such as
            `problems.exact_gradients`. The problem is what `model` returned for the dimension, without dimensions
            ``(model, guide, *args)``.
        path: A JSON file. A cell that it has is not computed again: a sweep that was stopped goes on, one with more
            particles, stages or dimensions adds to it, and one with other rows computes its cells anew (for bias and
            cosine refer to other rows). It is written whole after each cell, or not at all. What `svi` does is not
            compared: give another path if you change it.
        num_replicates, equal, budget, objective, blocks, max_coordinates, memory: As in `compare_gradients`.
        seed: Of training and of all cells.

    Returns:
        An `xarray.Dataset`: the variables of `compare_gradients` over ``estimator``, ``block``, ``site`` and the dims
        that were asked for by a sequence; what differs by cell is a variable, too (``reference``,
        ``bias_z_limit``, ``budget``).
        `plots.plot_variance_ladder`, `plots.plot_variance_cost` and `plots.plot_snr` draw it. No warning is given of a
        signal below the floor: `plots.plot_snr` draws the floor, and `plots.snr_slopes` leaves such points out.

    Parameters, buffers, ``.grad`` and generators are as before: training goes back to where it started.

    Raises:
        EmvaeError: A sequence is empty; stages do not rise; the file is of other parameters, data or options.

    Example:
        >>> import pyro
        >>> from pyro_emvae import problems
        >>> pyro.clear_param_store()
        >>> problem = problems.two_level()
        >>> data = sweep_gradients(problem.model, problem.guide, *problem.args,
        ...     estimators=["score", "pathwise"], num_particles=[1, 4], stages=[0, 20], num_replicates=200)
        >>> dict(data.variance_mean.sizes)
        {'stage': 2, 'num_particles': 2, 'estimator': 2, 'block': 2}
    """
    rows = None if estimators is None else labelled(estimators)
    options = {"num_replicates": num_replicates, "equal": equal, "budget": budget, "objective": objective}
    options |= {"blocks": blocks, "max_coordinates": max_coordinates, "memory": memory}
    sweep = Sweep(Cells(path), rows, counts_of(num_particles), places_of(stages), options, reference, svi, seed)
    table: dict[tuple, Any] = {}
    for at in dimensions_of(dimension, model, guide):
        setting = Setting(model, guide, args, kwargs) if dimension is None else setting_of(model, at, args, kwargs)
        with own_store() if dimension is not None else contextlib.nullcontext():
            table |= {(at, *place): cell for place, cell in sweep.at(at, setting).items()}
    several = {"dimension": dimension, "stage": stages, "num_particles": num_particles}
    return combine(table, [name for name, value in several.items() if not isinstance(value, Integral | None)])


@dataclass(frozen=True)
class Sweep:
    """What all cells have in common."""

    cells: Cells
    rows: list[tuple[str, Any]] | None
    counts: list[int]
    places: list[tuple[Any, Any]]
    options: Mapping[str, Any]
    reference: Callable | None
    svi: Callable | None
    seed: int

    def origin(self, setting: Setting, parameters: Parameters) -> dict[str, Any]:
        """Return what a cell is computed from, for its file."""
        named = ("num_replicates", "equal", "budget", "objective", "blocks", "max_coordinates")
        rows = "default" if self.rows is None else [f"{name}: {signature(spec)}" for name, spec in self.rows]
        common = {name: signature(self.options[name]) for name in named} | {"seed": self.seed, "rows": rows}
        data = digest(parameters.leaves(), setting.args, setting.kwargs)
        return common | {"exact": self.reference is not None, "parameters and data": data}

    def at(self, dimension: Any, setting: Setting) -> dict[tuple, Any]:
        """Return the cells of one problem by stage and number of particles; its parameters are as before."""
        seed = _seed(self.seed, "training", dimension)
        with quiet(seed=seed):
            parameters = discover(*setting.pair, blocks=self.options["blocks"])
        origin = self.origin(setting, parameters)
        table: dict[tuple, Any] = {}
        with quiet(seed=seed), keep_store(), _Trainer(self.svi, setting, parameters) as trainer:
            for label, place in self.places:
                own = origin | ({"stage": digest(place)} if isinstance(place, Mapping) else {})
                for count in self.counts:
                    key = [dimension, label, count]
                    if (found := self.cells.find(key, own)) is None:
                        trainer.go(place)
                        found = self.compute(setting, count, _seed(self.seed, *key))
                        self.cells.add(key, own, found)
                    table[label, count] = found
        return table

    def compute(self, setting: Setting, count: int, seed: int) -> Any:
        """Return the Dataset of one cell; attributes that differ by cell become variables."""
        rows = None if self.rows is None else dict(self.rows)
        own = {"num_particles": count, "reference": setting.exact(self.reference), "seed": seed}
        dataset = measure(*setting.pair, estimators=rows, **self.options, **own).dataset
        return dataset.assign({name: dataset.attrs.pop(name) for name in VARYING if name in dataset.attrs})


class _Trainer:
    """Moves the parameters to a stage: by training steps from where they are, to given values, or by a function.

    At the end the values and ``.grad`` from before are put back.
    """

    def __init__(self, svi: Callable | None, setting: Setting, parameters: Parameters) -> None:
        self.make = svi or (lambda model, guide: SVI(model, guide, pyro.optim.Adam({"lr": 0.01})))
        self.setting, self.parameters = setting, parameters
        self.saved = [(row.leaf, row.leaf.detach().clone(), row.leaf.grad) for row in parameters.rows]
        self.svi: Any = None
        self.steps, self.last = 0, None

    def __enter__(self) -> _Trainer:
        for leaf, _, _ in self.saved:
            leaf.grad = None
        return self

    def __exit__(self, *_: Any) -> None:
        self.rewind()
        for leaf, _, grad in self.saved:
            leaf.grad = grad

    @torch.no_grad()
    def rewind(self) -> None:
        for leaf, value, _ in self.saved:
            leaf.copy_(value)

    def go(self, place: Any) -> None:
        if place is None or place is self.last:
            return
        setting, self.last = self.setting, place
        if isinstance(place, Integral):
            self.train(place)
        else:
            self.rewind()
            if callable(place):
                place(setting.model, setting.guide, *setting.args, **setting.kwargs)
            else:
                assign(self.parameters, place)

    def train(self, steps: int) -> None:
        setting = self.setting
        self.svi = self.svi or self.make(setting.model, setting.guide)
        for _ in range(steps - self.steps):
            self.svi.step(*setting.args, **setting.kwargs)
        self.steps = steps


def _seed(*parts: Any) -> int:
    return zlib.crc32(repr(parts).encode())
