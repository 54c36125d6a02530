"""Tests of the public API: it must equal ``public_api.txt``, so that every change is made there and noticed."""

import difflib
from pathlib import Path

import automodel_conv
from tests.house.public_api import listing, public_names

WRITTEN = Path(__file__).with_name("public_api.txt")


def changes_in(current):
    written = WRITTEN.read_text(encoding="utf-8").splitlines()
    return "\n".join(difflib.unified_diff(written, current.splitlines(), "public_api.txt", "found", lineterm="", n=3))


def test_public_api_equals_the_file():
    difference = changes_in(listing())
    advice = "if intended: python -m tests.house.public_api > tests/house/public_api.txt, and note it in CHANGELOG.md"
    assert not difference, f"the public API has changed:\n{difference}\n{advice}"


def test_changed_default_is_noticed(monkeypatch):
    def open_checkpoint(path: "str | os.PathLike[str]", *, revision: "str | None" = "main") -> "Checkpoint":  # noqa: F821
        raise AssertionError

    from automodel_conv.files import checkpoint

    monkeypatch.setattr(checkpoint, "open_checkpoint", open_checkpoint)
    monkeypatch.setattr(automodel_conv, "open_checkpoint", open_checkpoint)
    difference = changes_in(listing())
    assert "-      revision: str | None = None," in difference
    assert (
        "+  open_checkpoint(path: str | os.PathLike[str], *, revision: str | None = 'main') -> Checkpoint" in difference
    )


def test_added_or_removed_name_is_noticed(monkeypatch):
    monkeypatch.setattr(automodel_conv, "__all__", [name for name in automodel_conv.__all__ if name != "ReadError"])
    assert "-  class ReadError(ConversionError)" in changes_in(listing())


def test_names_that_a_module_only_imports_or_keeps_to_itself_are_not_public():
    from automodel_conv import testing

    assert {"POISON", "Guarded", "guarded"} <= {*public_names(testing)}
    assert {"torch", "Tensor", "prod", "_GUARD"} <= vars(testing).keys()
    assert not {"torch", "Tensor", "prod", "_GUARD"} & {*public_names(testing)}
