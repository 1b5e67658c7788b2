r"""Adam for tables of parameters, of which a step meets few rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from .entry import Group
from .rules import RULES, Adam

__all__ = ["RowAdam"]


class RowAdam(torch.optim.Adam):
    r"""`torch.optim.Adam` that takes sparse gradients too, and updates the rows that they have.

    $$m_r\leftarrow\beta_1m_r+(1-\beta_1)g_r,\quad v_r\leftarrow\beta_2v_r+(1-\beta_2)g_r^2,\quad
      \theta_r\leftarrow\theta_r-\eta\,\hat m_r/(\sqrt{\hat v_r}+\epsilon)\qquad\text{for the rows } r \text{ met.}$$

    Other rows, and their averages, stay bit for bit; the bias corrections count the updates of the whole tensor.

    When to use: `guides.AutoMeanField` with minibatches under Pyro's own SVI, as ``pyro.optim.PyroOptim(RowAdam, {"lr":
    0.01})``. `emvae.SVI` and `emvae.EM` do the same with any optimizer they have a rule for.

    Source: `torch.optim.SparseAdam`. Differs: dense gradients are taken as well.

    Example:
        >>> table = torch.zeros(3, 2, requires_grad=True)
        >>> optimizer = RowAdam([table], lr=0.5)
        >>> torch.nn.functional.embedding(torch.tensor([2]), table, sparse=True).sum().backward()
        >>> optimizer.step()
        >>> table.detach()
        tensor([[ 0.0000,  0.0000],
                [ 0.0000,  0.0000],
                [-0.5000, -0.5000]])
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update from the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [(g, p, p.grad) for g in self.param_groups for p in g["params"] if p.grad is not None]
        sparse = [(g, p, grad) for g, p, grad in sparse if grad.is_sparse]
        for _, p, _ in sparse:
            p.grad = None
        try:
            super().step()
        finally:
            for _, p, grad in sparse:
                p.grad = grad
        for group, p, grad in sparse:
            self._update(group, p, grad)
        return loss

    def _update(self, group: dict[str, Any], p: torch.Tensor, grad: torch.Tensor) -> None:
        rule = Adam(**{f.name: group[f.name] for f in fields(Adam) if f.name in group})
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update({name: slot for name, (slot,) in rule.init([p]).items()})
        state["step"] += 1
        slots = {name: state[name] for name in rule.names}
        Group(rule, (0,), int(state["step"])).update_rows(p, grad, slots)


RULES[RowAdam] = Adam
