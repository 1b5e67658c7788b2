r"""`auto`'s choices on every problem are a committed table, `auto_choices.json`; a changed cell fails.

``python tests/test_auto.py`` writes it anew.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_emvae import MonteCarloELBO
from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import entries
from pyro_emvae.estimators import Estimator, Full
from pyro_emvae.objectives import MultiSample
from pyro_emvae.particles import quiet
from pyro_emvae.problems import Problem

TABLE = Path(__file__).with_name("auto_choices.json")
COUNTS = (1, 2, 8)


def problems() -> list[Problem]:
    made = [entry.factory() for entry in entries("problem")]
    return [problem for problem in made if not problem.traits.needs]


def objectives() -> list[str]:
    """The objectives whose names alone make one."""
    return [entry.name for entry in entries("objective") if not entry.traits.arguments]


def choices(problem: Problem, num_particles: int, objective: str) -> str:
    """Return the estimator of each site; or which error the objective raises."""
    pyro.clear_param_store()
    loss = MonteCarloELBO(num_particles, problem.max_plate_nesting, objective=objective)
    try:
        with quiet(seed=0):
            loss.loss(problem.model, problem.guide, *problem.args)
    except EmvaeError as error:
        return type(error).__name__
    return ", ".join(f"{row.site} {spelled(row.estimator)}" for row in loss.table)


def spelled(estimator: Estimator) -> str:
    """The class, and the entropy where it is not the full one: ``Pathwise+Analytic``."""
    entropy = getattr(estimator, "entropy", Full())
    return "+".join(type(part).__name__ for part in (estimator, entropy) if part != Full())


def generate() -> dict[str, str]:
    return {
        f"{problem.name}, {objective}, {count} particles": choices(problem, count, objective)
        for problem in problems()
        for objective in objectives()
        for count in COUNTS
    }


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return generate()


def test_no_choice_of_auto_changes_silently(generated):
    committed = json.loads(TABLE.read_text())
    changed = {k: (committed.get(k), v) for k, v in generated.items() if committed.get(k) != v}
    gone = set(committed) - set(generated)
    assert not changed and not gone, f"committed and found: {changed}; no longer there: {gone}"


def test_auto_is_never_biased():
    biased = {
        type(e.factory()).__name__ for e in entries("estimator") if not e.traits.unbiased and not e.traits.arguments
    }
    chosen = set(" ".join(json.loads(TABLE.read_text()).values()).replace(",", "").split())
    assert not {name.split("+")[0] for name in chosen} & biased
    assert {"Enumerated", "Pathwise", "Pathwise+Analytic"} <= chosen


def test_the_kl_is_integrated_for_the_sampled_elbo_alone():
    for key, cell in json.loads(TABLE.read_text()).items():
        assert key.split(", ")[1] == "elbo" or "Analytic" not in cell, key


def test_sums_are_only_for_sums_of_terms():
    several = {e.name for e in entries("objective") if e.name in objectives() and isinstance(e.factory(), MultiSample)}
    assert several
    for key, cell in json.loads(TABLE.read_text()).items():
        if key.split(", ")[1] in several:
            assert "Enumerated" not in cell, key


def chain(length: int):
    def model() -> None:
        z = torch.tensor(0.0)
        for t in range(length):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=0.5 * z))

    def guide() -> None:
        z = torch.tensor(0.0)
        for t in range(length):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=0.3 * z))

    return model, guide


@pytest.mark.parametrize(("length", "summed"), [(6, True), (7, False)])
def test_the_budget_is_64_outcomes_that_meet(length, summed):
    model, guide = chain(length)
    loss = MonteCarloELBO(2, 0, vectorize_particles=True)
    loss.loss(model, guide)
    assert {type(e).__name__ == "Enumerated" for e in loss.resolved.values()} == {summed}


def test_the_table_is_logged_once_with_its_cost(caplog):
    model, guide = chain(2)
    loss = MonteCarloELBO(2, 0, vectorize_particles=True)
    with caplog.at_level(logging.INFO, logger="pyro_emvae"):
        for _ in range(3):
            loss.loss(model, guide)
    (record,) = [r for r in caplog.records if "estimators per guide site" in r.message]
    assert "z1: Enumerated() (its 2 outcomes are summed exactly: right at each and cheap; cost 4)" in record.message
    assert [row.cost for row in loss.table] == [4, 4]


def test_what_auto_looks_at_changes_nothing():
    """Generators are where they would be, and the buffers too."""
    model, guide = chain(3)
    pyro.set_rng_seed(0)
    MonteCarloELBO(2, 0, vectorize_particles=True).loss(model, guide)
    state = torch.get_rng_state()
    pyro.set_rng_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # all is summed, and nothing drawn


if __name__ == "__main__":
    TABLE.write_text(json.dumps(generate(), indent=1) + "\n")
    sys.stdout.write(f"{TABLE}\n")
