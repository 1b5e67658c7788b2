r"""The table of docs/guides_matrix.md: each of Pyro's losses and ours with every guide and family, measured.

``python tests/guides_table.py`` writes it; `tests/test_guides_matrix.py` compares what it says with what is measured.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyro_emvae._registry import entries
from pyro_emvae.guides import AutoAmortized, AutoExact, AutoMCMC, AutoMeanField, AutoMixture
from pyro_emvae.loss import MonteCarloELBO
from pyro_emvae.particles import draw

PATH = Path(__file__).resolve().parents[1] / "docs" / "guides_matrix.md"
X = torch.tensor([[0.4], [-0.8]])
PARTICLES, MANY, SIGMAS = 300, 3000, 6.0

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

LOSSES: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": lambda: Trace_ELBO(PARTICLES, **HOW),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(PARTICLES, **HOW),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(PARTICLES, **HOW),
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(PARTICLES, strict_enumeration_warning=False, **HOW),
    "RenyiELBO": lambda: RenyiELBO(0.0, PARTICLES, **HOW),
    "MonteCarloELBO": lambda: MonteCarloELBO(PARTICLES, **HOW),
}
HOW = {"vectorize_particles": True, "max_plate_nesting": 1}


def at(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=X.dtype)


def model_of(prior: Callable[[], Any]) -> Callable:
    """Return a model of one latent per datum, of which the first coordinate is the mean of an observation."""

    def model(x: torch.Tensor) -> None:
        shift, fn = pyro.param("shift", at(0.2)), prior()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", fn).to(x.dtype)
            pyro.sample("x", dist.Normal((z[..., 0] if fn.event_dim else z) + shift, 1.0), obs=x[..., 0])

    return model


FAMILY_GUIDES: dict[str, Callable[[Callable, str], Any]] = {
    "AutoMeanField": AutoMeanField,
    "AutoAmortized": lambda model, family: AutoAmortized(model, family=family),
    "AutoMixture of AutoMeanField": lambda model, family: AutoMixture([AutoMeanField(model, family) for _ in range(2)]),
}


def cases() -> list[tuple[str, str, Callable, Callable]]:
    """Return guide, family, model and what makes the guide."""
    found = []
    for guide, make in FAMILY_GUIDES.items():
        for entry in entries("family"):
            model = model_of(PRIORS[entry.traits.support])
            found.append((guide, entry.name, model, functools.partial(make, model, entry.name)))
    for name, support in (("Gaussian", None), ("enumerated", "categorical"), ("conjugate", "gamma")):
        model = exact_model(support)
        found.append(("AutoExact", name, model, functools.partial(AutoExact, model)))
    model = exact_model(None)
    make = functools.partial(AutoMCMC, model, num_samples=10, num_warmup=5)
    return [*found, ("AutoMCMC", "draws", model, make)]


def exact_model(support: str | None) -> Callable:
    if support == "gamma":

        def counts(x: torch.Tensor) -> None:
            rate = pyro.param("rate", at(1.2), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Gamma(at(2.0), rate))
                pyro.sample("x", dist.Poisson(z), obs=x[..., 0].abs().round())

        return counts
    prior = PRIORS["categorical"] if support else lambda: dist.Normal(at(0.0), 1.0)
    return model_of(prior)


# Measuring --------------------------------------------------------------------------------------------------------


def measure(loss: Any, model: Callable, guide: Any, reference: tuple[float, float]) -> str:
    r"""Return ``"pass"``, or why the loss and the guide do not go together.

    A loss passes if its value is that of the ELBO, measured by draws of our own (Rényi's: not below it), it is finite,
    and every parameter of the guide gets a finite gradient, not zero for all of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = -float(loss.loss_and_grads(model, guide, X))
    except Exception as error:  # whatever is raised is the answer
        return f"{type(error).__name__}: {shortened(str(error))}"
    mean, deviation = reference
    slack = SIGMAS * max(deviation, 1.0) / PARTICLES**0.5  # at least that of a closed-form KL beside drawn likelihoods
    wrong = value < mean - slack or (value > mean + slack and not isinstance(loss, RenyiELBO))
    if wrong:
        jacobian = isinstance(loss, TraceMeanField_ELBO) and _has_jacobian(guide)
        because = ": TraceMeanField_ELBO leaves out the log density of Delta sites, the Jacobian of constrained latents"
        return "the value is not the ELBO's" + (because if jacobian else "")
    if isinstance(loss, RenyiELBO) and not _is_reparameterised(guide):
        return "RenyiELBO with alpha = 0 leaves out the score function of sites that are not reparameterised"
    grads = [p.grad for p in guide.parameters()]
    missing = [g is None for g in grads]
    if any(missing):
        return "no gradient for " + ("any parameter" if all(missing) else "some parameters")
    if grads and not any(bool((g != 0).any()) for g in grads):
        return "the gradient is zero"
    return "pass" if all(bool(g.isfinite().all()) for g in grads) else "a gradient is not finite"


def _is_reparameterised(guide: Any) -> bool:
    """Whether every site of a guide with parameters is."""
    return not list(guide.parameters()) or all(fn.has_rsample for fn in _distributions(guide))


def _has_jacobian(guide: Any) -> bool:
    """Whether a latent is a point mass with a density, computed from an auxiliary site."""
    return any(isinstance(fn, dist.Delta) and bool((fn.log_density != 0).any()) for fn in _distributions(guide))


def _distributions(guide: Any) -> list[Any]:
    nodes = poutine.trace(guide).get_trace(X).nodes.values()
    return [n["fn"] for n in nodes if n["type"] == "sample" and type(n["fn"]).__name__ != "_Subsample"]


def shortened(message: str) -> str:
    """Return the first sentence, without what differs from run to run."""
    line = message.strip().split("\n")[0]
    line = line.partition(". This is because")[0]
    words = ["…" if any(c.isdigit() for c in word) else word for word in line.split()]
    return " ".join(words)[:110]


def reference(model: Callable, guide: Any) -> tuple[float, float]:
    """Return mean and standard deviation of log p - log q over draws."""
    with torch.no_grad():
        particles = draw(model, guide, (X,), num_particles=MANY, vectorize=True, max_plate_nesting=1)
    weights = (particles.log_p - particles.log_q).double().flatten()
    return float(weights.mean()), float(weights.std())


def row(model: Callable, make: Callable) -> dict[str, str]:
    """Return a cell for each loss."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    try:
        guide = make()
        guide(X)
        expected = reference(model, guide)
    except Exception as error:  # whatever is raised is the answer
        return dict.fromkeys(LOSSES, f"{type(error).__name__}: {shortened(str(error))}")
    if math.isnan(expected[0]):
        return dict.fromkeys(LOSSES, "log q is NaN: its draws have no density")
    cells = {}
    for name, loss in LOSSES.items():
        cells[name] = measure(loss(), model, guide, expected)
        for p in (*guide.parameters(), *(v.unconstrained() for v in pyro.get_param_store().values())):
            p.grad = None
    return cells


def table() -> dict[tuple[str, str], dict[str, str]]:
    """Return the cells of each guide and family."""
    return {(guide, family): row(model, make) for guide, family, model, make in cases()}


# The document -----------------------------------------------------------------------------------------------------

HEAD = """# Losses, guides and families

Measured by `tests/guides_table.py` on a model of one latent per datum, which writes this page; a cell that changes
fails `tests/test_guides_matrix.py`. A loss passes if its value is the ELBO of the guide (that of Rényi's bound with
alpha = 0: not below it), measured by independent draws, and if every parameter of the guide gets a finite gradient, not
zero for all of them. A number is a reason, below the table.
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
