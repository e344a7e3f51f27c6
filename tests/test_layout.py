"""The house rules that no single file shows: who may import whom, and how long things may get.

Read from the syntax trees, so that an import inside a function counts like any other.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cli", "pipeline", "stages", "store", "errors")  # each may import itself and what follows
FACADES = {"gradpipe", "gradpipe.__main__"}  # may import any room, and no room imports them
COLLECT_SIDE = frozenset(
    [
        *("samples", "model", "hooks", "statistics", "schedule", "embedded"),
        *("perplexity", "plan", "scratch", "streamed", "weights", "inputs", "tokens", "experts"),
        *("batch", "images", "tasks", "top1", "tensor_names"),
    ]
)
PRUNE_SIDE = frozenset(
    [
        *("score", "expression", "allocate", "ranks", "mask", "prune", "decode"),
        *("curvature", "sparsegpt", "lsq"),
    ]
)
SHARED = frozenset(["checkpoint", "device", "gblm_files"])  # leaves that import neither side
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One source file: its dotted name (a package's own for its `__init__`) and its syntax."""

    name: str
    is_package: bool
    source: str

    @property
    def nodes(self) -> Iterator[ast.AST]:
        """Every node of the syntax tree."""
        return ast.walk(ast.parse(self.source, self.name))

    @property
    def imports(self) -> Iterator[str]:
        """Dotted names of all that is imported: `from a.b import c` is `a.b.c`."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                yield from (f"{base}.{alias.name}" for alias in node.names)

    def _base(self, node: ast.ImportFrom) -> str:
        """Resolve the dots of a relative import."""
        if not node.level:
            return str(node.module)
        package = self.name.split(".")
        kept = package[: len(package) + self.is_package - node.level]
        return ".".join([*kept, node.module] if node.module else kept)


def _read(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    return Module(name=name, is_package=is_package, source=path.read_text(encoding="utf-8"))


MODULES = [_read(path) for path in sorted((ROOT / "gradpipe").rglob("*.py"))]


def _is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def _room(name: str) -> str:
    """Name the room of a dotted name; what is not in a room belongs to the façade."""
    room = name.split(".")[1] if "." in name else ""
    return room if room in ROOMS else "façade"


def _side(name: str) -> str:
    """Tell which side of the stages a dotted name is on; what both may use is shared."""
    stage = [*name.split("."), "", ""][2]
    return "collect" if stage in COLLECT_SIDE else "prune" if stage in PRUNE_SIDE else "shared"


def _climbs(importer: str, imported: str) -> bool:
    """Whether the import goes against `cli → pipeline → stages → store → errors`."""
    if not _is_in(imported, "gradpipe") or importer in FACADES:
        return False
    order = ("façade", *ROOMS)
    room, target = _room(importer), _room(imported)
    return target == "façade" or order.index(room) > order.index(target)


def _crosses(importer: str, imported: str) -> bool:
    """Whether the import joins the two sides of the stages, directly or through a shared leaf."""
    if not (_is_in(importer, "gradpipe.stages") and _is_in(imported, "gradpipe.stages")):
        return False
    return _side(imported) not in {"shared", _side(importer)}


def test_every_module_has_a_room() -> None:
    """A module outside the known rooms must first be given its place in the order."""
    assert MODULES
    strays = {m.name for m in MODULES if _room(m.name) == "façade"} - FACADES
    assert not strays, f"add to ROOMS, or move into a room: {sorted(strays)}"


def test_every_stage_has_a_side() -> None:
    """A stage that nobody has placed would count as shared, and could import what it likes."""
    prefix = "gradpipe.stages."
    stages = {m.name.removeprefix(prefix) for m in MODULES if m.name.startswith(prefix)}
    assert stages == COLLECT_SIDE | PRUNE_SIDE | SHARED


def test_imports_run_one_way() -> None:
    """A room imports only itself and the rooms below it."""
    assert [(m.name, i) for m in MODULES for i in m.imports if _climbs(m.name, i)] == []


def test_collect_and_prune_never_meet_in_the_stages() -> None:
    """The two sides share the store's schema and leaves that import neither of them."""
    assert [(m.name, i) for m in MODULES for i in m.imports if _crosses(m.name, i)] == []


def test_the_store_does_without_torch() -> None:
    """A store can be read and checked where torch is not installed."""
    store = [m for m in MODULES if _room(m.name) == "store"]
    assert [(m.name, i) for m in store for i in m.imports if _is_in(i, "torch")] == []


@pytest.mark.parametrize(
    ("importer", "imported", "climbs", "crosses"),
    [
        ("gradpipe.cli", "gradpipe.errors.GradpipeError", False, False),
        ("gradpipe.store.codec", "gradpipe.store.schema.StoreSpec", False, False),
        ("gradpipe.store.codec", "gradpipe.stages.mask", True, False),
        ("gradpipe.errors", "gradpipe.store", True, False),
        ("gradpipe.pipeline.run", "gradpipe.collect", True, False),
        ("gradpipe.pipeline.run", "gradpipe", True, False),
        ("gradpipe", "gradpipe.pipeline.run", False, False),
        ("gradpipe.stages.score", "gradpipe.stages.checkpoint.Checkpoint", False, False),
        ("gradpipe.stages.score", "gradpipe.stages.hooks", False, True),
        ("gradpipe.stages.hooks", "gradpipe.stages.prune.prune_layer", False, True),
        ("gradpipe.stages.checkpoint", "gradpipe.stages.model", False, True),
        ("gradpipe.stages", "gradpipe.stages.model", False, True),
        ("gradpipe.stages.score", "torch.nn.functional", False, False),
    ],
)
def test_the_rules_catch_what_they_forbid(
    importer: str, imported: str, *, climbs: bool, crosses: bool
) -> None:
    """An import against the order, or across the stages, is seen as such."""
    assert (_climbs(importer, imported), _crosses(importer, imported)) == (climbs, crosses)


@pytest.mark.parametrize(
    ("name", "is_package", "statement", "imported"),
    [
        ("gradpipe.store.codec", False, "from .schema import StoreSpec", "schema.StoreSpec"),
        ("gradpipe.store", True, "from .schema import StoreSpec", "schema.StoreSpec"),
        ("gradpipe.store", True, "from . import schema", "schema"),
        ("gradpipe.stages.mask", False, "from ..store import schema", "schema"),
        ("gradpipe.stages.mask", False, "def f():\n    import gradpipe.store.schema", "schema"),
    ],
)
def test_imports_are_resolved(
    name: str, statement: str, imported: str, *, is_package: bool
) -> None:
    """A relative or a lazy import is known by the full name of what it brings."""
    module = Module(name=name, is_package=is_package, source=statement)
    assert list(module.imports) == [f"gradpipe.store.{imported}"]


def test_the_library_never_prints() -> None:
    """Output belongs to the command, which writes through its own console."""
    calls = ((m.name, n) for m in MODULES for n in m.nodes if isinstance(n, ast.Call))
    assert [(name, n.lineno) for name, n in calls if ast.unparse(n.func) == "print"] == []


def test_no_module_is_a_drawer() -> None:
    """A module is named after what it does: nothing is called utils or helpers."""
    drawers = {"util", "utils", "helper", "helpers"}
    assert [m.name for m in MODULES if m.name.rsplit(".", 1)[-1].strip("_") in drawers] == []


def test_functions_fit_on_a_screen() -> None:
    """No function is longer than 60 lines, signature and docstring included."""
    functions = (
        (f"{m.name}.{node.name}", 1 + (node.end_lineno or 0) - node.lineno)
        for m in MODULES
        for node in m.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert [(name, lines) for name, lines in functions if lines > MAX_FUNCTION_LINES] == []


def test_files_stay_short() -> None:
    """No file is longer than 400 lines."""
    lengths = ((m.name, len(m.source.splitlines())) for m in MODULES)
    assert [(name, lines) for name, lines in lengths if lines > MAX_FILE_LINES] == []
