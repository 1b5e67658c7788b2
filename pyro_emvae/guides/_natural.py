r"""Natural gradients of a guide of free parameters, one site after the other, from draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from torch import Tensor

from .._checks import NonFiniteError, StepError, fail
from .._pyro import Messenger
from ..families import Chart
from ..particles import Particles, Site, choose_vectorize, draw, is_subsample, stack_runs
from ._replay import ENDING
from .mean_field import AutoMeanField, MeanFieldSite

__all__ = ["NaturalSteps"]

HALVINGS, LEAST = 10, 100.0


@dataclass
class _Tap:
    """Hands the guide contexts of one site that are made of natural parameters, and notes its plates."""

    wanted: MeanFieldSite
    eta: Tensor | None = None
    chart: Chart | None = None
    context: Tensor | None = None
    plates: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, site: MeanFieldSite, context: Tensor, plates: Mapping[str, Any]) -> Tensor:
        if site is not self.wanted:
            return context.detach()
        if self.chart is None:
            self.context, self.plates = context.detach(), plates
            self.chart = site.family.chart(self.context, site.event_shape)
            self.eta = self.chart.eta.clone().requires_grad_(self.chart.outcomes is None)
        return self.chart.context(self.eta)


class _Hold(Messenger):
    """Lets plates draw their indices once, and use them from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if is_subsample(msg) and msg["value"] is None and msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True

    def _pyro_post_sample(self, msg: dict) -> None:
        if is_subsample(msg) and len(msg["value"]) < msg["fn"].size:
            self.indices[msg["name"]] = msg["value"]


class NaturalSteps:
    r"""Steps of `AutoMeanField` by natural gradients, on one minibatch.

    $$\eta_s\leftarrow(1-\rho)\,\eta_s+\rho\,\hat\eta_s,\qquad
    \hat\eta_s=\nabla_{\mu_s}E_q[\log p(x,z)],\quad\mu_s=E[t_s(z_s)].$$

    Args:
        obj: The half-step that asks, for its errors.
        model: A Pyro model.
        guide: Its guide.
        args, kwargs: The data.
        num_particles: Draws per site.
        known: Whether draws are run at once, and the number of plate dims, by model; added to.

    Raises:
        StepError: A family without natural parameters.
    """

    def __init__(
        self,
        obj: str,
        model: Callable,
        guide: AutoMeanField,
        args: tuple,
        kwargs: Mapping[str, Any],
        num_particles: int,
        known: dict[Callable, tuple[bool, int | None]],
    ) -> None:
        self.obj, self.model, self.guide, self.args, self.kwargs = obj, model, guide, args, dict(kwargs)
        self.hold, self._undo = _Hold(), []
        guide.prepare(args, kwargs)
        self.counts = {site.name: max(num_particles, self._least(site)) for site in guide.sites}
        if model not in known:
            known.clear()
            known[model] = choose_vectorize(obj, None, 2, None, (model, guide, args, self.kwargs), stacklevel=6)
        self.vectorize, self.nesting = known[model]

    def _least(self, site: MeanFieldSite) -> int:
        """Return the least number of draws from which a site's natural parameters are found."""
        chart = site.family.chart(torch.zeros(site.family.num_features(site.event_shape)), site.event_shape)
        if chart is None:
            fail(
                StepError,
                self.obj,
                f"move site {site.name!r}",
                got=f"the family {site.family!r}",
                because="a natural gradient is a step in the natural parameters of an exponential family",
                fix='Write family="full_rank_normal" or another that is one, or e_step=steps.Gradient().',
            )
        return chart.min_draws

    def sweep(self, rate: float) -> float:
        """Move each site once, by a step of length `rate`; return minus the ELBO of the draws for the last site."""
        return [self._move(site, rate) for site in self.guide.sites][-1]

    def restore(self) -> None:
        """Write back all that was moved."""
        with torch.no_grad():
            while self._undo:
                self.guide.write(*self._undo.pop())

    def _move(self, site: MeanFieldSite, rate: float) -> float:
        tap = _Tap(site)
        with self.guide.tapped(tap), self.hold:
            run = self._draw(self.counts[site.name])
            if not bool(torch.isfinite(run.log_p).all()):
                self._refuse_non_finite(run)
            discrete = tap.chart.outcomes is not None
            own, mine = (x.runs[0] if x.runs else x for x in (run.model[site.name], run.guide[_drawn(site)]))
            found = self._of_outcomes if discrete else self._of_slopes
            target = found(site, run, tap, mine.scale)
        target = target.to(tap.context.dtype)
        with torch.no_grad():
            context, moved = _stepped(tap.chart, target, rate)
            moved = moved if own.mask is None else moved & _wide(own.mask, 1)
            self._undo.append((site, tap.plates, tap.context.clone()))
            self.guide.write(site, tap.plates, torch.where(moved, context, tap.context))
            return -float((run.log_p - run.log_q).mean())

    # Draws ----------------------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def _draw(self, count: int, values: Mapping[str, Tensor] | None = None) -> Particles:
        """Draw from the guide and run the model, but for sites whose values ``(particles, ...)`` are given."""
        if self.vectorize and count > 1:
            return self._run(count, values or {})
        rows = [{name: value[k] for name, value in (values or {}).items()} for k in range(count)]
        return stack_runs([self._run(1, row) for row in rows])

    def _run(self, count: int, values: Mapping[str, Tensor]) -> Particles:
        given = {name: (value, None) for name, value in values.items()}
        options = {"num_particles": count, "vectorize": True, "max_plate_nesting": self.nesting, "values": given}
        return draw(self.model, self.guide, self.args, self.kwargs, **options)

    # Natural parameters ---------------------------------------------------------------------------------------------

    def _of_slopes(self, site: MeanFieldSite, run: Particles, tap: _Tap, scale: Any) -> Tensor:
        r"""Return $\hat\eta$ of a continuous site.

        $$\partial_\eta\bar f=(\partial_\eta\bar t)\,\hat\eta,\qquad f=\log p-\log h,$$

        with means over the same draws: exact, whatever they are, where f is affine in t. All is divided by the scale of
        log q, with which the entropy counts.
        """
        drawn = run.guide[_drawn(site)].value
        f = run.log_p.mean()
        if site.transform is not None:
            f = f - run.total([run.guide[site.name]]).mean()
        means = tap.chart.statistics(drawn.double()).flatten(0, -2).sum(0) / run.num_particles
        each = [torch.autograd.grad(x, tap.eta, retain_graph=True)[0].double() for x in (*means, f)]
        *columns, right = (*each[:-1], each[-1] / _wide(scale, 2))
        if tap.chart.log_base is not None:
            base = tap.chart.log_base(drawn).sum() / run.num_particles
            right = right - torch.autograd.grad(base, tap.eta, retain_graph=True)[0]
        found, failed = torch.linalg.solve_ex(torch.stack(columns, -1), right)
        return torch.where((failed == 0)[..., None], found, torch.nan)

    @torch.no_grad()
    def _of_outcomes(self, site: MeanFieldSite, run: Particles, tap: _Tap, scale: Any) -> Tensor:
        r"""Return $\hat\eta$ of a discrete site: $E_q[\log p(x,z)]$ at each outcome, one unit after the other."""
        chart = tap.chart
        drawn = {name: each.value for name, each in run.guide.items() if not _is_point(each)}
        value, found = drawn[site.name], []
        shape = value.shape[: value.dim() - len(site.event_shape)]
        units = value.reshape(*shape, chart.eta.shape[-2], *chart.outcomes.shape[1:])
        for unit in range(chart.eta.shape[-2]):
            runs, place = [], (..., unit, *[slice(None)] * (chart.outcomes.dim() - 1))
            for outcome in chart.outcomes:
                moved = units.clone()
                moved[place] = outcome.to(value)
                runs.append(self._draw(run.num_particles, {**drawn, site.name: moved.reshape(value.shape)}))
            at = torch.stack([(units[place] == x.to(value)).reshape(*shape, -1).all(-1) for x in chart.outcomes])
            found.append(self._summed(site, run, runs, run.rows(at.long().argmax(0)), scale))
        return torch.stack(found, -2).reshape(chart.eta.shape)

    def _summed(self, site: MeanFieldSite, run: Particles, runs: list[Particles], index: Tensor, scale: Any) -> Tensor:
        """Return the mean log density at each outcome, ``(*plates, outcomes)``, summed over plates that it is not in.

        Args:
            site: The site.
            run: At its draws.
            runs: With all its elements at one outcome, for each.
            index: The outcomes that were drawn, ``(particles, *plates)``.
            scale: What it is divided by.
        """
        plates = index.shape[1:]
        total = torch.zeros(len(runs), *plates, dtype=torch.float64, device=index.device)
        for name, at_draw in run.model.items():
            rows = torch.stack([run.rows(other.model[name].scaled) for other in runs]).double()
            if torch.equal(rows, rows[:1].expand_as(rows)):
                continue
            lacks = any(n > 1 and rows.shape[2 + d] == 1 for d, n in enumerate(plates))
            if lacks or _differ(rows, index, run.rows(at_draw.scaled)):
                self._refuse_meeting(site, name)
            dims = [2 + d for d, n in enumerate(plates) if n == 1 and rows.shape[2 + d] > 1]
            total = total + (rows.sum(dims, keepdim=True) if dims else rows).mean(1)
        total = total / scale
        return torch.maximum(total, total.amax(0) - LEAST).movedim(0, -1)

    # Errors ---------------------------------------------------------------------------------------------------------

    def _refuse_meeting(self, site: MeanFieldSite, other: str) -> NoReturn:
        fail(
            StepError,
            self.obj,
            f"move the elements of {site.name!r} at once",
            got=f"a site {other!r} that more than one of them moves",
            because="the log density at an outcome of one element has to be told from that of the others",
            fix="Write e_step=steps.MeanField(), which moves them one after the other, or steps.Gradient().",
        )

    def _refuse_non_finite(self, run: Particles) -> NoReturn:
        fail(
            NonFiniteError,
            self.obj,
            "use a log density that is not finite",
            got=run.first_non_finite() or "log densities that are not finite",
            because="natural gradients are found from it",
            fix="Start from other parameters, or leave missing data out by poutine.mask or obs_mask=.",
        )


def _stepped(chart: Chart, target: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Return contexts after a step towards natural parameters, shorter where it leads to no density; and where it does.

    Returns:
        ``(*batch, columns)`` and ``(*batch, 1)``.
    """
    rates = torch.full_like(chart.eta[..., :1, :1], rate)
    for _ in range(HALVINGS):
        context = chart.context(torch.lerp(chart.eta, target, rates))
        fits = torch.isfinite(context).all(-1, keepdim=True)
        if bool(fits.all()):
            break
        rates = torch.where(fits.unsqueeze(-1), rates, rates / 2)
    return context, fits


def _wide(x: Any, dims: int) -> Any:
    """Return a scale or mask of a site's plates with so many dims more on the right."""
    return x.reshape(x.shape + (1,) * dims) if isinstance(x, Tensor) else x


def _drawn(site: MeanFieldSite) -> str:
    """Return the name of the guide's site that is drawn."""
    return site.name if site.transform is None else f"{site.name}{ENDING}"


def _is_point(site: Site) -> bool:
    return site.is_observed or isinstance(site.fn, dist.Delta)


def _differ(rows: Tensor, index: Tensor, drawn: Tensor) -> bool:
    """Whether log densities at the outcomes of single elements are others than with all elements at that outcome."""
    shape = torch.broadcast_shapes(index.shape, rows.shape[1:])
    picked = rows.expand(len(rows), *shape).gather(0, index.expand(shape).unsqueeze(0))[0]
    known = torch.isfinite(drawn) & torch.isfinite(picked)
    apart = torch.where(known, picked - drawn, 0.0).abs()
    return bool((apart > torch.finfo(drawn.dtype).eps ** 0.5 * (1 + drawn.abs())).any())
