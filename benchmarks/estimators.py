r"""The page of the gradient estimators: ``python -m benchmarks estimators [--only NAME ...] [--quick] [--write]``.

One command writes ``docs/estimators_benchmark.md`` anew, or the sections named by ``--only`` and leaves the others.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import pyro
import torch

from . import discrete, discrete_vae, estimator_times, snr, variances
from .page import DOCS, PROVISIONAL, is_busy, write

TARGET = DOCS / "estimators_benchmark.md"
SECTIONS: dict[str, tuple[str, Callable[[bool], str]]] = {
    "variances": ("Variance along training: logistic regression", variances.section),
    "snr": ("Signal-to-noise ratio against the number of samples", snr.section),
    "discrete": ("Discrete latents at equal evaluations", discrete.section),
    "times": ("Time per gradient", estimator_times.section),
}
ORDER = (*(title for title, _ in SECTIONS.values()), discrete_vae.TITLE)
TIMED = ("times",)
INTRODUCTION = """# Gradient estimators: benchmarks

Written by `python -m benchmarks estimators --write`, the last section by `python -m benchmarks discrete_vae --write`.
Rows are whatever is registered. Figures of variance and bias do not depend on the machine; those of time do, and are
ratios."""


def main(arguments: list[str]) -> int:
    """Run the sections and print them; write the page if asked to."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    made = {}
    for name in options.only or SECTIONS:
        title, section = SECTIONS[name]
        busy = is_busy()
        pyro.clear_param_store()
        body = section(options.quick)
        lines = [line for line in (_versions(), PROVISIONAL if name in TIMED and (busy or is_busy()) else "") if line]
        if options.quick:
            lines.append("*Provisional: a quick run, which only shows that all of it works.*")
        made[title] = "\n\n".join([body, *lines])
        print(f"## {title}\n\n{made[title]}\n", flush=True)
    if options.write:
        write(TARGET, INTRODUCTION, ORDER, made)
    return int(any("**no**" in body for body in made.values()))


def _versions() -> str:
    return f"python {platform.python_version()}, torch {torch.__version__}, pyro {pyro.__version__}."


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks estimators", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="these sections alone")
    parser.add_argument("--quick", action="store_true", help="small numbers: only shows that all of it runs")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--write", action="store_true", help=f"also write {TARGET.name}")
    return parser.parse_args(arguments)
