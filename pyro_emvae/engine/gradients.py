r"""The gradient of a loss, taken eagerly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer import TraceTailAdaptive_ELBO
from torch import Tensor

from .._checks import EmvaeError, NonFiniteError, fail
from ..evaluation import Evaluation
from ..loss import MonteCarloELBO, States, raise_non_finite
from ..parameters import capture, distinct, module_leaves

__all__ = ["Gradient", "descent", "gradient", "largest_change", "norm_of"]


class Gradient(NamedTuple):
    """The loss (nats), gradients of the loss by parameter name, their leaves, their norm, and the next loss state.

    ``met`` are all trainable leaves of the run, those of other blocks too.
    """

    loss: float
    grads: dict[str, Tensor]
    leaves: dict[str, Tensor]
    norm: float
    state: States | None = None
    met: tuple[Tensor, ...] = ()


def gradient(
    model: Callable,
    guide: Callable,
    loss: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    only: Mapping[str, Tensor] | None = None,
    loss_and_grads: Callable | None = None,
    beta: Tensor | None = None,
    rows: bool = False,
) -> Gradient:
    r"""Take the gradient of a loss eagerly; change nothing but buffers.

    Args:
        loss: Anything with ``evaluate``, as `MonteCarloELBO` has it, or with Pyro's ``loss_and_grads``.
        only: The leaves to differentiate (a block); all that were met by default.
        loss_and_grads: Called in place of ``loss.loss_and_grads``.
        beta: A factor of the latents' terms; see `MonteCarloELBO.evaluate`.
        rows: Leave sparse gradients as they are, for an update of the rows that they have.

    Raises:
        NonFiniteError: Loss or gradient is NaN or infinite; names the first site or parameter.
    """
    if not isinstance(loss, MonteCarloELBO):
        _refuse_annealing(loss, beta)
    if not hasattr(loss, "evaluate"):
        return _foreign(model, guide, loss, loss_and_grads or loss.loss_and_grads, args, kwargs, only, rows)
    if hasattr(loss, "revisit"):
        loss.revisit(model, guide, args, kwargs)
    evaluation = loss.evaluate(model, guide, args, kwargs, loss.state, *(() if beta is None else (beta,)))
    value = -float(evaluation.objective.detach())
    if not math.isfinite(value):
        raise_non_finite(type(loss).__name__, value, evaluation.particles)
    met = _met(evaluation.particles.params, model, guide)
    leaves = met if only is None else only
    found = descent(evaluation, leaves, rows)
    return Gradient(value, found, leaves, norm_of(found), evaluation.state, tuple(met.values()))


def _met(params: Mapping[str, Mapping[str, Tensor]], model: Callable, guide: Callable) -> dict[str, Tensor]:
    """Return the trainable leaves that a run met by name, and those of modules that Pyro was not told of."""
    leaves = distinct({n: p for side in params.values() for n, p in side.items() if p.requires_grad})
    extra = module_leaves(guide, model)
    if extra:
        known = {id(p) for p in leaves.values()}
        leaves.update({n if n not in leaves else f"{n}'": p for n, p in extra.items() if id(p) not in known})
    return leaves


def descent(evaluation: Evaluation, leaves: Mapping[str, Tensor], rows: bool = False) -> dict[str, Tensor]:
    """Return minus the derivatives of what an evaluation climbs by some leaves."""
    found = evaluation.descent(leaves)
    return found if rows else _dense(found)


def _dense(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.to_dense() if g.is_sparse else g for name, g in grads.items()}


def norm_of(grads: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all gradients, or raise naming the first parameter whose gradient is not finite."""
    if not grads:
        return 0.0
    parts = torch._foreach_norm([g.coalesce().values() if g.is_sparse else g for g in grads.values()])
    norm = float(torch.linalg.vector_norm(torch.stack(parts))) if len(parts) > 1 else float(parts[0])
    if not math.isfinite(norm):
        for name, g in grads.items():
            if not bool(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all()):
                fail(
                    NonFiniteError,
                    "gradient",
                    "use a gradient that is not finite",
                    got=f"a non-finite gradient of parameter {name!r}",
                    because="the objective was finite, its derivative is not",
                    fix="Look for sqrt, log or a division at zero on the way from that parameter to a site.",
                )
    return norm


def _refuse_annealing(loss: Any, beta: Tensor | None) -> None:
    """Refuse a factor with a loss that cannot have one; a posterior that is held was annealed by its E-step."""
    if beta is not None and not getattr(loss, "holds_posterior", False):
        fail(
            EmvaeError,
            "run",
            "anneal",
            got=f"loss {type(loss).__name__}",
            because="the factor multiplies the latents' terms inside the loss",
            fix='Write loss=MonteCarloELBO(), or MonteCarloELBO(estimator="pyro") for the gradients of Trace_ELBO.',
        )


def _foreign(model, guide, loss, loss_and_grads, args, kwargs, only, rows) -> Gradient:
    """Run someone else's ``loss_and_grads``, take the gradients it leaves, and put back what was there."""
    extra = module_leaves(guide, model)
    value, met, found = capture(lambda: loss_and_grads(model, guide, *args, **kwargs), extra | dict(only or {}))
    leaves = distinct(met) if only is None else dict(only)
    names = {id(p): n for n, p in leaves.items()}
    grads = {names[id(met[n])]: g for n, g in found.items() if id(met[n]) in names}
    grads = grads if rows else _dense(grads)
    value = value[0] if isinstance(value, tuple) else value
    value = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(value) and not isinstance(loss, TraceTailAdaptive_ELBO):  # which never computes its value
        fail(
            NonFiniteError,
            getattr(loss, "__name__", type(loss).__name__),
            "be minimised",
            got=f"loss {value}",
            because="every log density has to be finite",
            fix="Use loss=MonteCarloELBO(), which names the first site that is not finite.",
        )
    return Gradient(value, grads, leaves, norm_of(grads), met=tuple(met.values()))


def largest_change(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    r"""Return $\max_i\|x_i-y_i\|/\max(\|x_i\|,\sqrt{n_i})$ over tensors $x_i$ of $n_i$ elements before and $y_i$ after.

    Example:
        >>> largest_change([torch.zeros(4), torch.tensor([3.0, 4.0])], [torch.ones(4), torch.tensor([3.0, 3.0])])
        1.0
    """
    pairs = [(x, y) for x, y in zip(old, new, strict=True) if x.numel()]
    if not pairs:
        return 0.0
    before, after = map(list, zip(*pairs, strict=True))
    norms = (torch._foreach_norm(x) for x in (torch._foreach_sub(after, before), before))
    steps, sizes = map(torch.stack, norms)
    return float((steps / torch.maximum(sizes, sizes.new_tensor([math.sqrt(x.numel()) for x in before]))).max())
