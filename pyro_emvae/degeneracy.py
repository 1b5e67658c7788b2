r"""Whether a run ended on a spike of the likelihood in place of a maximum, or an update leads to one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

from ._checks import DegenerateError, EmvaeError, ModelError, fail
from .parameters import Parameters, Row, assign

__all__ = ["check_boundary", "spike"]

NARROW = 3e-2
RISE = 0.25
CANDIDATES = 16


def spike(parameters: Parameters, expected: Callable[[], Tensor]) -> str:
    r"""Return what says that theta is on a spike: an unbounded likelihood, cut off by rounding or a floor; else "".

    The density of a component that holds fewer data than it has dimensions grows without bound as its scale shrinks:
    each halving of $\sigma$ raises the log likelihood of n data on it by $n\log2$. At a maximum a halving lowers it, by
    0.8 nats per datum of the component. Where a scale or a rate goes to a boundary of finite likelihood, as a variance
    component or a Poisson rate does, it changes nothing. So a scale below 3/100 of the largest in its place, or of its
    own coordinate's spread, is tried: it is a spike if half of it were better by more than 1/4 nat.

    Small weights say nothing: without a component the likelihood is finite, and rows of zeros are the rule in sparse
    transitions. Nor does a jump of the objective: EM leaves saddles by jumps.

    Args:
        parameters: Of which theta is looked at: positive ones, and the diagonals of Cholesky factors.
        expected: Returns the expected log joint at the present theta, the posterior held, to be differentiated by it;
            called where a scale is that small only.

    Source: Kiefer and Wolfowitz 1956 for the spikes; Hathaway 1985 for ratios of scales. The trial is ours.

    Example:
        >>> leaf = torch.tensor([0.0, -20.0], requires_grad=True)
        >>> theta = Parameters((Row("scale", leaf, "model", "", constraints.positive),))
        >>> spike(theta, lambda: -leaf.sum())
        "scale 2.1e-09 of the largest in 'scale', and half of it is better by 0.69 nats"
        >>> spike(theta, lambda: (-leaf.exp()).sum())
        ''
    """
    rows = {row.name: row for row in parameters.rows if row.block in parameters.theta}
    found = {name: ratios for name, row in rows.items() if (ratios := _ratios(row)) is not None}
    narrow = [name for name, ratios in found.items() if bool((ratios < NARROW).any())]
    if not narrow:
        return ""
    with torch.enable_grad():
        base = expected()
        slopes = torch.autograd.grad(base, [rows[name].leaf for name in narrow], materialize_grads=True)
    tries = []
    for name, slope in zip(narrow, slopes, strict=True):
        ratios = found[name]
        steep = (ratios < NARROW) & ~(_scales(slope, ratios) >= -RISE)  # NaN where a square of the scale underflows
        tries += [(float(ratios[tuple(place)]), name, tuple(place)) for place in steep.nonzero().tolist()]
    for ratio, name, place in sorted(tries)[:CANDIDATES]:
        rise = _halved(rows[name].leaf, place, expected) - float(base.detach())
        if rise > RISE:
            return f"scale {ratio:.2g} of the largest in {name!r}, and half of it is better by {rise:.2g} nats"
    return ""


def check_boundary(parameters: Parameters, error: DegenerateError, expected: Callable[[], Tensor]) -> None:
    r"""Raise unless the expected log joint rises, or at least does not fall, on the way to values at a boundary.

    A component on a single datum has a best scale of 0, and so has a rate of zeros alone. A scale of 0 where data vary
    is no maximum of anything, but a mistake of the update. The way is $\theta'+\epsilon(\theta-\theta')$ from the
    present $\theta$ to the new values $\theta'$, and is looked at from $\epsilon=u^{0.2}$ to a quarter of that, u the
    rounding unit: not nearer, where rounding of locations is as large as scales. Where nothing can be evaluated,
    nothing is said.

    Args:
        parameters: At the present values, and again so afterwards.
        error: What `parameters.assign` raised; without ``values`` nothing is said. Values that are not finite, such
            as the mean of a component without data, are left at the present ones.
        expected: Returns the expected log joint at the parameters, the posterior held.

    Raises:
        ModelError: It falls.
    """
    rows = {row.name: row for row in parameters.rows if row.name in (error.values or {})}
    ends = {name: torch.as_tensor(error.values[name]).detach().to(row.leaf) for name, row in rows.items()}
    ends = {name: end for name, end in ends.items() if bool(torch.isfinite(end).all())}
    if not ends:
        return
    start = {name: rows[name].leaf.detach().clone() for name in ends}
    legs = {name: rows[name].value.detach() - end for name, end in ends.items()}
    unit, found = max(torch.finfo(leaf.dtype).eps for leaf in start.values()), []
    try:
        with torch.no_grad():
            for part in (unit**0.2, unit**0.2 / 4):
                assign(parameters, {name: end + part * legs[name] for name, end in ends.items()})
                found.append(float(expected()))
    except EmvaeError:
        return
    finally:
        with torch.no_grad():
            for name, leaf in start.items():
                rows[name].leaf.copy_(leaf)
    if found[1] < found[0] - 100 * unit * max(abs(found[0]), parameters.num_data):
        fail(
            ModelError,
            "EM",
            f"write parameter {error.parameter!r}",
            got=error.got,
            because=f"on the way there the expected log joint falls, at last from {found[0]:.4g} to {found[1]:.4g} "
            "nats, so that it is no maximum",
            fix="Let the update return the maximum, inside the constraint.",
            cause=error,
        )


@torch.no_grad()
def _halved(leaf: Tensor, place: tuple[int, ...], expected: Callable[[], Tensor]) -> float:
    """Return the expected log joint with one scale halved; the leaf is as before."""
    before = leaf.clone()
    try:
        leaf[place if len(place) == leaf.dim() else (*place, place[-1])] -= math.log(2.0)
        return float(expected())
    finally:
        leaf.copy_(before)


def _scales(leaf: Tensor, ratios: Tensor) -> Tensor:
    """Return what belongs to the scales of a leaf: all of it, or the diagonal of its matrices."""
    return leaf if leaf.dim() == ratios.dim() else leaf.diagonal(dim1=-2, dim2=-1)


@torch.no_grad()
def _ratios(row: Row) -> Tensor | None:
    """Return scales over the largest one in their place: ``(K, ...)``, of Cholesky factors ``(K, D)``; else None."""
    kind, value = str(row.constraint), row.value.detach()
    if kind.endswith(("LowerCholesky()", "PositiveDefinite()")):
        tril = value if kind.endswith("LowerCholesky()") else torch.linalg.cholesky_ex(value)[0]
        spread = tril.square().sum(-1).sqrt()
        largest = spread.reshape(-1, spread.shape[-1]).amax(0)
        return tril.diagonal(dim1=-2, dim2=-1) / largest
    is_positive = isinstance(row.constraint, constraints.greater_than) and row.constraint.lower_bound == 0
    if not is_positive or not value.dim() or value.numel() < 2:
        return None
    return value / value.amax(0, keepdim=True)
