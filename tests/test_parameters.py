r"""Blocks for every way of declaring a parameter; substitution and assignment, on the same zoo of models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
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
AUXILIARY = {"is_auxiliary": True}


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


def shared_param() -> Pair:
    """One name on both sides; one that only a drawn value shows; one that scales the model's density."""

    def model(x):
        with data(x), poutine.scale(scale=positive("temperature", 1.2)):
            observe(x, latent(pyro.param("prior_loc", number(0.2))), ONE)

    def guide(x):
        with data(x):
            loc = pyro.param("prior_loc", number(0.2)) + x
            u = pyro.sample("u", dist.Delta(pyro.param("shift", number(0.3)) * loc, event_dim=1), infer=AUXILIARY)
            latent(u + loc)
            pyro.deterministic("unread", pyro.param("unread", number(1.0)))

    return Pair(model, guide, {"prior_loc": SHARED, "temperature": MODEL, "shift": GUIDE, "unread": UNUSED})


def frozen() -> Pair:
    """A parameter that needs no gradient is no parameter of the fit."""
    model, guide, blocks = modules()
    decoder = next(cell.cell_contents for cell in model.__closure__ if isinstance(cell.cell_contents, nn.Module))
    decoder.bias.requires_grad_(False)
    decoder.eval()
    return Pair(model, guide, {n: b for n, b in blocks.items() if n != "decoder$$$bias"})


def auxiliary() -> Pair:
    """An auxiliary site in the guide, and a factor in the model."""
    model, _, blocks = params()

    def with_factor(x):
        model(x)
        pyro.factor("penalty", -(pyro.param("strength", number(0.3)) ** 2))

    def guide(x):
        with data(x):
            loc = pyro.param("slope", number(0.4)) * x
            u = pyro.sample("u", dist.Normal(loc, ONE).to_event(1), infer=AUXILIARY)
            latent(u, positive("spread", 0.5))

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


def own_mean(site: dict) -> Tensor:
    """The prior's mean, in memory of its own (Pyro's messengers would share the model's parameter)."""
    return autoguide.init_to_mean(site).clone()


def each_site_of_messenger() -> dict[str, str]:
    return {f"{part}.{site}": GUIDE for part in ("locs", "scales") for site in ("mu", "tau", "z")}


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
    """A full-rank block for the global, and a local that depends on it by a network."""
    guide = autoguide.AutoStructured(
        hierarchical,
        conditionals={"mu": "mvn", "tau": "normal", "z": "normal"},
        dependencies={"z": {"mu": nn.Linear(1, 2 * len(X)).double()}},
    )
    parts = (*(f"{part}.{site}" for part in ("locs", "scales") for site in ("mu", "tau", "z")), "scale_trils.mu")
    blocks = names("AutoStructured", (*parts, "deps.z.mu$$$weight", "deps.z.mu$$$bias"))
    return Pair(hierarchical, guide, {"prior": MODEL, "gain": MODEL} | blocks)


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
    return Pair(
        model, autoguide.AutoNormal(model), {"scale": MODEL} | names("AutoNormal", ("locs.weight", "scales.weight"))
    )


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
        shared_param,
        frozen,
        auxiliary,
        auto_delta,
        auto_list,
        auto_structured,
        auto_amortized,
        bayesian_module,
    )
} | {
    "auto_normal": auto(autoguide.AutoNormal, **each_site("AutoNormal")),
    "auto_diagonal": auto(autoguide.AutoDiagonalNormal, **names("AutoDiagonalNormal", ("loc", "scale"))),
    "auto_mvn": auto(
        autoguide.AutoMultivariateNormal, **names("AutoMultivariateNormal", ("loc", "scale", "scale_tril"))
    ),
    "auto_low_rank": auto(
        autoguide.AutoLowRankMultivariateNormal,
        **names("AutoLowRankMultivariateNormal", ("loc", "scale", "cov_factor")),
    ),
    "auto_messenger": auto(partial(autoguide.AutoNormalMessenger, init_loc_fn=own_mean), **each_site_of_messenger()),
    "auto_hierarchical_messenger": auto(
        partial(autoguide.AutoHierarchicalNormalMessenger, init_loc_fn=own_mean, hierarchical_sites=["z"]),
        **each_site_of_messenger(),
        **{"weights.z": GUIDE},
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


def snapshot(parameters: Any) -> dict[str, Tensor]:
    return {row.name: row.leaf.detach().clone() for row in parameters.rows}


# Blocks ---------------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_its_block(pair):
    found = discover(pair.model, pair.guide, (X,))
    assert {row.name: row.block for row in found.rows} == pair.blocks
    assert all(row.leaf.is_leaf and row.leaf.requires_grad for row in found.rows)
    assert [found.block_of(name) for name in pair.blocks] == list(pair.blocks.values())
    for block in (GUIDE, MODEL, SHARED, UNUSED):
        assert set(found.leaves(block)) == {n for n, b in pair.blocks.items() if b == block}
    assert set(found.leaves()) == {n for n, b in pair.blocks.items() if b != UNUSED}
    with torch.no_grad():
        again = discover(pair.model, pair.guide, (X,))
    assert [(r.name, r.block, id(r.leaf)) for r in again.rows] == [(r.name, r.block, id(r.leaf)) for r in found.rows]


def test_blocks_print_as_a_table():
    model, guide, _ = unused()
    found = discover(model, guide, (X,))
    table = str(found).splitlines()
    assert table[0].split() == ["parameter", "shape", "block", "why"]
    for line, row in zip(table[1:], found.rows, strict=True):
        parts = line.split(None, 1)
        assert parts[0] == row.name
        assert parts[1].removeprefix(str(list(row.leaf.shape))).split(None, 1) == [row.block, row.why]


def test_blocks_follow_gradients_and_not_the_trace_in_which_a_name_appears():
    """What a gradient step on one block may touch is what log q, or log p at fixed latents, depends on."""
    model, guide, blocks = modules_in_both()
    found = discover(model, guide, (X,))
    pyro.set_rng_seed(0)
    _, met, _ = capture(lambda: guide(X), {})
    assert set(met) == set(blocks)
    assert set(found.leaves(GUIDE)) == {n for n in blocks if n.startswith("encoder")}


OVERRIDES = {
    "local/global": ("local/global", {"z": GUIDE}),
    "name": ({"prior": GUIDE}, {"prior": GUIDE}),
    "pattern": ({r"AutoNormal\.scales\..*": MODEL, "gain": UNUSED}, {"scales": MODEL, "gain": UNUSED}),
    "regex": (r"locs", {"locs": GUIDE, "scales": MODEL, "prior": MODEL, "gain": MODEL}),
    "callable": (lambda name, leaf: GUIDE if leaf.dim() else MODEL, {"z": GUIDE, "mu": MODEL, "tau": MODEL}),
    "model/guide": ("model/guide", {}),
}


@pytest.mark.parametrize("key", OVERRIDES)
def test_blocks_can_be_given(key):
    blocks, expected = OVERRIDES[key]
    pair = ZOO["auto_normal"]()
    default = pair.blocks if key != "local/global" else dict.fromkeys(pair.blocks, MODEL)
    found = discover(pair.model, pair.guide, (X,), blocks=blocks)
    for row in found.rows:
        hit = [block for part, block in expected.items() if part in row.name.split(".")]
        assert row.block == (hit[-1] if hit else default[row.name]), row


BAD_OVERRIDES = {
    "unknown name": ({"piror": GUIDE}, "'prior'"),
    "unknown block": ({"prior": "gide"}, "'gide'"),
    "callable's answer": (lambda name, leaf: None, "None"),
    "no such kind": (3, "blocks=3"),
}


@pytest.mark.parametrize("key", BAD_OVERRIDES)
def test_blocks_that_cannot_be_read_are_refused(key):
    blocks, observed = BAD_OVERRIDES[key]
    pair = ZOO["auto_normal"]()
    with pytest.raises(BlockError, match=observed):
        discover(pair.model, pair.guide, (X,), blocks=blocks)


def test_an_unknown_parameter_has_no_block():
    model, guide, _ = params()
    with pytest.raises(BlockError, match=r"'wieght'.*'weight'"):
        discover(model, guide, (X,)).block_of("wieght")


def test_discovery_leaves_generator_values_modes_and_store_alone(pair):
    discover(pair.model, pair.guide, (X,))
    modules = [f for f in (pair.model, pair.guide) if isinstance(f, nn.Module)]
    for module in modules:
        module.train(False)
    before, generator = copy.deepcopy(pyro.get_param_store().get_state()["params"]), torch.get_rng_state()
    discover(pair.model, pair.guide, (X,))
    assert torch.equal(torch.get_rng_state(), generator)
    after = pyro.get_param_store().get_state()["params"]
    assert before.keys() == after.keys() and all(torch.equal(v, after[n]) for n, v in before.items())
    assert not any(m.training for module in modules for m in module.modules())


def test_discovery_works_where_only_eval_mode_does():
    """Batch norm refuses a single row in training mode."""
    net = nn.BatchNorm1d(2, affine=True).double().eval()

    def model(x):
        pyro.module("net", net)
        with data(x):
            observe(x, net(latent()), ONE)

    found = discover(model, params().guide, (X[:1],))
    assert {n: found.block_of(n) for n in ("net$$$weight", "slope")} == {"net$$$weight": MODEL, "slope": GUIDE}
    assert not net.training


def test_a_tied_parameter_is_one_parameter():
    """Decoder and encoder have one weight under two names."""
    decoder, encoder = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    encoder.weight = decoder.weight

    def model(x):
        pyro.module("decoder", decoder)
        with data(x):
            observe(x, decoder(latent()), ONE)

    def guide(x):
        pyro.module("encoder", encoder)
        with data(x):
            latent(encoder(x))

    found = discover(model, guide, (X,))
    assert sorted(row.block for row in found.rows) == [GUIDE, MODEL, SHARED]
    start, results = copy.deepcopy([decoder.state_dict(), encoder.state_dict()]), []
    for cls, loss in (
        (pyro.infer.SVI, pyro.infer.Trace_ELBO()),
        (SVI, MonteCarloELBO(estimator="pyro")),
        (SVI, pyro.infer.Trace_ELBO()),
    ):
        pyro.clear_param_store()
        decoder.load_state_dict(start[0])
        encoder.load_state_dict(start[1])
        pyro.set_rng_seed(0)
        svi = cls(model, guide, pyro.optim.SGD({"lr": 0.05, "momentum": 0.9}), loss)
        results.append([svi.step(X) for _ in range(4)])
    assert results[0] == results[1] == results[2]


def test_parameters_of_two_blocks_that_share_memory_are_refused():
    """Pyro's messenger guides start at the prior's mean without a copy: an E-step would move the model's parameter."""
    em = EM(hierarchical, autoguide.AutoNormalMessenger(hierarchical), pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(BlockError, match=r"'locs\.mu'.*'prior'.*clone"):
        em.step(X)


@pytest.mark.parametrize("how", ["clear", "load", "replace"])
@pytest.mark.parametrize("cls", [SVI, EM])
def test_a_step_sees_that_parameters_were_exchanged(cls, how):
    pair = modules() if how == "replace" else params()
    fit = cls(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.1}))
    saved = None
    for _ in range(3):
        fit.step(X)
        saved = saved or pyro.get_param_store().get_state()
    if how == "clear":
        pyro.clear_param_store()
    elif how == "load":
        pyro.get_param_store().set_state(saved)
    else:
        decoder = next(c.cell_contents for c in pair.model.__closure__ if isinstance(c.cell_contents, nn.Module))
        pyro.clear_param_store()
        decoder.bias = nn.Parameter(torch.ones_like(decoder.bias))
    fit.step(X)
    before = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    fit.step(X)
    for name, value in pyro.get_param_store().items():
        assert not torch.equal(value, before[name]), name
        assert torch.equal(value, fit.blocks.constrained()[name]), name


@pytest.mark.parametrize("cls", [SVI, EM])
def test_a_parameter_that_comes_up_later_is_trained(cls):
    model, guide, _ = params()
    calls = []

    def growing(x):
        calls.append(1)
        model(x)
        if len(calls) > 8:
            pyro.factor("late", -(pyro.param("late", number(2.0)) ** 2))

    fit = cls(growing, guide, pyro.optim.Adam({"lr": 0.1}))
    for _ in range(12):
        fit.step(X)
    assert fit.blocks.block_of("late") == MODEL
    assert float(pyro.param("late").detach()) < 2.0
    assert torch.equal(fit.blocks.constrained()["late"], pyro.param("late").detach())


# Substitution ---------------------------------------------------------------------------------------------------


def moved(parameters: Any, by: Any) -> dict[str, Tensor]:
    """The parameters in use, each moved by its own direction times `by`."""
    generator = torch.Generator().manual_seed(7)
    directions = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.leaves().items()}
    return {n: p.detach() + by * directions[n] for n, p in parameters.leaves().items()}


def test_substitution_equals_a_change_in_place_and_is_differentiable(pair):
    found = discover(pair.model, pair.guide, (X,))
    owned = {(id(m), k): m._parameters[k] for places in found.owners.values() for m, k in places}
    by = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with substitute(found, moved(found, by)):
        loss = loss_of(pair)
        (slope,) = torch.autograd.grad(loss, by)
    assert all(m._parameters[k] is owned[id(m), k] for places in found.owners.values() for m, k in places)
    assert {n: id(p) for n, p in discover(pair.model, pair.guide, (X,)).leaves().items()} == {
        n: id(p) for n, p in found.leaves().items()
    }
    old, new, unmoved = moved(found, 0.0), moved(found, 0.1), loss_of(pair)
    with torch.no_grad():
        for name, leaf in found.leaves().items():
            leaf.copy_(new[name])
    expected = loss_of(pair)
    gradients = torch.autograd.grad(expected, list(found.leaves().values()))
    directions = [(new[n] - old[n]) / 0.1 for n in old]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(slope, along, rtol=1e-9, atol=1e-9)
    assert not torch.equal(loss, unmoved)


def test_substitution_is_undone_after_an_error(pair):
    found = discover(pair.model, pair.guide, (X,))
    before, values = loss_of(pair).detach(), snapshot(found)
    with pytest.raises(ZeroDivisionError), substitute(found, moved(found, 1.0)):
        loss_of(pair)
        raise ZeroDivisionError
    assert torch.equal(loss_of(pair), before)
    assert all(torch.equal(row.leaf, values[row.name]) for row in found.rows)


def test_substitution_of_some_parameters_leaves_the_others_live():
    pair = modules()
    found = discover(pair.model, pair.guide, (X,))
    values = {n: v.requires_grad_() for n, v in moved(found, 0.1).items() if n.startswith("decoder")}
    with substitute(found, values):
        loss = loss_of(pair)
    live = found.leaves(GUIDE)
    gradients = torch.autograd.grad(loss, [*values.values(), *live.values()])
    assert all(bool(g.abs().sum() > 0) for g in gradients)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss_of(pair), list(values.values()))


def test_substitution_nests():
    pair = params()
    found = discover(pair.model, pair.guide, (X,))
    one, two = moved(found, 0.1), moved(found, 0.2)
    with substitute(found, one):
        inner = loss_of(pair)
        with substitute(found, two):
            innermost = loss_of(pair)
        assert torch.equal(loss_of(pair), inner)
    with substitute(found, two):
        assert torch.equal(loss_of(pair), innermost)


# Assignment -----------------------------------------------------------------------------------------------------


def test_assigned_values_are_read_back_and_leaves_stay(pair):
    found = discover(pair.model, pair.guide, (X,))
    old, leaves = found.constrained(), {row.name: id(row.leaf) for row in found.rows}
    raw = moved(found, 0.1)
    with torch.no_grad():
        for name, leaf in found.leaves().items():
            leaf.copy_(raw[name])
    new, loss = found.constrained(), loss_of(pair).detach()
    assign(found, old)
    assert not torch.equal(loss_of(pair), loss)
    assign(found, new)
    torch.testing.assert_close(loss_of(pair).detach(), loss, rtol=1e-9, atol=1e-9)
    again = discover(pair.model, pair.guide, (X,))
    assert {row.name: id(row.leaf) for row in again.rows} == leaves
    for row in again.rows:
        torch.testing.assert_close(row.value.detach(), new[row.name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "build", [params, modules, ZOO["nested_pyro_modules"], plain_modules], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("cls", [SVI, EM])
def test_assignment_keeps_the_optimizers_state(build, cls):
    pair = build()
    fit = cls(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}))
    for _ in range(3):
        fit.step(X)
    before = copy.deepcopy(fit.optim.get_state())
    assign(fit.blocks, {n: 0.5 * v for n, v in fit.blocks.constrained().items()})
    after = fit.optim.get_state()
    assert before.keys() == after.keys()
    for name, state in before.items():
        for key, value in state["state"][0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name]["state"][0][key]))
    fit.step(X)
    counts = {int(s["state"][0]["step"]) for s in fit.optim.get_state().values()}
    assert counts == {4}


BAD_VALUES = {
    "unknown name": ({"wieght": torch.eye(2)}, "'wieght'.*Did you mean 'weight'"),
    "shape": ({"weight": torch.ones(3)}, r"\(3,\).*\(2, 2\)"),
    "outside its constraint": ({"scale": torch.tensor(-1.0)}, "'scale'.*GreaterThan"),
    "at the boundary": ({"scale": torch.tensor(0.0)}, "'scale'"),
    "not finite": ({"weight": torch.full((2, 2), torch.nan)}, "'weight'"),
}


@pytest.mark.parametrize("key", BAD_VALUES)
def test_an_assignment_that_cannot_be_made_changes_nothing(key):
    values, observed = BAD_VALUES[key]
    model, guide, _ = params()
    found = discover(model, guide, (X,))
    before = snapshot(found)
    with pytest.raises(ModelError, match=observed):
        assign(found, {"slope": torch.tensor(5.0), **values})
    assert all(torch.equal(row.leaf, before[row.name]) for row in found.rows)


# Buffers --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Linear, batch norm, dropout; `seen` is a buffer that is replaced, not written."""

    def __init__(self, columns: int, *, affine: bool = True) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, columns), nn.BatchNorm1d(columns, affine=affine)
        self.register_buffer("idle", torch.ones(3))
        self.register_buffer("empty", None)
        self.double()

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("registered", ["own", "both"])
def test_buffers_belong_to_the_block_of_their_module(affine, registered):
    decoder, encoder = Net(2, affine=affine), Net(4, affine=affine)

    def register(names):
        for name in names if registered == "own" else ("decoder", "encoder"):
            pyro.module(name, {"decoder": decoder, "encoder": encoder}[name])

    def model(x):
        register(["decoder"])
        with data(x):
            observe(x, decoder(latent()), ONE)

    def guide(x):
        register(["encoder"])
        encoded(encoder, x)

    before = copy.deepcopy([decoder.state_dict(), encoder.state_dict()])
    found = discover(model, guide, (X,))
    blocks = {(id(b.module), b.key): b.block for b in found.buffers if b.moves}
    expected = {
        (id(net.norm), key): block for net, block in ((decoder, MODEL), (encoder, GUIDE)) for key in net.norm._buffers
    }
    assert blocks == expected
    assert {b.key for b in found.buffers if not b.moves} == {"idle"}
    for net, old in zip((decoder, encoder), before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())
    assert len(found.moving_buffers()) == 6 and len(found.moving_buffers(outside=(GUIDE,))) == 3
    assert {id(t) for t in found.moving_buffers(outside=(GUIDE,))} == {id(b) for b in decoder.norm.buffers()}


def test_the_buffers_of_a_shared_network_are_shared():
    shared = Net(2)

    def model(x):
        with data(x):
            observe(x, latent() + shared(x), ONE)

    def guide(x):
        with data(x):
            latent(shared(x))

    found = discover(model, guide, (X,))
    assert {b.block for b in found.buffers if b.moves} == {SHARED}


# Steps on the zoo -----------------------------------------------------------------------------------------------


def kept(parameters: Any, block: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in parameters.leaves(block).items()}


def test_half_steps_move_their_block_and_no_other(pair):
    blocks = {n: MODEL for n, b in pair.blocks.items() if b == SHARED} or None
    em = EM(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), blocks=blocks)
    if not {MODEL, SHARED} & set(pair.blocks.values()):
        with pytest.raises(BlockError, match="a model without parameters"):
            em.step(X)
        return
    em.step(X)
    for _ in range(2):
        for half, mine, other in ((em.e_step.expect, GUIDE, MODEL), (partial(maximise, em), MODEL, GUIDE)):
            before, theirs = kept(em.blocks, mine), kept(em.blocks, other)
            half(em.engine, em.engine.state, X)
            assert all(torch.equal(v, theirs[n]) for n, v in kept(em.blocks, other).items())
            assert all(not torch.equal(v, before[n]) for n, v in kept(em.blocks, mine).items())


def maximise(em: EM, engine: Any, state: Any, x: Tensor) -> Any:
    return em.m_step.maximise(engine, state, em.posterior(x), x)


def test_recorded_steps_equal_eager_ones_on_the_zoo(pair):
    loss_of(pair)
    start = [p.detach().clone() for p in discover(pair.model, pair.guide, (X,)).leaves().values()]
    results = []
    for backend in ("eager", "graph"):
        with torch.no_grad():
            for leaf, value in zip(discover(pair.model, pair.guide, (X,)).leaves().values(), start, strict=True):
                leaf.copy_(value)
        pyro.set_rng_seed(4)
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), backend=backend)
        losses = [svi.step(X) for _ in range(3)]
        results.append((losses, kept(svi.blocks, GUIDE) | kept(svi.blocks, MODEL)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(v, results[1][1][n]) for n, v in results[0][1].items())


@pytest.mark.parametrize("blocks", [{".*scale": "model", ".*": "guide"}, {".*": "guide", "scale": "model"}])
def test_a_name_goes_before_a_pattern_and_the_first_pattern_before_the_rest(blocks):
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0)), 1.0))

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), pyro.param("scale", torch.tensor(1.0))))

    found = discover(poutine.condition(model, {"x": X.sum()}), guide, (X,), blocks=blocks)
    assert {row.name: row.block for row in found.rows} == {"loc": GUIDE, "scale": MODEL, "theta": GUIDE}
