"""How a checkout is built: rooms, arrows, circles, the longest function, and what else a reader stumbles over.

    python Testing/structure.py [CHECKOUT ...]

Read from the source alone, so that it runs on any commit, before and after a change. Rooms are the folders of
MorphSeekLib; a module that lies in none is a room of its own. With ``--check`` it exits with 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import ast
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

LIMITS = {
    "circles": 0,
    "longest function": 80,
    "most parameters": 8,
    "README characters": 9000,
    "private names imported": 0,
}


@dataclass
class Structure:
    """The figures of a checkout; ``where`` names the place of each extreme."""

    figures: dict[str, int] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def most(self, name: str, value: int, place: str) -> None:
        """Note a value if it is the largest so far."""
        if value > self.figures.get(name, -1):
            self.figures[name], self.where[name] = value, place

    def add(self, name: str, value: int = 1, place: str = "") -> None:
        """Add to a count."""
        self.figures[name] = self.figures.get(name, 0) + value
        if place:
            self.where[name] = place


def read(checkout: Path) -> Structure:
    """Measure a checkout."""
    found = Structure()
    for name in ("circles", "private names imported", "dict[str, Any] in signatures"):
        found.add(name, 0)
    arrows: dict[str, set[str]] = {}
    for top in ("MorphSeekLib", "MorphSeek"):
        for path in sorted((checkout / top).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            tree, place = ast.parse(text), str(path.relative_to(checkout))
            found.add("lines of Python", len(text.splitlines()))
            _functions(tree, place, found)
            _imports(tree, path.relative_to(checkout / top).parts, top, place, found, arrows)
    found.add("rooms of the engine", len(arrows))
    found.add("arrows between rooms", sum(len(to) for to in arrows.values()))
    circles = _circles(arrows)
    found.add("circles", len(circles), "; ".join(" - ".join(sorted(circle)) for circle in circles))
    found.add("README characters", len((checkout / "README.md").read_text(encoding="utf-8")))
    return found


def _functions(tree: ast.Module, place: str, found: Structure) -> None:
    commands = {node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _is_command(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        here = f"{place}:{node.lineno} {node.name}"
        found.most("longest function", node.end_lineno - node.lineno + 1, here)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        if node not in commands:
            found.most("most parameters", len(own), here)
        hints = [argument.annotation for argument in arguments] + [node.returns]
        for hint in hints:
            if hint is not None:
                found.add("dict[str, Any] in signatures", ast.unparse(hint).count("dict[str, Any]"))


def _is_command(node: ast.FunctionDef) -> bool:
    """A command of the command line: its parameters are options that a user types."""
    return any("command" in ast.unparse(decorator) for decorator in node.decorator_list)


def _imports(
    tree: ast.Module, parts: tuple[str, ...], top: str, place: str, found: Structure, arrows: dict[str, set[str]]
) -> None:
    room = parts[0].removesuffix(".py")
    engine = top == "MorphSeekLib" and room != "__init__"
    if engine:
        arrows.setdefault(room, set())
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        private = [
            alias.name
            for alias in node.names
            if alias.name.strip("_") and alias.name.startswith("_") and not alias.name.startswith("__")
        ]
        if private and (node.level or (node.module or "").startswith(("MorphSeek",))):
            found.add("private names imported", len(private), f"{place}:{node.lineno} {', '.join(private)}")
        if engine and node.level:
            base = list(parts[:-1])[: len(parts) - node.level]
            for alias in node.names:
                target = [*base, *(node.module.split(".") if node.module else []), alias.name][0]
                if target != room and not target.startswith("__") and target != "moved":
                    arrows[room].add(target)


def _circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Groups of rooms that reach each other."""
    reach = {room: _reached(room, arrows) for room in arrows}
    groups: list[set[str]] = []
    for room in arrows:
        group = {other for other in reach[room] if room in reach.get(other, ())}
        if group and group not in groups:
            groups.append(group | {room})
    return groups


def _reached(room: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = [room]
    while left:
        for other in arrows.get(left.pop(), ()):
            if other not in seen:
                seen.add(other)
                left.append(other)
    return seen


def broken(found: Structure) -> list[str]:
    """The limits that a checkout breaks, a sentence each."""
    over = {name: limit for name, limit in LIMITS.items() if found.figures.get(name, 0) > limit}
    return [
        f"{name}: {found.figures[name]}, at most {limit} ({found.where.get(name, '')})" for name, limit in over.items()
    ]


def main() -> None:
    """Print a column for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="*", default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--check", action="store_true", help="exit with 1 where the last checkout breaks a limit")
    options = parser.parse_args()
    columns = [read(checkout) for checkout in options.checkouts]
    names = list(dict.fromkeys(name for column in columns for name in column.figures))
    for name in names:
        values = "".join(f"{column.figures.get(name, 0):>10}" for column in columns)
        print(f"{name:<32}{values}  {columns[-1].where.get(name, '')}")
    for before, after in pairwise(columns):
        fewer = before.figures["dict[str, Any] in signatures"] / max(1, after.figures["dict[str, Any] in signatures"])
        print(f"dict[str, Any] in signatures: {fewer:.1f} times fewer")
    if options.check and (problems := broken(columns[-1])):
        print("\n".join(problems), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
