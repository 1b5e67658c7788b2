r"""The non-public Pyro names that the package leans on exist and mean what it needs; nothing of Pyro is changed."""

from __future__ import annotations

import importlib
import inspect
import signal
import sys
import types
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyro_emvae as emvae
from pyro_emvae import EM, SVI, MonteCarloELBO, _pyro, problems

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")

SIGNATURES = {
    "Messenger": (_pyro.Messenger._process_message, ["self", "msg"]),
    "get_trace": (_pyro.get_trace, ["self", "model", "guide", "args", "kwargs"]),
    "scale_and_mask": (_pyro.scale_and_mask, ["tensor", "scale", "mask"]),
    "constraint_of": (_pyro.constraint_of, ["name"]),
    "leaf_of": (_pyro.leaf_of, ["name"]),
    "mask_of": (_pyro.mask_of, ["fn"]),
    "draws_of": (_pyro.draws_of, ["mcmc"]),
    "waiting_state": (_pyro.waiting_state, ["optim"]),
}


def test_every_listed_name_is_checked_here():
    assert set(SIGNATURES) == set(_pyro.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function, expected = SIGNATURES[name]
    assert list(inspect.signature(function).parameters) == expected


# Messages -------------------------------------------------------------------------------------------------------

FIELDS = {
    "type",
    "name",
    "fn",
    "value",
    "scale",
    "mask",
    "cond_indep_stack",
    "infer",
    "is_observed",
    "args",
    "kwargs",
    "done",
}


class Notes(_pyro.Messenger):
    """Note the messages before and after everyone else has treated them."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, dict] = {}
        self.after: dict[str, dict] = {}
        self.params: list[dict] = []

    def _pyro_sample(self, msg: dict) -> None:
        self.before[msg["name"]] = dict(msg)

    def _pyro_post_sample(self, msg: dict) -> None:
        self.after[msg["name"]] = dict(msg)

    def _pyro_post_param(self, msg: dict) -> None:
        self.params.append(dict(msg))


def program() -> None:
    with pyro.plate("data", 10, subsample_size=4), poutine.scale(scale=2.0), poutine.mask(mask=torch.tensor(True)):
        pyro.sample("z", dist.Normal(0.0, 1.0), infer={"own": 1})
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(4))
    pyro.deterministic("d", torch.ones(()))
    pyro.param("p", torch.tensor(2.0), constraint=constraints.positive)


def noted() -> Notes:
    with Notes() as notes:
        program()
    return notes


def test_messages_have_the_fields_that_are_read():
    for msg in noted().after.values():
        assert msg.keys() >= FIELDS


def test_the_outermost_messenger_sees_what_all_others_did():
    """It comes last on the way out, and its value wins over the draw."""
    msg = noted().after["z"]
    assert msg["scale"] == 2.0 * 10 / 4 and bool(msg["mask"])
    assert [(f.name, f.dim, f.size, f.full_size, f.vectorized) for f in msg["cond_indep_stack"]] == [
        ("data", -1, 4, 10, True)
    ]
    assert tuple(msg["fn"].shape()) == (4,) and msg["value"].shape == (4,)
    assert msg["infer"] == {"own": 1} and not msg["is_observed"]


def test_a_value_that_a_messenger_gives_is_not_drawn():
    class Given(_pyro.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == "z":
                msg["value"], msg["done"] = torch.full((4,), 7.0), True

    generator = torch.get_rng_state()
    with Given(), Notes() as notes, pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    assert notes.after["z"]["value"].tolist() == [7.0] * 4
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_marks_of_special_sites():
    after = noted().after
    assert type(after["data"]["fn"]).__name__ == "_Subsample"
    assert after["d"]["infer"]["_deterministic"] and after["d"]["is_observed"]
    assert after["x"]["is_observed"] and not after["x"]["infer"]
    with Notes() as hidden, poutine.enum(first_available_dim=-2):
        pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("quiet", dist.Normal(0.0, 1.0), infer={"_do_not_trace": True})
    assert hidden.after["k"]["infer"]["_enumerate_dim"] == -2
    assert hidden.after["quiet"]["infer"]["_do_not_trace"]


def test_a_messenger_guide_keeps_the_prior_in_its_sites():
    def model():
        pyro.sample("z", dist.Normal(0.0, 3.0))

    guide = autoguide.AutoNormalMessenger(model)
    with Notes() as notes:
        guide()
    assert isinstance(poutine.unwrap(guide), _pyro.Messenger)
    assert float(notes.after["z"]["infer"]["prior"].scale) == 3.0


# Parameters and optimizers --------------------------------------------------------------------------------------


def test_the_store_keeps_unconstrained_leaves_and_constraints_by_name():
    msg = noted().params[0]
    leaf = _pyro.leaf_of("p")
    assert leaf is msg["value"].unconstrained() and leaf.is_leaf and leaf.requires_grad
    assert float(leaf.detach().exp()) == pytest.approx(2.0)
    assert _pyro.constraint_of("p") is constraints.positive
    assert msg["kwargs"]["constraint"] is constraints.positive
    assert _pyro.leaf_of("q") is None and _pyro.constraint_of("q") is None
    assert set(pyro.get_param_store().get_state()) == {"params", "constraints"}


def test_an_mcmc_keeps_its_draws():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    mcmc = infer.MCMC(infer.NUTS(model), 3, 1, disable_progbar=True)
    assert _pyro.draws_of(mcmc) is None
    mcmc.run()
    assert _pyro.draws_of(mcmc)["z"].shape == (1, 3)


def test_a_masked_distribution_keeps_its_mask():
    mask = torch.tensor([True, False])
    fn = dist.Normal(torch.zeros(2), 1.0).mask(mask)
    assert torch.equal(_pyro.mask_of(fn), mask) and _pyro.mask_of(fn.base_dist.mask(False)) is False


@pytest.mark.parametrize("local", [False, True])
def test_a_pyro_module_declares_its_parameters_with_their_constraints(local):
    with pyro.settings.context(module_local_params=local):

        class Module(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.scale = PyroParam(torch.tensor(2.0), constraint=constraints.positive)
                self.weight = nn.Parameter(torch.ones(3))

            def forward(self):
                return self.scale * self.weight.sum()

        module = Module()
        with Notes() as notes:
            module()
    names = {msg["name"]: msg for msg in notes.params}
    assert set(names) == {"scale", "weight"} and "scale_unconstrained" in module._parameters
    assert names["scale"]["value"].unconstrained() is module._parameters["scale_unconstrained"]
    assert _pyro.constraint_of("scale") is (None if local else constraints.positive)
    if local:
        assert names["scale"]["kwargs"]["constraint"] is constraints.positive


def test_pyro_optimizers_have_what_is_read():
    optim = pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})
    assert optim.pt_optim_constructor is torch.optim.Adam
    assert optim.pt_optim_args == {"lr": 0.1} and optim.pt_clip_args == {"clip_norm": 1.0}
    assert pyro.optim.Adam(lambda name: {"lr": 0.1}).pt_optim_args_argc == 1
    assert list(inspect.signature(pyro.optim.PyroOptim.__call__).parameters) == ["self", "params", "args", "kwargs"]
    scheduler = pyro.optim.StepLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "step_size": 2})
    assert scheduler.pt_scheduler_constructor is torch.optim.lr_scheduler.StepLR
    assert scheduler.kwargs == {"step_size": 2}


def test_a_loaded_state_waits_for_its_parameters():
    problem = problems.normal_normal()
    svi = infer.SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.1}), infer.Trace_ELBO())
    svi.step(*problem.args)
    fresh = pyro.optim.Adam({"lr": 0.1})
    fresh.set_state(svi.optim.get_state())
    assert set(_pyro.waiting_state(fresh)) == set(problem.params)
    assert _pyro.waiting_state(torch.optim.Adam) == {}


# Nothing is changed ---------------------------------------------------------------------------------------------


def dictionaries() -> dict[str, dict[str, int]]:
    """The identity of every attribute of Pyro's and torch.distributions' modules and classes."""
    spaces = {}
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith(("pyro.", "torch.distributions.", "torch.nn.modules.", "torch.optim.")):
            spaces[name] = module
            members = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
            spaces |= {f"{name}:{v.__qualname__}": v for v in members}
    own = {"__warningregistry__", "_abc_impl", "__annotations__"}
    return {
        name: {k: id(v) for k, v in vars(space).items() if k not in own and not isinstance(v, types.ModuleType)}
        for name, space in spaces.items()
    }


def surroundings() -> dict[str, Any]:
    """What else is global and could be left changed."""
    hooks = nn.modules.module
    return {
        "handlers": len(poutine.runtime._PYRO_STACK),
        "validation": [infer.is_validation_enabled(), poutine.is_validation_enabled(), dist.is_validation_enabled()],
        "torch's validation": torch.distributions.Distribution._validate_args,
        "settings": {k: repr(v) for k, v in pyro.settings.get().items()},
        "hooks": [len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks)],
        "dispatch": torch._C._len_torch_dispatch_stack(),
        "functions": torch._C._len_torch_function_stack(),
        "gradients": torch.is_grad_enabled(),
        "warnings": list(warnings.filters),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
        "print": repr(np.get_printoptions()),
    }


def assert_untouched(action: Any) -> None:
    importlib.import_module("torch._dynamo")  # torch.optim imports it at first use, and that adds a warnings filter
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # whose first instance lets torch put a hook on its step
    before, around = dictionaries(), surroundings()
    action()
    after = dictionaries()
    found = [
        f"{space}.{k}"
        for space, d in before.items()
        for k in d.keys() | after[space]
        if d.get(k) != after[space].get(k)
    ]
    assert found == []
    assert surroundings() == around


def fit(cls: type, backend: str) -> None:
    problem = problems.local_global_subsampled()
    svi = cls(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.01}), MonteCarloELBO(2), backend=backend)
    number = {"max_iter": 3} if cls is EM else {"num_steps": 3}
    svi.run(**number, data=[problem.args] * 3, validation=problem.args, callbacks=lambda p: None, progress_bar=False)


@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("cls", [SVI, EM])
def test_a_run_leaves_pyro_as_it_was(cls, backend):
    assert_untouched(lambda: fit(cls, backend))


def measure() -> None:
    problem = problems.normal_normal()
    emvae.compare_gradients(problem.model, problem.guide, *problem.args, num_replicates=3)
    emvae.log_evidence(problem.model, problem.guide, *problem.args, num_particles=5)
    emvae.explain(problem.model, problem.guide, *problem.args)


def test_measuring_leaves_pyro_as_it_was():
    assert_untouched(measure)


def fail_in(where: str) -> None:
    """A step that breaks off in the model, in the recording, or because something is not finite."""
    calls = []

    def model(x):
        calls.append(1)
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0))
        if where == "model" and len(calls) > 4:
            raise ZeroDivisionError
        z = z * len(calls) if where == "recording" else z
        pyro.sample("x", dist.Normal(z, 1.0), obs=x * torch.nan if where == "loss" and len(calls) > 4 else x)

    def guide(x):
        with pyro.plate("plate", 1):
            pyro.sample("y", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.0)), 1.0))

    svi = EM(model, guide, pyro.optim.Adam({"lr": 0.01}), backend="graph" if where == "recording" else "eager")
    with pytest.raises((ZeroDivisionError, ValueError)):
        for _ in range(4):
            svi.step(torch.tensor(1.0))


@pytest.mark.parametrize("where", ["model", "recording", "loss"])
def test_a_step_that_fails_leaves_pyro_as_it_was(where):
    assert_untouched(lambda: fail_in(where))
