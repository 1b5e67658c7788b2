r"""What the biased, relaxed estimators share: outcomes with a path, scored as linear functions of the value."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Independent, OneHotCategorical
from torch.nn.functional import binary_cross_entropy_with_logits

from .._checks import EstimatorError, fail
from .._registry import Traits
from ..particles import Dependence, Particles
from .base import Draw, Estimator, SiteTerms, Situation, State, base, is_point_mass, suggest

__all__ = [
    "RELAXED",
    "Relaxed",
    "attached",
    "bounded",
    "check_temperature",
    "held",
    "log_mass",
    "outwards",
    "perturbed",
    "relaxed_run",
    "require_paths",
    "score_relaxed",
    "squashed",
    "uniform_like",
]

Places = Mapping[str, tuple[Situation, Estimator]]

RELAXED = Traits(unbiased=False, draws="relaxed", needs_signal=False)


class Relaxed(Estimator):
    r"""A biased estimator: draws of the true distribution, with a path from the parameters that is not theirs.

    $$\hat g=\tfrac1K\sum_k\Big(\frac{\partial\tilde z_k}{\partial\phi}\Big)^{\!\top}
      \frac{\partial\log p(x,z_k)}{\partial z_k}+\nabla_\phi H(q_\phi).$$

    An outcome of ``Bernoulli`` or ``OneHotCategorical`` is drawn, and `relax` gives it its path $\tilde z$. The masses
    of these distributions are taken as linear in the value, $\langle z,\log\pi\rangle$, in model and guide alike
    (torch's are constant between outcomes). $-\log q$ at fixed mean then has the derivative $-\log\pi$, wherever it is
    taken, and so $-\langle\log\pi,\partial\pi/\partial\phi\rangle=\nabla_\phi H$ is the *exact* gradient of the site's
    entropy given upstream draws, without variance: it is used in place of -log q's own paths. Their direct part has
    mean zero at outcomes, and at relaxed values would push towards the corners if the temperature is high.
    """

    @abstractmethod
    def relax(self, fn: Any, outcome: Tensor) -> Tensor:
        """Return the value, with its path, in place of a true outcome of the distribution."""

    def fits(self, at: Situation) -> str | None:
        if isinstance(base(at.fn), Bernoulli | OneHotCategorical):
            return None
        if type(base(at.fn)).__name__ == "Categorical":
            return "its outcomes are integers, which carry no path (OneHotCategorical's can)"
        return "relaxed values are known for Bernoulli and OneHotCategorical"

    def draw(self, fn: Any, num_particles: int) -> Draw | None:
        return Draw(self.relax(fn, fn.sample()))

    def surrogate(self, site: SiteTerms, signal: Tensor | None, rows: int, state: State) -> dict[str, Tensor | None]:
        runs = [run for run in site.runs or (site,) if run.value.requires_grad]
        if site.entropy is None or not runs:
            return {}
        slopes = torch.autograd.grad(site.entropy.sum(), [run.value for run in runs], retain_graph=True)
        term = sum((slope.detach() * run.fn.mean).sum() for slope, run in zip(slopes, runs, strict=True))
        return {"value": term, "guide": term}


def log_mass(fn: Any, value: Tensor) -> Tensor | None:
    """Return the log mass as a linear function of the value, which may lie between outcomes; None if it has none."""
    if isinstance(fn, Independent):
        inner = log_mass(fn.base_dist, value)
        return None if inner is None else inner.flatten(inner.dim() - fn.reinterpreted_batch_ndims).sum(-1)
    if isinstance(fn, ExpandedDistribution):
        inner = log_mass(fn.base_dist, value)
        return None if inner is None else inner.expand(torch.broadcast_shapes(fn.batch_shape, inner.shape))
    if isinstance(fn, MaskedDistribution):
        inner = log_mass(fn.base_dist, value)
        return None if inner is None else torch.where(torch.as_tensor(fn._mask), inner, 0.0)
    if isinstance(fn, Bernoulli):
        logits, value = torch.broadcast_tensors(fn.logits, value)
        return -binary_cross_entropy_with_logits(logits, value, reduction="none")
    if isinstance(fn, OneHotCategorical):
        return (value * bounded(fn.logits)).sum(-1)
    return None


def bounded(logits: Tensor) -> Tensor:
    """Return logits of which none is minus infinity, so that zero times one is zero."""
    return logits.clamp(min=torch.finfo(logits.dtype).min / 4)


def perturbed(fn: Any, outcome: Tensor, uniform: Tensor) -> Tensor:
    r"""Return Gumbel-perturbed logits whose largest is the outcome's, as a function of uniform noise in (0, 1).

    Given that outcome: $\theta+G\mid\arg\max=b$, and for a bit the logit plus logistic noise given its sign. The noise
    is held: the derivative by the logits is the identity.

    Source: Maddison, Tarlow and Minka 2014, "A* sampling", section 3; Paulus, Maddison and Krause 2021, eq. 7.
    """
    logits = bounded(base(fn).logits)
    return logits + (held(fn, outcome, uniform) - logits.detach())


def held(fn: Any, outcome: Tensor, uniform: Tensor) -> Tensor:
    r"""Return what `perturbed` returns, without a path.

    Of a bit with the logit $\varphi$ of its outcome: $\pm\log\frac{1+e^\varphi u}{1-u}$.
    """
    fn = base(fn)
    logits, outcome = bounded(fn.logits).detach(), outcome.detach()
    if isinstance(fn, Bernoulli):
        sign = 2 * outcome - 1
        up, one, other = outwards(sign * logits)
        odds = torch.addcmul(one, other, uniform) / (1 - uniform)
        return torch.addcmul(sign * up, sign, odds.log())
    noise = -torch.log1p(-uniform)
    first = (noise * outcome).sum(-1, keepdim=True)
    total = logits.logsumexp(-1, keepdim=True)
    other = -torch.logaddexp(noise.log() - logits, first.log() - total)
    return torch.where(outcome > 0, total - first.log(), other)


def outwards(logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return $\varphi_+$, $e^{-\varphi_+}$, $e^{\varphi-\varphi_+}$: with them $1+e^\varphi u$ does not overflow."""
    up = logit.clamp(min=0)
    return up, (-up).exp(), logit.clamp(max=0).exp()


def uniform_like(value: Tensor, *rows: int) -> Tensor:
    """Return uniform noise within the open unit interval."""
    shape = (*rows, *value.shape)
    tiny = torch.finfo(value.dtype).eps / 4
    return torch.rand(shape, dtype=value.dtype, device=value.device).clamp(tiny, 1 - 4 * tiny)


def squashed(fn: Any, logits: Tensor, temperature: float) -> Tensor:
    """Return relaxed values: the sigmoid or softmax of logits over a temperature."""
    if isinstance(base(fn), Bernoulli):
        return (logits / temperature).sigmoid()
    return (logits / temperature).softmax(-1)


def attached(outcome: Tensor, soft: Tensor) -> Tensor:
    """Return the outcome, bit for bit, with the path of another tensor."""
    return outcome + (soft - soft.detach())


def check_temperature(obj: str, temperature: float) -> None:
    """Raise unless a temperature is a positive, finite number."""
    if not 0.0 < temperature < float("inf"):
        fail(
            EstimatorError,
            obj,
            "relax outcomes",
            got=f"temperature={temperature}",
            because="the temperature divides logits and is positive",
            fix="Write temperature=0.5.",
        )


@contextlib.contextmanager
def relaxed_run(relaxed: Places, known: Collection[str], plain: Callable[[], Any]) -> Iterator[None]:
    """Run guide and model; if sites are not `known` to do, and `plain`, the run of true draws, does, say what it is."""
    try:
        yield
    except EstimatorError:
        raise
    except Exception as error:
        new = [place for name, place in relaxed.items() if name not in known]
        if new and _runs(plain):
            at, estimator = new[-1]
            got = f"{type(error).__name__}: {error}"
            refuse(at, estimator, got, "true draws raise no such error, and values with a path do", error)
        raise


def _runs(plain: Callable[[], Any]) -> bool:
    try:
        plain()
    except Exception:  # whatever the user's code raises, the first error is its own
        return False
    return True


def score_relaxed(relaxed: Places) -> Callable[[str, Any, Tensor], Tensor | None]:
    """Return what scores sites: relaxed ones by `log_mass`, without looking whether the value is in the support."""

    def score(name: str, fn: Any, value: Tensor) -> Tensor | None:
        if name not in relaxed:
            return None
        found = log_mass(fn, value)
        if found is None:
            got = f"{type(base(fn)).__name__} at the model's site"
            refuse(*relaxed[name], got, "relaxed values are scored by Bernoulli and OneHotCategorical")
        return found

    return score


def refuse(at: Situation, estimator: Estimator, got: str, because: str, cause: BaseException | None = None) -> None:
    """Raise that the model cannot take the relaxed values of a site."""
    what = f"follow the value of site {at.name!r} into the model"
    fail(EstimatorError, type(estimator).__name__, what, got=got, because=because, fix=suggest(at), cause=cause)


def require_paths(particles: Particles, terms: Iterable[Any], reached: Dependence, relaxed: Places) -> None:
    r"""Raise `EstimatorError` where a summand that a relaxed value reaches has no path from it.

    The value is then an index, an integer, or one side of a comparison, and the gradient would silently lack the term.

    Args:
        particles: The particles.
        terms: The summands of the objective, with their paths.
        reached: What each draw reaches other than through further draws.
        relaxed: The sites with relaxed values.
    """
    for name, (at, estimator) in relaxed.items():
        values = [run.value for run in particles.guide[name].runs or (particles.guide[name],)]
        if not all(value.requires_grad for value in values):
            continue
        for term in terms:
            side = "guide" if term.kind == "entropy" else "model"
            site = getattr(particles, side)[term.site]
            own = term.kind == "kl" and term.site == name  # integrated over the value
            if own or not reached.moves(name, side, term.site) or is_point_mass(site.fn):
                continue
            found = [None] * len(values)
            if term.value.requires_grad:
                found = torch.autograd.grad(term.value.sum(), values, retain_graph=True, allow_unused=True)
            if any(slope is None for slope in found):
                got = (
                    f"a log density of the {side}'s site {term.site!r} that depends on it and cannot be differentiated"
                )
                refuse(at, estimator, got, "relaxed values are no indices, integers or truth values")
