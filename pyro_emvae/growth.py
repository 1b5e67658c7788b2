r"""Monte Carlo EM that draws as much as each step needs: the ascent test of Caffo, Jank and Jones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import StepError, fail
from .convergence import Ascent, Verdict
from .engine import Engine
from .history import Record
from .posterior import SamplesPosterior, complete_data
from .steps import Phase

__all__ = ["check_growth", "grown", "measured_gain"]


def grown(
    engine: Engine,
    iterate: Callable[..., tuple[Record, SamplesPosterior]],
    key: str,
    rule: Ascent,
    args: tuple,
    kwargs: Mapping[str, Any],
    **options: Any,
) -> Record:
    r"""Make one iteration that went up, with more draws if it takes more to know.

    After the M-step, $\Delta Q=Q(\theta_{t+1}|\theta_t)-Q(\theta_t|\theta_t)$ and its standard error are taken from the
    very draws of the E-step, and `rule` judges. ``"grow"``: theta is put back, and E and M are made again with more
    draws. Else the iteration stands; ``rule.patience`` verdicts ``"stop"`` in a row are convergence, and as many
    iterations that the most draws cannot decide are STALLED.

    Args:
        engine: What the iteration changes.
        iterate: Makes E and M once; returns the record, and the posterior that M was given.
        key: Of the E-step's own state, which holds the number of draws and what was said so far.
        rule: The test.
        args, kwargs: All data.
        options: Handed on to `iterate`.

    Source: Caffo, Jank and Jones 2005, section 3. Differs: draws are made anew, and not appended, so that a sample that
    was chosen for its verdict is not kept.
    """
    evaluations = 0
    while True:
        start = {name: leaf.detach().clone() for name, leaf in _theta(engine).items()}
        record, posterior = iterate(args, kwargs, **options)
        _refuse_batches(engine)
        evaluations += record.evaluations
        gain, error = measured_gain(engine, posterior, start)
        said, own = rule.judge(gain, error), engine.steps[key]
        size = int(own["size"])
        if said != "grow" or size >= rule.max_size:
            break
        _write(engine, start)
        engine.steps = engine.steps | {key: own | {"size": torch.tensor(min(rule.next_size(size), rule.max_size))}}
    counts = {"stop": "stops", "grow": "unclear"}
    new = {name: torch.tensor(int(own[name]) + 1 if counts.get(said) == name else 0) for name in counts.values()}
    engine.steps = engine.steps | {key: own | new}
    facts = {**record.facts, "ascent_gain": gain, "ascent_error": error}
    verdict = _verdict(rule, new, gain / engine.parameters.num_data, error / engine.parameters.num_data)
    return dataclasses.replace(record, evaluations=evaluations, facts=facts, verdict=verdict)


def _verdict(rule: Ascent, counts: Mapping[str, Tensor], gain: float, error: float) -> Verdict:
    text = f"gain {gain:.2g} with standard error {error:.2g} nats per datum"
    known = {"remaining": gain, "error": error}
    if int(counts["stops"]) >= rule.patience:
        return Verdict("CONVERGED", **known, reason=f"{text}, below tol {rule.patience} times in a row")
    if int(counts["unclear"]) >= rule.patience:
        return Verdict("STALLED", **known, reason=f"{text}, which {rule.max_size} draws do not decide")
    return Verdict(**known, reason=text)


@torch.no_grad()
def measured_gain(engine: Engine, posterior: SamplesPosterior, start: Mapping[str, Tensor]) -> tuple[float, float]:
    r"""Return $\Delta Q$ from `start` to the present theta on a posterior's draws, and its standard error; nats.

    With weights $w_{sn}$ and $\delta_{sn}=\log p_{\theta_{t+1}}(x_n,z_{sn})-\log p_{\theta_t}(x_n,z_{sn})$,

    $$\Delta Q=\sum_n\bar\delta_n,\qquad\bar\delta_n=\sum_sw_{sn}\delta_{sn},\qquad
      s^2=\sum_n\frac G{G-1}\sum_{g}\Big(\sum_{s\in g}w_{sn}(\delta_{sn}-\bar\delta_n)\Big)^2,$$

    for data are independent given theta, and so are groups g of draws: single ones where each was drawn by itself, the
    chains that began as one where chains were split to have more, batches of neighbours in a single chain. Where few
    draws have all the weight (a large khat) that error is too small, as every error from weights is.
    """
    now = {name: leaf.detach().clone() for name, leaf in _theta(engine).items()}
    after = complete_data(posterior)
    _write(engine, start)
    before = complete_data(posterior)
    _write(engine, now)
    delta, weights = (after.log_p - before.log_p).double(), after.weights.double()
    mean = (weights * delta).sum(0)
    deviations = weights * (delta - mean)
    groups = posterior.groups
    if groups is not None:
        number = int(groups.max()) + 1
        deviations = deviations.new_zeros(number, deviations.shape[1]).index_add_(
            0, groups.to(delta.device), deviations
        )
    count = len(deviations)
    variance = deviations.square().sum() * count / (count - 1) if count > 1 else math.inf
    return float(mean.sum() + after.rest - before.rest), math.sqrt(float(variance))


def check_growth(phases: tuple[Phase, ...]) -> None:
    """Raise if a number of draws that grows is wanted where the test says nothing."""
    for phase in phases:
        if phase.slot == "M" and not (phase.step.traits.exact or phase.step.traits.monotone):
            fail(
                StepError,
                "MonteCarlo",
                "let its number of draws grow",
                got=f"the M-step {phase.step!r}",
                because="it may lower the expected log joint by itself, which no number of draws would mend",
                fix="Write m_step=steps.ClosedForm(...) or steps.LBFGS(), or leave growth= out.",
            )


def _refuse_batches(engine: Engine) -> None:
    if engine.parameters.subsampled:
        fail(
            StepError,
            "MonteCarlo",
            "let its number of draws grow",
            got="a minibatch",
            because="whether an iteration went up is judged on all data",
            fix="Give all data, or leave growth= out and write m_step=steps.Averaged(...).",
        )


def _theta(engine: Engine) -> dict[str, Tensor]:
    engine.refresh()
    parameters = engine.parameters
    return {} if parameters is None else parameters.leaves(*parameters.theta)


def _write(engine: Engine, values: Mapping[str, Tensor]) -> None:
    live = _theta(engine)
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
