r"""An estimator in a separate package, installed on its own: proven, compared and chosen like one of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_emvae

PACKAGE = Path(__file__).parent / "extension_package"
PROGRAM = """
import json, pyro, torch
import pyro_emvae as emvae
from pyro_emvae.testing import check_estimator

before = [row["estimator"] for row in emvae.estimators.auto_table()]
import emvae_half_baseline

pyro.set_rng_seed(0)
problem = emvae.problems.bernoulli()
vector = emvae.problems.bernoulli_vector()
loss = emvae.MonteCarloELBO(1, vector.max_plate_nesting)
loss.loss(vector.model, vector.guide, *vector.args)
pyro.clear_param_store()
normal = emvae.problems.normal_normal()
pyro.clear_param_store()
other = emvae.MonteCarloELBO(1, normal.max_plate_nesting)
other.loss(normal.model, normal.guide, *normal.args)
pyro.clear_param_store()
comparison = emvae.compare_gradients(
    problem.model, problem.guide, *problem.args,
    estimators=["half_baseline", "score", emvae_half_baseline.HalfBaseline(-7.0)], num_replicates=500, seed=0,
)
print(json.dumps({
    "module": emvae_half_baseline.__file__,
    "before": before,
    "after": [row["estimator"] for row in emvae.estimators.auto_table()],
    "checked": [(r.problem, r.num_particles, r.how) for r in check_estimator("half_baseline")],
    "chosen": {name: type(e).__name__ for name, e in loss.resolved.items()},
    "chosen elsewhere": {name: type(e).__name__ for name, e in other.resolved.items()},
    "compared": [str(name) for name in comparison.dataset.estimator.values],
    "bias_z": float(comparison.dataset.bias_z.max()),
    "limit": float(comparison.dataset.attrs["bias_z_limit"]),
    "table": str(comparison),
}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Install the package into a folder of its own and use it in a fresh interpreter."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), str(PACKAGE)], check=True, timeout=120)
    ours = Path(pyro_emvae.__file__).parents[1]
    paths = [str(target), str(ours), os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM]
    done = subprocess.run(command, env=settings, cwd=target, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {"target": str(target), **json.loads(done.stdout.splitlines()[-1])}


def test_it_is_the_installed_one(report):
    assert report["module"].startswith(report["target"])


def test_it_passes_check_estimator(report):
    """With one particle and four, on every problem that has a Bernoulli site."""
    assert {how for _, _, how in report["checked"]} == {"enumeration", "quadrature"}
    assert {k for _, k, _ in report["checked"]} == {1, 4}
    assert {"bernoulli", "bernoulli_vector", "discrete_two_level", "mixed_two_level"} == {
        p for p, _, _ in report["checked"]
    }


def test_it_stands_in_auto_s_table_by_its_rank(report):
    assert "half_baseline" not in report["before"]
    assert [name for name in report["after"] if name != "half_baseline"] == report["before"]
    after = report["after"]
    assert after.index("leave_one_out") < after.index("half_baseline") < after.index("decaying_average")


def test_auto_chooses_it_where_it_fits(report):
    assert set(report["chosen"].values()) == {"HalfBaseline"}
    assert set(report["chosen elsewhere"].values()) == {"Pathwise"}


def test_it_is_compared(report):
    assert report["compared"] == ["half_baseline", "score", "HalfBaseline(constant=-7.0)"]
    assert report["bias_z"] < report["limit"]
    assert "half_baseline" in report["table"]


def test_this_interpreter_does_not_know_it():
    assert "half_baseline" not in [row["estimator"] for row in pyro_emvae.estimators.auto_table()]
