r"""First-order update rules as pure functions over lists of tensors, equal to torch's and Pyro's optimizers.

`Rule.init` makes the slots, `Rule.update` writes parameters and slots in place. Every number that changes from step to
step comes in as a scalar from the host, so that a recorded step bakes nothing in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam as PyroClippedAdam
from torch import Tensor

__all__ = ["RULES", "SGD", "Adagrad", "Adam", "AdamW", "ClippedAdam", "RMSprop", "Rule", "Scalar", "clip"]

Scalar = float | Tensor
Slots = dict[str, list[Tensor]]


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


def clip(grads: Sequence[Tensor], clip_norm: float | None, clip_value: float | None) -> Sequence[Tensor]:
    """Scale each gradient to a norm of at most `clip_norm`, clamp it to ``[-clip_value, clip_value]``: new tensors."""
    if clip_norm is not None:
        grads = torch._foreach_mul(grads, [(clip_norm / (n + 1e-6)).clamp(max=1.0) for n in torch._foreach_norm(grads)])
    if clip_value is not None:
        grads = torch._foreach_clamp_min(grads, -clip_value)
        torch._foreach_clamp_max_(grads, clip_value)
    return grads


def _in_cache(params: list[Tensor], grads: Sequence[Tensor], slots: Slots) -> Iterator[tuple]:
    """Yield all small tensors, then pieces of the large ones that stay in the cache from one operation to the next."""
    size = 2**16 * torch.get_num_threads()
    large = [p.numel() > size and p.is_contiguous() and p.device.type == "cpu" for p in params]
    small = [i for i, is_large in enumerate(large) if not is_large]
    if small:
        yield (
            [params[i] for i in small],
            [grads[i] for i in small],
            {k: [v[i] for i in small] for k, v in slots.items()},
        )
    for i in compress(range(len(params)), large):
        whole = (params[i].view(-1), grads[i].reshape(-1), *(v[i].view(-1) for v in slots.values()))
        for p, g, *own in zip(*(x.split(size) for x in whole), strict=True):
            yield [p], [g], {k: [v] for k, v in zip(slots, own, strict=True)}


class Rule(ABC):
    r"""One first-order update, as pure functions. Final rules are frozen dataclasses of their hyperparameters.

    $$(\theta,s)\leftarrow\mathrm{update}(\theta,g,s;\,\mathrm{scalars}(t)),\qquad s_0=\mathrm{init}(\theta),t\ge1$$

    When to use: pass an instance wherever an optimizer is taken. To add a rule, subclass: a frozen dataclass with a
    field ``lr``, the slots' `names`, `numbers` and `apply`, which acts element by element: large tensors come to it in
    pieces. ``twin`` is torch's class with the same arguments and state dict, if there is one; ``decay`` multiplies the
    learning rate at each update; ``lazy`` says that the twin has no state before its first step.

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
        recorded = any(isinstance(v, Tensor) for v in scalars.values())
        scalars = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in scalars.items()}
        if getattr(self, "maximize", False):
            grads = torch._foreach_neg(grads)
        for ps, gs, own in [(params, grads, slots)] if recorded else _in_cache(params, grads, slots):
            self.apply(ps, gs, own, scalars)

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
        grads = _l2(clip(grads, None, self.clip_norm), params, self.weight_decay)
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


RULES: dict[Any, type[Rule]] = {rule.twin: rule for rule in (SGD, Adam, AdamW, ClippedAdam, RMSprop, Adagrad)}
