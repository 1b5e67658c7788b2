r"""Draw latents and data together from a model, and score given latents under a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from .._checks import StepError, fail
from .._pyro import Messenger
from .handlers import Recorder, is_computed, is_subsample
from .quiet import ModuleWatch, quiet
from .run import make_site, plate_wrapper, split_messenger_guide
from .sites import Site

__all__ = ["Place", "Simulation", "find_places", "held", "score", "simulate"]


@dataclass(frozen=True)
class Place:
    """Where an observed site gets its value from: an argument, or the rows of it that a plate holds.

    Args:
        site: The observed site.
        key: Which argument: a position or a name.
        plate, dim: The subsampled plate whose rows are observed, and its dim in the argument; None if all of it is.
    """

    site: str
    key: int | str
    plate: str | None = None
    dim: int | None = None

    def put(self, simulated: Tensor, given: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the argument with simulated data in it."""
        simulated = simulated.to(given.dtype)
        if self.plate is None:
            return simulated.expand(given.shape)
        return given.index_copy(self.dim, batch[self.plate], simulated)


@dataclass(frozen=True)
class Simulation:
    r"""Latents and data of one run of the model, $(z,x)\sim p_\theta$, detached.

    Args:
        values: What each unobserved site drew, or each site that the model observes, by name.
        batch: Indices of plates, by name.
        result: What the program returned.
        params: Unconstrained leaves met.
    """

    values: dict[str, Tensor] = field(repr=False)
    batch: dict[str, Tensor] = field(repr=False)
    result: Any = field(repr=False)
    params: dict[str, Tensor] = field(repr=False)

    def replaced(self, places: tuple[Place, ...], args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict]:
        """Return args and kwargs with the simulated data in their places."""
        given: dict[int | str, Any] = dict(enumerate(args)) | dict(kwargs)
        for place in places:
            given[place.key] = place.put(self.values[place.site], given[place.key], self.batch)
        return tuple(given[i] for i in range(len(args))), {name: given[name] for name in kwargs}


def held(program: Callable) -> Callable:
    """Return a program that is run in evaluation mode and whose parameters no gradient reaches."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), ModuleWatch(train=False) as watch:
            try:
                return program(*args, **kwargs)
            finally:
                watch.restore_modes()

    return run


def simulate(program: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Simulation:
    """Run a program in evaluation mode with its observed sites drawn."""
    with Recorder() as run:
        result = held(poutine.uncondition(program))(*args, **kwargs)
    messages = run.messages
    plates = {n for n, m in messages.items() if is_subsample(m)}
    return Simulation(
        {n: m["value"] for n, m in messages.items() if n not in plates},
        {n: messages[n]["value"] for n in plates},
        result,
        run.params,
    )


def score(
    guide: Callable,
    values: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    num_particles: int = 1,
    max_plate_nesting: int | None = None,
) -> tuple[dict[str, Site], dict[str, Tensor]]:
    r"""Return the guide's sites at given values of latents and plates, and the leaves that it met.

    Args:
        values: By name; with several particles, these first. A site without one is drawn.
        num_particles, max_plate_nesting: As for `draw`.
    """
    with Recorder({n: (v, None) for n, v in values.items()}) as run:
        plate_wrapper(num_particles, max_plate_nesting)(guide)(*args, **kwargs)
    messages = run.messages
    if isinstance(poutine.unwrap(guide), Messenger):
        messages = split_messenger_guide(messages)[1]
    return {n: make_site(m) for n, m in messages.items() if not is_subsample(m)}, run.params


# Where the data are -------------------------------------------------------------------------------------------------


def find_places(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Place, ...]:
    r"""Find the argument that each observed site gets its value from, and check that the model reads it only there.

    Found by identity, or, where a plate subsamples, by the rows of the batch. Generators and buffers are as before.

    Raises:
        StepError: A site whose value is no argument or several; a factor; a model that reads its data elsewhere too,
            such as teacher forcing.
    """
    with quiet(train=False), torch.no_grad():
        with Recorder() as run:
            model(*args, **kwargs)
        observed = {n: m for n, m in run.messages.items() if m["is_observed"] and not is_computed(m)}
        batch = {n: m["value"] for n, m in run.messages.items() if is_subsample(m)}
        given = dict(enumerate(args)) | dict(kwargs)
        places = tuple(_place(name, msg, given, batch) for name, msg in observed.items())
        _check_distinct(places)
        _check_reads(model, args, kwargs, places)
    return places


def _place(name: str, msg: dict, given: Mapping[int | str, Any], batch: Mapping[str, Tensor]) -> Place:
    if isinstance(msg["fn"], Unit):
        _refuse(name, "a factor", "a factor is no distribution to draw from")
    found = [Place(name, key) for key, x in given.items() if x is msg["value"]]
    for frame in msg["cond_indep_stack"] if not found else ():
        if frame.vectorized and frame.full_size not in (None, frame.size):
            dim = frame.dim - msg["fn"].event_dim
            found += [
                Place(name, key, frame.name, dim)
                for key, x in given.items()
                if isinstance(x, Tensor) and _is_rows(msg["value"], x, batch[frame.name], dim)
            ]
    if len(found) != 1:
        got = f"{len(found)} arguments that are its observed value" if found else "a value that is no argument"
        _refuse(name, got, "the argument to replace by simulated data is found by identity")
    return found[0]


def _is_rows(value: Tensor, x: Tensor, index: Tensor, dim: int) -> bool:
    if x.dim() != value.dim() or x.dim() < -dim or x.dtype != value.dtype or int(index.max()) >= x.shape[dim]:
        return False
    return torch.equal(torch.nan_to_num(x.index_select(dim, index)), torch.nan_to_num(value))


def _check_distinct(places: tuple[Place, ...]) -> None:
    keys = [place.key for place in places]
    for place in places:
        if keys.count(place.key) > 1:
            _refuse(place.site, "an argument that several sites observe", "one value cannot stand for two draws")


def _check_reads(model: Callable, args: tuple, kwargs: Mapping[str, Any], places: tuple[Place, ...]) -> None:
    """Replay the model on a simulation: the data must have the density that they were drawn from."""
    with Recorder() as first:
        poutine.uncondition(model)(*args, **kwargs)
    drawn = {n: m["value"] for n, m in first.messages.items()}
    batch = {n: v for n, v in drawn.items() if is_subsample(first.messages[n])}
    args, kwargs = Simulation(drawn, batch, None, {}).replaced(places, args, kwargs)
    with Recorder({n: (v, None) for n, v in drawn.items()}) as second:
        model(*args, **kwargs)
    for place in places:
        one, two = first.messages[place.site], second.messages.get(place.site)
        if two is None or not _same_density(one, two):
            _refuse(
                place.site,
                "a density that changes when its data are replaced",
                "the model reads the data elsewhere than at obs=, so that drawing obs= anew is no draw from it",
            )


def _same_density(one: dict, two: dict) -> bool:
    pair = [m["fn"].log_prob(m["value"]) for m in (one, two)]
    return pair[0].shape == pair[1].shape and torch.allclose(*pair, rtol=1e-4, atol=1e-5, equal_nan=True)


def _refuse(site: str, got: str, because: str) -> None:
    fail(
        StepError,
        "Sleep",
        f"simulate site {site!r}",
        got=got,
        because=because,
        fix="Write simulate=program, a Pyro program of the model's arguments that draws the latents under their names "
        "and returns the arguments with simulated data.",
    )
