"""Tests of the options that say where a checkpoint is: their defaults, their checks, and what is not shown."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from automodel_conv.compiling.options import LoadSettings
from automodel_conv.errors import ConversionError
from automodel_conv.files.source_options import SourceOptions, SourceSettings


def test_settings_have_the_options_and_their_defaults():
    assert {field.name for field in fields(SourceSettings)} == SourceOptions.__optional_keys__
    assert not SourceOptions.__required_keys__
    settings = SourceSettings()
    given = {name for name in SourceOptions.__optional_keys__ if getattr(settings, name) not in (None, "", False)}
    assert not given


def test_options_are_returned_as_keywords():
    settings = SourceSettings(revision="main", subfolder="a/b", storage_options={"anon": True})
    options = settings.source()
    assert options.keys() == SourceOptions.__optional_keys__
    assert SourceSettings(**options) == settings


def test_credentials_are_not_in_the_representation():
    settings = SourceSettings(token="hidden", storage_options={"secret": "hidden"}, revision="main")
    assert "hidden" not in repr(settings)
    assert "main" in repr(settings)


@pytest.mark.parametrize("subfolder", ["", "a", "a/b", "a b/ü", "..a", "a..", "a#b?c%20"])
def test_folder_within_the_checkpoint_is_accepted(subfolder):
    assert SourceSettings(subfolder=subfolder).subfolder == subfolder


@pytest.mark.parametrize("subfolder", ["/a", "../a", "a/..", "a/../b", "a//b", "a/", "/", "..", "..\\a", "a\\..\\b"])
def test_folder_outside_of_the_checkpoint_is_refused(subfolder):
    with pytest.raises(ConversionError, match=r"(?s)no subfolder.*relative path"):
        SourceSettings(subfolder=subfolder)


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("s3://bucket/folder", False),
        ("HTTPS://host/folder", False),
        ("hf://org/name", True),
        ("HF://org/name", True),
        ("org/name", True),
        (Path("folder"), True),
    ],
)
def test_one_of_several_paths_gets_what_it_can_use(path, kept):
    given = SourceSettings("main", "token", "cache", "folder", "fp16", True, {"anon": True}, "node")
    shared = given.shared(path)
    assert (shared.token, shared.cache_dir) == (("token", "cache") if kept else (None, None))
    assert replace(shared, token="token", cache_dir="cache") == given
    assert given.further(path) == replace(shared, revision=None, subfolder="", variant=None)


def test_options_of_a_load_are_shared_without_the_others():
    settings = LoadSettings(threads=3, token="hidden", subfolder="a")
    assert settings.shared("org/name") == SourceSettings(token="hidden", subfolder="a")
    assert settings.further("org/name") == SourceSettings(token="hidden")
