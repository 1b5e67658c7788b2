r"""A phase of an iteration of EM: one half-step over one block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import BlockError, DegenerateError, StepError, fail
from .._registry import create
from ..degeneracy import check_boundary
from ..engine import Engine, State
from ..engine import Gradient as Update
from ..history import Record
from ..parameters import GUIDE, MODEL, SHARED, UNUSED, Parameters
from ..particles import keep_buffers
from ..posterior import Posterior
from .base import HalfStep, Info
from .gradient import Gradient

__all__ = ["Phase", "read_phases"]

SIDE = {"E": GUIDE, "M": MODEL}
HELD = "held"


@dataclass(frozen=True)
class Phase:
    r"""One half-step over one block of parameters, all other blocks held.

    An iteration of EM is a sequence of phases: E over the guide's block and M over the model's in the textbook. With
    theta in two blocks of its own phase each, an iteration is a cycle of conditional maximisations,

    $$\theta_1\leftarrow\arg\max_{\theta_1}Q(\theta_1,\theta_2),\qquad
      \theta_2\leftarrow\arg\max_{\theta_2}Q(\theta_1,\theta_2),$$

    which never lowers the objective either, and where a phase only raises Q it is a generalised EM.

    Args:
        step: A half-step or its registered name.
        block: The block that it changes: ``"guide"`` or ``"model"``, or another name, to which `EM`'s ``blocks=``
            assigns parameters. By default the guide's for an E-step, the model's for an M-step.
        slot: ``"E"`` or ``"M"``. By default E for block ``"guide"`` and for a step that fits E only, else M.

    The step's own tensors are ``engine.steps[key]``, with the key ``"E"`` or ``"M"`` of the first phase of its slot,
    ``"M2"`` of the second, and so on.

    Raises:
        StepError: The step does not fit the slot.
        BlockError: No block, or one that cannot have a phase.

    Source: Meng and Rubin 1993 for conditional maximisations (ECM).

    Example:
        >>> from pyro_emvae.steps import Gradient
        >>> Phase(Gradient(2), "decoder")
        M over 'decoder' by Gradient(num_steps=2)
    """

    step: HalfStep
    block: str | None = None
    slot: str | None = None
    key: str = field(default="", kw_only=True)
    _views: dict[int, tuple[Parameters, Parameters]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        step = create("step", self.step)
        slots = getattr(step, "traits", None).slots if isinstance(step, HalfStep) else ()
        slot = self.slot or ("E" if self.block == GUIDE or (self.block != MODEL and "M" not in slots) else "M")
        if slot not in slots:
            fail(
                StepError,
                "EM",
                f"use {step!r} as its {slot}-step",
                got=type(step).__name__,
                because=f"it takes a half-step that fits slot {slot}",
                fix=f"Write {slot.lower()}_step=steps.Gradient().",
            )
        block = SIDE[slot] if self.block is None else self.block
        refused = (SHARED, UNUSED, HELD, SIDE["M" if slot == "E" else "E"])
        if not isinstance(block, str) or not block or block in refused:
            fail(
                BlockError,
                "EM",
                f"make the {slot}-step {step!r}",
                got=f"block {block!r}",
                because="a phase changes one block: the guide's in an E-step, the model's in an M-step, or one that "
                "blocks= names",
                fix=f'Write ("{SIDE[slot]}", {type(step).__name__}(...)), or a name of your own.',
            )
        for name, value in (("step", step), ("slot", slot), ("block", block), ("key", self.key or slot)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"{self.slot} over {self.block!r} by {self.step!r}"

    @property
    def side(self) -> str:
        """``"guide"`` or ``"model"``."""
        return SIDE[self.slot]

    @property
    def takes_gradients(self) -> bool:
        """Whether its step updates by an optimizer of its block."""
        return hasattr(self.step, "optim")

    def view(self, engine: Engine) -> Any:
        """Return the engine as the step sees it: its own block bears the name of its side."""
        return engine if self.block == self.side else View(engine, self)

    def begin(self, engine: Engine, state: State, args: tuple, kwargs: Mapping[str, Any]) -> State:
        """Let the step make its own state, unless it has one."""
        if self.key in state.steps:
            return state
        return state.with_own(self.key, self.step.init(self.view(engine), state, *args, **kwargs))

    def run(
        self, engine: Engine, state: State, posterior: Posterior | None, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[State, Posterior, Info]:
        """Make the half-step; an M-step hands the posterior on."""
        problem, steps = self.view(engine), state.steps
        mine = state if self.key == self.slot else state.with_own(self.slot, steps[self.key])
        if self.slot == "E":
            _check_factor(self, engine.beta)
            mine, posterior, info = self.step.expect(problem, mine, *args, **kwargs)
            if engine.beta is not None and not (self.takes_gradients or self.step.traits.tempers):
                posterior, info = _tempered(posterior, info, float(engine.beta))
        else:
            try:
                mine, info = self.step.maximise(problem, mine, posterior, *args, **kwargs)
            except DegenerateError as error:
                if hasattr(posterior, "held"):
                    check_boundary(engine.parameters, error, posterior.held(100))
                raise
        return replace(mine, steps=steps | {self.key: mine.steps[self.slot]}), posterior, info


def _check_factor(phase: Phase, beta: Tensor | None) -> None:
    """Refuse the power 0 of a posterior; gradient steps climb an objective with the factor 0 all the same."""
    if beta is not None and not phase.takes_gradients and float(beta) == 0.0:
        fail(
            StepError,
            "run",
            f"anneal the posterior of {phase.step!r}",
            got="a factor of 0",
            because="the power 0 is no distribution, or one that forgets the data",
            fix="Write annealing.Geometric(100), or annealing.Linear(100, start=0.1).",
        )


def _tempered(posterior: Posterior, info: Info, beta: float) -> tuple[Posterior, Info]:
    """Return a posterior to the power of beta, and the objective, which has no such power."""
    if beta == 1.0:
        return posterior, info
    posterior = posterior.tempered(beta)
    with torch.no_grad(), keep_buffers():
        objective = float(posterior.expected_log_joint(1)) + posterior.entropy
    return posterior, info._replace(loss=-objective)


class View:
    """An engine in which a phase's block bears the name of its side, and the rest of that side is held."""

    def __init__(self, engine: Engine, phase: Phase) -> None:
        self.engine, self.phase = engine, phase

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def parameters(self) -> Parameters:
        """The engine's, with the block renamed."""
        phase, live = self.phase, self.engine.parameters
        known = phase._views.get(id(self.engine))
        if known is None or known[0] is not live:
            names = {phase.side: HELD, phase.block: phase.side}
            rows = tuple(replace(row, block=names.get(row.block, row.block)) for row in live.rows)
            sides = {names.get(block, block): side for block, side in live.sides.items()}
            phase._views[id(self.engine)] = known = (live, replace(live, rows=rows, sides=sides))
        return known[1]

    def step(self, block: str, args: tuple, kwargs: Mapping[str, Any], loss: Any = None) -> Update | None:
        """Take one gradient step on the phase's block."""
        return self.engine.step(self.phase.block if block == self.phase.side else block, args, kwargs, loss=loss)


def read_phases(e_step: Any, m_step: Any, steps: Iterable[Any] | None) -> tuple[Phase, ...]:
    r"""Return the phases of an iteration, from the two half-steps or from a list of phases.

    Args:
        e_step, m_step: Half-steps; None where `steps` are given.
        steps: Each a `Phase`, or a pair of block and half-step.
    """
    if steps is None:
        given = [Gradient() if step is None else step for step in (e_step, m_step)]
        return Phase(given[0], GUIDE, "E"), Phase(given[1], MODEL, "M")
    if e_step is not None or m_step is not None:
        _refuse("steps= beside e_step= or m_step=", "an iteration is given one way")
    phases = [_phase(item) for item in ([steps] if isinstance(steps, str) else steps)]
    if [p.slot for p in phases[:1]] != ["E"] or all(p.slot == "E" for p in phases):
        _refuse(f"phases {phases}", "it begins with an E-step, whose posterior the M-steps after it take")
    sides = {}
    for phase in phases:
        if sides.setdefault(phase.block, phase.side) != phase.side:
            _refuse(f"an E-step and an M-step over block {phase.block!r}", "a block is part of phi or of theta")
    return tuple(_with_keys(phases))


def _with_keys(phases: list[Phase]) -> Iterable[Phase]:
    count = {"E": 0, "M": 0}
    for phase in phases:
        count[phase.slot] += 1
        yield replace(phase, key=phase.slot + (str(count[phase.slot]) if count[phase.slot] > 1 else ""))


def _phase(item: Any) -> Phase:
    if isinstance(item, Phase):
        return item
    if not isinstance(item, tuple | list) or len(item) != 2:
        fail(
            BlockError,
            "EM",
            "make a phase",
            got=repr(item),
            because="a phase is a half-step and the block that it changes",
            fix='Write steps=[("guide", steps.Gradient(5)), ("model", steps.Gradient())].',
        )
    return Phase(item[1], item[0])


def _refuse(got: str, because: str) -> None:
    fail(
        StepError,
        "EM",
        "make an iteration of these steps",
        got=got,
        because=because,
        fix='Write steps=[("guide", steps.Gradient()), ("model", ...), ("decoder", steps.Gradient())].',
    )


def check_blocks(phases: Iterable[Phase], parameters: Parameters, moving: Iterable[str]) -> None:
    r"""Raise unless each phase has a block of its own, and each block a phase.

    Args:
        phases: Of an iteration.
        parameters: The blocks that were found.
        moving: Blocks that take gradient steps, and so have to have parameters.
    """
    rows, kept = parameters.rows, {phase.block for phase in phases}
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
    for block in moving:
        if not any(row.block == block for row in rows):
            _refuse_empty(block, "E" if parameters.sides[block] == GUIDE else "M")
    idle = [row for row in rows if row.block not in (*kept, UNUSED)]
    if idle:
        fail(
            BlockError,
            "EM",
            f"leave {idle[0].name!r} without a phase",
            got=f"block {idle[0].block!r} of {len(idle)} parameters, and phases over {sorted(kept)}",
            because="each block has a phase that changes it",
            fix=f'Write steps=[..., ("{idle[0].block}", steps.Gradient())], or hold it: '
            f'blocks={{"{idle[0].name}": "unused"}}.',
        )
    _check_memory(rows, parameters.sides)


def _refuse_empty(block: str, slot: str) -> None:
    what = f"a {block}" if block in (GUIDE, MODEL) else f"a block {block!r}"
    fail(
        BlockError,
        "EM",
        f"make {'an E' if slot == 'E' else 'an M'}-step",
        got=f"{what} without parameters of its own",
        because="a half-step has to have something to change",
        fix='Write blocks="local/global" to split the guide\'s parameters, or schedule="joint"; for point masses '
        '(AutoDelta): EM(posterior.AtPointMasses(model, guide), optim=optim, e_step="enumerated").'
        if block in (GUIDE, MODEL)
        else f'Write blocks={{"name.*": "{block}"}}, with the parameters\' names.',
    )


def _check_memory(rows: Iterable[Any], sides: Mapping[str, str]) -> None:
    """Refuse parameters of two blocks that are the same numbers."""
    memory: dict[int, Any] = {}
    for row in sorted((r for r in rows if r.leaf.numel()), key=lambda r: sides.get(r.block) == GUIDE):
        other = memory.setdefault(row.leaf.data_ptr(), row)
        if other.block != row.block:
            fail(
                BlockError,
                "EM",
                f"change {row.name!r} in {'an E' if sides.get(row.block) == GUIDE else 'an M'}-step",
                got=f"the same memory as {other.name!r} of the {other.block}",
                because="each half-step changes its own block only",
                fix="Start it from a copy: .clone() (in an autoguide: "
                "init_loc_fn=lambda site: init_to_mean(site).clone()).",
            )


def summarised(phases: tuple[Phase, ...], infos: list[Info], seen: list[float]) -> Record:
    r"""Return the record of an iteration.

    Args:
        phases, infos: What was done, and what each half-step said of it.
        seen: The losses before the first and after each phase, if they were computed; else they are what the steps
            know: an exact E-step's afterwards, a gradient step's before its first update.
    """
    losses = list(seen)
    if not losses:
        known = [info.first_loss for info in infos] + [math.nan]
        after = [info.loss if phase.slot == "E" else math.nan for phase, info in zip(phases, infos, strict=True)]
        losses = [known[0]] + [b if math.isnan(a) else a for a, b in zip(after, known[1:], strict=True)]
    first = next(place for place, phase in enumerate(phases) if phase.slot == "M")
    gradients = [(phase.key, g) for phase, info in zip(phases, infos, strict=True) for g in info.gradients]
    said = infos[first - 1]
    keys = tuple(phase.key for phase in phases)
    kind = infos[first].kind if math.isnan(said.loss) and infos[first].gradients else said.kind
    return Record(losses[first], gradients, tuple(losses), keys, kind=kind, facts=said.facts)
