r"""Stochastic variational inference: all parameters from one gradient, with Pyro's interface."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro.infer
import torch
from pyro.infer import ELBO

from . import checkpoint, driver, restarts
from ._checks import EmvaeError, OptimizerError, choose, fail, nearest, positive_int
from .driver import Fit, Record
from .engine import BACKENDS, POLICIES, Engine
from .history import kind_of
from .loss import MonteCarloELBO
from .optimizers import BlockOptimizer, OptimView
from .parameters import GUIDE, MODEL, Parameters

__all__ = ["SVI"]


class Inference(pyro.infer.SVI):
    """What `SVI` and `EM` share: Pyro's attributes, an engine, the options of a run."""

    engine: Engine

    def _attach(self, model: Callable, guide: Callable, loss: Any, loss_and_grads: Any, **options: Any) -> None:
        for what, function in (("model", model), ("guide", guide)):
            if not callable(function):
                fail(
                    EmvaeError,
                    type(self).__name__,
                    f"use its {what}",
                    got=repr(function),
                    because=f"a {what} is a function of the data with pyro.sample statements",
                    fix="Write SVI(model, guide, optim), with the functions themselves.",
                )
        if isinstance(loss, type) or not (isinstance(loss, ELBO) or callable(loss)):
            fail(
                EmvaeError,
                type(self).__name__,
                "use its loss",
                got=repr(loss),
                because="it takes a pyro.infer.ELBO, or a function of model, guide and data",
                fix="Write loss=MonteCarloELBO().",
            )
        choose(type(self).__name__, "backend", options["backend"], BACKENDS)
        choose(type(self).__name__, "on_nonfinite", options["on_nonfinite"], POLICIES)
        optimizers = options.pop("optimizers")
        view = OptimView({str(key): block for key, block in optimizers.items()})
        super().__init__(model, guide, view, loss, loss_and_grads)
        own = None if isinstance(loss, ELBO) else self.loss_and_grads
        self.engine = Engine(model, guide, loss, optimizers, loss_and_grads=own, **options)

    @property
    def blocks(self) -> Parameters:
        """The parameters by block: prints as parameter | shape | block | why. Known after the first step."""
        if self.engine.parameters is None:
            return Parameters(())
        return self.engine.parameters

    def save(self, path: Any) -> None:
        """Write a checkpoint: parameters, buffers, optimizers, estimators' and half-steps' state, generators.

        Raises:
            StepError: No step was taken yet.
            CheckpointError: The path cannot be written, or a part holds what cannot be stored.
        """
        checkpoint.save(self.engine, path)

    def load(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Go on from a checkpoint of `save` or of a run: values are written in place, and generators are set.

        A process that took no step yet has no parameters. They are found by the data, if some are given here, else
        at the first call with data (`step`, `run`, `evaluate_loss`); until then the model has its initial values.

        Raises:
            CheckpointError: The file is damaged, of another format or of another model; then nothing is changed.
        """
        checkpoint.load(self.engine, path, args, kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss, minus the objective in nats, without a step."""
        checkpoint.restore_waiting(self.engine, args, kwargs)
        return super().evaluate_loss(*args, **kwargs)

    def recover(self) -> None:
        """Allow further steps after a step that was not finite; parameters are as before it."""
        self.engine.recover()

    def recompile(self) -> None:
        """Forget recorded graphs, after the model was changed."""
        self.engine.recompile()


class SVI(Inference):
    r"""Drop-in for `pyro.infer.SVI`, with a run loop, one optimizer per block, and a recorded backend.

    Args:
        model, guide: Pyro callables of the same arguments.
        optim: A `pyro.optim` wrapper, a `torch.optim` class or partial, a rule of `pyro_emvae.optimizers`, or a
            mapping ``{"guide": ..., "model": ...}`` of these.
        loss: `MonteCarloELBO()` by default; any `pyro.infer.ELBO` or a callable of ``(model, guide, *args)``.
        loss_and_grads: As in Pyro.
        backend: ``"eager"``, or ``"graph"``: the gradient is recorded once as tensor operations (twice, compared) and
            run without Pyro's handlers; same generator, same numbers. The recorded step does not call the model again,
            so what Python changes later stays as it was recorded, such as an annealing factor that a callback sets.
            Each run, and now and then a step, records once more and refuses to go on if that differs; pass what
            changes as a tensor argument, as in ``svi.step(x, torch.tensor(beta))``.
        blocks: See `EM`; only needed with a mapping of optimizers.
        on_nonfinite: ``"raise"``, ``"skip"`` the update, or ``"revert"`` to the state before the last update.

    Schedulers are stepped by you, as under Pyro, and never by `step` or `run`: ``scheduler.step()`` on the `pyro.optim`
    object that you gave, per step, per epoch or in a callback of `run`, counts from the next step on. Before the first
    step there is nothing to schedule. ``svi.optim.step()`` does the same for all blocks; call one of the two.

    A `pyro.optim` object is linked: its ``optim_objs``, ``get_state()`` and ``save()`` have the live state of each
    parameter, and what is given to its ``set_state()`` or ``load()`` counts from the next step on (under Pyro, only for
    parameters that have not been stepped yet). Objects that share it share the state of common parameters. A class, a
    partial or a rule has no state of its own: use ``svi.optim``.

    `step` returns minus the objective as a float, the first value of a loss that has several (`ReweightedWakeSleep`).
    After an error for a non-finite value nothing has changed, and further steps are refused until `recover` is called.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x): pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
        >>> def guide(x): pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.7))
        >>> pyro.clear_param_store()
        >>> fit = SVI(model, guide, pyro.optim.Adam({"lr": 0.05})).run(200, torch.tensor(1.0), seed=0)
        >>> fit.status, round(float(fit.params["loc"]), 1)
        ('MAX_ITER', 0.5)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any = None,
        loss_and_grads: Callable | None = None,
        *,
        backend: str = "eager",
        blocks: Any = None,
        on_nonfinite: str = "raise",
    ) -> None:
        given = per_block(optim) if isinstance(optim, Mapping) else {None: optim}
        optimizers = {block: BlockOptimizer(chosen) for block, chosen in given.items()}
        self._attach(
            model,
            guide,
            MonteCarloELBO() if loss is None else loss,
            loss_and_grads,
            optimizers=optimizers,
            backend=backend,
            blocks=blocks,
            on_nonfinite=on_nonfinite,
        )

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step on all parameters and return the loss, minus the objective in nats."""
        return self._iterate(args, kwargs).loss

    def _iterate(self, args: tuple, kwargs: Mapping[str, Any]) -> Record:
        checkpoint.restore_waiting(self.engine, args, kwargs)
        found = self.engine.step(None, args, kwargs)
        if found is None:
            return Record(math.nan, [])
        return Record(found.loss, [(None, found)], kind=kind_of(self.engine.loss))

    def run(
        self,
        num_steps: int | None = None,
        *args: Any,
        n_init: int = 1,
        init: str | Callable[..., Mapping[str, Any]] = "mixed",
        **options: Any,
    ) -> Fit:
        r"""Take many steps: ``run(10_000, x)`` or ``run(data=loader, num_epochs=20)``.

        Args:
            num_steps: Steps on data that are arguments.
            args: The data. Keyword arguments that are no option of `driver.run` go to model and guide as well.
            n_init: Starts, of guide and model. Each makes a twentieth of the steps (10 at least; with a loader, of the
                epochs), then they are compared by the loss on common random numbers, and the best goes on to the end:
                see `restarts.Search`. The table of all is ``fit.restarts``.
            init: ``init(seed)`` or ``init(seed, *data)``, which returns initial values by name, constrained, for a
                start. By default start 0 has the present values, and the others these with noise: see
                `restarts.Initial`. One start has the present values unless `init` is a function.
            options: Those of `driver.run`.
        """
        if num_steps is not None:
            positive_int("SVI.run", "num_steps", num_steps)

        def run(number: int | None, one: Callable | None = None, **changed: Any) -> Fit:
            fit = run_with(self.engine, one or self._iterate, number, args, options | changed)
            return dataclasses.replace(fit, inference=self)

        if positive_int("SVI.run", "n_init", n_init) == 1 and not callable(init):
            restarts.check(init)
            return run(num_steps)
        first = restarts.first_batch(args, model_arguments(options), options)
        checkpoint.restore_waiting(self.engine, *first)
        self.engine.refresh()
        self.engine.setup(*first)
        return restarts.find(self.engine, run, num_steps, n_init, init, options, first)


def per_block(
    optim: Mapping[str, Any],
    owner: str = "SVI",
    needed: Iterable[str] = (GUIDE, MODEL),
    blocks: Iterable[str] = (GUIDE, MODEL),
) -> dict[str, Any]:
    """Return the optimizer of each block, None where there is none and none is needed; other keys are refused."""
    unknown = [key for key in optim if key not in blocks]
    if unknown:
        fail(
            OptimizerError,
            "optim",
            f"be the mapping {dict(optim)}",
            got=f"the key {unknown[0]!r}",
            because="a mapping gives one optimizer to each block",
            fix='Write {"guide": ..., "model": ...}; arguments go into each, as in pyro.optim.Adam({"lr": 1e-3}).',
        )
    missing = [block for block in needed if optim.get(block) is None]
    if missing:
        fail(
            OptimizerError,
            owner,
            f"update the {missing[0]}'s parameters",
            got=f"a mapping of optimizers that lacks {missing[0]!r}, with {dict(optim)}",
            because="a mapping names the optimizer of each block that takes gradient steps",
            fix='Write {"guide": ..., "model": pyro.optim.Adam({"lr": 1e-3})}, or one optimizer for both blocks.',
        )
    return {block: optim.get(block) for block in blocks}


OPTIONS = (
    "data",
    "num_epochs",
    "to_args",
    "validation",
    "every",
    "callbacks",
    "on_nonfinite",
    "progress_bar",
    "device",
    "seed",
    "track",
    "stop",
    "on_decrease",
    "checkpoint",
    "resume",
    "anneal",
)


MEANT = {
    "tol": "Write stop=convergence.Deterministic(tol=1e-6).",
    "num_steps": "Write max_iter=300: EM counts iterations.",
    "max_iter": "Write run(1000, x): SVI counts steps.",
    "history": "EM alone looks at its half-steps one by one.",
    "accelerate": "EM alone has a map to accelerate.",
    "batch_size": "Pass batches: run(data=DataLoader(TensorDataset(x), batch_size=128), num_epochs=10).",
    "random_state": "Write seed=0.",
    "verbose": "Write progress_bar=True.",
}


def _check_names(model: Callable, kwargs: Mapping[str, Any]) -> None:
    """Refuse a keyword argument that the model does not take, or that is nearly an option of the run."""
    called = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        signatures = [inspect.signature(called, follow_wrapped=follow).parameters for follow in (True, False)]
    except (TypeError, ValueError):
        return
    known = signatures[0]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in kwargs:
        near = difflib.get_close_matches(name, OPTIONS, 1, 0.8)
        if any(name in known for known in signatures) or (takes_any and not near):
            continue
        fail(
            EmvaeError,
            "run",
            f"pass {name!r} to the model",
            got=f"a model of parameters {list(known)}",
            because="keyword arguments that are no option go to model and guide",
            fix=f"Did you mean {near[0]!r}?" if near else MEANT.get(name, nearest(name, OPTIONS)),
        )


def takes(model: Callable, args: tuple) -> bool:
    """Whether a model may be called with so many positional arguments, as far as its signature tells."""
    try:
        inspect.signature(model).bind_partial(*args)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def run_with(
    engine: Engine, iterate: Callable, number: int | None, args: tuple, options: dict[str, Any], **fixed: Any
) -> Fit:
    """Split the options of a run from the keyword arguments of the model, and run."""
    mine, kwargs = {k: options[k] for k in OPTIONS if k in options}, model_arguments(options)
    _check_names(engine.model, kwargs)
    return driver.run(engine, iterate, number, args, kwargs, **mine, **fixed)


def model_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of model and guide."""
    return {k: v for k, v in options.items() if k not in OPTIONS}
