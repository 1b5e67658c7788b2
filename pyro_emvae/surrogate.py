r"""The scalar whose gradient is the estimate: terms, weights, signals, paths and controls put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._checks import EstimatorError, fail
from ._pyro import scale_and_mask
from .estimators.base import Control, Estimator, SiteTerms, State
from .estimators.score import Score, ScoreFunction
from .objectives import Bound, Term
from .particles import Dependence, Particles, Site, reduce_to

__all__ = ["Composer", "States", "annealed", "group", "reaches", "reduced", "reweighted", "side_of", "total"]

States = dict[str, State]
Row = tuple[Site, Estimator]


def total(terms: list[Term]) -> Tensor:
    """Return the sum of all summands."""
    return torch.as_tensor(_sum([term.value for term in terms]))


def annealed(terms: list[Term], particles: Particles, beta: Tensor) -> list[Term]:
    """Multiply what belongs to latents, in model and guide."""
    data = {name for name, site in particles.model.items() if site.is_observed}
    return [t if t.kind == "log_p" and t.site in data else t._replace(value=beta * t.value) for t in terms]


def reweighted(terms: list[Term], particles: Particles, depends: Dependence) -> list[Term]:
    """Multiply the summands that a weighted draw reaches by its weights.

    Raises:
        EstimatorError: Several weighted sites (their rows are not all pairs of values), or a summand that is reached
            and lies outside one of the site's plates (elements of a plate are then not independent).
    """
    if not particles.weights:
        return terms
    if len(particles.weights) > 1:
        one, other = list(particles.weights)[:2]
        _refuse(one, f"weighted draws of {other!r} too", "one site of a guide can have weighted particles", "score")
    ((name, weight),) = particles.weights.items()
    frames = set(particles.guide[name].frames)
    result = []
    for term in terms:
        if not depends.moves(name, side_of(term), term.site):
            result.append(term)
        elif frames <= set(term.frames):
            result.append(term._replace(value=weight * term.value))
        else:
            missing = next(iter(frames - set(term.frames))).name
            _refuse(
                name, f"site {term.site!r} outside plate {missing!r}", "weights are per element of the site's plates"
            )
    return result


def _refuse(name: str, got: str, because: str, instead: str = "leave_one_out") -> None:
    fail(
        EstimatorError,
        "MonteCarloELBO",
        f"weigh the particles of site {name!r}",
        got=got,
        because=because,
        fix=f'Use estimator={{"{name}": "{instead}"}}.',
    )


class Composer:
    r"""The surrogate of one evaluation.

    Args:
        particles: The particles.
        terms: The summands of the objective.
        bound: The objective of several particles that they make up, or None.
        depends: Which draws reach which summands.
        probe: Runs the model at further values of a site; see `Estimator.probes`.
        uniform: Draws uniform numbers for a site, by its name, of a shape and like a tensor.
    """

    def __init__(
        self,
        particles: Particles,
        terms: list[Term],
        bound: Bound | None,
        depends: Dependence,
        probe: Callable[..., Any],
        uniform: Callable[[str, tuple[int, ...], Tensor], Tensor],
    ) -> None:
        self.particles, self.bound, self.depends, self.probe = particles, bound, depends, probe
        self.uniform = uniform
        self.raw = terms
        self.terms = terms if bound is None else bound.weighted(bound.slopes)
        self.probes = 0
        self._groups: dict[frozenset, dict[tuple, Tensor]] = {}

    def signal(self, site: Site, estimator: Estimator) -> Tensor:
        """Return the learning signal of a site: what its draw reaches, in its plates, detached."""
        if self.bound is not None:
            bound = self.bound
            return (bound.scale * bound.value.detach()).expand_as(bound.slopes) * len(bound.slopes)
        reached = self._reached(site.name, estimator)
        if reached not in self._groups:
            self._groups[reached] = group([t for i, t in enumerate(self.raw) if i in reached])
        return reduced(self._groups[reached], site.frames)

    def _reached(self, name: str, estimator: Estimator) -> frozenset[int]:
        return frozenset(i for i, t in enumerate(self.raw) if reaches(self.depends, name, estimator, t))

    def compose(self, rows: list[Row], state: States) -> tuple[Tensor, States]:
        """Return the surrogate and the estimators' next state."""
        entropies = {term.site: term.value for term in self.terms if term.kind == "entropy"}
        through, direct, controls, following = [], [], {}, {}
        for site, estimator in rows:
            keeps = self.bound is not None and estimator.traits.needs_signal  # its direct term has no mean zero
            entropy = entropies.get(site.name) if keeps else entropies.pop(site.name, None)
            signal = self.signal(site, estimator) if estimator.traits.needs_signal else None
            view = self._view(site, estimator, entropy, signal, state)
            old = state.get(site.name) or estimator.init(view, signal)
            paths = estimator.surrogate(view, signal, self.particles.num_particles, old)
            through.append(paths.get("value"))
            direct.append(paths.get("guide"))
            controls[site.name] = dict(paths.get("controls") or {})
            new = estimator.update(view, signal, old)
            if new:
                following[site.name] = {k: v.detach() for k, v in new.items()}
        rest = [t.value for t in self.terms if t.kind != "entropy"] + list(entropies.values())
        surrogate = self._paths(_sum(rest), through, direct, rows) / self.particles.num_particles
        if any(controls.values()):
            surrogate = self._controlled(surrogate, controls, state, following)
        return surrogate, following

    def dice(self, rows: list[Row], state: States) -> Tensor:
        r"""Return the surrogate whose second derivatives are right too, for `ScoreFunction` and pathwise estimators.

        Its first derivatives are those of `compose`. Every summand c is multiplied by $e^{\ell-\bar\ell}$ with $\ell$
        the log q of all draws that reach it; what else an estimator weighs log q by, and the direct score, whose mean
        is zero, come in as constants times $e^{\ell-\bar\ell}-1$.
        """
        scores = [(site, estimator) for site, estimator in rows if isinstance(estimator, ScoreFunction)]
        sampled = {term.site for term in self.terms if term.kind == "entropy"}
        surrogate: Tensor | float = 0.0
        for term in self.terms:
            reach = [site for site, _ in scores if self.depends.moves(site.name, side_of(term), term.site)]
            exponent = sum(reduce_to(site.log_prob, site.frames, term.frames) for site in reach)
            surrogate = surrogate + (term.value * _one(exponent) if reach else term.value).sum()
        for site, estimator in scores:
            signal = self.signal(site, estimator)
            view = self._view(site, estimator, None, signal, state)
            old = state.get(site.name) or estimator.init(view, signal)
            advantage = estimator.advantage(view, signal, self.particles.num_particles, old)
            beyond = advantage - self.signal(site, Score())
            zero = _one(site.log_prob) - 1
            surrogate = surrogate + (beyond * zero).sum()
            if site.name in sampled:
                surrogate = surrogate + scale_and_mask(zero, site.scale, site.mask).sum()
        return surrogate / self.particles.num_particles

    def _view(self, site: Site, estimator: Estimator, entropy, signal, state: States) -> SiteTerms:
        prior = self.particles.model.get(site.name)
        fields = {
            "entropy": entropy,
            "runs": site.runs,
            "bound": self.bound,
            "weight": self.particles.weights.get(site.name),
            "prior": prior and prior.fn,
            "particles": self.particles,
        }
        view = SiteTerms(site.name, site.fn, site.value, site.log_prob, **fields)
        shape = estimator.noise(view)
        if shape is not None:
            view = replace(view, noise=self.uniform(site.name, shape, site.log_prob))
        if estimator.traits.probes == "no":
            return view
        old = state.get(site.name) or estimator.init(view, signal)
        values = estimator.probes(view, self.particles.num_particles, old)
        if values is None:
            return view
        self.probes += len(values)
        probed = self.probe(site, values, estimator, signal)
        return replace(view, probes=values if probed.values is None else probed.values, probed=probed)

    def _paths(self, common: Tensor | float, through: list, direct: list, rows: list[Row]) -> Tensor:
        along = common + _sum([t for t in direct if t is not None])
        if not any(self.particles.cuts):
            return along
        if any(estimator.traits.doubly for _, estimator in rows):
            count = self.particles.num_particles
            factors = count * self.bound.objective.doubly(self.bound.slopes / count)
            return along + through_values(total(self.bound.weighted(factors)), self.particles.cuts)
        value = common + _sum([t for t in through if t is not None])
        return along + through_values(value, self.particles.cuts)

    def _controlled(self, surrogate: Tensor, controls: Mapping[str, Mapping[str, Control]], state, following) -> Tensor:
        r"""Add $\sum_l a_l c_l$ with lagged coefficients, as $\langle g,\theta\rangle$ with g the whole gradient."""
        leaves = _leaves(surrogate, self.particles)
        found = torch.autograd.grad(surrogate, list(leaves.values()), retain_graph=True)
        grads = dict(zip(leaves, found, strict=True))
        base = {name: g.detach() for name, g in grads.items()}
        for site, named in controls.items():
            for label, control in named.items():
                term = _sum([control.term]) / self.particles.num_particles
                parts = torch.autograd.grad(term, list(leaves.values()), retain_graph=True, allow_unused=True)
                for (name, _), part in zip(leaves.items(), parts, strict=True):
                    if part is None:
                        continue
                    key, part = f"{label}|{name}", part.detach()
                    new, coefficient = _learn(control, state.get(site, {}), key, base[name], part)
                    grads[name] = grads[name] + coefficient * part
                    following.setdefault(site, {}).update(new)
        return sum((grads[name].detach() * leaf).sum() for name, leaf in leaves.items())


def _learn(control: Control, old: State, key: str, rest: Tensor, part: Tensor) -> tuple[State, Tensor]:
    """Return the next running moments, and the coefficient by the old ones."""
    zero = torch.zeros_like(part.sum())
    covariance, square = old.get(f"{key}|covariance", zero), old.get(f"{key}|square", zero)
    coefficient = torch.where(square > 0, -covariance / square.clamp(min=torch.finfo(square.dtype).tiny), zero)
    decay = control.decay
    new = {
        f"{key}|covariance": decay * covariance + (1 - decay) * (rest * part).sum(),
        f"{key}|square": decay * square + (1 - decay) * (part * part).sum(),
    }
    return new, coefficient.clamp(control.low, control.high)


def _leaves(surrogate: Tensor, particles: Particles) -> dict[str, Tensor]:
    """Return the leaves that a tensor was made from, by their names; without the values that stand for draws."""
    names = {id(leaf): name for params in particles.params.values() for name, leaf in params.items()}
    cut = {id(leaf) for run in particles.cuts for _, leaf in run}
    seen: set[Any] = set()  # of nodes, so that none is freed and its id used again
    found: dict[str, Tensor] = {}
    stack = [surrogate.grad_fn]
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if node is None or node in seen or id(leaf) in cut:
            continue
        seen.add(node)
        if leaf is not None:
            found[names.get(id(leaf), f"leaf_{len(found)}")] = leaf
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _one(log_q: Tensor) -> Tensor:
    return (log_q - log_q.detach()).exp()


def side_of(term: Term) -> str:
    """Return whose density a summand is: the model's or the guide's."""
    return "guide" if term.kind == "entropy" else "model"


def reaches(depends: Dependence, name: str, estimator: Estimator, term: Term) -> bool:
    """Whether a summand belongs to the learning signal of a site; see `Estimator.reach`."""
    sources = [name, *(depends.upstream(name) if estimator.reach == "related" else ())]
    return estimator.reach == "all" or any(depends.moves(source, side_of(term), term.site) for source in sources)


def _sum(tensors: list[Tensor]) -> Tensor | float:
    result: Tensor | float = 0.0
    for tensor in tensors:
        result = result + (tensor.sum() if tensor.dim() else tensor)
    return result


def group(terms: list[Term], detach: bool = True) -> dict[tuple, Tensor]:
    """Sum the terms that have the same plates."""
    groups: dict[tuple, Tensor] = {}
    for term in terms:
        value = term.value.detach() if detach else term.value
        groups[term.frames] = groups[term.frames] + value if term.frames in groups else value
    return groups


def reduced(costs: Mapping[tuple, Tensor], frames: tuple) -> Tensor:
    """Return the sum of grouped terms in the given plates."""
    return torch.as_tensor(sum(reduce_to(cost, own, frames) for own, cost in costs.items()))


def through_values(value: Tensor, cuts: tuple) -> Tensor | float:
    r"""Return $\sum_s\langle a_s, z_s\rangle$ with $a_s$ the total derivative of `value` by the s-th cut value.

    A drawn value depends on the parameters and on earlier cut values; going backwards, each passes its cotangent on.
    """
    total: Tensor | float = 0.0
    for run in cuts:
        leaves = [leaf for _, leaf in run]
        if not leaves:
            continue
        cotangents = list(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True))
        for i in range(len(run) - 1, -1, -1):
            drawn, cotangent = run[i][0], cotangents[i]
            if cotangent is None:
                continue
            if i:
                back = torch.autograd.grad(drawn, leaves[:i], cotangent, retain_graph=True, allow_unused=True)
                for j, part in enumerate(back):
                    if part is not None:
                        cotangents[j] = part if cotangents[j] is None else cotangents[j] + part
            total = total + (cotangent.detach() * drawn).sum()
    return total
