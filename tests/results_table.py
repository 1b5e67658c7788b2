r"""docs/results.md: what the slow checks measured. Read and written here, so that the two cannot differ."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "results.md"
HEADER = """# Results of the slow checks

`make test-full` writes this table; a slow check without a row fails `make test`.

"""


@dataclass(frozen=True)
class Row:
    """One figure of one slow check. `test` is pytest's id of the check."""

    check: str
    figure: str
    seconds: str
    versions: str
    test: str

    @property
    def function(self) -> str:
        """The id without its parameters, as `slow_functions` gives it."""
        return function(self.test)


def function(test: str) -> str:
    """Return a test's id without its parameters."""
    return test.partition("[")[0]


COLUMNS = tuple(f.name for f in fields(Row))


def render(rows: Iterable[Row]) -> str:
    """Return the page with one line per row, sorted by test."""
    lines = sorted(set(rows), key=lambda row: (row.test, row.check))
    table = [COLUMNS, ("---",) * len(COLUMNS), *map(astuple, lines)]
    return HEADER + "".join("| " + " | ".join(map(_escape, cells)) + " |\n" for cells in table)


def parse(text: str) -> list[Row]:
    """Return the rows of a page that `render` wrote."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = (line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines[2:])
    return [Row(*map(_unescape, row)) for row in cells]


def read(path: Path = PATH) -> list[Row]:
    """Return the rows of the page, none if there is no page yet."""
    return parse(path.read_text(encoding="utf-8")) if path.exists() else []


def write(new: Iterable[Row], ran: Iterable[str], known: Iterable[str], path: Path = PATH) -> None:
    """Replace the rows of the checks that ran, failed ones included, and drop those of checks that are gone.

    Args:
        new: The rows of the checks that passed.
        ran: All slow checks that ran, without parameters.
        known: All slow checks that exist, without parameters.
        path: The page.
    """
    current = set(known) - set(ran)
    kept = [row for row in read(path) if row.function in current]
    path.parent.mkdir(exist_ok=True)
    path.write_text(render([*kept, *new]), encoding="utf-8")


def slow_functions(root: Path = ROOT) -> set[str]:
    """Return the ids, without parameters, of all checks under tests/ with the mark ``slow``; nothing is imported."""
    return {
        f"{path.relative_to(root).as_posix()}::{name}"
        for path in sorted((root / "tests").rglob("test_*.py"))
        for name in slow_names(path.read_text(encoding="utf-8"))
    }


def slow_names(source: str) -> Iterator[str]:
    """Yield the slow checks of one test file: marked itself, by class, by module, or in a list of parameters."""
    tree = ast.parse(source)
    marked = _marked_names(tree)
    everything = any(_assigns(node, "pytestmark") and _marks(node, marked) for node in tree.body)
    yield from _slow_in(tree.body, "", everything, marked)


def _slow_in(body: list[ast.stmt], prefix: str, inherited: bool, marked: set[str]) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        slow = inherited or any(_marks(decorator, marked) for decorator in node.decorator_list)
        if isinstance(node, ast.ClassDef):
            slow = slow or any(_assigns(item, "pytestmark") and _marks(item, marked) for item in node.body)
            yield from _slow_in(node.body, f"{prefix}{node.name}::", slow, marked)
        elif node.name.startswith("test") and (slow or any(item.arg in marked for item in node.args.args)):
            yield prefix + node.name


def _marked_names(tree: ast.Module) -> set[str]:
    """Names at module level (lists of cases, helpers, fixtures) whose definition mentions the mark, to any depth."""
    marked: set[str] = set()
    while True:
        found = {name for node in tree.body for name in _names(node) if _marks(node, marked)}
        if found <= marked:
            return marked
        marked |= found


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("test"):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name) and target.id != "pytestmark"]


def _assigns(node: ast.stmt, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _marks(node: ast.AST, marked: set[str]) -> bool:
    return any(
        (isinstance(child, ast.Attribute) and child.attr == "slow" and ast.unparse(child.value).endswith("mark"))
        or (isinstance(child, ast.Name) and child.id in marked)
        for child in ast.walk(node)
    )


def _escape(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "&#124;")


def _unescape(cell: str) -> str:
    return cell.replace("&#124;", "|")
