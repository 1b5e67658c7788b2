r"""From derivatives of a log joint to a Gaussian: one Newton step where it is quadratic, many to a mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import StepError, fail
from ._coordinates import Point, fixed_normal
from ._log_joint import LogJoint, Run
from ._precision import Coupled, Factor, NotPositive, Precision, check_blocks, precision
from .gaussian import GaussianPosterior

__all__ = ["find_mode", "solve_quadratic"]

FAR = 100.0  # posterior standard deviations
MOVES = 3


@torch.enable_grad()
def solve_quadratic(
    obj: str,
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    vectorize: dict[Callable, bool] | None = None,
    verify: bool = True,
) -> GaussianPosterior:
    r"""Return the posterior of a model whose log joint is quadratic in its latents.

    From $z_0$, with $\Lambda^{-1}=TT^\top$ and white gradients $w=T^\top\nabla f(z_0)$, the log joint at
    $z_1=z_0+T(w+\epsilon)$ for random $\epsilon$ has to have the white gradient $-\epsilon$ and the value
    $f(z_0)+\tfrac12|w|^2-\tfrac12|\epsilon|^2$. A $z_0$ that is far off is moved first.

    Args:
        obj: The half-step that asks, for its errors.
        model, args, kwargs: What is run.
        vectorize: See `GaussianPosterior`.
        verify: Whether that is verified, by a second run of the model. The numbers are the same without; far from the
            mode and in lower precision than float64 the second run is made all the same, for they are taken there.

    Raises:
        StepError: It is not quadratic, or its precision is not positive definite.
    """
    joint = LogJoint(obj, model, args, kwargs)
    return _in_blocks(joint, lambda joint: _solve(joint, vectorize, verify))


def _in_blocks(joint: LogJoint, solve: Callable[[LogJoint], GaussianPosterior]) -> GaussianPosterior:
    """Solve block by block, or all at once if the blocks turn out to depend on each other."""
    try:
        return solve(joint)
    except Coupled:
        return solve(joint.in_one_block())


def _solve(joint: LogJoint, vectorize: dict[Callable, bool] | None, verify: bool) -> GaussianPosterior:
    origin, before = joint.origin(), joint.log_p(joint.start).detach()
    gradient = joint.gradient(joint.start)
    curvature = precision(joint, joint.start, gradient)
    gradient = gradient.detach()
    joint.release()
    try:
        factor = curvature.factor()
    except NotPositive as found:
        _check_at(joint, origin, curvature)
        found.refuse(joint, "a Gaussian has a positive definite precision", "Use a proper prior, or steps.Laplace().")
    found_here = _step_to_the_mode(joint, origin, before, factor, gradient)
    if found_here is not None and not verify:
        return GaussianPosterior(joint, found_here[0], factor, found_here[1], vectorize=vectorize)
    white = factor.whiten(gradient)
    if bool(_largest(white) > FAR):
        origin, before, white = _nearer(joint, factor, origin, white)
    noise = fixed_normal(white, seed=0).times(2.0)
    there = origin + factor.color(white + noise)
    run = joint.at(there)
    found = factor.whiten(joint.gradient(run, twice=False))
    log_p = joint.log_p(run).detach() + _half_square(joint, noise)
    before = before + _half_square(joint, white)
    misses = {
        "gradient": (_largest(found + noise), _largest(white).clamp_min(1.0), "per posterior standard deviation"),
        "value": ((log_p - before).sum().abs(), (log_p.abs() + before.abs()).sum(), "nats"),
    }
    for what, (miss, size, unit) in misses.items():
        tolerance = size * torch.finfo(white.local.dtype).eps ** 0.5
        if not bool(miss <= tolerance):
            _check_at(joint, origin, curvature)
            fail(
                StepError,
                joint.obj,
                f"integrate {', '.join(map(repr, joint.latents))} out",
                got=f"a log joint whose {what} misses a quadratic by {float(miss):.3g} {unit} "
                f"(tolerance {float(tolerance):.1g})",
                because="the posterior is Gaussian only where the log joint is quadratic in the latents",
                fix="Use steps.Laplace(), steps.MonteCarlo() or a guide.",
            )
    mean, log_p = found_here or (there + factor.color(found), log_p)
    return GaussianPosterior(joint, mean, factor, log_p, vectorize=vectorize)


def _step_to_the_mode(
    joint: LogJoint, origin: Point, before: Tensor, factor: Factor, gradient: Point
) -> tuple[Point, Tensor] | None:
    """Return the mode of a quadratic and log p there by one Newton step; None if rounding would show in log p."""
    white = factor.whiten(gradient)
    if white.local.dtype != torch.float64 or not bool(_largest(white) <= FAR):
        return None
    return origin + factor.color(white), before + _half_square(joint, white)


def _nearer(joint: LogJoint, factor: Factor, origin: Point, white: Point) -> tuple[Point, Tensor, Point]:
    """Return an origin at the mode as the factor has it, for far from it the differences of log p are lost in its
    rounding; with log p and the white gradient there."""
    for _ in range(MOVES):
        origin = origin + factor.color(white)
        run = joint.at(origin)
        log_p, white = joint.log_p(run).detach(), factor.whiten(joint.gradient(run, twice=False))
        if bool(_largest(white) <= FAR):
            break
    return origin, log_p, white


def _check_at(joint: LogJoint, point: Point, found: Precision) -> None:
    """Raise `Coupled` if it is the arrangement in blocks that does not fit."""
    run = joint.at(point)
    check_blocks(joint, run, joint.gradient(run), found)


# Mode ---------------------------------------------------------------------------------------------------------------


@torch.enable_grad()
def find_mode(
    obj: str,
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    max_iter: int = 50,
    tol: float = 1e-10,
    start: Callable[[LogJoint], Point | None] = lambda joint: None,
    prepare: Callable[[LogJoint], LogJoint] = lambda joint: joint,
    vectorize: dict[Callable, bool] | None = None,
) -> GaussianPosterior:
    r"""Return the Gaussian at the mode of a log joint, in unconstrained coordinates, by damped Newton steps.

    Each block has a step size of its own, halved until its log joint rises; with common latents there is one for all.

    Args:
        obj: The half-step that asks, for its errors.
        model, args, kwargs: What is run.
        max_iter: Newton steps.
        tol: Nats per block that the last step may promise; at least what rounding lets one see.
        start: Where to begin, or None for zeros.
        prepare: What is done to the log joint before the first step, such as arranging it in other blocks.
        vectorize: See `GaussianPosterior`.

    Raises:
        StepError: The Hessian at the end is not negative definite.
    """
    joint = LogJoint(obj, model, args, kwargs, constrained=True)

    def climb(joint: LogJoint) -> GaussianPosterior:
        joint = prepare(joint)
        return _climb(joint, start(joint), max_iter, tol, vectorize)

    return _in_blocks(joint, climb)


def _climb(
    joint: LogJoint, at: Point | None, max_iter: int, tol: float, vectorize: dict[Callable, bool] | None
) -> GaussianPosterior:
    run = joint.start if at is None else joint.at(at)
    at = joint.origin() if at is None else at
    for count in range(max_iter + 1):
        gradient = joint.gradient(run)
        curvature = precision(joint, run, gradient)
        factor = curvature.factor(repair=True)
        white = factor.whiten(gradient.detach())
        rise = _half_square(joint, white)
        visible = 8 * torch.finfo(rise.dtype).eps * joint.log_p(run).detach().abs()
        done = count == max_iter or bool((rise <= visible.clamp_min(tol)).all())
        if count == 0 or done:
            check_blocks(joint, run, gradient, curvature)
        if done:
            break
        at, run = _search(joint, at, run, factor.color(white), rise)
    if bool((rise > visible.clamp_min(tol)).any()):
        warnings.warn(
            f"{joint.obj} stopped after max_iter={max_iter} steps: one more promises {float(rise.max()):.2g} nats for "
            f"a datum, tol={tol:g}.",
            stacklevel=2,
        )
    try:
        factor = curvature.factor()
    except NotPositive as found:
        found.refuse(
            joint, "a mode needs a negative definite Hessian of log p", "Use a proper prior, or steps.MonteCarlo()."
        )
    log_p = joint.log_p(run).detach() + rise
    return GaussianPosterior(joint, at + factor.color(white), factor, log_p, is_exact=False, vectorize=vectorize)


def _half_square(joint: LogJoint, white: Point) -> Tensor:
    """Return what a full Newton step promises, in nats, from the whitened gradient: as `LogJoint.log_p`."""
    local = white.local.square() @ white.local.new_full(white.local.shape[-1:], 0.5)
    return local if joint.separable else (local.sum() + 0.5 * white.common.square().sum()).reshape(1)


def _search(joint: LogJoint, at: Point, run: Run, step: Point, rise: Tensor) -> tuple[Point, Run]:
    """Halve the step, block by block, until the log joint rises."""
    before = joint.log_p(run).detach()
    slack = 8 * torch.finfo(before.dtype).eps * before.abs()
    size = torch.ones_like(before)
    for _ in range(60):
        trial = at + step.times(size)
        run = joint.at(trial)
        found = joint.log_p(run).detach()
        low = ~(found >= before + 1e-4 * size * rise - slack)
        if not bool(low.any()):
            break
        size = torch.where(low, size / 2, size)
    return trial, run


def _largest(point: Point) -> Tensor:
    parts = [part.detach().abs().max() for part in point if part.numel()]
    return torch.stack(parts).max() if parts else torch.zeros(())
