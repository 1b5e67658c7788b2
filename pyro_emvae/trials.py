r"""The trials of ``estimator="probe"``: one candidate at a time, at one site."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ._registry import create
from .choosing import PROBE, begin, best, due, learn, trial
from .estimators.policies import POLICIES
from .resolving import KEPT, Plan, remember

__all__ = ["probe"]

logger = logging.getLogger("pyro_emvae")


def probe(loss: Any, *pair: Any) -> None:
    """Try the estimator whose turn it is, if the share of evaluations allows, and keep the best of each site."""
    if pair[:2] not in loss.plans:
        loss.prepare(*pair)
    plan, sites = loss.plans[pair[:2]], {name: tried for name, tried in loss.resolver.tried.items() if len(tried) > 1}
    record = begin(sites) | loss.state.get(PROBE, {})
    turn = due(record, sites, loss.num_particles)
    if turn is not None:
        site, name = turn
        other = _trial(loss, plan, pair[:2], site, name)
        known = {n: t for n, t in loss.state.items() if n not in (site, PROBE)}
        own = {k.split("|state|")[1]: v for k, v in record.items() if k.startswith(f"{site}|{name}|state|")}
        found = trial(other, pair, known | ({site: own} if own else {}))
        record = learn(record, site, name, None if found is None else found[0], other.evaluations)
        new = {} if found is None else found[1].get(site, {})
        record |= {f"{site}|{name}|state|{k}": v for k, v in new.items()}
    loss.state = {**loss.state, PROBE: record}
    for site, names in sites.items():
        _keep(loss, plan, site, best(record, site, names))


def _trial(loss: Any, plan: Plan, key: tuple, site: str, name: str) -> Any:
    """Return a loss that has another estimator at one site."""
    chosen = {**loss.resolved, site: create("estimator", name)}
    other = loss.trials.get((site, name, *key))
    if other is None or other.resolver.by_site != chosen:
        other = loss.fresh()
        other.is_trial = True
        other.resolver.by_site, other.resolver.policy = chosen, POLICIES["auto"]
        other.resolver.summable = dict.fromkeys(chosen, False)
        other.plans = {key: Plan(plan.vectorize, plan.nesting, splits=False, depends=plan.depends)}
        remember(loss.trials, (site, name, *key), other, limit=64)
    return other


def _keep(loss: Any, plan: Plan, site: str, name: str | None) -> None:
    """Let a site have the estimator that was found best, with the state of its trials."""
    estimator, row = None if name is None else create("estimator", name), loss.resolver.table.get(site)
    if row is not None and estimator is None and row.why == KEPT:  # an earlier state was loaded
        del loss.resolver.table[site]
        plan.sites = ()
    if row is None or estimator is None:
        return
    if row.estimator == estimator:
        loss.resolver.table[site] = replace(row, why=KEPT)
        return
    loss.resolver.table[site] = replace(row, estimator=estimator, why=KEPT, cost=loss.num_particles)
    record = loss.state[PROBE]
    own = {k.split("|state|")[1]: v for k, v in record.items() if k.startswith(f"{site}|{name}|state|")}
    loss.state = {n: t for n, t in loss.state.items() if n != site} | ({site: own} if own else {})
    plan.sites, plan.splits = (), False
    logger.info("site %r: %s (%s)", site, estimator, KEPT)
