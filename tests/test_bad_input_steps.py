r"""What `SVI` and `EM` refuse: a clear error that shows what was observed, and nothing changed."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_emvae import EM, SVI, MonteCarloELBO
from pyro_emvae._checks import (
    BlockError,
    DataError,
    EmvaeError,
    ModelError,
    NonFiniteError,
    OptimizerError,
    StepError,
)

X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8], [0.1, 0.2], [-1.0, 0.6]])
both = pytest.mark.parametrize("cls", [SVI, EM])
backends = pytest.mark.parametrize("backend", ["eager", "graph"])
# Before the first step, after it, and on a recorded one.
STARTS = [(cls, "eager", steps) for cls in (SVI, EM) for steps in (0, 1, 3)] + [(SVI, "graph", 3), (EM, "graph", 3)]
each_start = pytest.mark.parametrize(("cls", "backend", "steps"), STARTS)


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.01})


class User:
    """An autoencoder with batch norm in both networks and a plate of a fixed size or of the data's."""

    def __init__(self, size: int | None = None, encode: bool = True) -> None:
        torch.manual_seed(0)
        self.size, self.encode = size, encode
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))

    def plate(self, x: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x) if self.size is None else self.size)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x if self.encode else X).chunk(2, -1)
        with self.plate(x):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def started(cls: type, backend: str = "eager", steps: int = 3, user: User | None = None, **options: Any):
    """A fit that has made some steps; on the graph backend the last one was recorded."""
    user = user or User()
    svi = cls(user.model, user.guide, adam(), backend=backend, **options)
    for _ in range(steps):
        svi.step(X)
    return svi, user


def look(svi: Any, user: User) -> dict[str, Tensor]:
    nets = {"decoder": user.decoder, "encoder": user.encoder}
    state = {f"{side}.{n}": v for side, net in nets.items() for n, v in net.state_dict().items()}
    for name, saved in svi.optim.get_state().items():
        state |= {f"{name}.{k}": torch.as_tensor(v) for k, v in saved["state"][0].items()}
    return copy.deepcopy(state)


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [n for n, v in one.items() if not torch.equal(v, two[n])] == []


# Data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [X[:0], X[:, :0]], ids=["rows", "columns"])
@backends
@both
def test_empty_data(cls, backend, empty):
    svi, user = started(cls, backend)
    before = look(svi, user)
    with pytest.raises(DataError, match=str(list(empty.shape))[1:-1]):
        svi.step(empty)
    assert_same(look(svi, user), before)
    svi.step(X)


@both
def test_an_empty_loader(cls):
    svi, user = started(cls)
    before = look(svi, user)
    with pytest.raises(DataError, match="without batches"):
        svi.run(data=DataLoader(X[:0], batch_size=2))
    assert_same(look(svi, user), before)


WRONG_ROWS = {
    "more rows than the plate": (User, 6, torch.cat([X, X]), "12"),
    "fewer rows than the plate": (User, 6, X[:4], "4"),
    "fewer observed than drawn": (functools.partial(User, encode=False), 6, X[:4], "4"),
}


@pytest.mark.parametrize("key", WRONG_ROWS)
@each_start
def test_data_whose_first_dimension_does_not_fit_the_plate(key, cls, backend, steps):
    make, size, data, observed = WRONG_ROWS[key]
    svi, user = started(cls, backend, steps, make(size))
    before = look(svi, user)
    with pytest.raises((DataError, ModelError), match=observed) as error:
        svi.step(data)
    assert "'data'" in str(error.value) or "'x'" in str(error.value)
    assert_same(look(svi, user), before)
    svi.step(X)


@both
def test_data_of_the_wrong_width_are_the_networks_error_and_change_nothing(cls):
    svi, user = started(cls)
    before = look(svi, user)
    with pytest.raises(RuntimeError, match="3"):
        svi.step(torch.randn(6, 3))
    assert_same(look(svi, user), before)
    svi.step(X)


@both
def test_an_error_after_batch_norm_has_run_leaves_its_buffers(cls):
    svi, user = started(cls)
    before, model = look(svi, user), user.model

    def broken(x):
        model(x)
        user.decoder(x)
        raise ZeroDivisionError

    svi.engine.model = broken
    with pytest.raises(ZeroDivisionError):
        svi.step(X)
    assert_same(look(svi, user), before)


# Blocks ---------------------------------------------------------------------------------------------------------


def observe(x: Tensor, loc: Any) -> None:
    pyro.sample("x", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=x)


def shared_model(x: Tensor) -> None:
    observe(x, pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0)))


def shared_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.5)) + pyro.param("shift", torch.tensor(0.1))
    pyro.sample("z", dist.Normal(loc, 1.0))


def plain_model(x: Tensor) -> None:
    observe(x, pyro.sample("z", dist.Normal(0.0, 1.0)))


def plain_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.3, 1.0))


BLOCKS = {
    "in both": (shared_model, shared_guide, r"'loc'.*1 parameters.*\['loc'\].*schedule=\"joint\""),
    "no model parameters": (plain_model, shared_guide, "a model without parameters of its own"),
    "no guide parameters": (shared_model, plain_guide, "a guide without parameters of its own"),
    "none at all": (plain_model, plain_guide, "without parameters of its own"),
}


@pytest.mark.parametrize("key", BLOCKS)
def test_em_refuses_what_it_cannot_split(key):
    model, guide, observed = BLOCKS[key]
    em = EM(model, guide, adam())
    for _ in range(2):
        with pytest.raises(BlockError, match=observed):
            em.step(X[0])
    assert em.optim.get_state() == {}
    assert all(float(v.detach()) in (0.5, pytest.approx(0.1)) for v in pyro.get_param_store().values())


@pytest.mark.parametrize("key", BLOCKS)
@pytest.mark.parametrize("cls", [SVI, functools.partial(EM, schedule="joint")], ids=["SVI", "EM joint"])
def test_joint_steps_accept_what_cannot_be_split(cls, key):
    model, guide, _ = BLOCKS[key]
    svi = cls(model, guide, adam())
    assert type(svi.step(X[0])) is float
    assert svi.run(**{"num_steps" if cls is SVI else "max_iter": 2}, data=[X[0]] * 2).status == "MAX_ITER"


@pytest.mark.parametrize("blocks", ["model/guide", {"loc": "model"}, {"lo.*": "guide", "shift": "model"}])
def test_em_goes_on_with_the_line_that_the_error_names(blocks):
    em = EM(shared_model, shared_guide, adam(), blocks=blocks)
    if blocks == "model/guide":
        with pytest.raises(BlockError, match="'loc'"):
            em.step(X[0])
    else:
        em.step(X[0])
        assert em.blocks.block_of("loc") == ("model" if "loc" in blocks else "guide")


@pytest.mark.parametrize(
    ("blocks", "observed"),
    [({"lok": "guide"}, "'lok'"), ({"loc": "theta"}, "'theta'"), (7, "7"), (lambda name, leaf: 3, "3")],
    ids=["name", "block", "kind", "answer"],
)
@both
def test_blocks_that_cannot_be_read(cls, blocks, observed):
    svi = cls(shared_model, shared_guide, adam(), blocks=blocks)
    with pytest.raises(BlockError, match=observed):
        svi.step(X[0])


# What is not finite ---------------------------------------------------------------------------------------------


BAD = {"nan": (torch.nan, "nan"), "inf": (torch.inf, "inf")}


@pytest.mark.parametrize("key", BAD)
@each_start
def test_nan_and_infinity_name_the_site_and_change_nothing(key, cls, backend, steps):
    value, observed = BAD[key]
    user = User(6, encode=False)
    svi, _ = started(cls, backend, steps, user)
    before, data = look(svi, user), X.clone()
    data[2, 1] = value
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match=rf"{observed}.*model's site 'x'"):
        svi.step(data)
    if cls is SVI or not steps:
        after = look(svi, user)
        assert_same({n: after[n] for n in before}, before)
    with pytest.raises(StepError, match="recover"):
        svi.step(X)
    svi.recover()
    svi.step(X)


@pytest.mark.parametrize("key", BAD)
@both
def test_validation_names_the_site_too(cls, key):
    user = User(6, encode=False)
    svi, _ = started(cls, user=user)
    before, data = look(svi, user), X.clone()
    data[2, 1] = BAD[key][0]
    with pytest.raises(ModelError, match="'x'"):
        svi.step(data)
    if cls is SVI:
        assert_same(look(svi, user), before)


@backends
def test_a_nan_that_the_guide_draws_is_named_there(backend):
    svi, user = started(SVI, backend)
    before, data = look(svi, user), X.clone()
    data[0, 0] = torch.nan
    refused = pytest.raises(NonFiniteError, match="non-finite value at the guide's site 'z'")
    with pyro.validation_enabled(False), refused:
        svi.step(data)
    assert_same(look(svi, user), before)


@backends
def test_a_gradient_that_is_not_finite_names_the_parameter(backend):
    def model(x):
        theta = pyro.param("theta", torch.tensor(0.0))
        observe(x[0], pyro.sample("z", dist.Normal(0.0, 1.0)) + (theta * x.abs().sum()).square().sqrt())

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    svi = SVI(model, guide, adam(), backend=backend)
    svi.engine.setup((X,), {})
    with pytest.raises(NonFiniteError, match="'theta'"):
        for _ in range(3):
            svi.step(X)
    assert float(pyro.param("loc").detach()) == 0.5


@pytest.mark.parametrize("policy", ["skip", "revert"])
@backends
def test_a_step_returns_nan_where_it_goes_on(backend, policy):
    user = User(6, encode=False)
    svi, _ = started(SVI, backend, user=user, on_nonfinite=policy)
    with pyro.validation_enabled(False):
        assert svi.step(X * torch.nan) != svi.step(X * torch.nan)
    assert svi.step(X) == pytest.approx(svi.step(X), rel=10.0)


def test_pyros_losses_are_checked_too():
    user = User(6, encode=False)
    svi, _ = started(SVI, user=user, loss=pyro.infer.Trace_ELBO())
    before = look(svi, user)
    refused = pytest.raises(NonFiniteError, match="loss nan")
    with pyro.validation_enabled(False), refused, pytest.warns(UserWarning, match="NaN"):
        svi.step(X * torch.nan)
    assert_same(look(svi, user), before)


# What it is made of ---------------------------------------------------------------------------------------------


NO_OPTIMIZER = {
    "None": (None, "None"),
    "number": (0.01, r"0\.01"),
    "name": ("adam", "'adam'"),
    "dict": ({"lr": 0.01}, "'lr'"),
    "wrong block": ({"guide": adam(), "modle": adam()}, "'modle'"),
    "no model": ({"guide": adam()}, "lacks 'model'.*Write"),
    "no guide": ({"model": adam(), "guide": None}, "lacks 'guide'.*Write"),
    "class": (dict, "dict"),
    "module": (nn.Linear, "Linear"),
    "instance": (torch.optim.Adam([torch.ones(1, requires_grad=True)]), "an instance of Adam"),
}


@pytest.mark.parametrize("key", NO_OPTIMIZER)
@both
def test_an_optimizer_that_is_none(cls, key):
    optim, observed = NO_OPTIMIZER[key]
    with pytest.raises(OptimizerError, match=observed):
        cls(shared_model, shared_guide, optim)


BROKEN_OPTIMIZER = {
    "arguments": (pyro.optim.Adam({"lrate": 0.1}), "lrate"),
    "values": (functools.partial(torch.optim.Adam, lr=-1.0), "-1.0"),
    "closure": (torch.optim.LBFGS, "LBFGS"),
    "no optimizer": (lambda params: 3, "3"),
}


@pytest.mark.parametrize("key", BROKEN_OPTIMIZER)
@both
def test_an_optimizer_that_cannot_be_made(cls, key):
    optim, observed = BROKEN_OPTIMIZER[key]
    user = User()
    svi = cls(user.model, user.guide, optim)
    with pytest.raises(OptimizerError, match=observed):
        svi.step(X)


CHOICES = {
    "backend": ({"backend": "graf"}, "backend='graf'.*'graph'"),
    "policy": ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'"),
    "loss": ({"loss": "elbo"}, "'elbo'"),
    "loss class": ({"loss": MonteCarloELBO}, "MonteCarloELBO'>"),
}


@pytest.mark.parametrize("key", CHOICES)
@both
def test_unknown_choices(cls, key):
    options, observed = CHOICES[key]
    with pytest.raises(EmvaeError, match=f"^`{cls.__name__}` .*{observed}"):
        cls(shared_model, shared_guide, adam(), **options)


def test_an_unknown_schedule():
    with pytest.raises(EmvaeError, match=r"schedule='joined'.*'joint'"):
        EM(shared_model, shared_guide, adam(), schedule="joined")


def own_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("shift", torch.tensor(0.1)), 1.0))


def and_more(function: Any, name: str) -> Any:
    def more(x: Tensor) -> None:
        function(x)
        pyro.sample(name, dist.Normal(0.0, 1.0))

    return more


MISMATCH = {
    "more in the guide": (shared_model, and_more(own_guide, "w"), "'w'"),
    "more in the model": (and_more(shared_model, "v"), own_guide, "'v'"),
    "observed in the model": (shared_model, and_more(own_guide, "x"), "'x'"),
    "twice": (shared_model, and_more(own_guide, "z"), "'z'"),
}


@pytest.mark.parametrize("key", MISMATCH)
@pytest.mark.parametrize("particles", [1, 2])
@both
def test_sites_that_do_not_match(cls, particles, key):
    model, guide, observed = MISMATCH[key]
    svi = cls(model, guide, adam(), MonteCarloELBO(particles))
    with pytest.raises(ModelError, match=observed):
        svi.step(X[0])
    assert svi.optim.get_state() == {}


# Options of a run -----------------------------------------------------------------------------------------------


RUNS = {
    "a tensor as data": ({"data": X}, r"shape \(6, 2\)"),
    "callbacks that are none": ({"num": 3, "callbacks": 3}, "got 3"),
    "no step between validations": ({"num": 3, "every": 0}, "got 0"),
    "a near miss of an option": ({"num": 3, "callback": print}, "'callback'.*'callbacks'"),
    "an option of others": ({"num": 3, "tol": 1e-3}, r"'tol'.*Deterministic\(tol="),
    "an unknown name": ({"num": 3, "colour": 1}, r"'colour' to the model: got a model of parameters \['x'\]"),
    "a seed that is none": ({"num": 3, "seed": 0.5}, "got 0.5"),
    "no step": ({"num": 0}, "got 0"),
    "no held-out data": ({"num": 3, "validation": X[:0]}, r"`validation=` cannot.*\(0, 2\)"),
    "an unknown policy": ({"num": 3, "on_decrease": "ignore"}, "'ignore'"),
}


@pytest.mark.parametrize("key", RUNS)
@both
def test_options_of_a_run_that_cannot_be_meant(cls, key):
    options, observed = copy.copy(RUNS[key][0]), RUNS[key][1]
    number = options.pop("num", None)
    user = User()
    svi = cls(user.model, user.guide, adam())
    args = () if "data" in options else (X,)
    with pytest.raises(EmvaeError, match=observed):
        svi.run(*args, max_iter=number, **options) if cls is EM else svi.run(number, *args, **options)
    assert svi.optim.get_state() == {}


def test_each_loop_names_its_own_number_of_iterations():
    user = User()
    with pytest.raises(EmvaeError, match=r"'num_steps' to the model.*max_iter=300"):
        EM(user.model, user.guide, adam()).run(X, num_steps=3)
    with pytest.raises(EmvaeError, match=r"'max_iter' to the model.*run\(1000, x\)"):
        SVI(user.model, user.guide, adam()).run(3, X, max_iter=3)
    with pytest.raises(EmvaeError, match=r"`EM.run` cannot use max_iter: got -1"):
        EM(user.model, user.guide, adam()).run(X, max_iter=-1)
    with pytest.raises(EmvaeError, match=r"`SVI.run` cannot use num_steps: got -1"):
        SVI(user.model, user.guide, adam()).run(-1, X)


def test_the_argument_order_of_svi_is_refused_by_em():
    user = User()
    with pytest.raises(EmvaeError, match="max_iter=300"):
        EM(user.model, user.guide, adam()).run(300, X)


def test_a_number_of_iterations_behind_the_data_is_refused_unless_the_model_takes_it():
    user, widths = User(), []

    def model(x: Tensor, width: int) -> None:
        widths.append(width)
        user.model(x)

    with pytest.raises(EmvaeError, match=r"run on 300: got a whole number as one datum more.*max_iter=300"):
        EM(user.model, user.guide, adam()).run(X, 300)
    assert EM(model, lambda x, width: user.guide(x), adam()).run(X, 3, max_iter=2).num_iterations == 2
    assert set(widths) == {3}


@pytest.mark.parametrize("where", ["model", "guide"])
@both
def test_a_model_or_guide_that_is_none_of_it(cls, where):
    user = User()
    pair = {"model": user.model, "guide": user.guide} | {where: "user"}
    with pytest.raises(EmvaeError, match=f"{where}.*'user'"):
        cls(pair["model"], pair["guide"], adam())


@backends
@both
def test_data_that_are_not_finite_are_skipped_with_validation_on(cls, backend):
    """Pyro's validation stumbles over them first, in the guide's distribution or at the observed site."""
    svi, user = started(cls, backend, 3, on_nonfinite="skip")
    batches = [X, X * math.nan, X]
    assert svi.run(data=batches).status == "NAN"
    assert all(bool(torch.isfinite(t).all()) for t in user.decoder.state_dict().values())
    with pytest.raises(NonFiniteError, match=r"'(x|z)'"):
        svi.run(data=batches, on_nonfinite="raise")
