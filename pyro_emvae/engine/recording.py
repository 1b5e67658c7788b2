r"""A gradient step as a graph of tensor operations: recorded twice, compared, run from Python.

The gradient is run once, with all of Pyro's handlers, on the very tensors that are the parameters, so that any use of
them, from wherever, is recorded; no parameter has to be substituted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .._checks import RecordingError, fail
from ..loss import MonteCarloELBO, States
from ..particles import quiet
from ..particles.dependence import index_unread
from .blame import line_of, refuse, shift_generators
from .data import signature, tensors_of
from .gradients import Gradient, descent, norm_of
from .simplify import simplified
from .tape import function_of
from .trace import Traced, trace

__all__ = ["Recording", "difference_of", "record", "verify"]


@dataclass
class Recording:
    r"""The gradient of a `MonteCarloELBO` as a graph; called like `gradient` on data of the same shapes.

    Args:
        traced: The graph: ``(leaves, buffers, state, data) -> (loss, gradients, state)``, flat lists.
        leaves: The parameters, live.
        reached: Names of the parameters that have a gradient, in the graph's order.
        state_spec: The structure of the loss's state.
        is_settled: Whether the next state has that structure too.
    """

    traced: Traced = field(repr=False)
    leaves: dict[str, Tensor] = field(repr=False)
    buffers: list[Tensor] = field(repr=False)
    reached: list[str]
    signature: Any = field(repr=False)
    state_spec: Any = field(repr=False)
    raw: Traced = field(repr=False)
    is_settled: bool = True
    unverified: bool = False
    uses: int = 0

    @functools.cached_property
    def run(self) -> Callable[..., tuple[Tensor, ...]]:
        """The graph as a Python function."""
        return function_of(self.traced)

    def fits(self, state: States) -> bool:
        """Whether a state has the structure of that which was recorded."""
        return pytree.tree_structure(state) == self.state_spec

    def __call__(self, args: tuple, kwargs: Mapping[str, Any], state: States) -> Gradient:
        """Run the graph; same generator, same numbers as the eager gradient."""
        flat_state = pytree.tree_leaves(state)
        tensors = tensors_of(args, kwargs)
        with torch.no_grad():
            out = self.run(*self.leaves.values(), *self.buffers, *flat_state, *tensors)
        count = len(self.reached)
        grads = dict(zip(self.reached, out[1 : 1 + count], strict=True))
        following = pytree.tree_unflatten(list(out[1 + count :]), self.state_spec)
        return Gradient(
            float(out[0]), grads, self.leaves, norm_of(grads) if math.isfinite(out[0]) else math.nan, following
        )


def record(
    model: Callable,
    guide: Callable,
    loss: MonteCarloELBO,
    leaves: Mapping[str, Tensor],
    buffers: list[Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    beta: Tensor | None = None,
    rows: bool = False,
) -> Recording:
    r"""Record the gradient of `loss` by `leaves` as a graph, twice, and refuse if the two differ.

    Generator, buffers, parameters and the loss's state are as before. Validation is off while recording. A factor
    `beta` is one of the buffers: an input of the graph, which is read from its tensor each time. Gradients are dense
    unless `rows`.

    Raises:
        RecordingError: The loss cannot be recorded (a data-dependent branch or ``.item()``), or two recordings differ
            in an operation, a number or a constant; names the line of the model.
    """
    if not hasattr(loss, "evaluate"):
        fail(
            RecordingError,
            'backend="graph"',
            "record the gradient",
            got=f"loss {type(loss).__name__}",
            because="only MonteCarloELBO can be recorded (Pyro's losses call .item())",
            fix='Write loss=MonteCarloELBO(estimator="pyro"), or backend="eager".',
        )
    if getattr(loss, "is_probing", False):
        fail(
            RecordingError,
            "SVI",
            "record the gradient",
            got='estimator="probe"',
            because="a recorded step has one estimator per site, and trials change it",
            fix='Write backend="eager", or give the estimators that a run has found: estimator=loss.resolved.',
        )
    for row in loss.table:
        if not row.estimator.traits.recordable:
            fail(
                RecordingError,
                'backend="graph"',
                f"record the gradient at site {row.site!r}",
                got=repr(row.estimator),
                because="its trait recordable is False",
                fix='Write backend="eager".',
            )
    tensors = tensors_of(args, kwargs)
    flat_state, state_spec = pytree.tree_flatten(loss.state)
    reached: list[str] = []
    specs: list[Any] = []

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = list(inputs[len(leaves) + len(buffers) :])
        state = pytree.tree_unflatten(rest[: len(flat_state)], state_spec)
        with _Recordable():
            evaluation = loss.evaluate(model, guide, args, kwargs, state, *(() if beta is None else (beta,)))
        grads = descent(evaluation, leaves, rows)
        reached[:] = list(grads)
        specs.append(pytree.tree_structure(evaluation.state))
        return (-evaluation.objective.detach(), *grads.values(), *pytree.tree_leaves(evaluation.state))

    inputs = (*leaves.values(), *buffers, *flat_state, *tensors)
    first, second = _trace_twice(step, inputs)
    difference = difference_of(first, second)
    if difference:
        refuse(step, inputs, difference)
    simple = simplified(first)
    settled = specs[-1] == state_spec
    parts = (simple, dict(leaves), list(buffers), list(reached), signature(args, kwargs), state_spec, second, settled)
    return Recording(*parts)


def verify(recording: Recording, again: Recording) -> None:
    """Raise unless two recordings of the same step agree (an attribute that was changed meanwhile)."""
    difference = difference_of(recording.raw, again.raw)
    if difference:
        fail(
            RecordingError,
            'backend="graph"',
            "go on with the recorded step",
            got=difference,
            because="the model has changed since it was recorded, as by an annealing attribute, and the recorded step "
            "cannot see that",
            fix='Pass what changes as a tensor argument, or write backend="eager"; after a single change, call '
            ".recompile().",
        )


def _trace_twice(step: Callable, inputs: tuple) -> tuple[Traced, Traced]:
    graphs = []
    for _ in range(2):
        with quiet(validate=False) as watch:
            if graphs:
                shift_generators()
            try:
                graphs.append(trace(step, inputs, places=not graphs))
                _refuse_replaced(watch.replaced())
            except RuntimeError as cause:
                if "tracing tensor" not in str(cause) and "data-dependent" not in str(cause).lower():
                    raise
                fail(
                    RecordingError,
                    'backend="graph"',
                    "record the step as a graph",
                    got=f"a Python number taken from a tensor{line_of(cause)}",
                    because="a recorded step has no .item() and no branch on a tensor's value",
                    fix='Use torch.where in place of the branch, or backend="eager".',
                    cause=cause,
                )
    return graphs[0], graphs[1]


def _refuse_replaced(buffer: str | None) -> None:
    if buffer is not None:
        fail(
            RecordingError,
            'backend="graph"',
            "record the step as a graph",
            got=f"a new tensor as buffer {buffer}",
            because="a recorded step writes buffers in place, and would never see this one change",
            fix=f'Write self.{buffer.split(".")[-1]}.copy_(...) in its module, or backend="eager".',
        )


class _Recordable(TorchFunctionMode):
    """Let be recorded what torch makes a Python value of, without need.

    These are ``x[k]`` with integer tensors k without dims; whether a value lies in its support, which is asked by
    distributions that were made before validation was switched off, such as the prior of a `PyroSample`; and whether
    indices that become one-hot vectors, as the draws of ``OneHotCategorical`` do, are below their number.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._is_all_true:
            return True
        if func is Tensor.__getitem__:
            return index_unread(*args)
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    """Return one-hot vectors of a given length without a look at the indices."""
    if num_classes < 1:
        return torch.nn.functional.one_hot(index, num_classes)
    return (index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)).to(index.dtype)


def difference_of(one: Traced, two: Traced) -> str:
    """Return what differs between two graphs: the first operation, number or constant; or an empty string."""
    first, second = list(one.graph.nodes), list(two.graph.nodes)
    names = {a: b for a, b in zip(first, second, strict=False)}
    for a, b in zip(first, second, strict=False):
        if a.op != b.op or (a.op == "call_function" and a.target is not b.target):
            return f"operation {a.target} in one recording and {b.target} in the next"
        if a.op == "get_attr":
            x, y = getattr(one.constants, a.target), getattr(two.constants, b.target)
            if isinstance(x, Tensor) and (x.shape != y.shape or not torch.equal(_nan_free(x), _nan_free(y))):
                return f"constant {_short(x)} in one recording and {_short(y)} in the next"
        elif a.op == "call_function":
            left = fx.map_arg((a.args, a.kwargs), lambda n: names[n].name)
            right = fx.map_arg((b.args, b.kwargs), lambda n: n.name)
            if repr(left) != repr(right):
                return f"{a.target} with {_numbers(a)} in one recording and {_numbers(b)} in the next"
    if len(first) != len(second):
        return f"{len(first)} operations in one recording and {len(second)} in the next"
    return ""


def _nan_free(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=12345.0) if x.is_floating_point() else x


def _short(x: Tensor) -> str:
    return f"{x.flatten()[:3].tolist()}"


def _numbers(node: fx.Node) -> str:
    return str([x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, int | float | bool)])
