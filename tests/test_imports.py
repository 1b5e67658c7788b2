r"""Imports point down only, and what is private or heavy stays in its place: read from the source, not imported."""

from __future__ import annotations

import ast
import graphlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "pyro_emvae"
SOURCE = Path(__file__).resolve().parents[1] / PACKAGE

# Lowest first. A name stands for the module or for the whole subpackage; modules of one layer may import each other.
LAYERS = (
    ("_checks", "_distributions", "_registry", "_pyro"),
    (
        "parameters",
        "particles",
        "objectives",
        "optimizers",
        "families",
        "problems",
        "annealing",
        "convergence",
        "psis",
        "information",
        "kernels",
        "plots",
    ),
    ("posterior",),
    ("estimators", "guides"),
    (
        "loss",
        "choosing",
        "drawing",
        "probing",
        "resolving",
        "settling",
        "trials",
        "surrogate",
        "controls",
        "evaluation",
        "sticking",
        "engine",
        "batches",
        "checkpoint",
        "degeneracy",
        "driver",
        "history",
        "monitor",
    ),
    ("evidence", "uncertainty"),
    ("svi", "steps", "acceleration", "growth", "looks", "restarts", "slices"),
    ("em",),
    ("compare", "diagnostics"),
    ("testing",),
    ("__init__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Imported inside functions only.
LAZY = (
    "arviz",
    "h5netcdf",
    "jinja2",
    "matplotlib",
    "netCDF4",
    "pandas",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "xarray",
    "zuko",
)

HANDLERS = ("parameters", "particles", "posterior", "guides", "kernels", "_pyro")
STORE = ("parameters", "_pyro")
STORE_NAMES = {
    "get_param_store",
    "clear_param_store",
    "ParamStoreDict",
    "_PYRO_PARAM_STORE",
    "param_store",
    "constraint_of",
    "leaf_of",
}

# What Pyro's documentation lists: packages, of which `__all__` counts, and modules as a whole.
PYRO_PACKAGES = (
    "pyro",
    "pyro.distributions",
    "pyro.distributions.constraints",
    "pyro.distributions.transforms",
    "pyro.infer",
    "pyro.infer.autoguide",
    "pyro.infer.reparam",
    "pyro.nn",
    "pyro.optim",
    "pyro.params",
    "pyro.poutine",
)
PYRO_MODULES = (
    "pyro.contrib",
    "pyro.distributions.torch_distribution",
    "pyro.infer.autoguide.initialization",
    "pyro.infer.discrete",
    "pyro.infer.elbo",
    "pyro.infer.importance",
    "pyro.infer.predictive",
    "pyro.infer.renyi_elbo",
    "pyro.infer.svi",
    "pyro.infer.trace_elbo",
    "pyro.infer.trace_mean_field_elbo",
    "pyro.infer.traceenum_elbo",
    "pyro.infer.tracegraph_elbo",
    "pyro.nn.module",
    "pyro.ops",
    "pyro.optim.clipped_adam",
    "pyro.optim.lr_scheduler",
    "pyro.optim.multi",
    "pyro.optim.optim",
    "pyro.optim.pytorch_optimizers",
    "pyro.params.param_store",
    "pyro.poutine.handlers",
    "pyro.poutine.runtime",
    "pyro.poutine.util",
    "pyro.primitives",
    "pyro.settings",
)


@dataclass(frozen=True)
class Use:
    """A dotted name that a module imports, reads or writes."""

    name: str
    line: int
    imported: bool
    written: bool
    at_import: bool


class Uses(ast.NodeVisitor):
    """Collects the uses of a module: imports anywhere in it, and attribute chains that start at an imported name.

    `at_import` holds outside functions and outside ``if TYPE_CHECKING:``, that is, for what importing the module runs.
    """

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module.split(".") if is_package else module.split(".")[:-1]
        self.names: dict[str, str] = {}
        self.found: list[Use] = []
        self.at_import = True

    @classmethod
    def of(cls, module: str, source: str, is_package: bool = False) -> list[Use]:
        tree = ast.parse(source)
        uses = cls(module, is_package)
        uses.bind(tree)
        uses.visit(tree)
        return uses.found

    def bind(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{self.base(node)}.{alias.name}"

    def base(self, node: ast.ImportFrom) -> str:
        above = self.package[: len(self.package) - node.level + 1] if node.level else []
        return ".".join([*above, *(node.module or "").split(".")]).rstrip(".")

    def add(self, name: str, node: ast.AST, imported: bool = False, written: bool = False) -> None:
        self.found.append(Use(name, node.lineno, imported, written, self.at_import))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node, imported=True)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.add(f"{self.base(node)}.{alias.name}", node, imported=True)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self.dotted(node):
            self.add(name, node, written=not isinstance(node.ctx, ast.Load))
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.names and isinstance(node.ctx, ast.Load):
            self.add(self.names[node.id], node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).split(".")[-1]
        first = node.args[0] if node.args else None
        if (
            called in ("import_module", "__import__")
            and isinstance(first, ast.Constant)
            and isinstance(first.value, str)
        ):
            level = len(first.value) - len(first.value.lstrip("."))
            path = ast.ImportFrom(module=first.value.lstrip("."), names=[], level=level)
            self.add(self.base(path), node, imported=True)
        if called in ("setattr", "delattr") and first is not None and (name := self.dotted(first)):
            key = node.args[1].value if isinstance(node.args[1], ast.Constant) else "*"
            self.add(f"{name}.{key}", node, written=True)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            self.later(node.body)
            for item in node.orelse:
                self.visit(item)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for item in (*node.decorator_list, node.args):
            self.visit(item)
        self.later([*node.body, *([node.returns] if node.returns else [])])

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self.later([node.body])

    def later(self, nodes: list[ast.AST]) -> None:
        before, self.at_import = self.at_import, False
        for node in nodes:
            self.visit(node)
        self.at_import = before

    def dotted(self, node: ast.AST) -> str | None:
        """Return the full name of ``alias.a.b``, if `alias` was imported."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.names:
            return None
        return ".".join([self.names[node.id], *reversed(parts)])


def modules(source: Path) -> dict[str, Path]:
    """Return the package's modules by full name, as far as they exist."""
    names = {path: path.relative_to(source.parent).with_suffix("").parts for path in sorted(source.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def part(module: str) -> str:
    """Return the name in LAYERS that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def scan(source: Path) -> dict[str, list[Use]]:
    """Return the uses of all modules."""
    return {
        name: Uses.of(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for name, path in modules(source).items()
    }


def arrows(uses: dict[str, list[Use]]) -> Iterator[tuple[str, str, int]]:
    """Yield (importing module, imported module, line) within the package."""
    for module, found in uses.items():
        for use in found:
            if use.imported and within(use.name, (PACKAGE,)):
                yield module, longest(use.name, uses), use.line


def within(name: str, roots: tuple[str, ...] | list[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def longest(name: str, known: dict[str, list[Use]] | tuple[str, ...]) -> str:
    """Return the longest prefix of a dotted name that is known."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def is_private(name: str) -> bool:
    return any(piece.startswith("_") and not piece.endswith("__") for piece in name.split("."))


def is_public_pyro(name: str) -> bool:
    owner = longest(name, PYRO_PACKAGES + PYRO_MODULES)
    rest = name.removeprefix(owner).lstrip(".").split(".")[0]
    if owner in PYRO_MODULES or rest in ("", "*"):
        return True
    return f"{owner}.{rest}" in PYRO_PACKAGES + PYRO_MODULES or rest in importlib.import_module(owner).__all__


def check_listed(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module in uses:
        if part(module) not in LEVEL:
            yield f"{module} stands in no layer: add {part(module)!r} to LAYERS in tests/test_imports.py, or move it"


def check_down(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module, target, line in arrows(uses):
        here, there = LEVEL.get(part(module), len(LAYERS)), LEVEL.get(part(target), -1)
        if there > here:
            yield f"{module}:{line} imports {target}, which stands above it (layer {there + 1} over {here + 1})"


def check_cycles(uses: dict[str, list[Use]]) -> Iterator[str]:
    graph = {module: {b for a, b, _ in arrows(uses) if a == module} for module in uses}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        yield "a cycle: " + " <- ".join(error.args[1])


def check_lazy(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module, use in pairs(uses):
        if use.imported and use.at_import and within(use.name, LAZY):
            yield f"{module}:{use.line} imports {use.name} at module level: import it inside the function that needs it"


def check_handlers(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module, use in pairs(uses):
        if part(module) not in HANDLERS and (
            "poutine" in use.name.split(".") or within(use.name, ("pyro.do", "pyro.condition"))
        ):
            yield f"{module}:{use.line} uses {use.name}: Pyro's handlers belong in {', '.join(HANDLERS[:-1])}"


def check_store(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module, use in pairs(uses):
        if part(module) not in STORE and STORE_NAMES & set(use.name.split(".")):
            yield f"{module}:{use.line} uses {use.name}: the param store belongs in parameters"


def check_private_torch(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module, use in pairs(uses):
        foreach = part(module) == "optimizers" and use.name.startswith("torch._foreach_")  # as torch.optim itself does
        home = part(module) == "engine" or module.endswith("particles.dependence")  # a dispatch mode
        if not home and not foreach and within(use.name, ("torch",)) and is_private(use.name):
            yield f"{module}:{use.line} uses {use.name}: private torch names belong in engine"


def check_private_pyro(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module, use in pairs(uses):
        public = not within(use.name, ("pyro",)) or (not is_private(use.name) and is_public_pyro(use.name))
        if part(module) != "_pyro" and not public:
            yield f"{module}:{use.line} uses {use.name}, which Pyro does not document: list it in _pyro.py"


def check_patches(uses: dict[str, list[Use]]) -> Iterator[str]:
    for module, use in pairs(uses):
        if use.written and within(use.name, ("pyro", "torch", "numpy")):
            yield f"{module}:{use.line} assigns {use.name}: nothing of Pyro's or torch's is patched"


def pairs(uses: dict[str, list[Use]]) -> Iterator[tuple[str, Use]]:
    return ((module, use) for module, found in uses.items() for use in found)


CHECKS = {
    check.__name__: check
    for check in (
        check_listed,
        check_down,
        check_cycles,
        check_lazy,
        check_handlers,
        check_store,
        check_private_torch,
        check_private_pyro,
        check_patches,
    )
}


@pytest.fixture(scope="module")
def package_uses() -> dict[str, list[Use]]:
    return scan(SOURCE)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_package(package_uses, check):
    problems = list(check(package_uses))
    assert not problems, "\n" + "\n".join(problems)


def test_no_module_stands_twice_in_the_table():
    assert len(LEVEL) == sum(map(len, LAYERS))


# Planted defects: check, file, source, and what the message has to name. {} is an otherwise correct package.
DEFECTS = [
    ("check_listed", "_helpers.py", "", "_helpers"),
    ("check_listed", "newfloor/thing.py", "", "newfloor"),
    ("check_down", "objectives.py", "from .loss import MonteCarloELBO", "pyro_emvae.loss"),
    ("check_down", "objectives.py", "from . import loss", "pyro_emvae.loss"),
    ("check_down", "objectives.py", "import pyro_emvae.loss as l", "pyro_emvae.loss"),
    ("check_down", "objectives.py", "def f():\n    from .loss import MonteCarloELBO", "objectives:2"),
    ("check_down", "objectives.py", "import importlib\nimportlib.import_module('pyro_emvae.loss')", "pyro_emvae.loss"),
    ("check_down", "posterior/exact.py", "from ..estimators.score import Score", "pyro_emvae.estimators.score"),
    ("check_down", "posterior/exact.py", "from .. import estimators", "pyro_emvae.estimators"),
    ("check_down", "em.py", "import pyro_emvae", "imports pyro_emvae,"),
    ("check_down", "em.py", "if TYPE_CHECKING:\n    from .testing import check_step", "pyro_emvae.testing"),
    ("check_cycles", "driver.py", "from .loss import x", "pyro_emvae.driver"),
    ("check_cycles", "estimators/score.py", "from . import Estimator", "pyro_emvae.estimators.score"),
    ("check_lazy", "plots.py", "import matplotlib.pyplot as plt", "matplotlib.pyplot"),
    ("check_lazy", "families/flow.py", "try:\n    import zuko\nexcept ImportError:\n    zuko = None", "zuko"),
    ("check_lazy", "diagnostics/container.py", "class A:\n    from xarray import Dataset", "xarray.Dataset"),
    ("check_lazy", "engine.py", "import torch._inductor.config", "torch._inductor.config"),
    ("check_lazy", "engine.py", "from torch import _inductor", "torch._inductor"),
    ("check_handlers", "loss.py", "from pyro import poutine", "pyro.poutine"),
    ("check_handlers", "loss.py", "import pyro.poutine as p", "pyro.poutine"),
    ("check_handlers", "loss.py", "import pyro\ndef f(m): return pyro.poutine.trace(m)", "pyro.poutine.trace"),
    ("check_handlers", "loss.py", "from .particles import poutine", "particles.poutine"),
    ("check_handlers", "loss.py", "import pyro\ndef f(m): return pyro.condition(m)", "pyro.condition"),
    ("check_store", "driver.py", "import pyro\ndef f(): return pyro.get_param_store()", "pyro.get_param_store"),
    ("check_store", "driver.py", "from pyro import clear_param_store as c", "pyro.clear_param_store"),
    ("check_store", "driver.py", "from .parameters import get_param_store", "parameters.get_param_store"),
    ("check_store", "driver.py", "from ._pyro import leaf_of", "_pyro.leaf_of"),
    (
        "check_private_torch",
        "loss.py",
        "import torch\ndef f(x): torch._foreach_add_(x, 1)",
        "torch._foreach_add_",
    ),
    ("check_private_torch", "optimizers.py", "from torch._C import Graph", "torch._C.Graph"),
    ("check_private_torch", "optimizers.py", "import torch.optim as o\no.adam._single_tensor_adam", "_single_tensor"),
    ("check_private_pyro", "loss.py", "from pyro.infer.util import torch_item", "pyro.infer.util.torch_item"),
    ("check_private_pyro", "loss.py", "import pyro\ndef f(): pyro.infer.util.torch_item(1)", "pyro.infer.util"),
    ("check_private_pyro", "loss.py", "from pyro.nn.module import _Context", "_Context"),
    ("check_private_pyro", "loss.py", "from pyro.infer import Trace_ELBO\nTrace_ELBO._get_trace", "_get_trace"),
    ("check_patches", "svi.py", "import pyro\npyro.infer.SVI.step = None", "pyro.infer.SVI.step"),
    ("check_patches", "svi.py", "from pyro.infer import SVI\nsetattr(SVI, 'step', None)", "pyro.infer.SVI.step"),
    ("check_patches", "svi.py", "import torch\ndef f():\n    torch.backends.cudnn.benchmark = True", "svi:3"),
    ("check_patches", "svi.py", "from torch import nn\ndel nn.Module.forward", "torch.nn.Module.forward"),
]
SOUND = {
    "__init__.py": "from .em import EM\nfrom .loss import MonteCarloELBO\n__version__ = '0'",
    "_checks.py": "import difflib\nfrom typing import NoReturn",
    "_registry.py": "from ._checks import fail",
    "_pyro.py": "from pyro.infer.util import torch_item\nfrom pyro.poutine.messenger import Messenger",
    "parameters.py": "import pyro\nfrom ._pyro import Messenger\ndef f(): return pyro.get_param_store()",
    "objectives.py": "import torch\nfrom torch import Tensor\nfrom ._registry import register",
    "posterior/__init__.py": "from .exact import Exact",
    "posterior/exact.py": "from pyro import poutine\nfrom .._checks import fail\nfrom ..parameters import f",
    "estimators/__init__.py": "from .score import Score",
    "estimators/_base.py": "from abc import ABC\nimport pyro.distributions as dist\ndist.Normal",
    "estimators/score.py": "from ._base import Estimator\nfrom ..objectives import elbo",
    "engine.py": "import torch\ndef f():\n    from torch._inductor import config\n    return torch._foreach_add",
    "loss.py": "from pyro.infer import ELBO\nfrom . import engine\nfrom .driver import Fit\nfrom .estimators import x",
    "driver.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import xarray\ndef f(x: xarray): ...",
    "em.py": "from .loss import Loss\nclass EM:\n    def f(self):\n        import arviz\n        self.x = arviz",
    "testing.py": "from .em import EM",
}


def plant(folder: Path, files: dict[str, str]) -> dict[str, list[Use]]:
    for name, source in files.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return scan(folder / PACKAGE)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_sound_package_passes(tmp_path, check):
    assert list(check(plant(tmp_path, SOUND))) == []


@pytest.mark.parametrize(("check", "name", "source", "named"), DEFECTS)
def test_planted_defect_is_caught(tmp_path, check, name, source, named):
    (problem, *_) = list(CHECKS[check](plant(tmp_path, SOUND | {name: source}))) or [""]
    assert named in problem


def test_every_check_has_a_planted_defect():
    assert {check for check, *_ in DEFECTS} == set(CHECKS)
