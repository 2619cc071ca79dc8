#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the imports of the package, room by room, and hold them against the rules of the house.

    python tools/imports.py          # the drawing that stands in CONTRIBUTING.md
    python tools/imports.py --check  # rules broken, and whether that drawing is this one

Rules: an arrow runs down the floors, or along one; no circle of files; no two files of one name; no
class of more than 20 methods. Imports for type checkers alone do not count. Standard library only.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "vllm_flexquant": ROOT / "vllm_flexquant",
    "flexquant_kernels": ROOT / "kernels" / "flexquant_kernels",
}
FLOORS = (
    ("plugin",),
    ("host", "cli", "server"),
    ("quantize", "telemetry", "speculation", "residency"),
    ("planner",),
    ("policy", "requests"),
    ("options",),
    ("format",),
    ("kernels",),
)
OPTIONS = ("options", "environment", "values")
"""Files of the package's top that are one room."""

MOST_METHODS = 20
DOCUMENT, BEGIN, END = ROOT / "CONTRIBUTING.md", "<!-- imports -->", "<!-- /imports -->"


def room_of(module: str) -> str | None:
    """The room that a module is in, None for one outside, or for the package itself."""
    package, *rest = module.split(".")
    if package == "flexquant_kernels":
        return "kernels"
    if package != "vllm_flexquant" or not rest:
        return None
    return "options" if rest[0] in OPTIONS else rest[0]


def modules() -> dict[str, ast.Module]:
    """All modules of both packages, parsed."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def statements(node: ast.AST, late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Imports below a node, and whether they run later than the module's own; not those under
    TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from (pair for other in child.orelse for pair in statements(other, late))
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, late
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from statements(child, late or inside)


def imported(
    name: str, tree: ast.Module, known: dict[str, ast.Module]
) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a module imports, and whether late."""
    package = name if any(k.startswith(f"{name}.") for k in known) else name.rpartition(".")[0]
    for node, late in statements(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        for target in targets:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target, late


def arrows() -> dict[str, dict[str, bool]]:
    """By module: the modules of ours that it imports, and whether only late."""
    known = modules()
    found: dict[str, dict[str, bool]] = {}
    for name, tree in known.items():
        targets = found.setdefault(name, {})
        for target, late in imported(name, tree, known):
            targets[target] = late and targets.get(target, True)
    return found


def drawing() -> str:
    """Rooms from the top floor down, each with the rooms that it imports from and how often."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, targets in arrows().items():
        for target in targets:
            start, end = room_of(name), room_of(target)
            if start and end and start != end:
                counts[start][end] += 1
    order = [room for floor in FLOORS for room in floor]
    present = {room_of(name) for name in modules()}
    lines = []
    for number, floor in enumerate(FLOORS):
        for room in floor:
            if room not in present:
                continue
            below = sorted(counts[room], key=order.index)
            text = ", ".join(f"{end} ({counts[room][end]})" for end in below) or "nothing of ours"
            lines.append(f"{len(FLOORS) - number}  {room:<12} -> {text}")
    return "\n".join(lines)


def broken() -> list[str]:
    """Rules that do not hold, a sentence each."""
    found = []
    floor_of = {room: n for n, floor in enumerate(FLOORS) for room in floor}
    graph = arrows()
    for name, targets in graph.items():
        for target in targets:
            start, end = room_of(name), room_of(target)
            if start and end and floor_of[start] > floor_of[end]:
                found.append(f"{name} imports {target}, which is on a floor above")
    found += [f"circle of imports: {' -> '.join(circle)}" for circle in circles(graph)]
    names: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGES["vllm_flexquant"].rglob("*.py")):
        names[path.name].append(str(path.relative_to(ROOT)))
    for name, paths in names.items():
        if len(paths) > 1 and not name.startswith("__"):
            found.append(f"two files of one name: {', '.join(paths)}")
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = sum(
                    isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in node.body
                )
                if methods > MOST_METHODS:
                    found.append(
                        f"{name}.{node.name} has {methods} methods, more than {MOST_METHODS}"
                    )
    return found


def circles(graph: dict[str, dict[str, bool]]) -> list[list[str]]:
    """Circles of modules, one for each set that is tied, late imports among them; a package and the
    modules below it are not counted as one."""
    edges = {
        name: [t for t in targets if not name.startswith(f"{t}.") and not t.startswith(f"{name}.")]
        for name, targets in graph.items()
    }
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        for target in edges.get(name, ()):
            visit(target, [*path, name])
        done.add(name)

    for name in edges:
        visit(name, [])
    return found


def main() -> int:
    """Returns 1 if a rule is broken or the drawing is another."""
    if "--check" not in sys.argv:
        print(drawing())
        return 0
    problems = broken()
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    shown = "\n".join(line[4:] for line in rest.partition(END)[0].splitlines() if line.strip())
    if shown != drawing():
        problems.append(
            f"the drawing in {DOCUMENT.name} is not what `python tools/imports.py` says"
        )
    print("\n".join(problems) or "the house stands as drawn")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
