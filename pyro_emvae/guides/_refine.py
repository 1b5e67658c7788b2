r"""Gradient steps on the contexts of single data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .._checks import ModelError, NonFiniteError, fail
from .._pyro import scale_and_mask
from ..particles import Recorder, generators, is_computed, is_subsample, quiet
from ._draw import Call
from ._sites import LocalSite

__all__ = ["Refiner", "refuse_undrawn"]

DECAY, GROWTH, SHRINK, TINY = 0.9, 1.5, 0.6, 1e-20
CERTAIN, LAST_DRAWS = 1.5, 4


@dataclass(frozen=True)
class Refiner:
    r"""Raises the ELBO of each datum over its own contexts; the model and the latents outside the plate stay.

    Args:
        guide: The amortized guide.
        sites: Its local sites that have a reparameterised sampler; the others keep their contexts.
        num_steps, step_size, num_particles: Steps per datum; the first step, in units of the context; draws per step.
        differentiable: Whether gradients pass through the steps.
        seed: Of the draws, the same in every call.
        vectorize: Whether the model takes all draws in one run.
    """

    guide: Any
    sites: Sequence[LocalSite]
    num_steps: int
    step_size: float
    num_particles: int
    differentiable: bool
    seed: int
    vectorize: bool

    def __call__(self, call: Call) -> dict[str, Tensor]:
        """Return refined contexts by site, for values of one particle."""
        held = call if self.differentiable else replace(call, values=_detached(call.values))
        start = dict(call.contexts) if self.differentiable else _detached(call.contexts)
        now = {site.name: start[site.name] for site in self.sites}
        squares: dict[str, Any] = dict.fromkeys(now, 0.0)
        sizes: Tensor | None = None
        with torch.enable_grad(), quiet(seed=self.seed):
            for step in range(1, self.num_steps + 1):
                slopes = self._slopes(held, start, now)
                squares = {n: DECAY * squares[n] + (1 - DECAY) * g.square() for n, g in slopes.items()}
                before, rewind = self._value(held, start | now)
                sizes = torch.full_like(before[0], self.step_size) if sizes is None else sizes
                moved = {}
                for n, c in now.items():
                    rate = slopes[n] / (squares[n] / (1 - DECAY**step) + TINY).sqrt()
                    moved[n] = c + _spread(sizes, c) * rate
                after, _ = self._value(held, start | moved, rewind)
                better = _is_better(after - before)
                now = {n: torch.where(_spread(better, c), moved[n], c) for n, c in now.items()}
                sizes = sizes * torch.where(better, GROWTH, SHRINK)
            better = self._is_gain(held, start, start | now)
            now = {n: torch.where(_spread(better, c), c, start[n]) for n, c in now.items()}
        return dict(call.contexts) | now

    def _is_gain(self, call: Call, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> Tensor:
        """Return which data have gained by all steps together, on draws that no step has seen."""
        gains = []
        for _ in range(LAST_DRAWS):
            before, rewind = self._value(call, start)
            gains.append(self._value(call, end, rewind)[0] - before)
        return _is_better(torch.cat(gains))

    def _slopes(self, call: Call, start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of the ELBO by the contexts; zero where it is no number."""
        leaves = {n: c if self.differentiable else c.detach().requires_grad_() for n, c in now.items()}
        leaves = {n: c if c.requires_grad else c.requires_grad_() for n, c in leaves.items()}
        total, _ = self._draws(call, {**start, **leaves})
        found = torch.autograd.grad(
            total, list(leaves.values()), create_graph=self.differentiable, materialize_grads=True
        )
        return {n: torch.nan_to_num(g, 0.0, 0.0, 0.0) for n, g in zip(leaves, found, strict=True)}

    @torch.no_grad()
    def _value(self, call: Call, contexts: Mapping[str, Tensor], rewind: Any = None) -> tuple[Tensor, Any]:
        """Return log p - log q of each draw and datum, and what makes the same draws again."""
        rewind = generators() if rewind is None else rewind
        rewind()
        _, value = self._draws(call, contexts)
        if not bool(torch.isfinite(value).any()):
            fail(
                NonFiniteError,
                "AutoSemiAmortized",
                "refine",
                got="an ELBO that is finite for no datum",
                because="a step is judged by the ELBO before and after",
                fix="Let the encoder start where the model has a density, such as with smaller weights.",
            )
        return value, rewind

    def _draws(self, call: Call, contexts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sum over all draws of log p - log q, and per draw its part in the data plate."""
        if not self.vectorize:
            found = [self._terms(call, contexts) for _ in range(self.num_particles)]
            return sum(total for total, _ in found), torch.stack([inside for _, inside in found])
        many = (self.num_particles,)
        shapes = {n: many + (1,) * (self.guide.nesting - c.dim() + 1) + c.shape for n, c in contexts.items()}
        return self._terms(call, {n: c.expand(shapes[n]) for n, c in contexts.items()})

    def _terms(self, call: Call, contexts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sum of log p - log q, and its part that lies in the data plate: rows at the plate's dim."""
        cut = contexts if self.differentiable else _detached(contexts)
        values, seen, log_q = dict(call.values), dict(call.values), {}
        for site in self.guide.local_sites:
            fn = self.guide.distribution(site, contexts, seen)
            free = fn.rsample() if fn.has_rsample else fn.sample()
            log_q[site.name] = self.guide.distribution(site, cut, seen).log_prob(free)
            seen[site.name] = values[site.name] = free
            if site.transform is not None:
                values[site.name] = site.transform(free)
                log_q[site.name] = log_q[site.name] - site.transform.log_abs_det_jacobian(free, values[site.name])
        total, inside = 0.0, 0.0
        for name, msg in self._run(call, values).items():
            term = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
            term = scale_and_mask(term - log_q.get(name, 0.0), msg["scale"], msg["mask"])
            total = total + term.sum()
            if call.reading.plate in {frame.name for frame in msg["cond_indep_stack"]}:
                inside = inside + self._rows(term, call)
        return total, inside

    def _run(self, call: Call, values: Mapping[str, Tensor]) -> dict[str, dict]:
        """Run the model on given values of its latents, and on the call's minibatch; return its sites."""
        given = {name: (value, None) for name, value in values.items()}
        for name, plate in call.plates.items():
            if plate.subsample_size < plate.size and isinstance(plate.indices, Tensor):
                given[name] = (plate.indices, None)
        with poutine.block(), Recorder(given) as run:
            self.guide.model(*call.args, **call.kwargs)
        found = {n: m for n, m in run.messages.items() if not (is_subsample(m) or is_computed(m))}
        for name, msg in found.items():
            if not msg["is_observed"] and name not in values:
                refuse_undrawn(name)
        return found

    def _rows(self, term: Tensor, call: Call) -> Tensor:
        """Sum a log density over all plates but the data's."""
        nesting, keep = self.guide.nesting, call.reading.plates[call.reading.plate].dim
        term = term.reshape((1,) * (nesting - term.dim()) + term.shape)
        others = [dim for dim in range(-nesting, 0) if dim != keep]
        return term.sum(others, keepdim=True) if others else term


def _is_better(gains: Tensor) -> Tensor:
    """Return which data have gained by more than the noise of their draws can explain."""
    return gains.mean(0) > CERTAIN * gains.std(0) / len(gains) ** 0.5


def _spread(per_datum: Tensor, context: Tensor) -> Tensor:
    """Give a number for each datum the dims of a context, which may have fewer plates."""
    return per_datum.reshape(per_datum.shape[per_datum.dim() - context.dim() + 1 :]).unsqueeze(-1)


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def refuse_undrawn(name: str) -> None:
    fail(
        ModelError,
        "AutoSemiAmortized",
        "refine",
        got=f"site {name!r}, which the guide does not draw",
        because="the ELBO of a datum is a function of values of all latents",
        fix="Let the guide draw it, without enumeration in the model; or use AutoAmortized.",
    )
