r"""Expectation maximisation: an E-like step over the guide's parameters, an M-like step over the model's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from . import checkpoint, restarts
from ._checks import BlockError, EmvaeError, StepError, choose, fail, positive_int, refuse_missing, require_data
from ._registry import Traits
from .acceleration import Squarem
from .convergence import Deterministic
from .degeneracy import spike
from .driver import Fit
from .engine import State
from .growth import check_growth, grown
from .history import Record, kind_of
from .looks import FullHistory, Look
from .loss import MonteCarloELBO
from .optimizers import BlockOptimizer
from .parameters import SIDES
from .particles import quiet
from .posterior import GuidePosterior, Posterior, PosteriorGuide
from .slices import Slices, Whole, arranged
from .steps import Gradient, HalfStep, MonteCarlo, Phase
from .steps.phase import check_blocks, read_phases, summarised
from .svi import Inference, model_arguments, per_block, run_with, takes

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
        steps: In place of both, any number of phases, made one after the other: pairs of block and half-step, or
            `steps.Phase`, such as ``[("guide", "gradient"), ("model", ClosedForm(...)), ("decoder", "gradient")]``. A
            phase changes its own block; each M-step takes the posterior of the last E-step before it. A block may have
            several phases, and each block has one: what is to stay as it is, is put into block ``"unused"``.
        schedule: ``"alternating"``, or ``"joint"``: both blocks from the same draws at the same parameters, which is
            `SVI.step`, and the variational autoencoder.
        blocks: How parameters are assigned: None (by what they move), ``"local/global"``, a mapping from name or
            regular expression to block, such as ``{"net.*": "decoder"}``, a regular expression of the guide's names,
            or a callable.
        backend, on_nonfinite: As for `SVI`.

    Raises:
        BlockError: A parameter that moves both log q and log p; a model or a guide without parameters; a phase without
            a block of its own, or a block without a phase.

    Source: Dempster, Laird and Rubin 1977; Neal and Hinton 1998, for the alternation on one objective; Meng and Rubin
    1993 for more than two phases.

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
        steps: Iterable[Any] | None = None,
        schedule: str = "alternating",
        blocks: Any = None,
        backend: str = "eager",
        on_nonfinite: str = "raise",
    ) -> None:
        self.schedule = choose("EM", "schedule", schedule, ("alternating", "joint"))
        given = {"e_step": e_step, "m_step": m_step, "steps": steps}
        if schedule == "joint" and any(step is not None for step in given.values()):
            fail(
                StepError,
                "EM",
                "make joint steps",
                got=f"{[name for name, step in given.items() if step is not None]} with schedule='joint'",
                because="a joint step updates all blocks at once, from one gradient",
                fix="Leave one of the two out.",
            )
        self.phases = read_phases(e_step, m_step, steps)
        if getattr(self.e_step, "growth", None) is not None:
            check_growth(self.phases)
        guide = _guide(model, guide, self.e_step)
        self._attach(
            model,
            guide,
            MonteCarloELBO() if loss is None else loss,
            loss_and_grads,
            optimizers=self._optimizers(optim),
            blocks=blocks,
            sides={phase.block: phase.side for phase in self.phases} | SIDES,
            backend=backend,
            on_nonfinite=on_nonfinite,
        )
        self.engine.half_steps = {} if schedule == "joint" else {phase.key: phase.step for phase in self.phases}

    @property
    def _e_phase(self) -> Phase:
        return [phase for phase in self.phases if phase.slot == "E"][-1]

    @property
    def _m_phase(self) -> Phase:
        return next(phase for phase in self.phases if phase.slot == "M")

    @property
    def e_step(self) -> HalfStep:
        """The last E-step of an iteration, which `posterior` makes."""
        return self._e_phase.step

    @e_step.setter
    def e_step(self, step: HalfStep) -> None:
        self._exchange(self._e_phase, step)

    @property
    def m_step(self) -> HalfStep:
        """The first M-step of an iteration."""
        return self._m_phase.step

    @m_step.setter
    def m_step(self, step: HalfStep) -> None:
        self._exchange(self._m_phase, step)

    def _exchange(self, old: Phase, step: HalfStep) -> None:
        self.phases = tuple(dataclasses.replace(p, step=step) if p is old else p for p in self.phases)
        self.engine.half_steps = {phase.key: phase.step for phase in self.phases}

    def _optimizers(self, optim: Any) -> dict[str, BlockOptimizer]:
        """Make one optimizer per block that takes gradients: the half-step's own, or the one given."""
        own: dict[str, Any] = {}
        for phase in self.phases:
            mine = getattr(phase.step, "optim", None)
            own[phase.block] = own.get(phase.block) if mine is None else mine
        needed = [p.block for p in self.phases if own[p.block] is None and self._takes_gradients(p)]
        given = per_block(optim, "EM", needed, own) if isinstance(optim, Mapping) else dict.fromkeys(own, optim)
        chosen = {block: given[block] if own[block] is None else own[block] for block in own}
        return {block: BlockOptimizer(o) for block, o in chosen.items() if o is not None or block in needed}

    def _takes_gradients(self, phase: Phase) -> bool:
        return self.schedule == "joint" or phase.takes_gradients

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Make one iteration and return minus the objective after E, before M, in nats.

        If the M-step fails because something is not finite, the E-step before it stands.
        """
        return self._iterate(args, kwargs).loss

    def _iterate(self, args: tuple, kwargs: Mapping[str, Any], look: Look | None = None) -> Record:
        rule = getattr(self.e_step, "growth", None)
        if rule is None or self.schedule == "joint":
            return self._once(args, kwargs, look)[0]
        self._prepare(args, kwargs)
        return grown(self.engine, self._once, self._e_phase.key, rule, args, kwargs, look=look)

    def _once(
        self, args: tuple, kwargs: Mapping[str, Any], look: Look | None = None
    ) -> tuple[Record, Posterior | None]:
        """Make each phase once; return what the last M-step was given as well."""
        if self.schedule == "joint":
            checkpoint.restore_waiting(self.engine, args, kwargs)
            found = self.engine.step(None, args, kwargs)
            if found is None:
                return Record(math.nan, []), None
            return Record(found.loss, [(None, found)], kind=kind_of(self.engine.loss)), None
        self._prepare(args, kwargs)
        state = self._initial(self.engine.state, args, kwargs)
        seen = [look.before(args, kwargs)] if look else []
        posterior, infos = None, []
        try:
            for phase in self.phases:
                state, posterior, info = phase.run(self.engine, state, posterior, args, kwargs)
                self.engine.steps = state.steps
                infos.append(info)
                seen += [look(posterior)] if look else []
        except ValueError as error:
            if not isinstance(error, EmvaeError):
                refuse_missing("EM", error, args, kwargs)
            raise
        return summarised(self.phases, infos, seen), posterior

    def _prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        require_data("EM", args, kwargs)
        checkpoint.restore_waiting(self.engine, args, kwargs)
        self.engine.refresh()
        if self.engine.parameters is None:
            self._setup(args, kwargs)

    def _evaluate(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """Return minus the objective after an exact E-step at the present theta."""
        state = self._initial(self.engine.state, args, kwargs)
        with quiet():
            return self._e_phase.run(self.engine, state, None, args, kwargs)[2].loss

    def _screen(self, args: tuple, kwargs: Mapping[str, Any]) -> str:
        """Return what says that theta is no maximum of the likelihood, whose slopes are those of Q (Fisher)."""
        posterior = functools.cache(lambda: self.posterior(*args, **kwargs))
        with quiet():
            return spike(self.engine.parameters, lambda: posterior().expected_log_joint(100))

    @property
    def is_exact(self) -> bool:
        """Whether all half-steps are exact."""
        return self._all(lambda traits: traits.exact)

    @property
    def is_deterministic(self) -> bool:
        """Whether no half-step draws, so that the objective is a function of the parameters."""
        return self._all(lambda traits: traits.exact or traits.deterministic)

    @property
    def is_monotone(self) -> bool:
        """Whether no iteration on the same data can lower the objective."""
        return self.is_deterministic and self._all(lambda traits: traits.exact or traits.monotone)

    def _all(self, holds: Callable[[Traits], bool]) -> bool:
        return self.schedule == "alternating" and all(holds(phase.step.traits) for phase in self.phases)

    def _initial(self, state: State, args: tuple, kwargs: Mapping[str, Any]) -> State:
        """Let a half-step that has no state of its own yet make one."""
        for phase in self.phases:
            state = phase.begin(self.engine, state, args, kwargs)
        return state

    def run(
        self,
        *args: Any,
        max_iter: int | None = None,
        stop: Any = "auto",
        on_decrease: str | None = None,
        accelerate: str | None = None,
        batch_size: int | str | None = "auto",
        history: str = "light",
        n_init: int = 1,
        init: str | Callable[..., Mapping[str, Tensor]] = "mixed",
        **options: Any,
    ) -> Fit:
        r"""Iterate: ``run(x, max_iter=300)`` or ``run(data=loader, num_epochs=20)``.

        Args:
            args: The data, all of them: a number behind them is the model's, if it takes one more argument. Keyword
                arguments that are no option of `driver.run` go to model and guide as well.
            max_iter: Iterations at most, by name; 500 by default on data that are arguments.
            stop: A rule of `convergence`, or None to make all iterations. ``"auto"``: `convergence.Deterministic` where
                no half-step draws and each iteration sees all data; a Monte Carlo E-step's own rule (``growth=``) if it
                has one; none otherwise, for the values of a stochastic run say little about what is left, and how long
                to go on is then your decision: ``stop=convergence.Windowed(...)``. A run that reached `max_iter` is
                never CONVERGED.
            on_decrease: What to do if exact half-steps lower the objective beyond rounding: ``"raise"``, ``"warn"`` or
                ``"revert"`` to the parameters before. By default raise in float64 and warn in lower precision.
            accelerate: ``"squarem"``: each iteration is a cycle of three evaluations of the EM map
                (`acceleration.Squarem`), for exact half-steps.
            batch_size: Data per slice, at most: E-step and statistics are made slice by slice, and the update once,
                with the result of the whole. That saves memory and, as temporaries fit into the cache, time. For an
                exact E-step and M-steps in closed form; what is data, and what is verified: see `slices.Slices`.
                ``"auto"``: slices of 1024 to 16384 data, where there are at least 20,000 on the CPU and slices are
                found to add up to the whole (see `slices.Automatic`); not with a loader, ``anneal=``, ``device=``,
                full history, or starts that run side by side. ``fit.provenance["slices"]`` says what was done, and
                why. None: no slices.
            history: ``"light"`` costs no model run, and leaves what was not computed NaN; ``"full"`` evaluates the
                objective before E, after E and after M on common random numbers.
            n_init: Starts; with more than one, see `restarts.Search`. The table of all is ``fit.restarts``. Of exact
                half-steps the best third goes on after 10 iterations, of others the best one after a twentieth.
            init: ``init(seed)`` or ``init(seed, *data)``, which returns initial values by name, constrained, for a
                start; ``"mixed"`` or ``"noise"``: see `restarts.Initial`. One start has the present values unless
                `init` is a function.
            options: Those of `driver.run`.

        Raises:
            StepError: The objective of exact half-steps went down; `accelerate` with half-steps that it does not fit;
                all starts failed.
        """
        if max_iter is None:
            self._refuse_a_number(args)
            max_iter = None if "data" in options else 500
        else:
            positive_int("EM.run", "max_iter", max_iter)
        if accelerate and (stop == "auto" or isinstance(stop, Deterministic)):
            stop = dataclasses.replace(Deterministic() if stop == "auto" else stop, stride=2)
        unfit = {"data=": "data" in options, "history='full'": history == "full"}
        unfit["anneal="] = options.get("anneal") is not None
        whole = Whole(self._prepare, self._iterate, self._evaluate, self._screen)
        other = {"device=": options.get("device") is not None, "starts side by side": n_init != 1 and not accelerate}
        named, call = next((name for name, so in (unfit | other).items() if so), ""), (args, model_arguments(options))
        once = arranged(batch_size, self.engine, self.phases, whole, call, named)
        sliced = isinstance(once, Slices)
        self._refuse("batch_size", sliced and any(unfit.values()))
        fixed = {"stop": stop, "on_decrease": on_decrease, "evaluate": once.evaluate, "screen": once.screen}
        fixed |= {"deterministic": self.is_deterministic, "monotone": self.is_monotone, "norms": True}
        self._check_run(options, {"accelerate": accelerate, "n_init": n_init != 1})
        iterate = self._iterations(accelerate, history, once, functools.partial(once.begin, *call), "data" in options)

        def run(number: int | None, one: Callable | None = None, **changed: Any) -> Fit:
            fit = run_with(self.engine, one or iterate(), number, args, options | changed, **fixed)
            fit.provenance["slices"] = once.says
            return dataclasses.replace(fit, inference=self)

        if positive_int("EM.run", "n_init", n_init) == 1 and not callable(init):
            restarts.check(init)
            return run(max_iter)
        first = restarts.first_batch(args, model_arguments(options), options)
        once.begin(*first)
        asked = {"accelerate=": accelerate, "batch_size=": sliced, "history='full'": history == "full"}
        found = self._search(first, next((what for what, so in asked.items() if so), ""), "data" in options)
        return restarts.find(self.engine, run, max_iter, n_init, init, options, first, **found)

    def _refuse_a_number(self, args: tuple) -> None:
        """Refuse a whole number that is meant as `max_iter`: the first datum, or one too many for the model."""
        for place in {0, len(args) - 1} if args else ():
            fits = place > 0 and takes(self.engine.model, args)
            if isinstance(args[place], int) and not isinstance(args[place], bool) and not fits:
                fail(
                    EmvaeError,
                    "EM",
                    f"run on {args[place]!r}",
                    got="a whole number as " + ("one datum more than the model takes" if place else "the first datum"),
                    because="run takes the data first, and the number of iterations by name",
                    fix=f"Write em.run(x, max_iter={args[place]}).",
                )

    def _search(self, first: tuple, alone: str, loader: bool) -> dict[str, Any]:
        """Return how starts are found and compared, and run side by side unless `alone` says why not."""
        exact, (args, kwargs) = self.is_exact and not self.engine.parameters.subsampled, first
        found = {"start": getattr(self.m_step, "start", None), "exact": exact}
        if not exact and self.e_step.traits.exact and self.schedule == "alternating":
            found["objective"] = lambda fit: -self._evaluate(args, kwargs)
        elif self.is_deterministic and not loader:
            found["objective"] = lambda fit: fit.objective
        elif not exact and not self._e_phase.takes_gradients:
            found["objective"] = restarts.recent
        reason = alone or ("" if exact else "half-steps that are not exact")
        return found | {"iterate": None if reason else self._iterate, "reason": reason}

    def _iterations(
        self, accelerate: str | None, history: str, once: Callable[..., Record], begin: Callable, loader: bool
    ) -> Callable[[], Callable[[tuple, Mapping[str, Any]], Record]]:
        """Return what makes the function of one iteration, anew for each run; `begin` sets up."""
        choose("EM.run", "history", history, ("light", "full"))
        if accelerate is not None:
            choose("EM.run", "accelerate", accelerate, ("squarem",))
            self._refuse("accelerate", not self.is_exact or loader)
            begin()
            self._refuse("accelerate", self.engine.parameters.subsampled)
            return lambda: Squarem(self.engine, once)
        if history == "full":
            return lambda: FullHistory(self.engine, once)
        return lambda: once

    def _check_run(self, options: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        """Refuse options that the half-steps do not go with."""
        grows = getattr(self.e_step, "growth", None) is not None
        self._refuse("data", grows and "data" in options)
        if options.get("validation") is not None:
            self._check_validation()
        if options.get("anneal") is not None:
            self._check_annealing({**asked, "growth": grows})

    def _check_annealing(self, asked: Mapping[str, Any]) -> None:
        """Refuse what does not go with a factor; steps that cannot have one say so when they are made."""
        steps = [p.step for p in self.phases if p.slot == "E" and (p.takes_gradients or p.step.traits.free_guide)]
        unfit = [step for step in steps if not (isinstance(step, Gradient) or step.traits.tempers)]
        for name, misfit in (asked | {repr(unfit): unfit}).items():
            if misfit:
                fail(
                    StepError,
                    "EM",
                    "anneal",
                    got=f"anneal= with {name}",
                    because="the factor changes the objective of each iteration, and what takes it has to know",
                    fix="Leave one of the two out, or use steps.Enumerated(), Gaussian(), MonteCarlo() or Gradient().",
                )

    def _check_validation(self) -> None:
        if not getattr(self.guide, "has_density", True):
            fail(
                StepError,
                "EM",
                "take the objective of held-out data",
                got=f"validation= with {self.e_step!r}",
                because="the density of its draws is not known, so that they have no ELBO",
                fix="Leave validation= out, and write emvae.log_evidence(em.model, em.guide, held_out).",
            )

    def _refuse(self, option: str, misfit: bool) -> None:
        if misfit:
            fail(
                StepError,
                "EM",
                f"run with {option}",
                got=f"phases {list(self.phases)}",
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
        check_blocks(self.phases, self.engine.parameters, [p.block for p in self.phases if self._takes_gradients(p)])


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
    has_density = not isinstance(e_step, MonteCarlo)
    return PosteriorGuide(lambda args, kwargs: e_step.propose(model, args, kwargs), has_density)
