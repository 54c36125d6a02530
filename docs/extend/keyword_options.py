"""An extension of griffe, which reads the source code for the reference: the site is built without torch.

It shows every keyword of ``**options: Unpack[...]``, as ``automodel_conv.doors.keyword_options`` does at run time. It
reads ``automodel_conv.kernels``, which griffe skips because the folder has no ``__init__.py``. And it links functions
and classes to their source code.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from griffe import (
    Class,
    ExprCall,
    ExprKeyword,
    Extension,
    Function,
    GriffeLoader,
    Module,
    Object,
    Parameter,
    ParameterKind,
    visit,
)

REPOSITORY = "https://github.com/automodel-conv/automodel_conv"
_ENTRY = re.compile(r"^( *)\*\*options: .*$", re.MULTILINE)
# Text of docstrings that Markdown or griffe would not read as it is meant.
_SPELLED = ((re.compile(r"::$", re.MULTILINE), ":"), (re.compile(r"^( *)Example:$", re.MULTILINE), r"\1Examples:"))


class KeywordOptions(Extension):
    """Shows functions on the site as callers see them."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Write docstrings as Markdown, which has no ``::``, and with griffe's name of the section of doctests."""
        if obj.docstring is not None:
            for old, new in _SPELLED:
                obj.docstring.value = old.sub(new, obj.docstring.value)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        """Show the keyword options of every function, and link every function and class to its source."""
        if pkg.name == "automodel_conv":
            _add_kernels(pkg, loader)
        for obj in _functions_and_classes(pkg):
            path = obj.relative_package_filepath.as_posix().replace("automodel_conv/kernels/", "kernels/", 1)
            obj.source_link = f"{REPOSITORY}/blob/main/{path}#L{obj.lineno}-L{obj.endlineno}"
            call = _keyword_options_call(obj) if isinstance(obj, Function) else None
            if call is not None:
                _expand(obj, call)


def _add_kernels(package: Module, loader: GriffeLoader) -> None:
    folder = package.filepath.parent / "kernels"
    collections = {"lines_collection": loader.lines_collection, "modules_collection": loader.modules_collection}
    kernels = Module("kernels", filepath=[folder], parent=package, **collections)
    package.set_member("kernels", kernels)
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        loader.lines_collection[path] = text.splitlines()
        options = {"docstring_parser": loader.docstring_parser, "docstring_options": loader.docstring_options}
        module = visit(path.stem, path, text, extensions=loader.extensions, parent=kernels, **options, **collections)
        kernels.set_member(path.stem, module)


def _functions_and_classes(module: Module | Class) -> Iterator[Function | Class]:
    for member in module.members.values():
        if isinstance(member, Function | Class):
            yield member
        if isinstance(member, Module | Class):
            yield from _functions_and_classes(member)


def _keyword_options_call(function: Function) -> ExprCall | None:
    """Return the call ``keyword_options(Options, Settings, name=default)`` that decorates a function."""
    for decorator in function.decorators:
        if isinstance(decorator.value, ExprCall) and str(decorator.value.function) == "keyword_options":
            return decorator.value
    return None


def _expand(function: Function, call: ExprCall) -> None:
    classes = [argument for argument in call.arguments if not isinstance(argument, ExprKeyword)]
    options, settings = (function.modules_collection[str(name.canonical_path)] for name in classes)
    changed = {argument.name: argument.value for argument in call.arguments if isinstance(argument, ExprKeyword)}
    types, defaults = _attributes(options), _attributes(settings)
    function.parameters._params[-1:] = [
        Parameter(
            name,
            annotation=types[name].annotation,
            kind=ParameterKind.keyword_only,
            default=str(changed.get(name, defaults[name].value)),
        )
        for name in types
    ]
    if function.docstring is not None:
        entries = "\n".join(_entry(name, attribute.docstring.value) for name, attribute in types.items())
        function.docstring.value = _ENTRY.sub(lambda old: textwrap.indent(entries, old[1]), function.docstring.value)


def _attributes(class_: Class) -> dict[str, Any]:
    """Return the annotated attributes of a class after those of its bases."""
    attributes: dict[str, Any] = {}
    for base in class_.resolved_bases:
        attributes |= _attributes(base)
    own = {name: member for name, member in class_.attributes.items() if "property" not in member.labels}
    return attributes | own


def _entry(name: str, text: str) -> str:
    lines = text.splitlines()
    return "\n    ".join([f"{name}: {lines[0][0].lower()}{lines[0][1:]}", *lines[1:]])
