r"""Expectation maximisation: an E-like step over the guide's parameters, an M-like step over the model's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, restarts
from ._checks import BlockError, CheckpointError, EmvaeError, StepError, fail, positive_int
from ._registry import create
from .acceleration import Squarem
from .convergence import Deterministic
from .driver import Fit, Record
from .engine import Engine, State, choose
from .loss import MonteCarloELBO
from .optimizers import BlockOptimizer
from .parameters import GUIDE, MODEL, SHARED, assign
from .particles import quiet
from .posterior import GuidePosterior, Posterior, PosteriorGuide
from .steps import Gradient, HalfStep
from .svi import Inference, model_arguments, per_block, run_with

__all__ = ["EM"]


class EM(Inference):
    r"""Alternate two half-steps on one objective.

    $$\text{E: } \phi\leftarrow\arg\text{raise}_\phi\,L(\phi,\theta),\qquad
      \text{M: } \theta\leftarrow\arg\text{raise}_\theta\,L(\phi,\theta).$$

    By default one gradient update each; the M-step sees the updated phi. One optimizer per block: an E-step leaves
    theta and the model's buffers bit-for-bit alone, an M-step phi's, momentum or not. Schedulers are stepped by you, as
    for `SVI`: ``scheduler.step()`` moves the rates of the blocks that were given it, of both if it is one for both;
    ``em.optim.step()`` those of all blocks.

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
        own = {block: getattr(step, "optim", None) for block, step in self._slots.items()}
        needed = [block for block in own if own[block] is None and self._takes_gradients(block)]
        given = per_block(optim, "EM", needed) if isinstance(optim, Mapping) else {GUIDE: optim, MODEL: optim}
        chosen = {block: given[block] if own[block] is None else own[block] for block in own}
        return {block: BlockOptimizer(o) for block, o in chosen.items() if o is not None or block in needed}

    @property
    def _slots(self) -> dict[str, HalfStep]:
        return {GUIDE: self.e_step, MODEL: self.m_step}

    def _takes_gradients(self, block: str) -> bool:
        return self.schedule == "joint" or hasattr(self._slots[block], "optim")

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Make one iteration and return minus the objective after E, before M, in nats.

        If the M-step fails because something is not finite, the E-step before it stands.
        """
        return self._iterate(args, kwargs).loss

    def _iterate(self, args: tuple, kwargs: Mapping[str, Any], look: _Look | None = None) -> Record:
        if self.schedule == "joint":
            checkpoint.restore_waiting(self.engine, args, kwargs)
            found = self.engine.step(None, args, kwargs)
            return Record(math.nan, []) if found is None else Record(found.loss, [(None, found)])
        self._prepare(args, kwargs)
        engine = self.engine
        state = self._initial(engine.state, args, kwargs)
        before = look.before(args, kwargs) if look else math.nan
        state, posterior, e = self.e_step.expect(engine, state, *args, **kwargs)
        engine.steps = state.steps
        between = look(posterior) if look else math.nan
        state, m = self.m_step.maximise(engine, state, posterior, *args, **kwargs)
        engine.steps = state.steps
        gradients = [(GUIDE, g) for g in e.gradients] + [(MODEL, g) for g in m.gradients]
        if look:
            return Record(between, gradients, before, look(posterior))
        between = m.first_loss if math.isnan(e.loss) else e.loss
        return Record(between, gradients, e.first_loss)

    def _prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        checkpoint.restore_waiting(self.engine, args, kwargs)
        self.engine.refresh()
        if self.engine.parameters is None:
            self._setup(args, kwargs)

    def _evaluate(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """Return minus the objective after an exact E-step at the present theta."""
        state = self._initial(self.engine.state, args, kwargs)
        with quiet():
            return self.e_step.expect(self.engine, state, *args, **kwargs)[2].loss

    @property
    def is_exact(self) -> bool:
        """Whether both half-steps are exact, so that no iteration on the same data can lower the objective."""
        return self.schedule == "alternating" and all(step.traits.exact for step in self._slots.values())

    @property
    def is_deterministic(self) -> bool:
        """Whether no iteration on the same data can lower the objective, exact or not."""
        return self.is_exact or (
            self.e_step.traits.deterministic and self.m_step.traits.exact and self.schedule == "alternating"
        )

    def _initial(self, state: State, args: tuple, kwargs: Mapping[str, Any]) -> State:
        """Let a half-step that has no state of its own yet make one."""
        for slot, step in (("E", self.e_step), ("M", self.m_step)):
            if slot not in state.steps:
                state = state.with_own(slot, step.init(self.engine, state, *args, **kwargs))
        return state

    def run(
        self,
        *args: Any,
        max_iter: int | None = None,
        stop: Any = "auto",
        on_decrease: str | None = None,
        accelerate: str | None = None,
        history: str = "light",
        n_init: int = 1,
        init: Callable[[int], Mapping[str, Tensor]] | None = None,
        **options: Any,
    ) -> Fit:
        r"""Iterate: ``run(x, max_iter=300)`` or ``run(data=loader, num_epochs=20)``.

        Args:
            args: The data. Keyword arguments that are no option of `driver.run` go to model and guide as well.
            max_iter: Iterations at most; 500 by default on data that are arguments.
            stop: A rule of `convergence`, or None to make all iterations. ``"auto"``: `convergence.Deterministic` where
                both half-steps are exact and each iteration sees all data; none otherwise, for the values of a
                stochastic run say little about what is left, and how long to go on is then your decision:
                ``stop=convergence.Windowed(...)``. A run that reached `max_iter` is never CONVERGED.
            on_decrease: What to do if exact half-steps lower the objective beyond rounding: ``"raise"``, ``"warn"`` or
                ``"revert"`` to the parameters before. By default raise in float64 and warn in lower precision.
            accelerate: ``"squarem"``: each iteration is a cycle of three evaluations of the EM map
                (`acceleration.Squarem`), for exact half-steps.
            history: ``"light"`` costs no model run, and leaves what was not computed NaN; ``"full"`` evaluates the
                objective before E, after E and after M on common random numbers.
            n_init: Starts; with more than one, see `restarts.run`. The table of all is ``fit.restarts``.
            init: ``init(seed) -> dict`` of initial values of the model's parameters, constrained, for a start. By
                default start 0 has the present values, and the others what the M-step finds from the data (the ready
                steps for mixtures do), or else the present values with noise.
            options: Those of `driver.run`.

        Raises:
            StepError: The objective of exact half-steps went down; `accelerate` or `n_init` with half-steps that they
                do not fit.
            CheckpointError: `checkpoint` with `n_init`.
        """
        if args and isinstance(args[0], int) and not isinstance(args[0], bool) and max_iter is None:
            fail(
                EmvaeError,
                "EM",
                f"run on {args[0]!r}",
                got="a whole number as the first datum",
                because="run takes the data first, and the number of iterations by name",
                fix=f"Write em.run(x, max_iter={args[0]}).",
            )
        if max_iter is None and "data" not in options:
            max_iter = 500
        if accelerate and (stop == "auto" or isinstance(stop, Deterministic)):
            stop = dataclasses.replace(Deterministic() if stop == "auto" else stop, stride=2)
        fixed = {"stop": stop, "on_decrease": on_decrease, "exact": self.is_deterministic, "evaluate": self._evaluate}
        iterate = self._iterations(accelerate, history, args, options)

        def run(number: int | None, **changed: Any) -> Fit:
            fit = run_with(self.engine, iterate(), number, args, options | changed, **fixed)
            return dataclasses.replace(fit, inference=self)

        if positive_int("EM.run", "n_init", n_init) == 1:
            if init is not None:
                self._prepare(args, model_arguments(options))
                assign(self.engine.parameters, init(options.get("seed") or 0))
            return run(max_iter)
        self._refuse("n_init", "data" in options or any(map(self._takes_gradients, self._slots)))
        _refuse_checkpoint(n_init, options.get("checkpoint"))
        self._prepare(args, model_arguments(options))
        return restarts.run(self.engine, run, max_iter, n_init, self._starts(init, args, options), options.get("seed"))

    def _starts(
        self, init: Callable[[int], Mapping[str, Tensor]] | None, args: tuple, options: Mapping[str, Any]
    ) -> Callable[[int, int], Mapping[str, Tensor] | None]:
        """Return what gives the values of a start, by its number and seed; None: present ones, with noise unless 0."""
        if init is not None:
            return lambda number, seed: init(seed)
        found, kwargs = getattr(self.m_step, "start", None), model_arguments(options)
        if found is None:
            return lambda number, seed: None
        params = self.engine.parameters.constrained()
        return lambda number, seed: found(seed, params, *args, **kwargs) if number else None

    def _iterations(
        self, accelerate: str | None, history: str, args: tuple, options: Mapping[str, Any]
    ) -> Callable[[], Callable[[tuple, Mapping[str, Any]], Record]]:
        """Return what makes the function of one iteration, anew for each run."""
        choose("history", history, ("light", "full"))
        if accelerate is not None:
            choose("accelerate", accelerate, ("squarem",))
            self._refuse("accelerate", not self.is_exact or "data" in options)
            self._prepare(args, model_arguments(options))
            self._refuse("accelerate", self.engine.parameters.subsampled)
            return lambda: Squarem(self.engine, self._iterate)
        if history == "full":
            return lambda: _Full(self)
        return lambda: self._iterate

    def _refuse(self, option: str, misfit: bool) -> None:
        if misfit:
            fail(
                StepError,
                "EM",
                f"run with {option}",
                got=f"e_step={self.e_step!r}, m_step={self.m_step!r}",
                because="it takes half-steps without gradients, and all data as arguments",
                fix=f"Leave {option} out, or use steps such as steps.Enumerated() and steps.ClosedForm(...).",
            )

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """Return the E-step's posterior on given data, theta fixed.

        With a guide of shared parameters (an amortized one) that is the guide on the data; no update is made.
        """
        checkpoint.restore_waiting(self.engine, args, kwargs)
        given = {"guide": self.guide} if self.e_step.traits.needs_guide else {}
        found = self.e_step.infer(self.model, args, kwargs, **given)
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


class _Look:
    r"""The loss of a posterior at the present parameters, on common random numbers; changes nothing."""

    def __init__(self, engine: Engine, num_particles: int = 100) -> None:
        self.engine, self.num_particles = engine, num_particles
        self.last = math.nan

    def before(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """Return the loss before E: of the guide as it stands, or what the last iteration left."""
        if isinstance(self.engine.guide, PosteriorGuide):
            return self.last
        return self(GuidePosterior(self.engine.model, self.engine.guide, args, kwargs))

    def __call__(self, posterior: Posterior) -> float:
        with quiet(seed=0), torch.no_grad():
            if isinstance(posterior, GuidePosterior):
                loss = self.engine.loss if hasattr(self.engine.loss, "loss") else MonteCarloELBO()
                self.last = float(loss.loss(self.engine.model, self.engine.guide, *posterior.args, **posterior.kwargs))
            else:
                self.last = -float(posterior.expected_log_joint(self.num_particles)) - posterior.entropy
        return self.last


class _Full:
    """Iterations with the objective before E, after E and after M."""

    def __init__(self, em: EM) -> None:
        self.iterate, self.look = em._iterate, _Look(em.engine)

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> Record:
        return self.iterate(args, kwargs, look=self.look)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss that the last iteration left."""
        return {"last": self.look.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the loss that the last iteration of a run that was cut left."""
        self.look.last = state["last"]


def _refuse_checkpoint(n_init: int, path: Any) -> None:
    if path is not None:
        fail(
            CheckpointError,
            "EM",
            f"run with checkpoint={str(path)!r}",
            got=f"n_init={n_init}",
            because="a file holds one run, and many starts are many runs",
            fix="Leave checkpoint out, or find the start first: EM.run(x, n_init=10, max_iter=20), then EM.run(x, "
            "checkpoint=path), which goes on from the best.",
        )


def _guide(model: Callable, guide: Callable | None, e_step: HalfStep) -> Callable:
    """Return the user's guide, or one that carries the E-step's rule."""
    if guide is not None:
        return guide
    if type(e_step).infer is HalfStep.infer or e_step.traits.needs_guide:
        fail(
            StepError,
            "EM",
            "make its E-step",
            got=f"no guide, and {e_step!r}",
            because="this E-step moves a guide or draws from it",
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
