r"""One parameter's share of an optimizer, and how it is made from what the user gave."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from operator import itemgetter
from typing import Any, NoReturn

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.params import module_from_param_with_module_name, user_param_name
from torch import Tensor

from .._checks import OptimizerError, fail
from .rules import RULES, Adam, AdamW, Rule

__all__ = ["Entry", "checked", "copies", "make_entries", "refuse"]

FIX = 'Write optim=pyro.optim.Adam({"lr": 1e-3}), torch.optim.Adam, or functools.partial(torch.optim.Adam, lr=1e-3).'
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
    itself only if there is no rule for its class. With a scheduler this object answers for that too, as Pyro's does.

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

    def __getattr__(self, name: str) -> Any:
        scheduler = None if name.startswith("__") else self.__dict__.get("scheduler")
        if scheduler is None:
            raise AttributeError(name)
        return self if name == "optimizer" else getattr(scheduler, name)

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


# From what the user gave ----------------------------------------------------------------------------------------


def checked(optim: Any) -> Any:
    """Return `optim` if it can be the optimizer of a block, else raise."""
    got, because, fix = None, "it has to be an optimizer that SVI can step", FIX
    if isinstance(optim, torch.optim.Optimizer):
        got = f"an instance of {type(optim).__name__}"
        because = "an instance is bound to its parameters, and a block's parameters come up later"
        fix = f"Pass the class, or functools.partial(torch.optim.{type(optim).__name__}, lr=...)."
    elif isinstance(optim, PyroOptim):
        if type(optim).__call__ not in (PyroOptim.__call__, PyroLRScheduler.__call__):
            got, because = type(optim).__name__, "its own __call__ would be passed over"
            fix = "Pass the pyro.optim wrapper that it is built on."
    elif isinstance(optim, type) and issubclass(optim, Rule):
        return optim()
    elif isinstance(optim, type) and not issubclass(optim, torch.optim.Optimizer):
        got = f"the class {optim.__name__}"
    elif not isinstance(optim, Rule) and not callable(optim):
        got = f"{optim!r} of type {type(optim).__name__}"
    if got:
        refuse("update a block of parameters", got, because, fix)
    return optim


def make_entries(optim: Any, named: Mapping[str, Tensor], family: int) -> list[Entry]:
    """Set up parameters that have come up, each with its rule if there is one for its optimizer's class."""
    make = optim.carrier if isinstance(optim, Rule) else optim
    try:
        made = _from_pyro(optim, named) if isinstance(optim, PyroOptim) else _from_torch(make, named, family)
    except OptimizerError:
        raise
    except Exception as cause:
        refuse("be constructed", f"{type(cause).__name__}: {cause}", "its class refuses these arguments", FIX, cause)
    for entry in made:
        _check_closure(type(entry.carrier))
        entry.rule_class = type(optim) if isinstance(optim, Rule) else _rule_class(entry)
        if entry.rule_class:
            entry.fill_slots(entry.rule())
    return made


def _from_pyro(optim: PyroOptim, named: Mapping[str, Tensor]) -> list[Entry]:
    """Make one carrier per parameter, with its own arguments, clipping and scheduler."""
    made = []
    for name, param in named.items():
        args = _pyro_args(optim.pt_optim_args, name, getattr(optim, "pt_optim_args_argc", 1) == 1)
        carrier = optim.pt_optim_constructor([param], **args)
        entry = Entry(name, param, carrier, clip=_limits(**_pyro_args(optim.pt_clip_args, name, False)))
        if isinstance(optim, PyroLRScheduler):
            entry.scheduler = optim.pt_scheduler_constructor(carrier, **optim.kwargs)
        made.append(entry)
    return made


def _pyro_args(args: Any, name: str, one_argument: bool) -> dict[str, Any]:
    """Return the arguments of one parameter, which Pyro takes as a dictionary or a function of its name."""
    if not callable(args):
        return dict(args)
    parts = (module_from_param_with_module_name(name), user_param_name(name))
    args = args(name.replace("$$$", ".")) if one_argument else args(*parts)
    if not isinstance(args, dict):
        refuse(
            f"set up parameter {name!r}",
            f"{args!r} from its arguments function",
            "the function has to return a dictionary for every parameter",
            'Return for instance {"lr": 1e-3}.',
        )
    return dict(args)


def _limits(clip_norm: float | None = None, clip_value: float | None = None) -> Clip:
    return clip_norm, clip_value


def _from_torch(make: Callable, named: Mapping[str, Tensor], family: int) -> list[Entry]:
    """Make one carrier for all, its groups split so that each parameter has its own live options, as under Pyro."""
    carrier = make(list(named.values()))
    if not isinstance(carrier, torch.optim.Optimizer):
        because = "it has to return a torch.optim.Optimizer"
        refuse("update a block of parameters", f"{carrier!r} from {make!r}", because, FIX)
    name_of = {id(p): n for n, p in named.items()}
    held = [(name_of.get(id(p)), k) for k, group in enumerate(carrier.param_groups) for p in group["params"]]
    if {n for n, _ in held} != set(named):
        refuse(
            "update a block of parameters",
            f"an optimizer of {[n for n, _ in held]} for the parameters {list(named)}",
            "it has to update the parameters that it is given, all of them and no others",
            "Freeze a parameter with param.requires_grad_(False) instead of leaving it out.",
        )
    carrier.param_groups = [dict(carrier.param_groups[k], params=[named[n]]) for n, k in held]
    made = {n: Entry(n, named[n], carrier, place, family + k) for place, (n, k) in enumerate(held)}
    return [made[n] for n in named]


def _check_closure(optimizer: type[torch.optim.Optimizer]) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        because = "its step needs a closure: it is no first-order optimizer that SVI can step"
        refuse("take a step of SVI", optimizer.__name__, because, FIX)


def _rule_class(entry: Entry) -> type[Rule] | None:
    rule = None if entry.param.is_complex() else RULES.get(type(entry.carrier))
    return AdamW if rule is Adam and entry.options.get("decoupled_weight_decay") else rule
