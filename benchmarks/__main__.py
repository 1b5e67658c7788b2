"""Run all cases, or the named ones, and print a table of ratios.

    python -m benchmarks [name ...] [--minutes 11] [--quick] [--threads N] [--write]
    python -m benchmarks estimators | discrete_vae | guides [--help]

Every case runs with torch's default number of threads and with one, but for the heavy ones of EM, which run with one
unless they are named. The exit status is 1 if a limit is exceeded. The second line makes pages of their own: the first
two `docs/estimators_benchmark.md`, `guides` what it prints.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from . import compare, discrete_vae, em, estimators, guides, svi
from .timing import Case, machine, measure_all, table

CASES: dict[str, Case] = {case.name: case for module in (svi, em, compare, guides) for case in module.CASES}
PAGES = {"estimators": estimators.main, "discrete_vae": discrete_vae.main, "guides": guides.main}
HEAVY = {case.name for case in em.CASES if case.name != "e_phase"}
TARGET = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks --write`. Both sides run in turn in one process, warmed up, without the collector; a
ratio is the median over the turns of our time divided by theirs. "Theirs" is Pyro with the same model, guide and
optimizer unless the case says otherwise; in those against scikit-learn, a fit of ten iterations in float64.
"""


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in PAGES:
        return PAGES[sys.argv[1]](sys.argv[2:])
    options = parse()
    plan = planned(options.names, options.threads)
    print(text := machine(), flush=True)
    passed, minutes = True, 0.02 * len(CASES) if options.quick else options.minutes
    weight = {count: sum(3 if case.name in HEAVY else 1 for case in cases) for count, cases in plan.items()}
    for count, cases in plan.items():
        torch.set_num_threads(count)
        results = measure_all(cases, minutes * weight[count] / sum(weight.values()))
        results.sort(key=lambda result: list(CASES).index(result.case.name))
        section = f"torch with {count} thread{'s' * (count > 1)}:\n\n{table(results)}"
        print(f"\n{section}", flush=True)
        text += f"\n\n{section}"
        passed &= all(result.ok for result in results)
    if options.write:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(f"{INTRODUCTION}\n{text}\n", encoding="utf-8")
    return int(not passed)


def planned(names: Sequence[str], threads: int | None) -> dict[int, list[Case]]:
    """Return the cases by number of threads, the heavy ones first; these, if not named, with one thread alone."""
    chosen = sorted((CASES[name] for name in names or CASES), key=lambda case: case.name not in HEAVY)
    counts = [threads] if threads else sorted({1, torch.get_num_threads()}, reverse=True)
    return {n: [case for case in chosen if names or n == counts[-1] or case.name not in HEAVY] for n in counts}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios of our times to Pyro's.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of: {', '.join(CASES)}")
    parser.add_argument("--minutes", type=float, default=11.0, help="in all, shared out among the cases")
    parser.add_argument("--quick", action="store_true", help="as short as can be: only shows that all of them run")
    parser.add_argument("--threads", type=int, help="torch's threads; by default both the default number and one")
    parser.add_argument("--write", action="store_true", help=f"also write {TARGET.name}")
    options = parser.parse_args()
    if unknown := set(options.names) - CASES.keys():
        parser.error(f"no case {sorted(unknown)}; there are: {', '.join(CASES)}")
    return options


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # arviz, once a day at import
    raise SystemExit(main())
