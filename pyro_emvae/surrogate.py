r"""The scalar whose gradient is the estimate: terms, weights, signals, paths and controls put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._checks import EstimatorError, fail
from ._pyro import scale_and_mask
from .controls import Known, controlled
from .estimators.base import Estimator, Probed, SiteTerms, State
from .estimators.score import Score, ScoreFunction
from .objectives import Bound, Term
from .particles import Dependence, Particles, Site, reduce_to
from .sticking import Sticking

__all__ = [
    "Composer",
    "States",
    "annealed",
    "group",
    "reaches",
    "reduced",
    "reweighted",
    "side_of",
    "total",
]

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
        beta: The factor of the latents' terms that is in the summands already.
    """

    def __init__(
        self,
        particles: Particles,
        terms: list[Term],
        bound: Bound | None,
        depends: Dependence,
        probe: Callable[..., Any],
        uniform: Callable[[str, tuple[int, ...], Tensor], Tensor],
        beta: Tensor | None = None,
    ) -> None:
        self.particles, self.bound, self.depends, self.probe = particles, bound, depends, probe
        self.uniform, self.beta = uniform, beta
        self.raw = terms
        self.terms = terms if bound is None else bound.by_values()
        self.probes: dict[str, int] = {}
        self._groups: dict[frozenset, dict[tuple, Tensor]] = {}

    def signal(self, site: Site, estimator: Estimator) -> Tensor:
        """Return the learning signal of a site: what its draw reaches, in its plates, detached."""
        if self.bound is not None:
            return self._signal_of_bound(self.bound, site, estimator)
        reached = self._reached(site.name, estimator)
        if reached not in self._groups:
            self._groups[reached] = group([t for i, t in enumerate(self.raw) if i in reached])
        return reduced(self._groups[reached], site.frames)

    def _signal_of_bound(self, bound: Bound, site: Site, estimator: Estimator) -> Tensor:
        """Return L h, what a local draw's score is weighed by; for one above, all that it reaches, per group."""
        if site.name not in bound.above:
            return bound.size * bound.signal
        reached = [term for term in bound.rest if reaches(self.depends, site.name, estimator, term)]
        costs = group(reached)
        costs[bound.frames] = costs[bound.frames] + bound.signal if bound.frames in costs else bound.signal
        return reduced(costs, site.frames)

    def _reached(self, name: str, estimator: Estimator) -> frozenset[int]:
        return frozenset(i for i, t in enumerate(self.raw) if reaches(self.depends, name, estimator, t))

    def compose(
        self, rows: list[Row], state: States, sticking: Sticking | None = None
    ) -> tuple[Tensor | Known, States]:
        """Return the surrogate, or its gradient where that is known already, and the estimators' next state."""
        entropies = {term.site: term.value for term in self.terms if term.kind == "entropy"}
        through, direct, controls, following = [], [], {}, {}
        for site, estimator in rows:
            entropy = None if self._keeps(site, estimator) else entropies.pop(site.name, None)
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
        surrogate = self._paths(list(entropies.values()), through, direct, rows) / self.particles.num_particles
        if any(controls.values()):
            also = None if sticking is None else sticking.known
            surrogate, found = controlled(surrogate, controls, self.particles, state, following, also)
            following |= {} if sticking is None else sticking.follow(found)
        return surrogate, following

    def dice(self, rows: list[Row], state: States) -> Tensor:
        r"""Return the surrogate whose second derivatives are right too, for `ScoreFunction` and pathwise estimators.

        Its first derivatives are those of `compose`. Every summand c is multiplied by $e^{\ell-\bar\ell}$ with $\ell$
        the log q of all draws that reach it; what else an estimator weighs log q by, and the direct score, whose mean
        is zero, come in as constants times $e^{\ell-\bar\ell}-1$.
        """
        scores = [(site, estimator) for site, estimator in rows if isinstance(estimator, ScoreFunction)]
        if self.bound is not None:
            return self._dice_of_bound(self.bound, scores, state)
        sampled = {term.site for term in self.terms if term.kind == "entropy"}
        surrogate: Tensor | float = 0.0
        for term in self.terms:
            reach = [site for site, _ in scores if reaches(self.depends, site.name, Score(), term)]
            exponent = sum(reduce_to(site.log_prob, site.frames, term.frames) for site in reach)
            surrogate = surrogate + (term.value * _one(exponent) if reach else term.value).sum()
        for site, estimator in scores:
            surrogate = surrogate + self._beyond(site, estimator, state, site.name in sampled)
        return surrogate / self.particles.num_particles

    def _beyond(self, site: Site, estimator: Estimator, state: States, sampled: bool) -> Tensor:
        """Return what an estimator adds to the plain score function, and what takes the direct score off."""
        signal = self.signal(site, estimator)
        view = self._view(site, estimator, None, signal, state)
        old = state.get(site.name) or estimator.init(view, signal)
        advantage = estimator.advantage(view, signal, self.particles.num_particles, old)
        zero = _one(site.log_prob) - 1
        added = ((advantage - self.signal(site, Score())) * zero).sum()
        return added + scale_and_mask(zero, site.scale, site.mask).sum() if sampled else added

    def _dice_of_bound(self, bound: Bound, scores: list[Row], state: States) -> Tensor:
        """Return `dice` of an objective of several particles: h of a datum is multiplied by all draws of its group."""
        count, groups = len(bound.log_weight), len(bound.value)
        exponent: Tensor | float = 0.0
        for site, _ in scores:
            rows = reduce_to(self.particles.rows(site.log_prob), site.frames, bound.frames)
            folded = bound.fold(rows.expand(count, *rows.shape[1:])).sum(0)
            exponent = exponent + (folded / bound.size if site.name in bound.above else folded)
        surrogate = bound.scale * (_one(exponent) * bound.value if scores else bound.value).sum() / groups
        for term in bound.rest:
            reach = [s for s, _ in scores if self.depends.moves(s.name, side_of(term), term.site)]
            exponent = sum(reduce_to(s.log_prob, s.frames, term.frames) for s in reach)
            surrogate = surrogate + (term.value * _one(exponent) if reach else term.value).sum() / count
        parts = [self._beyond(s, e, state, s.name in bound.above) for s, e in scores]
        return surrogate + _sum(parts) / count

    def count(self, rows: list[Row], state: States) -> dict[str, int]:
        """Return at how many further values each site asks for a run or a derivative; none is made."""
        found = {}
        for site, estimator in rows:
            if estimator.traits.probes != "no":
                signal = self.signal(site, estimator) if estimator.traits.needs_signal else None
                values = self._asked(site, estimator, None, signal, state)[1]
                at_draws = int(estimator.traits.probes == "draws")
                found[site.name] = at_draws if values is None else len(values)
        return found

    def _view(self, site: Site, estimator: Estimator, entropy, signal, state: States) -> SiteTerms:
        view, values = self._asked(site, estimator, entropy, signal, state)
        if estimator.traits.probes == "draws":
            self.probes[site.name] = 1
            return replace(view, probed=Probed(gradient=self._slope(site, estimator)))
        if values is None:
            return view
        self.probes[site.name] = len(values)
        probed = self.probe(site, values, estimator, signal)
        return replace(view, probes=values if probed.values is None else probed.values, probed=probed)

    def _slope(self, site: Site, estimator: Estimator) -> Tensor:
        """Return the derivative of what a site's draw reaches by that draw, in the shape of its value."""
        reached = self._reached(site.name, estimator)
        signal, values = (
            total([t for i, t in enumerate(self.raw) if i in reached]),
            [r.value for r in site.runs or (site,)],
        )
        return torch.stack(torch.autograd.grad(signal, values, retain_graph=True)).reshape(site.value.shape)

    def _asked(
        self, site: Site, estimator: Estimator, entropy, signal, state: States
    ) -> tuple[SiteTerms, Tensor | None]:
        """Return what an estimator sees of a site, and the further values that it asks for."""
        prior = self.particles.model.get(site.name)
        fields = {
            "entropy": entropy,
            "direct": None if any(self.particles.cuts) else functools.partial(_direct, site, self.beta),
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
            return view, None
        old = state.get(site.name) or estimator.init(view, signal)
        return view, estimator.probes(view, self.particles.num_particles, old)

    def _keeps(self, site: Site, estimator: Estimator) -> bool:
        """Whether a site's log q stays beside its estimator: in a weight of several particles its mean is not zero."""
        bound = self.bound
        several = bound is not None and bound.size > 1 and site.name not in bound.above
        return several and estimator.traits.needs_signal

    def _paths(self, left: list[Tensor], through: list, direct: list, rows: list[Row]) -> Tensor:
        """Return what is differentiated directly and, where values are cut, through them."""
        common = _sum([t.value for t in self.terms if t.kind != "entropy"] + left)
        splits = self.bound is not None and self.bound.objective.splits_paths
        climbed = _sum([t.value for t in self.bound.by_model() if t.kind != "entropy"] + left) if splits else common
        along = climbed + _sum([t for t in direct if t is not None])
        if not any(self.particles.cuts):
            return along
        doubly = self._doubly(rows)
        value = common + _sum([t for t in through if t is not None])
        along = along + through_values(value, self.particles.cuts, lambda leaf: id(leaf) not in doubly)
        if not doubly:
            return along
        value = total(self.bound.by_values(doubly=True))
        return along + through_values(value, self.particles.cuts, lambda leaf: id(leaf) in doubly)

    def _doubly(self, rows: list[Row]) -> set[int]:
        """Return the cut values that are differentiated doubly: those above have one weight, and none is left out."""
        sites = [site for site, e in rows if e.traits.doubly and self.bound and site.name not in self.bound.above]
        scored = [site.name for site, e in rows if e.traits.needs_signal]
        for name, other in ((s.name, o) for s in sites for o in scored if self.depends.moves(s.name, "guide", o)):
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"reparameterise site {name!r} doubly",
                got=f"site {other!r}, differentiated by its score, whose distribution depends on it",
                because="the score of such a site has to be upstream of what is doubly reparameterised",
                fix=f'Use estimator={{"{name}": "pathwise"}}.',
            )
        return {id(one.value) for site in sites for one in site.runs or (site,)}


def _direct(site: Site, beta: Tensor | None) -> Tensor:
    """Return minus log q of the detached values of a site, scaled, masked and annealed."""
    found = -scale_and_mask(site.each(lambda run: run.density(run.value.detach())), site.scale, site.mask)
    return found if beta is None else beta * found


def _one(log_q: Tensor) -> Tensor:
    return (log_q - log_q.detach()).exp()


def side_of(term: Term) -> str:
    """Return whose density a summand is: the model's or the guide's."""
    return "guide" if term.kind == "entropy" else "model"


def reaches(depends: Dependence, name: str, estimator: Estimator, term: Term) -> bool:
    """Whether a summand belongs to the learning signal of a site; see `Estimator.reach`.

    The site's own KL in closed form does not: it is no function of the draw.
    """
    if term.kind == "kl" and term.site == name:
        return False
    sources = [name, *(depends.upstream(name) if estimator.reach == "related" else ())]
    return estimator.reach == "all" or any(depends.moves(source, side_of(term), term.site) for source in sources)


def _sum(tensors: list[Tensor]) -> Tensor | float:
    totals = [tensor.sum() if tensor.dim() else tensor for tensor in tensors]
    return functools.reduce(torch.add, totals) if totals else 0.0


def group(terms: list[Term], detach: bool = True) -> dict[tuple, Tensor]:
    """Sum the terms that have the same plates."""
    groups: dict[tuple, Tensor] = {}
    for term in terms:
        value, before = term.value.detach() if detach else term.value, groups.get(term.frames)
        groups[term.frames] = value if before is None else before + value
    return groups


def reduced(costs: Mapping[tuple, Tensor], frames: tuple) -> Tensor:
    """Return the sum of grouped terms in the given plates."""
    return torch.as_tensor(sum(reduce_to(cost, own, frames) for own, cost in costs.items()))


def through_values(value: Tensor, cuts: tuple, keep: Callable[[Tensor], bool] = lambda leaf: True) -> Tensor | float:
    r"""Return $\sum_s\langle a_s, z_s\rangle$ with $a_s$ the total derivative of `value` by the s-th cut value.

    A drawn value depends on the parameters and on earlier cut values; going backwards, each passes its cotangent on.
    The sum is over the values that are kept.
    """
    total: Tensor | float = 0.0
    for run in cuts:
        leaves = [leaf for _, leaf in run]
        kept = [i for i, leaf in enumerate(leaves) if keep(leaf)]
        if not kept:
            continue
        cotangents = list(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True))
        for i in range(len(run) - 1, -1, -1):
            drawn, cotangent = run[i][0], cotangents[i]
            if cotangent is None:
                continue
            if i > kept[0]:
                back = torch.autograd.grad(drawn, leaves[:i], cotangent, retain_graph=True, allow_unused=True)
                for j, part in enumerate(back):
                    if part is not None:
                        cotangents[j] = part if cotangents[j] is None else cotangents[j] + part
            if i in kept:
                total = total + (cotangent.detach() * drawn).sum()
    return total
