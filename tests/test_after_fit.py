"""After a fit with any E-step, its guide and posterior serve Pyro, the evidence and ArviZ, on old and new data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from test_matrix import KITS, STEPS, TAKES, guide_of, make

import pyro_emvae as emvae
from pyro_emvae import EM, DataError, NonFiniteError
from pyro_emvae.steps import ClosedForm, MonteCarlo
from pyro_emvae.steps.samplers import SAMPLERS

FEW = {"continuous": 5, "discrete": 7, "conjugate": 7}


def takes(traits, kind: str) -> bool:
    return kind in TAKES.get(traits.latents, (traits.latents,)) or (traits.latents, kind) == ("continuous", "conjugate")


def cells() -> list:
    steps = [(e.name, lambda kit, e=e: make(e, kit)) for e in STEPS if "E" in e.traits.slots]
    samplers = [(f"sampler_{name}", lambda kit, name=name: MonteCarlo(name, num_particles=3)) for name in SAMPLERS]
    traits = {e.name: e.traits for e in STEPS} | {f"sampler_{n}": MonteCarlo(n).traits for n in SAMPLERS}
    return [
        pytest.param(kind, factory, id=f"{kind}-{name}")
        for kind in KITS
        for name, factory in steps + samplers
        if takes(traits[name], kind)
    ]


def begin(kind: str, factory):
    """Return an EM before its first step, its E-step, its data, and whether it needs the kit's guide."""
    pyro.set_rng_seed(0)
    kit = KITS[kind]()
    step = factory(kit)
    own = step.traits.needs_guide or type(step).infer is emvae.steps.HalfStep.infer
    em = EM(
        kit.model,
        guide_of(kit, step.traits) if own else None,
        pyro.optim.Adam({"lr": 0.05}),
        e_step=step,
        m_step=kit.closed_form,
    )
    return kit, em, step, own


@pytest.mark.parametrize(("kind", "factory"), cells())
def test_missing_values_and_no_data_are_refused_and_leave_theta(kind, factory):
    kit, em, *_ = begin(kind, factory)
    (x,) = kit.data
    em.engine.setup((x,), {})
    before = {row.name: row.leaf.detach().clone() for row in em.blocks.rows if row.block == "model"}
    missing = x.clone()
    missing.view(-1)[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"got .*(nan|-inf)"):
        em.step(missing)
    with pytest.raises(DataError, match=r"shape \(0,"):
        em.step(x[:0])
    assert all(torch.equal(row.leaf, before[row.name]) for row in em.blocks.rows if row.name in before)


@pytest.mark.parametrize(("kind", "factory"), cells())
def test_the_guide_of_a_fit_serves_pyro_evidence_and_arviz(kind, factory):
    """On these models the evidence is exact after exact steps, and after draws, whose place a proposal takes."""
    kit, em, step, own = begin(kind, factory)
    fit = em.run(*kit.data, max_iter=3, stop=None, seed=0)
    (x,) = kit.data
    # the discrete kit's guide has parameters per datum, and takes as many data only
    new = (x.flip(0) + 0.1)[: len(x) if own else FEW[kind]]
    for data in (x, new):
        posterior = em.posterior(data)
        (name,) = posterior.support(3).values
        draws = Predictive(kit.model, guide=fit.guide, num_samples=4)(data)
        assert draws[name].shape[:2] == (4, len(data))
        container = emvae.to_arviz(kit.model, fit.guide, data, fit=fit, num_samples=4, seed=0)
        assert container["posterior"][name].shape[:3] == (1, 4, len(data))
        if step.traits.exact or not getattr(fit.guide, "has_density", True):
            evidence = emvae.log_evidence(kit.model, fit.guide, data, num_particles=20, seed=0)
            assert evidence.standard_error == pytest.approx(0, abs=1e-8)
            assert data is new or evidence.value == pytest.approx(kit.evidence(fit.params), rel=1e-10)


def test_the_advice_for_missing_values_is_right():
    """A mask alone does not do, for NaN has no log density under it; with a number in its place it does."""
    theta = torch.zeros((), dtype=torch.float64)
    x = torch.tensor([1.0, torch.nan, 2.0, 4.5], dtype=torch.float64)
    kept = ~x.isnan()

    def model(x: torch.Tensor) -> None:
        mean = pyro.param("theta", theta)
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=kept):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(mean, 1.0)), 1.0), obs=x)

    def statistics(values: dict, x: torch.Tensor) -> dict:
        return {"z": values["z"], "n": torch.ones_like(x)}

    em = EM(model, e_step="gaussian", m_step=ClosedForm(statistics, lambda s, _: {"theta": s["z"] / s["n"]}))
    with pytest.raises(NonFiniteError, match="with any number in their place"):
        em.step(x)
    fit = em.run(x.where(kept, -7.0), max_iter=60, stop=None)
    assert float(fit.params["theta"]) == pytest.approx(2.5, rel=1e-10)
