r"""Which estimator a site gets when nobody named one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._checks import EstimatorError, fail, nearest
from .._registry import Entry, create, entries, lookup
from ..particles import is_annotated, num_outcomes
from .base import Estimator, Situation, base, is_point_mass, misfit
from .partial import PartialPathwise, has_score_parts
from .pathwise import Pathwise
from .score import Score

__all__ = ["POLICIES", "auto", "auto_table", "candidates", "from_user", "probe", "pyro", "table"]

PLACES = {"analytic_kl": 8, "adaptive_sticking": 9, "arms": 15}
"""Candidates of auto whose traits do not give them a place."""

Choice = tuple[Estimator, str]
Policy = Callable[[Situation], Choice]

MISTAKEN = ("MixtureOfDiagNormals", "MixtureOfDiagNormalsSharedCovariance")
"""Distributions whose sampler's path is not right: Pyro's derivative of these by the component logits is that of
components whose smallest scale is 1 in every dim (tests/test_pathwise_families.py). ``"auto"`` leaves it alone."""


def pyro(at: Situation) -> Choice:
    """Choose as `Trace_ELBO` does: pathwise where ``rsample`` exists, else the score function of all terms."""
    if at.fn.has_rsample:
        return _pathwise(at.fn, as_pyro=True)
    return Score(reach="all"), "no rsample"


def auto(at: Situation) -> Choice:
    r"""Choose the first unbiased candidate that fits, in the order of `auto_table`.

    1. The exact sum, where ``infer={"enumerate": "parallel"}`` asks for it, or where guide and model say the same at
       all outcomes at once as at each alone and at most 64 outcomes meet in one density (`particles.summable`).
    2. Pathwise with the KL in closed form (`Analytic`), where the objective is the sampled ELBO and guide and prior are
       a pair whose KL torch has right (`objectives.elbo.integrable`), their latents come in one order, and nothing is
       summed over. It is about the gradient: the value that is reported stays the sampled one, number for number that
       of `Trace_ELBO`, so that where q is the posterior, it is log p(x) in every draw. In an evaluation in which scales
       or masks of guide and model differ, the site's KL is drawn. A value that a handler gives the guide, as
       ``poutine.replay``, counts as drawn from q. On the package's problems the variance of the guide's
       gradient is 0.33 to 0.99 of the plain one at the start, and 0.02 to 0.92 after training; of the model's, 0 to
       1.00. Only for eight schools it is 2.3 and 2.4: what the prior's and the likelihood's noise have in common, and
       of other signs, is lost. On the VAE of ``benchmarks/svi.py`` it is 0.15 and 0.91, and a step takes as long
       (0.99 times eagerly, 1.00 recorded).
    3. Pathwise without as much of the direct score as pays (`AdaptiveSticking`), under that objective too, where no
       draw of the guide is upstream and the arguments of the distribution are known (`sticking.ARGUMENTS`: normal,
       gamma, beta, multivariate normal, ...), and nothing is summed over. The variance of the guide's gradient is 0.23
       to 0.99 of the plain one at the start, and 0.02 to 0.79 after training (two problems of the package, eight
       schools and logistic regression with six guides). A step of a small model takes 1.0 to 1.25 times as long (1.37
       with a low-rank normal), 0.92 of Pyro's own for eight schools with ``AutoNormal``; what is added is as much
       for a large one. It has a state; second derivatives are those of the plain gradient. Here too a value that a
       handler gives the guide counts as drawn from q. What is upstream is found in the first run that is
       differentiated; before that, the table says plain pathwise.
    4. Plain pathwise, wherever else there is a reparameterised sampler; a rejection sampler's rest by the score
       function. Doubly reparameterised gradients are better near the posterior and worse far from it.
    5. For Bernoulli sites whose logits depend on no draw, particles by a copula (`Arms`).
    6. Leave-one-out, for whatever else has two particles; of objectives of several particles, the better of `VIMCO`
       and `OVIS`. Not `RaoBlackwellTopK`: its particles are weighted, and one site alone of a guide can have such.
    7. With one particle, a running baseline.
    """
    if is_point_mass(at.fn) or (at.fn.has_rsample and has_score_parts(at.fn)):
        return _pathwise(at.fn)
    mistaken = type(base(at.fn)).__name__ in MISTAKEN
    for entry in _candidates():
        estimator = entry.factory()
        summed = estimator.traits.draws == "enumerated"
        if (summed and not (at.enumerable or at.below)) or (estimator.integrates and not at.integrable):
            continue
        if estimator.sticks is not None and not at.sticks:
            continue
        if estimator.traits.draws == "coupled" and (not at.together or at.upstream is None):
            continue
        if misfit(estimator, at) is None and not (mistaken and estimator.traits.needs_rsample):
            if summed:
                return estimator, _why_summed(at)
            return estimator, f"first of auto's candidates that fits ({entry.summary})"
    return Score(), "nothing else fits"


def probe(at: Situation) -> Choice:
    r"""Begin with `auto`'s choice; the loss then tries the `candidates` and keeps the best.

    Within 5 % of all model evaluations (and one trial) it takes gradients with each of the candidates, and keeps for
    each site the one with the least $E\lVert g\rVert^2$ times model evaluations: evaluations and no seconds, so that
    two runs with one seed choose alike. All that it knows is in the loss's state, so that a run that is resumed goes on
    bitwise.

    Source: Geffner and Domke 2020, "A rule for gradient estimator selection", eq. 4. Differs: evaluations for time.
    """
    estimator, why = auto(at)
    return estimator, f"until the trials are over; {why}"


def candidates(at: Situation) -> tuple[str, ...]:
    """Return the registered unbiased estimators that a site can be tried with."""
    if is_point_mass(at.fn):
        return ()
    found = []
    for entry in entries("estimator"):
        estimator = None if entry.traits.arguments or not entry.traits.unbiased else entry.factory()
        if estimator is None or misfit(estimator, at) is not None:
            continue
        draws = estimator.traits.draws
        if (draws == "enumerated" and not (at.enumerable or at.below)) or (estimator.integrates and not at.integrable):
            continue
        if draws not in ("independent", "enumerated") and not at.together and at.num_particles > 1:
            continue
        if draws in ("coupled", "weighted") and at.upstream is None:
            continue
        found.append(entry.name)
    return tuple(found)


def _why_summed(at: Situation) -> str:
    asked = 'infer={"enumerate": "parallel"}' if is_annotated(at.infer) else "right at each and cheap"
    return f"its {num_outcomes(at.fn)} outcomes are summed exactly: {asked}"


POLICIES: dict[str, Policy] = {"pyro": pyro, "auto": auto, "probe": probe}


def table() -> list[dict[str, Any]]:
    """Return all registered estimators, one row each: name, traits, a line about it, and its source.

    ``evaluations`` at further values and outcomes are counted by a loss: see `MonteCarloELBO.evaluations`.

    Example:
        >>> [row["estimator"] for row in table() if not row["unbiased"]][:2]
        ['gumbel_rao', 'gumbel_softmax']
    """
    shown = ("unbiased", "support", "needs_rsample", "draws", "probes", "min_particles", "objectives", "higher_order")
    shown += ("controls", "stateful", "arguments")
    return [
        {
            "estimator": e.name,
            "aliases": e.aliases,
            **{name: getattr(e.traits, name) for name in shown},
            "summary": e.summary,
            "source": e.source,
        }
        for e in sorted(entries("estimator"), key=lambda entry: entry.name)
    ]


def auto_table() -> list[dict[str, Any]]:
    """Return auto's candidates in order: name, what they need, and a line about them.

    Example:
        >>> [row["estimator"] for row in auto_table()][:3]
        ['enumerated', 'analytic_kl', 'adaptive_sticking']
    """
    return [
        {
            "estimator": e.name,
            "needs_rsample": e.traits.needs_rsample,
            "support": e.traits.support,
            "min_particles": e.traits.min_particles,
            "summary": e.summary,
        }
        for e in _candidates()
    ]


def _candidates() -> list[Entry]:
    rows = [e for e in entries("estimator") if _place(e) is not None and e.traits.unbiased]
    return sorted(rows, key=_place)


def _place(entry: Entry) -> int | None:
    return PLACES.get(entry.name, entry.traits.auto)


def _pathwise(fn: Any, as_pyro: bool = False) -> Choice:
    if is_point_mass(fn):
        return Pathwise(), "deterministic"
    if has_score_parts(fn):
        partial = PartialPathwise("all", "none") if as_pyro else PartialPathwise()
        return partial, "its sampler is reparameterised in part"
    return Pathwise(), "has rsample"


def from_user(spec: Any) -> Estimator | Policy:
    """Return a policy or an estimator for what the user gave: a name, an instance or a policy.

    A policy is a function of a `Situation` that returns an estimator and why.

    Raises:
        EstimatorError: If the name is unknown (with the nearest known one) or the object is no estimator.
    """
    if isinstance(spec, str):
        if spec in POLICIES:
            return POLICIES[spec]
        known = [*POLICIES, *(n for e in entries("estimator") for n in (e.name, *e.aliases))]
        if spec not in known:
            fail(
                EstimatorError,
                "MonteCarloELBO",
                f"use estimator {spec!r}",
                got="an unknown name",
                because="no estimator or policy of that name is registered",
                fix=nearest(spec, known),
            )
        return create("estimator", lookup("estimator", spec).name)
    if isinstance(spec, Estimator) or (callable(spec) and not isinstance(spec, type)):
        return spec
    fail(
        EstimatorError,
        "MonteCarloELBO",
        f"use estimator {spec!r}",
        got=type(spec).__name__,
        because="an estimator is a registered name, an instance or a mapping from site to one of these",
        fix='Write estimator="auto", or estimator={"z": "leave_one_out"}.',
    )
