r"""An iteration of EM in slices of the data: statistics add up, so one slice at a time is enough."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import DataError, StepError, fail, positive_int
from .degeneracy import spike
from .engine import Engine, State
from .engine.data import map_tensors, tensors_of
from .history import Record
from .particles import quiet
from .posterior import Posterior
from .steps import ClosedForm, Phase
from .steps.closed_form import Summed
from .steps.phase import summarised

__all__ = ["Slices"]

Call = tuple[tuple, dict[str, Any]]
CHECKED = 500


class Slices:
    r"""EM iterations that take the data a slice at a time, and update once.

    $$\sum_nE[s(x_n,z_n)\,|\,x_n]=\sum_{\text{slices}}\;\sum_{n\in\text{slice}}E[s(x_n,z_n)\,|\,x_n].$$

    The E-step and its statistics are made slice by slice and then forgotten, so that temporaries have the size of a
    slice, which also keeps them in the cache. The result is that of the whole up to the order of summation.

    The data are the first tensor among the arguments and all others of the same length; everything else goes to the
    model as it is. Whether data are independent, so that the log evidence of slices adds up, is verified on the first
    two slices (of 500 at most) before the first iteration: theirs and their statistics have to add up to those of both
    together.

    Args:
        engine: What the iterations change.
        phases: One exact E-step, then M-steps in closed form.
        prepare: Sets the engine up on given arguments.
        batch_size: Data in a slice, at most.

    Raises:
        StepError: Other half-steps; a model whose data depend on each other, or that has another number of them built
            in.
        DataError: No tensor among the arguments.

    Source: Neal and Hinton 1998, section 5, for sums of statistics over blocks of data.
    """

    def __init__(
        self, engine: Engine, phases: tuple[Phase, ...], prepare: Callable[[tuple, Mapping], None], batch_size: int
    ) -> None:
        self.batch_size = positive_int("EM.run", "batch_size", batch_size)
        self.engine, self.prepare, self.verified, self.iteration = engine, prepare, False, 0
        self.e_phase, *self.m_phases = phases
        self.closed = [getattr(phase.step, "m_step", phase.step) for phase in self.m_phases]
        if not self.e_phase.step.traits.exact or not all(isinstance(step, ClosedForm) for step in self.closed):
            fail(
                StepError,
                "EM",
                f"run with batch_size={batch_size}",
                got=f"phases {list(phases)}",
                because="it sums up what an exact E-step expects, for M-steps in closed form",
                fix="Leave batch_size out, or use steps such as steps.Enumerated() and steps.gaussian_mixture(3).",
            )

    def of(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Call]:
        """Return the arguments of each slice, of nearly equal length."""
        length = _length(args, kwargs)
        number = math.ceil(length / self.batch_size)
        ends = [length * i // number for i in range(number + 1)]
        return [_rows(args, kwargs, slice(*pair)) for pair in itertools.pairwise(ends)]

    def begin(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Verify that the data may be sliced, once, and set the engine up on the first slice."""
        calls = self.of(args, kwargs)
        if len(calls) > 1 and not self.verified:
            self._verify(args, kwargs)
        self.verified = True
        self.prepare(*calls[0])

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> Record:
        self.begin(args, kwargs)
        calls, state = self.of(args, kwargs), self.engine.state
        for phase in (self.e_phase, *self.m_phases):
            state = phase.begin(self.engine, state, *calls[0])
        state, sums, info = self._expect(state, calls)
        self.iteration += 1
        infos = [info]
        for phase in self.m_phases:
            state, _, info = phase.run(self.engine, state, sums, args, kwargs)
            self.engine.steps = state.steps
            infos.append(info)
        return summarised((self.e_phase, *self.m_phases), infos, [])

    def _expect(self, state: State, calls: list[Call]) -> tuple[State, Summed, Any]:
        totals: dict[int, dict[str, Tensor]] = {}
        loss = 0.0
        for place, (args, kwargs) in enumerate(calls):
            with self._trusting(place, len(calls)):
                state, posterior, info = self.e_phase.run(self.engine, state, None, args, kwargs)
            totals = _added(totals, self._summaries(posterior, args, kwargs))
            loss += info.loss
        return state, Summed(totals), info._replace(loss=loss)

    def _trusting(self, place: int, number: int) -> contextlib.AbstractContextManager:
        """Let an E-step that verifies itself do so on all slices first, then on a quarter of them, in turn."""
        due = number == 1 or not self.iteration or (place + self.iteration) % 4 == 0
        return contextlib.nullcontext() if due else getattr(self.e_phase.step, "trusting", contextlib.nullcontext)()

    def _summaries(self, posterior: Posterior, args: tuple, kwargs: Mapping[str, Any]) -> dict[int, dict[str, Tensor]]:
        return {id(step): step.summarize(posterior, *args, **kwargs) for step in self.closed}

    def evaluate(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """Return minus the objective after an exact E-step at the present theta."""
        state = self.engine.state
        with quiet():
            return sum(self.e_phase.run(self.engine, state, None, *call)[2].loss for call in self.of(args, kwargs))

    def screen(self, args: tuple, kwargs: Mapping[str, Any]) -> str:
        """Return what says that theta is no maximum of the likelihood: `degeneracy.spike`, slice by slice."""
        leaves = [row.leaf for row in self.engine.parameters.rows if row.leaf.requires_grad]
        start = [leaf.detach().clone() for leaf in leaves]

        def expected() -> Tensor:
            """The expected log joint at the leaves' present values, posteriors at those of the start."""
            now, slopes = [leaf.detach().clone() for leaf in leaves], [torch.zeros_like(leaf) for leaf in leaves]
            total = torch.zeros((), dtype=torch.float64)
            for a, k in self.of(args, kwargs):
                _write(leaves, start)
                posterior = self.e_phase.step.infer(self.engine.model, a, k)
                _write(leaves, now)
                value = posterior.expected_log_joint(1)
                total += value.detach().double()
                if torch.is_grad_enabled():
                    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
                    slopes = [x + y for x, y in zip(slopes, found, strict=True)]
            pairs = zip(leaves, slopes, strict=True)
            return total + sum(((leaf - leaf.detach()) * slope).sum() for leaf, slope in pairs)

        with quiet():
            return spike(self.engine.parameters, expected)

    def _verify(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Compare two slices with both together, by log evidence and statistics."""
        size = min(self.batch_size, CHECKED, _length(args, kwargs) // 2)
        try:
            parts = [self._found(_rows(args, kwargs, slice(i * size, (i + 1) * size))) for i in range(2)]
            both = self._found(_rows(args, kwargs, slice(0, 2 * size)))
        except (ValueError, RuntimeError, IndexError) as cause:
            self._refuse(size, f"on a slice {type(cause).__name__}: {str(cause).splitlines()[0]}", cause)
        added = _added(_added({}, parts[0]), parts[1])
        for name in both:
            whole, summed, size_of = both[name], added[name], parts[0][name].abs() + parts[1][name].abs()
            miss = (whole - summed).abs().max() / (size_of.max() + (2 * size if name == EVIDENCE else 0))
            if not float(miss) <= torch.finfo(_dtype(args, kwargs)).eps ** 0.6:
                self._refuse(size, f"a {name} that misses the sum over both by {float(miss):.2g} of its size")

    def _found(self, call: Call) -> dict[str, Tensor]:
        """Return the log evidence and the statistics of a slice, in one table."""
        args, kwargs = call
        posterior = self.e_phase.step.infer(self.engine.model, args, kwargs)
        with quiet():
            tables = self._summaries(posterior, args, kwargs).values()
        named = {f"statistic {name!r}": x for table in tables for name, x in table.items() if x.numel()}
        return {EVIDENCE: torch.tensor(posterior.log_evidence, dtype=torch.float64)} | named

    def _refuse(self, size: int, got: str, cause: BaseException | None = None) -> None:
        fail(
            StepError,
            "EM",
            f"run with batch_size={self.batch_size}",
            got=f"{got} (two slices of {size} data were tried)",
            because="the model has to take any part of the data, and its data have to be independent given theta",
            fix='Write pyro.plate("data", len(x)) around all latents, and pass what has a row per datum as arguments; '
            "or leave batch_size out.",
            cause=cause,
        )


EVIDENCE = "log evidence"


@torch.no_grad()
def _write(leaves: list[Tensor], values: list[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)


def _added(one: Mapping[Any, Any], two: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return sums of equally named tensors, in nested dicts; an empty mapping is zero."""
    if not one:
        return dict(two)
    return {k: _added(x, two[k]) if isinstance(x, Mapping) else x + two[k] for k, x in one.items()}


def _data(args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    found = [x for x in tensors_of(args, kwargs) if x.dim()]
    if not found:
        fail(
            DataError,
            "EM",
            "take slices of the data",
            got=f"{len(args)} positional arguments without a tensor",
            because="the first tensor's length is the number of data",
            fix="Pass the data as tensors: em.run(x, batch_size=10_000).",
        )
    return found


def _length(args: tuple, kwargs: Mapping[str, Any]) -> int:
    return len(_data(args, kwargs)[0])


def _dtype(args: tuple, kwargs: Mapping[str, Any]) -> torch.dtype:
    found = [x.dtype for x in _data(args, kwargs) if x.is_floating_point()]
    return found[0] if found else torch.get_default_dtype()


def _rows(args: tuple, kwargs: Mapping[str, Any], rows: slice) -> Call:
    """Return the arguments with every tensor of the data's length cut to some of its rows."""
    length = _length(args, kwargs)
    return map_tensors(lambda x: x[rows] if x.dim() and len(x) == length else x, args, kwargs)
