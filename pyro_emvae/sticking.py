r"""The direct score of log q, as much of it left out as pays: by the arguments of each site's distribution."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions
import torch
import torch.distributions
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from ._distributions import base_of
from ._pyro import scale_and_mask
from .controls import Known, minus_coefficients, moved, stacked
from .estimators.base import State
from .particles import Particles, Site

__all__ = ["Sticking", "arguments_of", "is_downstream"]

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
    "StudentT": ("loc", "scale"),
}
"""By name of torch's and Pyro's class, the tensors from which draw and log q are computed. None moves the support, so
that scores have mean zero (tests/test_sticking.py). An expanded StudentT has its degrees of freedom twice, one for
each; they are left to the plain gradient.
"""

MODULES = (torch.distributions, pyro.distributions)
KNOWN = {getattr(module, name): paths for name, paths in ARGUMENTS.items() for module in MODULES}
NORMAL = {module.Normal for module in MODULES}
FULL = {module.MultivariateNormal for module in MODULES}
INDEPENDENT = {module.Independent for module in MODULES}


def arguments_of(fn: Any) -> tuple[str, ...]:
    """Return the attributes of `base_of(fn)` that its log density is differentiated by; none if they are not known.

    Example:
        >>> arguments_of(pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
        ('loc', 'scale')
    """
    return KNOWN.get(type(base_of(fn)), ())


def is_downstream(particles: Particles, name: str) -> bool:
    """Whether the gradient by a guide site's arguments goes on to the draw of another: then there would be noise there.

    Source: the graph of the present run.
    """
    others = [run for other, site in particles.guide.items() if other != name for run in site.runs or (site,)]
    values = [run.value for run in others if isinstance(run.value, Tensor) and run.value.requires_grad]
    ends, leaves = {value.grad_fn for value in values} - {None}, {id(v) for v in values if v.grad_fn is None}
    site = particles.guide[name]
    tensors = [tensor for run in site.runs or (site,) for tensor in _arguments(run).values()]
    if any(id(tensor) in leaves for tensor in tensors):
        return True
    seen: set[Any] = set()  # of nodes, so that none is freed and its id used again
    stack = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in ends or id(getattr(node, "variable", None)) in leaves:
            return True
        seen.add(node)
        stack.extend([parent for parent, _ in node.next_functions])
    return False


def _arguments(run: Site) -> dict[str, Tensor]:
    """Return the arguments that are differentiated, by name."""
    base = base_of(run.fn)
    found = {name: operator.attrgetter(name)(base) for name in arguments_of(base)}
    return {name: tensor for name, tensor in found.items() if tensor.requires_grad}


class _Part(NamedTuple):
    """An argument of a site in one run, and the control's gradient by it, flat."""

    key: tuple[str, str]
    tensor: Tensor
    score: Tensor


class Sticking:
    r"""The controls $a\,\nabla_\eta\log q(z;\eta)$ of some sites, with a lagged coefficient $a\ge0$ per argument.

    Moments are inner products over all elements of an argument. The control's gradient by the argument is known, and
    goes on from there to the parameters together with the rest: without a second pass through the guide.

    Args:
        sites: The sites, none of which has draws upstream, and the decays of their running moments.
        state: The states by site, whose moments make the coefficients.
        num_particles: K.
        beta: The factor of the latents' terms.
    """

    def __init__(
        self,
        sites: Iterable[tuple[Site, float]],
        state: Mapping[str, State],
        num_particles: int,
        beta: Tensor | None,
    ) -> None:
        self.sites = list(sites)
        self.old = {site.name: state.get(site.name, {}) for site, _ in self.sites}
        self.share = 1 / num_particles if beta is None else beta / num_particles

    @functools.cached_property
    def parts(self) -> list[_Part]:
        return _parts([site for site, _ in self.sites], self.share)

    @functools.cached_property
    def rows(self) -> dict[tuple[str, str], int]:
        """The row of an argument in what is learned, by site and name."""
        return {key: i for i, key in enumerate(dict.fromkeys(part.key for part in self.parts))}

    @functools.cached_property
    def decay(self) -> float | Tensor:
        by_site = {site.name: decay for site, decay in self.sites}
        by_row = [by_site[name] for name, _ in self.rows]
        return self.moments.new_tensor(by_row) if len(set(by_row)) > 1 else by_row[0]

    @functools.cached_property
    def moments(self) -> Tensor:
        like = self.parts[0].score
        like = like if like.dtype.itemsize >= 4 else like.new_empty(0, dtype=torch.float32)
        return stacked([self.old[site].get(name) for site, name in self.rows], like)

    @functools.cached_property
    def minus(self) -> Tensor:
        """Minus the coefficients."""
        return minus_coefficients(self.moments, self.decay, low=0.0)

    @functools.cached_property
    def known(self) -> Known:
        """The controls' gradient by the arguments."""
        if not self.parts:
            return Known([], [])
        by_row, descent = self.minus.unbind(), []
        for part in self.parts:
            share = part.score * _like(by_row[self.rows[part.key]], part.score)
            descent.append(share if part.tensor.dim() == 1 else share.view(part.tensor.shape))
        return Known([part.tensor for part in self.parts], descent)

    def follow(self, descent: Sequence[Tensor | None]) -> dict[str, State]:
        """Return the states of the next step.

        Args:
            descent: Minus the gradient by the arguments, with the controls' in it.
        """
        if not self.parts:
            return self.old
        scores = [part.score for part in self.parts]
        given = [s * 0 if g is None else g.reshape(-1) for s, g in zip(scores, descent, strict=True)]
        dots = [*map(torch.dot, scores, given), *map(torch.dot, scores, scores)]
        found = torch.stack([_like(dot, self.moments) for dot in dots]).view(2, -1)
        if len(self.rows) < len(self.parts):  # particles that were run one by one
            index = torch.tensor([self.rows[part.key] for part in self.parts], device=found.device)
            found = found.new_zeros(2, len(self.rows)).index_add(1, index, found)
        product, square = found.unbind()
        new = moved(self.moments, (self.minus * square - product, square), self.decay)
        states = {site: dict(old) for site, old in self.old.items()}
        for (site, name), moments in zip(self.rows, new, strict=True):
            states[site][name] = moments
        return states


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x if x.dtype is other.dtype and x.device == other.device else x.to(other)


class _Run(NamedTuple):
    """A site in one run, its distribution without wrappers, and the arguments that are differentiated."""

    site: Site
    base: Any
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> Any:
        """The class of a distribution whose scores have a formula here: they are these, times the site's scale."""
        site, base = self.site, self.base
        bare = site.fn is base or (type(site.fn) in INDEPENDENT and site.fn.base_dist is base)
        if not bare or site.mask is not None or not isinstance(site.scale, int | float):
            return None
        shape = site.value.shape
        if type(base) in NORMAL and shape == base.loc.shape == base.scale.shape:
            return Normal
        full = type(base) in FULL and shape == base.loc.shape and base._unbroadcasted_scale_tril.dim() == 2
        return MultivariateNormal if full else None


def _parts(sites: list[Site], share: float | Tensor) -> list[_Part]:
    normal: dict[tuple, list[_Run]] = {}
    parts, other = [], []
    for site in sites:
        for run in site.runs or (site,):
            one = _Run(run, base_of(run.fn), _arguments(run))
            kind = one.kind if one.tensors else None
            if kind is Normal:
                normal.setdefault((run.value.dtype, run.value.device), []).append(one)
            elif kind is MultivariateNormal:
                parts.extend(_of_multivariate(one, share))
            elif one.tensors:
                other.append(one)
    for runs in normal.values():
        parts.extend(_of_normals(runs, share))
    return [*parts, *_by_autograd(other, share)] if other else parts


def _of_normals(runs: list[_Run], share: float | Tensor) -> list[_Part]:
    """Return the parts of normal distributions of one dtype, all at once."""
    with torch.no_grad():
        columns = zip(*[(run.site.value, run.base.loc, run.base.scale) for run in runs], strict=True)
        value, loc, scale = map(_flat, columns)
        precision = share / scale
        noise = (value - loc) / scale
        by_loc = noise * precision
        by = {"loc": by_loc, "scale": noise * by_loc - precision}
        sizes = [run.site.value.numel() for run in runs]
        split = {name: score.split(sizes) for name, score in by.items()}
    return [
        _part(run, name, scores[i])
        for i, run in enumerate(runs)
        for name, scores in split.items()
        if name in run.tensors
    ]


def _of_multivariate(run: _Run, share: float | Tensor) -> list[_Part]:
    r"""Return the parts of $N(m,LL^\top)$: by m they are $u=L^{-\top}L^{-1}(z-m)$, by L
    $\operatorname{tril}(u(z-m)^\top L^{-\top})-\operatorname{diag}(L)^{-1}$.
    """
    with torch.no_grad(), torch.autocast(run.site.value.device.type, enabled=False):
        tril = run.base._unbroadcasted_scale_tril
        residual = (run.site.value - run.base.loc).reshape(-1, len(tril)).T
        noise = torch.linalg.solve_triangular(tril, residual, upper=False)
        by_loc = torch.linalg.solve_triangular(tril.T, noise, upper=True) * share
        by_tril = (by_loc @ noise.T).tril()
        by_tril.diagonal().sub_(residual.shape[1] * share / tril.diagonal())
    scores = {"loc": by_loc.T.reshape(-1), "_unbroadcasted_scale_tril": by_tril.reshape(-1)}
    return [_part(run, name, score) for name, score in scores.items() if name in run.tensors]


def _part(run: _Run, name: str, score: Tensor) -> _Part:
    tensor, scale = run.tensors[name], run.site.scale
    return _Part((run.site.name, name), tensor, _like(score if scale == 1 else score * scale, tensor))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)


def _by_autograd(runs: list[_Run], share: float | Tensor) -> Iterator[_Part]:
    found = [(run, run.site.density(run.site.value.detach())) for run in runs]
    found = [(run, scale_and_mask(log_q, run.site.scale, run.site.mask)) for run, log_q in found]
    pairs = [(run, total.sum()) for run, total in found if total.requires_grad]  # else it is masked as a whole
    flat = [((run.site.name, name), tensor) for run, _ in pairs for name, tensor in run.tensors.items()]
    if not flat:
        return
    totals = [total for _, total in pairs]
    outs = [share * torch.ones_like(total) for total in totals]
    scores = torch.autograd.grad(totals, [t for _, t in flat], outs, retain_graph=True, allow_unused=True)
    for (key, tensor), score in zip(flat, scores, strict=True):
        if score is not None:
            yield _Part(key, tensor, score.reshape(-1))
