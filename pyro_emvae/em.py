r"""Expectation maximisation: an E-like step over the guide's parameters, an M-like step over the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from . import checkpoint
from ._checks import BlockError, StepError, fail
from ._registry import create
from .driver import Fit, Record
from .engine import State, choose
from .loss import MonteCarloELBO
from .optimizers import BlockOptimizer
from .parameters import GUIDE, MODEL, SHARED
from .posterior import GuidePosterior, Posterior, PosteriorGuide
from .steps import Gradient, HalfStep
from .svi import Inference, per_block, run_with

__all__ = ["EM"]


class EM(Inference):
    r"""Alternate two half-steps on one objective.

    $$\text{E: } \phi\leftarrow\arg\text{raise}_\phi\,L(\phi,\theta),\qquad
      \text{M: } \theta\leftarrow\arg\text{raise}_\theta\,L(\phi,\theta).$$

    By default one gradient update each; the M-step sees the updated phi. One optimizer per block: an E-step leaves
    theta and the model's buffers bit-for-bit alone, an M-step phi's, momentum or not.

    Args:
        model, guide: Pyro callables of the same arguments.
        optim: As for `SVI`; a mapping ``{"guide": ..., "model": ...}`` gives each block its own.
        loss: `MonteCarloELBO()` by default.
        e_step, m_step: Half-steps or their registered names; `steps.Gradient()` by default.
        schedule: ``"alternating"``, or ``"joint"``: both blocks from the same draws at the same parameters, which is
            `SVI.step`, and the variational autoencoder.
        blocks: How parameters are assigned: None (by what they move), ``"local/global"``, a mapping from name or
            regular expression to block, a regular expression of the guide's names, or a callable.
        backend, on_nonfinite: As for `SVI`.

    Raises:
        BlockError: A parameter that moves both log q and log p; a model or a guide without parameters.

    Source: Dempster, Laird and Rubin 1977; Neal and Hinton 1998, for the alternation on one objective.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     theta = pyro.param("theta", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(theta, 1.0)), 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.5 * x + pyro.param("phi", torch.tensor(1.0)), 0.5**0.5))
        >>> pyro.clear_param_store()
        >>> em = EM(model, guide, pyro.optim.Adam({"lr": 0.1}))
        >>> fit = em.run(torch.tensor([1.0, 2.0, 3.0]), max_iter=300, seed=0)
        >>> print(em.blocks)
        parameter  shape         block   why
        phi        []            guide   moves log q or a drawn value
        theta      []            model   moves log p at fixed latents
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable | None = None,
        optim: Any = None,
        loss: Any = None,
        loss_and_grads: Callable | None = None,
        *,
        e_step: HalfStep | str | None = None,
        m_step: HalfStep | str | None = None,
        schedule: str = "alternating",
        blocks: Any = None,
        backend: str = "eager",
        on_nonfinite: str = "raise",
    ) -> None:
        self.schedule = choose("schedule", schedule, ("alternating", "joint"))
        self.e_step = _step("E", e_step)
        self.m_step = _step("M", m_step)
        guide = _guide(model, guide, self.e_step)
        self._attach(
            model,
            guide,
            MonteCarloELBO() if loss is None else loss,
            loss_and_grads,
            optimizers=self._optimizers(optim),
            blocks=blocks,
            backend=backend,
            on_nonfinite=on_nonfinite,
        )
        self.engine.half_steps = {} if schedule == "joint" else {"E": self.e_step, "M": self.m_step}

    def _optimizers(self, optim: Any) -> dict[str, BlockOptimizer]:
        """Make one optimizer per block that takes gradients: the half-step's own, or the one given."""
        given = per_block(optim) if isinstance(optim, Mapping) else {GUIDE: optim, MODEL: optim}
        made = {}
        for block, step in self._slots.items():
            own = getattr(step, "optim", None)
            chosen = given.get(block) if own is None else own
            if chosen is not None or self._takes_gradients(block):
                made[block] = BlockOptimizer(chosen)
        return made

    @property
    def _slots(self) -> dict[str, HalfStep]:
        return {GUIDE: self.e_step, MODEL: self.m_step}

    def _takes_gradients(self, block: str) -> bool:
        return self.schedule == "joint" or hasattr(self._slots[block], "optim")

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Make one iteration and return minus the objective after E, before M, in nats."""
        return self._iterate(args, kwargs).loss

    def _iterate(self, args: tuple, kwargs: Mapping[str, Any]) -> Record:
        checkpoint.restore_waiting(self.engine, args, kwargs)
        if self.schedule == "joint":
            found = self.engine.step(None, args, kwargs)
            return Record(math.nan, []) if found is None else Record(found.loss, [(None, found)])
        self.engine.refresh()
        if self.engine.parameters is None:
            self._setup(args, kwargs)
        engine = self.engine
        state = self._initial(engine.state, args, kwargs)
        state, posterior, e = self.e_step.expect(engine, state, *args, **kwargs)
        engine.steps = state.steps
        state, m = self.m_step.maximise(engine, state, posterior, *args, **kwargs)
        engine.steps = state.steps
        gradients = [(GUIDE, g) for g in e.gradients] + [(MODEL, g) for g in m.gradients]
        between = m.first_loss if math.isnan(e.loss) else e.loss
        return Record(between, gradients, e.first_loss)

    def _initial(self, state: State, args: tuple, kwargs: Mapping[str, Any]) -> State:
        """Let a half-step that has no state of its own yet make one."""
        for slot, step in (("E", self.e_step), ("M", self.m_step)):
            if slot not in state.steps:
                state = state.with_own(slot, step.init(self.engine, state, *args, **kwargs))
        return state

    def run(self, *args: Any, max_iter: int | None = None, **options: Any) -> Fit:
        """Iterate: ``run(x, max_iter=300)`` or ``run(data=loader, num_epochs=20)``.

        Keyword arguments that are no option of `driver.run` go to model and guide.
        """
        if max_iter is None and "data" not in options:
            max_iter = 500
        return run_with(self.engine, self._iterate, max_iter, args, options)

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """Return the E-step's posterior on given data, theta fixed.

        With a guide of shared parameters (an amortized one) that is the guide on the data; no update is made.
        """
        checkpoint.restore_waiting(self.engine, args, kwargs)
        found = self.e_step.infer(self.model, args, kwargs)
        return GuidePosterior(self.model, self.guide, args, kwargs) if found is None else found

    def _setup(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.engine.setup(args, kwargs)
        try:
            self._check_blocks()
        except BlockError:
            self.engine.parameters = None
            raise

    def _check_blocks(self) -> None:
        rows = self.engine.parameters.rows
        shared = [row.name for row in rows if row.block == SHARED]
        if shared:
            fail(
                BlockError,
                "EM",
                f"assign {shared[0]!r} to a block",
                got=f"{len(shared)} parameters that move both log q and log p: {shared[:5]}",
                because="each half-step changes its own block only",
                fix=f'Write blocks={{"{shared[0]}": "model"}}, blocks="local/global", or schedule="joint".',
            )
        for block, what in ((GUIDE, "guide"), (MODEL, "model")):
            if self._takes_gradients(block) and not any(row.block == block for row in rows):
                fail(
                    BlockError,
                    "EM",
                    f"make {'an E' if block == GUIDE else 'an M'}-step",
                    got=f"a {what} without parameters of its own",
                    because="a half-step has to have something to change",
                    fix='Write blocks="local/global" to split the guide\'s parameters, or use SVI.',
                )
        memory = {row.leaf.data_ptr(): row.name for row in rows if row.block == MODEL and row.leaf.numel()}
        for row in rows:
            if row.block == GUIDE and row.leaf.data_ptr() in memory:
                fail(
                    BlockError,
                    "EM",
                    f"change {row.name!r} in an E-step",
                    got=f"the same memory as {memory[row.leaf.data_ptr()]!r} of the model",
                    because="each half-step changes its own block only",
                    fix="Start it from a copy: .clone() (in an autoguide: "
                    "init_loc_fn=lambda site: init_to_mean(site).clone()).",
                )


def _guide(model: Callable, guide: Callable | None, e_step: HalfStep) -> Callable:
    """Return the user's guide, or one that carries the E-step's rule."""
    if guide is not None:
        return guide
    if type(e_step).infer is HalfStep.infer:
        fail(
            StepError,
            "EM",
            "make its E-step",
            got=f"no guide, and {e_step!r}",
            because="this E-step moves a guide",
            fix="Write EM(model, guide, ...), or an E-step that needs none, such as e_step=steps.Enumerated().",
        )
    return PosteriorGuide(lambda args, kwargs: e_step.infer(model, args, kwargs))


def _step(slot: str, step: HalfStep | str | None) -> HalfStep:
    step = Gradient() if step is None else create("step", step)
    if not isinstance(step, HalfStep) or slot not in step.traits.slots:
        fail(
            StepError,
            "EM",
            f"use {step!r} as its {slot}-step",
            got=type(step).__name__,
            because=f"it takes a half-step that fits slot {slot}",
            fix=f"Write {slot.lower()}_step=steps.Gradient().",
        )
    return step
