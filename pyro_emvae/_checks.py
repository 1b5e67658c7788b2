r"""The error template: every message that a user sees is made here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NoReturn

__all__ = [
    "BlockError",
    "CheckpointError",
    "DataError",
    "DegenerateError",
    "EmvaeError",
    "EstimatorError",
    "ModelError",
    "NonFiniteError",
    "OptimizerError",
    "RecordingError",
    "StepError",
    "choose",
    "fail",
    "message",
    "nearest",
    "number",
    "positive_int",
    "require_data",
    "tensors_in",
]


class EmvaeError(ValueError):
    """Base class of the package's errors; ``got`` is what was observed."""

    got: str = ""


class EstimatorError(EmvaeError):
    """An estimator and a site, an objective or a number of particles do not fit."""


class ModelError(EmvaeError):
    """Model and guide do not fit each other, or not the data."""


class NonFiniteError(ModelError):
    """The objective or a gradient is NaN or infinite."""


class DegenerateError(ModelError):
    """An update left the inside of a parameter's constraint, such as a variance of zero: no maximum lies there.

    ``values`` are what it would have written, by parameter, and ``parameter`` the first that is meant, where known.
    """

    values: Mapping[str, Any] | None = None
    parameter: str = ""


class BlockError(EmvaeError):
    """A parameter cannot be assigned to one block."""


class CheckpointError(EmvaeError):
    """A checkpoint cannot be written or read, or belongs to another model."""


class DataError(EmvaeError):
    """The data are empty, exhausted or of the wrong shape."""


class OptimizerError(EmvaeError):
    """An optimizer, or what was given in its place, cannot be used."""


class RecordingError(EmvaeError):
    """A step cannot be recorded as a graph without changing its meaning."""


class StepError(EmvaeError):
    """A half-step does not fit the model or its slot, or a step was called after a failed one."""


def message(obj: str, act: str, got: str, because: str, fix: str) -> str:
    r"""Fill in the house template.

    Args:
        obj: The public object that refuses, without backquotes.
        act: What it cannot do and where, such as ``"differentiate site 'z'"``.
        got: The observed value.
        because: The requirement that does not hold.
        fix: What to write instead, a full sentence.

    Example:
        >>> message("Pathwise", "differentiate site 'z'", "Bernoulli", "it needs rsample", "Use 'score'.")
        "`Pathwise` cannot differentiate site 'z': got Bernoulli. This is because it needs rsample. Use 'score'."
    """
    return f"`{obj}` cannot {act}: got {got}. This is because {because}. {fix}"


def fail(
    error: type[EmvaeError],
    obj: str,
    act: str,
    *,
    got: str,
    because: str,
    fix: str,
    cause: BaseException | None = None,
) -> NoReturn:
    """Raise `error` with the house template, from `cause` if there is one."""
    made = error(message(obj, act, got, because, fix))
    made.got = got
    raise made from cause


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a phrase that names the known name closest to `name`, and the others.

    Example:
        >>> nearest("pathwize", ["score", "pathwise"])
        "Did you mean 'pathwise'? Known: 'pathwise', 'score'."
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return hint + "Known: " + ", ".join(map(repr, known)) + "."


def positive_int(obj: str, name: str, value: object, minimum: int = 1) -> int:
    """Return `value` if it is an integer of at least `minimum`, else raise.

    Example:
        >>> positive_int("MonteCarloELBO", "num_particles", 8)
        8
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        fail(
            EmvaeError,
            obj,
            f"use {name}",
            got=repr(value),
            because=f"{name} has to be an integer of at least {minimum}",
            fix=f"Write {name}={minimum}, or more.",
        )
    return int(value)


def choose(obj: str, name: str, value: Any, known: Collection[str]) -> Any:
    """Return `value` if it is one of the `known` choices of option `name`, else raise.

    Example:
        >>> choose("EM", "history", "full", ("light", "full"))
        'full'
    """
    if value not in known:
        fail(
            EmvaeError,
            obj,
            f"use {name}={value!r}",
            got="an unknown choice",
            because=f"{name} is one of {tuple(known)}",
            fix=nearest(str(value), known),
        )
    return value


def number(obj: str, name: str, value: Any, bounds: str, fits: Callable[[float], bool], example: float) -> float:
    """Return a real number as a float if it lies in its bounds, which are said in words; raise `EmvaeError` otherwise.

    Example:
        >>> number("steps.Damped", "factor", 1, "above 0", lambda x: x > 0, 0.5)
        1.0
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):
        fail(
            EmvaeError,
            obj,
            f"use {name}",
            got=repr(value),
            because=f"{name} has to be a number {bounds}",
            fix=f"Write {name}={example:g}.",
        )
    return float(value)


def tensors_in(value: Any) -> Iterator[Any]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if hasattr(value, "numel") and hasattr(value, "shape"):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def refuse_missing(obj: str, cause: Exception, *values: Any, act: str = "take a step on this data") -> None:
    """Raise `NonFiniteError` from an error of the model's or guide's if a tensor among the values is not finite."""
    for tensor in tensors_in(values):
        bad = ~tensor.isfinite()
        if bool(bad.any()):
            fail(
                NonFiniteError,
                obj,
                act,
                got=f"{tensor[bad].flatten()[0].item()} in a tensor of shape {tuple(tensor.shape)}",
                because="a distribution cannot be made of it, or score it",
                fix="Leave missing values out by poutine.mask or obs_mask=, with any number in their place.",
                cause=cause,
            )


def require_data(obj: str, *values: Any) -> None:
    """Raise `DataError` if a tensor among the values, however nested, is empty.

    Example:
        >>> import torch
        >>> require_data("elbo", (torch.zeros(2, 3),), {"index": torch.zeros(2)})
    """
    for tensor in tensors_in(values):
        if tensor.numel() == 0:
            fail(
                DataError,
                obj,
                "use empty data",
                got=f"a tensor of shape {tuple(tensor.shape)}",
                because="an objective over no data says nothing",
                fix="Pass at least one datum.",
            )
