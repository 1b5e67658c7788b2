r"""Optimizers as pure rules, and one optimizer per block of parameters, equal to torch's and Pyro's.

A `Rule` is two functions over lists of tensors: ``init`` makes the slots, ``update`` writes parameters and slots in
place. Every number that changes from step to step comes in as a scalar from the host, so that a recorded step bakes
nothing in. A `BlockOptimizer` runs what the user gave as few groups of many tensors; `OptimView` is ``svi.optim``.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from operator import itemgetter
from typing import Any, NoReturn

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.clipped_adam import ClippedAdam as PyroClippedAdam
from pyro.params import module_from_param_with_module_name, user_param_name
from torch import Tensor

from ._checks import OptimizerError, fail

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "BlockOptimizer", "ClippedAdam", "Group", "OptimView", "RMSprop", "Rule"]

Scalar = float | Tensor
Slots = dict[str, list[Tensor]]


def _refuse(act: str, got: str, because: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    fail(OptimizerError, "optim", act, got=got, because=because, fix=fix, cause=cause)


_FIX = 'Write optim=pyro.optim.Adam({"lr": 1e-3}), torch.optim.Adam, or functools.partial(torch.optim.Adam, lr=1e-3).'


def _axpy_(xs: list[Tensor], ys: Sequence[Tensor], a: Scalar) -> None:
    """Do x += a y, for a number or a 0-d tensor (which must not be read while recording)."""
    if isinstance(a, Tensor):
        torch._foreach_add_(xs, torch._foreach_mul(ys, a))
    else:
        torch._foreach_add_(xs, ys, alpha=a)


def _addcdiv_(xs: list[Tensor], ys: Sequence[Tensor], ds: Sequence[Tensor], a: Scalar) -> None:
    """Do x += a y / d, bit for bit the same for a number and a 0-d tensor."""
    if isinstance(a, Tensor):
        torch._foreach_addcdiv_(xs, torch._foreach_mul(ys, a), ds)
    else:
        torch._foreach_addcdiv_(xs, ys, ds, value=a)


def _root(xs: Sequence[Tensor], eps: float, divide_by: Scalar | None = None) -> Sequence[Tensor]:
    """Return sqrt(x) / divide_by + eps, as new tensors."""
    roots = torch._foreach_sqrt(xs)
    if divide_by is not None:
        torch._foreach_div_(roots, divide_by)
    torch._foreach_add_(roots, eps)
    return roots


def _average_of_squares_(averages: list[Tensor], xs: Sequence[Tensor], beta: float) -> None:
    """Do v = beta v + (1 - beta) x^2."""
    torch._foreach_mul_(averages, beta)
    torch._foreach_addcmul_(averages, xs, xs, value=1 - beta)


def _l2(grads: Sequence[Tensor], params: Sequence[Tensor], weight_decay: float) -> Sequence[Tensor]:
    return torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay else grads


def _clip(grads: Sequence[Tensor], clip_norm: float | None, clip_value: float | None) -> Sequence[Tensor]:
    """Scale each gradient to a norm of at most `clip_norm`, clamp it to ``[-clip_value, clip_value]``: new tensors."""
    if clip_norm is not None:
        grads = torch._foreach_mul(grads, [(clip_norm / (n + 1e-6)).clamp(max=1.0) for n in torch._foreach_norm(grads)])
    if clip_value is not None:
        grads = torch._foreach_clamp_min(grads, -clip_value)
        torch._foreach_clamp_max_(grads, clip_value)
    return grads


def _runs(params: Sequence[Tensor], size: int = 2**17) -> list[slice]:
    """Cut a list of CPU tensors into runs of about `size` elements, which stay in the cache between operations."""
    bounds, filled = [0], 0
    for i, p in enumerate(params):
        if filled and filled + p.numel() > size and not p.is_cuda:
            bounds.append(i)
            filled = 0
        filled += p.numel()
    return [slice(a, b) for a, b in pairwise([*bounds, len(params)])]


class Rule(ABC):
    r"""One first-order update, as pure functions. Final rules are frozen dataclasses of their hyperparameters.

    $$(\theta,s)\leftarrow\mathrm{update}(\theta,g,s;\,\mathrm{scalars}(t)),\qquad s_0=\mathrm{init}(\theta),t\ge1$$

    When to use: pass an instance wherever an optimizer is taken. To add a rule, subclass: a frozen dataclass with a
    field ``lr``, the slots' `names`, `numbers` and `apply`. ``twin`` is torch's class with the same arguments and state
    dict, if there is one; ``decay`` multiplies the learning rate at each update; ``lazy`` says that the twin has no
    state before its first step.

    Shape: lists over parameters of one dtype and device; slots have their parameters' shapes, scalars are 0-d.

    Example:
        >>> rule, theta = SGD(lr=0.5, momentum=0.5), [torch.tensor([1.0, 2.0])]
        >>> slots = rule.init(theta)
        >>> for count in (1, 2):
        ...     rule.update(theta, [torch.ones(2)], slots, rule.scalars(count))
        >>> theta, slots
        ([tensor([-0.2500,  0.7500])], {'momentum_buffer': [tensor([1.5000, 1.5000])]})
    """

    twin: Callable[..., torch.optim.Optimizer] | None = None
    decay = 1.0
    lazy = True

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The slots that each parameter has, named as in torch's state dict."""

    @abstractmethod
    def numbers(self, count: int, lr: float) -> dict[str, float]:
        """Every number that changes with the step, for update number `count` at the learning rate `lr`."""

    @abstractmethod
    def apply(self, params: list[Tensor], grads: Sequence[Tensor], slots: Slots, scalars: Mapping[str, Scalar]) -> None:
        """Write `params` and `slots` in place; `grads` are read only."""

    def init(self, params: Sequence[Tensor]) -> Slots:
        """Return the slots before the first update, in parameter order."""
        return {name: [torch.zeros_like(p) for p in params] for name in self.names}

    def scalars(self, count: int, lr: float | None = None) -> dict[str, float]:
        """Return `numbers` in float64, at the rule's own schedule ``lr * decay**count`` unless `lr` is given.

        Args:
            count: The number of this update, from 1 on.
            lr: The learning rate that a scheduler or the user has set for it.
        """
        return self.numbers(count, self.lr * self.decay**count if lr is None else lr)

    @torch.no_grad()
    def update(
        self, params: list[Tensor], grads: Sequence[Tensor], slots: Slots, scalars: Mapping[str, Scalar]
    ) -> None:
        """Do one update in place. Scalars are Python floats, or 0-d float64 tensors in a recorded step."""
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        scalars = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in scalars.items()}
        for at in _runs(params):
            part = torch._foreach_neg(grads[at]) if getattr(self, "maximize", False) else grads[at]
            self.apply(params[at], part, {k: v[at] for k, v in slots.items()}, scalars)

    def carrier(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """Return a torch optimizer with these hyperparameters, which checks and holds them."""
        return self.twin(params, **asdict(self)) if self.twin else torch.optim.Optimizer(params, asdict(self))

    def export(self, slots: dict[str, Tensor], count: int) -> dict[str, Any]:
        """Return the state of one parameter as its twin keeps it."""
        return {"step": torch.tensor(float(count)), **slots}

    def count_in(self, saved: Mapping[str, Any]) -> int:
        """Return the number of updates that a twin's state has seen."""
        return int(saved.get("step", 0))


@dataclass(frozen=True)
class SGD(Rule):
    r"""Gradient descent with momentum, equal to `torch.optim.SGD`.

    $$b\leftarrow\mu b+(1-\tau)g,\qquad \theta\leftarrow\theta-\eta\,b\quad(\text{Nesterov: }\theta-\eta\,(g+\mu b)).$$

    The first b is g, whatever the ``dampening`` $\tau$.

    Source: Sutskever et al. 2013, in the form of `torch.optim.SGD`.

    Example:
        >>> SGD(lr=0.1, momentum=0.9, dampening=0.5).scalars(2)
        {'minus_lr': -0.1, 'fresh': 0.5}
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    twin = torch.optim.SGD

    @property
    def names(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def numbers(self, count: int, lr: float) -> dict[str, float]:
        return {"minus_lr": -lr, "fresh": 1.0 if count == 1 else 1.0 - self.dampening}

    def apply(self, params, grads, slots, scalars) -> None:
        grads = _l2(grads, params, self.weight_decay)
        if self.momentum:
            buffers = slots["momentum_buffer"]
            torch._foreach_mul_(buffers, self.momentum)
            _axpy_(buffers, grads, scalars["fresh"])
            grads = torch._foreach_add(grads, buffers, alpha=self.momentum) if self.nesterov else buffers
        _axpy_(params, grads, scalars["minus_lr"])

    def export(self, slots, count) -> dict[str, Any]:
        return dict(slots) if count else dict.fromkeys(slots)

    def count_in(self, saved) -> int:
        return int(saved.get("momentum_buffer") is not None)


def _adam_numbers(betas: tuple[float, float], count: int, lr: float) -> dict[str, float]:
    return {"minus_step": -(lr / (1 - betas[0] ** count)), "correction": (1 - betas[1] ** count) ** 0.5}


def _adam_(rule: Adam | AdamW, params, grads, slots, scalars) -> None:
    torch._foreach_lerp_(slots["exp_avg"], grads, 1 - rule.betas[0])
    _average_of_squares_(slots["exp_avg_sq"], grads, rule.betas[1])
    second = slots["exp_avg_sq"]
    if rule.amsgrad:
        torch._foreach_maximum_(slots["max_exp_avg_sq"], second)
        second = slots["max_exp_avg_sq"]
    _addcdiv_(params, slots["exp_avg"], _root(second, rule.eps, scalars["correction"]), scalars["minus_step"])


@dataclass(frozen=True)
class Adam(Rule):
    r"""Adam, equal to `torch.optim.Adam`.

    $$m\leftarrow\beta_1m+(1-\beta_1)g,\quad v\leftarrow\beta_2v+(1-\beta_2)g^2,\quad
    \theta\leftarrow\theta-\frac{\eta}{1-\beta_1^t}\,\frac{m}{\sqrt{v/(1-\beta_2^t)}+\epsilon}.$$

    With ``amsgrad`` the largest v so far takes v's place; ``weight_decay`` is an L2 penalty.
    Source: Kingma & Ba 2015, algorithm 1; Reddi et al. 2018.

    Example:
        >>> theta, slots = [torch.zeros(2)], Adam().init([torch.zeros(2)])
        >>> Adam(lr=0.1).update(theta, [torch.tensor([3.0, -4.0])], slots, Adam(lr=0.1).scalars(1))
        >>> theta
        [tensor([-0.1000,  0.1000])]
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    twin = torch.optim.Adam

    @property
    def names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if self.amsgrad else 2]

    def numbers(self, count: int, lr: float) -> dict[str, float]:
        return _adam_numbers(self.betas, count, lr)

    def apply(self, params, grads, slots, scalars) -> None:
        _adam_(self, params, _l2(grads, params, self.weight_decay), slots, scalars)


@dataclass(frozen=True)
class AdamW(Rule):
    r"""Adam with decoupled weight decay, equal to `torch.optim.AdamW`.

    $$\theta\leftarrow(1-\eta\lambda)\,\theta,\quad\text{then Adam}.$$

    Source: Loshchilov & Hutter 2019, algorithm 2.

    Example:
        >>> AdamW(lr=0.1, weight_decay=0.5).scalars(1)["shrink"]
        0.95
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    twin = torch.optim.AdamW

    @property
    def names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if self.amsgrad else 2]

    def numbers(self, count: int, lr: float) -> dict[str, float]:
        return _adam_numbers(self.betas, count, lr) | {"shrink": 1 - lr * self.weight_decay}

    def apply(self, params, grads, slots, scalars) -> None:
        if self.weight_decay:
            torch._foreach_mul_(params, scalars["shrink"])
        _adam_(self, params, grads, slots, scalars)


@dataclass(frozen=True)
class ClippedAdam(Rule):
    r"""Adam with clamped gradients and a decaying learning rate, equal to `pyro.optim.ClippedAdam`.

    $$g\leftarrow\mathrm{clamp}(g,-c,c),\qquad \eta_t=\eta\,\rho^t,\qquad
    \theta\leftarrow\theta-\eta_t\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,\frac{m}{\sqrt v+\epsilon}.$$

    ``lrd`` is $\rho$; ``clip_norm`` is c (elementwise, despite its name); ``centered_variance`` averages $(g-m)^2$.
    Source: Pyro 1.9.2, ``pyro/optim/clipped_adam.py``.

    Example:
        >>> round(ClippedAdam(lr=0.1, lrd=0.5).scalars(2, lr=0.025)["minus_step"], 6)
        -0.005883
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 10.0
    lrd: float = 1.0
    centered_variance: bool = False
    twin = PyroClippedAdam
    names = ("exp_avg", "exp_avg_sq")

    @property
    def decay(self) -> float:
        return self.lrd

    def numbers(self, count: int, lr: float) -> dict[str, float]:
        return {"minus_step": -(lr * math.sqrt(1 - self.betas[1] ** count) / (1 - self.betas[0] ** count))}

    def apply(self, params, grads, slots, scalars) -> None:
        first, second = slots["exp_avg"], slots["exp_avg_sq"]
        grads = _l2(_clip(grads, None, self.clip_norm), params, self.weight_decay)
        torch._foreach_mul_(first, self.betas[0])
        torch._foreach_add_(first, grads, alpha=1 - self.betas[0])
        spread = torch._foreach_sub(grads, first) if self.centered_variance else grads
        _average_of_squares_(second, spread, self.betas[1])
        _addcdiv_(params, first, _root(second, self.eps), scalars["minus_step"])

    def export(self, slots, count) -> dict[str, Any]:
        return {"step": count, **slots}


@dataclass(frozen=True)
class RMSprop(Rule):
    r"""RMSprop, equal to `torch.optim.RMSprop`.

    $$v\leftarrow\alpha v+(1-\alpha)g^2,\qquad \theta\leftarrow\theta-\eta\,g/(\sqrt v+\epsilon),$$

    with v minus the squared average of g if ``centered``; ``momentum`` accumulates the steps.
    Source: Tieleman & Hinton 2012, lecture 6.5; Graves 2013 for the centered form.

    Example:
        >>> RMSprop(momentum=0.9, centered=True).names
        ('square_avg', 'momentum_buffer', 'grad_avg')
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False
    twin = torch.optim.RMSprop

    @property
    def names(self) -> tuple[str, ...]:
        return ("square_avg",) + ("momentum_buffer",) * (self.momentum > 0) + ("grad_avg",) * self.centered

    def numbers(self, count: int, lr: float) -> dict[str, float]:
        return {"minus_lr": -lr}

    def apply(self, params, grads, slots, scalars) -> None:
        grads = _l2(grads, params, self.weight_decay)
        second = slots["square_avg"]
        _average_of_squares_(second, grads, self.alpha)
        if self.centered:
            torch._foreach_lerp_(slots["grad_avg"], grads, 1 - self.alpha)
            second = torch._foreach_addcmul(second, slots["grad_avg"], slots["grad_avg"], value=-1)
        roots = _root(second, self.eps)
        if self.momentum > 0:
            torch._foreach_mul_(slots["momentum_buffer"], self.momentum)
            torch._foreach_addcdiv_(slots["momentum_buffer"], grads, roots)
            _axpy_(params, slots["momentum_buffer"], scalars["minus_lr"])
        else:
            _addcdiv_(params, grads, roots, scalars["minus_lr"])


@dataclass(frozen=True)
class Adagrad(Rule):
    r"""Adagrad, equal to `torch.optim.Adagrad`.

    $$v\leftarrow v+g^2,\qquad \theta\leftarrow\theta-\frac{\eta}{1+(t-1)\rho}\,\frac{g}{\sqrt v+\epsilon}.$$

    ``lr_decay`` is $\rho$.
    Source: Duchi et al. 2011.

    Example:
        >>> Adagrad(lr=1.0, lr_decay=0.5).scalars(3)
        {'minus_lr': -0.5}
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    maximize: bool = False
    twin = torch.optim.Adagrad
    names = ("sum",)
    lazy = False

    def init(self, params: Sequence[Tensor]) -> Slots:
        return {"sum": [torch.full_like(p, self.initial_accumulator_value, requires_grad=False) for p in params]}

    def numbers(self, count: int, lr: float) -> dict[str, float]:
        return {"minus_lr": -(lr / (1 + (count - 1) * self.lr_decay))}

    def apply(self, params, grads, slots, scalars) -> None:
        grads = _l2(grads, params, self.weight_decay)
        torch._foreach_addcmul_(slots["sum"], grads, grads, value=1)
        _addcdiv_(params, grads, _root(slots["sum"], self.eps), scalars["minus_lr"])


_RULES: dict[Any, type[Rule]] = {rule.twin: rule for rule in (SGD, Adam, AdamW, ClippedAdam, RMSprop, Adagrad)}


@cache
def _getter(rule: type[Rule]) -> Callable[[dict], tuple]:
    names = [f.name for f in fields(rule)]
    return itemgetter(*names) if len(names) > 1 else lambda options: (options[names[0]],)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value


def _copies(saved: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Copy the tensors, and move all but the step count, which torch keeps on the CPU."""
    return {
        k: v.detach().to(None if k == "step" else device, copy=True) if isinstance(v, Tensor) else copy.deepcopy(v)
        for k, v in saved.items()
    }


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
        """Return the learning rate of the coming update, or of the one `ahead` further."""
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
        clipped = _clip([grads[i] for i in self.indices], self.clip_norm, self.clip_value)
        self.rule.update([params[i] for i in self.indices], clipped, mine, scalars)


@dataclass(eq=False)
class _ParamOptim:
    """One parameter's hyperparameters, slots and count; what ``svi.optim.optim_objs[param]`` gives.

    ``carrier`` is a torch optimizer. It checks and holds the live hyperparameters; schedulers write to it; it steps
    itself only if there is no rule for its class. With a scheduler this object answers for that too, as Pyro's does.
    """

    name: str
    param: Tensor
    carrier: torch.optim.Optimizer
    place: int = 0
    family: int = 0
    clip: tuple[float | None, float | None] = (None, None)
    scheduler: Any = None
    rule_class: type[Rule] | None = None
    slots: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    noted: bool = False
    options: dict[str, Any] = field(init=False)
    alike: tuple = field(init=False)

    def __post_init__(self) -> None:
        self.options = self.carrier.param_groups[self.place]
        self.alike = (self.clip, self.param.dtype, self.param.device)

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

    def fill_slots(self, rule: Rule) -> None:
        """Make the slots that `rule` needs and this parameter lacks."""
        for name, (fresh,) in rule.init([self.param.detach()]).items():
            self.slots.setdefault(name, fresh)

    def rule(self, options: dict[str, Any] | None = None) -> Rule:
        return self.rule_class(*map(_plain, _getter(self.rule_class)(options or self.options)))

    def saved(self) -> dict[str, Any]:
        """Return the state in the form of `torch.optim`; tensors are the live ones."""
        if self.rule_class is None:
            return dict(self.carrier.state.get(self.param, {}))
        rule = self.rule()
        return {} if rule.lazy and not self.count else rule.export(self.slots, self.count)

    def state_dict(self) -> dict[str, Any]:
        state = _copies(self.saved())
        return {"state": {0: state} if state else {}, "param_groups": [dict(self.options, params=[0])]}

    def zero_grad(self, set_to_none: bool = True) -> None:
        if set_to_none:
            self.param.grad = None
        elif self.param.grad is not None:
            self.param.grad.zero_()

    def check(self, saved: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Raise unless `saved` fits this parameter and its rule."""
        for name in self.rule({**self.options, **options}).names if self.rule_class and saved else ():
            shape = tuple(saved[name].shape) if isinstance(saved.get(name), Tensor) else None
            if name not in saved or shape not in (None, tuple(self.param.shape)):
                _refuse(
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
            self.carrier.state[self.param] = _copies(saved, self.param.device)
            return
        rule = self.rule()
        self.count = rule.count_in(saved)
        for name, (fresh,) in rule.init([self.param.detach()]).items():
            value = saved.get(name)
            self.slots.setdefault(name, fresh).copy_(fresh if value is None else value)

    def parts(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return slots and options out of what Pyro's ``get_state()`` gives for this parameter, if they fit."""
        inner = state.get("optimizer", state)
        if not {"state", "param_groups"} <= inner.keys():
            _refuse(
                f"load the state of parameter {self.name!r}",
                f"entries {sorted(inner)}",
                "there has to be a state dict of torch.optim, with 'state' and 'param_groups'",
                "Pass what get_state() has returned.",
            )
        saved, options = next(iter(inner["state"].values()), {}), inner["param_groups"][0]
        self.check(saved, options)
        return saved, options

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.load(*self.parts(state))
        if self.scheduler is not None and "scheduler" in state:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))

    def get_state(self) -> dict[str, Any]:
        if self.scheduler is None:
            return self.state_dict()
        return {"scheduler": copy.deepcopy(self.scheduler.state_dict()), "optimizer": self.state_dict()}

    def note_step(self) -> None:
        """Let a scheduler know that its optimizer has stepped, which it asks for before its own first step."""
        if self.scheduler is not None and not self.noted:
            grad, options, self.noted = self.param.grad, dict(self.options), True
            self.param.grad = None
            self.carrier.step()
            self.param.grad = grad
            self.options.update(options)


def _pyro_args(args: Any, name: str, one_argument: bool) -> dict[str, Any]:
    """Return the arguments of one parameter, which Pyro takes as a dictionary or a function of its name."""
    if not callable(args):
        return dict(args)
    parts = (module_from_param_with_module_name(name), user_param_name(name))
    args = args(name.replace("$$$", ".")) if one_argument else args(*parts)
    if not isinstance(args, dict):
        _refuse(
            f"set up parameter {name!r}",
            f"{args!r} from its arguments function",
            "the function has to return a dictionary for every parameter",
            'Return for instance {"lr": 1e-3}.',
        )
    return dict(args)


def _limits(clip_norm: float | None = None, clip_value: float | None = None) -> tuple[float | None, float | None]:
    return clip_norm, clip_value


def _from_pyro(optim: PyroOptim, named: Mapping[str, Tensor]) -> list[_ParamOptim]:
    """Make one carrier per parameter, with its own arguments, clipping and scheduler."""
    made = []
    for name, param in named.items():
        args = _pyro_args(optim.pt_optim_args, name, getattr(optim, "pt_optim_args_argc", 1) == 1)
        carrier = optim.pt_optim_constructor([param], **args)
        entry = _ParamOptim(name, param, carrier, clip=_limits(**_pyro_args(optim.pt_clip_args, name, False)))
        if isinstance(optim, PyroLRScheduler):
            entry.scheduler = optim.pt_scheduler_constructor(carrier, **optim.kwargs)
        made.append(entry)
    return made


def _from_torch(make: Callable, named: Mapping[str, Tensor], family: int) -> list[_ParamOptim]:
    """Make one carrier for all, its groups split so that each parameter has its own live options, as under Pyro."""
    carrier = make(list(named.values()))
    if not isinstance(carrier, torch.optim.Optimizer):
        because = "it has to return a torch.optim.Optimizer"
        _refuse("update a block of parameters", f"{carrier!r} from {make!r}", because, _FIX)
    name_of = {id(p): n for n, p in named.items()}
    held = [(name_of.get(id(p)), k) for k, group in enumerate(carrier.param_groups) for p in group["params"]]
    if {n for n, _ in held} != set(named):
        _refuse(
            "update a block of parameters",
            f"an optimizer of {[n for n, _ in held]} for the parameters {list(named)}",
            "it has to update the parameters that it is given, all of them and no others",
            "Freeze a parameter with param.requires_grad_(False) instead of leaving it out.",
        )
    carrier.param_groups = [dict(carrier.param_groups[k], params=[named[n]]) for n, k in held]
    made = {n: _ParamOptim(n, named[n], carrier, place, family + k) for place, (n, k) in enumerate(held)}
    return [made[n] for n in named]


def _make(optim: Any, named: Mapping[str, Tensor], family: int) -> list[_ParamOptim]:
    """Set up parameters that have come up, each with its rule if there is one for its optimizer's class."""
    make = optim.carrier if isinstance(optim, Rule) else optim
    try:
        made = _from_pyro(optim, named) if isinstance(optim, PyroOptim) else _from_torch(make, named, family)
    except OptimizerError:
        raise
    except Exception as cause:
        _refuse("be constructed", f"{type(cause).__name__}: {cause}", "its class refuses these arguments", _FIX, cause)
    for entry in made:
        closure = inspect.signature(type(entry.carrier).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            because = "its step needs a closure: it is no first-order optimizer that SVI can step"
            _refuse("take a step of SVI", type(entry.carrier).__name__, because, _FIX)
        entry.rule_class = type(optim) if isinstance(optim, Rule) else _rule_class(entry)
        if entry.rule_class:
            entry.fill_slots(entry.rule())
    return made


def _rule_class(entry: _ParamOptim) -> type[Rule] | None:
    rule = None if entry.param.is_complex() else _RULES.get(type(entry.carrier))
    return AdamW if rule is Adam and entry.options.get("decoupled_weight_decay") else rule


def _checked(optim: Any) -> Any:
    """Return `optim` if it can be the optimizer of a block, else raise."""
    got, because, fix = None, "it has to be an optimizer that SVI can step", _FIX
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
        _refuse("update a block of parameters", got, because, fix)
    return optim


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
        >>> theta = {"a": torch.ones(2, requires_grad=True), "b": torch.ones((), requires_grad=True)}
        >>> block = BlockOptimizer.from_user(SGD(lr=0.5), theta)
        >>> block.step([torch.ones(2), None])
        >>> theta["a"].tolist(), theta["b"].item(), len(block.groups())
        ([0.5, 0.5], 1.0, 2)
    """

    def __init__(self, optim: Any) -> None:
        view = optim if isinstance(optim, OptimView) else None
        self.user = _checked(view.user if view else optim)
        self._waiting: dict[str, Any] = dict(
            view.get_state() if view else getattr(optim, "_state_waiting_to_be_consumed", {})
        )
        self._entries: dict[str, _ParamOptim] = {}

    @classmethod
    def from_user(cls, optim: Any, named_params: Mapping[str, Tensor]) -> BlockOptimizer:
        """Make the block's optimizer from what the user gave, which stays as it was."""
        block = cls(optim)
        block.add(named_params)
        return block

    def add(self, named_params: Mapping[str, Tensor]) -> None:
        """Add unconstrained parameters by the names of the param store.

        Known ones are passed over; a new tensor under a known name takes its place and starts afresh, as under Pyro.
        """
        named = {n: p for n, p in named_params.items() if n not in self._entries or self._entries[n].param is not p}
        family = 1 + max((e.family for e in self._entries.values()), default=-1)
        made = _make(self.user, named, family) if named else []
        for e in made:
            used = getattr(self.user, "optim_objs", {}).get(e.param)
            if e.name in self._waiting:
                e.set_state(self._waiting[e.name])
            elif used is not None:
                parts = {"scheduler": used, "optimizer": getattr(used, "optimizer", used)}
                e.set_state({k: v.state_dict() for k, v in parts.items()})
        for e in made:
            self._waiting.pop(e.name, None)
            self._entries[e.name] = e

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def params(self) -> list[Tensor]:
        return [e.param for e in self._entries.values()]

    @property
    def slots(self) -> list[dict[str, Tensor]]:
        """The live slots, in parameter order."""
        return [e.slots for e in self._entries.values()]

    @property
    def objects(self) -> dict[Tensor, _ParamOptim]:
        """What each parameter has in ``svi.optim.optim_objs``."""
        return {e.param: e for e in self._entries.values()}

    @property
    def recordable(self) -> bool:
        """Whether a step is tensors and scalars only, with all that a scheduler moves among the scalars."""
        entries = self._entries.values()
        return all(e.rule_class and not getattr(e.scheduler, "cycle_momentum", False) for e in entries)

    def groups(self, active: Iterable[int] | None = None) -> list[Group]:
        """Partition the parameters at the places `active` (default: all), less those that step themselves."""
        entries = list(self._entries.values())
        cells: dict[tuple, list[int]] = {}
        for i in range(len(entries)) if active is None else active:
            e = entries[i]
            if e.rule_class:
                values = _getter(e.rule_class)(e.options)
                try:
                    cells.setdefault((e.rule_class, e.alike, e.count, values), []).append(i)
                except TypeError:  # a list among the options
                    cells.setdefault((e.rule_class, e.alike, e.count, tuple(map(_plain, values))), []).append(i)
        groups = [
            Group(entries[at[0]].rule(), tuple(at), count + 1, *alike[0]) for (_, alike, count, _), at in cells.items()
        ]
        for group in groups:
            names = set(group.rule.names)
            for e in (entries[i] for i in group.indices if not names <= entries[i].slots.keys()):
                e.fill_slots(group.rule)
        return groups

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """Do one update from `grads`, in parameter order. Where one is None, parameter, slots and count stay."""
        if len(grads) != len(self._entries):
            _refuse(
                "take a step",
                f"{len(grads)} gradients for {len(self._entries)} parameters",
                "there has to be one for each, or None",
                "Pass [param.grad for param in block.params].",
            )
        active = [i for i, g in enumerate(grads) if g is not None]
        groups, params, slots = self.groups(active), self.params, self.slots
        dense = [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]
        for group in groups:
            group.update(params, dense, slots, group.scalars())
        self._step_carriers(grads)
        self.advance(groups)

    def _step_carriers(self, grads: Sequence[Tensor | None]) -> None:
        """Let torch optimizers without a rule step themselves, on copies of the gradients."""
        own = [(e, g) for e, g in zip(self._entries.values(), grads, strict=True) if e.rule_class is None]
        before = [(e.param, e.param.grad) for e, _ in own]
        active = [e for e, g in own if g is not None]
        try:
            for e, g in own:
                e.param.grad = None if g is None else _clip([g.detach().clone()], *e.clip)[0]
            for carrier in dict.fromkeys(e.carrier for e in active):
                carrier.step()
            for e in active:
                e.count, e.noted = e.count + 1, True
        finally:
            for param, grad in before:
                param.grad = grad

    def advance(self, groups: Iterable[Group], num_steps: int = 1) -> None:
        """Count `num_steps` updates of `groups`, as `step` does it, after a recorded step has made them."""
        entries = list(self._entries.values())
        for group in groups:
            for e in (entries[i] for i in group.indices):
                e.count += num_steps
                if group.rule.decay != 1:
                    e.options["lr"] = group.lr(num_steps - 1)
                e.note_step()

    def scheduler_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the schedulers, if there are any, with the arguments that theirs takes (ReduceLROnPlateau: a loss)."""
        for e in self._entries.values():
            if e.scheduler is not None:
                e.scheduler.step(*args, **kwargs)

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """Live slots, counts (int64) and learning rates (float64) by name; plain numbers only for schedulers."""
        entries = self._entries.values()
        return {
            "slots": {e.name: e.slots if e.rule_class else e.saved() for e in entries},
            "count": {e.name: torch.tensor(e.count) for e in entries},
            "lr": {
                e.name: torch.tensor(float(e.options["lr"]), dtype=torch.float64) for e in entries if "lr" in e.options
            },
            "scheduler": {e.name: e.scheduler.state_dict() for e in entries if e.scheduler is not None},
        }

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` gave, writing the slots in place."""
        self._same_names(state["count"])
        options = {n: {"lr": lr.item()} for n, lr in state["lr"].items()}
        self._load([(e, state["slots"][n], options.get(n, {})) for n, e in self._entries.items()])
        for name, e in self._entries.items():
            e.count = int(state["count"][name])
            if e.scheduler is not None and name in state["scheduler"]:
                e.scheduler.load_state_dict(copy.deepcopy(state["scheduler"][name]))

    def _same_names(self, names: Iterable[str]) -> None:
        if set(names) != set(self._entries):
            _refuse(
                "load a state",
                f"the parameters {sorted(names)}",
                f"this block has {sorted(self._entries)}",
                "Load a state of the same parameters.",
            )

    def _load(self, parts: list[tuple[_ParamOptim, Mapping[str, Any], Mapping[str, Any]]]) -> None:
        for entry, saved, options in parts:
            entry.check(saved, options)
        for entry, saved, options in parts:
            entry.load(saved, options)

    def _torch_groups(self) -> list[list[_ParamOptim]]:
        """The parameters by equal options, in the order in which the user's torch optimizer would hold them."""
        cells: dict[tuple, list[_ParamOptim]] = {}
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
            state |= {i: _copies(saved) for i, e in zip(places, cell, strict=True) if (saved := e.saved())}
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
                _refuse(
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
        self._waiting |= {n: s for n, s in state.items() if n not in self._entries}


class OptimView(PyroOptim):
    """What ``svi.optim`` is: all blocks behind the face of a `pyro.optim.PyroOptim`.

    Args:
        blocks: The block optimizers by the names of their blocks; looked up at each use.
        user: What the user gave as ``optim``.

    Raises:
        OptimizerError: If called with tensors that no block has.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> view = OptimView({"model": BlockOptimizer.from_user(torch.optim.SGD, {"theta": theta})})
        >>> view.optim_objs[theta].param_groups[0]["lr"] = 0.25
        >>> theta.grad = torch.ones(2)
        >>> view([theta])
        >>> theta.tolist()
        [0.75, 0.75]
    """

    def __init__(self, blocks: Mapping[str, BlockOptimizer], user: Any = None) -> None:
        self.blocks = blocks
        self.user = user if user is not None else next((block.user for block in blocks.values()), None)
        for name in ("pt_optim_constructor", "pt_optim_args", "pt_clip_args"):
            setattr(self, name, getattr(self.user, name, {}))

    @property
    def optim_objs(self) -> dict[Tensor, _ParamOptim]:
        """For each parameter its live ``param_groups``, ``state``, ``state_dict()``, ``zero_grad()``."""
        return {param: entry for block in self.blocks.values() for param, entry in block.objects.items()}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Do one update of `params` from their ``.grad``."""
        wanted = set(params)
        if unknown := wanted - self.optim_objs.keys():
            because = "an optimizer is made for a parameter when a step first meets it"
            shapes = f"unknown tensors of shapes {sorted(tuple(p.shape) for p in unknown)}"
            _refuse("update parameters", shapes, because, "Call svi.step first.")
        for block in self.blocks.values():
            block.step([p.grad if p in wanted else None for p in block.params])

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the schedulers, as `PyroLRScheduler.step`; without schedulers nothing happens."""
        for block in self.blocks.values():
            block.scheduler_step(*args, **kwargs)

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return the state of all blocks by parameter name."""
        return {name: state for block in self.blocks.values() for name, state in block.get_state().items()}

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state at once; what belongs to no parameter yet waits."""
        for block in self.blocks.values():
            block.set_state(state_dict)
