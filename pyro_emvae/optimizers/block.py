r"""One optimizer per block of parameters: what the user gave, run as few groups of many tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .._pyro import waiting_state
from .entry import Entry, Group, advance, copies, make_groups, refuse, update
from .given import checked, make_entries
from .view import OptimView, Scheduled, face

__all__ = ["BlockOptimizer"]


class BlockOptimizer:
    r"""The optimizer of one block of parameters: what the user gave, run as few groups of many tensors.

    Parameters with equal rule, clipping and number of updates form a `Group` and are updated together. The groups are
    found at each step from the live hyperparameters, so a scheduler or ``param_groups[0]["lr"] = ...`` needs no notice.
    An optimizer without a rule (NAdam, AdagradRMSProp, ...) steps itself; then ``recordable`` is false.

    When to use: `emvae.SVI` and `emvae.EM` make one per block.

    Args:
        optim: A `pyro.optim` wrapper, a `torch.optim` class, a partial or function of the parameters that returns a
            torch optimizer, or a `Rule`. `from_user` takes the first parameters with it, `add` further ones.

    Raises:
        OptimizerError: If `optim` is none, needs a closure, or refuses its arguments.

    Source: `pyro.optim.PyroOptim`. Differs: a state is set at once also on parameters already seen; a parameter without
    gradient keeps its learning rate too; gradients are never written (Pyro clips in place).

    Example:
        >>> from pyro_emvae.optimizers import SGD
        >>> theta = {"a": torch.ones(2, requires_grad=True), "b": torch.ones((), requires_grad=True)}
        >>> block = BlockOptimizer.from_user(SGD(lr=0.5), theta)
        >>> block.step([torch.ones(2), None])
        >>> theta["a"].tolist(), theta["b"].item(), len(block.groups())
        ([0.5, 0.5], 1.0, 2)
    """

    def __init__(self, optim: Any) -> None:
        self._given = optim
        self.user = checked(optim.user if isinstance(optim, OptimView) else optim)
        self._waiting = waiting_state(self.user)
        self._entries: dict[str, Entry] = {}

    @classmethod
    def from_user(cls, optim: Any, named_params: Mapping[str, Tensor]) -> BlockOptimizer:
        """Make the block's optimizer from what the user gave; a `pyro.optim` wrapper is linked to it."""
        block = cls(optim)
        block.add(named_params)
        return block

    def add(self, named_params: Mapping[str, Tensor]) -> None:
        """Add unconstrained parameters by the names of the param store.

        Known ones are passed over; a new tensor under a known name takes its place and starts afresh, as under Pyro.
        """
        new = {n: p for n, p in named_params.items() if n not in self._entries or self._entries[n].param is not p}
        used = {p: obj for given in (self._given, self.user) for p, obj in getattr(given, "optim_objs", {}).items()}
        entries = {n: e for n, p in new.items() if (e := _live(used.get(p))) is not None and e.name == n}
        family = 1 + max((e.family for e in (self._entries | entries).values()), default=-1)
        made = make_entries(self.user, {n: p for n, p in new.items() if n not in entries}, family)
        for e in made:
            state = self._waiting[e.name] if e.name in self._waiting else _state_of(used.get(e.param))
            if state is not None:
                e.set_state(state)
        for e in made:
            self._waiting.pop(e.name, None)
            self._link(e)
        entries |= {e.name: e for e in made}
        self._entries |= {n: entries[n] for n in new}

    def _link(self, entry: Entry) -> None:
        """Put a parameter's entry where the user's own `pyro.optim` object looks for it."""
        if isinstance(self.user, PyroOptim):
            self.user.optim_objs[entry.param] = face(entry)
            self.user.grad_clip[entry.param] = None

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def params(self) -> list[Tensor]:
        return [e.param for e in self._entries.values()]

    @property
    def entries(self) -> list[Entry]:
        """The parameters' shares of the optimizer, in parameter order."""
        return list(self._entries.values())

    @property
    def slots(self) -> list[dict[str, Tensor]]:
        """The live slots, in parameter order."""
        return [e.slots for e in self._entries.values()]

    @property
    def objects(self) -> dict[Tensor, Entry | Scheduled]:
        """What each parameter has in ``svi.optim.optim_objs``."""
        return {e.param: face(e) for e in self._entries.values()}

    @property
    def recordable(self) -> bool:
        """Whether a step is tensors and scalars only, with all that a scheduler moves among the scalars."""
        entries = self._entries.values()
        return all(e.rule_class and not getattr(e.scheduler, "cycle_momentum", False) for e in entries)

    # Steps ----------------------------------------------------------------------------------------------------

    def groups(self, active: Iterable[int] | None = None) -> list[Group]:
        """Partition the parameters at the places `active` (default: all), less those that step themselves."""
        return make_groups(list(self._entries.values()), range(len(self._entries)) if active is None else active)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Do one update from `grads`, in parameter order. Where one is None, parameter, slots and count stay."""
        if len(grads) != len(self._entries):
            refuse(
                "take a step",
                f"{len(grads)} gradients for {len(self._entries)} parameters",
                "there has to be one for each, or None",
                "Pass [param.grad for param in block.params].",
            )
        if self._waiting:
            self._take_waiting()
        update(list(self._entries.values()), grads)

    def _take_waiting(self) -> None:
        """Set the state that the user has loaded into their own object since the last step."""
        loaded = {n: self._waiting[n] for n in self._entries.keys() & self._waiting.keys()}
        self.set_state(loaded)

    def drop_waiting(self) -> None:
        """Forget the state that the user has loaded for known parameters and that no step has met yet."""
        for name in self._entries.keys() & self._waiting.keys():
            del self._waiting[name]

    def advance(self, groups: Iterable[Group], num_steps: int = 1) -> None:
        """Count `num_steps` updates of `groups`, as `step` does it, after a recorded step has made them."""
        advance(list(self._entries.values()), groups, num_steps)

    def scheduler_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the schedulers, if there are any, with the arguments that theirs takes (ReduceLROnPlateau: a loss)."""
        for e in self._entries.values():
            if e.scheduler is not None:
                e.scheduler.step(*args, **kwargs)

    # State: a pytree, torch's form, Pyro's form -----------------------------------------------------------------

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """Live slots, counts (int64) and learning rates (float64) by name; plain numbers only for schedulers."""
        entries = self._entries.values()
        rates = {e.name: float(e.options["lr"]) for e in entries if "lr" in e.options}
        return {
            "slots": {e.name: e.slots if e.rule_class else e.saved() for e in entries},
            "count": {e.name: torch.tensor(e.count) for e in entries},
            "lr": {name: torch.tensor(lr, dtype=torch.float64) for name, lr in rates.items()},
            "scheduler": {e.name: e.scheduler.state_dict() for e in entries if e.scheduler is not None},
        }

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` gave, writing the slots in place."""
        if set(state["count"]) != set(self._entries):
            refuse(
                "load a state",
                f"the parameters {sorted(state['count'])}",
                f"this block has {sorted(self._entries)}",
                "Load a state of the same parameters.",
            )
        options = {n: {"lr": lr.item()} for n, lr in state["lr"].items()}
        self._load([(e, state["slots"][n], options.get(n, {})) for n, e in self._entries.items()])
        for name, e in self._entries.items():
            e.count = int(state["count"][name])
            if name in state["scheduler"]:
                e.load_scheduler(state["scheduler"][name])

    def _load(self, parts: list[tuple[Entry, Mapping[str, Any], Mapping[str, Any]]]) -> None:
        for entry, saved, options in parts:
            entry.check(saved, options)
        for entry, saved, options in parts:
            entry.load(saved, options)

    def _torch_groups(self) -> list[list[Entry]]:
        """The parameters by equal options, in the order in which the user's torch optimizer would hold them."""
        cells: dict[tuple, list[Entry]] = {}
        for e in sorted(self._entries.values(), key=lambda e: (e.family, e.place)):
            options = {k: v for k, v in e.options.items() if k not in ("params", "param_names")}
            cells.setdefault((e.family, repr(options)), []).append(e)
        return list(cells.values())

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state in the form of one torch optimizer of the whole block, which can load it."""
        state, groups, start = {}, [], 0
        for cell in self._torch_groups():
            places = list(range(start, start := start + len(cell)))
            groups.append({**cell[0].options, "params": places, "param_names": [e.name for e in cell]})
            state |= {i: copies(saved) for i, e in zip(places, cell, strict=True) if (saved := e.saved())}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of `state_dict`, or of a torch optimizer: by name where it has names, else by place.

        Raises:
            OptimizerError: If groups or shapes differ; then nothing is changed.
        """
        theirs, cells = state_dict["param_groups"], self._torch_groups()
        names = [n for group in theirs for n in group.get("param_names", [])]
        if sorted(names) != sorted(self._entries):
            if [len(cell) for cell in cells] != [len(group["params"]) for group in theirs]:
                refuse(
                    "load a state dict",
                    f"groups of {[len(group['params']) for group in theirs]} parameters",
                    f"this block has groups of {[len(cell) for cell in cells]}",
                    "Load the state dict of an optimizer of the same parameters, grouped alike.",
                )
            names = [e.name for cell in cells for e in cell]
        places = [(i, group) for group in theirs for i in group["params"]]
        pairs = zip(names, places, strict=True)
        self._load([(self._entries[n], state_dict["state"].get(i, {}), options) for n, (i, options) in pairs])

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return a copy of the state in the form of ``PyroOptim.get_state()``: a state dict per parameter name."""
        return {e.name: e.get_state() for e in self._entries.values()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over ``get_state()`` of ours or of Pyro's; what belongs to no parameter yet waits until it is added."""
        known = {n: e for n, e in self._entries.items() if n in state}
        for name, e in known.items():
            e.parts(state[name])
        for name, e in known.items():
            e.set_state(state[name])
            self._waiting.pop(name, None)
        self._waiting.update({n: s for n, s in state.items() if n not in self._entries})


def _live(used: Any) -> Entry | None:
    """Return the entry behind what ``optim_objs`` has for a parameter, if that is one of ours."""
    entry = getattr(used, "optimizer", used)
    return entry if isinstance(entry, Entry) else None


def _state_of(used: Any) -> dict[str, Any] | None:
    """Return the state of what Pyro has in ``optim_objs`` for a parameter that it has stepped before."""
    if used is None:
        return None
    return {"scheduler": used.state_dict(), "optimizer": getattr(used, "optimizer", used).state_dict()}
