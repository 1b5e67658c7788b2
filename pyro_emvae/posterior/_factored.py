r"""The log joint under a product of factors: which sites each latent moves, and its expectation over product nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import NonFiniteError, StepError, fail
from .._pyro import Messenger, scale_and_mask
from ..parameters import reach
from ..particles import Particles, Site, draw, hold_batch, is_subsample, replay, stack_runs
from ._factors import DiscreteFactor, family_of
from ._families import Factor
from ._masks import counted_without, refuse_counted
from ._plates import Batch
from .enumerated import _sites, _trace

__all__ = ["FactoredJoint", "Nodes", "Rows"]

MAX_ROWS, MAX_NUMBERS = 50_000, 10_000_000


@dataclass(frozen=True)
class Nodes:
    """Values that one factor takes, by name ``(R, *batch, *event)``, with weights ``(R, *batch)``, plates of size 1."""

    values: Mapping[str, Tensor] = field(repr=False)
    weights: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class Rows:
    """Which node of each factor a row has, so that factors that meet in a site take all combinations.

    Args:
        digits: By factor, the node of each row: ``(S,)``.
        share: By colour, one over the number of its nodes: the weight of each in sites that none of its factors moves.
        colors: By factor, its colour.
    """

    digits: dict[int, Tensor] = field(repr=False)
    share: tuple[float, ...] = ()
    colors: dict[int, int] = field(default_factory=dict)
    count: int = 1


class FactoredJoint:
    r"""$\log p(x,z)$ with its latents and sites, to be averaged over $q(z)=\prod_jq_j(z_j)$.

    Args:
        obj: The half-step that asks, for its errors.
        model, args, kwargs: What is run.
        known: What is known of models: which sites a latent moves, whether many values are run at once; added to.

    Raises:
        StepError: A latent that is neither enumerable nor of a known family, or none at all.
    """

    def __init__(
        self, obj: str, model: Callable, args: tuple, kwargs: Mapping[str, Any], known: dict[Any, Any] | None = None
    ) -> None:
        self.obj, self.model, self.args, self.kwargs = obj, model, args, dict(kwargs)
        self.known = {} if known is None else known
        self.generator, self.batch = torch.get_rng_state(), {}
        with Batch() as batch:
            run, given = self._first(self.model)
        self.batch, self.drawn = batch.indices, tuple(batch.drawn)
        self.nesting, self.latents, self.sites = run.max_plate_nesting, run.latents, run.model
        if not self.latents:
            fail(
                StepError,
                obj,
                "be the E-step",
                got="a model without latents",
                because="there is nothing to average over",
                fix="Use SVI to maximise the likelihood.",
            )
        self.dtype = min((s.log_prob.dtype for s in run.model.values()), key=lambda kind: torch.finfo(kind).bits)
        self.leaves, self.params = frozenset(given.leaves), list(run.params["model"].values())
        self.reached = self._reached(run, given)
        suspects = counted_without(self.reached, {name: site.mask for name, site in run.model.items()})
        refuse_counted(obj, (pair for pair in suspects if self._counts(run, given, *pair)))

    def _counts(self, run: Particles, given: _Start, name: str, site: str) -> bool:
        """Whether a latent moves a site's density where the latent is masked; taken for granted of discrete ones."""
        if name not in given.leaves:
            return True
        log_p = run.model[site].scaled.sum()
        (slope,) = torch.autograd.grad(log_p, [given.leaves[name]], retain_graph=True, materialize_grads=True)
        latent = run.model[name]
        size = slope.abs().reshape(*slope.shape[: slope.dim() - latent.fn.event_dim], -1).sum(-1)
        return bool((size * ~torch.as_tensor(latent.mask)).any())

    def _first(self, model: Callable) -> tuple[Particles, _Start]:
        with torch.enable_grad(), _Start(self.obj) as given:
            return draw(model, _draw_nothing, self.args, self.kwargs), given

    def _reached(self, run: Particles, given: _Start) -> dict[str, frozenset[str]]:
        """Return the latents that move each site's density: by autograd, discrete ones by enumeration."""
        ids = {id(leaf): name for name, leaf in given.leaves.items()}
        found = {n: {ids[i] for i in reach([s.log_prob]) if i in ids} for n, s in run.model.items()}
        if len(ids) < len(self.latents):
            key = ("moved", self.model, *run.model)
            if key not in self.known:
                self.known[key] = self._enumerated()
            for name, latents in self.known[key].items():
                found[name] |= latents
        return {name: frozenset(latents) for name, latents in found.items()}

    def _enumerated(self) -> dict[str, set[str]]:
        """Return the discrete latents that move each site."""

        def model(*args: Any, **kwargs: Any) -> None:
            with _Start(self.obj, discrete=False):
                self.model(*args, **kwargs)

        with torch.random.fork_rng(devices=[]), hold_batch(self.batch), torch.no_grad():
            torch.set_rng_state(self.generator)
            trace, _ = _trace(model, self.args, self.kwargs, self.nesting)
        sites = _sites(trace)
        symbols = {s["infer"]["_enumerate_symbol"]: n for n, s in sites.items() if s["infer"].get("_enumerate_symbol")}
        dims = {n: s["packed"]["unscaled_log_prob"]._pyro_dims for n, s in sites.items()}
        return {name: {symbols[d] for d in mine if d in symbols} for name, mine in dims.items()}

    # Layout ---------------------------------------------------------------------------------------------------------

    def start(self) -> list[Factor]:
        """Return a factor for each latent, at its prior mean or with its prior's probabilities."""
        kinds = {n: family_of(s.fn) or DiscreteFactor for n, s in self.latents.items()}
        return [kinds[name].start(name, site.fn) for name, site in self.latents.items()]

    def moved_by(self, names: Sequence[str]) -> list[str]:
        """Return the sites that one of some latents moves."""
        return [site for site, latents in self.reached.items() if latents & set(names)]

    def lacking(self, name: str) -> dict[int, list[str]]:
        """Return plates of a latent, by dim, that a site lacks which the latent moves: its elements may meet there."""
        found: dict[int, list[str]] = {}
        for site in self.moved_by([name]):
            mine = {frame.name for frame in self.sites[site].frames}
            for frame in self.latents[name].frames:
                if frame.name not in mine and frame.size > 1:
                    found.setdefault(frame.dim, []).append(site)
        return found

    def rows(self, factors: Sequence[Factor], nodes: Mapping[int, Nodes], sites: Sequence[str]) -> Rows:
        """Give factors that meet in a site colours of their own, and rows all combinations of their nodes."""
        place = {name: i for i, factor in enumerate(factors) for name in factor.names}
        near: dict[int, set[int]] = {i: set() for i in nodes}
        for site in sites:
            together = {place[name] for name in self.reached[site]} & nodes.keys()
            for i in together:
                near[i] |= together - {i}
        colors: dict[int, int] = {}
        for i in sorted(nodes, key=lambda i: -len(near[i])):
            taken = {colors[other] for other in near[i] if other in colors}
            colors[i] = next(c for c in range(len(nodes)) if c not in taken)
        sizes = [max(len(nodes[i]) for i in nodes if colors[i] == c) for c in range(len(set(colors.values())))]
        count = math.prod(sizes)
        if count > MAX_ROWS:
            self._refuse_rows([factors[i] for i in nodes], count)
        every = torch.arange(count)
        digits = {i: every // math.prod(sizes[colors[i] + 1 :]) % sizes[colors[i]] for i in nodes}
        return Rows(digits, tuple(1 / size for size in sizes), colors, count)

    def _refuse_rows(self, factors: Sequence[Factor], count: int) -> None:
        names = [name for factor in factors for name in factor.names]
        fail(
            StepError,
            self.obj,
            f"average over {', '.join(map(repr, names[:8]))}",
            got=f"{count:.3g} combinations of nodes",
            because=f"latents that meet in one site take all combinations of their nodes, at most {MAX_ROWS}",
            fix="Use fewer such latents, a smaller num_nodes=, steps.MonteCarlo(), or a guide.",
        )

    def pad(self, name: str, value: Tensor) -> Tensor:
        """Return ``(S, *batch, *event)`` of a latent as ``(S, *plates, *event)``."""
        event = self.latents[name].fn.event_dim
        return _pad(value, event, self.nesting)

    def shape(self, name: str) -> torch.Size:
        """Return the batch shape of a latent."""
        value, event = self.latents[name].value, self.latents[name].fn.event_dim
        return value.shape[: value.dim() - event]

    # Runs -----------------------------------------------------------------------------------------------------------

    @property
    def at_once(self) -> str:
        """Which values the model may be run at in one run: ``"all"``, those of ``"discrete"`` latents, ``"none"``."""
        return self.known.get(("at_once", self.model), "none")

    def run(self, values: Mapping[str, Tensor], count: int, how: str = "") -> Particles:
        """Run the model at rows of values ``(S, *batch, *event)``, with the random numbers of the first run.

        Args:
            values: By latent.
            count: S.
            how: As `at_once`; with ``"discrete"`` all rows have the same continuous values.
        """
        how = how or ("all" if self.at_once == "all" else "none")
        with torch.random.fork_rng(devices=[]), hold_batch(self.batch):
            torch.set_rng_state(self.generator)
            if count > 1 and how == "discrete":
                given = {
                    name: value[0] if name in self.leaves else self.pad(name, value) for name, value in values.items()
                }
                return self._replay(given, count)
            if count > 1 and how == "all":
                return self._replay({name: self.pad(name, value) for name, value in values.items()}, count)
            runs = []
            for s in range(count):
                torch.set_rng_state(self.generator)
                runs.append(self._replay({name: value[s] for name, value in values.items()}, 1))
        return runs[0] if count == 1 else stack_runs(runs)

    def _replay(self, values: Mapping[str, Tensor], count: int) -> Particles:
        options = {"num_particles": count, "max_plate_nesting": self.nesting}
        return replay(self.model, _draw_nothing, values, self.args, self.kwargs, **options)

    def expect(
        self,
        factors: Sequence[Factor],
        nodes: Mapping[int, Nodes],
        sites: Sequence[str],
        rows: Rows,
        target: int | None,
        use: Callable[[Particles, dict[str, Tensor], Tensor], None],
    ) -> None:
        r"""Run the model at all rows, and hand the weighted log densities of sites to ``use``, some rows at a time.

        The weight of a row at a site is the product of the weights of those nodes that move the site.

        Args:
            factors: All factors; those without `nodes` move none of the sites.
            nodes: By place of a factor.
            sites: The sites to be averaged.
            rows: From `rows`.
            target: The factor that is looked for, if one is: the density of its latent is not masked.
            use: Called with the run, the weighted rows by site ``(S, *plates)``, and which rows these are.
        """
        place = {name: i for i, factor in enumerate(factors) for name in factor.names}
        for part in self._parts(factors, nodes, rows):
            values = {}
            for name, site in self.latents.items():
                i = place[name]
                if i in nodes:
                    values[name] = _take(nodes[i].values[name], rows.digits[i][part])
                else:
                    values[name] = site.value.detach().expand(len(part), *site.value.shape)
            run, weighted = self.run(values, len(part), self.at_once), {}
            for name in sites:
                involved = {place[latent] for latent in self.reached[name]} & nodes.keys()
                site = run.model[name]
                row = run.rows(_own(site) if name in self.latents and place[name] == target else site.scaled)
                weight = self._weights(nodes, rows, involved, part).to(row)
                weighted[name] = torch.where(weight > 0, weight * row, 0.0)
            use(run, weighted, part)

    def _parts(self, factors: Sequence[Factor], nodes: Mapping[int, Nodes], rows: Rows) -> list[Tensor]:
        """Return rows that are run at once: those of the same continuous values, if no others may."""
        every = torch.arange(rows.count)
        largest = max(site.log_prob.numel() for site in self.sites.values())
        size = max(1, MAX_NUMBERS // max(1, largest))
        if self.at_once == "discrete":
            key = torch.zeros(rows.count, dtype=torch.long)
            for i in nodes:
                if not isinstance(factors[i], DiscreteFactor):
                    key = key * (int(rows.digits[i].max()) + 1) + rows.digits[i]
            groups = [every[key == k] for k in key.unique()]
            return [part for group in groups for part in group.split(size)]
        return list(every.split(1 if self.at_once == "none" else size))

    def _weights(self, nodes: Mapping[int, Nodes], rows: Rows, involved: set[int], part: Tensor) -> Tensor:
        like = next(iter(nodes.values())).weights
        weight = like.new_ones((len(part), *(1,) * self.nesting))
        for color, share in enumerate(rows.share):
            mine = [i for i in involved if rows.colors[i] == color]
            if not mine:
                weight = weight * share
            for i in mine:
                weight = weight * _pad(_take(nodes[i].weights, rows.digits[i][part], zero=True), 0, self.nesting)
        return weight

    def refuse_non_finite(self, run: Particles) -> None:
        """Raise, naming the first site that is not finite."""
        fail(
            NonFiniteError,
            self.obj,
            "average the log joint",
            got=run.first_non_finite() or "a gradient that is not finite",
            because="a factor is found from its derivatives and values",
            fix="Start from other parameters, or bound what the site divides by.",
        )


class _Start(Messenger):
    """Give every latent a value: continuous ones the prior mean as a leaf of autograd, discrete ones an outcome."""

    def __init__(self, obj: str, discrete: bool = True) -> None:
        super().__init__()
        self.obj, self.discrete = obj, discrete
        self.leaves: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or msg["done"] or is_subsample(msg) or msg["infer"].get("_do_not_trace"):
            return
        name, fn = msg["name"], msg["fn"]
        if fn.has_enumerate_support:
            if self.discrete:
                first = _outcomes(self.obj, name, fn)[0]
                msg["value"], msg["done"] = first.expand(fn.shape()), True
            return
        family = family_of(fn)
        if family is None:
            _refuse(self.obj, name, fn)
        mean = family.start(name, fn).marginal(name).mean.expand(fn.shape())
        self.leaves[name] = leaf = mean.detach().clone().requires_grad_()
        msg["value"], msg["done"] = leaf, True


def _outcomes(obj: str, name: str, fn: Any) -> Tensor:
    try:
        outcomes = fn.enumerate_support(expand=False)
    except NotImplementedError as cause:
        _refuse(obj, name, fn, cause)
    if fn.event_dim and any(size != 1 for size in outcomes.shape[1 : outcomes.dim() - fn.event_dim]):
        _refuse(obj, name, fn)
    return outcomes.reshape(outcomes.shape[0], *fn.event_shape)


def _refuse(obj: str, name: str, fn: Any, cause: BaseException | None = None) -> None:
    fail(
        StepError,
        obj,
        f"give {name!r} a factor",
        got=f"{type(fn).__name__}{tuple(fn.shape())}",
        because="a factor is of a latent with a few outcomes, or one that is a probability, a positive number, a real "
        "number or vector, a point of a simplex or a positive definite matrix, one per element of its plates",
        fix="Put the elements into a pyro.plate in place of .to_event(); or use steps.Laplace(), steps.MonteCarlo() or "
        "a guide.",
        cause=cause,
    )


def _own(site: Site) -> Tensor:
    """Return the scaled density of the latent that is looked for: unmasked, for a masked one keeps its prior."""
    return scale_and_mask(site.log_prob, site.scale, None)


def _take(values: Tensor, digits: Tensor, zero: bool = False) -> Tensor:
    """Return the node of each row; a row beyond the last node gets the first one, or zero."""
    inside = digits < len(values)
    found = values[torch.where(inside, digits, 0).to(values.device)]
    if not zero or bool(inside.all()):
        return found
    return torch.where(inside.to(values.device).reshape(-1, *(1,) * (found.dim() - 1)), found, 0.0)


def _pad(value: Tensor, event_dim: int, nesting: int) -> Tensor:
    """Return ``(S, *batch, *event)`` as ``(S, *plates, *event)``."""
    batch = value.dim() - 1 - event_dim
    return value.reshape(len(value), *(1,) * (nesting - batch), *value.shape[1:])


def _draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide for a model whose latents are all given."""
