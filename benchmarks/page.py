"""Pages that a benchmark writes: sections under headings, each of which can be written anew by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyro_emvae._registry import entries

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROVISIONAL = "*Provisional: taken on a machine that was doing other things.*"


def registered(kind: str, names: Iterable[str]) -> list[str]:
    """Return those of the names that are registered, in their order."""
    known = {entry.name for entry in entries(kind)}
    return [name for name in names if name in known]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def is_busy() -> bool:
    """Whether the machine does more than this process."""
    return os.getloadavg()[0] > 1.5


def read(path: Path) -> dict[str, str]:
    """Return the sections of a page by heading; what stands above the first is under ``""``."""
    sections, heading = {"": ""}, ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.startswith("## "):
            heading = line[3:]
            sections[heading] = ""
        else:
            sections[heading] += f"{line}\n"
    return {name: text.strip() for name, text in sections.items()}


def write(path: Path, introduction: str, order: Sequence[str], new: dict[str, str]) -> None:
    """Write the page: the new sections, and the old ones of those that were not made anew."""
    sections = {**read(path), **new}
    parts = [introduction.strip(), *(f"## {name}\n\n{sections[name].strip()}" for name in order if name in sections)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
