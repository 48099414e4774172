"""Where an import may point: down the list of rooms, never round in a circle, never hidden in a function."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import sepme_diffusers

PACKAGE = "sepme_diffusers"
FROM_TOP_TO_BOTTOM = (
    "cli",
    "playground",
    "evaluation",
    "interchange",
    "pocket",
    "making",
    "runtime",
    "bank",
    "doors",
    "text",
    "increment",
    "algebra",
    "version",  # a module of the root, beneath every room
)
ROOT = Path(sepme_diffusers.__file__).parent


class Import(NamedTuple):
    """One module of the package that another names, and where the statement stands."""

    importer: str
    imported: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


class Imports(ast.NodeVisitor):
    """The imports of the package's own modules in one module's syntax tree."""

    def __init__(self, module: str, is_package: bool, modules: frozenset[str]) -> None:
        self.module, self.modules = module, modules
        self.package = module if is_package else module.rpartition(".")[0]
        self.in_function = False
        self.found: list[Import] = []

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._note(name.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            parts = self.package.split(".")
            source = ".".join([*parts[: len(parts) - node.level + 1], *source.split(".")]).rstrip(".")
        for name in node.names:
            submodule = f"{source}.{name.name}"
            self._note(submodule if submodule in self.modules else source, node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before, self.in_function = self.in_function, True
        self.generic_visit(node)
        self.in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def _note(self, imported: str, node: ast.stmt) -> None:
        if imported.split(".")[0] == PACKAGE:
            self.found.append(Import(self.module, imported, node.lineno, self.in_function))


def module_name(file: Path, root: Path) -> str:
    parts = (root.name, *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(root: Path) -> Iterator[Import]:
    files = {module_name(file, root): file for file in sorted(root.rglob("*.py"))}
    for module, file in files.items():
        visitor = Imports(module, file.name == "__init__.py", frozenset(files))
        visitor.visit(ast.parse(file.read_text(encoding="utf-8"), str(file)))
        yield from visitor.found


def room(module: str) -> str:
    """The room of a module; the package's root, which holds the public names, has none."""
    return module.split(".")[1] if "." in module else ""


def upwards(found: Import) -> bool:
    """Whether an import leaves its room for one that stands higher, or for the root, whose names are of every room."""
    here, there = room(found.importer), room(found.imported)
    if here == there or not here or here == FROM_TOP_TO_BOTTOM[0]:
        return False
    return not there or FROM_TOP_TO_BOTTOM.index(there) < FROM_TOP_TO_BOTTOM.index(here)


def hidden(found: Import) -> bool:
    """Whether an import waits in a function elsewhere than in the command line, where it is for start-up."""
    return found.in_function and room(found.importer) != "cli"


def circle(imports: list[Import]) -> tuple[str, ...]:
    """Modules that import each other round in a circle, wherever the statements stand; none: ()."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        graph.setdefault(found.importer, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return tuple(error.args[1])
    return ()


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return list(imports_of(ROOT))


def test_every_module_is_in_a_room():
    strangers = {room(module_name(file, ROOT)) for file in ROOT.rglob("*.py")} - {"", *FROM_TOP_TO_BOTTOM}
    assert not strangers, f"list them in FROM_TOP_TO_BOTTOM: {sorted(strangers)}"


def test_imports_point_down(imports):
    assert [str(found) for found in imports if upwards(found)] == []


def test_no_modules_import_each_other(imports):
    assert " -> ".join(circle(imports)) == ""


def test_no_import_hides_in_a_function(imports):
    assert [str(found) for found in imports if hidden(found)] == []


@pytest.fixture
def small_package(tmp_path):
    """A package of the same name with one fault of each kind."""
    root = tmp_path / PACKAGE
    for name, text in {
        "__init__.py": "",
        "text/__init__.py": "",
        "text/one.py": "from . import two\nfrom ..algebra.three import x\n",
        "text/two.py": "def late():\n    from sepme_diffusers.text.one import y\n",
        "algebra/three.py": "import typing as t\nif t.TYPE_CHECKING:\n    import sepme_diffusers.text.one\n",
        "algebra/four.py": "from sepme_diffusers import text\n",
        "cli/app.py": "def command():\n    from sepme_diffusers.text import one\n    import torch\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return list(imports_of(root))


def test_an_import_upwards_is_seen_for_types_too(small_package):
    assert [str(found) for found in small_package if upwards(found)] == [
        "sepme_diffusers.algebra.four:1 imports sepme_diffusers.text",
        "sepme_diffusers.algebra.three:3 imports sepme_diffusers.text.one",
    ]


def test_an_import_in_a_function_is_seen_outside_the_command_line(small_package):
    assert [str(found) for found in small_package if hidden(found)] == [
        "sepme_diffusers.text.two:2 imports sepme_diffusers.text.one"
    ]


@pytest.mark.parametrize("other", ["sepme_diffusers.text.two", "sepme_diffusers.algebra.three"])
def test_a_circle_is_seen_through_a_function_and_for_types_too(small_package, other):
    names = {"sepme_diffusers.text.one", other}
    assert set(circle([found for found in small_package if {found.importer, found.imported} <= names])) == names
