r"""The direct score of log q, as much of it left out as pays: by the arguments of each site's distribution."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from .parameters import nodes_of, reach
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
    return any(node in ends for node in nodes_of(tensors)) or not leaves.isdisjoint(reach(tensors))


def _arguments(run: Site) -> dict[str, Tensor]:
    """Return the arguments that are differentiated, by name."""
    base = base_of(run.fn)
    found = {name: operator.attrgetter(name)(base) for name in arguments_of(base)}
    return {name: tensor for name, tensor in found.items() if tensor.requires_grad}


class _Part(NamedTuple):
    r"""An argument of a site in one run, and the control's gradient by it, flat.

    `entropy` is the derivative of $-\log q(z_\eta;\eta)$ by it, through the draw and directly, None if it is not known.
    """

    key: tuple[str, str]
    tensor: Tensor
    score: Tensor
    entropy: Tensor | float | None = None


class Sticking:
    r"""The controls $a\,\nabla_\eta\log q(z;\eta)$ of some sites, with a lagged coefficient $a\ge0$ per argument.

    Moments are inner products over all elements of an argument. The control's gradient by the argument is known, and
    goes on from there to the parameters together with the rest: without a second pass through the guide.

    Args:
        sites: The sites, none of which has draws upstream, and the decays of their running moments.
        state: The states by site, whose moments make the coefficients.
        num_particles: K.
        beta: The factor of the latents' terms.
        integrates: Whether derivatives of log q may be found here, where they are known, and not by its graph: those
            of a normal z by loc and scale are 0 and minus 1 over the scale.
    """

    def __init__(
        self,
        sites: Collection[tuple[Site, float]],
        state: Mapping[str, State],
        num_particles: int,
        beta: Tensor | None,
        integrates: bool,
    ) -> None:
        decays = {site.name: decay for site, decay in sites}
        self.old = {name: state.get(name, {}) for name in decays}
        share = 1 / num_particles if beta is None else beta / num_particles
        found, known = _parts([site for site, _ in sites], share)
        self.whole = known if integrates else set()
        self.parts = _merged(found, self.whole)
        self.rows = {key: i for i, key in enumerate(dict.fromkeys(part.key for part in self.parts))}
        self.known = Known([], [])
        if not self.parts:
            return
        like = self.parts[0].score
        like = like if like.dtype.itemsize >= 4 else like.new_empty(0, dtype=torch.float32)
        self.moments = stacked([self.old[site].get(name) for site, name in self.rows], like)
        by_row = [decays[name] for name, _ in self.rows]
        self.decay = self.moments.new_tensor(by_row) if len(set(by_row)) > 1 else by_row[0]
        self.minus = minus_coefficients(self.moments, self.decay, low=0.0)
        self.known = Known([part.tensor for part in self.parts], self._descent())

    def _descent(self) -> list[Tensor]:
        """Return minus the gradient by the arguments: of the controls, and of minus log q at the sites in `whole`."""
        by_row, found = self.minus.unbind(), []
        for part in self.parts:
            share = part.score * _like(by_row[self.rows[part.key]], part.score)
            share = share - part.entropy if isinstance(part.entropy, Tensor) else share
            found.append(share if part.tensor.dim() == 1 else share.view(part.tensor.shape))
        return found

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


def _parts(sites: list[Site], share: float | Tensor) -> tuple[list[_Part], set[str]]:
    """Return all parts, and the sites of which the derivatives of log q are known by all that has any."""
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
    unknown = {part.key[0] for part in parts if part.entropy is None} | {run.site.name for run in other}
    known = {part.key[0] for part in parts} - unknown
    return [*parts, *_by_autograd(other, share)] if other else parts, known


def _merged(parts: list[_Part], whole: set[str]) -> list[_Part]:
    """Add up the parts of one tensor, which then has one coefficient; entropies, those of the sites in `whole`."""
    found: dict[int, _Part] = {}
    for part in parts:
        entropy = part.entropy if part.key[0] in whole else None
        first = found.get(id(part.tensor))
        if first is None:
            found[id(part.tensor)] = part._replace(entropy=entropy)
            continue
        known = [e for e in (first.entropy, entropy) if isinstance(e, Tensor)]
        found[id(part.tensor)] = first._replace(score=first.score + part.score, entropy=sum(known) if known else None)
    return list(found.values())


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
        entropy = precision.split(sizes)
    return [
        _part(run, name, scores[i], entropy[i] if name == "scale" else 0.0)
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
        outer = by_loc @ noise.T
        entropy = torch.diag(residual.shape[1] * share / tril.diagonal())
        by_tril, entropy = outer.tril() - entropy, outer.triu(1) + entropy  # the draw reads all of L, log q not
    scores = {"loc": (by_loc.T, 0.0), "_unbroadcasted_scale_tril": (by_tril, entropy.reshape(-1))}
    return [_part(run, name, a.reshape(-1), b) for name, (a, b) in scores.items() if name in run.tensors]


def _part(run: _Run, name: str, score: Tensor, entropy: Tensor | float) -> _Part:
    """Return a part that has a formula; `entropy` holds for values that were drawn from the arguments."""
    tensor, scale = run.tensors[name], run.site.scale
    if scale != 1:
        score, entropy = score * scale, entropy * scale
    entropy = _like(entropy, tensor) if isinstance(entropy, Tensor) else entropy
    return _Part((run.site.name, name), tensor, _like(score, tensor), entropy if run.site.value.requires_grad else None)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)


def _by_autograd(runs: list[_Run], share: float | Tensor) -> Iterator[_Part]:
    found = [(run, run.site.density(run.site.value.detach())) for run in runs]
    found = [(run, scale_and_mask(log_q, run.site.scale, run.site.mask)) for run, log_q in found]
    pairs = [(run, total.sum()) for run, total in found if total.requires_grad]  # else it is masked as a whole
    first: dict[int, tuple[tuple[str, str], Tensor]] = {}  # of a tensor that is an argument several times
    for run, _ in pairs:
        for name, tensor in run.tensors.items():
            first.setdefault(id(tensor), ((run.site.name, name), tensor))
    flat = list(first.values())
    if not flat:
        return
    totals = [total for _, total in pairs]
    outs = [share * torch.ones_like(total) for total in totals]
    scores = torch.autograd.grad(totals, [t for _, t in flat], outs, retain_graph=True, allow_unused=True)
    for (key, tensor), score in zip(flat, scores, strict=True):
        if score is not None:
            yield _Part(key, tensor, score.reshape(-1))
