r"""One parameter's share of an optimizer, and the update of many in as few groups as there are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._checks import OptimizerError, fail
from .rules import Rule, Scalar, clip

__all__ = ["Entry", "Group", "advance", "copies", "make_groups", "refuse", "update"]

Clip = tuple[float | None, float | None]


def refuse(act: str, got: str, because: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    """Raise an `OptimizerError` about ``optim``."""
    fail(OptimizerError, "optim", act, got=got, because=because, fix=fix, cause=cause)


@cache
def _values_of(rule: type[Rule]) -> Callable[[Mapping[str, Any]], tuple]:
    """Return the function that picks a rule's hyperparameters, in order, from a dictionary of options."""
    names = [f.name for f in fields(rule)]
    return itemgetter(*names) if len(names) > 1 else lambda options: (options[names[0]],)


def _plain(value: Any) -> Any:
    """Return a hyperparameter as a rule keeps it: a number, or a tuple in place of a list."""
    return value.item() if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value


def copies(saved: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Copy the tensors, and move all but the step count, which torch keeps on the CPU."""
    return {
        k: v.detach().to(None if k == "step" else device, copy=True) if isinstance(v, Tensor) else copy.deepcopy(v)
        for k, v in saved.items()
    }


@dataclass(eq=False)
class Entry:
    """One parameter's hyperparameters, slots and count; what ``svi.optim.optim_objs[param]`` gives.

    ``carrier`` is a torch optimizer. It checks and holds the live hyperparameters; schedulers write to it; it steps
    itself only if there is no rule for its class. Blocks that share a user's `pyro.optim` object share the entries of
    the parameters that both have, as under Pyro.

    Args:
        place: The number of this parameter's group in the carrier.
        family: Parameters of one family were one group of the user's torch optimizer.
        noted: Whether the scheduler knows that its optimizer has stepped, which it asks for before its own first step.
    """

    name: str
    param: Tensor
    carrier: torch.optim.Optimizer
    place: int = 0
    family: int = 0
    clip: Clip = (None, None)
    scheduler: Any = None
    rule_class: type[Rule] | None = None
    slots: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    noted: bool = False
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.options = self.carrier.param_groups[self.place]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One live dictionary of hyperparameters: what is set here counts from the next step on."""
        return [self.options]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return {self.param: self.saved()}

    def state_dict(self) -> dict[str, Any]:
        state = copies(self.saved())
        return {"state": {0: state} if state else {}, "param_groups": [dict(self.options, params=[0])]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state dict of a torch optimizer of this parameter."""
        self.load(*self.parts(state_dict))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameter from its ``.grad``, as Pyro does with its own; without gradient nothing happens."""
        loss = None if closure is None else closure()
        update([self], [self.param.grad])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        if set_to_none:
            self.param.grad = None
        elif self.param.grad is not None:
            self.param.grad.zero_()

    def rule(self, options: Mapping[str, Any] | None = None) -> Rule:
        """Return the rule with the hyperparameters that are set now, or with `options`."""
        return self.rule_class(*map(_plain, _values_of(self.rule_class)(options or self.options)))

    def key(self) -> tuple:
        """Return what the parameters of one group have in common: number of updates, clipping, kind, options."""
        values = _values_of(self.rule_class)(self.options)
        try:
            hash(values)
        except TypeError:
            values = tuple(map(_plain, values))
        return self.count, self.clip, self.param.dtype, self.param.device, self.rule_class, values

    def fresh(self, rule: Rule) -> dict[str, Tensor]:
        """Return new slots, as before the first update."""
        return {name: slot for name, (slot,) in rule.init([self.param.detach()]).items()}

    def fill_slots(self, rule: Rule) -> None:
        """Make the slots that `rule` needs and this parameter lacks."""
        for name, slot in self.fresh(rule).items():
            self.slots.setdefault(name, slot)

    def advance(self, num_steps: int = 1, lr: float | None = None) -> None:
        """Count updates that were made; `lr` is a learning rate that they have lowered."""
        self.count += num_steps
        if lr is not None:
            self.options["lr"] = lr
        if self.scheduler is not None and not self.noted:
            grad, options, self.noted = self.param.grad, dict(self.options), True
            self.param.grad = None
            self.carrier.step()
            self.param.grad = grad
            self.options.update(options)

    # State in torch's and in Pyro's form ----------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """Return the state in the form of `torch.optim`; tensors are the live ones."""
        if self.rule_class is None:
            return dict(self.carrier.state.get(self.param, {}))
        rule = self.rule()
        return {} if rule.lazy and not self.count else rule.export(self.slots, self.count)

    def check(self, saved: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Raise unless `saved` fits this parameter and its rule."""
        for name in self.rule({**self.options, **options}).names if self.rule_class and saved else ():
            shape = tuple(saved[name].shape) if isinstance(saved.get(name), Tensor) else None
            if name not in saved or shape not in (None, tuple(self.param.shape)):
                refuse(
                    f"load the state of parameter {self.name!r}",
                    f"{name} of shape {shape}" if shape is not None else f"entries {sorted(saved)}",
                    f"{self.rule_class.__name__} needs {name!r} of shape {tuple(self.param.shape)}",
                    "Load a state that the same optimizer has saved for the same parameters.",
                )

    @torch.no_grad()
    def load(self, saved: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Take over a state in the form of `torch.optim`, in place; an empty one starts afresh."""
        self.options.update({k: v for k, v in options.items() if k not in ("params", "param_names")})
        if self.rule_class is None:
            self.carrier.state[self.param] = copies(saved, self.param.device)
            return
        rule = self.rule()
        self.count = rule.count_in(saved)
        for name, fresh in self.fresh(rule).items():
            value = saved.get(name)
            self.slots.setdefault(name, fresh).copy_(fresh if value is None else value)

    def parts(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return slots and options out of what Pyro's ``get_state()`` gives for this parameter, if they fit."""
        inner = state.get("optimizer", state)
        if not {"state", "param_groups"} <= inner.keys():
            refuse(
                f"load the state of parameter {self.name!r}",
                f"entries {sorted(inner)}",
                "there has to be a state dict of torch.optim, with 'state' and 'param_groups'",
                "Pass what get_state() has returned.",
            )
        saved, options = next(iter(inner["state"].values()), {}), inner["param_groups"][0]
        self.check(saved, options)
        return saved, options

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``get_state()`` has returned, ours or Pyro's."""
        self.load(*self.parts(state))
        if "scheduler" in state:
            self.load_scheduler(state["scheduler"])

    def load_scheduler(self, state: Mapping[str, Any]) -> None:
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state))

    def get_state(self) -> dict[str, Any]:
        if self.scheduler is None:
            return self.state_dict()
        return {"scheduler": copy.deepcopy(self.scheduler.state_dict()), "optimizer": self.state_dict()}


# Updates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Parameters of one block that are updated alike: same rule, clipping, number of updates, dtype and device.

    Args:
        rule: The rule, with the learning rate that is set now.
        indices: The places of the parameters in the block.
        count: The number of the coming update.
        clip_norm, clip_value: Per tensor, as in Pyro's `clip_args`.
    """

    rule: Rule
    indices: tuple[int, ...]
    count: int
    clip_norm: float | None = None
    clip_value: float | None = None

    @property
    def signature(self) -> tuple:
        """What a recorded update depends on: everything but the scalars."""
        return (replace(self.rule, lr=0.0), self.indices, self.clip_norm, self.clip_value)

    def lr(self, ahead: int = 0) -> float:
        """Return the learning rate of the coming update, or of the one `ahead` further: a product, as under Pyro."""
        lr = self.rule.lr
        for _ in range(ahead + 1 if self.rule.decay != 1 else 0):
            lr *= self.rule.decay
        return lr

    def scalars(self, ahead: int = 0) -> dict[str, float]:
        """Return the rule's scalars for the coming update, or for the one `ahead` further."""
        return self.rule.scalars(self.count + ahead, self.lr(ahead))

    def update(self, params, grads, slots: Sequence[dict[str, Tensor]], scalars: Mapping[str, Scalar]) -> None:
        """Clip, then update in place this group's part of a block's parameters and slots (lists over the block)."""
        mine = {name: [slots[i][name] for i in self.indices] for name in self.rule.names}
        clipped = clip([grads[i] for i in self.indices], self.clip_norm, self.clip_value)
        self.rule.update([params[i] for i in self.indices], clipped, mine, scalars)

    @torch.no_grad()
    def update_rows(self, param: Tensor, grad: Tensor, slots: dict[str, Tensor]) -> None:
        """Update the rows that a sparse gradient has, by the rule; other rows of parameter and slots stay as they are.

        The number of updates that the rule counts is that of the parameter, the same for all rows.
        """
        grad = grad.coalesce()
        rows = grad.indices()[0]
        mine = {name: slots[name].index_select(0, rows) for name in self.rule.names}
        part = param.detach().index_select(0, rows)
        replace(self, indices=(0,)).update([part], [grad.values()], [mine], self.scalars())
        for whole, new in ((param.detach(), part), *((slots[name], mine[name]) for name in mine)):
            whole.index_copy_(0, rows, new)


def make_groups(entries: Sequence[Entry], active: Iterable[int]) -> list[Group]:
    """Partition the entries at the places `active`, less those that step themselves, and fill their slots."""
    cells: dict[tuple, list[int]] = {}
    for i in active:
        if entries[i].rule_class:
            cells.setdefault(entries[i].key(), []).append(i)
    groups = [Group(entries[at[0]].rule(), tuple(at), 1 + count, *clip) for (count, clip, *_), at in cells.items()]
    for group in groups:
        names = set(group.rule.names)
        for e in (entries[i] for i in group.indices if not names <= entries[i].slots.keys()):
            e.fill_slots(group.rule)
    return groups


def update(entries: Sequence[Entry], grads: Sequence[Tensor | None]) -> None:
    """Update the parameters of `entries` from `grads`. Where one is None, parameter, slots and count stay."""
    groups = make_groups(entries, [i for i, g in enumerate(grads) if g is not None])
    params, slots = [e.param for e in entries], [e.slots for e in entries]
    for group in groups:
        sparse = [i for i in group.indices if grads[i].is_sparse]
        for i in sparse:
            replace(group, indices=(i,)).update_rows(params[i], grads[i], slots[i])
        if len(sparse) < len(group.indices):
            dense = replace(group, indices=tuple(i for i in group.indices if i not in sparse)) if sparse else group
            dense.update(params, grads, slots, group.scalars())
    _step_carriers([(e, g) for e, g in zip(entries, grads, strict=True) if e.rule_class is None and g is not None])
    advance(entries, groups)


def _step_carriers(active: Sequence[tuple[Entry, Tensor]]) -> None:
    """Let torch optimizers without a rule step themselves, on copies of the gradients, these parameters only."""
    carriers = list(dict.fromkeys(e.carrier for e, _ in active))
    before = [(p, p.grad) for c in carriers for held in c.param_groups for p in held["params"]]
    try:
        for param, _ in before:
            param.grad = None
        for e, g in active:
            e.param.grad = clip([g.detach().clone()], *e.clip)[0]
        for carrier in carriers:
            carrier.step()
        for e, _ in active:
            e.count, e.noted = e.count + 1, True
    finally:
        for param, grad in before:
            param.grad = grad


def advance(entries: Sequence[Entry], groups: Iterable[Group], num_steps: int = 1) -> None:
    """Count `num_steps` updates of `groups`."""
    for group in groups:
        lr = group.lr(num_steps - 1) if group.rule.decay != 1 else None
        for i in group.indices:
            entries[i].advance(num_steps, lr)
