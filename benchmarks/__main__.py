"""Run all cases, or the named ones, and print a table of ratios.

    python -m benchmarks [name ...] [--quick] [--threads N] [--write]
    python -m benchmarks estimators | discrete_vae | guides [--help]

Every case runs with torch's default number of threads and with one. The exit status is 1 if a limit is exceeded. The
second line makes pages of their own: the first two `docs/estimators_benchmark.md`, `guides` what it prints.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

from . import compare, discrete_vae, em, estimators, guides, svi
from .timing import Case, machine, measure, table

CASES: dict[str, Case] = {case.name: case for module in (svi, em, compare, guides) for case in module.CASES}
PAGES = {"estimators": estimators.main, "discrete_vae": discrete_vae.main, "guides": guides.main}
TARGET = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks --write`. Both sides run in turn in one process; a ratio is the median over the turns
of our time divided by theirs. "Theirs" is Pyro with the same model, guide and optimizer unless the case says otherwise.
"""


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in PAGES:
        return PAGES[sys.argv[1]](sys.argv[2:])
    options = parse()
    chosen = [CASES[name] for name in options.names or CASES]
    threads = [options.threads] if options.threads else sorted({1, torch.get_num_threads()}, reverse=True)
    print(text := machine(), flush=True)
    passed = True
    for count in threads:
        torch.set_num_threads(count)
        results = [measure(case, 1.0 if options.quick else 8.0) for case in chosen]
        section = f"torch with {count} thread{'s' * (count > 1)}:\n\n{table(results)}"
        print(f"\n{section}", flush=True)
        text += f"\n\n{section}"
        passed &= all(result.ok for result in results)
    if options.write:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(f"{INTRODUCTION}\n{text}\n", encoding="utf-8")
    return int(not passed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios of our times to Pyro's.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of: {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="a second per case: only shows that all of them run")
    parser.add_argument("--threads", type=int, help="torch's threads; by default both the default number and one")
    parser.add_argument("--write", action="store_true", help=f"also write {TARGET.name}")
    options = parser.parse_args()
    if unknown := set(options.names) - CASES.keys():
        parser.error(f"no case {sorted(unknown)}; there are: {', '.join(CASES)}")
    return options


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # arviz, once a day at import
    raise SystemExit(main())
