r"""What a sampler draws from, and what it returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..._checks import StepError, fail
from ...particles import Particles, Recorder, Site, choose_vectorize, draw, hold_batch, is_subsample, quiet, replay
from ...posterior import Prior, lay_out
from .chains import Chains

__all__ = ["Draws", "Facts", "Sampler", "Target", "draw_nothing", "look"]

Values = dict[str, Tensor]
RERUNS = 4


class Draws(NamedTuple):
    r"""What a sampler returns.

    Args:
        values: By latent, ``(S, *plates, *event)``.
        log_weights: Normalised over S: ``(S, *plates)``, or broadcastable to it.
        log_evidence, entropy: Estimates in nats, NaN where there is none; see `SamplesPosterior`.
        ess: Effective number of draws per unit; of chains, which are independent, S.
        acceptance: Mean acceptance probability per unit.
        khat: Tail index of the weights per unit.
    """

    values: Values
    log_weights: Tensor
    log_evidence: float = math.nan
    entropy: float = math.nan
    ess: Any = math.nan
    acceptance: Any = math.nan
    khat: Any = math.nan


class Facts(NamedTuple):
    """What holds for a model whatever the data: plate dims, whether runs vectorize, a site that joins the data."""

    nesting: int
    vectorize: bool
    entangled: str | None


@dataclass(frozen=True)
class Target:
    r"""The posterior of a model's latents on given data at the present theta, as independent units.

    A unit is one element of the plates that all latents share: a datum; with a latent outside of all plates there is
    one unit, all data. Units are independent given theta, so that each has its own weight, or accepts by itself.

    Args:
        model, args, kwargs: The model and its data.
        facts: See `Facts`.
        latents: The messages of the model's latents, of one run.
        units: The plates that the latents share, by dim.
        batch: Indices of subsampled plates, by name.
        guide: The user's guide, or None.
        params: Unconstrained leaves that the run met.
        beta: The factor of an annealed run: what is drawn from is the posterior to this power.
    """

    model: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    facts: Facts
    latents: dict[str, dict] = field(repr=False)
    units: tuple
    batch: dict[str, Tensor]
    guide: Callable | None = None
    params: dict[str, Tensor] = field(default_factory=dict, repr=False)
    beta: float = 1.0

    @property
    def nesting(self) -> int:
        return self.facts.nesting

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of units in the batch, by plate."""
        first = next(iter(self.latents.values()))
        shape = batch_shape(first)
        return tuple(shape[frame.dim] for frame in self.units)

    @property
    def scale(self) -> float:
        """Size of the data over size of the batch."""
        return math.prod(float(f.full_size or f.size) / float(f.size) for f in self.units)

    def frames(self, name: str) -> tuple:
        return tuple(f for f in self.latents[name]["cond_indep_stack"] if f.vectorized)

    def value_shape(self, name: str) -> tuple[int, ...]:
        """Return ``(*plates, *event)`` of a latent, with all plate dims."""
        msg = self.latents[name]
        batch = batch_shape(msg)
        return (1,) * (self.nesting - len(batch)) + batch + tuple(msg["value"].shape[len(batch) :])

    # Runs of the model ----------------------------------------------------------------------------------------------

    def draw(self, guide: Callable, num_particles: int, treat: Callable[[dict], str] | None = None) -> Particles:
        """Draw from a guide and replay the model, on this batch; see `Recorder` for `treat`."""
        vectorize, nesting = self.facts.vectorize, self.nesting
        with hold_batch(self.batch):
            pair = (self.model, guide, self.args, self.kwargs)
            options = {"num_particles": num_particles, "vectorize": vectorize, "max_plate_nesting": nesting}
            return draw(*pair, treat=treat, **options)

    def lay_out(self, particles: Particles) -> Values:
        """Return the latents' values ``(S, *plates, *event)``."""
        return lay_out(particles.latents.values(), particles.num_particles, self.nesting)

    def replay(self, values: Values) -> list[Particles]:
        """Run the model on values ``(S, *plates, *event)``: in one run, or in one run each."""
        count = len(next(iter(values.values())))
        with hold_batch(self.batch):
            if self.facts.vectorize and count > 1:
                return [self._replay(values, count)]
            return [self._replay({n: self.own_dims(n, v[s]) for n, v in values.items()}, 1) for s in range(count)]

    def own_dims(self, name: str, value: Tensor) -> Tensor:
        """Return a value ``(*plates, *event)`` without the outermost plate dims that the model does not give it."""
        return value.reshape(value.shape[value.dim() - self.latents[name]["value"].dim() :])

    def _replay(self, values: Values, count: int) -> Particles:
        return replay(
            self.model,
            draw_nothing,
            values,
            self.args,
            self.kwargs,
            num_particles=count,
            max_plate_nesting=self.nesting,
        )

    # Log densities --------------------------------------------------------------------------------------------------

    def log_joint(self, values: Values) -> Tensor:
        r"""Return $\beta\log p_\theta(x_n,z_{sn})$ per unit up to a constant, without the batch's scale.

        Shape: ``(S, units)``.
        """
        rows = []
        for particles in self.replay(values):
            terms = [
                self.reduce(self.spelled(particles, site)) for site in particles.model.values() if self.is_inside(site)
            ]
            rows.append(torch.stack([term.expand(particles.num_particles, -1) for term in terms]).sum(0))
        return self.tempered(torch.cat(rows))

    def tempered(self, log_p: Tensor) -> Tensor:
        """Return a log density times the factor of an annealed run."""
        return log_p if self.beta == 1.0 else self.beta * log_p

    def is_inside(self, site: Site) -> bool:
        """Whether a site lies in the units' plates."""
        return {f.name for f in self.units} <= {f.name for f in site.frames}

    def reduce(self, term: Tensor) -> Tensor:
        """Sum a log density ``(S or 1, *plates)`` to units, without the batch's scale: ``(S or 1, units)``."""
        keep = {self.nesting + 1 + frame.dim for frame in self.units}
        others = [dim for dim in range(1, term.dim()) if dim not in keep]
        term = term.sum(others, keepdim=True) if others else term
        shape = [1] * term.dim()
        for dim, size in zip(sorted(keep), self.sizes, strict=True):
            shape[dim] = size
        return term.expand(len(term), *shape[1:]).reshape(len(term), -1) / self.scale

    def spelled(self, particles: Particles, site: Site) -> Tensor:
        """Return a site's scaled log density ``(S or 1, *plates)``, of a latent without its mask.

        What masks hide is then drawn from the prior, which sums to one.
        """
        return particles.rows((site if site.is_observed else replace(site, mask=None)).scaled)

    # Flat coordinates -----------------------------------------------------------------------------------------------

    def flatten(self, values: Values) -> Tensor:
        """Return values ``(S, *plates, *event)`` of all latents side by side: ``(S, units, D)``."""
        return torch.cat([self._to_units(value) for value in values.values()], -1)

    def _to_units(self, value: Tensor) -> Tensor:
        dims = [1 + self.nesting + frame.dim for frame in self.units]
        value = value.movedim(dims, list(range(1, 1 + len(dims))))
        return value.reshape(len(value), math.prod(self.sizes), -1)

    def unflatten(self, flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Values:
        """Undo `flatten`: ``(S, units, D)`` to values of shapes ``(*plates, *event)`` by latent."""
        dims = [self.nesting + frame.dim for frame in self.units]
        values, start = {}, 0
        for name, shape in shapes.items():
            rest = [size for dim, size in enumerate(shape) if dim not in dims]
            width = math.prod(rest)
            part = flat[..., start : start + width].reshape(len(flat), *self.sizes, *rest)
            values[name] = part.movedim(list(range(1, 1 + len(dims))), [1 + dim for dim in dims])
            start += width
        return values

    def unit_shape(self, per_unit: Tensor) -> Tensor:
        """Return numbers ``(S, units)`` in the layout of plates: ``(S, *plates)``."""
        shape = [1] * self.nesting
        for frame, size in zip(self.units, self.sizes, strict=True):
            shape[frame.dim] = size
        return per_unit.reshape(len(per_unit), *shape)

    def rows(self, index: Any = None) -> Tensor | None:
        """Return which rows of all units the batch holds; None if they are all of them."""
        full = [int(f.full_size or f.size) for f in self.units]
        if index is not None:
            return _given_rows(index, self.sizes)
        if not any(f.name in self.batch for f in self.units):
            return None
        rows = torch.zeros((), dtype=torch.long)
        for frame, size, total in zip(self.units, self.sizes, full, strict=True):
            mine = self.batch.get(frame.name, torch.arange(size))
            rows = rows.unsqueeze(-1) * total + mine.to(rows)
        return rows.flatten()


def batch_shape(msg: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the batch shape of a message's value."""
    value = msg["value"]
    return tuple(value.shape[: value.dim() - msg["fn"].event_dim])


def _given_rows(index: Any, sizes: tuple[int, ...]) -> Tensor:
    rows = torch.as_tensor(index).long().flatten()
    if len(sizes) != 1 or len(rows) != sizes[0]:
        fail(
            StepError,
            "MonteCarlo",
            "tell which data the batch holds",
            got=f"index= of {len(rows)} rows for units in plates of sizes {sizes}",
            because="index= is one row number per datum of the one plate that all latents share",
            fix="Pass index=, the row numbers of the batch.",
        )
    return rows


def draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide that leaves every latent to the model: what it draws is the prior."""


class Sampler(ABC):
    """A way to draw from the posterior of a model's latents.

    ``latents`` are those that it takes, ``needs_guide`` whether it uses the user's guide, ``persistent`` whether it
    carries chains from E-step to E-step, and ``num_particles`` its draws per unit by default.
    """

    name: ClassVar[str]
    latents: ClassVar[str] = "any"
    persistent: ClassVar[bool] = False
    num_particles: ClassVar[int] = 100

    @property
    def needs_guide(self) -> bool:
        return False

    def prepare(self, target: Target) -> Target:
        """Return the target with the units that it draws; raise if a latent is none that it takes."""
        return target

    @abstractmethod
    def sample(self, target: Target, chains: Chains | None, num_particles: int) -> tuple[Draws, Chains | None]:
        """Draw, going on from chains of the batch's units; return the draws and where the chains are now."""


# Looking at the model -------------------------------------------------------------------------------------------


def look(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    known: dict[Callable, Facts],
    guide: Callable | None = None,
) -> Target:
    r"""Run the model once and return its target; a model that is met for the first time is run some more.

    Raises:
        StepError: No latent; a subsampled plate that not all latents share.
    """
    messages, batch, params = _run(model, args, kwargs, {})
    latents = {n: m for n, m in messages.items() if not m["is_observed"]}
    if not latents:
        fail(
            StepError,
            "MonteCarlo",
            "be the E-step",
            got="a model without latents",
            because="there is nothing to average over",
            fix="Use SVI to maximise the likelihood.",
        )
    if model not in known:
        known.clear()
        with quiet():
            known[model] = _find_facts(model, args, kwargs, messages, batch)
    facts = known[model]
    units = () if facts.entangled else common_plates(latents.values())
    _check_subsampled(messages, units, facts.entangled)
    return Target(model, args, kwargs, facts, latents, units, batch, guide, params)


def _run(model: Callable, args: tuple, kwargs: Mapping[str, Any], batch: Mapping[str, Tensor]) -> tuple[dict, ...]:
    with hold_batch(batch), Recorder() as run:
        model(*args, **kwargs)
    plates = {n: m for n, m in run.messages.items() if is_subsample(m)}
    taken = {n: m["value"] for n, m in plates.items() if m["value"] is not None and len(m["value"]) < m["fn"].size}
    return {n: m for n, m in run.messages.items() if n not in plates}, taken, run.params


def _find_facts(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], messages: Mapping[str, dict], batch: Mapping[str, Tensor]
) -> Facts:
    dims = [-f.dim for m in messages.values() for f in m["cond_indep_stack"] if f.vectorized]
    with hold_batch(batch):
        pair = (model, Prior(model), args, kwargs)
        vectorize, _ = choose_vectorize("MonteCarlo", None, 2, None, pair, stacklevel=6)
    again = [_run(model, args, kwargs, batch)[0] for _ in range(RERUNS)]
    latents = [m for m in messages.values() if not m["is_observed"]]
    units = {f.name for f in common_plates(latents)}
    outside = [n for n, m in messages.items() if not units <= {f.name for f in m["cond_indep_stack"]}]
    moved = (n for n in outside for run in again if n in run and not _same_density(messages[n], run[n]))
    return Facts(max(dims, default=0), vectorize, next(moved, None))


def common_plates(latents: Iterable[Mapping[str, Any]]) -> tuple:
    """Return the vectorized plates that all these messages share, by dim."""
    frames = [{f for f in m["cond_indep_stack"] if f.vectorized} for m in latents]
    return tuple(sorted(set.intersection(*frames), key=lambda frame: frame.dim))


def _same_density(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    pair = [m["fn"].log_prob(m["value"]) for m in (one, two)]
    return pair[0].shape == pair[1].shape and torch.allclose(*pair, rtol=1e-6, atol=1e-12, equal_nan=True)


def _check_subsampled(messages: Mapping[str, dict], units: tuple, entangled: str | None) -> None:
    frames = {f for m in messages.values() for f in m["cond_indep_stack"]} - set(units)
    names = sorted({f.name for f in frames if f.full_size and int(f.full_size) != int(f.size)})
    if names:
        why = f"site {entangled!r} joins its data" if entangled else "not all latents lie in it"
        fail(
            StepError,
            "MonteCarlo",
            f"draw on a minibatch of plate {names[0]!r}",
            got=f"a subsampled plate while {why}",
            because="one weight, or one accept or reject, would then stand for data that it has not seen",
            fix=f"Give all data, without subsampling in {names[0]!r}.",
        )
