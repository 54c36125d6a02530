"""Tests that the tests in this folder detect faults planted in the package."""

from __future__ import annotations

import inspect

import pytest

from automodel_conv.errors import ConversionError
from automodel_conv.execution import writing
from automodel_conv.files import final_files, resuming, staging
from automodel_conv.publishing import conversion_files
from tests.crash_safety.support import (
    INDEX,
    planted,
    use,
)
from tests.crash_safety.test_changed_sources import test_source_changed_during_the_run_is_refused_at_its_end
from tests.crash_safety.test_existing_files import (
    test_a_second_conversion_of_the_same_process_is_refused,
    test_damaged_finished_file_is_written_again_despite_further_failures,
    test_directory_with_a_checkpoint_is_refused_and_unchanged,
    test_index_is_removed_first,
    test_unfinished_work_of_another_kind_is_refused_and_can_still_finish,
)
from tests.crash_safety.test_refused import test_disk_that_becomes_full_during_the_run

FOUND_BY = {
    "the lock is not taken": (
        staging,
        "                if not system.lock(file.fileno()):",
        "                if False:",
        test_a_second_conversion_of_the_same_process_is_refused,
        {},
    ),
    "an error is swallowed": (
        writing,
        "            system.reserve(file.fileno(), shard.nbytes)\n",
        "            try: system.reserve(file.fileno(), shard.nbytes)\n            except OSError: pass\n",
        test_disk_that_becomes_full_during_the_run,
        {"name": "reserve"},
    ),
    "a file that is written again counts as finished": (
        resuming,
        '{"again": name}',
        '{"finished": name}',
        test_damaged_finished_file_is_written_again_despite_further_failures,
        {"damage": "truncated"},
    ),
    "unfinished work of another kind is resumed": (
        resuming,
        "    if _is_same_work(was, now):",
        "    if True:",
        test_unfinished_work_of_another_kind_is_refused_and_can_still_finish,
        {"call": 40},
    ),
    "a source may change": (
        conversion_files,
        "        if now != state:",
        "        if False:",
        test_source_changed_during_the_run_is_refused_at_its_end,
        {"gone": False},
    ),
    "a checkpoint is overwritten": (
        resuming,
        "    if present:",
        "    if False:",
        test_directory_with_a_checkpoint_is_refused_and_unchanged,
        {"name": INDEX},
    ),
    "the index is removed last": (
        final_files,
        "reversed(list(placed))",
        "list(placed)",
        test_index_is_removed_first,
        {},
    ),
}


@pytest.mark.parametrize("mutant", FOUND_BY)
def test_each_planted_fault_fails_a_test(forked, model, source, wanted, tmp_path, monkeypatch, mutant):
    module, text, replacement, test, arguments = FOUND_BY[mutant]
    use(monkeypatch, module, planted(module, text, replacement))
    fixtures = {"forked": forked, "model": model, "source": source, "wanted": wanted, "tmp_path": tmp_path}
    fixtures |= {"monkeypatch": monkeypatch, **arguments}
    with pytest.raises((AssertionError, ConversionError, pytest.fail.Exception)):
        test(**{name: fixtures[name] for name in inspect.signature(test).parameters})
