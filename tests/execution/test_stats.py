"""Tests of the counts of executors."""

from automodel_conv.execution.stats import LoadStats, Work


def test_work_is_added_by_field():
    assert Work(1, 2) + Work(10, 20) == Work(11, 22)
    assert sum([Work(1, 2), Work(3, 4)], Work(0, 0)) == Work(4, 6)
    assert sum([], Work(0, 0)) == Work(0, 0)


def test_load_to_the_host_has_no_work_on_a_device():
    stats = LoadStats(10, 2, 30)
    assert (stats.work, stats.device_scratch_bytes, stats.without_kernels) == (Work(0, 0), 0, None)
