"""The folders import in one order, read from the source: a file knows its own row and those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import openlance

PACKAGE = Path(openlance.__file__).parent

ORDER = (
    "errors", "config", "tokenizer",
    "sequence", "flow", "model", "data", "world", "infer", "train", "rl", "eval", "serve",
    "demo", "cli", "__main__",
)  # fmt: skip

# Rows that may not be imported although they stand above.
STRANGERS = {
    "flow": {"tokenizer", "sequence"},
    "world": {"sequence", "flow", "model", "tokenizer"},
    "train": {"infer"},
    "serve": {"train", "rl", "eval"},
}
# What the package may be imported without knowing: tensors stay out of the configuration.
PURE = ("errors", "config")

FILES = sorted(PACKAGE.rglob("*.py"))


def row_of(path: Path) -> str:
    """The row of a file: the first folder below the package, or the file itself."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, those inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "openlance":
                found |= {f"openlance.{alias.name}" for alias in node.names if _is_module(alias.name)}
    return found


def _is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def rows_imported(path: Path) -> set[str]:
    parts = (name.split(".") for name in imported(path))
    return {name[1] for name in parts if name[0] == "openlance" and len(name) > 1}


def test_every_file_has_a_row() -> None:
    unknown = {row_of(path) for path in FILES} - {*ORDER, "__init__"}
    assert unknown == set(), "name the new folder in ORDER, where the design puts it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_up(path: Path) -> None:
    row = row_of(path)
    if row == "__init__":
        return  # the front door, open to all
    below = {other for other in rows_imported(path) if ORDER.index(other) > ORDER.index(row)}
    assert below == set()
    assert rows_imported(path) & STRANGERS.get(row, set()) == set()


@pytest.mark.parametrize("name", PURE)
def test_configuration_knows_no_tensors(name: str) -> None:
    outside = {module.split(".")[0] for module in imported(PACKAGE / f"{name}.py")} - {"openlance"}
    assert outside <= {"__future__", "dataclasses", "math", "typing"}


def test_only_the_command_line_parses_arguments() -> None:
    parsers = {"argparse", "tyro", "click", "typer"}
    users = [path for path in FILES if {name.split(".")[0] for name in imported(path)} & parsers]
    # A folder's own `python -m` script is a command line too.
    assert {row_of(path) for path in users if path.name != "__main__.py"} <= {"cli"}
