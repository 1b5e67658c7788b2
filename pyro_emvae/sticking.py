r"""The direct score of log q, as much of it left out as pays: by the arguments of each site's distribution."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor

from ._distributions import base_of
from ._pyro import scale_and_mask
from .controls import Known, coefficients_of, moved, stacked
from .estimators.base import State
from .particles import Site

__all__ = ["Sticking", "arguments_of"]

ARGUMENTS = {
    "Beta": ("_dirichlet.concentration",),
    "Dirichlet": ("concentration",),
    "Exponential": ("rate",),
    "Gamma": ("concentration", "rate"),
    "HalfNormal": ("base_dist.scale",),
    "Laplace": ("loc", "scale"),
    "LogNormal": ("base_dist.loc", "base_dist.scale"),
    "LowRankMultivariateNormal": ("loc", "_unbroadcasted_cov_factor", "_unbroadcasted_cov_diag"),
    "MultivariateNormal": ("loc", "_unbroadcasted_scale_tril"),
    "Normal": ("loc", "scale"),
    "StudentT": ("df", "loc", "scale"),
}
"""By name of torch's and Pyro's class, the tensors by which alone parameters move log q. None moves the support, so
that scores have mean zero (tests/test_sticking.py).
"""

MODULES = (torch.distributions, pyro.distributions)
KNOWN = {getattr(module, name): paths for name, paths in ARGUMENTS.items() for module in MODULES}
NORMAL = {module.Normal for module in MODULES}
INDEPENDENT = {module.Independent for module in MODULES}


def arguments_of(fn: Any) -> tuple[str, ...]:
    """Return the attributes of `base_of(fn)` that its log density is differentiated by; none if they are not known.

    Example:
        >>> arguments_of(pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
        ('loc', 'scale')
    """
    return KNOWN.get(type(base_of(fn)), ())


class _Part(NamedTuple):
    """An argument of a site in one run, and the control's gradient by it, flat."""

    row: tuple[str, str]
    tensor: Tensor
    score: Tensor


class Sticking:
    r"""The controls $a\,\nabla_\eta\log q(z;\eta)$ of some sites, with a lagged coefficient $a\ge0$ per argument.

    Moments are inner products over all elements of an argument. The control's gradient by the argument is known, and
    goes on from there to the parameters together with the rest: without a second pass through the guide.

    Args:
        decays: The decay of the running moments, by site.
        sites: Those sites; none has draws upstream.
        state: The states by site, whose moments make the coefficients.
        num_particles: K.
        beta: The factor of the latents' terms.
    """

    def __init__(
        self,
        decays: Mapping[str, float],
        sites: list[Site],
        state: Mapping[str, State],
        num_particles: int,
        beta: Tensor | None,
    ) -> None:
        self.old = {site.name: state.get(site.name, {}) for site in sites}
        self.parts = _parts(sites, 1 / num_particles if beta is None else beta / num_particles)
        self.rows = {row: i for i, row in enumerate(dict.fromkeys(part.row for part in self.parts))}
        if self.parts:
            self.moments = stacked([self.old[site].get(name) for site, name in self.rows], self.parts[0].score)
            by_row = [decays[site] for site, _ in self.rows]
            self.decay = self.moments.new_tensor(by_row) if len(set(by_row)) > 1 else by_row[0]
            self.coefficients = coefficients_of(self.moments, self.decay, low=0.0)

    @functools.cached_property
    def known(self) -> Known:
        """The controls' gradient by the arguments."""
        if not self.parts:
            return Known([], [])
        by_row = self.coefficients.neg().unbind()
        pairs = [(part, by_row[self.rows[part.row]].to(part.score.device)) for part in self.parts]
        return Known([p.tensor for p, _ in pairs], [(p.score * a).view(p.tensor.shape) for p, a in pairs])

    def follow(self, descent: Sequence[Tensor | None]) -> dict[str, State]:
        """Return the states of the next step.

        Args:
            descent: Minus the gradient by the arguments, with the controls' in it.
        """
        if not self.parts:
            return self.old
        pairs = zip(self.parts, descent, strict=True)
        pairs = [(part.score, part.score * 0 if g is None else g.reshape(-1)) for part, g in pairs]
        to = self.moments.device
        product = torch.stack([torch.dot(score, g).to(to) for score, g in pairs])
        square = torch.stack([torch.dot(score, score).to(to) for score, _ in pairs])
        if len(self.rows) < len(self.parts):  # particles that were run one by one
            index = torch.tensor([self.rows[part.row] for part in self.parts], device=to)
            none = square.new_zeros(len(self.rows))
            product, square = none.index_add(0, index, product), none.index_add(0, index, square)
        covariance = -torch.addcmul(product, self.coefficients, square)
        new = moved(self.moments, (covariance, square), self.decay)
        states = {site: dict(old) for site, old in self.old.items()}
        for (site, name), moments in zip(self.rows, new, strict=True):
            states[site][name] = moments
        return states


class _Run(NamedTuple):
    """A site in one run: its name, and the arguments that are differentiated."""

    name: str
    site: Site
    base: Any
    tensors: dict[str, Tensor]

    @property
    def is_normal(self) -> bool:
        """Whether its scores are those of a normal distribution, times its scale."""
        site, base = self.site, self.base
        bare = site.fn is base or (type(site.fn) in INDEPENDENT and site.fn.base_dist is base)
        plain = type(base) in NORMAL and bare and site.mask is None and isinstance(site.scale, int | float)
        return plain and site.value.shape == base.loc.shape == base.scale.shape


def _parts(sites: list[Site], share: float | Tensor) -> list[_Part]:
    normal: dict[tuple, list[_Run]] = {}
    other = []
    for site in sites:
        for run in site.runs or (site,):
            base = base_of(run.fn)
            found = {name: operator.attrgetter(name)(base) for name in arguments_of(base)}
            one = _Run(site.name, run, base, {name: tensor for name, tensor in found.items() if tensor.requires_grad})
            if one.tensors and one.is_normal:
                normal.setdefault((run.value.dtype, run.value.device), []).append(one)
            elif one.tensors:
                other.append(one)
    parts = [part for runs in normal.values() for part in _of_normals(runs, share)]
    return [*parts, *_by_autograd(other, share)] if other else parts


def _of_normals(runs: list[_Run], share: float | Tensor) -> Iterator[_Part]:
    """Return the parts of normal distributions of one dtype, by one formula for all."""
    with torch.no_grad():
        columns = zip(*[(run.site.value, run.base.loc, run.base.scale) for run in runs], strict=True)
        value, loc, scale = (torch.cat([tensor.reshape(-1) for tensor in column]) for column in columns)
        precision = share / scale
        noise = (value - loc) / scale
        by_loc = noise * precision
        by = {"loc": by_loc, "scale": noise * by_loc - precision}
        sizes = [run.site.value.numel() for run in runs]
        split = {argument: score.split(sizes) for argument, score in by.items()}
    for i, run in enumerate(runs):
        for argument, tensor in run.tensors.items():
            score = split[argument][i]
            yield _Part((run.name, argument), tensor, score if run.site.scale == 1 else score * run.site.scale)


def _by_autograd(runs: list[_Run], share: float | Tensor) -> Iterator[_Part]:
    totals = [scale_and_mask(site.density(site.value.detach()), site.scale, site.mask).sum() for _, site, _, _ in runs]
    flat = [((run.name, argument), tensor) for run in runs for argument, tensor in run.tensors.items()]
    outs = [share * torch.ones_like(total) for total in totals]
    scores = torch.autograd.grad(totals, [t for _, t in flat], outs, retain_graph=True, allow_unused=True)
    for (row, tensor), score in zip(flat, scores, strict=True):
        if score is not None:
            yield _Part(row, tensor, score.reshape(-1))
