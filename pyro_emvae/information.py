r"""Mutual information of data and latents from densities: pure functions of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Information", "information", "log_mean_exp"]


@dataclass(frozen=True)
class Information:
    r"""Mutual information in nats, ``float(information)`` is its value.

    Args:
        value: The estimate. It may fall below 0 by its error.
        standard_error: Of the draws, the data held; from one draw per datum that of draws and data together.
        cap: $\log N$, what no distribution of latents can exceed on N data. A value near it says that N is too small.
        num_data: N.
        num_particles: Draws per datum.
    """

    value: float
    standard_error: float
    cap: float
    num_data: int
    num_particles: int

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        near = ", near its cap: more data would show more" if self.value > self.cap - 0.5 and self.num_data > 1 else ""
        return (
            f"Information({self.value:.4f} +- {self.standard_error:.4f} nats, cap log {self.num_data} = {self.cap:.2f}"
            f"{near})"
        )


def information(own: Tensor, aggregate: Tensor, num_data: int) -> Information:
    r"""Return $I_q(x;z)=\frac1N\sum_n E_{q(z|x_n)}[\log q(z|x_n)-\log q(z)]$, with $q(z)=\frac1N\sum_mq(z|x_m)$.

    The datum itself is one of the m. x is then uniform over the N data, and the mean over draws is unbiased for its
    information, which is at most log N. (Over a batch of B the cap is log B, whatever the model has learnt.)

    Args:
        own: $\log q(z_{sn}|x_n)$, of draws $z_{sn}\sim q(\cdot|x_n)$.
        aggregate: $\log q(z_{sn})$, see `log_mean_exp`.
        num_data: N, over which the aggregate is taken.

    Shape: ``own, aggregate``: (particles, data), nats.

    Source: Hoffman and Johnson 2016, "ELBO surgery"; He et al. 2019, section 4.3, who take the aggregate over a batch.

    Example:
        >>> own = torch.tensor([[0.0, 0.0]])
        >>> information(own, own - math.log(2), 2)
        Information(0.6931 +- 0.0000 nats, cap log 2 = 0.69, near its cap: more data would show more)
    """
    terms = (own - aggregate).to(torch.float64)
    particles, rows = terms.shape
    if particles > 1:
        variance = terms.var(0).sum() / (particles * rows**2)
    else:
        variance = terms.var() / rows if rows > 1 else terms.new_tensor(math.nan)
    return Information(float(terms.mean()), float(variance.sqrt()), math.log(num_data), num_data, particles)


def log_mean_exp(log_density: Tensor) -> Tensor:
    r"""Return $\log\frac1N\sum_m\exp\ell_{im}$ of log densities $\ell$ ``(rows, N)``: ``(rows,)``.

    Example:
        >>> log_mean_exp(torch.tensor([[0.0, -math.inf]]))
        tensor([-0.6931])
    """
    return log_density.logsumexp(-1) - math.log(log_density.shape[-1])
