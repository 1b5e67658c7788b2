r"""Ready M-steps in closed form for linear-Gaussian models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import EmvaeError, StepError, fail, nearest
from ..posterior import Outer, Support
from .closed_form import ClosedForm, latent_of

__all__ = ["linear_gaussian", "local_level"]

FORMS = ("isotropic", "diagonal")


@dataclass(frozen=True)
class LinearStatistics:
    r"""Sums over the data of $x_{nj}^2$, $x_{nj}\tilde z_n$ and $\tilde z_n\tilde z_n^\top$, where $x_{nj}$ is not NaN.

    Args:
        latent: The latent site.
        bias: Whether $\tilde z=(z,1)$; else it is z.

    Returns:
        ``{"n": (D,), "xx": (D,), "xz": (D, w), "zz": (w, w)}``, or ``"zz": (D, w * w)`` with missing values; called
        with values: per outcome and datum; `total`: the sums, ``"zz": (1, w * w)`` if it is the same for all j.
    """

    latent: str
    bias: bool

    __name__ = "linear_gaussian_statistics"

    def __call__(self, values: Mapping[str, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        z = self._latent(values, x)
        z = torch.cat([z, torch.ones_like(z[..., :1])], -1) if self.bias else z
        missing = x.isnan()[None]
        if not bool(missing.any()):
            x = x[None]
            return {"n": x.new_ones(()).expand(x.shape), "xx": x.square(), "xz": Outer(x, z), "zz": Outer(z, z)}
        seen, x = (~missing).to(z), x.nan_to_num()[None]
        squares = Outer(seen, Outer(z, z).product.flatten(-2))
        return {"n": seen, "xx": x.square(), "xz": Outer(x, z), "zz": squares}

    def total(self, support: Support, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the sums; without missing values, and so without a copy of the latents that has a column of ones."""
        if bool(x.isnan().any()):
            return support.total(lambda values: self(values, x))

        def apart(values: Mapping[str, Tensor]) -> dict[str, Any]:
            z, one = self._latent(values, x), x.new_ones(())
            found = {"n": one.expand(1, *x.shape), "xx": x.square()[None], "xz": Outer(x[None], z), "zz": Outer(z, z)}
            return found | {"x": x[None], "z": z, "one": one.expand(1, z.shape[1])} if self.bias else found

        sums = support.total(apart)
        if self.bias:
            x, z = sums.pop("x")[:, None], sums.pop("z")[:, None]
            corner = torch.cat([z, sums.pop("one").reshape(1, 1)])
            sums["xz"] = torch.cat([sums["xz"], x], -1)
            sums["zz"] = torch.cat([torch.cat([sums["zz"], z.T]), corner], -1)
        return sums | {"zz": sums["zz"].reshape(1, -1)}

    def _latent(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        z = latent_of("steps.linear_gaussian", values, self.latent)
        if z.dim() != 3 or x.dim() != 2 or z.shape[1] not in (1, len(x)):
            fail(
                StepError,
                "steps.linear_gaussian",
                f"take statistics of site {self.latent!r} with the data",
                got=f"values of shape {tuple(z.shape)} and data of shape {tuple(x.shape)}",
                because="they are (particles, N, q) and (N, D)",
                fix="Give the latent .to_event(1), in one plate, and pass the batch of data that the plate holds.",
            )
        return z


def linear_gaussian(
    latent: str = "z",
    weight: str = "weight",
    bias: str | None = "bias",
    noise: str = "sigma",
    noise_form: str = "isotropic",
) -> ClosedForm:
    r"""Return the M-step of probabilistic PCA (isotropic noise) or factor analysis (diagonal).

    For $x_n\sim N(Wz_n+b,\Psi)$ with $\tilde z=(z,1)$, the regression of x on the latents, by their expectations:

    $$(W,b)_j=\sum_nE[x_{nj}\tilde z_n^\top]\Big(\sum_nE[\tilde z_n\tilde z_n^\top]\Big)^{-1},\qquad
      \psi_j=\frac1{N_j}\sum_nE\big[(x_{nj}-(W,b)_j\tilde z_n)^2\big],$$

    and for isotropic noise the mean of $\psi_j$, weighted by N_j. Sums go over the data in which x_nj is not NaN, so
    that missing values are left out, as they are from the likelihood by a mask in the model.

    Args:
        latent: The latent site, of event shape ``(q,)``, in one plate.
        weight: The parameter W, ``(D, q)``.
        bias: The parameter b, ``(D,)``; None: there is none.
        noise: The parameter of the noise's standard deviation: ``()`` if isotropic, ``(D,)`` if diagonal.
        noise_form: ``"isotropic"`` or ``"diagonal"``.

    The data, ``(N, D)``, are the model's first argument.

    Raises:
        EmvaeError: Another `noise_form`.
        StepError: The latent has another name or shape.

    Source: Tipping and Bishop 1999, eqs. 27 and 28, Rubin and Thayer 1982. Differs: the offset is estimated in the
    same regression.

    Example:
        >>> linear_gaussian(noise_form="diagonal")
        ClosedForm(linear_gaussian_statistics, linear_gaussian_update)
    """
    if noise_form not in FORMS:
        fail(
            EmvaeError,
            "steps.linear_gaussian",
            f"use noise_form={noise_form!r}",
            got="an unknown form",
            because="the noise is the same for all dimensions, or one per dimension",
            fix=nearest(str(noise_form), FORMS),
        )

    def linear_gaussian_update(sums: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        width = sums["xz"].shape[-1]
        square = sums["zz"].reshape(-1, width, width)
        both = torch.linalg.solve(square, sums["xz"][..., None]).squeeze(-1)
        left = sums["xx"] - (both * sums["xz"]).sum(-1)  # what the regression leaves: its residual is orthogonal
        variance = left.sum() / sums["n"].sum() if noise_form == "isotropic" else left / sums["n"]
        new = {weight: both[:, : width - (bias is not None)], noise: variance.clamp_min(0).sqrt()}
        return new if bias is None else new | {bias: both[:, -1]}

    return ClosedForm(LinearStatistics(latent, bias is not None), linear_gaussian_update)


def local_level(latent: str = "level_{}", level: str = "level_scale", noise: str = "noise_scale") -> ClosedForm:
    r"""Return the M-step of the local level model, a random walk observed with noise.

    For $\mu_t\sim N(\mu_{t-1},\sigma_\eta^2)$, $y_t\sim N(\mu_t,\sigma_\epsilon^2)$, with a given prior of $\mu_0$:

    $$\sigma_\epsilon^2=\frac1T\sum_tE[(y_t-\mu_t)^2],\qquad\sigma_\eta^2=\frac1{T-1}\sum_{t\ge1}E[(\mu_t-\mu_{t-1})^2].$$

    Args:
        latent: Names of the latent sites, with ``{}`` for the time, counted from 0.
        level: The parameter $\sigma_\eta$, a standard deviation.
        noise: The parameter $\sigma_\epsilon$.

    The series, ``(*plates, T)``, is the model's first argument; NaN where it is missing.

    Raises:
        StepError: There is no latent of such a name.

    Source: Shumway and Stoffer 1982, eqs. 12-14; Durbin and Koopman 2012, chapter 2.

    Example:
        >>> local_level()
        ClosedForm(local_level_statistics, local_level_update)
    """

    def local_level_statistics(values: Mapping[str, Tensor], y: Tensor, *args: Any, **kw: Any) -> dict[str, Tensor]:
        names = [latent.format(t) for t in range(y.shape[-1])]
        z = torch.stack([latent_of("steps.local_level", values, name) for name in names], -1)
        seen = ~y.isnan()
        residual = torch.where(seen, y - z, 0.0)
        steps = z.diff(dim=-1)
        return {
            "noise": residual.square().sum(-1),
            "level": steps.square().sum(-1),
            "n": seen.sum(-1).to(z).expand(z.shape[:-1]),
            "m": torch.full_like(z[..., 0], steps.shape[-1]),
        }

    def local_level_update(sums: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {noise: (sums["noise"] / sums["n"]).sqrt(), level: (sums["level"] / sums["m"]).sqrt()}

    return ClosedForm(local_level_statistics, local_level_update)
