r"""One gradient step, eager or recorded once as a graph of tensor operations; the only file with private torch names.

`make_fx` *runs* the gradient once, with all of Pyro's handlers, on the very tensors that are the parameters, so that
any use of them, from wherever, is recorded; no parameter has to be substituted. What is recorded is run from Python.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import TraceTailAdaptive_ELBO
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._checks import DataError, EmvaeError, NonFiniteError, RecordingError, StepError, fail, nearest
from .loss import MonteCarloELBO, States, raise_non_finite
from .optimizers import BlockOptimizer
from .parameters import (
    GUIDE,
    MODEL,
    SHARED,
    Buffer,
    Parameters,
    capture,
    discover,
    distinct,
    is_wrapped,
    module_leaves,
    sample_statements,
)
from .particles import ModuleWatch, quiet

__all__ = ["Engine", "Gradient", "Recording", "Replicator", "State", "gradient", "record"]

BACKENDS = ("eager", "graph")


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
) -> Gradient:
    r"""Take the gradient of a loss eagerly; change nothing but buffers.

    Args:
        loss: A `MonteCarloELBO` or anything with Pyro's ``loss_and_grads``.
        only: The leaves to differentiate (a block); all that were met by default.
        loss_and_grads: Called in place of ``loss.loss_and_grads``.

    Raises:
        NonFiniteError: Loss or gradient is NaN or infinite; names the first site or parameter.
    """
    if not isinstance(loss, MonteCarloELBO):
        return _foreign(model, guide, loss, loss_and_grads or loss.loss_and_grads, args, kwargs, only)
    evaluation = loss.evaluate(model, guide, args, kwargs, loss.state)
    value = -float(evaluation.objective.detach())
    if not math.isfinite(value):
        raise_non_finite(type(loss).__name__, value, evaluation.particles)
    met = _met(evaluation.particles.params, model, guide)
    leaves = met if only is None else only
    found = _autograd(-evaluation.surrogate, leaves)
    return Gradient(value, found, leaves, _norm(found), evaluation.state, tuple(met.values()))


def _met(params: Mapping[str, Mapping[str, Tensor]], model: Callable, guide: Callable) -> dict[str, Tensor]:
    """Return the trainable leaves that a run met by name, and those of modules that Pyro was not told of."""
    leaves = distinct({n: p for side in params.values() for n, p in side.items() if p.requires_grad})
    extra = module_leaves(guide, model)
    if extra:
        known = {id(p) for p in leaves.values()}
        leaves.update({n if n not in leaves else f"{n}'": p for n, p in extra.items() if id(p) not in known})
    return leaves


def _autograd(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not leaves or not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def _norm(grads: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all gradients, or raise naming the first parameter whose gradient is not finite."""
    if not grads:
        return 0.0
    parts = torch._foreach_norm(list(grads.values()))
    norm = float(torch.linalg.vector_norm(torch.stack(parts))) if len(parts) > 1 else float(parts[0])
    if not math.isfinite(norm):
        for name, g in grads.items():
            if not bool(torch.isfinite(g).all()):
                fail(
                    NonFiniteError,
                    "gradient",
                    "use a gradient that is not finite",
                    got=f"a non-finite gradient of parameter {name!r}",
                    because="the objective was finite, its derivative is not",
                    fix="Look for sqrt, log or a division at zero on the way from that parameter to a site.",
                )
    return norm


def _foreign(model, guide, loss, loss_and_grads, args, kwargs, only) -> Gradient:
    """Run someone else's ``loss_and_grads``, take the gradients it leaves, and put back what was there."""
    extra = module_leaves(guide, model)
    value, met, found = capture(lambda: loss_and_grads(model, guide, *args, **kwargs), extra | dict(only or {}))
    leaves = distinct(met) if only is None else dict(only)
    names = {id(p): n for n, p in leaves.items()}
    grads = {names[id(met[n])]: g for n, g in found.items() if id(met[n]) in names}
    value = value[0] if isinstance(value, tuple) else value
    value = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(value) and not isinstance(loss, TraceTailAdaptive_ELBO):  # which never computes its value
        fail(
            NonFiniteError,
            "SVI",
            "use a loss that is not finite",
            got=f"loss {value}",
            because="every log density has to be finite",
            fix="Use loss=MonteCarloELBO(), which names the first site that is not finite.",
        )
    return Gradient(value, grads, leaves, _norm(grads), met=tuple(met.values()))


# The engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """All that a run changes: one pytree of tensors. Parameters, buffers and slots are the live ones."""

    params: dict[str, Tensor] = field(repr=False)
    buffers: list[Tensor] = field(repr=False)
    optim: dict[str, Any] = field(repr=False)
    estimator: States = field(repr=False)
    steps: dict[str, Any] = field(repr=False)
    count: int


class Engine:
    r"""Runs gradient steps of a model and a guide: ``gradient -> reduce -> update``, one optimizer per block.

    Args:
        model, guide: Pyro callables.
        loss: The loss; a half-step may bring its own.
        optimizers: A `BlockOptimizer` per block, or one under the key None for everything.
        backend: ``"eager"`` or ``"graph"``.
        loss_and_grads: Called in place of the loss's own.
        blocks: See `parameters.discover`.
        on_nonfinite: ``"raise"``; ``"skip"`` leaves out the update; ``"revert"`` also goes back to the state before
            the last update.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        loss: Any,
        optimizers: dict[str | None, BlockOptimizer],
        *,
        backend: str = "eager",
        loss_and_grads: Callable | None = None,
        blocks: Any = None,
        on_nonfinite: str = "raise",
    ) -> None:
        choose("backend", backend, BACKENDS)
        self.model, self.guide, self.loss = model, guide, loss
        self.optimizers, self.backend, self.loss_and_grads = optimizers, backend, loss_and_grads
        self.blocks, self.on_nonfinite = blocks, on_nonfinite
        self.parameters: Parameters | None = None
        self.count = self.skipped = 0
        self.failure: NonFiniteError | None = None
        self.reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
        self._recordings: dict[Any, Recording] = {}
        self._warm: set[Any] = set()
        self._before: tuple | None = None

    @property
    def on_nonfinite(self) -> str:
        return self._on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, policy: str) -> None:
        self._on_nonfinite = choose("on_nonfinite", policy, ("raise", "skip", "revert"))

    def setup(self, args: tuple, kwargs: Mapping[str, Any]) -> Parameters:
        """Find blocks and buffers, if that has not been done; generator and buffers stay as they are."""
        if self.parameters is None:
            with _fitting_data(args, kwargs):
                self.parameters = discover(self.model, self.guide, args, kwargs, blocks=self.blocks)
        return self.parameters

    def refresh(self) -> None:
        """Forget parameters and recordings if the store was cleared or loaded, or a module's parameter replaced."""
        if self.parameters is not None and not self.parameters.is_current():
            self.parameters = self._before = None
            self._recordings.clear()

    def step(self, block: str | None, args: tuple, kwargs: Mapping[str, Any], loss: Any = None) -> Gradient | None:
        r"""Take one gradient step on a block, or on everything (None).

        Returns:
            The gradient, or None if it was not finite and the policy is to go on.

        Raises:
            NonFiniteError: The objective or a gradient is not finite; parameters, optimizers and buffers are as before.
            StepError: An earlier step failed so; `recover` allows further ones.
        """
        self._refuse_after_failure()
        _check_data(args, kwargs)
        self.refresh()
        if block is not None:
            self.setup(args, kwargs)
        loss = self.loss if loss is None else loss
        try:
            with self._guarded(block), _fitting_data(args, kwargs):
                found = self._gradient(block, args, kwargs, loss)
        except NonFiniteError as error:
            if self.on_nonfinite == "raise":
                self.failure = error
                raise
            if self.on_nonfinite == "revert" and self._before is not None:
                self._restore(self._before)
            self.skipped += 1
            return None
        if self.parameters is not None and not self.parameters.knows(found.met):
            self.parameters = None
        self.setup(args, kwargs)
        steps = self._optimizers(block, found)
        self._before = self._snapshot() if self.on_nonfinite == "revert" else None
        self._update(steps, found, loss)
        return found

    def _gradient(self, block: str | None, args: tuple, kwargs: Mapping[str, Any], loss: Any) -> Gradient:
        only = None if block is None else self.parameters.leaves(block)
        own = self.loss_and_grads if loss is self.loss else None
        if self.backend == "eager" or not self._is_warm(block, loss) or _in_context():
            return self._eager(loss, args, kwargs, only, own)
        recording = self._recording(block, args, kwargs, loss)
        generator = torch.get_rng_state()
        found = recording(args, kwargs, loss.state)
        if math.isfinite(found.loss) and math.isfinite(found.norm):
            return found
        torch.set_rng_state(generator)
        self._eager(loss, args, kwargs, only, own)
        fail(
            NonFiniteError,
            "gradient",
            "use a recorded step that is not finite",
            got=f"loss {found.loss} and gradient norm {found.norm}, finite when run eagerly",
            because="the recorded step and the eager one differ",
            fix='Write backend="eager".',
        )

    def _eager(self, loss: Any, args: tuple, kwargs: Mapping[str, Any], only: Any, own: Callable | None) -> Gradient:
        return gradient(self.model, self.guide, loss, args, kwargs, only=only, loss_and_grads=own)

    def _is_warm(self, block: str | None, loss: Any) -> bool:
        """Whether a step was made eagerly, so that parameters and estimators' states exist."""
        key = (block, id(loss))
        stateful = [row.site for row in getattr(loss, "table", ()) if row.estimator.traits.stateful]
        warm = key in self._warm and self.parameters is not None and all(site in loss.state for site in stateful)
        self._warm.add(key)
        return warm

    def _record(self, block: str | None, args: tuple, kwargs: Mapping[str, Any], loss: Any) -> Recording:
        leaves = self.parameters.leaves(*(() if block is None else (block,)))
        buffers = [b.tensor for b in self.parameters.buffers]
        try:
            return record(self.model, self.guide, loss, leaves, buffers, args, kwargs)
        except RecordingError:
            raise
        except Exception:  # the model does not run: say so as the eager backend does, with validation
            with quiet():
                self._eager(loss, args, kwargs, leaves, None)
            raise

    def _recording(self, block: str | None, args: tuple, kwargs: Mapping[str, Any], loss: Any) -> Recording:
        modes = tuple(m.training for m in self.parameters.modules)
        key = (block, id(loss), signature(args, kwargs), modes)
        recording = self._recordings.get(key)
        buffers = [id(b.tensor) for b in self.parameters.buffers]
        if recording is None or buffers != [id(b) for b in recording.buffers]:
            recording = self._recordings[key] = self._record(block, args, kwargs, loss)
        elif recording.unverified:
            verify(recording, self._record(block, args, kwargs, loss))
            recording.unverified = False
        return recording

    def expect_changes(self) -> None:
        """Let each recording be made once more and compared at its next use."""
        for recording in self._recordings.values():
            recording.unverified = True

    def recompile(self) -> None:
        """Forget all recordings."""
        self._recordings.clear()

    def _optimizers(self, block: str | None, found: Gradient) -> list[BlockOptimizer]:
        """Return the optimizers of a step, each with its part of the leaves; what both blocks share is the model's."""
        chosen = {key: o for key, o in self.optimizers.items() if block in (None, key)}
        for key, optimizer in chosen.items():
            leaves = found.leaves
            if key is not None and block is None:
                mine = self.parameters.leaves(*((MODEL, SHARED) if key == MODEL else (key,)))
                leaves = {n: p for n, p in leaves.items() if n in mine}
            if {id(p) for p in leaves.values()} - {id(p) for p in optimizer.params}:
                optimizer.add(leaves)
        return list(chosen.values())

    def _update(self, optimizers: list[BlockOptimizer], found: Gradient, loss: Any) -> None:
        grads = found.grads if self.reduce is None else self.reduce(found.grads)
        for optimizer in optimizers:
            optimizer.step([grads.get(name) for name in optimizer.names])
        if found.state is not None:
            loss.state = found.state
        self.count += 1

    # What must not move, and what can be put back --------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self, block: str | None) -> Iterator[None]:
        """Put back the buffers of the other block at the end, and all of them after an error."""
        if self.parameters is None:
            with ModuleWatch() as watch:
                try:
                    yield
                except BaseException:
                    watch.restore()
                    raise
            return
        held = [(b, b.tensor, b.tensor.clone()) for b in self.parameters.buffers if b.moves]
        try:
            yield
        except BaseException:
            _put_back(held)
            raise
        _put_back([item for item in held if item[0].block in OTHERS[block]])

    def _snapshot(self) -> tuple:
        params = [(p, p.detach().clone()) for p in self.parameters.leaves().values()]
        buffers = [(b, b.clone()) for b in self.parameters.moving_buffers()]
        optim = {k: copy.deepcopy(o.state) for k, o in self.optimizers.items() if o.names}
        return params + buffers, optim, self.loss.state if isinstance(self.loss, MonteCarloELBO) else None

    def _restore(self, snapshot: tuple) -> None:
        tensors, optim, state = snapshot
        with torch.no_grad():
            for live, old in tensors:
                live.copy_(old)
        for key, old in optim.items():
            self.optimizers[key].load_state(old)
        if state is not None:
            self.loss.state = state

    def _refuse_after_failure(self) -> None:
        if self.failure is not None:
            fail(
                StepError,
                "step",
                "go on after a failed step",
                got=f"an earlier failure: {self.failure}",
                because="going on as if nothing had happened would hide it",
                fix='Call .recover() to go on from the parameters before it, or write on_nonfinite="skip".',
                cause=self.failure,
            )

    def recover(self) -> None:
        """Allow further steps after a failed one; parameters are as before it."""
        self.failure = None

    @property
    def state(self) -> State:
        """All that a run changes."""
        if self.parameters is None:
            fail(
                StepError,
                "engine",
                "give its state",
                got="no step yet",
                because="parameters are found by the first step",
                fix="Take a step first.",
            )
        return State(
            self.parameters.leaves(),
            self.parameters.moving_buffers(),
            {str(k): o.state for k, o in self.optimizers.items()},
            self.loss.state if isinstance(self.loss, MonteCarloELBO) else {},
            {},
            self.count,
        )


OTHERS = {None: (), GUIDE: (MODEL,), MODEL: (GUIDE, SHARED)}


def _put_back(held: list[tuple[Buffer, Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, tensor, copied in held:
            buffer.module._buffers[buffer.key] = tensor.copy_(copied)


def choose(name: str, value: Any, known: tuple[str, ...]) -> Any:
    """Return `value` if it is one of `known`, else raise."""
    if value not in known:
        fail(
            EmvaeError,
            "SVI",
            f"use {name}={value!r}",
            got="an unknown choice",
            because=f"{name} is one of {known}",
            fix=nearest(str(value), known),
        )
    return value


def _in_context() -> bool:
    """Whether handlers or autocast around the step take part in it, which a recording would freeze."""
    return is_wrapped() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _check_data(args: tuple, kwargs: Mapping[str, Any]) -> None:
    for tensor in _tensors(args, kwargs):
        if tensor.numel() == 0 and tensor.dim():
            fail(
                DataError,
                "step",
                "use empty data",
                got=f"a tensor of shape {tuple(tensor.shape)}",
                because="an objective over no data says nothing",
                fix="Pass at least one datum.",
            )


@contextlib.contextmanager
def _fitting_data(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Add the data's shapes to Pyro's error for a plate of another size."""
    try:
        yield
    except ValueError as cause:
        if isinstance(cause, EmvaeError) or "inside plate" not in str(cause):
            raise
        fail(
            DataError,
            "step",
            "use these data",
            got=f"{cause}; data of shapes {[tuple(t.shape) for t in _tensors(args, kwargs)]}",
            because="what is drawn in a plate has the plate's size at its dim",
            fix='Write pyro.plate("data", len(x)); for minibatches pyro.plate("data", N, subsample=index).',
            cause=cause,
        )


# Recording ------------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    r"""The gradient of a `MonteCarloELBO` as a graph; called like `gradient` on data of the same shapes.

    Args:
        module: The graph: ``(leaves, buffers, state, data) -> (loss, gradients, state)``, flat lists.
        leaves: The parameters, live.
        reached: Names of the parameters that have a gradient, in the graph's order.
    """

    module: fx.GraphModule = field(repr=False)
    leaves: dict[str, Tensor] = field(repr=False)
    buffers: list[Tensor] = field(repr=False)
    reached: list[str]
    signature: Any = field(repr=False)
    state_spec: Any = field(repr=False)
    raw: fx.GraphModule = field(repr=False)
    unverified: bool = False

    def __call__(self, args: tuple, kwargs: Mapping[str, Any], state: States) -> Gradient:
        """Run the graph; same generator, same numbers as the eager gradient."""
        flat_state = pytree.tree_leaves(state)
        tensors = _tensors(args, kwargs)
        with torch.no_grad():
            out = self.module(*self.leaves.values(), *self.buffers, *flat_state, *tensors)
        count = len(self.reached)
        grads = dict(zip(self.reached, out[1 : 1 + count], strict=True))
        following = pytree.tree_unflatten(list(out[1 + count :]), self.state_spec)
        return Gradient(
            float(out[0]), grads, self.leaves, _norm(grads) if math.isfinite(out[0]) else math.nan, following
        )


PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, slice, range, Enum, torch.dtype, torch.device)


def signature(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Return what a recording depends on: the data's structure, layout, and its Python values.

    Raises:
        RecordingError: An argument holds data that are no tensors.
    """
    flat, spec = pytree.tree_flatten((args, dict(kwargs)))
    places = {id(x): i for i, x in reversed(list(enumerate(flat)))}
    return spec, tuple(_describe(x, places[id(x)]) for x in flat)


def _describe(x: Any, place: int) -> tuple:
    """Describe one argument; `place` is where it came first, as one tensor that is given twice is recorded as one."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.device, place
    if isinstance(x, PLAIN):
        return type(x), repr(x)
    if not callable(x):
        fail(
            RecordingError,
            "SVI",
            f"record a step on an argument of type {type(x).__name__}",
            got=repr(x)[:80],
            because="only tensors change from call to call of a recorded step",
            fix='Pass tensors, alone or in tuples, lists and dicts, or write backend="eager".',
        )
    return type(x), x


def _tensors(args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]


def record(
    model: Callable,
    guide: Callable,
    loss: MonteCarloELBO,
    leaves: Mapping[str, Tensor],
    buffers: list[Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Recording:
    r"""Record the gradient of `loss` by `leaves` as a graph, twice, and refuse if the two differ.

    Generator, buffers, parameters and the loss's state are as before. Validation is off while recording.

    Raises:
        RecordingError: The loss cannot be recorded (a data-dependent branch or ``.item()``), or two recordings differ
            in an operation, a number or a constant; names the line of the model.
    """
    if not isinstance(loss, MonteCarloELBO):
        fail(
            RecordingError,
            "SVI",
            'use backend="graph"',
            got=f"loss {type(loss).__name__}",
            because="only MonteCarloELBO can be recorded (Pyro's losses call .item())",
            fix='Write loss=MonteCarloELBO(estimator="pyro"), or backend="eager".',
        )
    for row in loss.table:
        if not row.estimator.traits.recordable:
            fail(
                RecordingError,
                "SVI",
                f"record the gradient at site {row.site!r}",
                got=repr(row.estimator),
                because="its trait recordable is False",
                fix='Write backend="eager".',
            )
    tensors = _tensors(args, kwargs)
    flat_state, state_spec = pytree.tree_flatten(loss.state)
    reached: list[str] = []

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = list(inputs[len(leaves) + len(buffers) :])
        state = pytree.tree_unflatten(rest[: len(flat_state)], state_spec)
        with _Recordable():
            evaluation = loss.evaluate(model, guide, args, kwargs, state)
        grads = _autograd(-evaluation.surrogate, leaves)
        reached[:] = list(grads)
        return (-evaluation.objective.detach(), *grads.values(), *pytree.tree_leaves(evaluation.state))

    inputs = (*leaves.values(), *buffers, *flat_state, *tensors)
    first, second = _trace_twice(step, inputs)
    difference = _difference(first, second)
    if difference:
        _refuse(step, inputs, difference)
    raw, module = first, fx.GraphModule(first, _copy_graph(first))
    _simplify(module)
    return Recording(module, dict(leaves), list(buffers), list(reached), signature(args, kwargs), state_spec, raw)


def verify(recording: Recording, again: Recording) -> None:
    """Raise unless two recordings of the same step agree (an attribute that was changed between runs)."""
    difference = _difference(recording.raw, again.raw)
    if difference:
        fail(
            RecordingError,
            "SVI",
            "go on with the recorded step",
            got=difference,
            because="the model has changed since it was recorded",
            fix="Call .recompile().",
        )


def _trace_twice(step: Callable, inputs: tuple) -> tuple[fx.GraphModule, fx.GraphModule]:
    from torch.fx.experimental.proxy_tensor import make_fx

    graphs = []
    for _ in range(2):
        with quiet(validate=False) as watch:
            if graphs:
                _shift_generators()
            try:
                graphs.append(make_fx(step)(*inputs))
                _refuse_replaced(watch.replaced())
            except RuntimeError as cause:
                if "tracing tensor" not in str(cause) and "data-dependent" not in str(cause).lower():
                    raise
                fail(
                    RecordingError,
                    "SVI",
                    "record the step as a graph",
                    got=f"a Python number taken from a tensor{_line_of(cause)}",
                    because="a recorded step has no .item() and no branch on a tensor's value",
                    fix='Use torch.where in place of the branch, or backend="eager".',
                    cause=cause,
                )
    return graphs[0], graphs[1]


def _refuse_replaced(buffer: str | None) -> None:
    if buffer is not None:
        fail(
            RecordingError,
            "SVI",
            "record the step as a graph",
            got=f"a new tensor as buffer {buffer}",
            because="a recorded step writes buffers in place, and would never see this one change",
            fix=f'Write self.{buffer.split(".")[-1]}.copy_(...) in its module, or backend="eager".',
        )


def _shift_generators() -> None:
    """Move torch's, numpy's and Python's generators on, and the normal that each keeps, so that all draws differ."""
    for draw in (torch.rand, torch.randn, np.random.random, np.random.standard_normal):
        draw(1)
    random.random()
    random.gauss(0.0, 1.0)


class _Recordable(TorchFunctionMode):
    """Let be recorded what torch makes a Python value of, without need.

    These are ``x[k]`` with integer tensors k without dims, and whether a value lies in its support, which is asked by
    distributions that were made before validation was switched off, such as the prior of a `PyroSample`.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._is_all_true:
            return True
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            scalars = [isinstance(i, Tensor) and i.dim() == 0 and i.dtype == torch.long for i in index]
            count = sum(scalars)
            if count and all(scalars[:count]) and not any(isinstance(i, Tensor | list) for i in index[count:]):
                lifted = tuple(i.unsqueeze(0) for i in index[:count]) + index[count:]
                return func(args[0], lifted).squeeze(0)
        return func(*args, **(kwargs or {}))


def _copy_graph(module: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph._codegen = fx.graph.CodeGen()
    return graph


def _difference(one: fx.GraphModule, two: fx.GraphModule) -> str:
    """Return what differs between two graphs: the first operation, number or constant; or an empty string."""
    first, second = list(one.graph.nodes), list(two.graph.nodes)
    names = {a: b for a, b in zip(first, second, strict=False)}
    for a, b in zip(first, second, strict=False):
        if a.op != b.op or (a.op == "call_function" and a.target is not b.target):
            return f"operation {a.target} in one recording and {b.target} in the next"
        if a.op == "get_attr":
            x, y = getattr(one, a.target), getattr(two, b.target)
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


HERE = os.path.dirname(__file__) + os.sep
PACKAGES = (HERE, *(os.path.dirname(m.__file__) + os.sep for m in (torch, pyro, np)))
EXAMPLES = os.path.join(HERE, "problems")
WORKERS = tuple(os.path.join(HERE, name) for name in ("loss.py", "objectives.py", "particles"))


def _is_user(frame: traceback.FrameSummary) -> bool:
    name = frame.filename
    if name.startswith(EXAMPLES):
        return True
    return not (name.startswith(PACKAGES) or name.startswith(os.path.dirname(os.__file__)) or name.startswith("<"))


def _line(frames: traceback.StackSummary) -> str:
    """Return the innermost line of model or guide; none if the package itself was at work when it happened."""
    for frame in reversed(frames):
        if _is_user(frame):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
        if frame.filename.startswith(WORKERS) or frame.name == _autograd.__name__:
            break
    return ""


def _line_of(error: BaseException) -> str:
    line = _line(traceback.extract_tb(error.__traceback__))
    return f" at {line}" if line else ""


class _Diary(TorchDispatchMode):
    """Write down every operation, its numbers and constants, and the user's line that caused it."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.entries: list[tuple[str, str]] = []
        self.made = list(known)
        self.ids = {id(t) for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs or {}))
        numbers = [x for x in leaves if isinstance(x, int | float | bool)]
        for constant in (x for x in leaves if isinstance(x, Tensor) and id(x) not in self.ids):
            numbers += constant.flatten()[:8].tolist()
        self.entries.append((f"{func} {numbers}", _line(traceback.extract_stack()[:-1])))
        out = func(*args, **(kwargs or {}))
        new = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.made += new
        self.ids.update(map(id, new))
        return out


def _refuse(step: Callable, inputs: tuple, difference: str) -> None:
    diaries, statements = [], []
    for shift in (False, True):
        with quiet(validate=False):
            if shift:
                _shift_generators()
            with _Diary(inputs) as diary:
                stacks = sample_statements(lambda: step(*inputs))
        diaries.append(diary.entries)
        statements.append([(key, _line(stack)) for key, stack in stacks])
    pairs = [*zip(*statements, strict=False), *zip(*diaries, strict=False)]
    lines = next(([a[1], b[1]] for a, b in pairs if a[0] != b[0]), [])
    where = "".join(f" at {line}" for line in dict.fromkeys(lines) if line)
    fail(
        RecordingError,
        "SVI",
        "record the step as a graph",
        got=difference + where,
        because="a number that Python changes from call to call would be frozen "
        "(a counter, numpy or Python randomness, an annealing attribute)",
        fix='Pass it as a tensor argument, draw it with torch, or write backend="eager".',
    )


# Simplification -------------------------------------------------------------------------------------------------


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _simplify(module: fx.GraphModule) -> None:
    """Fold constants and drop dead operations; random and in-place ones stay, so that the generator's stream does.

    Only constants that the run itself made (``torch.tensor(2.0)``) are folded: a tensor that was there before may be
    changed in place later, as parameters of the other block and annealing factors are.
    """
    graph = module.graph
    touched: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and (_mutates(node) or node in touched):
            touched.update(node.all_input_nodes)
    constants: dict[fx.Node, Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node not in touched and all(_is_lift(user) for user in node.users):
            constants[node] = getattr(module, node.target)
        elif _foldable(node, touched) and all(n in constants for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constants[n])
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                constants[node] = value
    for i, (node, value) in enumerate(constants.items()):
        if node.op == "call_function" and any(user not in constants for user in node.users):
            module.register_buffer(f"_folded{i}", value)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"_folded{i}"))
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if node.op == "get_attr" or not (_mutates(node) or _is_random(node)):
            graph.erase_node(node)
    module.recompile()


def _is_lift(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def _foldable(node: fx.Node, touched: set[fx.Node]) -> bool:
    if node.op != "call_function" or node in touched or _mutates(node) or _is_random(node):
        return False
    return isinstance(node.target, torch._ops.OpOverload) and "empty" not in node.target.__name__


# Replicates -----------------------------------------------------------------------------------------------------


class Replicator:
    """Many independent replicates of a recorded gradient in one vectorized run (`torch.vmap` over the graph).

    An in-place sampler needs a batched tensor to write into; each gets one by adding a batched zero.
    """

    def __init__(self, recording: Recording, args: tuple, kwargs: Mapping[str, Any], state: States) -> None:
        self.names = recording.reached
        self.inputs = [
            *recording.leaves.values(),
            *recording.buffers,
            *pytree.tree_leaves(state),
            *_tensors(args, kwargs),
        ]
        self.module = _with_batched_samplers(recording.module)
        self.bytes_each = _bytes(recording.module, self.inputs)

    def __call__(self, num_replicates: int) -> dict[str, Tensor]:
        """Return gradients by parameter name: ``(replicates, *shape)``."""
        run = torch.vmap(self.module, in_dims=(0,) + (None,) * len(self.inputs), randomness="different")
        with torch.no_grad():
            out = run(torch.zeros(num_replicates), *self.inputs)
        return dict(zip(self.names, out[1 : 1 + len(self.names)], strict=True))


def _with_batched_samplers(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    zero = graph.placeholder("replicate")
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.op == "call_function" and _mutates(node) and _is_random(node):
            with graph.inserting_before(node):
                batched = graph.call_function(torch.ops.aten.add.Tensor, (node.args[0], zero))
            node.args = (batched, *node.args[1:])
    return fx.GraphModule(module, graph)


class _Meter(fx.Interpreter):
    """Run a graph and add up the bytes of all that it makes."""

    total = 0

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        if node.op == "call_function":
            self.total += sum(t.numel() * t.element_size() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        return out


def _bytes(module: fx.GraphModule, inputs: list[Tensor]) -> int:
    meter = _Meter(module)
    with quiet(), torch.no_grad():
        meter.run(*[t.clone() for t in inputs])
    return max(1, meter.total)
