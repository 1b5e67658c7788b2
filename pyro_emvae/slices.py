r"""An iteration of EM in slices of the data: statistics add up, so one slice at a time is enough."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from .steps import ClosedForm, Info, Phase
from .steps.closed_form import Summed
from .steps.phase import summarised

__all__ = ["Automatic", "Slices", "Whole", "arranged"]

Call = tuple[tuple, dict[str, Any]]
Table = dict[tuple, Tensor]
Found = tuple[State, Info, "Sums"]
EVIDENCE = (None, "log evidence")
CHECKED = 500
LEAST = 20_000
BYTES, LENGTHS = 2**21, (1024, 16384)


@dataclass
class Whole:
    """Iterations that take all data at once: what `EM` does by itself, and why it is not done in slices."""

    begin: Callable[[tuple, Mapping[str, Any]], None]
    iterate: Callable[..., Record]
    evaluate: Callable[[tuple, Mapping[str, Any]], float]
    screen: Callable[[tuple, Mapping[str, Any]], str]
    reason: str = ""

    def __call__(self, *call: Any, **options: Any) -> Record:
        return self.iterate(*call, **options)

    @property
    def says(self) -> str:
        """What `Fit.provenance` has to say."""
        return f"whole: {self.reason}"


class Slices:
    r"""EM iterations that take the data a slice at a time, and update once.

    $$\sum_nE[s(x_n,z_n)\,|\,x_n]=\sum_{\text{slices}}\;\sum_{n\in\text{slice}}E[s(x_n,z_n)\,|\,x_n].$$

    The E-step and its statistics are made slice by slice and then forgotten, so that temporaries have the size of a
    slice, which also keeps them in the cache. The result is that of the whole up to the order of summation.

    The data are the first tensor among the arguments and all others of the same length; everything else goes to the
    model as it is. Whether data are independent, so that the log evidence of slices adds up, is verified on the first
    data (1000 at most) before the first iteration: the log evidence and the statistics of their two halves, and those
    of their even and odd rows, have to add up to those of all of them.

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
        if not _adds_up(phases):
            fail(
                StepError,
                "EM",
                f"run with batch_size={batch_size}",
                got=f"phases {list(phases)}",
                because="it sums up what an exact E-step expects, for M-steps in closed form",
                fix="Leave batch_size out, or use steps such as steps.Enumerated() and steps.gaussian_mixture(3).",
            )

    @property
    def says(self) -> str:
        """What `Fit.provenance` has to say."""
        return f"slices of {self.batch_size}"

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

    def __call__(self, args: tuple, kwargs: Mapping[str, Any], found: Found | None = None) -> Record:
        """Make an iteration; `found` is what `expect` returned at the present theta, if it was called."""
        self.begin(args, kwargs)
        state, info, sums = found or self.expect(args, kwargs)
        self.iteration += 1
        totals = {id(step): sums.of(id(step)) for step in self.closed}
        infos, summed = [info], Summed(totals, lambda num_particles: self.held(args, kwargs))
        for phase in self.m_phases:
            state, _, info = phase.run(self.engine, state, summed, args, kwargs)
            self.engine.steps = state.steps
            infos.append(info)
        return summarised((self.e_phase, *self.m_phases), infos, [])

    def expect(self, args: tuple, kwargs: Mapping[str, Any]) -> Found:
        """Return what an E-step over all slices finds, their statistics summed up."""
        calls, sums = self.of(args, kwargs), Sums(judged=not self.iteration)
        state = self._state(calls[0])
        for place, call in enumerate(calls):
            with self._trusting(place, len(calls)):
                state, posterior, info = self.e_phase.run(self.engine, state, None, *call)
            sums.add(self._table(-info.loss, posterior, call))
        return state, info._replace(loss=-float(sums.totals[EVIDENCE])), sums

    def _state(self, call: Call) -> State:
        """Return the engine's state, with half-steps that have none of their own yet begun."""
        state = self.engine.state
        for phase in (self.e_phase, *self.m_phases):
            state = phase.begin(self.engine, state, *call)
        return state

    def _trusting(self, place: int, number: int) -> contextlib.AbstractContextManager:
        """Let an E-step that verifies itself do so on all slices first, then on a quarter of them, in turn."""
        due = number == 1 or not self.iteration or (place + self.iteration) % 4 == 0
        return contextlib.nullcontext() if due else getattr(self.e_phase.step, "trusting", contextlib.nullcontext)()

    def _table(self, evidence: float, posterior: Posterior, call: Call) -> Table:
        """Return the log evidence and the statistics of a slice."""
        args, kwargs = call
        each = ((id(step), step.summarize(posterior, *args, **kwargs)) for step in self.closed)
        return {EVIDENCE: torch.tensor(evidence, dtype=torch.float64)} | {
            (step, f"statistic {name!r}", name): x for step, table in each for name, x in table.items()
        }

    def evaluate(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """Return minus the objective after an exact E-step at the present theta."""
        calls = self.of(args, kwargs)
        state = self._state(calls[0])
        with quiet():
            return sum(self.e_phase.run(self.engine, state, None, *call)[2].loss for call in calls)

    def held(self, args: tuple, kwargs: Mapping[str, Any]) -> Callable[[], Tensor]:
        """Return the expected log joint as a function of the leaves' values, posteriors held at the present ones.

        Slice by slice: each slice's posterior is made again at each call.
        """
        leaves = [row.leaf for row in self.engine.parameters.rows if row.leaf.requires_grad]
        start = [leaf.detach().clone() for leaf in leaves]

        def expected() -> Tensor:
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

        return expected

    def screen(self, args: tuple, kwargs: Mapping[str, Any]) -> str:
        """Return what says that theta is no maximum of the likelihood: `degeneracy.spike`, slice by slice."""
        with quiet():
            return spike(self.engine.parameters, self.held(args, kwargs))

    def _verify(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        size = self._checked(args, kwargs)
        got, cause = attempted(lambda: self.misfit(args, kwargs))
        if got:
            fail(
                StepError,
                "EM",
                f"run with batch_size={self.batch_size}",
                got=f"{got} (two slices of {size} data were tried)",
                because="the model has to take any part of the data, and its data have to be independent given theta",
                fix='Write pyro.plate("data", len(x)) around all latents, and pass what has a row per datum as '
                "arguments; or leave batch_size out.",
                cause=cause,
            )

    def _checked(self, args: tuple, kwargs: Mapping[str, Any]) -> int:
        return min(self.batch_size, CHECKED, _length(args, kwargs) // 2)

    def misfit(self, args: tuple, kwargs: Mapping[str, Any]) -> str:
        """Return what of the first data does not add up, over their halves and over even and odd rows; else ""."""
        size = self._checked(args, kwargs)
        whole = _rows(args, kwargs, slice(2 * size))
        both = self.table(whole)
        for cuts in ([slice(size), slice(size, 2 * size)], [slice(i, 2 * size, 2) for i in range(2)]):
            parts = Sums(judged=True)
            for part in cuts:
                parts.add(self.table(_rows(args, kwargs, part)))
            if found := parts.missed(both, whole):
                return found
        return ""

    def table(self, call: Call) -> Table:
        """Return the log evidence and the statistics of data that are taken as one."""
        posterior = self.e_phase.step.infer(self.engine.model, *call)
        return self._table(posterior.log_evidence, posterior, call)


@dataclass
class Sums:
    """Sums of tables over slices; if they are to be judged, with the sizes by which their rounding is judged."""

    judged: bool
    totals: Table = field(default_factory=dict)
    sizes: Table = field(default_factory=dict)

    def add(self, table: Table) -> None:
        """Add the table of one slice."""
        self.totals = {key: self.totals[key] + x for key, x in table.items()} if self.totals else table
        if self.judged:
            self.sizes = {key: self.sizes.get(key, 0) + x.abs() for key, x in table.items()}

    def of(self, step: int) -> dict[str, Tensor]:
        """Return the statistics of one M-step, by its id."""
        return {key[-1]: x for key, x in self.totals.items() if key[0] == step}

    def missed(self, whole: Table, call: Call) -> str:
        """Return which sum is not that of the whole, by more than rounding; else ""."""
        sizes = self.sizes | {EVIDENCE: self.sizes[EVIDENCE] + _length(*call)}
        for key, x in whole.items():
            size = float(sizes[key].max()) if x.numel() else 0.0
            miss = float((x - self.totals[key]).abs().max()) / (size or 1.0) if x.numel() else 0.0
            if not miss <= torch.finfo(_dtype(*call)).eps ** 0.6:
                return f"a {key[1]} that misses the sum over its slices by {miss:.2g} of its size"
        return ""


def attempted(check: Callable[[], str]) -> tuple[str, BaseException | None]:
    """Return what a check finds, or whatever error a model raises that was not written for a part of its data."""
    try:
        with quiet():
            return check(), None
    except Exception as cause:
        return f"on a slice {type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}", cause


@dataclass
class Automatic:
    r"""Slices where they give what the whole gives, else the whole: which, is decided before the first iteration.

    The rows of the data decide the length of a slice: 2 MiB of arguments, at least 1024 and at most 16384 data. Slices
    are taken if the verification of `Slices` holds, and then the log evidence and the statistics of all slices add up
    to those of the whole, at the initial theta: data that depend on each other only here and there are found, at the
    cost of an E-step on the whole. That over the slices is the first iteration's.

    Args:
        whole, slices: The two ways.

    The model's parameters are made on the whole data, as what it starts them from may depend on them.
    """

    whole: Whole
    slices: Slices
    chosen: Whole | Slices | None = field(default=None, init=False)

    def begin(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Set the engine up on the whole, and choose."""
        self._choose(args, kwargs)
        self.chosen.begin(args, kwargs)

    def _choose(self, args: tuple, kwargs: Mapping[str, Any]) -> list[Found]:
        """Choose, if that was not done; return what the slices' E-step has then found."""
        if self.chosen is not None:
            return []
        self.whole.begin(args, kwargs)
        found: list[Found] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.whole.reason = attempted(lambda: self._misfit(args, kwargs, found))[0]
        self.slices.verified, self.chosen = True, self.whole if self.whole.reason else self.slices
        return [] if self.whole.reason else found

    def _misfit(self, args: tuple, kwargs: Mapping[str, Any], found: list[Found]) -> str:
        if short := self.slices.misfit(args, kwargs):
            return short
        whole = self.slices.table((args, dict(kwargs)))
        found.append(self.slices.expect(args, kwargs))
        return found[0][-1].missed(whole, (args, kwargs))

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> Record:
        found = self._choose(args, kwargs)
        return self.chosen(args, kwargs, *found)

    def evaluate(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """Return minus the objective after an exact E-step at the present theta."""
        self.begin(args, kwargs)
        return self.chosen.evaluate(args, kwargs)

    def screen(self, args: tuple, kwargs: Mapping[str, Any]) -> str:
        """Return what says that theta is no maximum of the likelihood."""
        self.begin(args, kwargs)
        return self.chosen.screen(args, kwargs)

    @property
    def says(self) -> str:
        """What `Fit.provenance` has to say."""
        return self.chosen.says if self.chosen else "no iteration was made"


def arranged(
    batch_size: int | str | None, engine: Engine, phases: tuple[Phase, ...], whole: Whole, call: Call, unfit: str
) -> Whole | Slices | Automatic:
    """Return how iterations are made.

    Args:
        batch_size: Data in a slice; None: no slices; ``"auto"``: see `Automatic`.
        engine, phases, whole: See there.
        call: The arguments of the run.
        unfit: The option of the run for which ``"auto"`` makes no slices, else "".
    """
    if batch_size is None:
        whole.reason = "batch_size=None"
    elif batch_size != "auto":
        return Slices(engine, phases, whole.begin, batch_size)
    else:
        whole.reason = unfit or _reason(phases, call)
        if not whole.reason:
            return Automatic(whole, Slices(engine, phases, whole.begin, _best_length(call)))
    return whole


def _reason(phases: tuple[Phase, ...], call: Call) -> str:
    """Return why slices cannot be made, or would not help."""
    found = [x for x in tensors_of(*call) if x.dim()]
    if not _adds_up(phases):
        return "half-steps whose statistics do not add up"
    if not found or len(found[0]) < LEAST:
        return f"fewer than {LEAST} data"
    return "" if all(x.device.type == "cpu" for x in found) else "data that are not on the CPU"


def _best_length(call: Call) -> int:
    length = _length(*call)
    row = sum(x[0].numel() * x.element_size() for x in _data(*call) if len(x) == length)
    return min(max(BYTES // max(row, 1), LENGTHS[0]), LENGTHS[1])


def _adds_up(phases: tuple[Phase, ...]) -> bool:
    first, *others = phases
    closed = [getattr(phase.step, "m_step", phase.step) for phase in others]
    return first.slot == "E" and first.step.traits.exact and all(isinstance(step, ClosedForm) for step in closed)


@torch.no_grad()
def _write(leaves: list[Tensor], values: list[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        leaf.copy_(value)


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
