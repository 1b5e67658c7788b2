r"""From what the user gave as an optimizer to the entries of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.params import module_from_param_with_module_name, user_param_name
from torch import Tensor

from .._checks import OptimizerError
from .entry import Clip, Entry, refuse
from .rules import RULES, Adam, AdamW, Rule

__all__ = ["checked", "make_entries"]

FIX = 'Write optim=pyro.optim.Adam({"lr": 1e-3}), torch.optim.Adam, or functools.partial(torch.optim.Adam, lr=1e-3).'


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
    if not named:
        return []
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
        lbfgs = "In EM, write m_step=steps.LBFGS(), or " + FIX[0].lower() + FIX[1:]
        refuse("take a step of SVI", optimizer.__name__, because, lbfgs if "LBFGS" in optimizer.__name__ else FIX)
    if issubclass(optimizer, torch.optim.SparseAdam):
        refuse("take a step of SVI", optimizer.__name__, "the gradients of a loss are dense", FIX)


def _rule_class(entry: Entry) -> type[Rule] | None:
    rule = None if entry.param.is_complex() else RULES.get(type(entry.carrier))
    return AdamW if rule is Adam and entry.options.get("decoupled_weight_decay") else rule
