"""The public API as text: every name, with its signature.

    python -m tests.house.public_api > tests/house/public_api.txt

The listing has the package's ``__all__``, with the module that also has each name; all of the modules that users
import themselves; and the verbs of the kernels. Signatures are as ``inspect`` shows them, annotations as in the source.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import import_module
from typing import Any, ForwardRef, get_args, get_origin, is_typeddict

PACKAGE = "automodel_conv"
_SHORT = 100
MODULES = (
    f"{PACKAGE}.conversion_mapping",
    f"{PACKAGE}.integrations.dcp",
    f"{PACKAGE}.integrations.nemo",
    f"{PACKAGE}.integrations.vllm",
    f"{PACKAGE}.recipes",
    f"{PACKAGE}.testing",
    f"{PACKAGE}.types",
)
# Public functions of the kernels, by module.
VERBS = {
    "dequantize": ("dequantize", "dequantize_torch"),
    "interleave": ("interleave", "interleave_torch", "deinterleave", "deinterleave_torch"),
    "strided_copy": ("strided_copy", "strided_copy_torch"),
    "transpose": ("transpose", "transpose_torch"),
}


class _Written(str):
    """An annotation that is shown without quotes, the same in Python 3.14 and older versions."""

    def __repr__(self) -> str:
        return str(self)


def listing() -> str:
    """Return the whole listing, with a section for each module."""
    package = import_module(PACKAGE)
    homes = {name: home for home, names in package._DEFINED_IN.items() for name in names}
    sections = [[f"{PACKAGE}.__all__", *_lines(package, package.__all__, homes)]]
    sections += [[name, *_lines(module, public_names(module))] for name, module in _modules(MODULES)]
    verbs = {f"{PACKAGE}.kernels.{module}": names for module, names in VERBS.items()}
    sections += [[name, *_lines(module, verbs[name])] for name, module in _modules(verbs)]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def public_names(module: Any) -> list[str]:
    """Return the names in a module's ``__all__``, or else the names that it defines and does not import."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    names: set[str] = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return sorted(name for name in names if not name.startswith("_"))


def _modules(names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    return ((name, import_module(name)) for name in names)


def _lines(module: Any, names: Iterable[str], homes: dict[str, str] | None = None) -> Iterator[str]:
    for name in sorted(names):
        value = getattr(module, name)
        if homes is not None and getattr(import_module(homes[name]), name) is not value:
            raise ImportError(f"{name} is a different object in {homes[name]}")
        yield from _indented(_entry(name, value), "  ")
        if inspect.isclass(value):
            for member in _members(value):
                yield from _indented(member, "    ")


def _indented(text: str, before: str) -> Iterator[str]:
    return (before + line for line in text.splitlines())


def _entry(name: str, value: Any) -> str:
    if get_origin(value) is not None:
        return f"{name}: {', '.join(_texts(value))}"
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}{_signature(value)}" if callable(value) else f"{name}: {type(value).__name__}"


def _texts(kind: Any) -> Iterator[str]:
    """Yield the texts that a type allows, and the names of the other types in it."""
    for one in get_args(kind):
        if get_origin(one) is not None:
            yield from _texts(one)
        else:
            yield one.__name__ if inspect.isclass(one) else repr(one)


def _members(cls: type) -> Iterator[str]:
    """Yield the constructor and the public members; members of a public base class are listed with that class."""
    if is_typeddict(cls):
        yield from (f"{name}: {_written(kind)}" for name, kind in sorted(cls.__annotations__.items()))
        return
    if "__init__" in vars(cls) or "__new__" in vars(cls):
        yield f"__init__{_signature(cls)}"
    package = import_module(PACKAGE)
    public = {getattr(package, name) for name in package.__all__}
    ours = [base for base in cls.__mro__ if base is cls or (_is_ours(base) and base not in public)]
    named = {name for base in ours for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    for name in sorted(name for name in named if not name.startswith("_")):
        value = inspect.getattr_static(cls, name, None)
        if isinstance(value, property | cached_property):
            yield f"{name}: a property"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{type(value).__name__} {name}{_signature(getattr(cls, name))}"
        elif inspect.isfunction(value):
            yield f"{name}{_signature(value)}"
        else:
            yield f"{name}: an attribute"


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == PACKAGE


def _signature(value: Any) -> str:
    """Return the signature in one line if it is short, else a line per parameter."""
    signature = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=_written(parameter.annotation), default=_default(parameter.default))
        for parameter in signature.parameters.values()
    ]
    written = signature.replace(parameters=parameters, return_annotation=_written(signature.return_annotation))
    line = str(written)
    if len(line) <= _SHORT:
        return line
    kinds = [parameter.kind for parameter in parameters]
    lines = [f"    {parameter}," for parameter in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "    *,")
    returned = line[line.rindex(")") + 1 :] if "->" in line else ""
    return "\n".join(["(", *lines, f"){returned}"])


def _written(annotation: Any) -> Any:
    """Return the text of an annotation without quotes; any other object unchanged."""
    if isinstance(annotation, ForwardRef):  # fields of a NamedTuple
        annotation = annotation.__forward_arg__
    return _Written(annotation) if isinstance(annotation, str) else annotation


def _default(value: Any) -> Any:
    """Return a default that can be shown; an object without a text of its own would be shown with its address."""
    return _Written(f"a {type(value).__name__}") if type(value).__repr__ is object.__repr__ else value


if __name__ == "__main__":
    sys.stdout.write(listing())
