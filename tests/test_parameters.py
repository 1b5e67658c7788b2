r"""Blocks for every way of declaring a parameter; substitution and assignment, on the same zoo of models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_emvae import EM, SVI, MonteCarloELBO
from pyro_emvae._checks import BlockError, ModelError
from pyro_emvae.guides import AutoAmortized
from pyro_emvae.parameters import GUIDE, MODEL, SHARED, UNUSED, assign, capture, discover, substitute

X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8]], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)


class Pair(NamedTuple):
    """A model, a guide and the block that each parameter has to get."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    blocks: dict[str, str]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, number(value), constraint=constraints.positive)


def observe(x: Tensor, loc: Tensor, scale: Any) -> None:
    pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def data(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x))


def latent(loc: Any = 0.0, scale: Any = 1.0) -> Tensor:
    return pyro.sample("z", dist.Normal(loc * ONE.new_ones(2), scale * ONE).to_event(1))


# The zoo --------------------------------------------------------------------------------------------------------


def params() -> Pair:
    def model(x):
        weight, scale = pyro.param("weight", torch.eye(2, dtype=torch.float64)), positive("scale", 0.8)
        with data(x):
            observe(x, latent() @ weight, scale)

    def guide(x):
        slope, spread = pyro.param("slope", number(0.4)), positive("spread", 0.6)
        with data(x):
            latent(slope * x, spread)

    return Pair(model, guide, {"weight": MODEL, "scale": MODEL, "slope": GUIDE, "spread": GUIDE})


def networks() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(2, 2).double(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()


def encoded(encoder: nn.Module, x: Tensor) -> None:
    loc, log_scale = encoder(x).chunk(2, -1)
    with data(x):
        latent(loc, log_scale.exp())


def modules() -> Pair:
    decoder, encoder = networks()

    def model(x):
        pyro.module("decoder", decoder)
        with data(x):
            observe(x, decoder(latent()), ONE)

    def guide(x):
        pyro.module("encoder", encoder)
        encoded(encoder, x)

    blocks = {f"decoder$$${n}": MODEL for n, _ in decoder.named_parameters()}
    return Pair(model, guide, blocks | {f"encoder$$${n}": GUIDE for n, _ in encoder.named_parameters()})


def modules_in_both() -> Pair:
    """Both networks are registered on both sides, as in a class with one `register` for all."""
    decoder, encoder = networks()

    def register():
        pyro.module("decoder", decoder)
        pyro.module("encoder", encoder)

    def model(x):
        register()
        with data(x):
            observe(x, decoder(latent()), ONE)

    def guide(x):
        register()
        encoded(encoder, x)

    blocks = {f"decoder$$${n}": MODEL for n, _ in decoder.named_parameters()}
    return Pair(model, guide, blocks | {f"encoder$$${n}": GUIDE for n, _ in encoder.named_parameters()})


def closures() -> Pair:
    """Parameters that Pyro is told of by `pyro.param` statements inside plates and with `event_dim`."""

    def model(x):
        with data(x):
            loc = latent(pyro.param("prior_loc", number(0.2)))
            pyro.deterministic("twice", 2 * loc)
            observe(x, loc * pyro.param("gain", torch.ones(2, dtype=torch.float64), event_dim=1), ONE)

    def guide(x):
        with data(x):
            loc = pyro.param("locs", 0.5 * x, event_dim=1)
            scale = pyro.param("scales", torch.ones_like(x), constraint=constraints.positive, event_dim=1)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return Pair(model, guide, {"prior_loc": MODEL, "gain": MODEL, "locs": GUIDE, "scales": GUIDE})


class Decoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 2)
        self.scale = PyroParam(number(0.7), constraint=constraints.positive)
        self.to(torch.float64)

    def forward(self, x):
        with data(x):
            observe(x, self.linear(latent()), self.scale)


class Encoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 2)
        self.spread = PyroParam(number(0.5), constraint=constraints.interval(0.1, 2.0))
        self.to(torch.float64)

    def forward(self, x):
        with data(x):
            latent(self.linear(x), self.spread)


def pyro_modules() -> Pair:
    blocks = {"linear.weight": SHARED, "linear.bias": SHARED, "scale": MODEL, "spread": GUIDE}
    model, guide = Decoder(), Encoder()
    guide.linear = model.linear
    return Pair(model, guide, blocks)


def nested_pyro_modules() -> Pair:
    """Both under one parent, so that names tell them apart."""
    parent = PyroModule("vae")
    parent.decoder, parent.encoder = Decoder(), Encoder()
    leaves = {"linear.weight": MODEL, "linear.bias": MODEL, "scale": MODEL}
    blocks = {f"vae.decoder.{n}": b for n, b in leaves.items()}
    blocks |= {f"vae.encoder.{n}": GUIDE for n in ("linear.weight", "linear.bias", "spread")}
    return Pair(parent.decoder, parent.encoder, blocks)


class Plain(nn.Module):
    """A model that is a network: its parameters are known to torch only."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.log_scale = networks()[0], nn.Parameter(number(0.1))

    def forward(self, x):
        with data(x):
            observe(x, self.decoder(latent()), self.log_scale.exp())


class PlainGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = networks()[1]

    def forward(self, x):
        encoded(self.encoder, x)


def plain_modules() -> Pair:
    model, guide = Plain(), PlainGuide()
    blocks = {n: MODEL for n, _ in model.named_parameters()} | {n: GUIDE for n, _ in guide.named_parameters()}
    return Pair(model, guide, blocks)


def plain_model_with_params_guide() -> Pair:
    model = Plain()
    blocks = {n: MODEL for n, _ in model.named_parameters()} | {"slope": GUIDE, "spread": GUIDE}
    return Pair(model, params().guide, blocks)


def shared_encoder() -> Pair:
    """The network that makes q's location is a feature extractor of the model, too."""
    shared, own = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()

    def model(x):
        pyro.module("shared", shared)
        with data(x):
            observe(x, latent() + shared(x), ONE)

    def guide(x):
        pyro.module("shared", shared)
        pyro.module("own", own)
        with data(x):
            latent(own(shared(x)))

    blocks = {f"shared$$${n}": SHARED for n in ("weight", "bias")}
    return Pair(model, guide, blocks | {f"own$$${n}": GUIDE for n in ("weight", "bias")})


def unused() -> Pair:
    model, guide, blocks = params()

    def idle_model(x):
        pyro.param("idle", number(1.0))
        model(x)

    def idle_guide(x):
        pyro.param("idle_too", number(1.0)) * 2
        guide(x)

    return Pair(idle_model, idle_guide, blocks | {"idle": UNUSED, "idle_too": UNUSED})


def frozen() -> Pair:
    """A parameter that needs no gradient is no parameter of the fit."""
    model, guide, blocks = modules()
    decoder = next(cell.cell_contents for cell in model.__closure__ if isinstance(cell.cell_contents, nn.Module))
    decoder.bias.requires_grad_(False)
    return Pair(model, guide, {n: b for n, b in blocks.items() if n != "decoder$$$bias"})


def auxiliary() -> Pair:
    """An auxiliary site in the guide, and a factor in the model."""
    model, _, blocks = params()

    def with_factor(x):
        model(x)
        pyro.factor("penalty", -pyro.param("strength", number(0.3)) ** 2)

    def guide(x):
        with data(x):
            loc = pyro.param("slope", number(0.4)) * x
            u = pyro.sample("u", dist.Normal(loc, ONE).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u, event_dim=1) if False else dist.Normal(u, positive("spread", 0.5)).to_event(1))

    return Pair(with_factor, guide, blocks | {"strength": MODEL})


def hierarchical(x):
    """One global and one local latent, both real, and one positive global."""
    loc = pyro.sample("mu", dist.Normal(pyro.param("prior", number(0.1)), ONE))
    scale = pyro.sample("tau", dist.LogNormal(0 * ONE, ONE))
    with data(x):
        observe(x, latent(loc) * pyro.param("gain", number(1.1)), scale)


def auto(make: Callable[[Callable], Callable], **expected: str) -> Callable[[], Pair]:
    def build() -> Pair:
        return Pair(hierarchical, make(hierarchical), {"prior": MODEL, "gain": MODEL, **expected})

    return build


def names(kind: str, parts: tuple[str, ...], block: str = GUIDE) -> dict[str, str]:
    return {f"{kind}.{part}": block for part in parts}


def each_site(kind: str, parts: tuple[str, ...] = ("locs", "scales")) -> dict[str, str]:
    return names(kind, tuple(f"{part}.{site}" for part in parts for site in ("mu", "tau", "z")))


def auto_delta() -> Pair:
    """The point mass of a global latent is a parameter of the model; that of a local one stays the guide's."""
    blocks = {"AutoDelta.mu": MODEL, "AutoDelta.tau": MODEL, "AutoDelta.z": GUIDE, "prior": MODEL, "gain": MODEL}
    return Pair(hierarchical, autoguide.AutoDelta(hierarchical), blocks)


def auto_list() -> Pair:
    """AutoDelta for the globals, AutoNormal for the local: variational EM."""
    guide = autoguide.AutoGuideList(hierarchical)
    guide.append(autoguide.AutoDelta(poutine.block(hierarchical, expose=["mu", "tau"])))
    guide.append(autoguide.AutoNormal(poutine.block(hierarchical, expose=["z"])))
    blocks = names("AutoGuideList.0", ("mu", "tau"), MODEL) | names("AutoGuideList.1", ("locs.z", "scales.z"))
    return Pair(hierarchical, guide, blocks | {"prior": MODEL, "gain": MODEL})


def auto_structured() -> Pair:
    guide = autoguide.AutoStructured(
        hierarchical,
        conditionals={"mu": "mvn", "tau": "normal", "z": "normal"},
        dependencies={"z": {"mu": "linear"}},
    )
    parts = ("conds.mu.scale_tril", "conds.tau.scale", "conds.z.scale", "deps.z.mu.weight")
    locs = ("locs.mu", "locs.tau", "locs.z", "scales.mu", "scales.tau", "scales.z", "scale_trils.mu")
    return Pair(hierarchical, guide, {"prior": MODEL, "gain": MODEL} | dict.fromkeys(parts + locs, "any"))


def auto_amortized() -> Pair:
    model = modules().model
    guide = AutoAmortized(model, nn.Linear(2, 4).double())
    blocks = {f"decoder$$${n}": MODEL for n in ("weight", "bias")}
    return Pair(model, guide, blocks | {f"AutoAmortized.encoder$$${n}": GUIDE for n in ("weight", "bias")})


def bayesian_module() -> Pair:
    """A PyroSample latent inside a PyroModule that has a PyroParam."""

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroSample(dist.Normal(0 * ONE, ONE).expand([2]).to_event(1))
            self.scale = PyroParam(number(0.7), constraint=constraints.positive)

        def forward(self, x):
            loc = x @ self.weight
            with data(x):
                pyro.sample("x", dist.Normal(loc, self.scale), obs=x[:, 0])

    model = Regression()
    return Pair(model, autoguide.AutoNormal(model), {"scale": MODEL} | names("AutoNormal", ("locs.weight", "scales.weight")))


JOINT = {"loc": GUIDE}
ZOO: dict[str, Callable[[], Pair]] = {
    f.__name__: f
    for f in (
        params,
        modules,
        modules_in_both,
        closures,
        pyro_modules,
        nested_pyro_modules,
        plain_modules,
        plain_model_with_params_guide,
        shared_encoder,
        unused,
        frozen,
        auxiliary,
        auto_delta,
        auto_list,
        auto_amortized,
        bayesian_module,
    )
} | {
    "auto_normal": auto(autoguide.AutoNormal, **each_site("AutoNormal")),
    "auto_diagonal": auto(autoguide.AutoDiagonalNormal, **names("AutoDiagonalNormal", ("loc", "scale"))),
    "auto_mvn": auto(autoguide.AutoMultivariateNormal, **names("AutoMultivariateNormal", ("loc", "scale", "scale_tril"))),
    "auto_low_rank": auto(
        autoguide.AutoLowRankMultivariateNormal,
        **names("AutoLowRankMultivariateNormal", ("loc", "scale", "cov_factor")),
    ),
    "auto_normal_messenger": auto(autoguide.AutoNormalMessenger, **{
        f"AutoNormalMessenger.{part}.{site}": GUIDE for part in ("locs", "scales") for site in ("mu", "tau", "z")
    }),
    "auto_hierarchical_messenger": auto(
        lambda model: autoguide.AutoHierarchicalNormalMessenger(model, hierarchical_sites=["z"]),
        **names(
            "AutoHierarchicalNormalMessenger",
            ("locs.mu", "scales.mu", "locs.tau", "scales.tau", "locs.z", "scales.z", "weights.z"),
        ),
    ),
}
LOCAL = ("nested_pyro_modules", "bayesian_module")


@pytest.fixture(params=[*ZOO, *(f"{name}:local" for name in LOCAL)])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    name, _, local = request.param.partition(":")
    with pyro.settings.context(module_local_params=True) if local else nullcontext():
        yield ZOO[name]()


def loss_of(pair: Pair, seed: int = 3) -> Tensor:
    pyro.set_rng_seed(seed)
    return MonteCarloELBO().differentiable_loss(pair.model, pair.guide, X)


# Blocks ---------------------------------------------------------------------------------------------------------


def test_blocks(pair):
    found = {row.name: row.block for row in discover(pair.model, pair.guide, (X,)).rows}
    print(found)
    assert found == pair.blocks
