r"""Dictated draws: a problem's gradient as a function of minibatches, finite outcomes and normal noise."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .. import particles
from .._checks import EmvaeError, EstimatorError, fail
from .._registry import Traits, create
from ..drawing import treat as treated
from ..engine import trace
from ..estimators.base import Estimator, Situation, base, is_point_mass, misfit
from ..estimators.draws import from_noise, is_normal
from ..loss import Evaluation, MonteCarloELBO, States
from ..objectives import MultiSample
from ..parameters import Parameters, Row, substitute
from ..particles import Particles, Site, draw, hold_batch, quiet
from ..probing import differentiates
from ..problems import Problem

__all__ = ["Expectation", "Replay", "fitting_sites"]

CHUNK = 4096


class Replay:
    r"""The gradient of one problem by one estimator as a function of dictated noise.

    It is mapped over rows of noise, so thousands of outcomes cost milliseconds; an estimator that is not ``recordable``
    is looped, and so is a problem whose guide draws from something else than a finite or a normal distribution, and an
    estimator that is ``noisy`` (``own_draws``). The param store is not touched.

    Args:
        problem: A `Problem`.
        estimator: An instance or a registered name, for the sites that it fits, or a mapping from site to these; the
            other sites get ``"auto"``.
        num_particles: K.
        objective: A registered objective or an instance.
        state: The estimators' state, by site.

    Raises:
        EmvaeError: If it fits no site.

    Example:
        >>> from pyro_emvae.problems import mixed_two_level
        >>> Replay(mixed_two_level(), "score", 2).noise
        {'k': ('finite', (2, 1)), 'z': ('normal', (2, 1))}
    """

    def __init__(
        self,
        problem: Problem,
        estimator: Any,
        num_particles: int,
        state: States | None = None,
        objective: Any = "elbo",
    ) -> None:
        self.problem, self.num_particles, self.state = problem, num_particles, state or {}
        if not isinstance(estimator, Mapping):
            part: Estimator = create("estimator", estimator)
            estimator = dict.fromkeys(fitting_sites(problem, part, num_particles, objective), part)
            if not estimator:
                fail(
                    EmvaeError,
                    "Replay",
                    f"use {part} on problem {problem.name!r}",
                    got=f"{num_particles} particles and the sites {problem.sites}",
                    because="there has to be a site that it fits",
                    fix="Choose a problem by the estimator's traits.",
                )
        options = {"vectorize_particles": True, "estimator": estimator, "objective": objective}
        self.loss = _Dictated(num_particles, problem.max_plate_nesting, **options)
        once = one_particle(problem)
        sites = (*once.guide.values(), *once.model.values())
        self.plates = {f.name: (f.full_size, f.size) for s in sites for f in s.frames if f.size != f.full_size}
        self.noise: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._graphs: dict[tuple, Callable] = {}
        self._enter, self.leaves = _scope(problem)
        with quiet(seed=0, validate=False):
            first = self.evaluate({})
        self.leaves = self.leaves or {n: t for side in first.particles.params.values() for n, t in side.items()}
        self.dtype = first.objective.dtype
        self.sizes: dict[str, int] = {}
        self.together: dict[str, Callable[[int], Tensor]] = {}
        drawn = {n: s for n, s in first.particles.guide.items() if n not in first.particles.enumerated}
        random = {n: s for n, s in drawn.items() if not is_point_mass(s.fn)}
        objective = self.loss.objective
        self.above = {
            n for n, s in random.items() if isinstance(objective, MultiSample) and objective.is_above(s.frames)
        }
        for name, site in random.items():
            shape = site.value.shape
            groups = () if name not in self.above else (num_particles // objective.num_local_particles,)
            shape = (*groups, *shape[1:]) if groups and num_particles > 1 else tuple(shape)
            if base(site.fn).has_enumerate_support:
                self.sizes[name] = len(base(site.fn).enumerate_support(expand=False))
                event = len(base(site.fn).event_shape)
                self.noise[name] = ("finite", shape[: len(shape) - event])
                if self.loss.resolved[name].traits.draws in ("coupled", "weighted"):
                    self.together[name] = partial(_drawn_together, self.loss.resolved[name], site.fn, num_particles)
            elif is_normal(site.fn):
                self.noise[name] = ("normal", shape)
        noisy = any(row.estimator.traits.noisy for row in self.loss.table)
        self.own_draws = noisy or len(self.noise) < len(random) or self._redraws()
        for name, asked in self.loss.asked.items():
            self.noise[_uniform(name)] = ("uniform", tuple(asked))

    def _redraws(self) -> bool:
        """Whether guide sites are drawn anew at further values of another site."""
        depends = dependence(self.problem)
        probing = [row.site for row in self.loss.table if row.estimator.traits.probes != "no"]
        return any(site in depends.upstream(other) for site in probing for other in depends)

    def evaluate(
        self,
        noise: Mapping[str, Tensor],
        state: States | None = None,
        leaves: Mapping[str, Tensor] | None = None,
        order: int = 1,
    ) -> Evaluation:
        """Evaluate at given noise; what it does not name is drawn. For `order` see `MonteCarloELBO.evaluate`."""
        problem, state = self.problem, self.state if state is None else state
        with self._dictated(noise, leaves):
            return self.loss.evaluate(problem.model, problem.guide, problem.args, {}, state, order=order)

    @contextlib.contextmanager
    def _dictated(self, noise: Mapping[str, Tensor], leaves: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Let the loss take this noise, these minibatches and these leaves."""
        self.loss.noise = {name: self._rows(name, noise[name]) for name in self.noise if name in noise}
        batch = hold_batch({name: noise[name] for name in self.plates if name in noise})
        with self._enter(self.leaves if leaves is None else leaves), batch:
            yield

    def _rows(self, name: str, noise: Tensor) -> Tensor:
        """Return a site's noise for all particles: those of a group share that of a draw above them."""
        if name not in self.above or self.num_particles == 1:
            return noise
        repeated = noise.unsqueeze(1).expand(-1, self.loss.objective.num_local_particles, *noise.shape[1:])
        return repeated.reshape(-1, *noise.shape[1:])

    def gradient(self, evaluation: Evaluation) -> dict[str, Tensor]:
        """Return the gradient of the maximised surrogate by parameter name."""
        leaves = list(self.leaves.values())
        grads = torch.autograd.grad(evaluation.surrogate, leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(self.leaves, grads, strict=True))

    def gradients(self, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return gradients along the rows of noise, and the probabilities of the finite sites' outcomes."""
        rows = [noise[name] for name in (*self.noise, *self.plates)]
        with quiet(seed=0, validate=False):
            pieces = (self._map(rows) if rows else None) or [
                [t[None] for t in self.step(*(r[i] for r in rows))] for i in range(len(rows[0]) if rows else 1)
            ]
        probability, *grads = (torch.cat(parts).detach() for parts in zip(*pieces, strict=True))
        return dict(zip(self.leaves, grads, strict=True)), probability

    def step(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the finite sites' probability and the gradient at one row of noise, in the order of its names."""
        evaluation, probability = self._at(values)
        return probability, *self.gradient(evaluation).values()

    def _map(self, rows: list[Tensor]) -> list[tuple[Tensor, ...]] | None:
        """Return `step` mapped over chunks of rows, recorded where it differentiates inside; None if it cannot."""
        traits = [resolution.estimator.traits for resolution in self.loss.table]
        if self.own_draws or not all(t.recordable for t in traits):
            return None
        leaves = {name: leaf.detach() for name, leaf in self.leaves.items()}

        def surrogate(leaves: dict[str, Tensor], *values: Tensor) -> tuple[Tensor, Tensor]:
            evaluation, probability = self._at(values, leaves)
            return evaluation.surrogate, probability

        def step(*values: Tensor) -> tuple[Tensor, ...]:
            gradient, probability = torch.func.grad(surrogate, has_aux=True)(leaves, *values)
            return probability, *gradient.values()

        try:
            if self.problem.traits.modules or self._differentiates(traits):
                key = tuple(r.dtype for r in rows)
                step = self._graphs[key] = self._graphs.get(key) or record(self.step, [r[0] for r in rows])
            return [torch.func.vmap(step)(*(r[i : i + CHUNK] for r in rows)) for i in range(0, len(rows[0]), CHUNK)]
        except RuntimeError as error:
            if not branches(error):
                raise
            return None

    def _differentiates(self, traits: list[Traits]) -> bool:
        """Whether a gradient is taken inside an evaluation."""
        probes = ("differentiable", "twice", "draws")
        inside = (
            t.splits_paths or t.controls or t.stateful or t.draws == "relaxed" or t.probes in probes for t in traits
        )
        analytic = any(row.estimator.integrates for row in self.loss.table)  # masks are compared by their memory
        return self.loss.objective.splits_paths or analytic or any(inside)

    def _at(self, values: tuple[Tensor, ...], leaves: dict[str, Tensor] | None = None) -> tuple[Evaluation, Tensor]:
        noise = dict(zip((*self.noise, *self.plates), values, strict=True))
        evaluation = self.evaluate(noise, leaves=leaves)
        logs = [self._log_probability(name, evaluation.particles).detach() for name in self.sizes]
        return evaluation, torch.stack(logs).sum().exp() if logs else torch.ones((), dtype=self.dtype)

    def _log_probability(self, name: str, particles: Particles) -> Tensor:
        """Return the log probability of a finite site's values in all particles."""
        total = self.loss.log_probability(particles.guide[name])
        return total / self.loss.objective.num_local_particles if name in self.above else total

    def mean(self, noise: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """Return the sum of gradients times weights times probabilities along the rows of noise."""
        gradients, probability = self.gradients(noise)
        weights = weights * probability
        possible = weights != 0
        return {n: torch.tensordot(weights[possible], g[possible].to(weights), 1) for n, g in gradients.items()}

    def draws(self, count: int, seed: int = 0, index: bool = False) -> dict[str, Tensor]:
        """Return rows of random noise, the same for every dtype; of a finite site, the outcome's quantile or index."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        noise = {name: uniform(count, full).argsort(-1)[:, :size] for name, (full, size) in self.plates.items()}
        for name, (kind, shape) in self.noise.items():
            normal = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
            noise[name] = (normal if kind == "normal" else uniform(count, *shape)).to(self.dtype)
            if kind == "finite" and (index or name in self.together):
                noise[name] = (uniform(count, *shape) * self.sizes[name]).long()
        for name in () if index else self.together:
            with quiet(seed=seed + 1):
                noise[name] = self.together[name](count)
        return noise

    def outcomes(self, nodes: Tensor, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return noise and weights of all outcomes: minibatches x finite values x `nodes` of noise.

        Nodes have the normal coordinates first, then the uniform ones. The weights lack the probability of the finite
        values, which the gradients come with.
        """
        subsets = [torch.tensor(list(itertools.combinations(range(n), b))) for n, b in self.plates.values()]
        digits = [self.sizes[n] for n, (kind, s) in self.noise.items() if kind == "finite" for _ in range(math.prod(s))]
        *columns, last = _digits([*map(len, subsets), *digits, len(nodes)])
        noise = {name: rows[c] for name, rows, c in zip(self.plates, subsets, columns, strict=False)}
        normal, _ = self.continuous()
        blocks = {"normal": nodes[last, :normal].to(self.dtype), "uniform": nodes[last, normal:].to(self.dtype)}
        if digits:
            blocks["finite"] = torch.stack(columns[len(subsets) :], -1)
        for name, (kind, shape) in self.noise.items():
            width = math.prod(shape)
            noise[name] = blocks[kind][:, :width].reshape(-1, *shape)
            blocks[kind] = blocks[kind][:, width:]
        return noise, weights[last] / math.prod(map(len, subsets))

    def size(self) -> tuple[float, int]:
        """Return the number of outcomes without continuous noise, and the number of normal coordinates."""
        logs = [math.log(math.comb(*plate)) for plate in self.plates.values()]
        logs += [math.log(self.sizes[n]) * math.prod(self.noise[n][1]) for n in self.sizes]
        return math.exp(min(sum(logs), 100.0)), self.continuous()[0]

    def continuous(self) -> tuple[int, int]:
        """Return the numbers of normal and of uniform coordinates."""
        widths = [(kind, math.prod(shape)) for kind, shape in self.noise.values()]
        normal, uniform = (sum(n for kind, n in widths if kind == which) for which in ("normal", "uniform"))
        return normal, uniform


class Expectation(Replay):
    r"""The mean objective itself in place of an estimate: its gradient is exact, without an estimator.

    $$\nabla\sum_zP_\phi(z)\,E_\epsilon[J(z,\epsilon)],$$

    with the finite outcomes z summed and normal noise $\epsilon$ integrated along its paths; what `mean` returns.
    """

    def __init__(self, problem: Problem, num_particles: int, objective: Any) -> None:
        super().__init__(problem, dict.fromkeys(problem.sites, "pyro"), num_particles, objective=objective)

    def _at(self, values: tuple[Tensor, ...], leaves: dict[str, Tensor] | None = None) -> tuple[Evaluation, Tensor]:
        noise = dict(zip((*self.noise, *self.plates), values, strict=True))
        problem, loss = self.problem, self.loss
        with self._dictated(noise, leaves):
            particles = loss.particles(problem.model, problem.guide, problem.args, {})
            objective, _, _ = loss._objective(loss.plans[(problem.model, problem.guide)], particles, [])
        logs = [self._log_probability(name, particles) for name in self.sizes]
        probability = torch.stack(logs).sum().exp() if logs else torch.ones((), dtype=self.dtype)
        return Evaluation(objective, probability * objective, particles, {}), torch.ones_like(probability).detach()


def fitting_sites(problem: Problem, estimator: Estimator, num_particles: int, objective: Any = "elbo") -> list[str]:
    """Return the guide's sites that the estimator fits, without those that are functions of others."""
    objective = create("objective", objective)
    named = {"objective": objective.name, "multi_sample": isinstance(objective, MultiSample)}
    run, depends = one_particle(problem), dependence(problem)
    priors = {name: site.fn for name, site in run.model.items()}
    places = [
        Situation(n, s.fn, num_particles, infer=s.infer, upstream=depends.upstream(n), prior=priors.get(n), **named)
        for n, s in run.guide.items()
        if not is_point_mass(s.fn)
    ]
    fitting = [at.name for at in places if misfit(estimator, at) is None]
    if estimator.traits.draws == "relaxed":
        return [n for n in fitting if _takes(problem, n, estimator)]
    if not differentiates(estimator):
        return fitting
    return [name for name in fitting if _relaxes(problem, {name: estimator}, num_particles)]


def _takes(problem: Problem, name: str, estimator: Estimator) -> bool:
    """Whether the model can be differentiated through the values of a site."""
    enter, leaves = _scope(problem)
    with quiet(seed=0), enter(leaves):
        try:
            MonteCarloELBO(estimator={name: estimator}).loss(problem.model, problem.guide, *problem.args)
        except EstimatorError:
            return False
    return True


def _relaxes(problem: Problem, estimator: Mapping[str, Estimator], num_particles: int) -> bool:
    """Whether the problem takes the relaxed values that the estimator asks for."""
    enter, leaves = _scope(problem)
    loss = MonteCarloELBO(num_particles, problem.max_plate_nesting, vectorize_particles=True, estimator=estimator)
    with quiet(seed=0, validate=False), torch.no_grad(), enter(leaves):
        try:
            loss.particles(problem.model, problem.guide, problem.args, {})
        except EstimatorError:
            return False
    return True


def one_particle(problem: Problem) -> Particles:
    """Return one particle at the problem's parameters."""
    enter, leaves = _scope(problem)
    with quiet(seed=0, validate=False), torch.no_grad(), enter(leaves):
        return draw(problem.model, problem.guide, problem.args)


def dependence(problem: Problem) -> particles.Dependence:
    """Return which draws of a problem's guide reach which densities."""
    enter, leaves = _scope(problem)
    with enter(leaves):
        return particles.dependence(problem.model, problem.guide, problem.args, {})


def _scope(problem: Problem) -> tuple[Callable[[Mapping[str, Tensor]], Any], dict[str, Tensor]]:
    """Return a context in which given leaves stand for the problem's parameters, and fresh ones; not for modules."""
    if problem.traits.modules:
        return lambda leaves: contextlib.nullcontext(), {}
    leaves = problem.unconstrained()
    rows = tuple(Row(n, leaf, "unused", "", problem.constraints[n]) for n, leaf in leaves.items())
    return partial(substitute, Parameters(rows)), leaves


class _Dictated(MonteCarloELBO):
    """A loss whose values are functions of given noise."""

    noise: Mapping[str, Tensor] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: dict[str, tuple[int, ...]] = {}

    def _draw(self, plan: Any, model: Callable, guide: Callable, args: tuple, kwargs: Mapping) -> Particles:
        how = treated(self, plan)

        def treat(msg: dict) -> str:
            if msg["name"] in self.noise:
                rule = from_noise if is_normal(msg["fn"]) else _from_index
                msg["value"] = rule(msg["fn"], self.noise[msg["name"]])
                estimator = self.resolve(msg["name"], msg["fn"], msg["infer"], plan)
                if estimator.traits.draws == "relaxed":
                    msg["value"] = estimator.relax(msg["fn"], msg["value"])
            return how(msg)

        values = {name: (rows, None) for name, rows in self.noise.items()}
        drawn = super()._draw(plan, model, guide, args, kwargs, treat=treat, values=values)
        weights = {n: self.resolved[n].weigh(s.fn, s.value) for n, s in drawn.guide.items() if n in self.noise}
        given = {n: self.num_particles * w.detach() for n, w in weights.items() if w is not None}
        return replace(drawn, weights=drawn.weights | given)

    def _uniform(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        self.asked[name] = shape
        given = self.noise.get(_uniform(name))
        return super()._uniform(name, shape, like) if given is None else given

    def log_probability(self, site: Site) -> Tensor:
        """Return the log probability of a site's rows, as its estimator draws them."""
        estimator = self.resolved[site.name]
        together = estimator.joint(site.fn, site.value) if self.num_particles > 1 else None
        return (site.log_prob if together is None else together).sum()


def _uniform(name: str) -> str:
    return f"{name}|uniform"


def _drawn_together(estimator: Estimator, fn: Any, num_particles: int, count: int) -> Tensor:
    """Return the outcomes' indices of many draws by an estimator: ``(count, particles, *plates)``."""
    detached = torch.func.vmap(lambda _: estimator.draw(fn, num_particles).value.detach(), randomness="different")
    value, inner = detached(torch.arange(count)), base(fn)
    return value.argmax(-1) if inner.event_dim else value.long()


def _from_index(fn: Any, noise: Tensor) -> Tensor:
    """Return the outcome of that index; of a number in (0, 1), the outcome at that quantile."""
    inner = base(fn)
    support = inner.enumerate_support(expand=False)
    if noise.is_floating_point():
        cumulative = inner.log_prob(support).exp().cumsum(0)
        noise = (noise > cumulative[:-1]).sum(0)
    values = support.reshape((len(support), *inner.event_shape))
    return values.index_select(0, noise.flatten()).reshape((*noise.shape, *inner.event_shape))


def record(step: Callable, inputs: list[Tensor]) -> Callable:
    """Record a step as a graph of tensor operations."""
    traced = trace(step, tuple(inputs))
    return fx.GraphModule(traced.constants, traced.graph)


def branches(error: RuntimeError) -> bool:
    """Whether a step could not be recorded or mapped because Python looked at a tensor's number."""
    return "tracing tensor" in str(error) or ".item()" in str(error)


def _digits(sizes: list[int]) -> Iterator[Tensor]:
    """Return the columns of the table of all tuples of numbers below the sizes, in lexicographic order."""
    row = torch.arange(math.prod(sizes))
    columns = []
    for size in reversed(sizes):
        columns.append(row % size)
        row = row // size
    return reversed(columns)
