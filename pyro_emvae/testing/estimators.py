r"""`check_estimator`: an estimator against every problem whose gradient is known exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, fail
from .._registry import create, entries, lookup
from ..estimators.base import Estimator
from ..loss import States
from ..objectives import MultiSample
from ..particles import quiet
from ..problems import Problem, exact_gradients
from .cubature import Mean, exact_mean
from .mean import Underpowered, assert_mean, coordinate, needed
from .replay import Expectation, Replay, branches, fitting_sites, record

__all__ = ["Checked", "check_estimator"]

MANY = 1000  # particles per draw where the guide's own sampler is used


@dataclass(frozen=True)
class Checked:
    """What was checked: the problem, K, and how the mean was judged, from how many outcomes or draws."""

    problem: str
    num_particles: int
    how: str
    outcomes: int


def check_estimator(
    estimator: Any,
    *,
    problems: Iterable[str | Problem] | None = None,
    num_particles: Iterable[int] | None = None,
    objective: Any = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    max_samples: int = 64_000,
    strict: bool | None = None,
    seed: int = 0,
) -> tuple[Checked, ...]:
    r"""Prove an estimator: its mean is the exact gradient, its state is explicit, its traits hold.

    On every problem with an exact ELBO and a site that it fits, with the least number of particles and with four:

    * the mean gradient over *all* outcomes (finite sites, minibatches, normal noise) is the exact one to 1e-10; where
      that is out of reach, independent gradients have the exact mean, with power to find a tenth; with state also
      after three steps; ``traits.unbiased=False`` leaves this out;
    * evaluating twice gives the same gradient and state, the given state is not changed, its shapes stay; an estimator
      that has state says so;
    * the recorded gradient is the eager one (``recordable``, on the first problem), and float32 gives float64's numbers
      on the same draws.

    That takes about half a minute for an estimator that fits all registered problems; with ``problems=["bernoulli"]``,
    a second.

    Args:
        estimator: A registered name or an instance.
        problems: Names or instances; by default all registered ones.
        num_particles: The numbers of particles.
        objective: A registered objective or an instance; by default the ELBO, or IWAE if the estimator is not made for
            that. For one of several particles, the exact gradient is that of its mean over all outcomes; where it is
            out of reach, the estimator has to have the mean of the pathwise and score-function gradients on the same
            draws. Problems with a latent outside of a plate that subsamples are left out then.
        dtypes: The mean is judged in the first, the others against it; problems given as instances keep theirs.
        max_samples: The most draws of a statistical test.
        strict: Whether it is an error if these do not suffice (else the row says ``"underpowered"``), or if a problem
            has no exact ELBO; by default for problems that were asked for.
        seed: Of all draws.

    Returns:
        What was checked.

    Raises:
        AssertionError: With the estimator, the problem, the coordinate, what was observed and what was expected.
        Underpowered: See `strict`.

    Example:
        >>> check_estimator("leave_one_out", problems=["bernoulli"], num_particles=[2])
        (Checked(problem='bernoulli', num_particles=2, how='enumeration', outcomes=64),)
    """
    part: Estimator = create("estimator", estimator)
    least, objective = part.traits.min_particles, objective_for(part) if objective is None else objective
    several = isinstance(create("objective", objective), MultiSample)
    counts = sorted({least, max(4, least)}) if num_particles is None else list(num_particles)
    given = [e.name for e in entries("problem")] if problems is None else list(problems)
    strict = problems is not None if strict is None else strict
    rows = []
    for name in given:
        problem = _build(name, dtypes[0], strict)
        fitting = [] if problem is None else [c for c in counts if fitting_sites(problem, part, c, objective)]
        if several and problem is not None and problem.traits.subsampled and not problem.traits.local:
            continue  # one weight for all data is no bound
        for count in fitting:
            replay = Replay(problem, part, count, objective=objective)
            where = f"{part} on problem {problem.name!r} with {count} particles"
            _check_state(replay, part, where)
            others = dtypes[1:] if isinstance(name, str) else ()
            same = [Replay(_build(name, d, strict=True), part, count, objective=objective) for d in others]
            _check_draws(replay, same, where)
            if not rows and part.traits.recordable:
                _check_recording(Replay(problem, part, max(2, count), objective=objective), where)
            if not part.traits.unbiased:
                rows.append(Checked(problem.name, count, "biased", 0))
            else:
                rows.append(_check_mean(replay, part, where, max_samples, seed, strict))
                if part.traits.stateful and count == fitting[0]:
                    later = Replay(problem, part, count, _later_state(replay), objective)
                    _check_mean(later, part, f"{where} and the state of three steps", max_samples, seed, strict=False)
    assert rows, f"{part} fits no site of the problems {[str(p) for p in given]}: its traits are {part.traits}"
    return tuple(rows)


def objective_for(part: Estimator) -> str:
    """Return the objective that an estimator is judged with."""
    return "elbo" if {"elbo", "any"} & set(part.traits.objectives) else "iwae"


def _build(problem: str | Problem, dtype: torch.dtype, strict: bool) -> Problem | None:
    """Make a problem; None if it was not asked for and has no exact ELBO or needs a package."""
    if isinstance(problem, Problem):
        return problem
    try:
        made = lookup("problem", problem).factory(dtype=dtype)
    except EmvaeError:
        if strict:
            raise
        return None
    return made if strict or (made.elbo is not None and not made.traits.needs) else None


def _check_mean(replay: Replay, part: Estimator, where: str, max_samples: int, seed: int, strict: bool) -> Checked:
    problem, objective = replay.problem, replay.loss.objective
    if isinstance(objective, MultiSample):
        exact = exact_mean(Expectation(problem, replay.num_particles, objective))
        if exact is None:
            return _check_pairs(replay, where, max_samples, seed, strict)
        expected = exact.gradients
    else:
        expected = exact_gradients(problem)
    found = exact_mean(replay)
    if found is None:
        return _check_samples(replay, part, expected, where, max_samples, seed, strict)
    _assert_equal(found, expected, where)
    return Checked(problem.name, replay.num_particles, found.how, found.outcomes)


def _assert_equal(found: Mean, expected: Mapping[str, Tensor], where: str) -> None:
    scale = max(1.0, *(float(g.abs().max()) for g in expected.values()))
    for name, target in expected.items():
        mean = found.gradients[name]
        i = int((mean - target).abs().argmax())
        observed, right = float(mean.flatten()[i]), float(target.flatten()[i])
        assert abs(observed - right) <= 1e-10 * scale, (
            f"{where}: the mean gradient of {name!r}{coordinate(i, target.shape)} over all {found.outcomes} outcomes: "
            f"observed {observed:.12g}, expected {right:.12g}"
        )


def _check_samples(
    replay: Replay,
    part: Estimator,
    expected: Mapping[str, Tensor],
    where: str,
    max_samples: int,
    seed: int,
    strict: bool,
) -> Checked:
    """Test the mean of independent gradients; of many particles each where the guide draws for itself."""
    if replay.own_draws:
        replay = Replay(replay.problem, part, max(MANY, replay.num_particles), replay.state)
    pilot, most = (64, max_samples // MANY * 8) if replay.own_draws else (2000, max_samples)
    detect = 0.1 * max(float(g.abs().max()) for g in expected.values())
    samples = _samples(replay, pilot, seed)
    least = 256 if replay.own_draws else pilot  # of 64, the skewness that a normal mean is judged by is too noisy
    count = max(least, int(1.3 * max(needed(x, detect) for x in samples.values())))
    if count > most:
        return _underpowered(replay, where, count, pilot, max_samples, strict)
    for name, x in _samples(replay, count, seed + 1).items():
        alpha = 1e-6 / len(expected)
        assert_mean(x, expected[name], detect=1.5 * detect, alpha=alpha, what=f"{where}: gradient of {name!r}")
    return Checked(replay.problem.name, replay.num_particles, "statistics", count)


def _check_pairs(replay: Replay, where: str, max_samples: int, seed: int, strict: bool) -> Checked:
    """Test the mean difference to the pathwise and score-function gradients on the same draws."""
    problem, objective = replay.problem, replay.loss.objective
    plain = Replay(problem, dict.fromkeys(problem.sites, "pyro"), replay.num_particles, objective=objective)

    def differences(count: int, seed: int) -> tuple[dict[str, Tensor], float]:
        right, found = (_samples(r, count, seed) for r in (plain, replay))
        largest = max(float(x.mean(0).abs().max()) for x in right.values())
        rows = {n: x - right[n] for n, x in found.items()}
        return {n: x for n, x in rows.items() if float(x.abs().max()) > 1e-9 * largest}, largest

    pilot, most = (64, max_samples // MANY * 8) if replay.own_draws else (2000, max_samples)
    rows, largest = differences(pilot, seed)
    count = max(pilot, int(2 * max([needed(x, 0.15 * largest) for x in rows.values()] or [0])))
    if count > most:
        return _underpowered(replay, where, count, pilot, max_samples, strict)
    rows, largest = differences(count, seed + 1)
    for name, x in rows.items():
        what = f"{where}: gradient of {name!r} less the plain one"
        try:
            assert_mean(x, torch.zeros_like(x[0]), detect=0.25 * largest, alpha=1e-6 / len(rows), what=what)
        except Underpowered:  # skew that the pilot did not show
            if strict:
                raise
            return Checked(problem.name, replay.num_particles, "underpowered", count)
    return Checked(problem.name, replay.num_particles, "statistics", count)


def _underpowered(replay: Replay, where: str, count: int, pilot: int, max_samples: int, strict: bool) -> Checked:
    if strict:
        fail(
            Underpowered,
            "check_estimator",
            f"judge the mean gradient of {where}",
            got=f"{count} draws needed, and max_samples={max_samples}",
            because="a deviation of a tenth of the largest gradient has to be found",
            fix="Give a smaller problem, or a larger max_samples.",
        )
    return Checked(replay.problem.name, replay.num_particles, "underpowered", pilot)


def _samples(replay: Replay, count: int, seed: int) -> dict[str, Tensor]:
    if not replay.own_draws:
        return replay.gradients(replay.draws(count, seed))[0]
    with quiet(seed=seed, validate=False):
        rows = [replay.gradient(replay.evaluate({})) for _ in range(count)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _later_state(replay: Replay) -> States:
    state: States = replay.state
    controls = any(row.estimator.traits.controls for row in replay.loss.table)
    for step in range(20 if controls else 3):  # the coefficients of controls are zero at first
        with quiet(seed=step, validate=False):
            state = replay.evaluate({}, state).state
    return state


def _check_state(replay: Replay, part: Estimator, where: str) -> None:
    """State is explicit: the same in, the same out; nothing given is changed; shapes stay; the trait says if any."""
    state = _later_state(replay)
    before = {site: {k: v.clone() for k, v in tensors.items()} for site, tensors in state.items()}
    results = []
    for _ in range(2):
        with quiet(seed=11, validate=False):
            evaluation = replay.evaluate({}, state)
        results.append((replay.gradient(evaluation), evaluation.state))
    (one, first), (two, second) = results
    assert _same(state, before), f"{where}: evaluating changed the given state from {before} to {state}"
    assert _same(one, two), f"{where}: two evaluations with the same state and seed give {one} and {two}"
    assert _same(first, second), f"{where}: the next state is {first}, then {second}, at the same seed"
    stateful = part.traits.stateful
    for site in (row.site for row in replay.loss.table if row.estimator is part):
        old, new = state.get(site, {}), first.get(site, {})
        assert bool(new) == stateful, f"{where}: traits.stateful is {stateful}, the state of site {site!r} is {new}"
        shapes = [{k: (tuple(v.shape), v.dtype) for k, v in tensors.items()} for tensors in (old, new)]
        assert shapes[0] == shapes[1], f"{where}: the state of site {site!r} changes from {shapes[0]} to {shapes[1]}"


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return torch.equal(one, two)


def _check_draws(replay: Replay, others: Iterable[Replay], where: str, count: int = 2) -> None:
    """The same draws give the same gradient: mapped or one by one, and in all dtypes."""
    if replay.own_draws:
        return
    count = count if replay.noise or replay.plates else 1  # nothing is random
    noise = replay.draws(count, index=True)
    mapped, _ = replay.gradients(noise)
    for i in range(count):
        exact = _eager(replay, noise, i)
        _assert_close({n: g[i] for n, g in mapped.items()}, exact, 1e-9, f"{where}: mapped over draws,")
        for other in others:
            found = _eager(other, other.draws(count, index=True), i)
            for name, g in found.items():
                assert g.dtype == other.dtype, (
                    f"{where}: the {other.dtype} parameter {name!r} gets a {g.dtype} gradient"
                )
            _assert_close(found, exact, 1e-3, f"{where}: in {other.dtype},")


def _check_recording(replay: Replay, where: str) -> None:
    """The trait `recordable` holds."""
    if replay.own_draws:
        return
    noise = replay.draws(1, index=True)
    row = [noise[name][0] for name in (*replay.noise, *replay.plates)]
    with quiet(seed=0, validate=False):
        try:
            _, *recorded = (t.detach() for t in record(replay.step, row)(*row))
        except RuntimeError as error:
            assert not branches(error), f"{where}: traits.recordable is True, recording it raises {error!r}"
            raise
    found = dict(zip(replay.leaves, recorded, strict=True))
    _assert_close(found, _eager(replay, noise, 0), 1e-9, f"{where}: recorded (traits.recordable),")


def _assert_close(found: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float, where: str) -> None:
    for name, g in right.items():
        error = float((found[name].to(g) - g).abs().max())
        assert error <= tolerance * (1 + float(g.abs().max())), (
            f"{where} the gradient of {name!r} is {found[name]}, expected {g} on the same draws"
        )


def _eager(replay: Replay, noise: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    with quiet(seed=0, validate=False):
        return replay.gradient(replay.evaluate({name: rows[row] for name, rows in noise.items()}))
