r"""Which elements of one latent meet in a site, and whether they do so in a quadratic form."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..particles import quiet
from ._factored import FactoredJoint
from ._factors import DiscreteFactor
from ._families import Factor, NormalFactor

__all__ = ["at_once", "is_quadratic", "meeting_dims"]


def at_once(joint: FactoredJoint, factors: Sequence[Factor]) -> str:
    """Return which values the model may be run at in one run: ``"all"``, those of ``"discrete"`` latents, ``"none"``.

    Two rows of values are run together and one by one, and have to agree at each site.
    """
    rows = [_random(joint, factors, level) for level in range(2)]
    every = {name: torch.stack([row[name] for row in rows]) for name in joint.latents}
    if _agree(joint, every, common=False):
        return "all"
    if len(joint.leaves) == len(joint.latents):
        return "none"
    same = {name: x[:1].expand(x.shape) if name in joint.leaves else x for name, x in every.items()}
    return "discrete" if _agree(joint, same, common=True) else "none"


def _agree(joint: FactoredJoint, values: Mapping[str, Tensor], common: bool) -> bool:
    with quiet(train=False, validate=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        looped = joint.run(values, 2, how="none")
        try:
            together = joint.run(values, 2, how="discrete" if common else "all")
        except Exception:  # any failure of the user's code under an extra dim is the answer
            return False
    tolerance = 1e-4 if joint.dtype == torch.float32 else 1e-8
    for name, site in looped.model.items():
        one, two = looped.rows(site.scaled), together.rows(together.model[name].scaled)
        if one.dim() != two.dim() or any(n != m and 1 not in (n, m) for n, m in zip(one.shape, two.shape, strict=True)):
            return False
        size = max(1.0, float(one.nan_to_num().abs().max()))
        if not torch.allclose(one, two.expand_as(one) if two.shape != one.shape else two, tolerance, tolerance * size):
            return False
    return True


def meeting_dims(joint: FactoredJoint, factors: Sequence[Factor], place: int) -> tuple[int, ...]:
    r"""Return the plate dims of a factor along which its elements depend on each other given all else.

    A plate declares its elements independent in the sites that are inside it. Where a latent moves a site outside of
    one of its plates, two groups A and B of its elements meet there if the mixed difference

    $$f(z_A',z_B')-f(z_A',z_B)-f(z_A,z_B')+f(z_A,z_B)$$

    is not zero. Groups by each binary digit of the index tell any two elements apart. Those of a discrete latent are
    taken to meet.
    """
    factor = factors[place]
    lacking: dict[int, list[str]] = {}
    for name in factor.names:
        for dim, sites in joint.lacking(name).items():
            lacking.setdefault(dim, []).extend(sites)
    found = []
    for dim, sites in lacking.items():
        key = ("meet", joint.model, factor.names, dim)
        if isinstance(factor, DiscreteFactor) or joint.known.get(key) or _meet(joint, factors, place, dim, sites):
            joint.known[key] = True
            found.append(dim)
    return tuple(sorted(found))


def _meet(joint: FactoredJoint, factors: Sequence[Factor], place: int, dim: int, sites: list[str]) -> bool:
    names = factors[place].names
    base, other = (_random(joint, factors, level) for level in range(2))
    size = joint.shape(names[0])[dim]
    values: dict[str, list[Tensor]] = {name: [] for name in base}
    for bit in range((size - 1).bit_length()):
        first = (torch.arange(size) >> bit & 1).bool()
        for moved in (torch.zeros_like(first), first, ~first, torch.ones_like(first)):
            for name, x in base.items():
                if name in names:
                    event = joint.latents[name].fn.event_dim
                    mask = moved.reshape(size, *(1,) * (-dim - 1 + event)).to(x.device)
                    values[name].append(torch.where(mask, other[name], x))
                else:
                    values[name].append(x)
    return not _vanish(joint, values, sites, torch.tensor([1.0, -1.0, -1.0, 1.0]))


def is_quadratic(joint: FactoredJoint, factors: Sequence[Factor], place: int) -> bool:
    r"""Whether the log joint is quadratic in all elements of a Gaussian factor together.

    Then its third difference along a line vanishes, at any of the others' values.
    """
    factor = factors[place]
    if not isinstance(factor, NormalFactor):
        return False
    base, other = (_random(joint, factors, level) for level in range(2))
    values = {name: [x] * 4 for name, x in base.items()}
    start, step = base[factor.name], (other[factor.name] - base[factor.name]) / 3
    values[factor.name] = [start + t * step for t in range(4)]
    return _vanish(joint, values, joint.moved_by(factor.names), torch.tensor([1.0, -3.0, 3.0, -1.0]))


def _vanish(joint: FactoredJoint, values: Mapping[str, list[Tensor]], sites: Sequence[str], signs: Tensor) -> bool:
    """Whether a signed sum over each four rows of the log densities is zero, up to rounding, at all elements."""
    stacked = {name: torch.stack(rows) for name, rows in values.items()}
    count = len(next(iter(stacked.values())))
    with torch.no_grad():
        run = joint.run(stacked, count)
    for name in sites:
        rows = run.rows(run.model[name].log_prob)
        rows = rows.reshape(-1, 4, *rows.shape[1:]).double()
        sign = signs.reshape(4, *(1,) * (rows.dim() - 2)).to(rows)
        miss, size = (sign * rows).sum(1).abs(), 1.0 + (sign * rows).abs().sum(1)
        if bool((miss > torch.finfo(joint.dtype).eps ** 0.5 * size).any()):
            return False
    return True


def _random(joint: FactoredJoint, factors: Sequence[Factor], level: int) -> dict[str, Tensor]:
    """Return a value for each latent, on the scale of its factor, from fixed random numbers."""
    generator, outcomes = (torch.Generator().manual_seed(seed) for seed in (level, 99))
    values: dict[str, Tensor] = {}
    for factor in factors:
        if isinstance(factor, DiscreteFactor):
            chosen = torch.randint(len(factor.outcomes), factor.logits.shape[:-1], generator=outcomes)
            chosen = (chosen + level) % len(factor.outcomes)
            values[factor.name] = factor.outcomes[chosen.to(factor.outcomes.device)]
            continue
        noise = {
            name: torch.randn(joint.latents[name].value.shape, generator=generator, dtype=torch.float64)
            for name in factor.names
        }
        values.update(factor.around({n: x.to(joint.latents[n].value) for n, x in noise.items()}, wide=True))
    return {name: values[name].detach().expand(site.value.shape) for name, site in joint.latents.items()}
