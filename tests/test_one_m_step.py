"""One `statistics` and one `update`, unchanged under E-steps of all kinds: exact, by draws, and by a trained guide."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_emvae import EM, problems, steps

F64 = torch.float64

# A mixture ------------------------------------------------------------------------------------------------------------

X = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=F64) + torch.tensor([-1.5, 1.5, 1.5, 1.5]).repeat(
    20
)


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.5, 0.5], dtype=F64), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([-1.0, 0.5], dtype=F64))
    scale = pyro.param("scale", torch.tensor([1.0, 1.0], dtype=F64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def mixture_guide(x: Tensor) -> None:
    """Quadratic logits, which the exact posterior has."""
    a = pyro.param("a", torch.zeros(3, dtype=F64))
    with pyro.plate("data", len(x)):
        logit = a[0] + a[1] * x + a[2] * x**2
        pyro.sample("z", dist.Categorical(logits=torch.stack([torch.zeros_like(x), logit], -1)))


def mixture_statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    r = one_hot(values["z"], 2).to(x)
    return {"n": r, "x": r * x[:, None], "xx": r * x[:, None] ** 2}


def mixture_update(s: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    loc = s["x"] / s["n"]
    return {"weights": s["n"] / s["n"].sum(), "loc": loc, "scale": (s["xx"] / s["n"] - loc**2).sqrt()}


def mixture_log_p(params: dict[str, Tensor]) -> float:
    components = dist.Normal(params["loc"], params["scale"]).log_prob(X[:, None])
    return float((params["weights"].log() + components).logsumexp(-1).sum())


# A factor model -------------------------------------------------------------------------------------------------------


def factor_statistics(values: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    z = torch.cat([values["z"], torch.ones_like(values["z"][..., :1])], -1)
    products = {"zz": z[..., :, None] * z[..., None, :], "xz": x[:, :, None] * z[..., None, :]}
    return products | {"xx": x.square().sum(-1)[None], "n": torch.ones(1, len(x)).to(x)}


def factor_update(s: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    both = torch.linalg.solve(s["zz"], s["xz"].mT).mT
    variance = (s["xx"] - (both * s["xz"]).sum()) / (s["n"] * len(both))
    return {"weight": both[:, :-1], "bias": both[:, -1], "sigma": variance.sqrt()}


# Both -----------------------------------------------------------------------------------------------------------------


def trained(rate: float, **options: Any) -> dict[str, Any]:
    return {"e_step": steps.Gradient(5, optim=pyro.optim.Adam({"lr": rate}), **options)}


E_STEPS = {
    "mixture": {
        "enumerated": {"e_step": steps.Enumerated()},
        "monte carlo": {"e_step": steps.MonteCarlo("gibbs", 100)},
        "prior": {"e_step": steps.MonteCarlo("prior", 100)},
        "gradient": {"guide": mixture_guide} | trained(0.1),
    },
    "factors": {
        "gaussian": {"e_step": steps.Gaussian()},
        "monte carlo": {"e_step": steps.MonteCarlo("hmc", 100, num_leapfrog=3, num_warmup=20)},
        "laplace": {"e_step": steps.Laplace()},
        "gradient": {"guide": problems.linear_gaussian_full().guide} | trained(0.05),
    },
}
EXACT = {"mixture": "enumerated", "factors": "gaussian"}
NAMES = {"mixture": ["weights", "loc", "scale"], "factors": ["weight", "bias", "sigma"]}


def kits() -> dict[str, tuple[Any, ...]]:
    factors = problems.linear_gaussian_full()
    names = factors.model_params

    def factor_log_p(params: dict[str, Tensor]) -> float:
        return float(factors.log_evidence({name: params[name] for name in names}))

    return {
        "mixture": (mixture, (X,), mixture_statistics, mixture_update, mixture_log_p),
        "factors": (factors.model, factors.args, factor_statistics, factor_update, factor_log_p),
    }


def climb(name: str, e_step: str, iterations: int) -> list[float]:
    """Return log p(x) at the start and after the iterations, with the same two functions under each E-step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, data, statistics, update, log_p = kits()[name]
    options = dict(E_STEPS[name][e_step])
    em = EM(model, options.pop("guide", None), m_step=steps.ClosedForm(statistics, update), **options)
    names = NAMES[name]
    fit = em.run(*data, max_iter=iterations, track=names, stop=None, progress_bar=False)
    start = {n: torch.as_tensor(fit.history[f"param_{n}"].values[0]) for n in names}
    return [log_p(start), log_p(fit.params)]


@pytest.mark.parametrize(
    ("name", "e_step"), [(name, e_step) for name, all_ in E_STEPS.items() for e_step in all_ if e_step != EXACT[name]]
)
def test_the_same_functions_climb_to_the_same_height_under_each_e_step(name, e_step):
    """To a fraction of a nat, of the many that exact EM climbs."""
    first, best = climb(name, EXACT[name], 80)
    _, reached = climb(name, e_step, 80)
    assert best - first > 10.0 and abs(reached - best) < 0.3
