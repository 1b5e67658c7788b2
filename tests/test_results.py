r"""Every slow check has its figure in docs/results.md; and this can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import results_table
from results_table import Row


def row(test: str, figure: str = "0.9") -> Row:
    return Row(check="coverage", figure=figure, seconds="1.0", versions="torch 2", test=test)


def missing_rows(slow: set[str], rows: list[Row]) -> set[str]:
    return slow - {row.test for row in rows} - {row.function for row in rows}


def test_each_slow_check_has_a_row(collected_slow):
    missing = missing_rows(results_table.slow_functions() | set(collected_slow), results_table.read())
    assert not missing, f"no row in docs/results.md, run `make test-full`: {sorted(missing)}"


def test_rows_belong_to_slow_checks():
    gone = {row.function for row in results_table.read()} - results_table.slow_functions()
    assert not gone, f"docs/results.md has rows of checks that are gone, run `make test-full`: {sorted(gone)}"


SLOW = {
    "function": "import pytest\n@pytest.mark.slow\ndef test_a(): ...\ndef test_b(): ...\n",
    "called": "import pytest\n@pytest.mark.slow()\ndef test_a(): ...\n",
    "imported mark": "from pytest import mark\n@mark.slow\ndef test_a(): ...\n",
    "parameter": "@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.slow)])\ndef test_a(n): ...\n",
    "list of cases": "CASES = [pytest.param(2, marks=[pytest.mark.slow])]\n"
    "ALL: list = [1, *CASES]\n@pytest.mark.parametrize('n', ALL)\ndef test_a(n): ...\n",
    "helper": "def case(n): return pytest.param(n, marks=pytest.mark.slow)\n"
    "@pytest.mark.parametrize('n', [case(1)])\ndef test_a(n): ...\n",
    "fixture": "@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.slow)])\ndef n(request): ...\n"
    "def test_a(n): ...\ndef test_b(): ...\n",
    "module": "pytestmark = [pytest.mark.gpu, pytest.mark.slow]\ndef test_a(): ...\n",
    "async": "@pytest.mark.slow\nasync def test_a(): ...\n",
}


@pytest.mark.parametrize("source", SLOW.values(), ids=SLOW)
def test_slow_checks_are_found(source):
    assert list(results_table.slow_names(source)) == ["test_a"]


@pytest.mark.parametrize(
    "mark", ["@pytest.mark.slow\nclass TestA:\n", "class TestA:\n    pytestmark = pytest.mark.slow\n"]
)
def test_slow_classes_are_found(mark):
    assert list(results_table.slow_names(mark + "    def test_a(self): ...\n")) == ["TestA::test_a"]


def test_other_checks_are_not_slow():
    source = "SLOW = 3\n@pytest.mark.gpu\ndef test_slow(slow): ...\ndef helper(): pytest.mark.gpu\n"
    assert list(results_table.slow_names(source)) == []


def test_a_slow_check_without_a_row_is_reported(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_new.py").write_text(SLOW["function"])
    slow = results_table.slow_functions(tmp_path)
    assert missing_rows(slow, []) == {"tests/test_new.py::test_a"}
    assert missing_rows(slow, [row("tests/test_new.py::test_a[x]")]) == set()
    assert missing_rows({"t.py::a[1]", "t.py::a[2]"}, [row("t.py::a[1]")]) == {"t.py::a[2]"}


def test_the_table_survives_a_round_trip():
    rows = [row("t.py::a"), row("t.py::b[x|y]", "bias |mean| < 1e-3")]
    assert results_table.parse(results_table.render(reversed(rows))) == rows


def test_writing_keeps_what_did_not_run_and_drops_what_failed_or_is_gone(tmp_path):
    path = tmp_path / "docs" / "results.md"
    old = [row(f"t.py::{name}", "old") for name in ("kept", "failed", "gone", "again")]
    known = {"t.py::kept", "t.py::failed", "t.py::again"}
    results_table.write(old, [], known, path)
    new = [row("t.py::again", "new")]
    results_table.write(new, ["t.py::again", "t.py::failed"], known, path)
    assert {(item.test, item.figure) for item in results_table.read(path)} == {
        ("t.py::kept", "old"),
        ("t.py::again", "new"),
    }


PLANTED = """
import pyro, pytest, torch, warnings

@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_measured(n, record_result): record_result("figure", n)
@pytest.mark.slow
def test_silent(): pass
@pytest.mark.slow
def test_failing(record_result):
    record_result("figure", 1)
    assert False
def test_dtype(): torch.set_default_dtype(torch.float64)
def test_dtype_is_back(): assert torch.get_default_dtype() == torch.float32
def test_store(): pyro.param("a", torch.zeros(()))
def test_store_is_empty(): assert len(pyro.get_param_store()) == 0
def test_validation_is_on(): assert pyro.infer.is_validation_enabled()
def test_warning(): warnings.warn("planted")
@pytest.mark.parametrize("n", [1, 2])
def test_draw(n): print("draw", torch.rand(()).item())
"""


def run_pytest(folder, *options: str) -> str:
    """Run the planted tests under this conftest.py in a process of their own, and return what pytest prints."""
    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    for name in ("conftest.py", "results_table.py"):
        shutil.copy(results_table.ROOT / "tests" / name, tests)
    shutil.copy(results_table.ROOT / "pyproject.toml", folder)
    (tests / "test_planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "pytest", "tests", "-p", "no:cacheprovider", "-p", "no:xdist", "-rA", *options]
    environment = os.environ | {"PYTHONPATH": str(results_table.ROOT), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120).stdout


def test_the_harness_can_fail(tmp_path):
    first, second = run_pytest(tmp_path), run_pytest(tmp_path)
    assert "ERROR tests/test_planted.py::test_dtype - AssertionError: the test left torch's default dtype" in first
    assert "FAILED tests/test_planted.py::test_warning - UserWarning: planted" in first
    assert "pyro.set_rng_seed(" in first
    assert "1 failed, 7 passed, 4 deselected, 1 error" in first
    draws, again = ([line for line in out.splitlines() if line.startswith("draw")] for out in (first, second))
    assert draws == again
    assert len(set(draws)) == 2


def test_slow_checks_fill_the_table(tmp_path):
    printed = run_pytest(tmp_path, "-m", "slow", "--write-results")
    assert "test_silent is slow and records no figure" in printed
    assert "2 failed, 2 passed" in printed
    rows = results_table.read(tmp_path / "docs" / "results.md")
    assert [(item.test.rpartition("::")[2], item.figure) for item in rows] == [
        ("test_measured[1]", "1"),
        ("test_measured[2]", "2"),
    ]
