r"""The table of docs/guides_matrix.md: each of Pyro's losses and ours with every guide and family, measured.

``python tests/guides_table.py`` writes it; `tests/test_guides_matrix.py` compares what it says with what is measured.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from guides_quadrature import Exact, Part, exact
from pyro import poutine
from pyro.infer import HMC, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_emvae._checks import EmvaeError
from pyro_emvae._registry import create, entries
from pyro_emvae.families import LogNormal, StudentT
from pyro_emvae.guides import AutoAmortized, AutoExact, AutoMCMC, AutoMeanField, AutoMixture, AutoSemiAmortized
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.particles import draw

PATH = Path(__file__).resolve().parents[1] / "docs" / "guides_matrix.md"
COPIES, PARTICLES = 2000, 8  # of two data; draws
FEW, MANY = 100, 64  # the same where copies have contexts of their own
PAIR = torch.tensor([[0.4], [-0.8]], dtype=torch.float64)
X, X_FEW = PAIR.repeat(COPIES, 1), PAIR.repeat(FEW, 1)
SIGMAS, POWER, DETECT, ROUNDING = 6.0, 2.3, 0.5, 1e-5  # standard errors; a bias of 0.5 (1 + size) is found

PRIORS: dict[str, Callable[[], Any]] = {
    "continuous": lambda: dist.Beta(at(2.0), 3.0),
    "positive": lambda: dist.Gamma(at(3.0), 2.0),
    "unit_interval": lambda: dist.Beta(at(2.0), 3.0),
    "circle": lambda: dist.VonMises(at(0.5), 2.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 1.5], dtype=X.dtype)),
    "binary": lambda: dist.Bernoulli(at(0.3)),
    "categorical": lambda: dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=X.dtype)),
    "one_hot": lambda: dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3], dtype=X.dtype)),
}

LOSSES: dict[str, Callable[[int], Any]] = {
    "Trace_ELBO": lambda count: Trace_ELBO(count, **HOW),
    "TraceMeanField_ELBO": lambda count: TraceMeanField_ELBO(count, **HOW),
    "TraceGraph_ELBO": lambda count: TraceGraph_ELBO(count, **HOW),
    "TraceEnum_ELBO": lambda count: TraceEnum_ELBO(count, strict_enumeration_warning=False, **HOW),
    "RenyiELBO": lambda count: RenyiELBO(0.0, 2, **HOW),
    "MonteCarloELBO": lambda count: MonteCarloELBO(count, **HOW),
}
HOW = {"vectorize_particles": True, "max_plate_nesting": 1}


def at(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=X.dtype)


def likelihood(z: torch.Tensor, shift: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return log p(x | z): the first coordinate is the mean."""
    return dist.Normal(z + shift, 1.0).log_prob(x)


def model_of(prior: Callable[[], Any]) -> Callable:
    """Return a model of one latent per datum, of which the first coordinate is the mean of an observation.

    Its parameter has an element for each datum, so that equal data are repetitions of one experiment.
    """

    def model(x: torch.Tensor) -> None:
        shift, fn = pyro.param("shift", torch.full((len(x),), 0.2, dtype=x.dtype)), prior()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", fn).to(x.dtype)
            pyro.sample("x", dist.Normal((z[..., 0] if fn.event_dim else z) + shift, 1.0), obs=x[..., 0])

    model.prior = prior
    return model


class Rows(nn.Module):
    """An encoder that has a context for each row, whatever it reads: gradients by it are those of single data."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table


def encoder_of(model: Callable, family: str, rows: int = 2 * COPIES) -> Rows:
    prior, encoder = model.prior(), Rows()
    columns = create("family", family).for_site("z", prior).num_features(prior.event_shape)
    encoder.table = nn.Parameter(torch.zeros(rows, columns, dtype=X.dtype))
    return encoder


BIASED = ("the gradient is biased", "the value is not the ELBO's")
NARROW = {"log_normal": LogNormal(0.3), "student_t": StudentT(init_df=30.0)}  # so that a mean has a normal error
FAMILY_GUIDES: dict[str, Callable[[Callable, str], Any]] = {
    "AutoMeanField": lambda model, family: AutoMeanField(model, NARROW.get(family, family)),
    "AutoAmortized": lambda model, family: AutoAmortized(model, encoder_of(model, family), NARROW.get(family, family)),
    "AutoSemiAmortized": lambda model, family: AutoSemiAmortized(
        model, encoder_of(model, family, 2 * FEW), NARROW.get(family, family), num_refinements=1
    ),
    "AutoMixture of AutoMeanField": lambda model, family: AutoMixture(
        [AutoMeanField(model, NARROW.get(family, family)) for _ in range(2)], plate="data"
    ),
}


def cases() -> list[tuple[str, str, Callable, Callable]]:
    """Return guide, family, model and what makes the guide."""
    found = []
    for guide, make in FAMILY_GUIDES.items():
        for entry in entries("family"):
            model = model_of(PRIORS[entry.traits.support])
            found.append((guide, entry.name, model, functools.partial(make, model, entry.name)))
    for name, model in (
        ("Gaussian", model_of(lambda: dist.Normal(at(0.0), 1.0))),
        ("enumerated", model_of(PRIORS["categorical"])),
        ("conjugate", counts_model()),
    ):
        found.append(("AutoExact", name, model, functools.partial(AutoExact, model)))
    model = model_of(lambda: dist.Normal(at(0.0), 1.0))
    make = functools.partial(AutoMCMC, model, HMC(model, step_size=0.1, num_steps=1), num_samples=10, num_warmup=1)
    return [*found, ("AutoMCMC", "draws", model, make)]


def counts_model() -> Callable:
    """Return a conjugate model of counts, whose parameter is the rate of the prior."""

    def model(x: torch.Tensor) -> None:
        rate = pyro.param("shift", torch.full((len(x),), 1.2, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(at(2.0), rate))
            pyro.sample("x", dist.Poisson(z), obs=x[..., 0].abs().round())

    return model


# What is right ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Right:
    """Exact answers for the first data, and the leaf whose rows hold the gradients by each part's contexts."""

    exact: Exact
    leaves: tuple[torch.Tensor, ...]
    is_bound: bool = False


def spread_contexts(guide: Any) -> list[torch.Tensor]:
    """Move the contexts off their symmetric start, copies alike; return the leaves that hold them, a row per datum."""
    if isinstance(guide, AutoMixture):
        leaves = [part.contexts.z for part in guide.components]
    elif isinstance(guide, AutoMeanField):
        leaves = [guide.contexts.z]
    else:
        leaves = [(guide.amortized if isinstance(guide, AutoSemiAmortized) else guide).encoder.table]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in leaves:
            noise = 0.3 * torch.randn(2, leaf.shape[1], generator=generator, dtype=leaf.dtype)
            leaf += noise.repeat(len(leaf) // 2, 1)
    return leaves


def parts_of(guide: Any, leaves: list[torch.Tensor]) -> list[Part]:
    """Return the components of q with the contexts from which the guide draws."""
    if isinstance(guide, AutoSemiAmortized):
        site = guide.amortized.local_sites[0]
        return [Part(site.family, site.event_shape, guide._contexts((X_FEW,), {})[1]["z"])]
    if isinstance(guide, AutoAmortized):
        sites = guide.local_sites
    else:
        sites = [part._sites[0] for part in getattr(guide, "components", [guide])]
    return [Part(s.family, s.event_shape, leaf[:2]) for s, leaf in zip(sites, leaves, strict=True)]


def right(model: Callable, guide: Any, two_draws: bool) -> Right:
    """Return the exact answers for a guide of a family."""
    own = isinstance(guide, AutoSemiAmortized)
    parts = parts_of(guide, guide.leaves)
    rows = len(parts[0].context)
    x = PAIR.repeat(rows // 2, 1)[:, 0]

    def log_likelihood(z: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        z = z.to(X.dtype)
        return likelihood(z[..., 0] if model.prior().event_dim else z, shift, x)

    log_weights = torch.full((len(parts),), 1 / len(parts), dtype=X.dtype).log()
    shift = torch.full((rows,), 0.2, dtype=X.dtype)
    has_kinks = bool(parts[0].family.modules())
    grid = {"points": (1601 if own else 4001) if has_kinks else 401, "half": 20 if own else 40}
    found = exact(model.prior(), log_likelihood, shift, parts, log_weights, two_draws=two_draws, **grid)
    return Right(found, tuple(guide.leaves))


def right_of_the_posterior(name: str) -> Right:
    """Return the exact answers for the exact posterior: the evidence by hand, which one draw gives as well as two."""
    x, theta = PAIR[:, 0], torch.full((2,), 1.2 if name == "conjugate" else 0.2, dtype=X.dtype, requires_grad=True)
    if name == "Gaussian":
        value = dist.Normal(theta, 2.0**0.5).log_prob(x)
    elif name == "enumerated":
        value = torch.stack([p.log() + likelihood(at(k), theta, x) for k, p in enumerate((at(0.2), at(0.5), at(0.3)))])
        value = value.logsumexp(0)
    else:
        value = dist.NegativeBinomial(at(2.0), probs=1 / (1 + theta)).log_prob(x.abs().round())
    (grad,) = torch.autograd.grad(value.sum(), theta)
    return Right(Exact(value.detach(), torch.zeros_like(grad), (), grad), ())


# Measuring --------------------------------------------------------------------------------------------------------


def measure(loss: Any, model: Callable, guide: Any, answer: Right) -> str:
    r"""Return ``"pass"``, or why the loss and the guide do not go together.

    A loss passes if its value is the exact one, if every parameter of the guide gets a finite gradient, not zero for
    all of them, and if the gradients by contexts and by the model's parameter have the exact mean over the copies of
    each datum. A mean is judged at six standard errors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = -float(loss.loss_and_grads(model, guide, data_of(guide)))
    except Exception as error:  # whatever is raised is the answer
        return f"{type(error).__name__}: {shortened(str(error))}"
    draws = 1 if isinstance(loss, RenyiELBO) else loss.num_particles
    variance = answer.exact.variance.mean()
    if isinstance(loss, TraceMeanField_ELBO) and not answer.leaves:
        variance = torch.ones(())  # log p(x | z) is still drawn
    rows = len(data_of(guide))
    deviation = float(variance * rows / draws) ** 0.5
    off = value - float(answer.exact.value.mean()) * rows
    off = min(off, 0.0) if answer.is_bound else off
    if not abs(off) <= SIGMAS * deviation + ROUNDING * rows:
        jacobian = isinstance(loss, TraceMeanField_ELBO) and _has_jacobian(guide)
        because = ": TraceMeanField_ELBO leaves out the log density of Delta sites, the Jacobian of constrained latents"
        return "the value is not the ELBO's" + (because if jacobian else "")
    if isinstance(loss, RenyiELBO) and not _is_reparameterised(guide):
        return "RenyiELBO with alpha = 0 leaves out the score function of sites that are not reparameterised"
    said = _gradients(guide, answer)
    if "biased" in said and type(loss) is Trace_ELBO and _has_drawn_auxiliary(guide):
        return "the gradient is biased: Trace_ELBO leaves the log density of auxiliary sites out of the score function"
    return said


def _gradients(guide: Any, answer: Right) -> str:
    grads = [p.grad for p in guide.parameters()]
    missing = [g is None for g in grads]
    if any(missing):
        return "no gradient for " + ("any parameter" if all(missing) else "some parameters")
    if grads and not any(bool((g != 0).any()) for g in grads):
        return "the gradient is zero"
    if not all(bool(g.isfinite().all()) for g in grads):
        return "a gradient is not finite"
    if answer.is_bound:
        return "pass"
    theta = pyro.param("shift").unconstrained().grad
    found = -torch.cat([*(leaf.grad for leaf in answer.leaves), theta.unsqueeze(1)], 1)
    expected = torch.cat([*answer.exact.guide, answer.exact.model.unsqueeze(1)], 1)
    off = (found.reshape(-1, len(expected), found.shape[1]) - expected).reshape(-1, 2, found.shape[1])
    error, size = off.std(0) / len(off) ** 0.5, expected[:2].abs()
    assert bool(((SIGMAS + POWER) * error <= DETECT * (1 + size)).all()), f"no power: {(error / (1 + size)).max()}"
    biased = off.mean(0).abs() > SIGMAS * error + ROUNDING * (1 + size)
    return "the gradient is biased" if bool(biased.any()) else "pass"


def _is_reparameterised(guide: Any) -> bool:
    """Whether every site of a guide with parameters is."""
    return not list(guide.parameters()) or all(fn.has_rsample for fn in _distributions(guide))


def data_of(guide: Any) -> torch.Tensor:
    return X_FEW if isinstance(guide, AutoSemiAmortized) else X


def _has_drawn_auxiliary(guide: Any) -> bool:
    """Whether an auxiliary site has no reparameterised sampler."""
    nodes = poutine.trace(guide).get_trace(data_of(guide)).nodes.values()
    return any(
        (n["infer"] or {}).get("is_auxiliary") and not n["fn"].has_rsample for n in nodes if n["type"] == "sample"
    )


def _has_jacobian(guide: Any) -> bool:
    """Whether a latent is a point mass with a density, computed from an auxiliary site."""
    return any(isinstance(fn, dist.Delta) and bool((fn.log_density != 0).any()) for fn in _distributions(guide))


def _distributions(guide: Any) -> list[Any]:
    nodes = poutine.trace(guide).get_trace(data_of(guide)).nodes.values()
    return [n["fn"] for n in nodes if n["type"] == "sample" and type(n["fn"]).__name__ != "_Subsample"]


def shortened(message: str) -> str:
    """Return the first sentence, without what differs from run to run."""
    line = message.strip().split("\n")[0]
    line = line.partition(". This is because")[0]
    words = ["…" if any(c.isdigit() for c in word) else word for word in line.split()]
    return " ".join(words)[:110]


def has_density(model: Callable, guide: Any) -> bool:
    with torch.no_grad():
        return not bool(draw(model, guide, (data_of(guide),), vectorize=False).log_q.isnan().any())


def row(name: str, family: str, model: Callable, make: Callable) -> dict[str, str]:
    """Return a cell for each loss."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    try:
        guide = make()
        guide(data_of(guide))
        if not has_density(model, guide):
            return dict.fromkeys(LOSSES, "log q is NaN: its draws have no density")
        if name == "AutoExact":
            answers = {two_draws: right_of_the_posterior(family) for two_draws in (False, True)}
        else:
            guide.leaves = spread_contexts(guide)
            one = right(model, guide, False)
            own = isinstance(guide, AutoSemiAmortized)  # contexts of their own: too many pairs of draws
            answers = {False: one, True: replace(one, is_bound=True) if own else right(model, guide, True)}
    except EmvaeError as error:
        return dict.fromkeys(LOSSES, f"{type(error).__name__}: {shortened(str(error))}")
    cells, count = {}, MANY if isinstance(guide, AutoSemiAmortized) else PARTICLES
    for loss in LOSSES:
        cells[loss] = measure(LOSSES[loss](count), model, guide, answers[loss == "RenyiELBO"])
        for p in (*guide.parameters(), *(v.unconstrained() for v in pyro.get_param_store().values())):
            p.grad = None
    return cells


def table() -> dict[tuple[str, str], dict[str, str]]:
    """Return the cells of each guide and family."""
    return {(guide, family): row(guide, family, model, make) for guide, family, model, make in cases()}


# The document -----------------------------------------------------------------------------------------------------

HEAD = """# Losses, guides and families

Measured by `tests/guides_table.py` on a model of one latent per datum, which writes this page; a cell that changes
fails `tests/test_guides_matrix.py`. A loss passes if its value is the exact ELBO of the guide (of `RenyiELBO`: the
exact importance-weighted bound of two draws), computed by quadrature over the family's density and not by draws; if
every parameter of the guide gets a finite gradient, not zero for all of them; and if the gradients by the guide's
contexts and by the model's parameter have the exact mean. (Of `AutoSemiAmortized` with `RenyiELBO`, the value is not
below the ELBO.) A number is a reason, below the table.
"""


def render(cells: dict[tuple[str, str], dict[str, str]]) -> str:
    """Return the document."""
    reasons = list(dict.fromkeys(cell for row in cells.values() for cell in row.values() if cell != "pass"))
    lines = ["| guide | family | " + " | ".join(LOSSES) + " |", "|---" * (2 + len(LOSSES)) + "|"]
    for (guide, family), row in cells.items():
        marks = ["pass" if row[n] == "pass" else f"[{1 + reasons.index(row[n])}]" for n in LOSSES]
        lines.append(f"| {guide} | {family} | " + " | ".join(marks) + " |")
    notes = [f"{place}. {reason.replace('|', '/')}" for place, reason in enumerate(reasons, 1)]
    return "\n".join([HEAD, *lines, "", *notes, ""])


def changes(old: str, new: str) -> Iterable[str]:
    """Return the lines that differ."""
    mine, theirs = set(old.splitlines()), set(new.splitlines())
    return [f"- {line}" for line in sorted(mine - theirs)] + [f"+ {line}" for line in sorted(theirs - mine)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    pyro.enable_validation(True)
    PATH.write_text(render(table()), encoding="utf-8")
    print(PATH.read_text(encoding="utf-8"))
