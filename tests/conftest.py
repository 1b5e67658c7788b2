r"""What every test starts from: an empty param store, validation on, its own seed; and the table of slow checks.

`Everywhere` is registered as a plugin, because the fixtures of a conftest.py do not reach the package's doctests.
"""

from __future__ import annotations

import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pytest
import results_table
import torch

SLOW_IDS = pytest.StashKey[list[str]]()
SEED = pytest.StashKey[int]()
RECORD = "results_row"


class Everywhere:
    """Fixtures and hooks for all tests, doctests included."""

    @pytest.fixture(autouse=True)
    def clean_slate(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """An empty param store, validation on, one seed per test; the default dtype has to be the same afterwards."""
        seed = request.node.stash[SEED] = zlib.crc32(request.node.nodeid.encode())
        dtype = torch.get_default_dtype()
        pyro.clear_param_store()
        pyro.enable_validation(True)
        pyro.set_rng_seed(seed)
        yield
        pyro.clear_param_store()
        changed = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        assert changed == dtype, f"the test left torch's default dtype at {changed}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        """Print the seed of a test that fails; a slow check that records no figure fails."""
        report = yield
        slow = item.get_closest_marker("slow") is not None
        if slow and report.when == "call" and report.passed and RECORD not in dict(item.user_properties):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} is slow and records no figure: call record_result(check, figure)."
        if report.failed and SEED in item.stash:
            report.sections.append(("seed", f"pyro.set_rng_seed({item.stash[SEED]})"))
        return report


class ResultsWriter:
    """Collects the figures of all workers and writes docs/results.md at the end of the run."""

    def __init__(self) -> None:
        self.rows: list[results_table.Row] = []
        self.ran: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "slow" not in report.keywords or report.skipped:
            return
        self.ran.add(results_table.function(report.nodeid))
        if report.when == "call" and report.passed:
            values = [value for name, value in report.user_properties if name == RECORD]
            self.rows += [results_table.Row(*value, report.nodeid) for value in values]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        known = results_table.slow_functions()
        results_table.write(self.rows, self.ran, known)
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and not known:
            session.exitstatus = pytest.ExitCode.OK


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write the figures of slow checks to docs/results.md")


def pytest_configure(config: pytest.Config) -> None:
    # One thread per process: the workers share the cores, and sums come out the same with any number of workers.
    torch.set_num_threads(1)
    config.pluginmanager.register(Everywhere(), "emvae-everywhere")
    if config.getoption("--write-results") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ResultsWriter(), "emvae-results")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note the slow checks before `-m` deselects them, and skip what needs a compiler where there is none."""
    marks = {item.nodeid: {mark.name for mark in item.iter_markers()} for item in items}
    config.stash[SLOW_IDS] = [test for test, names in marks.items() if "slow" in names and "gpu" not in names]
    if shutil.which("g++") is None:
        for item in items:
            if "compiler" in marks[item.nodeid]:
                item.add_marker(pytest.mark.skip(reason="there is no g++"))


@pytest.fixture
def collected_slow(request: pytest.FixtureRequest) -> list[str]:
    """Ids of the slow checks that this run collected, deselected ones included; cuda's only count where they ran."""
    return request.config.stash[SLOW_IDS]


CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has; cuda carries the mark ``gpu``."""
    return torch.device(request.param)


@pytest.fixture
def record_result(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Record what a slow check measured: ``record_result("coverage of 90 % intervals", f"{share:.3f}")``.

    Each call is one row of docs/results.md; its seconds count from the call before, the first from the test's start.
    """
    import pyro_emvae

    last = time.perf_counter()
    versions = f"pyro_emvae {pyro_emvae.__version__}, torch {torch.__version__}, pyro {pyro.__version__}, "
    versions += f"Python {platform.python_version()}"

    def record(check: str, figure: Any) -> None:
        nonlocal last
        seconds, last = time.perf_counter() - last, time.perf_counter()
        request.node.user_properties.append((RECORD, [check, str(figure), f"{seconds:.1f}", versions]))

    return record
