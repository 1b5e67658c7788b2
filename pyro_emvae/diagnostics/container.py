r"""From named arrays to the container of the installed ArviZ: InferenceData (0.x), DataTree (1.x). Imports no torch."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import DataError, fail, nearest

__all__ = [
    "Array",
    "Variable",
    "attributes",
    "dataset",
    "finalize",
    "fit_stats",
    "name_dims",
    "rename_dims",
    "unknown",
    "variable_name",
]

RESERVED = ("chain", "draw", "sample", "step", "iteration")
PHASES = {"flag_values": [0, 1, 2], "flag_meanings": "E M joint"}


@dataclass(frozen=True)
class Variable:
    """An array and the name of each of its dims, sample dims included."""

    values: np.ndarray
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Array:
    """Values with draws first (observed data: none), and its other dims: a plate's name, or None."""

    values: np.ndarray
    dims: tuple[str | None, ...]


def variable_name(name: str) -> str:
    r"""Return the name of a site in a file: a slash would open a group, so it becomes a dot.

    Raises:
        DataError: If a dim has to have that name.

    Example:
        >>> variable_name("encoder/z")
        'encoder.z'
    """
    if name in RESERVED:
        fail(
            DataError,
            "to_arviz",
            f"write site {name!r}",
            got="the name of a dim of ArviZ's schema",
            because="a variable cannot be called as a dim is",
            fix=f"Rename the site, for instance to '{name}_'.",
        )
    return name.replace("/", ".")


def rename_dims(dims: Iterable[str], variables: Iterable[str]) -> dict[str, str]:
    r"""Return a free name per dim: one that a variable or the schema has already gets the ending ``_dim``.

    Example:
        >>> rename_dims(["data", "n"], ["n", "x"])
        {'data': 'data', 'n': 'n_dim'}
    """
    dims = list(dict.fromkeys(dims))
    taken = {*RESERVED, *variables}
    free = {dim for dim in dims if dim not in taken}
    names = {}
    for dim in dims:
        name = dim
        while name in taken or (name != dim and name in free):
            name += "_dim"
        names[dim] = name
        free.add(name)
    return names


def name_dims(
    arrays: Mapping[str, Mapping[str, Array]], dims: Mapping[str, Sequence[str]], num_chains: int = 1
) -> tuple[dict[str, dict[str, Variable]], dict[str, str]]:
    """Return the groups' variables with a name for each dim, and the new name of each dim."""
    sites = {site for group in arrays.values() for site in group}
    for site in dims:
        if site not in sites:
            unknown("dims", site, sites)
    members = [member for group in arrays.values() for member in group.items()]
    given = {site: _site_dims(site, array, dims.get(site)) for site, array in members}
    names = rename_dims((d for own in given.values() for d in own), map(variable_name, sites))
    result: dict[str, dict[str, Variable]] = {}
    for group, members in arrays.items():
        sample = () if group == "observed_data" else ("chain", "draw")
        result[group] = {}
        for site, array in members.items():
            values = array.values
            values = values.reshape(num_chains, -1, *values.shape[1:]) if sample else values
            result[group][variable_name(site)] = Variable(values, (*sample, *(names[d] for d in given[site])))
    return result, names


def _site_dims(site: str, array: Array, given: Sequence[str] | None) -> tuple[str, ...]:
    unnamed = [i for i, name in enumerate(array.dims) if name is None]
    if given is not None and len(given) == len(array.dims):
        return tuple(given)
    if given is not None and len(given) != len(unnamed):
        fail(
            DataError,
            "to_arviz",
            f"name the dims of site {site!r}",
            got=f"{len(given)} names: {list(given)}",
            because=f"it has {len(unnamed)} event dims and {len(array.dims)} dims in all",
            fix=f'Write dims={{"{site}": [...]}} with {len(unnamed)} names.',
        )
    own = given or [f"{variable_name(site)}_dim_{i}" for i in range(len(unnamed))]
    filled = dict(zip(unnamed, own, strict=True))
    return tuple(filled.get(i, name) for i, name in enumerate(array.dims))


def attributes(**attrs: Any) -> dict[str, Any]:
    r"""Return a group's attributes, with the library's own, as types that a netCDF file can hold.

    Example:
        >>> attrs = attributes(seed=None, vectorized=True)
        >>> attrs["creation_library"], attrs["vectorized"], "seed" in attrs
        ('pyro_emvae', 1, False)
    """
    import pyro

    own = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "pyro_emvae",
        "creation_library_version": sys.modules[__name__.partition(".")[0]].__version__,
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "inference_method": "svi",
    }
    return own | plain(attrs)


def plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Return attributes as str, int, float or lists of these; None is left out, all else is spelled out."""
    # "units" of "seconds" would make xarray read the variable back as a duration.
    named = {"unit" if key == "units" else str(key): _plain(value) for key, value in attrs.items()}
    return {key: value for key, value in named.items() if value is not None and value != []}


def _plain(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str):
        return str(value)  # not a subclass such as torch's version
    if isinstance(value, (bool, np.bool_, int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        values = [_plain(v) for v in value]
        same = len({type(v) for v in values}) == 1 and not isinstance(next(iter(values), None), list)
        return values if same or not values else [str(v) for v in values]
    return str(value)


def dataset(variables: Mapping[str, Variable], coords: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    r"""Return an ``xarray.Dataset`` of the variables; a dim without coords is numbered.

    Raises:
        DataError: If two variables need different sizes of one dim, or a dim's coords have another length.
    """
    import xarray as xr

    sizes: dict[str, tuple[int, str]] = {}
    for name, variable in variables.items():
        for dim, size in zip(variable.dims, variable.values.shape, strict=True):
            other, owner = sizes.setdefault(dim, (size, name))
            if other != size:
                fail(
                    DataError,
                    "to_arviz",
                    f"use dim {dim!r} for {name!r} and {owner!r}",
                    got=f"sizes {size} and {other}",
                    because="a dim has one size in a group",
                    fix=f'Write dims={{"{name}": [...]}} with another name.',
                )
    index = {dim: np.asarray(coords[dim]) if dim in coords else np.arange(size) for dim, (size, _) in sizes.items()}
    for dim, (size, name) in sizes.items():
        if len(index[dim]) != size:
            fail(
                DataError,
                "to_arviz",
                f"label dim {dim!r} of {name!r}",
                got=f"{len(index[dim])} coords for size {size}",
                because="there is one label per element",
                fix=f'Write coords={{"{dim}": ...}} with {size} labels.',
            )
    data = {name: (variable.dims, variable.values) for name, variable in variables.items()}
    return xr.Dataset(data, coords=index, attrs=dict(attrs))


def fit_stats(fit: Any, **attrs: Any) -> Any:
    r"""Return the history of a fit with a leading dim ``chain``: ``(chain, step)`` and ``(chain, iteration)``.

    Args:
        fit: Anything with ``.history``, an ``xarray.Dataset``.
        attrs: Further attributes.

    Raises:
        DataError: If there is no such history.
    """
    history = getattr(fit, "history", None)
    if not hasattr(history, "data_vars"):
        fail(
            DataError,
            "to_arviz",
            "write fit_stats",
            got=f"{type(fit).__name__} with a history of type {type(history).__name__}",
            because="the ELBO and its phases are read from fit.history, an xarray.Dataset",
            fix="Pass what svi.run(...) or em.run(...) returned, or fit=None.",
        )
    stats = history if "chain" in history.dims else history.expand_dims(chain=[0])
    stats = stats.transpose("chain", ...)
    for name, variable in stats.variables.items():
        own = PHASES if name == "phase" else {}
        variable.attrs = plain({**variable.attrs, **own})
    provenance = {f"fit_{key}": value for key, value in dict(getattr(fit, "provenance", {})).items()}
    stats.attrs = attributes(**attrs, **{**history.attrs, **provenance, "status": getattr(fit, "status", None)})
    return stats


def finalize(groups: Mapping[str, Any], attrs: Mapping[str, Any] | None = None) -> Any:
    """Return the groups that are not None as ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x)."""
    import arviz as az

    groups = {name: group for name, group in groups.items() if group is not None}
    if int(az.__version__.split(".")[0]) == 0:  # 1.x still answers to az.InferenceData
        return az.InferenceData(attrs=dict(attrs or {}), **groups)
    import xarray as xr

    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update(attrs or {})
    return tree


def unknown(what: str, name: str, known: Iterable[str]) -> None:
    """Raise: ``dims`` or ``coords`` name something that is not there."""
    fail(
        DataError,
        "to_arviz",
        f"use {what}[{name!r}]",
        got="an unknown name",
        because=f"a key of {what} is the name of {'a variable' if what == 'dims' else 'a dim'}",
        fix=nearest(name, known),
    )
