"""A tree of source files as the house of a package: modules, their rooms, and every import, wherever it is."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_BY_NAME = ("import_module", "__import__")


class Import(NamedTuple):
    """An import of one module by a file, with the names that the file uses of it."""

    importer: str
    imported: str
    """Module of the package if there is one of this name, else the name as written."""
    taken: tuple[str, ...]
    """Names imported from the module, or the attributes that the file uses if it imports the module itself."""
    path: Path
    line: int

    def where(self, root: Path) -> str:
        return f"{self.path.relative_to(root)}:{self.line}"


class SourceTree:
    """The modules of a package below ``root``, including folders behind symbolic links."""

    def __init__(self, root: Path, package: str):
        self.root, self.package = root, package
        self.modules = dict(self._modules())

    @cached_property
    def imports(self) -> list[Import]:
        """Return the imports of all files: relative, in functions, under TYPE_CHECKING, and by name."""
        return [one for module, path in self.modules.items() for one in self._imports_of(module, path)]

    @property
    def inside(self) -> list[Import]:
        """Return the imports from a module of the package to another one."""
        return [one for one in self.imports if self.is_inside(one.imported) and one.imported != one.importer]

    def is_inside(self, module: str) -> bool:
        return module.partition(".")[0] == self.package

    def room(self, module: str) -> str:
        """Return ``planning/`` for a module in that folder, or ``loading.py`` for a module outside of folders."""
        inner = module.split(".")[1:]
        if not inner:
            return "__init__.py"
        return f"{inner[0]}/" if (self.root / self.package / inner[0]).is_dir() else f"{inner[0]}.py"

    @property
    def rooms(self) -> set[str]:
        return set(map(self.room, self.modules))

    @property
    def arrows(self) -> dict[tuple[str, str], Import]:
        """Return the pairs of rooms where the first imports the second, with one import as evidence."""
        arrows: dict[tuple[str, str], Import] = {}
        for one in self.inside:
            ends = self.room(one.importer), self.room(one.imported)
            if ends[0] != ends[1]:
                arrows.setdefault(ends, one)
        return arrows

    def calls(self, function: str, room: str) -> Iterator[str]:
        """Yield the places where a room calls a function by its bare name."""
        for module, path in self.modules.items():
            if self.room(module) == room:
                for node in self._nodes[module]:
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                        yield f"{path.relative_to(self.root)}:{node.lineno}"

    @cached_property
    def _nodes(self) -> dict[str, list[ast.AST]]:
        """Return all syntax nodes of each module."""
        return {
            module: list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))
            for module, path in self.modules.items()
        }

    def _modules(self) -> Iterator[tuple[str, Path]]:
        for folder, _, files in sorted(os.walk(self.root / self.package, followlinks=True)):
            for file in sorted(files):
                if file.endswith(".py"):
                    path = Path(folder, file)
                    parts = path.relative_to(self.root).with_suffix("").parts
                    yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path

    def _imports_of(self, module: str, path: Path) -> Iterator[Import]:
        used = _attributes(self._nodes[module])
        for node in self._nodes[module]:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name
                    yield Import(module, self._known(alias.name), used.get(name, ()), path, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = _base(node, module, path)
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    if whole in self.modules:
                        yield Import(module, whole, used.get(alias.asname or alias.name, ()), path, node.lineno)
                    else:
                        yield Import(module, self._known(base), (alias.name,), path, node.lineno)
            elif isinstance(node, ast.Call) and (name := _imported_by_name(node)):
                yield Import(module, self._known(name), (), path, node.lineno)

    def _known(self, name: str) -> str:
        """Return the longest prefix of a name that is a module of the package, or the name itself if there is none."""
        if not self.is_inside(name):
            return name
        parts = name.split(".")
        beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((prefix for prefix in beginnings if prefix in self.modules), name)


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return a shortest circle for each set of places that reach each other, starting at the first place by name."""
    reached = {start: _ways(start, arrows) for start in arrows}
    shortest: list[list[str]] = []
    seen: set[str] = set()
    for start in sorted(arrows):
        if start in reached[start] and start not in seen:
            shortest.append(reached[start][start])
            seen |= {other for other in reached[start] if start in reached.get(other, {})}
    return shortest


def _ways(start: str, arrows: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Return a shortest way from a place to each place that it reaches, both ends included."""
    ways: dict[str, list[str]] = {}
    pending = [[start]]
    while pending:
        further = []
        for way in pending:
            for place in sorted(arrows.get(way[-1], ())):
                if place not in ways:
                    ways[place] = [*way, place]
                    further.append(ways[place])
        pending = further
    return ways


def _attributes(nodes: Iterable[ast.AST]) -> dict[str, tuple[str, ...]]:
    """Return the attributes that the code looks up, by the dotted name of their object."""
    attributes: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Attribute) and (name := _dotted(node.value)):
            attributes.setdefault(name, set()).add(node.attr)
    return {name: tuple(sorted(attributes)) for name, attributes in attributes.items()}


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return inner and f"{inner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _base(node: ast.ImportFrom, module: str, path: Path) -> str:
    """Return the absolute name of the module that an import names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def _imported_by_name(node: ast.Call) -> str | None:
    """Return the module named in ``import_module("...")`` and similar calls, or None if the name is no literal."""
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    first = node.args[0] if node.args else None
    if function in _BY_NAME and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return None
