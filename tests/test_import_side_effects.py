r"""Importing the package, and fitting with it, leaves the process as it was: measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

SECONDS = 0.3  # what `import pyro_emvae` may add to `import pyro`
ATTEMPTS = 4  # a busy machine only ever adds time, so the least of several is the honest one

HEAVY = (
    "arviz",
    "h5netcdf",
    "jinja2",
    "matplotlib",
    "netCDF4",
    "pandas",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "xarray",
    "zuko",
)

# What a process is: everything global that a library could be tempted to change. Values have to be JSON.
PROBE = """
import json, logging, os, random, signal, sys, time, types, warnings
import numpy, pyro, torch

def digest(value):
    return hash(value) if isinstance(value, bytes) else hash(repr(value))

def settings():
    return {
        "torch.get_default_dtype": str(torch.get_default_dtype()),
        "torch.get_default_device": str(torch.get_default_device()),
        "torch.is_grad_enabled": torch.is_grad_enabled(),
        "torch.is_anomaly_enabled": torch.is_anomaly_enabled(),
        "torch.get_num_threads": torch.get_num_threads(),
        "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled(),
        "torch.distributions validation": torch.distributions.Distribution._validate_args,
        "torch.distributions KL pairs": len(torch.distributions.kl._KL_REGISTRY),
        "torch.distributions bijections": [
            len(registry._registry)
            for registry in (torch.distributions.biject_to, torch.distributions.transform_to)
        ],
        "torch's generator": digest(torch.get_rng_state().numpy().tobytes()),
        "numpy's generator": digest(numpy.random.get_state()[1].tobytes() + bytes(numpy.random.get_state()[2])),
        "Python's generator": digest(random.getstate()),
        "numpy.geterr": numpy.geterr(),
        "numpy.get_printoptions": repr(numpy.get_printoptions()),
        "pyro validation": [pyro.infer.is_validation_enabled(), pyro.poutine.is_validation_enabled()],
        "pyro.settings": {key: repr(value) for key, value in pyro.settings.get().items()},
        "pyro's param store": sorted(pyro.get_param_store().keys()),
        "pyro's handler stack": len(pyro.poutine.runtime._PYRO_STACK),
        "warnings.filters": [repr(item) for item in warnings.filters],
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "os.environ": dict(os.environ),
        "working directory": os.getcwd(),
        "sys.path": list(sys.path),
        "sys hooks": [id(sys.excepthook), id(sys.displayhook), sys.getrecursionlimit(), len(sys.meta_path)],
        "Ctrl-C": repr(signal.getsignal(signal.SIGINT)),
    }

def dictionaries():
    # module or class -> attribute -> identity
    roots = ("pyro.", "torch.distributions.")
    owned = {name: module for name, module in sys.modules.items() if f"{name}.".startswith(roots)}
    spaces = {}
    for name, module in owned.items():
        spaces[name] = vars(module)
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == name:
                spaces[f"{name}:{value.__qualname__}"] = vars(value)
    return {space: dict(names) for space, names in spaces.items()}

# Python itself writes these: caches of abstract classes and of warnings, and names of submodules as they get imported.
OWN = {"__warningregistry__", "_abc_impl", "__annotations__"}

def differences(before, after):
    found = []
    for space, names in before.items():
        now = after.get(space, {})
        for name in sorted((set(names) | set(now)) - OWN):
            value = now.get(name)
            submodule = name not in names and isinstance(value, types.ModuleType)
            if not submodule and names.get(name, found) is not now.get(name, found):
                found.append(f"{space}.{name}")
    return found

before, modules_before, known = settings(), dictionaries(), set(sys.modules)
start = time.process_time()
ACTION
seconds = time.process_time() - start
after = settings()
print(json.dumps({
    "seconds": seconds,
    "settings": [key for key in before if before[key] != after[key]],
    "patched": differences(modules_before, dictionaries()),
    "modules": sorted(set(sys.modules) - known),
}))
"""

# A fit in each of the two ways, in a process whose generator and param store may change.
RUN = """
import pyro.distributions as dist
import pyro_emvae as emvae
from torch.distributions import constraints

def model(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

def guide(x):
    shift = pyro.param("shift", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + shift, scale))

x = torch.arange(4.0)
emvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=emvae.MonteCarloELBO()).run(3, x, progress_bar=False)
emvae.EM(model, guide, pyro.optim.Adam({"lr": 0.01}), emvae.MonteCarloELBO()).run(x, max_iter=3, progress_bar=False)
"""


def probe(action: str, first: str = "") -> dict:
    """Run `first`, then `action`, in a fresh process and return what `action` changed."""
    process = subprocess.run(
        [sys.executable, "-c", first + PROBE.replace("ACTION", action)], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported() -> dict:
    """The changes that the import makes, with the least time of several processes."""
    results = []
    while len(results) < ATTEMPTS and not (results and results[-1]["seconds"] <= SECONDS):
        results.append(probe("import pyro_emvae"))
    return min(results, key=lambda result: result["seconds"])


def test_import_is_quick(imported):
    assert imported["seconds"] <= SECONDS, f"{imported['seconds']:.2f} s; it imports {imported['modules']}"


def test_import_loads_nothing_heavy(imported):
    assert [name for name in imported["modules"] if name.split(".")[0] in HEAVY or name in HEAVY] == []


def test_import_changes_nothing_global(imported):
    assert imported["settings"] == []


def test_import_patches_nothing(imported):
    assert imported["patched"] == []


def test_a_run_patches_nothing():
    # torch.optim imports torch._dynamo at its first use, with or without this package, and that adds a warnings filter.
    result = probe(RUN, first="import torch, torch._dynamo")
    allowed = {"torch's generator", "numpy's generator", "Python's generator", "pyro's param store"}
    assert result["patched"] == []
    assert set(result["settings"]) <= allowed


DEFECTS = {
    "settings": {
        "torch.get_default_dtype": "torch.set_default_dtype(torch.float64)",
        "torch.distributions validation": "torch.distributions.Distribution.set_default_validate_args(False)",
        "pyro validation": "pyro.enable_validation(not pyro.infer.is_validation_enabled())",
        "torch's generator": "torch.rand(1)",
        "numpy's generator": "numpy.random.rand()",
        "Python's generator": "random.random()",
        "warnings.filters": "warnings.simplefilter('ignore')",
        "os.environ": "os.environ['OMP_NUM_THREADS'] = '7'",
        "pyro.settings": "pyro.settings.set(cholesky_relative_jitter=2.0)",
        "pyro's param store": "pyro.param('a', torch.zeros(()))",
        "torch.get_num_threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
        "torch.distributions KL pairs": """
            class A(torch.distributions.Normal): pass
            torch.distributions.register_kl(A, A)(lambda p, q: 0)""",
    },
    "patched": {
        "pyro.infer.Trace_ELBO": "pyro.infer.Trace_ELBO = None",
        "pyro.infer.svi:SVI.step": "pyro.infer.SVI.step = None",
        "pyro.sample": "pyro.sample = pyro.param",
        "pyro.poutine.extra": "pyro.poutine.extra = 1",
        "torch.distributions.normal:Normal.rsample": "del torch.distributions.Normal.rsample",
    },
    "modules": {"sklearn": "import sklearn", "xarray": "import xarray"},
}
PLANTED = [(kind, name, action) for kind, defects in DEFECTS.items() for name, action in defects.items()]


@pytest.fixture(scope="module")
def with_all_defects() -> dict:
    return probe("\n".join(textwrap.dedent(action) for _, _, action in PLANTED))


@pytest.mark.parametrize(("kind", "name"), [planted[:2] for planted in PLANTED])
def test_planted_defect_is_seen(with_all_defects, kind, name):
    assert name in with_all_defects[kind]


def test_empty_action_changes_nothing():
    result = probe("pass")
    assert (result["settings"], result["patched"], result["modules"]) == ([], [], [])
