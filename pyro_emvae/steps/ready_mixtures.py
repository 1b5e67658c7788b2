r"""Ready M-steps in closed form for mixtures, with one discrete latent per datum.

$$r_{nk}=p(z_n=k|x_n),\quad n_k=\sum_n r_{nk},\quad \bar x_k=\frac1{n_k}\sum_n r_{nk}x_n,\quad
  S_k=\frac1{n_k}\sum_n r_{nk}(x_n-\bar x_k)(x_n-\bar x_k)^\top.$$

Each function returns a `ClosedForm`, which goes with every E-step that gives the latent's values: `Enumerated` sums
over all components, a Monte Carlo E-step over its draws. Parameter names are arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import DegenerateError, StepError, fail, nearest, positive_int
from ..posterior import Support
from .closed_form import ClosedForm

__all__ = ["bernoulli_mixture", "categorical_mixture", "gaussian_mixture", "poisson_mixture"]

COVARIANCES = ("full", "tied", "diagonal", "spherical")
KINDS = ("k-means", "k-means++", "random data")  # of starts, by the seed


@dataclass(frozen=True)
class MixtureStatistics:
    r"""Sums of responsibilities, and of features and their products weighted by them.

    Args:
        num_components: K.
        latent: Name of the latent: a Categorical (or Bernoulli) in the plate of the data.
        data: Which argument of the model holds the data: a position or a keyword.
        features: Turns the data into a tensor ``(*plates, ...)``.
        order: 1: sums of features ``first: (K, F)``; ``"squares"``: also ``second: (K, F)``; ``"products"``: also
            ``second: (K, F, F)``.

    Returns:
        ``{"count": (K,), "first": ..., "second": ...}``, called with values: per outcome and datum; `total`: the sums.
    """

    num_components: int
    latent: str
    data: int | str
    features: Callable[[Tensor], Tensor]
    order: str = "first"

    __name__ = "mixture_statistics"

    def __call__(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        z = self._indicators(values)
        x = self._features(args, kwargs, z.dim() - 2)[None]
        found = {"count": z, "first": z[..., None] * x[..., None, :]}
        if self.order == "squares":
            found["second"] = z[..., None] * x.square()[..., None, :]
        if self.order == "products":
            found["second"] = z[..., None, None] * (x[..., None] * x[..., None, :])[..., None, :, :]
        return found

    def total(self, support: Support, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the sums as products of matrices, in memory of the size of the data."""
        r = support.weigh(self._responsibilities(support))
        x = self._features(args, kwargs, r.dim() - 1).to(r)
        r, x = r.expand(*x.shape[:-1], -1).reshape(-1, self.num_components), x.reshape(-1, x.shape[-1])
        return self._sums(r, torch.where((r > 0).any(-1, keepdim=True), x, 0.0))  # a masked datum may be NaN

    def _sums(self, r: Tensor, x: Tensor) -> dict[str, Tensor]:
        found = {"count": r.sum(0), "first": r.T @ x}
        if self.order == "squares":
            found["second"] = r.T @ x.square()
        if self.order == "products":
            found["second"] = _products(r, x)
        return found

    def clusters(self, seed: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Return the sums of a hard clustering, from which a run may start.

        The first centre is a datum; each further one is drawn with probability proportional to its squared distance (in
        standard deviations) from the nearest one so far. So that starts differ, seeds take three `KINDS` in turn: ten
        steps of k-means from there, none, and data drawn at random in place of these centres.

        Source: Arthur and Vassilvitskii 2007 (k-means++).
        """
        x = self._features(args, kwargs, 1)
        generator = torch.Generator().manual_seed(seed)
        scaled = x.double().cpu() / x.double().cpu().std(0).clamp(min=1e-12)
        centres = scaled[torch.randint(len(x), (1,), generator=generator)]
        kind = KINDS[seed % len(KINDS)]
        for _ in range(self.num_components - 1):
            distance = torch.cdist(scaled, centres).min(-1).values.square()
            distance = (distance > 0).to(distance) if kind == "random data" else distance
            chosen = torch.multinomial(distance + 1e-12, 1, generator=generator)
            centres = torch.cat([centres, scaled[chosen]])
        for step in range(11 if kind == "k-means" else 1):
            nearest_one = torch.cdist(scaled, centres).argmin(-1)
            r = torch.nn.functional.one_hot(nearest_one, self.num_components).to(scaled)
            if step < 10:
                centres = torch.where(r.sum(0)[:, None] > 0, r.T @ scaled / r.sum(0)[:, None], centres)
        return self._sums(r.to(x) + 1e-3 / self.num_components, x)

    def _responsibilities(self, support: Support) -> Tensor:
        z = self._indicators(support.values)
        if z[0, ..., 0].numel() > 1:
            return support.expect(lambda values: z)
        z = z.reshape(len(z), -1).to(support.log_weights)  # outcomes, the same for each datum
        return torch.tensordot(support.weights, z, ([0], [0]))

    def _indicators(self, values: Mapping[str, Tensor]) -> Tensor:
        if self.latent not in values:
            fail(
                StepError,
                "steps.ready_mixtures",
                f"read latent {self.latent!r}",
                got="no such latent",
                because="statistics are sums over the mixture's component",
                fix=nearest(self.latent, values) + " Write latent=...",
            )
        z = values[self.latent]
        return (z[..., None] == torch.arange(self.num_components, device=z.device)).to(torch.get_default_dtype())

    def _features(self, args: tuple, kwargs: Mapping[str, Any], num_plates: int) -> Tensor:
        x = self.features(kwargs[self.data] if isinstance(self.data, str) else args[self.data])
        return x.reshape(*x.shape[:num_plates], -1)


CHUNK = 2**18


def _products(r: Tensor, x: Tensor) -> Tensor:
    r"""Return $\sum_n r_{nk}x_nx_n^\top$: ``(K, D, D)``.

    By one product of matrices with the distinct $x_{ni}x_{nj}$, of as many data at a time as fit into the cache; or, if
    these are more numbers than $r_{nk}x_n$ for all k, by one product per component.
    """
    width = x.shape[-1]
    if width + 1 > 2 * r.shape[-1]:
        return torch.stack([(weight[:, None] * x).T @ x for weight in r.T])
    size, rows = width * (width + 1) // 2, max(CHUNK * 2 // (width * (width + 1)), 1)
    sums = []
    for part, weight in zip(x.split(rows), r.split(rows), strict=True):
        columns = part.T.contiguous()
        sums.append(weight.T @ torch.cat([columns[i:] * columns[i] for i in range(width)]).T)
    place = torch.zeros(width, width, dtype=torch.long, device=x.device)
    i, j = torch.triu_indices(width, width, device=x.device)
    place[i, j] = place[j, i] = torch.arange(size, device=x.device)
    return functools.reduce(torch.add, sums)[:, place]


def gaussian_mixture(
    num_components: int,
    covariance: str = "full",
    *,
    latent: str = "z",
    data: int | str = 0,
    weights: str = "weights",
    means: str = "means",
    scales: str = "scales",
    origin: Any = 0.0,
    floor: float = 1e-6,
) -> ClosedForm:
    r"""M-step of a mixture of multivariate normals: $\pi_k=n_k/N$, $\mu_k=\bar x_k$, $\Sigma_k=S_k$.

    Args:
        num_components: K.
        covariance: ``"full"``: $S_k$; ``"tied"``: $\sum_k n_kS_k/N$; ``"diagonal"``: the diagonal of $S_k$;
            ``"spherical"``: its mean.
        latent: Name of the discrete latent.
        data: Which argument of the model holds the data ``(N, D)``: a position or a keyword.
        weights, means, scales: Names of the parameters: ``weights (K,)``, ``means (K, D)``, and ``scales``: Cholesky
            factors ``(K, D, D)``, tied ``(D, D)``, or standard deviations ``(K, D)``, spherical ``(K,)``. For numbers
            ``(N,)``: ``means (K,)``, and standard deviations ``(K,)``, ``"diagonal"``.
        origin: Subtracted from the data before squares are summed. In float32, give a tensor near the data's mean if
            that is many standard deviations from zero.
        floor: A covariance whose smallest eigenvalue, in units of the data's variances, is below this is degenerate:
            the likelihood has no bound there.

    Raises:
        EmvaeError: Another covariance.
        DegenerateError: By the update: a component without data, or of a singular covariance; `EM.run` then ends with
            status ``"DEGENERATE"``.

    Source: Dempster, Laird and Rubin 1977, section 4.3; McLachlan and Peel 2000, chapter 3.

    Example:
        >>> sums = {"count": torch.tensor([2.0, 2.0]), "first": torch.tensor([[2.0], [8.0]])}
        >>> gaussian_mixture(2, "diagonal").update(sums | {"second": torch.tensor([[10.0], [34.0]])}, {})["scales"]
        tensor([[2.],
                [1.]])
    """
    positive_int("steps.gaussian_mixture", "num_components", num_components)
    if covariance not in COVARIANCES:
        fail(
            StepError,
            "steps.gaussian_mixture",
            f"use covariance={covariance!r}",
            got="an unknown kind",
            because=f"there are {', '.join(COVARIANCES)}",
            fix=nearest(str(covariance), COVARIANCES),
        )
    matrix = covariance in ("full", "tied")

    def update(stats: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count, mean = stats["count"], _means(stats)
        outer = mean[:, :, None] * mean[:, None, :] if matrix else mean.square()
        spread = stats["second"] - count.reshape(-1, *(1,) * (outer.dim() - 1)) * outer  # n_k S_k
        if covariance == "tied":
            found = spread.sum(0) / count.sum()
        else:
            found = spread / count.reshape(-1, *(1,) * (spread.dim() - 1))
        _refuse_singular(found, _variances(stats, matrix), floor, matrix)
        if covariance == "spherical":
            found = found.mean(-1)
        scale = torch.linalg.cholesky((found + found.mT) / 2) if matrix else found.sqrt()
        return _shaped({weights: count / count.sum(), means: mean + origin, scales: scale}, params)

    def start(seed: int, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the means of clusters, and for all of them the covariance within clusters."""
        stats = statistics.clusters(seed, *args, **kwargs)
        count, mean = stats["count"], _means(stats)
        outer = mean[:, :, None] * mean[:, None, :] if matrix else mean.square()
        within = (stats["second"] - count.reshape(-1, *(1,) * (outer.dim() - 1)) * outer).sum(0) / count.sum()
        variances = _variances(stats, matrix)
        within = 0.9 * within + 0.1 * (variances.diag() if matrix else variances)
        scale = torch.linalg.cholesky(within) if matrix else within.sqrt()
        if covariance == "spherical":
            scale = within.mean().sqrt()
        if covariance != "tied":
            scale = scale.expand(num_components, *scale.shape)
        return _shaped({weights: count / count.sum(), means: mean + origin, scales: scale}, params)

    update.__name__, start.kinds = covariance, KINDS
    order = "products" if matrix else "squares"
    statistics = MixtureStatistics(num_components, latent, data, lambda x: x - origin, order)
    return ClosedForm(statistics, update, start=start)


def _shaped(values: dict[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values in the shapes of the parameters, where a mixture of numbers leaves out a dim of size 1."""
    short = {name: params[name].shape for name in values if name in params}
    return {
        name: x.squeeze(-1) if x.shape[-1:] == (1,) and short.get(name) == x.shape[:-1] else x
        for name, x in values.items()
    }


def _means(stats: Mapping[str, Tensor]) -> Tensor:
    count = stats["count"]
    empty = count <= torch.finfo(count.dtype).eps * count.sum()
    if bool(empty.any()):
        fail(
            DegenerateError,
            "steps.ready_mixtures",
            f"update component {int(empty.nonzero()[0])}",
            got="no datum in it",
            because="its parameters are not determined then",
            fix="Use fewer components or another start.",
        )
    return stats["first"] / count[:, None]


def _variances(stats: Mapping[str, Tensor], matrix: bool) -> Tensor:
    """Return the variance of each feature over all data."""
    number = stats["count"].sum()
    second = stats["second"].sum(0) / number
    second = second.diagonal() if matrix else second
    return second - (stats["first"].sum(0) / number).square()


def _refuse_singular(covariance: Tensor, variances: Tensor, floor: float, matrix: bool) -> None:
    if matrix:
        scale = variances.sqrt()
        smallest = torch.linalg.eigvalsh(covariance / (scale[:, None] * scale)).min(-1).values
    else:
        smallest = (covariance / variances).min(-1).values
    smallest = torch.atleast_1d(smallest)
    singular = ~(smallest > floor)
    if bool(singular.any()):
        place = int(singular.nonzero()[0])
        fail(
            DegenerateError,
            "steps.gaussian_mixture",
            f"update component {place}",
            got=f"a covariance whose smallest eigenvalue is {float(smallest[place]):.2g} of the data's variance",
            because=f"below {floor:g} it is taken as singular, where the likelihood has no bound",
            fix="Use another start (n_init=10), fewer components, or another covariance.",
        )


def bernoulli_mixture(
    num_components: int, *, latent: str = "z", data: int | str = 0, weights: str = "weights", probs: str = "probs"
) -> ClosedForm:
    r"""M-step of a mixture of Bernoulli vectors (latent class analysis): $\pi_k=n_k/N$, $p_k=\bar x_k$.

    Args:
        num_components, latent, data, weights: As for `gaussian_mixture`; the data are zeros and ones ``(N, ...)``.
        probs: Name of the probabilities ``(K, ...)``. One of 0 or 1 is kept within the rounding unit of its dtype, for
            a logit is finite.

    Raises:
        DegenerateError: By the update: a component without data.

    Source: McLachlan and Peel 2000, section 5.3.

    Example:
        >>> sums = {"count": torch.tensor([4.0, 4.0]), "first": torch.tensor([[1.0, 2.0], [3.0, 1.0]])}
        >>> bernoulli_mixture(2).update(sums, {"probs": torch.zeros(2, 2)})["probs"]
        tensor([[0.2500, 0.5000],
                [0.7500, 0.2500]])
    """

    def update(stats: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = _means(stats)
        edge = torch.finfo(mean.dtype).eps
        return {weights: _shares(stats), probs: mean.clamp(edge, 1 - edge).reshape(params[probs].shape)}

    update.__name__ = "bernoulli"
    return _mixture(MixtureStatistics(num_components, latent, data, _float), update)


def poisson_mixture(
    num_components: int, *, latent: str = "z", data: int | str = 0, weights: str = "weights", rates: str = "rates"
) -> ClosedForm:
    r"""M-step of a mixture of Poisson counts: $\pi_k=n_k/N$, $\lambda_k=\bar x_k$.

    Args:
        num_components, latent, data, weights: As for `gaussian_mixture`; the data are counts ``(N, ...)``.
        rates: Name of the rates ``(K, ...)``. A rate of zero is kept at the smallest number, for its logarithm is
            finite.

    Raises:
        DegenerateError: By the update: a component without data.

    Source: McLachlan and Peel 2000, section 5.4.

    Example:
        >>> sums = {"count": torch.tensor([3.0, 1.0]), "first": torch.tensor([[6.0, 3.0], [4.0, 0.5]])}
        >>> poisson_mixture(2).update(sums, {"rates": torch.ones(2, 2)})["rates"]
        tensor([[2.0000, 1.0000],
                [4.0000, 0.5000]])
    """

    def update(stats: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = _means(stats)
        return {weights: _shares(stats), rates: mean.clamp(min=torch.finfo(mean.dtype).tiny).reshape_as(params[rates])}

    update.__name__ = "poisson"
    return _mixture(MixtureStatistics(num_components, latent, data, _float), update)


def categorical_mixture(
    num_components: int,
    num_categories: int,
    *,
    latent: str = "z",
    data: int | str = 0,
    weights: str = "weights",
    probs: str = "probs",
) -> ClosedForm:
    r"""M-step of a mixture of categorical vectors: $\pi_k=n_k/N$, and $p_{kdc}$, the share of category c at place d.

    Args:
        num_components, latent, data, weights: As for `gaussian_mixture`; the data are integers ``(N, ...)``.
        num_categories: C.
        probs: Name of the probabilities ``(K, ..., C)``. A zero is kept at the rounding unit of its dtype.

    Raises:
        DegenerateError: By the update: a component without data.

    Source: McLachlan and Peel 2000, section 5.3.

    Example:
        >>> sums = {"count": torch.tensor([4.0, 4.0]), "first": torch.tensor([[1.0, 3.0], [2.0, 2.0]])}
        >>> categorical_mixture(2, 2).update(sums, {"probs": torch.zeros(2, 2)})["probs"]
        tensor([[0.2500, 0.7500],
                [0.5000, 0.5000]])
    """

    def update(stats: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = _means(stats).reshape(params[probs].shape)
        mean = mean.clamp(min=torch.finfo(mean.dtype).eps)
        return {weights: _shares(stats), probs: mean / mean.sum(-1, keepdim=True)}

    def one_hot(x: Tensor) -> Tensor:
        return _float(torch.nn.functional.one_hot(x.long(), num_categories))

    update.__name__ = "categorical"
    return _mixture(MixtureStatistics(num_components, latent, data, one_hot), update)


def _mixture(statistics: MixtureStatistics, update: Callable[..., dict[str, Tensor]]) -> ClosedForm:
    """Return the step; it starts from clusters whose means are drawn halfway to the mean of all data."""

    def start(seed: int, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        stats = statistics.clusters(seed, *args, **kwargs)
        mean = stats["first"].sum(0) / stats["count"].sum()
        first = 0.5 * stats["first"] + 0.5 * stats["count"][:, None] * mean
        return update({"count": stats["count"], "first": first}, params)

    start.kinds = KINDS
    return ClosedForm(statistics, update, start=start)


def _float(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _shares(stats: Mapping[str, Tensor]) -> Tensor:
    return stats["count"] / stats["count"].sum()
