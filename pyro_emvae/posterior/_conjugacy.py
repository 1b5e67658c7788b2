r"""Find the conjugate posterior of a model from derivatives of its log joint, and prove it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from .._checks import ModelError, NonFiniteError, StepError, fail, nearest
from .._pyro import Messenger, scale_and_mask
from ..parameters import module_leaves, reach
from ..particles import Particles, Site, draw, hold_batch, is_subsample, quiet
from ._families import BetaFactor, DirichletFactor, Factor, GammaFactor, GivenFactor, NormalFactor, NormalGammaFactor
from ._plates import Batch
from .conjugate import ConjugatePosterior

__all__ = ["solve_conjugate"]

LEVELS = (-1.5, -0.5, 0.5, 1.5)


def solve_conjugate(
    obj: str,
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    given: Callable[..., Mapping[str, Any]] | None = None,
    vectorize: dict[Callable, bool] | None = None,
) -> ConjugatePosterior:
    r"""Return the posterior of a model whose log joint is, in each latent, the log density of a known family.

    Each family has a log density $\eta\cdot t(z)+c$. Its derivative at four points determines $\eta$ and has to fit
    there; it is found twice, the second time about the first result. Then $\log p(x,z)-\log q(z)$ has to be the same
    at three points, and is the log evidence.

    Args:
        obj: The half-step that asks, for its errors.
        model, args, kwargs: What is run.
        given: ``given(params, *args, **kwargs) -> {site: distribution}``; the posterior is then not searched for.
        vectorize: What is known about running all nodes at once, by model; added to.

    Raises:
        StepError: The log joint is none of the family's, by how much; a latent has no conjugate family.
    """
    joint = _Joint(obj, model, args, dict(kwargs), search=given is None)
    if given is None:
        factors, miss = _search(joint)
    else:
        factors, miss = _given(joint, given), 0.0
    evidence = _prove(joint, factors, miss)
    return ConjugatePosterior(joint, factors, evidence, vectorize)


def _search(joint: _Joint) -> tuple[list[Factor], float]:
    factors, miss = joint.start(), math.nan
    for turn in range(2):
        values = [joint.around(factors, level, wide=True) for level in range(len(LEVELS))]
        slopes = [joint.slopes(value, check_scale=turn == 0) for value in values]
        fits = [factor.fit(values, slopes) for factor in factors]
        factors, miss = [factor for factor, _ in fits], max(float(miss.max()) for _, miss in fits)
        for factor in factors:
            if not factor.is_proper:
                _refuse_fit(joint, factors, f"no proper {factor.family} density at {_quote(factor.names)}", miss)
    return factors, miss


def _given(joint: _Joint, given: Callable[..., Mapping[str, Any]]) -> list[Factor]:
    found = dict(given(joint.params, *joint.args, **joint.kwargs))
    wrong = [*(set(found) - set(joint.latents)), *(set(joint.latents) - set(found))]
    if wrong:
        fail(
            StepError,
            joint.obj,
            f"take the posterior of {wrong[0]!r}",
            got=f"distributions for {sorted(found)}",
            because="the user's posterior gives one for each latent of the model",
            fix=nearest(wrong[0], joint.latents),
        )
    factors = []
    for name, site in joint.latents.items():
        fn, batch = found[name], site.value.shape[: site.value.dim() - site.fn.event_dim]
        try:
            if fn.event_shape != site.fn.event_shape:
                raise ValueError(f"event shape {tuple(fn.event_shape)} in place of {tuple(site.fn.event_shape)}")
            fn = fn.expand(batch)
        except (AttributeError, RuntimeError, ValueError) as cause:
            shape = tuple(fn.shape()) if hasattr(fn, "shape") else ()
            fail(
                StepError,
                joint.obj,
                f"take the posterior of {name!r}",
                got=f"{type(fn).__name__} of shape {shape}",
                because=f"the latent has shape {tuple(site.value.shape)}",
                fix="Return one distribution per site, with the site's plates and event shape.",
                cause=cause,
            )
        factors.append(_as_factor(name, fn))
    return factors


def _as_factor(name: str, fn: Any) -> Factor:
    kind = type(fn)
    if kind is dist.Beta:
        return BetaFactor(name, fn.concentration1.detach(), fn.concentration0.detach())
    if kind is dist.Gamma:
        return GammaFactor(name, fn.concentration.detach(), fn.rate.detach())
    if kind is dist.Normal:
        return NormalFactor(name, fn.loc.detach(), fn.scale.detach())
    if kind is dist.Dirichlet:
        return DirichletFactor(name, fn.concentration.detach())
    return GivenFactor(name, fn)


def _prove(joint: _Joint, factors: list[Factor], miss: float) -> float:
    """Return the log evidence; refuse factors that are not the posterior."""
    found, sizes = [], []
    for level in range(3):
        log_evidence, size = joint.difference(factors, joint.around(factors, level, wide=False))
        found.append(log_evidence)
        sizes.append(size)
    tolerance = torch.finfo(joint.dtype).eps ** 0.5
    spread = max(found) - min(found)
    if not (miss <= tolerance and spread <= tolerance * (1.0 + max(sizes))):
        families = " and ".join(dict.fromkeys(factor.family for factor in factors))
        what = f"a log joint minus log {families} density that varies by {spread:.3g} nats over the latents"
        _refuse_fit(joint, factors, what, miss)
    return sum(found) / len(found)


def _refuse_fit(joint: _Joint, factors: list[Factor], got: str, miss: float) -> None:
    fail(
        StepError,
        joint.obj,
        f"find the posterior of {_quote([n for f in factors for n in f.names])}",
        got=f"{got} (its derivatives miss by {miss:.2g}, relatively)",
        because="prior and likelihood have to be conjugate, and latents independent given the data",
        fix="Use steps.Laplace() or steps.MonteCarlo(), or pass Conjugate(posterior=...).",
    )


def _quote(names: Any) -> str:
    return ", ".join(map(repr, names))


@dataclass
class _Joint:
    """The model, its first run at the latents' prior means, and what later runs need."""

    obj: str
    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    search: bool
    batch: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.get_rng_state()
        self.noise = torch.Generator().manual_seed(0)
        with Batch() as batch:
            run, given = self._run({})
        self.batch, self.drawn = batch.indices, tuple(batch.drawn)
        self.nesting, self.latents, self.fns = run.max_plate_nesting, run.latents, given.fns
        if not self.latents:
            fail(
                StepError,
                self.obj,
                "be the E-step",
                got="a model without latents",
                because="there is nothing to average over",
                fix="Use SVI to maximise the likelihood.",
            )
        ids = {id(leaf): name for name, leaf in given.leaves.items()}
        reached = {n: {ids[i] for i in reach([s.log_prob]) if i in ids} for n, s in run.model.items()}
        self.reached = {name: latents for name, latents in reached.items() if latents}
        self.like = {name: site.value.detach() for name, site in self.latents.items()}
        kinds = [site.log_prob.dtype for site in self.latents.values()]
        self.dtype = min(kinds, key=lambda kind: torch.finfo(kind).bits)
        self.params = {
            name: transform_to(run.constraints.get(name) or constraints.real)(leaf).detach()
            for name, leaf in {**module_leaves(self.model), **run.params["model"]}.items()
        }

    # Families -------------------------------------------------------------------------------------------------------

    def start(self) -> list[Factor]:
        """Return the family of each latent by its support, at the prior mean."""
        pairs = self._pairs()
        factors: list[Factor] = []
        for name, fn in self.fns.items():
            if name in pairs:
                first = pairs[name]
                factors.append(NormalGammaFactor.start(first, name, self.fns[first], fn))
            elif name not in pairs.values():
                factors.append(_family(fn).start(name, fn))
        return factors

    def _pairs(self) -> dict[str, str]:
        """Return the precision of each mean: a latent over the reals whose prior depends on a positive one."""
        pairs: dict[str, str] = {}
        for name, fn in self.fns.items():
            others = [n for n in self.reached.get(name, ()) if n != name and _family(self.fns[n]) is GammaFactor]
            if _family(fn) is NormalFactor and len(others) == 1 and self.like[others[0]].shape == self.like[name].shape:
                pairs[name] = others[0]
        return pairs if len(set(pairs.values())) == len(pairs) else {}

    def around(self, factors: list[Factor], level: int, wide: bool) -> dict[str, Tensor]:
        """Return values about the means; elements of a latent are at different ones of four levels."""
        values: dict[str, Tensor] = {}
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        order = {name: number for number, name in enumerate(self.latents)}
        for factor in factors:
            noise = {}
            for name in factor.names:
                like = self.like[name]
                place = torch.randint(len(LEVELS), like.shape, generator=torch.Generator().manual_seed(order[name]))
                jitter = 0.2 * torch.randn(like.shape, generator=self.noise, dtype=torch.float64)
                noise[name] = (levels[(place + level) % len(LEVELS)] + jitter).to(like)
            with quiet(seed=level):
                values.update(factor.around(noise, wide))
        return {name: values[name].expand(self.like[name].shape) for name in self.latents}

    # Runs -----------------------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def slopes(self, values: Mapping[str, Tensor], check_scale: bool = False) -> dict[str, Tensor]:
        """Return the derivatives of the unscaled log joint by the latents; a masked latent keeps its prior."""
        run, given = self.at(values)
        factors = {name: _kept(site, name in self.latents) for name, site in run.model.items() if name in self.reached}
        leaves = list(given.leaves.values())
        found = torch.autograd.grad(
            sum(f.sum() for f in factors.values()), leaves, retain_graph=check_scale, materialize_grads=True
        )
        if not all(bool(torch.isfinite(x).all()) for x in found):
            fail(
                NonFiniteError,
                self.obj,
                "differentiate the log joint",
                got=run.first_non_finite() or "a gradient that is not finite",
                because="the posterior is found from its derivatives",
                fix="Start from other parameters, or bound what the site divides by.",
            )
        slopes = dict(zip(given.leaves, found, strict=True))
        if check_scale:
            scaled = sum((run.model[name].scale * f).sum() for name, f in factors.items())
            self._check_scale(run, slopes, torch.autograd.grad(scaled, leaves, materialize_grads=True))
        return slopes

    def _check_scale(self, run: Particles, slopes: Mapping[str, Tensor], scaled: tuple[Tensor, ...]) -> None:
        for (name, slope), found in zip(slopes.items(), scaled, strict=True):
            scale = self.latents[name].scale
            if isinstance(scale, Tensor):
                scale = scale.reshape(scale.shape + (1,) * self.latents[name].fn.event_dim)
            tolerance = torch.finfo(slope.dtype).eps ** 0.5
            if not torch.allclose(found, scale * slope, rtol=tolerance, atol=tolerance):
                scales = sorted({_describe(run.model[n].scale) for n, which in self.reached.items() if name in which})
                fail(
                    StepError,
                    self.obj,
                    f"integrate site {name!r} out",
                    got=f"scales {', '.join(scales)}",
                    because="a scale multiplies the logarithm of an integral, so all its terms need the same",
                    fix="Put poutine.scale around the latent and what depends on it, or give all data at once.",
                )

    def difference(self, factors: list[Factor], values: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return log p(x, z) - log q(z) with scales and masks, and the size of its terms, in nats."""
        run, _ = self.at(values)
        rows = [site.scaled.detach().double() for site in run.model.values()]
        for factor in factors:
            for name in factor.names:
                site = self.latents[name]
                log_q = factor.conditional(name, values).log_prob(values[name])
                rows.append(-scale_and_mask(log_q, site.scale, site.mask).detach().double())
        total = sum(float(row.sum()) for row in rows)
        if not math.isfinite(total):
            fail(
                ModelError,
                self.obj,
                "evaluate the log joint",
                got=run.first_non_finite() or "a posterior density that is not finite",
                because="log p(x, z) - log q(z) is the log evidence",
                fix="Check the support of the posterior and the data.",
            )
        return total, sum(float(row.abs().sum()) for row in rows)

    def at(self, values: Mapping[str, Tensor]) -> tuple[Particles, _At]:
        """Run the model at given latents, with the random numbers of the first run."""
        with torch.random.fork_rng(devices=[]), hold_batch(self.batch):
            torch.set_rng_state(self.generator)
            return self._run(values)

    def _run(self, values: Mapping[str, Tensor]) -> tuple[Particles, _At]:
        with torch.enable_grad(), _At(self.obj, values, self.search) as given:
            return draw(self.model, _draw_nothing, self.args, self.kwargs), given


class _At(Messenger):
    """Give every latent a value that is a leaf of autograd; the prior mean where none is given.

    Without a search for the posterior values are given as they are, and drawn where none is given.
    """

    def __init__(self, obj: str, values: Mapping[str, Tensor], search: bool) -> None:
        super().__init__()
        self.obj, self.values, self.search = obj, values, search
        self.leaves: dict[str, Tensor] = {}
        self.fns: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or msg["done"] or is_subsample(msg) or msg["infer"].get("_do_not_trace"):
            return
        name, fn = msg["name"], msg["fn"]
        value = self.values.get(name)
        if not self.search:
            msg["value"], msg["done"] = value, value is not None
            return
        family = _family(fn)
        if family is None:
            fail(
                StepError,
                self.obj,
                f"find the posterior of {name!r}",
                got=f"{type(fn).__name__}{tuple(fn.shape())}",
                because="only latents that are probabilities, positive numbers, real numbers or points of a simplex, "
                "one per element of their plates, have a conjugate family here",
                fix="Put the elements into a pyro.plate in place of .to_event(); use steps.Enumerated() for discrete "
                "latents, and steps.Laplace() or steps.MonteCarlo() for others.",
            )
        self.fns[name] = fn
        if value is None:
            factor = family.start(name, fn)
            value = factor.marginal(name).mean.expand(fn.shape())
        self.leaves[name] = leaf = value.detach().clone().requires_grad_()
        msg["value"], msg["done"] = leaf, True


def _family(fn: Any) -> type[Factor] | None:
    """Return the conjugate family of a prior, by its support."""
    if fn.has_enumerate_support or fn.support.is_discrete:
        return None
    support = fn.support
    if support is constraints.simplex and fn.event_dim == 1:
        return DirichletFactor
    if fn.event_dim:
        return None
    if support is constraints.real:
        return NormalFactor
    lower, upper = (torch.as_tensor(getattr(support, end, math.nan)) for end in ("lower_bound", "upper_bound"))
    if isinstance(support, type(constraints.positive) | type(constraints.nonnegative)) and bool((lower == 0).all()):
        return GammaFactor
    if isinstance(support, type(constraints.unit_interval)) and bool(((lower == 0) & (upper == 1)).all()):
        return BetaFactor
    return None


def _kept(site: Site, is_latent: bool) -> Tensor:
    """Return a site's unscaled log density, masked unless it is a latent, which integrates to one."""
    if is_latent or site.mask is None:
        return site.log_prob
    return torch.where(torch.as_tensor(site.mask), site.log_prob, 0.0)


def _describe(scale: Any) -> str:
    if isinstance(scale, Tensor) and scale.numel() > 1:
        return f"a tensor of shape {tuple(scale.shape)}"
    return f"{float(scale):g}"


def _draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide for a model whose latents are all given."""
