"""Public functions as their callers see them: errors that advise only their arguments, and documented keyword options.

A public function is a "door" here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

from automodel_conv.errors import ConversionError, Words, message

# Texts of Python and torch for a lack of memory or threads; these errors have no class of their own.
_EXHAUSTED = re.compile("can't start new thread|DefaultCPUAllocator|std::bad_alloc")
_OPTIONS_ENTRY = re.compile(r"^( *)\*\*options: .*$", re.MULTILINE)
_DOC_WIDTH = 116

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")


def door(doing: str) -> Callable[[Callable[_Parameters, _Returned]], Callable[_Parameters, _Returned]]:
    """Decorate a public function so that its errors advise only arguments that it has.

    A keyword that the signature lacks raises TypeError, as Python does; see ``keyword_options``. All other errors pass
    through ``at_door`` with the arguments of the call.

    Args:
        doing: the work that the function does, as in "loading", for the error about a lack of memory.
    """

    def decorate(function: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
        signature = inspect.signature(function)
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        takes_any = inspect.Parameter.VAR_KEYWORD in kinds

        @functools.wraps(function)
        def called(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Returned:
            for name in () if takes_any else kwargs:
                if name not in signature.parameters:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            with at_door(doing, lambda: _arguments(signature, args, kwargs)):
                return function(*args, **kwargs)

        return called

    return decorate


def keyword_options(
    options: type, settings: type, **defaults: object
) -> Callable[[Callable[_Parameters, _Returned]], Callable[_Parameters, _Returned]]:
    """Decorate a function with ``**options: Unpack[...]`` so that its signature and docstring show every keyword.

    The entry ``**options:`` in the docstring is replaced by the string literals below the keys of the class, each as an
    entry of its own. The entry stays as it is if there is no source code to read them from.

    Args:
        options: the TypedDict.
        settings: a class with a parameter for each key. Its ``__init__`` has their annotations and defaults.
        defaults: defaults of this function that differ from those of ``settings``.
    """

    def decorate(function: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
        signature = inspect.signature(function)
        own = [param for param in signature.parameters.values() if param.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [
            param.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=defaults.get(param.name, param.default))
            for param in inspect.signature(settings).parameters.values()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        texts = key_docs(options)
        if function.__doc__ and texts:
            entries = "\n".join(_entry(param.name, texts[param.name]) for param in keywords if param.name in texts)
            function.__doc__ = _OPTIONS_ENTRY.sub(lambda entry: textwrap.indent(entries, entry[1]), function.__doc__)
        return function

    return decorate


def key_docs(options: type) -> dict[str, str]:
    """Return the text below each key of a TypedDict, with those of its bases; {} without source.

    Python keeps no strings below keys, so they are parsed from the source code of the module.
    """
    module = inspect.getmodule(options)
    try:
        tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return {}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def docs_of(name: str) -> dict[str, str]:
        if name not in classes:
            return {}
        docs: dict[str, str] = {}
        for base in classes[name].bases:
            if isinstance(base, ast.Name):
                docs |= docs_of(base.id) if base.id in classes else key_docs(getattr(module, base.id, dict))
        body = classes[name].body
        for key, text in pairwise(body):
            if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(text, ast.Expr):
                docs[key.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
        return docs

    return docs_of(options.__name__)


def _entry(name: str, text: str) -> str:
    """Return the entry of a keyword in ``Args:``, which begins with a small letter as all entries do."""
    return textwrap.fill(
        f"{name}: {text[0].lower()}{text[1:]}",
        width=_DOC_WIDTH - 8,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


@contextmanager
def at_door(doing: str, arguments: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """Run the body of a public function so that its errors advise only its own arguments.

    A lack of memory or threads in the system becomes a ConversionError. A lack of device memory or of pinned memory
    stays torch's own error, which callers know how to handle.

    Args:
        doing: the work that the function does, as in "loading", for the error about a lack of memory.
        arguments: returns the arguments of this call by name.
    """
    try:
        yield
    except ConversionError as error:
        error.say(_speller(arguments()))
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _EXHAUSTED.search(str(error)):
            raise
        found = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        do = [
            "free memory",
            "raise the limits of this process (ulimit -a)",
            "pass a smaller {threads=}",
            "pass a smaller {scratch_bytes=}",
        ]
        text = message(f"{doing} needs more memory or threads than the system has", found=found, do=do)
        exhausted = ConversionError(text)
        exhausted.say(_speller(arguments()))
        raise exhausted from error


def _arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> Mapping[str, object]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _speller(arguments: Mapping[str, object]) -> Words:
    """Return a function that spells advised arguments as Python callers write them.

    It returns None for an argument that the function lacks, or that has the advised value already.
    """

    def spell(advised: str) -> str | None:
        name, _, value = advised.partition("=")
        if "(" in name:  # another function
            return advised
        if name not in arguments or (value and repr(arguments[name]) == value.replace('"', "'")):
            return None
        return advised

    return spell
