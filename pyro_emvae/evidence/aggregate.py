r"""What the latents tell about the data: information under the full aggregate posterior, and active units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import NonFiniteError, fail, positive_int, require_data
from ..estimators.base import is_discrete
from ..information import Information, information
from ..particles import hold_batch, quiet
from .encoder import Encoder, refuse

__all__ = ["ActiveUnits", "active_units", "mutual_information"]


def mutual_information(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1,
    plate: str | None = None,
    chunk_size: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Information:
    r"""Estimate how much a datum's latents tell about which datum it is.

    $$I_q(x;z)=\frac1N\sum_n\mathrm{KL}\big(q(z|x_n)\,\|\,q(z)\big)
      \approx\frac1{NS}\sum_{n,s}\Big[\log q(z_{sn}|x_n)-\log\frac1N\sum_mq(z_{sn}|x_m)\Big],\ z_{sn}\sim q(z|x_n).$$

    The aggregate q(z) has *all* data that are given: every draw is scored under every datum's posterior, in chunks. An
    average over batches of B, as is often reported, cannot exceed log B; here the cap is log N, and it is printed.

    When to use: to see whether a variational autoencoder uses its latents (posterior collapse: about 0).
    $E_x\mathrm{KL}(q(z|x)\|p(z))=I_q+\mathrm{KL}(q(z)\|p(z))$.

    Args:
        model, guide: As in Pyro; ``*args, **kwargs`` are the data, all of those that x is to stand for.
        num_particles: S, draws per datum. The number of densities is S N^2.
        plate: The plate of the data; by default the one that all local latents of the guide share.
        chunk_size: Draws that are scored at once; by default as many as fit into about 4e6 numbers.
        seed: Of a forked generator; None goes on from the present state of torch's, which is left where it was.

    The latents are the guide's in that plate, together; those outside are held at one draw. Modules run in eval mode;
    modes, buffers and generators are as before when it ends.

    Returns:
        An `Information`: value, standard error, cap.

    Raises:
        ModelError: No latent in a plate; several plates and none named; point masses, whose information is that of the
            data's identity; masked latents.
        NonFiniteError: A draw has no finite density under its own datum.

    Source: Hoffman and Johnson 2016; He, Spokoyny, Neubig and Berg-Kirkpatrick 2019, section 4.3. Differs: the
    aggregate is over all data, not over a batch.

    Example:
        >>> from pyro_emvae.problems import linear_gaussian
        >>> problem = linear_gaussian()
        >>> mutual_information(problem.model, problem.guide, *problem.args, num_particles=10, seed=0)
        Information(0.4469 +- 0.0665 nats, cap log 12 = 2.48)
    """
    positive_int("mutual_information", "num_particles", num_particles)
    require_data("mutual_information", args, kwargs)
    with quiet(seed=seed, train=False), torch.no_grad():
        encoder = Encoder.of("mutual_information", model, guide, args, kwargs, plate)
        with hold_batch(encoder.batch):
            values = encoder.draw(num_particles)
            size = positive_int("mutual_information", "chunk_size", chunk_size or encoder.rows_at_once)
            own, aggregate = zip(*encoder.densities(values, size), strict=True)
    own, aggregate = (torch.cat(rows).reshape(num_particles, -1) for rows in (own, aggregate))
    if not bool(torch.isfinite(own).all()):
        fail(
            NonFiniteError,
            "mutual_information",
            "average log densities",
            got=f"log q = {float(own[~torch.isfinite(own)][0])} of a draw under its own datum",
            because="every draw has a finite density under the distribution that it comes from",
            fix="Look at the guide's scales.",
        )
    return information(own, aggregate, encoder.size)


@dataclass(frozen=True)
class ActiveUnits:
    r"""Which dimensions of the latents the data move; ``int(units)`` is their number.

    Args:
        count: Dimensions whose variance is above the threshold.
        variance: $\mathrm{Var}_x\,E_q[z_u|x]$ by site, ``(*event)``.
        kl: $E_x\mathrm{KL}(q(z_u|x)\|p(z_u))$ by site and dimension, in nats; for sites whose dimensions are
            independent in guide and prior, and whose KL torch knows.
        threshold: What counts as active.
    """

    count: int
    variance: dict[str, Tensor] = field(repr=False)
    kl: dict[str, Tensor] = field(repr=False)
    threshold: float = 0.01

    def __int__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        total = sum(v.numel() for v in self.variance.values())
        return f"ActiveUnits({self.count} of {total} above {self.threshold:g})"


def active_units(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    threshold: float = 0.01,
    num_particles: int = 100,
    plate: str | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> ActiveUnits:
    r"""Count the dimensions of the latents whose posterior mean varies over the data.

    $$A_u=\mathrm{Var}_x\big(E_{q(z|x)}[z_u]\big)>0.01.$$

    Args:
        model, guide, plate, seed: As for `mutual_information`.
        threshold: 0.01 by custom.
        num_particles: Draws per datum where the guide's distribution has no mean of its own, or depends on other
            latents. The variance of the mean over draws is then taken off.

    Returns:
        `ActiveUnits`: their number, variances, and the KL per dimension.

    Raises:
        ModelError: As for `mutual_information`; also if all latents are discrete.

    Source: Burda, Grosse and Salakhutdinov 2016, section 5.2.

    Example:
        >>> from pyro_emvae.problems import linear_gaussian
        >>> problem = linear_gaussian()
        >>> active_units(problem.model, problem.guide, *problem.args)
        ActiveUnits(2 of 2 above 0.01)
    """
    require_data("active_units", args, kwargs)
    with quiet(seed=seed, train=False), torch.no_grad():
        encoder = Encoder.of("active_units", model, guide, args, kwargs, plate)
        names = [name for name, site in encoder.sites.items() if not is_discrete(site.fn)]
        if not names:
            refuse(
                "active_units", f"discrete latents {list(encoder.sites)}", "a category has no mean", "Leave them out."
            )
        with hold_batch(encoder.batch):
            variance = encoder.variances(names, positive_int("active_units", "num_particles", num_particles, 2))
        kl = {name: found for name in names if (found := encoder.kl(name)) is not None}
    return ActiveUnits(sum(int((v > threshold).sum()) for v in variance.values()), variance, kl, threshold)
