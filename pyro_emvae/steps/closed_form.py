r"""The M-step in closed form, from expected complete-data statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import DegenerateError, StepError, fail, nearest, positive_int
from .._registry import Traits, register
from ..engine import Engine, State
from ..parameters import MODEL, assign
from ..posterior import Posterior, Support
from .base import HalfStep, Info

__all__ = ["ClosedForm", "Summed", "latent_of", "total", "total_of"]


def total(statistics: Callable[..., Any], support: Support, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Return the posterior expectation of statistics, summed over the data with scale and mask.

    ``statistics.total(support, *args, **kwargs)`` is used where there is one: sums of products of responsibilities and
    data, for instance, need no statistic per outcome and datum.
    """
    direct = getattr(statistics, "total", None)
    if direct is not None:
        return direct(support, *args, **kwargs)
    return support.total(lambda values: statistics(values, *args, **kwargs))


def total_of(
    statistics: Callable[..., Any], posterior: Posterior, num_particles: int, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """Return `total` over the support of a posterior.

    ``statistics.of_posterior(posterior, *args, **kwargs)`` is used where there is one: statistics of a chain need the
    probabilities of neighbours, not all joint outcomes.

    Raises:
        StepError: The model draws its batch, so that nobody knows which data it holds.
    """
    direct = getattr(statistics, "of_posterior", None)
    support = posterior.support(num_particles) if direct is None else None
    drawn = getattr(posterior, "drawn", ()) if support is None else support.drawn
    if drawn:
        fail(
            StepError,
            "steps.ClosedForm",
            "take statistics of a batch that the model draws",
            got=f"a plate {drawn[0]!r} with subsample_size=",
            because="`statistics` has to know which data the batch holds",
            fix=f"Pass the batch to the model: pyro.plate({drawn[0]!r}, N, subsample=index).",
        )
    if support is None:
        return direct(posterior, *args, **kwargs)
    return total(statistics, support, *args, **kwargs)


@dataclass(frozen=True)
class Summed:
    """What is left of a posterior that was found slice by slice: for each `ClosedForm`, by its id, its statistics.

    ``held`` is `Posterior.held`.
    """

    totals: Mapping[int, dict[str, Tensor]]
    held: Callable[[int], Callable[[], Tensor]] = field(repr=False)


def latent_of(obj: str, values: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the values of a latent that a ready step reads by name."""
    if name not in values:
        fail(
            StepError,
            obj,
            f"read latent {name!r}",
            got="no such latent in the model",
            because="its statistics are taken from the latents by name",
            fix=nearest(name, values) + " Write latent=...",
        )
    return values[name]


class ClosedForm(HalfStep):
    r"""Theta from the posterior expectation of sufficient statistics.

    $$\theta_{t+1}=\mathrm{update}\Big(\sum_n E\big[s(x_n,z_n)\,|\,x,\theta_t\big]\Big).$$

    Args:
        statistics: ``statistics(values, *args, **kwargs) -> dict[str, Tensor]``, the complete-data sufficient
            statistics per datum. ``values`` holds each latent as ``(S, *plates, *event)``: S outcomes or draws. The
            statistics are ``(S, *plates, ...)``, or broadcast to it; one that does not depend on the latents has size
            1 at S; an outer product of vectors may be a `posterior.Outer`. Their expectation, and its sum over the
            plates with scale and mask, is taken for you.
        update: ``update(statistics, params) -> dict[str, Tensor]``: the sums, and the model's present parameters;
            returns new values in constrained space, of all parameters or of some. Any further argument of it that has
            the name of one of the model's is given the model's, such as the data of the call in
            ``update(statistics, params, x)``; ``**kwargs`` takes the model's keyword arguments.
        num_particles: Draws, after an E-step that has to draw.
        start: ``start(seed, params, *args, **kwargs) -> dict[str, Tensor]``: initial values found from the data, for
            the starts of ``EM.run(..., n_init=10)``; constrained.

    Values are written in place, so optimizers keep their state.

    Raises:
        StepError: `update` names a parameter that is none of the model's, or asks for an argument that the model was
            not given.
        ModelError: It returns a value of another shape, not finite, or outside its constraint.
        DegenerateError: It returns a value at the boundary of its constraint, to where the expected log joint rises
            (`EM` looks: a scale of 0 is the best for a component on one datum, and a mistake where data vary), or
            meets a singular matrix. `EM.run` then ends with status DEGENERATE.

    After an error nothing has changed.

    Source: Dempster, Laird and Rubin 1977, eqs. 2.2 and 2.3.

    Example:
        >>> def statistics(values, x):
        ...     return {"n": torch.ones_like(x)[None], "x": x[None] - values["z"]}
        >>> ClosedForm(statistics, lambda s, params: {"mean": s["x"] / s["n"]})
        ClosedForm(statistics, <lambda>)
    """

    traits: ClassVar[Traits] = Traits(slots=("M",), arguments=("statistics", "update"), exact=True)

    def __init__(
        self,
        statistics: Callable[..., Mapping[str, Tensor]],
        update: Callable[[dict[str, Tensor], dict[str, Tensor]], Mapping[str, Tensor]],
        num_particles: int = 100,
        start: Callable[..., Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.statistics, self.update, self.start = statistics, update, start
        self.num_particles = positive_int("steps.ClosedForm", "num_particles", num_particles)

    def __repr__(self) -> str:
        names = (getattr(f, "__name__", repr(f)) for f in (self.statistics, self.update))
        return f"ClosedForm({', '.join(names)})"

    def maximise(
        self, problem: Engine, state: State, posterior: Posterior, *args: Any, **kwargs: Any
    ) -> tuple[State, Info]:
        self.commit(problem, self.summarize(posterior, *args, **kwargs), *args, **kwargs)
        return state, Info()

    @torch.no_grad()
    def summarize(self, posterior: Posterior, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior expectation of the statistics, summed over the data with scale and mask."""
        if isinstance(posterior, Summed):
            return posterior.totals[id(self)]
        return _named("statistics", total_of(self.statistics, posterior, self.num_particles, *args, **kwargs))

    @torch.no_grad()
    def commit(self, problem: Engine, totals: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write what `update` makes of the sums into theta, in place; return the names of what was written.

        Args:
            problem: The engine.
            totals: What `summarize` returned, or the sum of what it returned on slices of the data.
            args, kwargs: The model's, for an `update` that takes them.
        """
        theta = [row for row in problem.parameters.rows if row.block in problem.parameters.theta]
        rows = {row.name: row for row in theta if row.block == MODEL}
        params = {row.name: row.value.detach() for row in theta}
        new = self._updated(dict(totals), params, _asked(self.update, problem.model, args, kwargs))
        unknown = [name for name in new if name not in rows]
        if unknown:
            fail(
                StepError,
                "steps.ClosedForm",
                f"set {unknown[0]!r}",
                got="a name that is no parameter of the model",
                because="`update` returns parameters of the model",
                fix=nearest(unknown[0], rows),
            )
        assign(problem.parameters, new)
        return tuple(new)

    def _updated(
        self, totals: dict[str, Tensor], params: dict[str, Tensor], asked: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        try:
            return _named("update", self.update(totals, params, **asked))
        except torch.linalg.LinAlgError as error:
            fail(
                DegenerateError,
                "steps.ClosedForm",
                "make its update",
                got=str(error).splitlines()[0],
                because="a covariance became singular",
                fix="Start elsewhere, or bound the update.",
                cause=error,
            )


def _named(what: str, found: Any) -> dict[str, Tensor]:
    """Return what the user's function returned, which has to be named."""
    if not isinstance(found, Mapping):
        fail(
            StepError,
            "steps.ClosedForm",
            f"use what `{what}` returns",
            got=f"a {type(found).__name__}",
            because=f"`{what}` returns a dict from name to tensor",
            fix=f'Return {{"{"n" if what == "statistics" else "loc"}": ...}}.',
        )
    return dict(found)


def _asked(update: Callable, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the model's arguments that `update` takes, by name."""
    wanted = list(_signature(update).parameters.values())[2:]
    if not wanted:
        return {}
    given = _named_arguments(model, args, kwargs)
    found = dict(kwargs) if any(p.kind is p.VAR_KEYWORD for p in wanted) else {}
    for parameter in wanted:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in given:
            found[parameter.name] = given[parameter.name]
        elif parameter.default is parameter.empty:
            fail(
                StepError,
                "steps.ClosedForm",
                f"call `update` with its argument {parameter.name!r}",
                got=f"a model that was given {', '.join(map(repr, given)) or 'no arguments'}",
                because="beyond the statistics and the parameters it gets the model's arguments, by name",
                fix=nearest(parameter.name, given),
            )
    return found


def _named_arguments(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of the model by the names in its signature."""
    signature = _signature(getattr(model, "forward", model))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # a model behind handlers whose signature is not its own
        return dict(kwargs)
    bound.apply_defaults()
    found = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            found.pop(parameter.name)
    return found


def _signature(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one
        return inspect.Signature()


register(
    "step",
    "closed_form",
    ClosedForm,
    traits=ClosedForm.traits,
    summary="theta from expected sufficient statistics",
    source="Dempster, Laird and Rubin 1977, eqs. 2.2 and 2.3",
)
