"""Every E-step with every M-step, on models with discrete, continuous and conjugate latents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_emvae import EM, problems, steps
from pyro_emvae._registry import Entry, Traits, entries, lookup
from pyro_emvae.guides import AutoMeanField
from pyro_emvae.steps import HalfStep

X = torch.tensor([-2.1, -1.8, -1.9, 0.2, 0.4, 0.1, 1.9, 2.3, 2.2, 2.6], dtype=torch.float64)


@dataclass(frozen=True)
class Kit:
    """A model and all that a cell of the matrix needs for it; `recognition` is an amortized guide."""

    model: Callable
    guide: Callable
    recognition: Callable
    data: tuple
    closed_form: HalfStep
    evidence: Callable[[dict[str, Tensor]], float]
    best: float


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.8, 0.2], dtype=x.dtype), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([0.0, 0.5], dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def mixture_guide(x: Tensor) -> None:
    logits = pyro.param("logits", torch.zeros(len(x), 2, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=logits))


def mixture_recognition(x: Tensor) -> None:
    weight, bias = (pyro.param(name, torch.zeros(2, dtype=x.dtype)) for name in ("weight", "bias"))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=x[:, None] * weight + bias))


def discrete() -> Kit:
    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        r = one_hot(values["z"], 2).to(x)
        return {"n": r, "x": r * x[:, None]}

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weights": s["n"] / s["n"].sum(), "loc": s["x"] / s["n"]}

    def evidence(params: dict[str, Tensor]) -> float:
        components = dist.Normal(params["loc"], 1.0).log_prob(X[:, None])
        return float((params["weights"].log() + components).logsumexp(-1).sum())

    closed = steps.ClosedForm(statistics, update)
    em = EM(mixture, e_step="enumerated", m_step=closed)
    for _ in range(300):
        em.step(X)
    best = evidence(em.blocks.constrained())
    pyro.clear_param_store()
    return Kit(mixture, mixture_guide, mixture_recognition, (X,), closed, evidence, best)


def continuous() -> Kit:
    problem = problems.linear_gaussian_full()

    def evidence(params: dict[str, Tensor]) -> float:
        return float(problem.log_evidence({name: params[name] for name in problem.model_params}))

    best = float(problem.log_evidence(problem.maximum()))
    return Kit(problem.model, problem.guide, problem.guide, problem.args, steps.linear_gaussian(), evidence, best)


def shifted(x: Tensor) -> None:
    theta = pyro.param("theta", torch.tensor(-2.0, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shifted_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        offset = pyro.param("offset", torch.tensor(0.0, dtype=x.dtype))
        pyro.sample("z", dist.Normal(x / 2 + offset, 0.5**0.5))


def conjugate() -> Kit:
    def statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"z": values["z"], "n": torch.ones_like(x)[None]}

    def update(s: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"theta": s["z"] / s["n"]}

    def evidence(params: dict[str, Tensor]) -> float:
        return float(dist.Normal(params["theta"], 2**0.5).log_prob(X).sum())

    best = evidence({"theta": X.mean()})
    return Kit(shifted, shifted_guide, shifted_guide, (X,), steps.ClosedForm(statistics, update), evidence, best)


KITS = {"discrete": discrete, "continuous": continuous, "conjugate": conjugate}
TAKES = {"any": tuple(KITS), "mean_field": ("discrete", "conjugate")}
STEPS = (
    *entries("step"),
    replace(lookup("step", "laplace"), name="laplace_on_nodes", factory=lambda: steps.Laplace(num_nodes=3)),
)
NEEDED: dict[str, Callable[[Kit], Any]] = {
    "statistics": lambda kit: kit.closed_form.statistics,
    "update": lambda kit: kit.closed_form.update,
    "m_step": lambda kit: kit.closed_form,
    "factor": lambda kit: 0.5,
}


def make(entry: Entry, kit: Kit) -> HalfStep:
    return entry.factory(**{name: NEEDED[name](kit) for name in entry.traits.arguments})


def guide_of(kit: Kit, traits: Traits) -> Callable:
    """Return the guide that an E-step can move."""
    if traits.free_guide:
        return AutoMeanField(kit.model)
    return kit.recognition if traits.amortized else kit.guide


def cells() -> list:
    return [
        pytest.param(kind, e, m, id=f"{kind}-{e.name}-{m.name}")
        for kind in KITS
        for e in STEPS
        for m in STEPS
        if "E" in e.traits.slots and "M" in m.traits.slots and kind in TAKES.get(e.traits.latents, (e.traits.latents,))
    ]


@pytest.mark.parametrize(("kind", "e", "m"), cells())
def test_each_pair_climbs_the_evidence(kind, e, m):
    """Exact pairs never fall; all come near the maximum, those with an exact E-step nearer."""
    pyro.set_rng_seed(0)
    kit = KITS[kind]()
    guide = guide_of(kit, e.traits) if e.traits.needs_guide else None
    em = EM(kit.model, guide, pyro.optim.Adam({"lr": 0.05}), e_step=make(e, kit), m_step=make(m, kit))
    em.engine.setup(kit.data, {})
    trace = [kit.evidence(em.blocks.constrained())]
    for _ in range(150):
        loss = em.step(*kit.data)
        if e.traits.exact:
            assert abs(-loss - trace[-1]) < 1e-10 * len(kit.data[0])
        trace.append(kit.evidence(em.blocks.constrained()))
    allowed = (0.1 if e.traits.exact else 0.3) * (kit.best - trace[0])
    assert kit.best + 1e-8 >= max(trace) and kit.best - trace[-1] < allowed
    if e.traits.exact and m.traits.exact:
        assert all(after >= before - 1e-10 * abs(before) for before, after in itertools.pairwise(trace))
    assert all(math.isfinite(value) for value in trace)


@pytest.mark.parametrize("kind", KITS)
def test_exact_cells_agree(kind):
    """So do those that are exact on these models: Laplace on Gaussians, and a product of factors that has one."""
    kit = KITS[kind]()
    also = {"conjugate": ("continuous", "mean_field"), "discrete": ("mean_field",), "continuous": ()}[kind]
    e_steps = [e for e in STEPS if "E" in e.traits.slots and e.traits.latents in (kind, *also)]
    exact = [e for e in e_steps if e.traits.exact or e.traits.deterministic]
    traces = {}
    for e, m in itertools.product(exact, [m for m in STEPS if "M" in m.traits.slots and m.traits.exact]):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        em = EM(kit.model, e_step=make(e, kit), m_step=make(m, kit))
        traces[e.name, m.name] = [-em.step(*kit.data) for _ in range(15)]
    first, *others = traces.values()
    assert others
    for trace in others:
        assert trace == pytest.approx(first, rel=1e-10)
