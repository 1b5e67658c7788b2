r"""The log joint density as a function of its latents' coordinates, taken apart into independent blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from .._checks import NonFiniteError, StepError, fail
from .._pyro import Messenger
from ..parameters import reach
from ..particles import Particles, Site, draw, hold_batch, is_subsample, reduce_to
from ._coordinates import Latent, Point, fixed_normal
from ._curved import curved
from ._masks import counted_without, refuse_counted
from ._plates import Batch
from ._squares import squares

__all__ = ["LogJoint", "Run", "log_jacobian"]

MAX_WIDTH = 2000


@dataclass(frozen=True)
class Run:
    """The model at given coordinates: log densities of its sites, and the coordinates as leaves of autograd."""

    particles: Particles = field(repr=False)
    leaves: dict[str, Tensor] = field(repr=False)
    jacobians: dict[str, Tensor] = field(repr=False)
    supports: dict[str, Any] = field(repr=False)

    @cached_property
    def factors(self) -> dict[str, Tensor]:
        """Log density per site, unscaled; masked unless it is a latent, which integrates to one."""
        found = {}
        for name, site in self.particles.model.items():
            mask = site.mask if name not in self.leaves else None
            kept = site.log_prob if mask is None else torch.where(torch.as_tensor(mask), site.log_prob, 0.0)
            found[name] = kept + self.jacobians[name] if name in self.jacobians else kept
        return found

    @cached_property
    def reached(self) -> dict[str, frozenset[str]]:
        """The latents that move each site's factor, for the sites that some latent moves."""
        names = {id(leaf): name for name, leaf in self.leaves.items()}
        found = {n: frozenset(names[i] for i in reach([f]) if i in names) for n, f in self.factors.items()}
        return {name: latents for name, latents in found.items() if latents}


class LogJoint:
    r"""$f(z)=\log p_\theta(x,z)$ at the present theta, over unconstrained coordinates of all latents.

    Latents that share a plate are independent over its elements given the latents outside it, so that

    $$f(z)=f_0(g)+\sum_n f_n(z_n,g)$$

    with blocks $z_n$ over the plates that all latents inside some plate share, and common latents g. Without such a
    plate there is one block.

    Args:
        obj: The half-step that asks, for its errors.
        model, args, kwargs: What is run, with gradients enabled; its minibatches are drawn at the first run and kept.
        constrained: Whether latents may have a constrained support.
        single: Put all latents into one block.
    """

    def __init__(
        self,
        obj: str,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        constrained: bool = False,
        single: bool = False,
    ) -> None:
        self.obj, self.model, self.args, self.kwargs = obj, model, args, dict(kwargs)
        self.constrained, self.single, self.batch = constrained, single, {}
        self.generator = torch.get_rng_state()
        with Batch() as batch:
            self.start: Run | None = self._run({})
        particles = self.start.particles
        self.batch, self.drawn, self.nesting = batch.indices, tuple(batch.drawn), particles.max_plate_nesting
        self._require_latents()
        inside = [set(site.frames) for site in particles.latents.values() if site.frames]
        self.plates = frozenset() if single or not inside else frozenset(set.intersection(*inside))
        self.latents = {latent.name: latent for latent in self._arrange()}
        self.locals = [latent for latent in self.latents.values() if latent.block or not self.plates]
        self.commons = [latent for latent in self.latents.values() if not latent.block and self.plates]
        self.reached = self.start.reached
        self.frames = {name: site.frames for name, site in particles.model.items()}
        self.separable = not self.commons and all(self.plates <= set(self.frames[name]) for name in self.reached)
        self.scale = self._common_scale()
        self._require_kept_latents()
        rest = [site.scaled.detach().sum().double() for n, site in particles.model.items() if n not in self.reached]
        self.rest = torch.stack(rest).sum() if rest else 0.0

    def release(self) -> None:
        """Forget the first run, which holds the model's graph."""
        self.start = None

    def in_one_block(self) -> LogJoint:
        """Return the same with all latents in one block, on the same minibatch."""
        with hold_batch(self.batch):
            return LogJoint(self.obj, self.model, self.args, self.kwargs, constrained=self.constrained, single=True)

    def in_independent_blocks(self) -> LogJoint:
        """Return the same with all latents in one block, unless the blocks share nothing but theta."""
        return self if self.separable else self.in_one_block()

    # Coordinates ----------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[int, list[Latent]]]:
        """Yield the place in a `Point` and the latents of the common part, then of the local one."""
        yield from ((1, self.commons), (0, self.locals))

    def origin(self) -> Point:
        """Return the coordinates of the first run."""
        return self.split({name: leaf.detach() for name, leaf in self.start.leaves.items()})

    def split(self, coordinates: Mapping[str, Tensor]) -> Point:
        """Gather tensors by latent into one point."""
        parts = []
        for latents in (self.locals, self.commons):
            rows = [latent.rows(coordinates[latent.name]) for latent in latents]
            parts.append(torch.cat(rows, -1) if rows else parts[0].new_zeros(1, 0))
        return Point(*parts)

    def join(self, point: Point) -> dict[str, Tensor]:
        """Take a point apart into tensors by latent."""
        found = {}
        for place, latents in self.parts():
            found.update({x.name: x.unrows(x.expand(point[place][..., x.slice])) for x in latents})
        return {name: found[name] for name in self.latents}

    def values(self, point: Point) -> dict[str, Tensor]:
        """Return the latents' values, in their support."""
        return {n: _apply(self.latents[n].transform, u) for n, u in self.join(point).items()}

    # Runs -----------------------------------------------------------------------------------------------------------

    def at(self, point: Point) -> Run:
        """Run the model at a point, with the random numbers of the first run."""
        with self.as_first():
            return self._run(self.join(point))

    @contextlib.contextmanager
    def as_first(self) -> Iterator[None]:
        """Let the model have the minibatch and the random numbers of the first run; the generator stays as it is."""
        with torch.random.fork_rng(devices=[]), hold_batch(self.batch):
            torch.set_rng_state(self.generator)
            yield

    def _run(self, coordinates: Mapping[str, Tensor]) -> Run:
        with _At(coordinates) as given:
            particles = draw(self.model, _draw_nothing, self.args, self.kwargs, score=_score)
            jacobians = {} if not self.constrained else _jacobians(given, particles)
        return Run(particles, given.leaves, jacobians, given.supports)

    def log_p(self, run: Run) -> Tensor:
        """Return the factors that latents move, summed per block ``(N,)`` if they are separable, else ``(1,)``."""
        total = []
        for name in self.reached:
            factor = run.factors[name]
            if not self.separable or not self.plates:
                total.append(factor.sum().reshape(1))
            else:
                total.append(self._rows(reduce_to(factor, self.frames[name], self.plates)).sum(-1))
        return torch.stack(torch.broadcast_tensors(*total)).sum(0)

    def _rows(self, tensor: Tensor) -> Tensor:
        return self.locals[0].rows(tensor, tail=0)

    def gradient(self, run: Run, twice: bool = True) -> Point:
        """Return the derivative of `log_p` by the coordinates, by default to be differentiated once more."""
        leaves = list(run.leaves.values())
        found = torch.autograd.grad(self.log_p(run).sum(), leaves, create_graph=twice, materialize_grads=True)
        point = self.split(dict(zip(run.leaves, found, strict=True)))
        if not all(bool(torch.isfinite(part).all()) for part in point):
            where = run.particles.first_non_finite()
            fail(
                NonFiniteError,
                self.obj,
                "differentiate the log joint",
                got=where or "a gradient that is not finite",
                because="its maximum is found from its derivatives",
                fix="Start from other parameters, or bound what the site divides by.",
            )
        return point

    def curve(self, run: Run, gradient: Point, direction: Point) -> Point:
        """Return the Hessian times a direction."""
        attached = [(part, d.expand_as(part)) for part, d in zip(gradient, direction, strict=True)]
        attached = [(part, d) for part, d in attached if part.requires_grad]
        leaves = list(run.leaves.values())
        if not attached:
            return self.split({n: torch.zeros_like(x) for n, x in run.leaves.items()})
        parts, directions = zip(*attached, strict=True)
        found = torch.autograd.grad(
            parts, leaves, directions, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self.split(dict(zip(run.leaves, found, strict=True)))

    # Scales ---------------------------------------------------------------------------------------------------------

    def _common_scale(self) -> Any:
        """Return the one scale of all factors that latents move: a number, or one per block ``(N,)``."""
        sites = [self.start.particles.model[name] for name in self.reached]
        first = sites[0].scale
        if any(not _same(first, site.scale) for site in sites):
            scales = sorted({str(_number(site.scale)) for site in sites})
            self._refuse_scale(f"scales {', '.join(scales)}", "all its terms need the same")
        if not isinstance(first, Tensor) or first.numel() == 1:
            return float(first)
        full = (1,) * (self.nesting - first.dim()) + tuple(first.shape)
        if not self.separable or not self.plates or any(full[dim] > 1 for dim in self.locals[0].others):
            self._refuse_scale(
                f"a tensor of shape {tuple(first.shape)}", "it has to be one number per block of latents"
            )
        return self._rows(first).squeeze(-1)

    def _refuse_scale(self, got: str, because: str) -> None:
        fail(
            StepError,
            self.obj,
            "integrate latents out",
            got=got,
            because=f"a scale multiplies the logarithm of an integral, so {because}",
            fix="Put poutine.scale around the latent and what depends on it, or give all data at once.",
        )

    # Arrangement ----------------------------------------------------------------------------------------------------

    def _require_latents(self) -> None:
        if not self.start.leaves:
            fail(
                StepError,
                self.obj,
                "be the E-step",
                got="a model without latents",
                because="there is nothing to average over",
                fix="Use SVI to maximise the likelihood.",
            )
        for name, site in self.start.particles.latents.items():
            support = self.start.supports[name]
            if support is None or support.is_discrete:
                self._refuse_site(site, "it has no density over the reals", "Use steps.Enumerated().")
            if not self.constrained and not _is_real(support):
                self._refuse_site(site, f"its support {support} is not all real numbers", "Use steps.Laplace().")

    def _require_kept_latents(self) -> None:
        """Refuse a factor that counts where a latent that moves it is masked, as its slopes at random values show."""
        masks = {name: site.mask for name, site in self.start.particles.model.items()}
        if suspects := list(counted_without(self.reached, masks)):
            run = self.at(fixed_normal(self.origin(), seed=0))
            refuse_counted(self.obj, (pair for pair in suspects if self._moves(run, *pair)))

    def _moves(self, run: Run, name: str, site: str) -> bool:
        """Whether a latent moves a site's factor where the latent is masked."""
        (slope,) = torch.autograd.grad(run.factors[site].sum(), [run.leaves[name]], retain_graph=True)
        latent = self.latents[name]
        size = slope.abs().reshape(*latent.batch, -1).sum(-1)
        return bool((size * ~torch.as_tensor(latent.mask)).any())

    def _refuse_site(self, site: Site, because: str, fix: str) -> None:
        got = f"{type(site.fn).__name__}{tuple(site.fn.shape())}"
        fail(StepError, self.obj, f"integrate site {site.name!r} out", got=got, because=because, fix=fix)

    def _arrange(self) -> Iterable[Latent]:
        dims, ends = tuple(sorted(frame.dim for frame in self.plates)), {True: 0, False: 0}
        for name, site in self.start.particles.latents.items():
            leaf, transform = self.start.leaves[name], _transform(self.start.supports[name])
            event_dim = site.fn.event_dim
            if transform is not None:
                event_dim += transform.domain.event_dim - transform.codomain.event_dim
            batch, event = leaf.shape[: leaf.dim() - event_dim], leaf.shape[leaf.dim() - event_dim :]
            block = dims if site.frames else ()
            args = (site.scale, site.mask, transform, tuple(batch), tuple(event), self.nesting, block)
            latent = Latent(name, site.frames, *args, place=(0, 0))
            start = ends[bool(block)]
            ends[bool(block)] = end = start + latent.width
            self._require_width(end)
            yield Latent(name, site.frames, *args, place=(start, end))

    def _require_width(self, width: int) -> None:
        if width > MAX_WIDTH:
            fail(
                StepError,
                self.obj,
                "factorize the precision of the latents",
                got=f"at least {width} coordinates that depend on each other",
                because=f"it is one matrix for those, of at most {MAX_WIDTH} rows",
                fix="Put independent latents into a pyro.plate, or use steps.MonteCarlo() or a guide.",
            )


class _At(Messenger):
    """Give latents their values, from coordinates that are leaves of autograd, zeros by default; hold theta."""

    def __init__(self, coordinates: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.leaves: dict[str, Tensor] = {}
        self.supports: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or msg["done"] or is_subsample(msg) or msg["infer"].get("_do_not_trace"):
            return
        name, fn = msg["name"], msg["fn"]
        self.supports[name] = support = None if fn.has_enumerate_support else fn.support
        if support is None or support.is_discrete:
            self.leaves[name] = torch.zeros(())
            return
        transform, coordinates = _transform(support), self.coordinates.get(name)
        if coordinates is None:
            shape = fn.shape() if transform is None else transform.inverse_shape(fn.shape())
            coordinates = _like(fn).new_zeros(shape)
        self.leaves[name] = leaf = coordinates.detach().clone().requires_grad_()
        msg["value"], msg["done"] = _apply(transform, leaf), True

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        if value is not None:
            msg["value"] = value.detach()
            vars(msg["value"]).update(vars(value))


def _like(fn: Any) -> Tensor:
    """Return a tensor of a distribution's dtype and device: one of its parameters, or a draw."""
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    for name in base.arg_constraints:
        if isinstance(vars(base).get(name), Tensor) and vars(base)[name].is_floating_point():
            return vars(base)[name].detach()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return fn.sample()


def _transform(support: Any) -> Any:
    """Return the bijection from real coordinates to a support, None for the reals themselves."""
    return None if support is None or support.is_discrete or _is_real(support) else biject_to(support)


def _apply(transform: Any, coordinates: Tensor) -> Tensor:
    return coordinates if transform is None else transform(coordinates)


def _jacobians(given: _At, particles: Particles) -> dict[str, Tensor]:
    """Return log |dz/du| per latent of constrained support, summed over its event."""
    found = {}
    for name, leaf in given.leaves.items():
        transform, site = _transform(given.supports[name]), particles.model[name]
        if transform is not None:
            found[name] = log_jacobian(transform, leaf, site.value, site.fn.event_dim)
    return found


def log_jacobian(transform: Any, coordinates: Tensor, value: Tensor, event_dim: int) -> Tensor:
    r"""Return $\log|dz/du|$ summed over the event dims of z."""
    log_det = transform.log_abs_det_jacobian(coordinates, value)
    rest = event_dim - transform.codomain.event_dim
    return log_det.flatten(-rest).sum(-1) if rest else log_det


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real


def _score(name: str, fn: Any, value: Tensor) -> Tensor | None:
    """Return a log density to be differentiated twice, None where the distribution's own is as good."""
    found = squares(fn, value)
    return curved(fn, value) if found is None else found


def _draw_nothing(*args: Any, **kwargs: Any) -> None:
    """A guide for a model whose latents are all given."""


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.numel() > 1:
        return one.shape == two.shape and torch.equal(one, two)
    return _number(one) == _number(two)


def _number(scale: Any) -> Any:
    return float(scale) if not isinstance(scale, Tensor) or scale.numel() == 1 else tuple(scale.shape)
