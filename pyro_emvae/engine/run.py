r"""`Engine`: a gradient step is ``gradient -> reduce -> update``, eager or recorded."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, NonFiniteError, RecordingError, StepError, choose, fail, require_data
from ..loss import MonteCarloELBO, States, raise_non_finite, remember
from ..optimizers import BlockOptimizer
from ..parameters import GUIDE, MODEL, SHARED, SIDES, Buffer, Parameters, discover, is_wrapped
from ..particles import ModuleWatch, quiet
from .data import fitting_data, signature
from .gradients import Gradient, gradient
from .recording import Recording, record, verify

__all__ = ["BACKENDS", "POLICIES", "Engine", "State"]

BACKENDS, POLICIES = ("eager", "graph"), ("raise", "skip", "revert")
LOOKS = (2, *(8**k for k in range(1, 9)))  # uses after which a recording is made again and compared


@dataclass(frozen=True)
class State:
    """All that a run changes: one pytree of tensors. Parameters, buffers and slots are the live ones.

    ``steps`` holds each half-step's own tensors by slot, ``"E"`` and ``"M"``; a half-step returns its new ones by
    `with_own`. All else is written in place.
    """

    params: dict[str, Tensor] = field(repr=False)
    buffers: list[Tensor] = field(repr=False)
    estimator: States = field(repr=False)
    steps: dict[str, dict[str, Any]] = field(repr=False)
    count: int
    optimizers: dict[str | None, BlockOptimizer] = field(repr=False)

    @property
    def optim(self) -> dict[str, Any]:
        """Slots, counts, learning rates and schedules by block."""
        return {str(block): optimizer.state for block, optimizer in self.optimizers.items()}

    def with_own(self, slot: str, own: dict[str, Any]) -> State:
        """Return the state with a half-step's own tensors replaced."""
        return replace(self, steps=self.steps | {slot: own})


class Engine:
    r"""Runs gradient steps of a model and a guide: ``gradient -> reduce -> update``, one optimizer per block.

    Args:
        model, guide: Pyro callables.
        loss: The loss; a half-step may bring its own.
        optimizers: A `BlockOptimizer` per block, or one under the key None for everything.
        backend: ``"eager"`` or ``"graph"``.
        loss_and_grads: Called in place of the loss's own.
        blocks, sides: See `parameters.discover`.
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
        sides: Mapping[str, str] = SIDES,
        on_nonfinite: str = "raise",
    ) -> None:
        self.model, self.guide, self.loss = model, guide, loss
        self.optimizers, self.backend, self.loss_and_grads = optimizers, backend, loss_and_grads
        self.blocks, self.sides, self.on_nonfinite = blocks, sides, on_nonfinite
        self.parameters: Parameters | None = None
        self.count = self.skipped = 0
        self.steps: dict[str, dict[str, Any]] = {}
        self.failure: NonFiniteError | None = None
        self.reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
        self.on_setup: Callable[[], Any] | None = None
        self.beta: Tensor | None = None
        self._recordings: dict[Any, Recording] = {}
        self._warm: set[Any] = set()
        self._before: tuple | None = None
        self.half_steps: dict[str, Any] = {}
        self.waiting: Mapping[str, Any] | None = None

    @property
    def on_nonfinite(self) -> str:
        return self._on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, policy: str) -> None:
        self._on_nonfinite = choose("run", "on_nonfinite", policy, POLICIES)

    def setup(self, args: tuple, kwargs: Mapping[str, Any]) -> Parameters:
        """Find blocks and buffers, if that has not been done; generator and buffers stay as they are.

        ``on_setup`` is called when they have been found, before an update.
        """
        if self.parameters is None:
            with fitting_data(args, kwargs):
                self.parameters = discover(self.model, self.guide, args, kwargs, blocks=self.blocks, sides=self.sides)
            if self.on_setup is not None:
                self.on_setup()
        return self.parameters

    def refresh(self) -> None:
        """Forget parameters and recordings if the store was cleared or loaded, or a module's parameter replaced."""
        if self.parameters is not None and not self.parameters.is_current():
            self.parameters = self._before = None
            self.steps = {}
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
        require_data("step", args, kwargs)
        self.refresh()
        if block is not None:
            self.setup(args, kwargs)
        loss = self.loss if loss is None else loss
        try:
            with self._guarded(block), fitting_data(args, kwargs):
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
        is_host = self.backend == "eager" or getattr(loss, "is_host", False)
        if is_host or not self._is_warm(block, args, kwargs, loss) or _in_context():
            return self._eager(loss, args, kwargs, only, own)
        recording = self._recording(block, args, kwargs, loss)
        if not recording.is_settled:  # the next state has more, or less
            return self._eager(loss, args, kwargs, only, own)
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
        try:
            pair = (self.model, self.guide)
            how = {"loss_and_grads": own, "beta": self.beta, "rows": True}
            return gradient(*pair, loss, args, kwargs, only=only, **how)
        except ValueError as cause:
            if isinstance(loss, MonteCarloELBO) and not isinstance(cause, EmvaeError):
                self._blame_non_finite(loss, args, kwargs, cause)
            raise

    def _blame_non_finite(self, loss: MonteCarloELBO, args: tuple, kwargs: Mapping[str, Any], cause: Exception) -> None:
        """Say so if Pyro's validation stumbled over something that is not finite."""
        with quiet(validate=False), torch.no_grad():
            particles = loss.particles(self.model, self.guide, args, kwargs)
        if particles.first_non_finite() is not None:
            raise_non_finite(type(loss).__name__, math.nan, particles, cause)

    def _is_warm(self, block: str | None, args: tuple, kwargs: Mapping[str, Any], loss: Any) -> bool:
        """Whether a step was made eagerly on such data, so that parameters, plates and estimators' states exist."""
        key = (block, id(loss), signature(args, kwargs))
        stateful = [row.site for row in getattr(loss, "table", ()) if row.estimator.traits.stateful]
        plan = getattr(loss, "plans", {}).get((self.model, self.guide))
        stateful = [site for site in stateful if plan is None or (site, False) in plan.sites]
        warm = key in self._warm and self.parameters is not None and all(site in loss.state for site in stateful)
        self._warm.add(key)
        return warm

    def _record(self, block: str | None, args: tuple, kwargs: Mapping[str, Any], loss: Any) -> Recording:
        leaves = self.parameters.leaves(*(() if block is None else (block,)))
        try:
            return record(self.model, self.guide, loss, leaves, self._inputs(), args, kwargs, self.beta, True)
        except RecordingError:
            raise
        except Exception:  # the model does not run: say so as the eager backend does, with validation
            with quiet():
                self._eager(loss, args, kwargs, leaves, None)
            raise

    def _inputs(self) -> list[Tensor]:
        """Return the tensors that a recording reads from where they are: buffers, and the factor of annealing."""
        return [b.tensor for b in self.parameters.buffers] + ([] if self.beta is None else [self.beta])

    def _recording(self, block: str | None, args: tuple, kwargs: Mapping[str, Any], loss: Any) -> Recording:
        modes = tuple(m.training for m in self.parameters.modules)
        key = (block, id(loss), signature(args, kwargs), modes)
        recording = self._recordings.get(key)
        same = recording is not None and [id(b) for b in self._inputs()] == [id(b) for b in recording.buffers]
        if not same or not (recording.is_settled and recording.fits(loss.state)):
            self._recordings.pop(key, None)
            recording = self._record(block, args, kwargs, loss)
            remember(self._recordings, key, recording)
        recording.uses += 1
        if recording.unverified or recording.uses in LOOKS:
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
                mine = self.parameters.leaves(*((MODEL, SHARED) if key == MODEL else (key,))).values()
                ids = {id(p) for p in mine}
                leaves = {n: p for n, p in leaves.items() if id(p) in ids}
            if {id(p) for p in leaves.values()} - {id(p) for p in optimizer.params}:
                optimizer.add(leaves)
        return list(chosen.values())

    def _update(self, optimizers: list[BlockOptimizer], found: Gradient, loss: Any) -> None:
        grads = found.grads if self.reduce is None else self.reduce(found.grads)
        by_leaf = {id(found.leaves[name]): g for name, g in grads.items()}  # a leaf may have several names
        for optimizer in optimizers:
            optimizer.step([by_leaf.get(id(leaf)) for leaf in optimizer.params])
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
        _put_back([] if block is None else [item for item in held if _owner(item[0]) != block])

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

    @property
    def before(self) -> dict[str, Any] | None:
        """What ``on_nonfinite="revert"`` goes back to: the state before the last update, None if it is not kept."""
        if self._before is None:
            return None
        tensors, optim, state = self._before
        named = {str(key): old for key, old in optim.items()}
        return {"tensors": [old for _, old in tensors], "optim": named, "estimator": state}

    @before.setter
    def before(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            self._before = None
            return
        live = [*self.parameters.leaves().values(), *self.parameters.moving_buffers()]
        optim = {key: saved["optim"][str(key)] for key in self.optimizers if str(key) in saved["optim"]}
        self._before = list(zip(live, saved["tensors"], strict=True)), optim, saved["estimator"]

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
            self.loss.state if isinstance(self.loss, MonteCarloELBO) else {},
            self.steps,
            self.count,
            self.optimizers,
        )


def _owner(buffer: Buffer) -> str:
    """Return the block whose steps move a buffer: what both sides call is moved by the guide's."""
    return GUIDE if buffer.block == SHARED else buffer.block


def _put_back(held: list[tuple[Buffer, Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, tensor, copied in held:
            buffer.module._buffers[buffer.key] = tensor.copy_(copied)


def _in_context() -> bool:
    """Whether handlers or autocast around the step take part in it, which a recording would freeze."""
    return is_wrapped() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
