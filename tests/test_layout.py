"""The house rules that no single file shows: how long things may get, and what is not done.

Who may import whom is in `pyproject.toml`, as contracts of import-linter (`make lint`).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
TABLES = {"tests/models/configs.py"}  # an entry for each model type

SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "gradpipe").rglob("*.py"))
}


def _nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every module's syntax tree, with its file's name."""
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source, name)):
            yield name, node


def test_the_library_never_prints() -> None:
    """Output belongs to the command, which writes through its own console."""
    calls = [(name, node) for name, node in _nodes() if isinstance(node, ast.Call)]
    assert calls
    assert [(name, n.lineno) for name, n in calls if ast.unparse(n.func) == "print"] == []


def test_no_module_is_a_drawer() -> None:
    """A module is named after what it does: nothing is called utils or helpers."""
    drawers = {"util", "utils", "helper", "helpers"}
    assert [name for name in SOURCES if Path(name).stem.strip("_") in drawers] == []


def test_functions_fit_on_a_screen() -> None:
    """No function is longer than 60 lines, signature and docstring included."""
    functions = [
        (f"{name}:{node.name}", 1 + (node.end_lineno or 0) - node.lineno)
        for name, node in _nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert functions
    assert [(name, lines) for name, lines in functions if lines > MAX_FUNCTION_LINES] == []


def test_files_stay_short() -> None:
    """No file of the package or of its tests is longer than 400 lines, but for a table."""
    paths = [path for room in ("gradpipe", "tests") for path in (ROOT / room).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    lengths = {
        name: len(path.read_text("utf-8").splitlines())
        for name, path in names.items()
        if name not in TABLES
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}
