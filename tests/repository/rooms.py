"""The rooms of `fxquant/` and the imports between them.

`python tests/repository/rooms.py` prints the tree of docs/architecture.md.

A room is a folder or a file directly in `fxquant/`. An arrow is an import; those for typing, those inside
functions, and modules that are named by a string, count.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fxquant"
FLOORS = """
errors progress version gc_pause
inputs schemes
processes ops
storage kernels
transforms
policy engine_readers
checkpoint
program
text models runtime engines
tracing calibration
frontend passes
lowering
generation
adapters
compilation
foreign
planning verification
evaluation
verbs
api
__init__
tools
__main__
"""
"""From the ground up: a room imports only what stands below it."""
DOTTED = re.compile(r"fxquant(\.\w+)+")
FLOOR = {room: floor for floor, line in enumerate(FLOORS.split("\n")[1:-1]) for room in line.split()}
ROOMS = tuple(FLOOR)


@dataclass(frozen=True)
class Import:
    """A module of fxquant imports another: paths relative to the package, without suffix."""

    importer: str
    imported: str

    @property
    def rooms(self) -> tuple[str, str]:
        return room(self.importer), room(self.imported)


def room(module: str) -> str:
    return module.split("/")[0]


def modules(package: Path = PACKAGE) -> list[str]:
    return sorted(str(file.relative_to(package).with_suffix("")) for file in package.rglob("*.py"))


def imports(package: Path = PACKAGE) -> list[Import]:
    """Every import between modules of the package; one of a name is one of the module or package that has it."""
    known = set(modules(package))
    return [
        Import(module, imported)
        for module in sorted(known)
        for imported in sorted(set(_imported(ast.parse((package / f"{module}.py").read_text()), known)))
        if imported != module
    ]


def _imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            names = [node.value]
        for name in names:
            if name.split(".")[0] == "fxquant":
                yield _module(name.split(".")[1:], known)


def _module(parts: list[str], known: set[str]) -> str:
    """The module that a dotted name lies in: the longest beginning that is one."""
    for length in range(len(parts), -1, -1):
        for name in ("/".join(parts[:length]), "/".join([*parts[:length], "__init__"])):
            if name in known:
                return name
    raise AssertionError(f"no such module: {'.'.join(parts)}")


def arrows(imported: list[Import]) -> set[tuple[str, str]]:
    """Between different rooms."""
    return {arrow.rooms for arrow in imported if arrow.rooms[0] != arrow.rooms[1]}


def upward(imported: list[Import]) -> list[Import]:
    """Imports that do not go down."""
    return [
        arrow
        for arrow in imported
        if arrow.rooms[0] != arrow.rooms[1] and FLOOR[arrow.rooms[0]] <= FLOOR[arrow.rooms[1]]
    ]


def circles(imported: list[Import]) -> list[list[str]]:
    """Sets of modules that import each other, directly or not."""
    below: dict[str, set[str]] = {}
    for arrow in imported:
        below.setdefault(arrow.importer, set()).add(arrow.imported)
    reach = {start: _reached(start, below) for start in below}
    rings = {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in below if a in reach[a]}
    return [list(ring) for ring in sorted(rings)]


def _reached(start: str, below: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(below.get(start, ()))
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += below.get(module, ())
    return seen


def title(module: str) -> str:
    """The first line of the docstring."""
    path = PACKAGE / f"{module}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n")[0]


def tree() -> str:
    """Floors from the top, each room with what it is."""
    lines = []
    for floor in range(max(FLOOR.values()), -1, -1):
        for name in (name for name in ROOMS if FLOOR[name] == floor):
            folder = (PACKAGE / name).is_dir()
            what = title(f"{name}/__init__" if folder else name)
            lines.append(f"{floor:>2}  {name + '/' if folder else name + '.py':16}{what}")
    return "\n".join(lines)


def main() -> None:
    """Print the tree and the counts."""
    imported = imports()
    print(tree())
    counts = f"{len(ROOMS)} rooms, {len(arrows(imported))} arrows between them, {len(upward(imported))} up"
    print(f"\n{counts}, {len(circles(imported))} circles of modules")


if __name__ == "__main__":
    main()
