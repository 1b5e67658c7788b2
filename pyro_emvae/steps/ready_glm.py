r"""Ready M-steps for generalized linear models with random effects: fixed effects given the latents, and their prior.

With a linear predictor $\eta_n=x_n^\top\beta+o_n(z)$, the offset $o_n$ being a function of the latents, the statistics
are what the family needs of $o_n$ to find $\beta$ exactly. Parameter names are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import DegenerateError, EmvaeError, fail, nearest
from ..posterior import Outer
from .closed_form import ClosedForm, latent_of
from .combined import combined

__all__ = ["glm_intercepts", "linear_mixed", "random_effects"]

FAMILIES = ("normal", "poisson", "bernoulli")
Offset = Callable[..., Tensor]


@dataclass(frozen=True)
class Rows:
    r"""The observations' offsets, and sums of products over the observations of each latent.

    Args:
        obj: Who asks, for its errors.
        latent: Name of the latent.
        offset: ``offset(values, *args, **kwargs) -> (S, *plates)``; None: the latent itself.
        groups: Which argument holds the number of each observation's latent, where observations have a plate of their
            own.
    """

    obj: str
    latent: str
    offset: Offset | None
    groups: int | str | None

    def offsets(self, values: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        if self.offset is not None:
            return self.offset(values, *args, **kwargs)
        z = self._latent(values)
        return z if self.groups is None else z[:, _argument(self.groups, args, kwargs)]

    def outer(
        self, left: Tensor, right: Tensor, values: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]
    ) -> Tensor | Outer:
        """Return the products per element of the latents' plates."""
        if self.groups is None:
            return Outer(left, right)
        product = Outer(left, right).product
        index, latent = _argument(self.groups, args, kwargs), self._latent(values)
        shape = (len(product), latent.shape[1], *product.shape[2:])
        return product.new_zeros(shape).index_add(1, index, product)

    def _latent(self, values: Mapping[str, Tensor]) -> Tensor:
        return latent_of(self.obj, values, self.latent)


def glm_intercepts(
    family: str,
    *,
    latent: str = "b",
    intercept: str = "intercept",
    noise: str = "sigma",
    data: int | str = 0,
    levels: int | str | None = None,
    num_levels: int = 1,
    groups: int | str | None = None,
    offset: Offset | None = None,
    bound: float = 10.0,
) -> ClosedForm:
    r"""M-step of the intercepts of a generalized linear model, $\eta_n=\beta_{l(n)}+o_n$, one per level.

    $$\text{normal: }\beta_l=\frac{\sum(y_n-E\,o_n)}{n_l},\quad\sigma^2=\frac1N\sum E[(y_n-\beta-o_n)^2];\qquad
      \text{poisson: }e^{\beta_l}=\frac{\sum y_n}{\sum E\,e^{o_n}};\qquad
      \text{bernoulli: }\sum y_n=\sum E\,\frac1{1+e^{-\beta_l-o_n}},$$

    sums over the data of level l. The links are identity, log and logit. The last equation has no finite sufficient
    statistic. Its right side is an analytic function of $\beta$, so the statistics are its values at Chebyshev points
    of ``[-bound, bound]``, which determine it to 10 digits, and the update finds the root there. Statistics that add
    up, and that can be averaged, are then exact to that.

    When to use: count, binary or continuous data with random effects or known offsets, with `random_effects` for the
    prior: ``combined(glm_intercepts("poisson"), random_effects())``. Where the model centres its random effects at the
    intercept, ``random_effects(loc=...)`` alone does it.

    Args:
        family: ``"normal"``, ``"poisson"`` or ``"bernoulli"``.
        latent: Name of the latent, whose values are the offsets unless `offset` says otherwise.
        intercept: Name of the parameter: ``()``, or ``(L,)`` with `levels`.
        noise: Name of the normal family's standard deviation, ``()``.
        data: Which argument of the model holds the responses: a position or a keyword. NaN is missing and left out.
        levels: Which argument holds the level of each datum, 0 to L - 1; None: one intercept.
        num_levels: L.
        groups: Which argument holds the number of each datum's random effect, if the data are in a plate of their own
            beside that of the latent; None: they share plates.
        offset: ``offset(values, *args, **kwargs) -> (S, *plates of the data)``, for offsets that are not the latent's
            values themselves, such as ``lambda values, y, x, group: values["b"][:, group] * x``.
        bound: Of a Bernoulli's intercepts.

    Raises:
        EmvaeError: Another family.
        StepError: By the step: no latent of that name.
        DegenerateError: By the update: a level without an event, or of events alone, whose intercept is infinite.

    Source: McCullagh and Nelder 1989, chapter 2, for the likelihood equations; Trefethen 2013, chapters 5 and 8, for
    the interpolation.

    Example:
        >>> glm_intercepts("poisson")
        ClosedForm(poisson_statistics, poisson_update)
    """
    if family not in FAMILIES:
        fail(
            EmvaeError,
            "steps.glm_intercepts",
            f"use family={family!r}",
            got="an unknown family",
            because=f"there are {', '.join(FAMILIES)}",
            fix=nearest(str(family), FAMILIES),
        )
    rows = Rows("steps.glm_intercepts", latent, offset, groups)
    features = {"normal": _residuals, "poisson": _rates, "bernoulli": lambda y, o: _probabilities(y, o, bound)}[family]
    solve = {"normal": _normal, "poisson": _poisson, "bernoulli": lambda sums: _bernoulli(sums, bound)}[family]

    def statistics(values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        y = _argument(data, args, kwargs)[None]
        o = rows.offsets(values, args, kwargs)
        level = None if levels is None else _argument(levels, args, kwargs)
        one = torch.ones_like(y) if level is None else torch.nn.functional.one_hot(level.long(), num_levels)[None]
        one = (one[..., None] if level is None else one).to(o)
        seen = ~y.isnan()[..., None]
        right = torch.where(seen, torch.stack([x.expand(o.shape) for x in features(y, o)], -1), 0.0)
        return {"sums": rows.outer(one, right, values, args, kwargs)}

    def update(sums: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(zip((intercept, noise), solve(sums["sums"]), strict=False))
        return {name: x.reshape(params[name].shape) for name, x in found.items()}

    statistics.__name__, update.__name__ = f"{family}_statistics", f"{family}_update"
    return ClosedForm(statistics, update)


def random_effects(latent: str = "b", scale: str = "tau", loc: str | None = None) -> ClosedForm:
    r"""M-step of the prior of random effects, $b_g\sim N(\mu,\tau^2)$.

    $$\mu=\frac1G\sum_gE\,b_g,\qquad\tau^2=\frac1G\sum_gE[(b_g-\mu)^2].$$

    When to use: with the step of the regression that the effects are in, by `combined`.

    Args:
        latent: Name of the latent, ``(S, *plates, *event)``.
        scale: The parameter of the standard deviation: of the latent's event shape, or ``()`` for all coordinates.
        loc: The parameter of the mean, likewise; None: it is zero.

    Raises:
        StepError: By the step: no latent of that name.

    Source: Laird and Ware 1982, section 3, for the variance.

    Example:
        >>> random_effects(loc="mean")
        ClosedForm(effects_statistics, effects_update)
    """

    def effects_statistics(values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        z = latent_of("steps.random_effects", values, latent)
        return {"n": torch.ones_like(z[:1]), "first": z, "second": z.square()}

    def effects_update(sums: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = 0.0 if loc is None else _over(sums["first"], sums["n"], params[loc].dim())
        square = sums["second"] - (2 * sums["first"] - sums["n"] * mean) * mean
        new = {scale: _over(square, sums["n"], params[scale].dim()).clamp_min(0).sqrt()}
        return new if loc is None else new | {loc: mean}

    return ClosedForm(effects_statistics, effects_update)


def linear_mixed(
    *,
    latent: str = "b",
    fixed: str = "beta",
    noise: str = "sigma",
    scale: str = "tau",
    data: int | str = 0,
    design: int | str = 1,
    groups: int | str | None = 2,
    offset: Offset | None = None,
) -> ClosedForm:
    r"""M-step of the linear mixed model $y_n\sim N(x_n^\top\beta+o_n(b),\sigma^2)$, $b_g\sim N(0,\tau^2)$.

    $$\beta=\Big(\sum x_nx_n^\top\Big)^{-1}\sum x_n(y_n-E\,o_n),\qquad
      \sigma^2=\frac1N\sum E[(y_n-x_n^\top\beta-o_n)^2],\qquad\tau^2=\frac1G\sum E\,b_g^2.$$

    When to use: after `Gaussian`, which is exact here.

    Args:
        latent: Name of the random effects.
        fixed, noise, scale: Names of the parameters: ``beta (P,)``, standard deviations ``()`` and, as in
            `random_effects`, ``tau``.
        data, design: Which arguments hold y ``(N,)`` and x ``(N, P)``: positions or keywords. NaN in y is missing.
        groups, offset: As for `glm_intercepts`: a random slope is ``offset=lambda values, y, x, group:
            (values["b"][:, group] * x).sum(-1)`` with b of event shape ``(P,)``.

    Raises:
        StepError: By the step: no latent of that name.
        DegenerateError: By the update: a design of linearly dependent columns.

    Source: Laird and Ware 1982; Dempster, Rubin and Tsutakawa 1981. Differs: coordinates of a random effect are
    independent a priori.

    Example:
        >>> linear_mixed()
        ClosedForm(combined_statistics, combined_update)
    """
    rows = Rows("steps.linear_mixed", latent, offset, groups)

    def regression_statistics(values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        y, x = _argument(data, args, kwargs)[None], _argument(design, args, kwargs)[None]
        residual = y - rows.offsets(values, args, kwargs)
        seen = ~y.isnan()[..., None]
        x, residual = torch.where(seen, x.to(residual), 0.0), torch.where(seen, residual[..., None], 0.0)
        one = seen.to(residual)
        pairs = {"xx": (x, x), "xr": (x, residual), "rr": (one, residual.square()), "n": (one, one)}
        return {name: rows.outer(*pair, values, args, kwargs) for name, pair in pairs.items()}

    def regression_update(sums: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        beta = torch.linalg.solve(sums["xx"], sums["xr"])
        left = sums["rr"] - beta.mT @ sums["xr"]  # the residual is orthogonal to the regression
        new = {fixed: beta, noise: (left / sums["n"]).clamp_min(0).sqrt()}
        return {name: value.reshape(params[name].shape) for name, value in new.items()}

    return combined(ClosedForm(regression_statistics, regression_update), random_effects(latent, scale))


# Families -----------------------------------------------------------------------------------------------------------


def _residuals(y: Tensor, o: Tensor) -> list[Tensor]:
    return [torch.ones_like(y), y - o, (y - o).square()]


def _normal(sums: Tensor) -> list[Tensor]:
    n, first, second = sums.unbind(-1)
    mean = first / n
    return [mean, ((second - n * mean.square()).sum() / n.sum()).clamp_min(0).sqrt()]


def _rates(y: Tensor, o: Tensor) -> list[Tensor]:
    return [y, o.exp()]


def _poisson(sums: Tensor) -> list[Tensor]:
    events, exposure = sums.unbind(-1)
    _refuse(events <= 0, "no event in it")
    return [(events / exposure).log()]


def _points(bound: float) -> tuple[Tensor, Tensor]:
    r"""Return Chebyshev points of an interval and their barycentric weights: as many as 10 digits of the logistic take.

    The logistic function has its nearest poles at $\pm i\pi$, so the error falls by $\rho=h+\sqrt{h^2+1}$ with each
    point, $h=\pi/\text{bound}$.
    """
    number = math.ceil(25 / math.asinh(math.pi / bound))
    angle = (2 * torch.arange(number, dtype=torch.float64) + 1) * (math.pi / (2 * number))
    return bound * angle.cos(), angle.sin() * (1 - 2 * (torch.arange(number) % 2))


def _probabilities(y: Tensor, o: Tensor, bound: float) -> list[Tensor]:
    return [torch.ones_like(y), y, *((o + float(point)).sigmoid() for point in _points(bound)[0])]


def _bernoulli(sums: Tensor, bound: float) -> list[Tensor]:
    """Return where the expected number of events is the observed one, by bisection of the interpolant."""
    points, weights = (x.to(sums) for x in _points(bound))
    events, expected = sums[..., 1:2], sums[..., 2:]

    def excess(beta: Tensor) -> Tensor:
        apart = beta - points
        near = weights / torch.where(apart == 0, torch.finfo(sums.dtype).tiny ** 0.5, apart)
        return (near * expected).sum(-1, keepdim=True) / near.sum(-1, keepdim=True) - events

    low, high = torch.full_like(events, -bound), torch.full_like(events, bound)
    _refuse((excess(low) > 0).squeeze(-1), f"an intercept below {-bound:g}: hardly an event in it")
    _refuse((excess(high) < 0).squeeze(-1), f"an intercept above {bound:g}: hardly anything but events in it")
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = excess(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return [(0.5 * (low + high)).squeeze(-1)]


def _refuse(bad: Tensor, got: str) -> None:
    if bool(bad.any()):
        fail(
            DegenerateError,
            "steps.glm_intercepts",
            f"update the intercept of level {int(bad.nonzero()[0])}",
            got=got,
            because="its maximum is then at infinity, or out of bounds",
            fix="Leave the level out, or merge it with another.",
        )


# Of the model -------------------------------------------------------------------------------------------------------


def _argument(place: int | str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return kwargs[place] if isinstance(place, str) else args[place]


def _over(total: Tensor, number: Tensor, dims: int) -> Tensor:
    """Return the mean per coordinate, or over all coordinates for a parameter without dims."""
    return total / number if dims or not total.dim() else total.sum() / number.sum()
